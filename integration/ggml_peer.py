"""ggml's CPU matrix products, through its shared libraries: a peer to be timed beside lath.

The libraries are those of a build, given by its folder or in the environment's LATH_GGML, or those
that the llama-cpp-python package carries. Weights go where ggml itself would put them: into the
CPU's buffer type that takes them in another order ("CPU_REPACK") if there is one, else as they are.

vlut.cpp (Vec-LUT) is a ggml with types of its own, given by its folder or in LATH_VLUT. Its codes
are -1, 0, 1 without a scale. As published, its product of more than 32 tokens is wrong (tiles of
activations overlap in its scratch): `check_product` refuses it then.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# ggml's numbers of its types (ggml.h).
TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 8, "q4_k": 12, "tq1_0": 34, "tq2_0": 35}
# Of vlut.cpp; the others of its types have no quantiser.
VLUT_TYPES = {"i2_v": 40, "i2_v_4": 42, "i2_v_8": 43, "i1_v": 45, "i1_v_2": 46}
# Those that ggml has another order for on x86; it fails on others in that buffer type.
REPACKED = ("q4_0", "q4_k")
_F32 = 0
_GRAPH_BYTES = 1 << 20


class WrongProductError(RuntimeError):
    """A peer that does not multiply."""


# What ggml logs (each tensor that it takes in another order) is dropped.
_SILENCE = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)


class _InitParams(Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
}


def find_libraries(folder: str | Path | None = None) -> Path | None:
    """The folder of libggml-base and libggml-cpu: given, in LATH_GGML, the package's; or None."""
    folder = folder or os.environ.get("LATH_GGML")
    if folder is None:
        package = importlib.util.find_spec("llama_cpp")
        if package is None or package.origin is None:
            return None
        folder = Path(package.origin).parent / "lib"
    return _built(Path(folder))


def find_vlut(folder: str | Path | None = None) -> Path | None:
    """The folder of vlut.cpp's libraries: given, or in LATH_VLUT; or None."""
    folder = folder or os.environ.get("LATH_VLUT")
    return None if folder is None else _built(Path(folder))


def _built(folder: Path) -> Path | None:
    return folder if (folder / "libggml-cpu.so").exists() else None


@functools.cache
def _library(folder: Path) -> Any:
    """An object with ggml's functions, typed; OSError if the libraries cannot be loaded, or if
    another build that is loaded stands in for a part of this one."""
    # Each build keeps to its own symbols (DEEPBIND), as there may be two in one process.
    mode = os.RTLD_LOCAL | getattr(os, "RTLD_DEEPBIND", 0)
    base, cpu = (
        ctypes.CDLL(str(folder / name), mode=mode) for name in ("libggml-base.so", "libggml-cpu.so")
    )
    own, used = (ctypes.cast(one.ggml_init, c_void_p).value for one in (base, cpu))
    if own != used:
        raise OSError(f"another build of ggml is loaded: time that of {folder} in a run of its own")

    functions: dict[str, Any] = {}
    for name, (result, arguments) in _SIGNATURES.items():
        function = next((getattr(one, name) for one in (base, cpu) if hasattr(one, name)), None)
        if function is None:
            raise OSError(f"the ggml of {folder} has no {name}: another version is needed")
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    functions["ggml_log_set"](_SILENCE, None)
    return SimpleNamespace(**functions)


class GgmlLinear:
    """x [M, K] fp32 times a weight [N, K] in one of ggml's types, in `copies` copies.

    `calls(i)` multiplies by the i-th copy, so that weights can be cold. ValueError for a type
    that ggml does not know here, RuntimeError where ggml refuses the product.
    """

    def __init__(
        self, dense: Tensor, x: Tensor, kind: str, copies: int, folder: Path, threads: int = 1
    ) -> None:
        numbers = TYPES | VLUT_TYPES
        if kind not in numbers:
            raise ValueError(f"a ggml type must be one of {sorted(numbers)}, got {kind!r}")
        self._type = numbers[kind]
        self._ggml = ggml = _library(folder)
        rows, columns = dense.shape
        self._backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
        packed = self._quantize(dense.float().contiguous())
        self.nbytes = len(packed)
        self._graphs, self._outputs, self.repacked = [], [], ""
        self._context = ggml.ggml_init(_InitParams(_GRAPH_BYTES * (copies + 1), None, True))
        weights = ggml.ggml_init(_InitParams(_GRAPH_BYTES, None, True))
        matrices = [
            ggml.ggml_new_tensor_2d(weights, self._type, columns, rows) for _ in range(copies)
        ]
        tokens = ggml.ggml_new_tensor_2d(self._context, _F32, columns, x.shape[0])
        for matrix in matrices:
            product = ggml.ggml_mul_mat(self._context, matrix, tokens)
            graph = ggml.ggml_new_graph(self._context)
            ggml.ggml_build_forward_expand(graph, product)
            self._graphs.append(graph)
            self._outputs.append(product)
        self._place(weights, matrices[0], kind)
        for matrix in matrices:
            ggml.ggml_backend_tensor_set(matrix, packed, 0, len(packed))
        ggml.ggml_backend_alloc_ctx_tensors(self._context, self._backend)
        values = x.float().contiguous()
        ggml.ggml_backend_tensor_set(tokens, values.data_ptr(), 0, values.numel() * 4)
        self._shape = (x.shape[0], rows)

    def _quantize(self, dense: Tensor) -> bytes:
        rows, columns = dense.shape
        buffer = ctypes.create_string_buffer(rows * columns * 2)
        source = ctypes.cast(dense.data_ptr(), POINTER(c_float))
        size = self._ggml.ggml_quantize_chunk(self._type, source, buffer, 0, rows, columns, None)
        return buffer.raw[:size]

    def _place(self, weights: Any, first: Any, kind: str) -> None:
        """Allocate the weights in the buffer type that ggml itself would take for them."""
        ggml = self._ggml
        device = ggml.ggml_backend_get_device(self._backend)
        registry = ggml.ggml_backend_dev_backend_reg(device)
        address = ggml.ggml_backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if address and kind in REPACKED:
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
            for i in range(8):
                if not extra[i]:
                    break
                name = ggml.ggml_backend_buft_name(extra[i]).decode()
                if name == "CPU_REPACK":
                    ggml.ggml_backend_alloc_ctx_tensors_from_buft(weights, extra[i])
                    self.repacked = name
                    return
        ggml.ggml_backend_alloc_ctx_tensors(weights, self._backend)

    def __call__(self, i: int) -> None:
        status = self._ggml.ggml_backend_graph_compute(
            self._backend, self._graphs[i % len(self._graphs)]
        )
        if status != 0:
            raise RuntimeError(f"ggml refused the product with status {status}")

    def output(self, i: int = 0) -> Tensor:
        """What the last call with copy i made, [M, N]."""
        y = torch.empty(self._shape)
        graph = self._outputs[i % len(self._outputs)]
        self._ggml.ggml_backend_tensor_get(graph, y.data_ptr(), 0, y.numel() * 4)
        return y


def ggml_call(
    dense: Tensor, x: Tensor, kind: str, copies: int, folder: Path, threads: int
) -> tuple[Callable[[int], None], int]:
    """The timed call of a peer and the bytes of one weight; checked against the dense product."""
    layer = GgmlLinear(dense, x, kind, copies, folder, threads)
    layer(0)
    # A ternary rounding of Gaussian weights errs by about a half; a wrong product by more than one.
    check_product(layer.output(0), dense, x, 0.9, f"ggml's {kind}")
    return layer, layer.nbytes


def check_product(y: Tensor, dense: Tensor, x: Tensor, bound: float, name: str) -> None:
    """WrongProductError if y is farther from x [M, K] times dense [N, K] than `bound`, relative."""
    expected = x.float() @ dense.float().T
    error = torch.linalg.vector_norm(y - expected) / torch.linalg.vector_norm(expected)
    if not float(error) < bound:
        raise WrongProductError(f"{name} product is off by {float(error):.2f}, relative")
