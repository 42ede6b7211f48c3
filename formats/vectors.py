"""Vector codebooks: an index stands for several neighbouring weights of a row (VPTQ, 2409.17066).

With v the length of a vector, j = k // v and g = k // group_size,

    weight[n, k] = scale[g, n] * (book[index[n, j], k % v] + residual_book[residual[n, j], k % v])

the second term only where there is a residual book. Scales are the root mean square of a group, so
that one book serves rows of every size. An index of b bits counts b / v bits per weight: indices
lie in the planes of `lath.formats.packing` of that width, in 32-bit words of a row and a block of
128 columns, the index of the j-th vector of a block at bit b*j of its 128*b/v. So loops that walk
those planes need only another decoder. That is why b / v is 1, 2 or 4.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lath.formats import packing
from lath.formats.codec import GROUP_MULTIPLE, ScaleDtype, Zero
from lath.formats.packed_weight import PackedWeight, check_layout
from lath.formats.values import Values

# A plus sign before anything but a number is none of ours.
VECTOR_CLAIMS = r"vq[^+]*(\+\d[^+]*)?"
VECTOR_GRAMMAR = {
    "vq{2|4|8|16}-E[+R][-gG]": "vectors of 2, 4, 8 or 16 weights, each an entry of a book of E "
    "(16, 256 or 65536) and one of a residual book of R, times an fp16 scale (VPTQ); log2(E) is 1, "
    "2 or 4 times the length of a vector",
}
_PATTERN = re.compile(
    r"vq(?P<vector>[1-9]\d*)-(?P<entries>\d+)(\+(?P<residual>\d+))?(-g(?P<group>[1-9]\d*))?"
)
# Bits of an index that lie whole in a byte or in bytes; and bits per weight that are a plane's.
_INDEX_BITS = {16: 4, 256: 8, 65536: 16}
_WIDTHS = (1, 2, 4)


@dataclass(frozen=True)
class VectorCodec:
    """vector: weights of an index, along K. entries, residual: of the books; residual 0: no second
    book. group: columns of a row with one fp16 scale, a multiple of 16, or None for the whole row.
    """

    vector: int
    entries: int
    residual: int = 0
    group: int | None = None

    def __post_init__(self) -> None:
        if self.vector not in (2, 4, 8, 16):
            raise ValueError(f"codec vector must be 2, 4, 8 or 16 weights, got {self.vector!r}")
        books = [("entries", self.entries)] + [("residual", self.residual)] * bool(self.residual)
        for name, count in books:
            usable = [e for e, bits in _INDEX_BITS.items() if bits / self.vector in _WIDTHS]
            if count not in usable:
                raise ValueError(
                    f"codec {name} of vectors of {self.vector} must be one of {usable}, "
                    f"got {count!r}"
                )
        group = self.group
        if group is not None and (
            type(group) is not int or group <= 0 or group % GROUP_MULTIPLE != 0
        ):
            raise ValueError(
                f"codec group must be a positive multiple of {GROUP_MULTIPLE} or None "
                f"(one group per row), got {group!r}"
            )
        more = f"+{self.residual}" if self.residual else ""
        grouped = "" if group is None else f"-g{group}"
        # Kept, not formatted on demand: torch.compile traces attributes but not the formatting.
        object.__setattr__(self, "_text", f"vq{self.vector}-{self.entries}{more}{grouped}")

    @staticmethod
    def parse(text: str) -> VectorCodec:
        """The codec of a text form such as "vq8-65536+256"; ValueError if the text is not one."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            (form,) = VECTOR_GRAMMAR
            raise ValueError(f"codec must be {form}, for example 'vq8-256-g128'; got {text!r}")
        group = int(match["group"]) if match["group"] else None
        residual = int(match["residual"]) if match["residual"] else 0
        if match["residual"] and not residual:
            raise ValueError(f"codec residual must have entries, got {text!r}")
        return VectorCodec(int(match["vector"]), int(match["entries"]), residual, group)

    def __str__(self) -> str:
        return self._text  # type: ignore[attr-defined, no-any-return]

    @property
    def books(self) -> tuple[int, ...]:
        """Entries of each book."""
        return (self.entries, self.residual) if self.residual else (self.entries,)

    @property
    def takes_importance(self) -> bool:
        """Whether `lath.quantize` chooses something by `importance`: the entries of the books."""
        return True

    @property
    def index_bits(self) -> tuple[int, ...]:
        """Bits of an index into each book."""
        return tuple(_INDEX_BITS[entries] for entries in self.books)

    # What the loops over planes ask of a codec (`lath.formats.codec.PlanesCodec`).

    @functools.cached_property
    def plane_widths(self) -> tuple[int, ...]:
        """Bits per weight of each book's indices."""
        return tuple(bits // self.vector for bits in self.index_bits)

    @property
    def bits(self) -> int:
        """Bits per weight of all indices."""
        return sum(self.plane_widths)

    @property
    def is_table(self) -> bool:
        return True

    @property
    def values(self) -> Values:
        return "vectors"

    @property
    def zero(self) -> Zero:
        return "none"

    @property
    def zero_code(self) -> float:
        return 0.0

    @property
    def scale_dtype(self) -> ScaleDtype:
        return "fp16"

    def group_size(self, in_features: int) -> int:
        """Length of a group along K; per row, the whole K (1 when K is 0, so that it divides)."""
        return max(in_features, 1) if self.group is None else self.group

    def num_groups(self, in_features: int) -> int:
        """Groups along K; the last one may be short."""
        return -(-in_features // self.group_size(in_features))

    def num_vectors(self, in_features: int) -> int:
        """Vectors along K; the last one may reach beyond K."""
        return -(-in_features // self.vector)


class VectorTensor(PackedWeight):
    """A weight [N, K] of vectors out of books.

    codes: int32 1-D, a plane of indices for each book (see above), 0 in padding. scales: fp16
    `[G, N16]`, 0 in padded rows and where a group is all zero. books: fp16 `[entries + residual,
    vector]`, one book behind the other.
    """

    codec: VectorCodec

    def __init__(
        self,
        codec: VectorCodec,
        shape: tuple[int, int],
        codes: Tensor,
        scales: Tensor,
        books: Tensor,
    ) -> None:
        self.codec = codec
        self.shape = (int(shape[0]), int(shape[1]))
        self.codes, self.scales, self.books = codes, scales, books
        check_layout(self, _layout(codec, self.shape))

    parse_codec = staticmethod(VectorCodec.parse)

    @staticmethod
    def tensor_names(codec: VectorCodec) -> tuple[str, ...]:
        return ("codes", "scales", "books")

    @classmethod
    def empty(
        cls, codec: VectorCodec, shape: tuple[int, int], device: torch.device | str = "meta"
    ) -> VectorTensor:
        tensors = {
            name: torch.empty(size, dtype=dtype, device=device)
            for name, (size, dtype) in _layout(codec, shape).items()
        }
        return cls(codec, shape, **tensors)

    # What the loops over planes ask of a weight, besides.
    zeros: None = None
    outer: None = None

    def unpack_indices(self) -> list[Tensor]:
        """int64 [N, ceil(K / vector)] for each book."""
        return unpack_indices(self.codes, self.codec, self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]: the entries' sum times the scale, each one fp32 operation, rounded
        once to dtype."""
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch dtype, got {dtype}")
        rows, columns = self.shape
        first, total = 0, torch.zeros((), device=self.device)
        for entries, index in zip(self.codec.books, self.unpack_indices(), strict=True):
            total = total + self.books[first : first + entries].float()[index]
            first += entries
        numbers = total.reshape(rows, self.codec.num_vectors(columns) * self.codec.vector)[
            :, :columns
        ]
        scales = self.scales[:, :rows].float().T
        wide = scales.repeat_interleave(self.codec.group_size(columns), dim=1)[:, :columns]
        return (numbers * wide).to(dtype)

    def check_values(self) -> None:
        """ValueError for a scale that is negative or not finite, and entries that are not finite.
        Every index is one of its book."""
        if not bool(torch.isfinite(self.scales).all()) or bool((self.scales < 0).any()):
            raise ValueError(f"scales of a {self.codec} must be finite and not negative")
        if not bool(torch.isfinite(self.books).all()):
            raise ValueError(f"books of a {self.codec} must be finite")


def _layout(
    codec: VectorCodec, shape: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    count = sum(a * b * c * d for a, b, c, d in packing.plane_shapes(codec, shape))
    padded = packing.round_up(shape[0], packing.PANEL)
    return {
        "codes": ((count,), torch.int32),
        "scales": ((codec.num_groups(shape[1]), padded), torch.float16),
        "books": ((sum(codec.books), codec.vector), torch.float16),
    }


def pack_indices(indices: Sequence[Tensor], codec: VectorCodec) -> Tensor:
    """Integers [N, V] for each book → int32 1-D: the planes one after another, padding included."""
    per_block = packing.BLOCK // codec.vector
    planes = []
    for bits, index in zip(codec.index_bits, indices, strict=True):
        rows, vectors = index.shape
        pad = (0, -vectors % per_block, 0, -rows % packing.PANEL)
        padded = torch.nn.functional.pad(index.long(), pad)
        axes = padded.reshape(
            padded.shape[0] // packing.PANEL, packing.PANEL, padded.shape[1] // per_block, per_block
        )
        axes = axes.permute(0, 2, 1, 3)
        if bits == 4:
            fields = axes[..., 0::2] | axes[..., 1::2] << 4
        else:
            fields = torch.stack([axes >> shift & 255 for shift in range(0, bits, 8)], dim=-1)
        planes.append(fields.to(torch.uint8).contiguous().reshape(-1).view(torch.int32))
    return torch.cat(planes)


def unpack_indices(packed: Tensor, codec: VectorCodec, shape: tuple[int, int]) -> list[Tensor]:
    """The inverse of `pack_indices`: int64 [N, V] for each book, padding dropped."""
    rows, vectors = shape[0], codec.num_vectors(shape[1])
    indices = []
    for bits, plane in zip(
        codec.index_bits, packing.split_planes(packed, codec, shape), strict=True
    ):
        panels, blocks = plane.shape[:2]
        own = plane.contiguous().view(torch.uint8).long()
        if bits == 4:
            own = torch.stack([own & 15, own >> 4], dim=-1).flatten(-2)
        elif bits == 16:
            own = own[..., 0::2] | own[..., 1::2] << 8
        axes = own.permute(0, 2, 1, 3).reshape(panels * packing.PANEL, blocks * own.shape[-1])
        indices.append(axes[:rows, :vectors].contiguous())
    return indices
