"""Where the work on each kind of packed weight is done: its modules, imported on first use.

Every kind has the same functions, so that the verbs know no kind by name:

    quantize(weight, codec, search, table[, importance])                       → packed weight
    plan_linear(m, n, k, codec, activations, dtype, device, backend)           → Plan
    linear(x, weight, bias, activations, plan, out)                            → y, or out
    prepare(weight, bias, activations)      (CPU)                              → a call x → y
    only_view(weight, activations)          (CPU, QTensor)                     → ViewedTensor, None

Codecs with `is_open` leave a size to a search, for which the module of `quantize` has
`settle(weight, codec, search, table, importance)` → codec.

`out`, fp32 [M, N], receives the sum before it is rounded; without it y has x's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.lattice import LatticeTensor
from lath.formats.outliers import Outliers
from lath.formats.packed_weight import PackedWeight, WeightCodec
from lath.formats.qtensor import QTensor
from lath.formats.sparse import SparseTensor
from lath.formats.sum_tensor import SumTensor, class_of
from lath.formats.vectors import VectorTensor
from lath.formats.viewed import ViewedTensor
from lath.reference import codecs as reference_codecs
from lath.reference import lattice as reference_lattice
from lath.reference import linear as reference_linear
from lath.reference import sparse as reference_sparse
from lath.reference import sums as reference_sums
from lath.reference import vectors as reference_vectors

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Kind:
    """quantize, plan, triton, cpu: names of modules. decode: the definition, a packed weight to its
    float64 [N, K]. multiply: the definition of `lath.linear` where it is not that of the decoded
    weight."""

    quantize: str
    plan: str
    triton: str
    cpu: str
    decode: Callable[[Any], NDArray[np.float64]]
    multiply: Callable[..., NDArray[np.float64]] | None = None

    def function(self, module: str, name: str) -> Any:
        """A function of one of the modules, such as ("cpu", "prepare")."""
        return getattr(import_module(getattr(self, module)), name)

    def reference(
        self, x: Floats, weight: PackedWeight, bias: Floats | None, activations: ActivationFormat
    ) -> NDArray[np.float64]:
        """The definition of `lath.linear`: x [M, K] → y [M, N] float64."""
        if self.multiply is not None:
            return self.multiply(x, weight, bias, activations)
        return reference_linear.multiply(x, self.decode(weight), bias, activations)


def array(tensor: Tensor | None, rows: int | None = None) -> Any:
    """A tensor in NumPy, its last axis cut to `rows` where padding follows."""
    return None if tensor is None else tensor[..., :rows].cpu().numpy()


def _decode_planes(weight: QTensor) -> NDArray[np.float64]:
    rows = weight.shape[0]
    return reference_codecs.dequantize(
        array(weight.unpack_codes()), array(weight.scales, rows), array(weight.zeros, rows),
        weight.codec, array(weight.outer, rows), array(weight.table),
    )  # fmt: skip


def _decode_outliers(weight: Outliers) -> NDArray[np.float64]:
    decoded = np.zeros(weight.shape)
    offsets, columns = array(weight.offsets), array(weight.codes)
    for n in range(weight.shape[0]):
        row = slice(offsets[n], offsets[n + 1])
        decoded[n, columns[row]] = array(weight.values)[row]
    return decoded


def _multiply_term(
    term: PackedWeight, x: Floats, activations: ActivationFormat
) -> NDArray[np.float64]:
    return KINDS[type(term)].reference(x, term, None, activations)


def _decoded_terms(weight: SumTensor) -> list[reference_sums.DecodedTerm]:
    return [
        reference_sums.DecodedTerm(
            KINDS[type(term)].decode(term), functools.partial(_multiply_term, term),
            array(weight.columns_of(index)), exact=isinstance(term, Outliers),
        )
        for index, term in enumerate(weight.terms)
    ]  # fmt: skip


def _decode_sum(weight: SumTensor) -> NDArray[np.float64]:
    return reference_sums.dense(_decoded_terms(weight), weight.shape[1])


def _multiply_sum(
    x: Floats, weight: SumTensor, bias: Floats | None, activations: ActivationFormat
) -> NDArray[np.float64]:
    return reference_sums.multiply(x, _decoded_terms(weight), bias, activations)


def _decode_sparse(weight: SparseTensor) -> NDArray[np.float64]:
    codes = weight.codes
    if weight.codec.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=1).reshape(-1).int()
        codes = codes - 16 * (codes > 7)
    kept = array(codes.float() if codes.is_floating_point() else codes)[: weight.kept]
    scales = array(weight.scales, weight.shape[0])
    bitmap = array(weight.bitmap).view(np.uint32)
    sparse = reference_sparse.Sparse(bitmap, array(weight.offsets), kept, scales)
    return reference_sparse.dequantize(sparse, weight.codec, weight.shape)


def _decode_vectors(weight: VectorTensor) -> NDArray[np.float64]:
    rows, columns = weight.shape
    return reference_vectors.dequantize(
        [array(index) for index in weight.unpack_indices()], array(weight.scales, rows),
        array(weight.books), weight.codec, columns,
    )  # fmt: skip


def _decode_lattice(weight: LatticeTensor) -> NDArray[np.float64]:
    rows, columns = weight.shape
    points = array(weight.points.unpack_codes()).astype(np.int64) - (1 << (weight.codec.bits - 1))
    return reference_lattice.dequantize(
        points, array(weight.scales, rows), array(weight.generators), weight.codec, columns
    )


def _multiply_lattice(
    x: Floats, weight: LatticeTensor, bias: Floats | None, activations: ActivationFormat
) -> NDArray[np.float64]:
    """A format rounds what the generators make of x."""
    turned = reference_lattice.transform(x, array(weight.generators), weight.codec)
    return reference_linear.multiply(turned, _decode_planes(weight.points), bias, activations)


KINDS: dict[type[PackedWeight], Kind] = {
    QTensor: Kind(
        quantize="lath.kernels.quantize",
        plan="lath.kernels.linear.plan",
        triton="lath.kernels.linear.triton",
        cpu="lath.kernels.linear.cpu",
        decode=_decode_planes,
    ),
    SumTensor: Kind(
        quantize="lath.verbs.sum_quantize",
        plan="lath.verbs.sum_plan",
        triton="lath.verbs.sum_triton",
        cpu="lath.verbs.sum_cpu",
        decode=_decode_sum,
        multiply=_multiply_sum,
    ),
    # No family of its own: it is the last term of a sum, and quantised with it.
    Outliers: Kind(
        quantize="lath.verbs.sum_quantize",
        plan="lath.kernels.outliers.plan",
        triton="lath.kernels.outliers.triton",
        cpu="lath.kernels.outliers.cpu",
        decode=_decode_outliers,
    ),
    SparseTensor: Kind(
        quantize="lath.kernels.quantize_sparse",
        plan="lath.kernels.linear.plan_sparse",
        triton="lath.kernels.linear.triton",
        cpu="lath.kernels.linear.cpu",
        decode=_decode_sparse,
    ),
    VectorTensor: Kind(
        quantize="lath.kernels.quantize_vectors",
        plan="lath.kernels.linear.plan",
        triton="lath.kernels.linear.triton",
        cpu="lath.kernels.linear.cpu_vectors",
        decode=_decode_vectors,
    ),
    LatticeTensor: Kind(
        quantize="lath.kernels.quantize_lattice",
        plan="lath.kernels.linear.lattice",
        triton="lath.kernels.linear.lattice",
        cpu="lath.kernels.linear.lattice",
        decode=_decode_lattice,
        multiply=_multiply_lattice,
    ),
}


def kind_of(weight: PackedWeight | WeightCodec) -> Kind:
    """The kind of a packed weight or of a codec."""
    if isinstance(weight, ViewedTensor):
        return KINDS[QTensor]
    return KINDS[type(weight) if isinstance(weight, PackedWeight) else class_of(weight)]
