"""The published techniques of low-bit and sparse linear layers, and of rounding weights."""

from __future__ import annotations

from lath.formats.system import System


def _linear(name: str, how: str, note: str, *tests: str) -> System:
    return System(name, "low-bit linear", how, tests, note)


_SPARSE_TESTS = (
    "test_sparse.py::test_the_decoded_tile_is_the_dense_tile",
    "test_triton_sparse.py::test_parity",
    "test_cpu_sparse.py::test_parity",
)


def _sparse(name: str, how: str, note: str, *tests: str) -> System:
    return System(name, "sparse weights", how, (*_SPARSE_TESTS, *tests), note)


LINEAR_SYSTEMS: tuple[System, ...] = (
    _linear(
        "FlexQ",
        '`linear(x, "int6-g128", activations="int6-g128")`, or "int8-g128" in some layers',
        "6-bit integers in int8 dots: the same sums as its bit planes on binary tensor cores",
        "test_activations.py::test_bit_planes_are_the_integer_matmul",
        "test_activations.py::test_flexq_stores_six_bits",
        "test_activations.py::test_flexq_patches_each_layer_as_it_asks",
        "test_activations.py::test_parity",
    ),
    _linear(
        "W8A8",
        '`linear(x, "int8", activations="int8")`: a scale per row and per token',
        "",
        "test_activations.py::test_parity",
        "test_linear.py::test_parity",
    ),
    _linear(
        "FP8 (E4M3, E5M2)",
        '`linear(x, "e4m3", activations="fp8")`, "e5m2" and "fp8-e5m2"',
        "an E4M3 dot where the GPU has one, fp16 that holds the same numbers elsewhere",
        "test_activations.py::test_no_other_code_is_nearer",
        "test_scaled_codes.py::test_fp16_stands_in_for_e4m3_exactly",
        "test_triton_tables.py::test_parity",
        "test_cpu_tables.py::test_bounds",
    ),
    _linear(
        "MatQuant",
        '`weight = quantize(w, "int8-g64-nested")`, `weight.nested(4)`, `weight.nested(2)`',
        "views of one store, half a step beside whole numbers so that no rounding is left to do; "
        "ordinary int8 codes are sliced as published and packed anew; training is not part of it",
        "test_nested.py::test_slices_of_all_codes",
        "test_nested.py::test_ordinary_codes_are_rounded",
        "test_nested.py::test_the_view_is_the_end_of_the_store",
        "test_nested.py::test_views_of_one_weight_run_and_read_their_share",
        "test_nested.py::test_parity",
    ),
    _linear(
        "DGQ",
        '`linear(x, "int4-g128-s8", activations="int8")`, `quantize(…, search=True)`',
        "scales of groups are multiplied into the codes: one int8 dot, summed in int32 over all K; "
        "the search is of the groups' scales, then of the rows' and the groups' together, both by "
        "the error of the weight",
        "test_scaled_codes.py::test_the_search_of_rows_lowers_errors",
        "test_scaled_codes.py::test_the_search_of_rows_by_brute_force",
        "test_scaled_codes.py::test_dgq_is_one_integer_sum_over_all_groups",
        "test_scaled_codes.py::test_scales_that_leave_int8_are_refused",
        "test_tables.py::test_int8_group_scales_are_one_int8_matmul",
    ),
    System(
        "Bitnet.cpp",
        "low-bit linear",
        '`quantize(weight, "ternary")` or `"ternary-1.6"`, `linear(…, activations="int8")`; '
        "`lath.integration.bitnet.load_bitnet` reads Hugging Face's checkpoints",
        (
            "test_ternary.py::test_kernels_give_the_integers_of_the_look_ups",
            "test_ternary.py::test_look_ups_are_the_product",
            "test_ternary.py::test_packing_is_the_definition_and_round_trips",
            "test_triton_tables.py::test_int8_sums_are_exact_at_every_split",
            "test_bitnet.py::test_every_layer_and_the_logits",
        ),
        "four codes a byte or five (1.6 bits, K padded to 160); TL1 and TL2 in the definition",
    ),
    System(
        "Vec-LUT",
        "low-bit linear",
        '`linear(x, w, activations="int8")` of a ternary weight on a CPU without VNNI, 5 tokens up',
        (
            "test_ternary.py::test_look_ups_on_a_cpu",
            "test_ternary.py::test_vector_look_ups_are_the_product",
            "test_triplets.py::test_every_form_of_look_up_is_one_integer",
            "test_ternary.py::test_other_instruction_sets",
        ),
        "four codes an index, entries of 16 tokens (LATH_ISA=avx2 or portable takes it "
        "elsewhere); on a Zen 4 three codes an index of a register, for any number of tokens",
    ),
    System(
        "Tequila",
        "low-bit linear",
        "`packed, bias = tequila(weight)`, `linear(x, packed, bias)`",
        ("test_ternary.py::test_tequila",),
        "training is not part of it",
    ),
    System(
        "GWQ",
        "low-bit linear",
        '`quantize(w, "int4-g128+out1%", importance=…)`: fp16 outliers beside any other codec',
        (
            "test_sums.py::test_planted_outliers_are_kept_and_the_rest_is_nearer",
            "test_sums.py::test_outliers_anywhere",
            "test_sums.py::test_outliers_by_what_they_cost",
            "test_cpu_sums.py::test_a_sum_is_one_multiplication_by_what_it_decodes_to",
            "test_triton_sums.py::test_outliers_are_exact",
        ),
        "the largest importance · w²; gradients are the caller's (importance = their squares)",
    ),
    System(
        "SliM-LLM",
        "low-bit linear",
        '`quantize(w, "mix2-g128-asym", search=True, importance=…)`: M - 1, M, M + 1 bits by '
        "groups of columns",
        (
            "test_sums_codecs.py::test_the_searched_share_is_the_best_of_all",
            "test_sums_codecs.py::test_a_share_is_found_where_groups_differ_and_where_they_do_not",
            "test_sums_codecs.py::test_mean_bits_are_those_of_the_bytes",
            "test_sums_codecs.py::test_every_pair_of_widths_round_trips",
            "test_sums_codecs.py::test_wide_groups_are_those_that_need_them",
            "test_sums_codecs.py::test_the_order_of_groups_does_not_matter",
            "test_cpu_sums.py::test_bounds",
            "test_triton_sums.py::test_parity",
        ),
        "the search tries every number of groups above and below by the error of the output under "
        "a diagonal Hessian, not its KL divergence; without it an eighth each; importance does not "
        "calibrate the scales",
    ),
    System(
        "Fast 2-bit",
        "low-bit linear",
        '`quantize(w, "mix2:4-2.25-g64-s8+out0.5%")`: 2- and 4-bit groups, scales of two orders',
        (
            "test_sums_codecs.py::test_mean_bits_are_those_of_the_bytes",
            "test_sums_codecs.py::test_mixed_is_nearer_than_uniform_where_groups_differ",
            "test_cpu_sums.py::test_bounds",
            "test_aot_sums.py::test_sums_compile",
        ),
        "one launch for each width; its asynchronous loads are the compiler's pipelining here",
    ),
    System(
        "BiLLM",
        "low-bit linear",
        '`quantize(w, "billm10%-g128", importance=…)`, `"int1-g128+int1-g128"`: sums of signs',
        (
            "test_sums_codecs.py::test_a_mask_between_two_scales_is_two_sums_of_signs",
            "test_sums_codecs.py::test_two_signs_by_brute_force",
            "test_sums_codecs.py::test_second_signs_lower_the_error_and_a_split_more",
            "test_sums_codecs.py::test_the_mask_is_counted",
        ),
        "two bits a weight, the mask counted; salience by importance · w²; no error compensation",
    ),
    System(
        "TP-Aware Dequantization",
        "low-bit linear",
        "`sort_pairs(model, importance)`, then `patch`; `weight.shard(rank, ranks, axis)`",
        (
            "test_pairs.py::test_a_sorted_pair_needs_no_gather_on_any_rank",
            "test_pairs.py::test_ranks_add_up_exactly",
            "test_pairs.py::test_ranks_add_up_within_the_bound",
            "test_pairs.py::test_sorting_changes_nothing_and_is_undone_bit_for_bit",
        ),
        "ranks are simulated in one process; processes and all-reduce are the caller's",
    ),
    System(
        "VPTQ",
        "low-bit linear",
        '`quantize(weight, "vq8-65536+256")`, `linear`, `patch(model, weights="vq8-256")`',
        (
            "test_vectors.py::test_weighted_k_means_beats_scalar_codes_at_equal_bits",
            "test_vectors.py::test_importance_moves_the_error_where_it_counts_less",
            "test_triton_vectors.py::test_parity",
            "test_cpu_vectors.py::test_bounds",
        ),
        "vectors lie along the inputs; importance is the diagonal of the Hessian, the caller's; "
        "no outlier book, no error feedback between columns",
    ),
    System(
        "GLVQ",
        "low-bit linear",
        '`quantize(weight, "lattice2-d8-g128")`, `linear`: x G over the whole numbers z',
        (
            "test_lattice.py::test_a_point_of_the_lattice_is_its_own",
            "test_lattice.py::test_a_lattice_beats_scalar_codes_at_equal_bits",
            "test_lattice.py::test_singular_lattices_are_refused",
            "test_lattice.py::test_cpu_parity",
        ),
        "Babai's nearest plane, generators by alternating least squares; no companding, no mixed "
        "bits of groups, no calibration",
    ),
    System(
        "GPTQ",
        "rounding of weights",
        '`quantize(w, codec, quantizer="gptq", hessian=…)`, `patch(…, quantizer="gptq")`',
        (
            "test_reference_quantizers.py::test_gptq_is_optimal_brain_quantisation_in_a_fixed_order",
            "test_quantizers.py::test_gptq_has_the_codes_of_the_definition",
            "test_calibration.py::"
            "test_each_layer_is_rounded_for_what_the_rounded_layers_before_return",
        ),
        "every codec of single weights; act-order with the groups of the unsorted columns",
    ),
    System(
        "AWQ",
        "rounding of weights",
        '`awq_scales(weights, codec, hessian)`, `patch(…, quantizer="awq")`',
        (
            "test_quantizers.py::test_awq_scales_equal_the_definition",
            "test_calibration.py::test_awq_scales_cancel_in_the_whole_model",
        ),
        "scales from rms(x), not mean |x|; the clipping of weights is `search=True`",
    ),
    System(
        "HQQ",
        "rounding of weights",
        '`quantize(w, "int4-g64-fzero", quantizer="hqq")`',
        ("test_quantizers.py::test_hqq_equals_the_definition",),
        "float minima; errors are split in steps of the scale",
    ),
    _sparse(
        "Flash-LLM",
        '`quantize(w, "sparse70-fp16")`, `linear`: read by a bitmap, multiplied as dense tiles',
        "a bit for each weight in place of an index for each kept one; numbers are gathered into "
        "registers, no thread writes a tile itself; magnitudes choose, or zeros of your own "
        "(`sparse0-…`)",
        "test_triton_sparse.py::test_sanitizer_is_clean_and_order_does_not_matter",
    ),
    _sparse(
        "SparAMX",
        '`patch(model, weights="sparse50-bf16")`; the bitmap expands 64 bytes with vpexpandb',
        "AVX512-VNNI, not AMX; linear layers only, its sparse cache is not here",
        "test_sparse_modules.py::test_a_patched_model_is_the_masked_model",
    ),
    _sparse(
        "Sparse Finetuning (SquareHead)",
        '`quantize(w, "sparse75-int8-g128")`, or "sparse0-int8" of a weight that was pruned before',
        "its use of sparse weights only: finetuning is the caller's",
        "test_sparse.py::test_sparse_is_dense_of_the_decoded_weights",
        "test_sparse_modules.py::test_a_model_that_was_pruned_before_keeps_its_own_zeros",
    ),
    _sparse(
        "LPViT",
        '`quantize(w, "sparse0-int8")` of a weight with blocks of zeros',
        "an empty tile of 16 x 128 costs its bits of the bitmap and 8 bytes to store; it is "
        "multiplied all the same: no product is saved",
        "test_sparse.py::test_blocks_of_zeros",
    ),
)
