"""The plan of outliers: a gather, whose tile follows from the number of tokens."""

from __future__ import annotations

import functools

import torch

from lath.formats.activations import ActivationFormat
from lath.formats.device import DeviceDescription
from lath.formats.outliers import SHORT_COLUMNS, OutlierCodec
from lath.formats.plan import Backend, Plan

# Up to this many tokens x is gathered as it lies; above, from a transposed copy, whose columns hold
# all tokens side by side: one entry then serves as many of them as a tile or a register has.
GATHER_TOKENS = 4
# Tokens, rows and entries of a row that a program of the GPU kernel multiplies at once, of x as it
# lies and transposed: about a thousand products, 8 for each thread of 4 warps.
AS_IT_LIES, TRANSPOSED = (8, 32), (32, 4, 8)


@functools.lru_cache(maxsize=4096)  # as `lath.kernels.linear.plan.plan_linear`
def plan_linear(
    m: int,
    n: int,
    k: int,
    codec: OutlierCodec,
    activations: ActivationFormat,
    dtype: torch.dtype,
    device: DeviceDescription,
    backend: Backend | None = None,
) -> Plan:
    """The plan for x [m, k] and the outliers of a weight [n, k]; ValueError unless activations are
    "float"."""
    if activations.kind != "float":
        raise ValueError(f"activations of outliers must be 'float', got {str(activations)!r}")
    if backend is None:
        backend = "cpu" if device.kind == "cpu" else "triton"
    count = codec.count((n, k))
    entry = 2 + (2 if k <= SHORT_COLUMNS else 4)
    few = m <= GATHER_TOKENS
    tokens = 1 << max(m - 1, 0).bit_length()
    block_m, block_n, block_k = (tokens, *AS_IT_LIES) if few else TRANSPOSED
    return Plan(
        backend=backend,
        dataflow="definition" if backend == "reference" else "gather",
        dot="fp64" if backend == "reference" else "fp32",
        reason=f"{count} outliers; x "
        + ("as it lies" if few else f"transposed: an entry serves {m} tokens"),
        bytes_moved=count * entry + 4 * (n + 1) + m * k * dtype.itemsize + 4 * m * n,
        operations=2 * m * count,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        warps=4,
        threads=device.threads if device.kind == "cpu" else 0,
    )
