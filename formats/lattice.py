"""Lattices: d neighbouring weights of a row are a point of a learned lattice (GLVQ, 2510.20984).

With a generator G [d, d] for each group of columns, shared by all rows, and whole numbers z,

    weight[n, d*j + l] = scale[g, n] * Σ_i G[g, l, i] * z[n, d*j + i]

z is a `QTensor` of its own, so that y = Σ (x G) z is `linear` of x G over it: the generators go to
the activations and no loop knows of them. Companding, which the paper adds, is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from lath.formats import packing
from lath.formats.codec import GROUP_MULTIPLE, Codec
from lath.formats.packed_weight import PackedWeight
from lath.formats.qtensor import QTensor

LATTICE_CLAIMS = r"lattice[^+]*"
LATTICE_GRAMMAR = {
    "lattice{2..8}-d{2|4|8|16|32}[-gG]": "2 to 8 bits a coordinate in a learned lattice of 2 to 32 "
    "dimensions, one generator and fp16 row scales for each run of G columns (GLVQ)",
}
_PATTERN = re.compile(r"lattice(?P<bits>[2-8])-d(?P<dimension>\d+)(-g(?P<group>[1-9]\d*))?")
_DIMENSIONS = (2, 4, 8, 16, 32)
# The largest condition number of a generator: beyond it some coordinates say next to nothing.
MOST_CONDITION = 1e4


@dataclass(frozen=True)
class LatticeCodec:
    """bits: of a coordinate, 2 to 8. dimension: of the lattice, 2, 4, 8, 16 or 32. group: columns
    that share a generator, and a scale of each row, a multiple of 16 and of the dimension; None:
    all columns."""

    bits: int
    dimension: int
    group: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"codec bits of a lattice must be 2 to 8, got {self.bits!r}")
        if self.dimension not in _DIMENSIONS:
            raise ValueError(f"codec dimension must be one of {_DIMENSIONS}, got {self.dimension}")
        group, multiple = self.group, max(GROUP_MULTIPLE, self.dimension)
        if group is not None and (type(group) is not int or group <= 0 or group % multiple):
            raise ValueError(
                f"codec group must be a positive multiple of {multiple} or None (one generator), "
                f"got {group!r}"
            )
        grouped = "" if group is None else f"-g{group}"
        # Kept, not formatted on demand: torch.compile traces attributes but not the formatting.
        object.__setattr__(self, "_text", f"lattice{self.bits}-d{self.dimension}{grouped}")

    @staticmethod
    def parse(text: str) -> LatticeCodec:
        """The codec of a text form such as "lattice2-d8-g128"; ValueError if it is not one."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            (form,) = LATTICE_GRAMMAR
            raise ValueError(f"codec must be {form}, for example 'lattice2-d8-g128'; got {text!r}")
        group = int(match["group"]) if match["group"] else None
        return LatticeCodec(int(match["bits"]), int(match["dimension"]), group)

    def __str__(self) -> str:
        return self._text  # type: ignore[attr-defined, no-any-return]

    @property
    def points(self) -> Codec:
        """The codec of the whole numbers z and their scales."""
        return Codec(self.bits, self.group)

    def columns_of_points(self, in_features: int) -> int:
        """Columns of z: K rounded up to whole points."""
        return packing.round_up(in_features, self.dimension)

    def group_of_block(self, in_features: int) -> list[int]:
        """The generator of each run of d columns."""
        size = self.points.group_size(self.columns_of_points(in_features))
        return [k // size for k in range(0, in_features, self.dimension)]


class LatticeTensor(PackedWeight):
    """A weight [N, K] of lattice points.

    codes, scales: of the `QTensor` `points` [N, K rounded up to d] that holds z. generators: fp32
    `[G, d, d]`, the largest singular value of each 1: what x is multiplied by grows no block of it.
    """

    codec: LatticeCodec

    def __init__(
        self,
        codec: LatticeCodec,
        shape: tuple[int, int],
        codes: Tensor,
        scales: Tensor,
        generators: Tensor,
    ) -> None:
        self.codec = codec
        self.shape = (int(shape[0]), int(shape[1]))
        self.codes, self.scales, self.generators = codes, scales, generators
        columns = codec.columns_of_points(self.shape[1])
        self.points = QTensor(codec.points, (self.shape[0], columns), codes, scales)
        wanted = (codec.points.num_groups(columns), codec.dimension, codec.dimension)
        if tuple(generators.shape) != wanted or generators.dtype != torch.float32:
            raise ValueError(
                f"generators of a {codec} {self.shape} must be torch.float32 {list(wanted)}, got "
                f"{generators.dtype} {list(generators.shape)}"
            )
        if generators.device != codes.device:
            raise ValueError(f"generators is on {generators.device}, codes are on {codes.device}")

    parse_codec = staticmethod(LatticeCodec.parse)

    @staticmethod
    def tensor_names(codec: LatticeCodec) -> tuple[str, ...]:
        return ("codes", "scales", "generators")

    @classmethod
    def empty(
        cls, codec: LatticeCodec, shape: tuple[int, int], device: torch.device | str = "meta"
    ) -> LatticeTensor:
        columns = codec.columns_of_points(shape[1])
        points = QTensor.empty(codec.points, (shape[0], columns), device)
        sizes = (codec.points.num_groups(columns), codec.dimension, codec.dimension)
        return cls(codec, shape, points.codes, points.scales, torch.empty(sizes, device=device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]: points times generators in float64, rounded once to dtype."""
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch dtype, got {dtype}")
        points = self.points.dequantize().double()
        return self.turn(points, transposed=True)[:, : self.shape[1]].to(dtype)

    def turn(self, values: Tensor, transposed: bool = False) -> Tensor:
        """float64 [R, K'] times the generators, d columns at a time; transposed: times their
        transposes. K': K rounded up to d."""
        rows, columns = values.shape
        size = self.codec.points.group_size(columns)
        matrices = self.generators.double()
        matrices = matrices.mT if transposed else matrices
        groups, dimension = matrices.shape[:2]
        padded = torch.nn.functional.pad(values, (0, groups * size - columns))
        axes = padded.reshape(rows, groups, size).transpose(0, 1)
        axes = axes.reshape(groups, rows * (size // dimension), dimension) @ matrices
        turned = axes.reshape(groups, rows, size).transpose(0, 1)
        return turned.reshape(rows, groups * size)[:, :columns]

    def transform(self, x: Tensor) -> Tensor:
        """x [M, K] → x G, fp32 [M, K']: summed in float64 and rounded once, so that activations
        rounded to int8 are the same numbers on every backend."""
        pad = (0, self.points.shape[1] - self.shape[1])
        return self.turn(torch.nn.functional.pad(x.double(), pad)).float()

    def check_values(self) -> None:
        """ValueError for scales that no quantiser writes, and for a generator that is not finite or
        nearly singular."""
        self.points.check_values()
        if not bool(torch.isfinite(self.generators).all()):
            raise ValueError(f"generators of a {self.codec} must be finite")
        check_condition(self.generators, self.codec)


def check_condition(generators: Tensor, codec: LatticeCodec) -> None:
    """ValueError for a generator whose condition number is above MOST_CONDITION."""
    if not generators.numel():
        return
    values = torch.linalg.svdvals(generators.double())
    worst = float((values[:, 0] / values[:, -1]).nan_to_num(nan=torch.inf).max())
    if worst > MOST_CONDITION:
        raise ValueError(
            f"generators of a {codec} must have condition numbers up to {MOST_CONDITION:g}, got "
            f"{worst:.3g}: the lattice is singular or nearly so"
        )
