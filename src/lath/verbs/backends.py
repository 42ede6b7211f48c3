"""Which backend runs: by the device of the tensors, or the one that was named and no other."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import cast

import torch

from lath.formats.plan import Backend

BACKENDS = ("auto", "triton", "cpu", "reference")


@functools.cache
def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def triton_interprets() -> bool:
    """True where Triton kernels run on CPU tensors, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve_backend(backend: str, device: torch.device) -> Backend:
    """The backend for tensors on `device`.

    "auto": Triton on a GPU, compiled kernels on a CPU (NumPy, said once, where numba is missing).
    A named backend is returned if it can run on that device. ValueError for an unknown name,
    RuntimeError naming what is missing.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        return _auto(device)
    if backend == "triton":
        if not is_installed("triton"):
            raise RuntimeError("backend='triton' needs triton, which is not installed")
        if device.type != "cuda" and not triton_interprets():
            raise RuntimeError(
                f"backend='triton' needs tensors on a GPU, got {device}; on a CPU it runs only in "
                "Triton's interpreter (TRITON_INTERPRET=1 before the first import)"
            )
    if backend == "cpu":
        if device.type != "cpu":
            raise RuntimeError(f"backend='cpu' needs tensors on the CPU, got {device}")
        if not is_installed("numba"):
            raise RuntimeError("backend='cpu' needs numba: pip install 'lath[cpu]'")
    return cast(Backend, backend)


def _auto(device: torch.device) -> Backend:
    if device.type == "cuda":
        return resolve_backend("triton", device)
    if device.type == "cpu":
        if is_installed("numba"):
            return "cpu"
        _say_numba_is_missing()
        return "reference"
    raise RuntimeError(f"no backend for tensors on {device}: lath runs on 'cuda' and 'cpu' devices")


@functools.cache
def _say_numba_is_missing() -> None:
    warnings.warn(
        "numba is not installed: CPU tensors use the NumPy definition, which is slow; "
        "pip install 'lath[cpu]' brings the compiled kernels",
        stacklevel=4,
    )
