"""QTensor: a packed weight of planes of codes with scales per group."""

from __future__ import annotations

import torch
from torch import Tensor

from lath.formats import packing
from lath.formats import values as value_tables
from lath.formats.codec import Codec
from lath.formats.packed_weight import PackedWeight, check_layout
from lath.formats.shard import check_shard, shard_codes, shard_side

SCALE_DTYPES = {
    "fp16": torch.float16, "fp32": torch.float32, "int8": torch.uint8, "fp8": torch.uint8,
    "e8m0": torch.uint8, "e4m3": torch.uint8,
}  # fmt: skip
# What a second scale is stored in, where the first one has 8 bits and needs one.
OUTER_DTYPES = {"int8": torch.float16, "fp8": torch.float32, "e4m3": torch.float32}


class QTensor(PackedWeight):
    """A weight of logical shape `[N, K]`, stored as planes of codes, scales and zeros.

    codec: the `Codec`. shape: (N, K). codes: int32 1-D, the planes one after another
    (`lath.formats.packing`). scales: `[G, N16]` in the codec's scale dtype, G groups along K and
    N16 = N rounded up to 16. zeros: `[G, N16]`, uint8 for an integer zero point, the scale dtype
    for a float minimum, or None. Padded rows and columns hold code 0, scale 0, zero 0. outer: the
    scale of the scales, `[N16]` fp16 below "int8" and fp32 below "fp8", fp32 `[1]` below "e4m3",
    else None. table: fp32
    `[levels]`, ascending, of learned values, else None.

    Treated as immutable: `to` and `dequantize` make new tensors, nothing writes into these.
    """

    codec: Codec

    def __init__(
        self,
        codec: Codec,
        shape: tuple[int, int],
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        outer: Tensor | None = None,
        table: Tensor | None = None,
    ) -> None:
        self.codec = codec
        self.shape = (int(shape[0]), int(shape[1]))
        self.codes = codes
        self.scales = scales
        self.zeros = zeros
        self.outer = outer
        self.table = table
        names = self.tensor_names(codec)
        for name in _TENSORS:
            if (getattr(self, name) is not None) != (name in names):
                want, have = ("present", "absent") if name in names else ("absent", "present")
                raise ValueError(f"{name} of a {codec} must be {want}, it is {have}")
        check_layout(self, _layout(codec, self.shape))

    parse_codec = staticmethod(Codec.parse)

    @staticmethod
    def tensor_names(codec: Codec) -> tuple[str, ...]:
        return tuple(_layout(codec, (0, 0)))

    @classmethod
    def empty(
        cls, codec: Codec, shape: tuple[int, int], device: torch.device | str = "meta"
    ) -> QTensor:
        """A QTensor with unset contents, by default on the meta device (no memory)."""
        tensors = {
            name: torch.empty(size, dtype=dtype, device=device)
            for name, (size, dtype) in _layout(codec, shape).items()
        }
        return cls(codec, shape, **tensors)

    @property
    def planes(self) -> list[Tensor]:
        """int32 views `[N16/16, K/block, 16, 4w]`, the lowest bits of the code first."""
        return packing.split_planes(self.codes, self.codec, self.shape)

    def unpack_codes(self) -> Tensor:
        """uint8 codes [N, K] without padding."""
        return packing.unpack(self.codes, self.codec, self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes stand for: fp32 inside, rounded once to dtype."""
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch dtype, got {dtype}")
        rows, columns = self.shape
        group = self.codec.group_size(columns)
        codes = self.unpack_codes()

        def expand(side: Tensor) -> Tensor:
            per_row = side[:, :rows].float().T
            return per_row.repeat_interleave(group, dim=1)[:, :columns]

        if self.codec.scale_dtype == "fp8":
            assert self.outer is not None
            inner = expand(self.scales.view(torch.float8_e4m3fn))
            entries = ((codes.float() - self.codec.zero_code) * inner).to(torch.float8_e4m3fn)
            return (entries.float() * self.outer[:rows, None]).to(dtype)
        scales = expand(self.effective_scales())
        if self.codec.is_table:
            return (self.entries()[codes.long()] * scales).to(dtype)
        numbers = codes.float()
        if self.zeros is None:
            return ((numbers - self.codec.zero_code) * scales).to(dtype)
        if self.codec.zero == "integer":
            return ((numbers - expand(self.zeros)) * scales).to(dtype)
        return (numbers * scales + expand(self.zeros)).to(dtype)

    def shard(self, rank: int, ranks: int, axis: int) -> QTensor:
        """Piece `rank` of `ranks` equal ones along N (axis 0: column-parallel) or K (axis 1:
        row-parallel), as a weight of its own; its numbers are those of this weight.

        Multiplied by its piece of x, shards along K add up to the whole. Lengths must be multiples
        of 16 rows, or of 128 columns and of the group; ValueError otherwise.
        """
        size = check_shard(self.codec, self.shape, rank, ranks, axis)
        start = rank * size
        shape = (size, self.shape[1]) if axis == 0 else (self.shape[0], size)
        scales, zeros, outer = (
            shard_side(side, self.codec, start, size, axis)
            for side in (self.scales, self.zeros, self.outer)
        )
        assert scales is not None
        codes = shard_codes(self.planes, self.shape, start, size, axis)
        return QTensor(self.codec, shape, codes, scales, zeros, outer, self.table)

    def effective_scales(self) -> Tensor:
        """fp32 [G, N16]: what codes are multiplied by, one product of both scales ("fp8": before
        the rounding of the products)."""
        kind, stored = self.codec.scale_dtype, self.scales
        if kind == "e8m0":
            return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - 127)
        if kind in ("e4m3", "fp8"):
            assert self.outer is not None
            return stored.view(torch.float8_e4m3fn).float() * self.outer
        if kind == "int8":
            assert self.outer is not None
            return stored.float() * self.outer.float()
        return stored.float()

    def entries(self) -> Tensor:
        """fp32 [levels]: the table of a codec that has one."""
        if self.table is not None:
            return self.table
        entries = value_tables.table(self.codec.values)
        return torch.tensor(entries, dtype=torch.float32, device=self.device)

    def nested(self, bits: int) -> QTensor:
        """This weight in `bits` bits. Of a "-nested" codec (8 -> 4 -> 2 bits) it shares the codes
        and reads only its own planes; keep it, since views of a backend hang on it. Ordinary codes
        are rounded to the nearest multiple (MatQuant) and packed anew. ValueError for others."""
        from lath.formats.nested import nested_view

        return nested_view(self, bits)

    def check_values(self) -> None:
        """Values that no quantiser writes: a scale that is negative or not finite, a zero off
        range."""
        codec = self.codec
        scales = self.effective_scales()
        if not bool(torch.isfinite(scales).all()) or bool((scales < 0).any()):
            raise ValueError(f"scales of a {codec} must be finite and not negative")
        if codec.scale_dtype in ("int8", "fp8"):
            inner = self.scales
            if codec.scale_dtype == "fp8":
                inner = inner.view(torch.float8_e4m3fn).float()
            if not bool((inner <= codec.largest_inner_scale).all()):
                raise ValueError(
                    f"scales of a {codec} must be {codec.largest_inner_scale} or less, so that "
                    f"scale * code fits {codec.scale_dtype}, got {float(inner.max()):g}"
                )
        if self.table is not None and not bool(torch.isfinite(self.table).all()):
            raise ValueError(f"table of a {codec} must be finite")
        if codec.values == "ternary" and bool((self.unpack_codes() > 2).any()):
            raise ValueError("codes of a ternary weight must be 0, 1 or 2")
        if codec.packing == "base3":
            again = packing.pack(self.unpack_codes(), codec)
            if not torch.equal(again, self.codes):
                raise ValueError(f"bytes of a {codec} must each be those of five codes, padding 0")
        if self.zeros is None:
            return
        if codec.zero == "float" and not bool(torch.isfinite(self.zeros).all()):
            raise ValueError(f"zeros of a {codec} must be finite")
        if codec.zero == "integer" and bool((self.zeros.int() >= codec.levels).any()):
            raise ValueError(f"zeros of a {codec} must be below {codec.levels}")


def _layout(codec: Codec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that the codec has."""
    rows, columns = shape
    count = packing.code_bytes(codec, shape) // 4
    padded = packing.round_up(rows, packing.PANEL)
    side = (codec.num_groups(columns), padded)
    zero_dtype = {
        "none": None,
        "integer": torch.uint8,
        "float": SCALE_DTYPES[codec.scale_dtype],
    }[codec.zero]
    outer = {"int8": (padded,), "fp8": (padded,), "e4m3": (1,)}.get(codec.scale_dtype, ())
    tensors = {
        "codes": ((count,), torch.int32),
        "scales": (side, SCALE_DTYPES[codec.scale_dtype]),
        "zeros": (side, zero_dtype),
        "outer": (outer, OUTER_DTYPES.get(codec.scale_dtype)),
        "table": ((codec.levels,), torch.float32 if codec.values == "learned" else None),
    }
    return {name: (size, dtype) for name, (size, dtype) in tensors.items() if dtype is not None}


_TENSORS = ("codes", "scales", "zeros", "outer", "table")
