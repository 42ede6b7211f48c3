"""The plan of a sum of packed weights, and the work that every backend begins with.

Each term is run by the backend of its own kind, as its own plan says, and writes fp32 into its part
of a workspace [terms, M, N]; a backend adds these first to last and rounds once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.device import DeviceDescription
from lath.formats.outliers import OutlierCodec
from lath.formats.packed_weight import WeightCodec
from lath.formats.plan import Backend, Plan
from lath.formats.sum_codec import MixCodec, SumCodec
from lath.formats.sum_tensor import SumTensor
from lath.verbs.kinds import kind_of

Layer = Callable[[Tensor, Tensor | None, Tensor], object]


@functools.lru_cache(maxsize=4096)  # as `lath.kernels.linear.plan.plan_linear`
def plan_linear(
    m: int,
    n: int,
    k: int,
    codec: SumCodec,
    activations: ActivationFormat,
    dtype: torch.dtype,
    device: DeviceDescription,
    backend: Backend | None = None,
) -> Plan:
    """The plan of a sum: those of its terms, and what they cost together."""
    terms, reasons = [], []
    for term in codec.terms(k):
        first, last = term.columns or (0, k)
        made: Plan = kind_of(term.codec).function("plan", "plan_linear")(
            m, n, last - first, term.codec, activations_of(term.codec, activations), dtype, device,
            backend,
        )  # fmt: skip
        terms.append(made)
        listed = "" if term.columns is None else f" of {last - first} columns"
        reasons.append(f"{term.codec}{listed}: {made.dataflow}")
    # Terms differ in their flows at most where one has no columns; outliers always gather.
    largest = max((p for p in terms if p.dataflow != "gather"), key=lambda plan: plan.bytes_moved)
    # Read where they lie: whole groups on a CPU, all columns as Triton rounds x.
    in_place = largest.backend == "triton" and activations.kind != "float"
    in_place |= isinstance(codec.dealer, MixCodec) and largest.backend == "cpu"
    gathered = 0 if codec.dealer is None or in_place else 2 * m * k * dtype.itemsize
    once = largest.dataflow == "decode_matmul"
    summed = "decoded together and multiplied once" if once else "summed in fp32"
    return replace(
        largest,
        reason=f"{len(terms)} terms, {summed} ({'; '.join(reasons)})",
        bytes_moved=sum(plan.bytes_moved for plan in terms) + gathered + 8 * len(terms) * m * n,
        operations=sum(plan.operations for plan in terms),
        terms=tuple(terms),
    )


def activations_of(codec: WeightCodec, activations: ActivationFormat) -> ActivationFormat:
    """What a term multiplies: outliers x itself, every other term x in the format of the call."""
    return ActivationFormat() if isinstance(codec, OutlierCodec) else activations


def run_terms(
    x: Tensor,
    weight: SumTensor,
    bias: Tensor | None,
    activations: ActivationFormat,
    plan: Plan,
    backend: Backend,
    layers: Sequence[Layer | None] | None = None,
) -> Tensor:
    """fp32 [terms, M, N]: what each term gives for x [M, K], bias [N] in the first of them.

    layers: of terms that find their columns in x themselves, their calls (x, bias, out). Triton's
    rows find them where x is rounded.
    """
    workspace = torch.empty(
        (len(weight.terms), x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device
    )
    ordered: Tensor | None = None
    for index, term in enumerate(weight.terms):
        piece, offsets = weight.pieces[index], bias if index == 0 else None
        layer = None if layers is None else layers[index]
        if layer is not None:
            layer(x, offsets, workspace[index])
            continue
        own, how = x, activations_of(term.codec, activations)
        more: tuple[Tensor | None, ...] = ()
        if piece is not None and backend == "triton" and how.kind != "float":
            more = (weight.columns_of(index),)
        elif piece is not None:
            ordered = _ordered(x, weight, backend) if ordered is None else ordered
            own = ordered[:, piece[0] : piece[1]]
        kind_of(term).function(backend, "linear")(
            own, term, offsets, how, plan.terms[index], workspace[index], *more
        )
    return workspace


def _ordered(x: Tensor, weight: SumTensor, backend: Backend) -> Tensor:
    """All columns of x in the order of the terms."""
    assert weight.columns is not None
    # On a CPU torch gathers fp32 four times as fast as 16-bit numbers, conversion included.
    return (x.float() if backend == "cpu" else x).index_select(1, weight.columns)
