"""onnxruntime's MatMulNBits on a CPU: 4-bit codes in blocks, int8 activations; a peer beside lath.

Each copy of the weight is a model of one node with a session of its own, as the runtime packs a
constant for its kernel when a session is made. Inputs and outputs are bound once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BITS, ZERO = 4, 8
# The operator's name for "multiply int8 activations"; 0 to 3 multiply fp32, fp16 or bf16.
INT8_COMPUTE = 4


def pack_blocks(dense: Tensor, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """MatMulNBits' operands of a weight [N, K]: codes uint8 [N, K / block, block / 2], the lower
    half byte first, and scales fp32 [N * K / block]; zero points are 8."""
    rows, columns = dense.shape
    groups = dense.float().reshape(rows, columns // block, block)
    scales = groups.abs().amax(dim=2).clamp(min=1e-12) / (ZERO - 1)
    codes = (groups / scales[..., None]).round().to(torch.int32) + ZERO
    pairs = codes[..., ::2] | codes[..., 1::2] << BITS
    return pairs.to(torch.uint8).numpy(), scales.reshape(-1).numpy()


def onnx_call(
    dense: Tensor, x: Tensor, block: int, copies: Callable[[int], int], threads: int
) -> tuple[Callable[[int], Tensor], int]:
    """The call that multiplies x [M, K] by the next copy of a weight [N, K], and the bytes of one.

    ImportError without onnxruntime and onnx, ValueError for K that is no multiple of the block.
    """
    import onnxruntime

    rows, columns = dense.shape
    if columns % block:
        raise ValueError(f"MatMulNBits takes K of {block}s here, got {columns}")
    codes, scales = pack_blocks(dense, block)
    model = _model(codes, scales, (len(x), rows, columns), block)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    values, y = x.float().contiguous(), torch.empty(len(x), rows)
    nbytes = codes.nbytes + scales.nbytes

    def bound() -> tuple[Any, ...]:
        session = onnxruntime.InferenceSession(
            model, sess_options=options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        for bind, name, tensor in (
            (binding.bind_input, "x", values), (binding.bind_output, "y", y),
        ):  # fmt: skip
            bind(name, "cpu", 0, np.float32, list(tensor.shape), tensor.data_ptr())
        return session, binding, values  # a binding holds addresses alone

    sessions = [bound() for _ in range(copies(nbytes))]

    def call(i: int) -> Tensor:
        session, binding, _ = sessions[i % len(sessions)]
        session.run_with_iobinding(binding)
        return y

    return call, nbytes


def _model(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], shape: tuple[int, int, int], block: int
) -> bytes:
    """One MatMulNBits, x [M, K] -> y [M, N], its weight a constant; serialized."""
    from onnx import TensorProto, helper, numpy_helper

    tokens, rows, columns = shape
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=columns, N=rows,
        bits=BITS, block_size=block, accuracy_level=INT8_COMPUTE,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, rows])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=9)
    serialized: bytes = model.SerializeToString()
    return serialized
