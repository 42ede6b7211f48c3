"""Where the work on each kind of packed weight is done: its modules, imported on first use.

Every kind has the same functions, so that the verbs know no kind by name:

    quantize(weight, codec, search, table)                                     → packed weight
    plan_linear(m, n, k, codec, activations, dtype, device, backend)           → Plan
    linear(x, weight, bias, activations, plan, out)                            → y, or out
    prepare(weight, bias, activations)      (CPU)                              → a call x → y

`out`, fp32 [M, N], receives the sum before it is rounded; without it y has x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.families import weight_class
from lath.formats.lattice import LatticeTensor
from lath.formats.packed_weight import PackedWeight, WeightCodec
from lath.formats.qtensor import QTensor
from lath.formats.vectors import VectorTensor
from lath.reference import codecs as reference_codecs
from lath.reference import lattice as reference_lattice
from lath.reference import linear as reference_linear
from lath.reference import vectors as reference_vectors

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Kind:
    """quantize, plan, triton, cpu: names of modules. decode: the definition, a packed weight to its
    float64 [N, K]."""

    quantize: str
    plan: str
    triton: str
    cpu: str
    decode: Callable[[Any], NDArray[np.float64]]

    def function(self, module: str, name: str) -> Any:
        """A function of one of the modules, such as ("cpu", "prepare")."""
        return getattr(import_module(getattr(self, module)), name)

    def reference(
        self, x: Floats, weight: PackedWeight, bias: Floats | None, activations: ActivationFormat
    ) -> NDArray[np.float64]:
        """The definition of `lath.linear`: x [M, K] → y [M, N] float64."""
        return reference_linear.multiply(x, self.decode(weight), bias, activations)


class LatticeKind(Kind):
    """A kind whose activations are transformed before a format rounds them."""

    def reference(
        self, x: Floats, weight: PackedWeight, bias: Floats | None, activations: ActivationFormat
    ) -> NDArray[np.float64]:
        assert isinstance(weight, LatticeTensor)
        turned = reference_lattice.transform(x, array(weight.generators), weight.codec)
        return reference_linear.multiply(turned, _decode_planes(weight.points), bias, activations)


def array(tensor: Tensor | None, rows: int | None = None) -> Any:
    """A tensor in NumPy, its last axis cut to `rows` where padding follows."""
    return None if tensor is None else tensor[..., :rows].cpu().numpy()


def _decode_planes(weight: QTensor) -> NDArray[np.float64]:
    rows = weight.shape[0]
    return reference_codecs.dequantize(
        array(weight.unpack_codes()), array(weight.scales, rows), array(weight.zeros, rows),
        weight.codec, array(weight.outer, rows), array(weight.table),
    )  # fmt: skip


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


KINDS: dict[type[PackedWeight], Kind] = {
    QTensor: Kind(
        quantize="lath.kernels.quantize",
        plan="lath.kernels.linear.plan",
        triton="lath.kernels.linear.triton",
        cpu="lath.kernels.linear.cpu",
        decode=_decode_planes,
    ),
    VectorTensor: Kind(
        quantize="lath.kernels.quantize_vectors",
        plan="lath.kernels.linear.plan",
        triton="lath.kernels.linear.triton",
        cpu="lath.kernels.linear.cpu_vectors",
        decode=_decode_vectors,
    ),
    LatticeTensor: LatticeKind(
        quantize="lath.kernels.quantize_lattice",
        plan="lath.kernels.linear.lattice",
        triton="lath.kernels.linear.lattice",
        cpu="lath.kernels.linear.lattice",
        decode=_decode_lattice,
    ),
}


def kind_of(weight: PackedWeight | WeightCodec) -> Kind:
    """The kind of a packed weight or of a codec."""
    found = type(weight) if isinstance(weight, PackedWeight) else weight_class(weight)
    return KINDS[found]
