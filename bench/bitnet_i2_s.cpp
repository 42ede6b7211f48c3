// bitnet.cpp's I2_S product as a shared library, for `lath bench linear --peers bitnet-i2_s --bitnet
// PATH`. Its kernels are those of a checkout of microsoft/BitNet, headers those of any llama.cpp:
//
//     g++ -O3 -march=native -fopenmp -shared -fPIC -DGGML_TYPE_I2_S=GGML_TYPE_I8 \
//         -I $BITNET/include -I $LLAMA/ggml/include -I $LLAMA/ggml/src -I $LLAMA/ggml/src/ggml-cpu \
//         bench/bitnet_i2_s.cpp $BITNET/src/ggml-bitnet-mad.cpp -o libbitnet_i2_s.so
//
// Here is what its fork of ggml does around them: activations are rounded to int8 token by token,
// several tokens share a row of codes, one token shares several rows, rows are dealt to threads.
// Codes are stored as 0, 1, 2, so a token's sum of activations is taken off.

#include <cmath>
#include <cstdint>
#include <vector>

#include "gemm-config.h"
#include "ggml.h"

// C++ names of ggml-bitnet-mad.cpp.
size_t quantize_i2_s(const float *, void *, int64_t, int64_t, const float *);
void ggml_vec_dot_i2_i8_s_1x1(int, float *, size_t, const void *, size_t, const void *, size_t, int);
void ggml_vec_dot_i2_i8_s_1xN(int, float *, size_t, const void *, size_t, const void *, size_t, int);
void ggml_vec_dot_i2_i8_s_Nx1(int, float *, size_t, const void *, size_t, const void *, size_t, int);

extern "C" {

// Bytes of a row of 8-bit numbers; the quantiser asks for it and divides by four itself.
size_t ggml_row_size(enum ggml_type, int64_t columns) { return columns; }

// columns: a multiple of 128. packed: rows * columns / 4 + 32 bytes.
void bitnet_pack(const float *weight, void *packed, int64_t rows, int64_t columns) {
    quantize_i2_s(weight, packed, rows, columns, nullptr);
}

// y [tokens, rows] = x [tokens, columns] times the codes -1, 0, 1 of `packed` times `scale`.
void bitnet_linear(const float *x, const void *packed, float *y, int tokens, int rows, int columns,
                   float scale, int threads) {
    std::vector<int8_t> codes(static_cast<size_t>(tokens) * columns);
    std::vector<float> steps(tokens), sums(tokens);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int m = 0; m < tokens; m++) {
            const float *source = x + static_cast<size_t>(m) * columns;
            int8_t *target = codes.data() + static_cast<size_t>(m) * columns;
            float largest = 1e-5f;
#pragma omp simd reduction(max : largest)
            for (int k = 0; k < columns; k++) largest = std::fmax(largest, std::fabs(source[k]));
            const float factor = 127 / largest;
            int sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int k = 0; k < columns; k++) {
                const int code = static_cast<int>(std::nearbyint(source[k] * factor));
                target[k] = static_cast<int8_t>(code);
                sum += code;
            }
            steps[m] = scale / factor;
            sums[m] = static_cast<float>(sum);
        }
        const auto *weight = static_cast<const uint8_t *>(packed);
        const int whole = tokens / PARALLEL_SIZE * PARALLEL_SIZE;
#pragma omp for schedule(static)
        for (int block = 0; block < (rows + ROW_BLOCK_SIZE - 1) / ROW_BLOCK_SIZE; block++) {
            const int first = block * ROW_BLOCK_SIZE;
            const int count = rows - first < ROW_BLOCK_SIZE ? rows - first : ROW_BLOCK_SIZE;
            const uint8_t *row = weight + static_cast<size_t>(first) * columns / 4;
            for (int start = 0; start < whole; start += COL_BLOCK_SIZE) {
                const int left = whole - start;
                const int8_t *part = codes.data() + static_cast<size_t>(start) * columns;
                for (int r = 0; r < count; r++) {
                    ggml_vec_dot_i2_i8_s_Nx1(
                        columns, y + static_cast<size_t>(start) * rows + first + r, rows,
                        row + static_cast<size_t>(r) * columns / 4, columns, part, columns,
                        left < COL_BLOCK_SIZE ? left : COL_BLOCK_SIZE);
                }
            }
            for (int m = whole; m < tokens; m++) {
                auto *dot = count % PARALLEL_SIZE ? ggml_vec_dot_i2_i8_s_1x1
                                                  : ggml_vec_dot_i2_i8_s_1xN;
                dot(columns, y + static_cast<size_t>(m) * rows + first, rows, row, columns,
                    codes.data() + static_cast<size_t>(m) * columns, columns, count);
            }
            for (int m = 0; m < tokens; m++) {
                float *target = y + static_cast<size_t>(m) * rows + first;
                for (int r = 0; r < count; r++) target[r] = (target[r] - sums[m]) * steps[m];
            }
        }
    }
}
}
