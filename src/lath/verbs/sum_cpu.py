"""`linear` of a sum of packed weights on a CPU."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.plan import Plan
from lath.formats.qtensor import QTensor
from lath.formats.sum_tensor import SumTensor
from lath.kernels.linear import cpu
from lath.verbs.planning import describe_device
from lath.verbs.sum_plan import Layer, plan_linear, run_terms


class CpuSum:
    """A sum on the CPU, ready to run: x [..., K] → [..., N] of x's dtype."""

    def __init__(
        self, weight: SumTensor, bias: Tensor | None, activations: ActivationFormat
    ) -> None:
        self._weight, self._bias, self._activations = weight, bias, activations

    def __call__(self, x: Tensor) -> Tensor:
        rows, columns = self._weight.shape
        if x.shape[-1] != columns or not x.is_cpu:
            raise ValueError(f"x must be [..., {columns}] on the CPU, got {[*x.shape]}")
        tokens = x.numel() // columns if columns else x.shape[:-1].numel()
        plan = plan_linear(
            tokens, rows, columns, self._weight.codec, self._activations, x.dtype,
            describe_device(x.device), "cpu",
        )  # fmt: skip
        flat = x.reshape(tokens, columns)
        return linear(flat, self._weight, self._bias, self._activations, plan).view(
            *x.shape[:-1], rows
        )


def prepare(
    weight: SumTensor, bias: Tensor | None = None, activations: ActivationFormat | None = None
) -> CpuSum:
    """The layer of a sum on the CPU; its terms are repacked at the first call."""
    return CpuSum(weight, bias, activations or ActivationFormat())


def linear(
    x: Tensor,
    weight: SumTensor,
    bias: Tensor | None,
    activations: ActivationFormat,
    plan: Plan,
    out: Tensor | None = None,
) -> Tensor:
    """y [M, N] of x's dtype, or `out` (fp32)."""
    layers = [_layer_of(weight, index, activations) for index in range(len(weight.terms))]
    workspace = run_terms(x, weight, bias, activations, plan, "cpu", layers)
    total = workspace[0]
    for part in workspace[1:]:
        total += part
    return total.to(x.dtype) if out is None else out.copy_(total)


class _Gathered(NamedTuple):
    """columns: those that the layer was made for, kept so that no other tensor takes its place."""

    columns: Tensor
    layer: Layer | None


def _layer_of(weight: SumTensor, index: int, activations: ActivationFormat) -> Layer | None:
    """Of a term that multiplies runs of x its layer, which reads x where it lies."""
    term, columns = weight.terms[index], weight.columns
    if columns is None or weight.pieces[index] is None:
        return None
    assert isinstance(term, QTensor)  # what a part deals columns to

    def build() -> _Gathered:
        runs, width = weight.runs_of(index), weight.shape[1]
        if runs is None:
            return _Gathered(columns, None)
        return _Gathered(columns, cpu.prepare(term, None, activations, cpu.Gather(runs, width)))

    version = 0 if columns.is_inference() else columns._version
    return term.view(f"cpu-linear-{activations}-{columns.data_ptr()}-{version}", build).layer
