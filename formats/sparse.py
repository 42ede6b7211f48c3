"""SparseTensor: a weight of which most numbers are zero, as a bitmap and the numbers that are kept.

A tile is 16 rows by 128 columns, as of every packed weight. Its bitmap has a bit for each weight, 1
where one is kept; the kept numbers of a tile follow each other, row after row, column after column:

    bitmap    int32 [N/16, K/128, 16, 4]     bit k % 32 of word k // 32 of a row: column k
    offsets   int64 [N/16 * K/128 + 1]       kept weights before each tile; the last: all of them
    codes     the kept numbers, 1-D          int8; uint8 with two of 4 bits, low half first; or 16
                                             bits as they are
    scales    [G, N16]                       of whole numbers, as in a `QTensor`

A tile without kept weights costs its bits of the bitmap and one offset. The definition stands in
`lath.reference.sparse`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from lath.formats import packing
from lath.formats.codec import Codec, ScaleDtype, Zero
from lath.formats.packed_weight import PackedWeight, check_layout
from lath.formats.qtensor import SCALE_DTYPES

TILE_WORDS = packing.BLOCK // 32  # words of the bitmap in a row of a tile
FLOAT_VALUES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_INTEGER_BITS = (4, 8)

GRAMMAR_TABLE = {
    "sparse{0..100}-int{4|8}[-gG][-s32]": "of each row that share of the weights, the smallest, is "
    "zero and not stored; the others in int4 or int8. sparse0: only what is zero already",
    "sparse{0..100}-fp16|bf16": "the same with 16-bit numbers as they are",
}
_PATTERN = re.compile(r"sparse(?P<share>0|[1-9]\d?|100)-(?P<kept>.+)")


@dataclass(frozen=True)
class SparseCodec:
    """share: per cent of each row that becomes zero. kept: the codec of the other weights, whole
    numbers of 4 or 8 bits without a zero point, or "fp16" or "bf16". ValueError for others."""

    share: int
    kept: Codec | str

    def __post_init__(self) -> None:
        if type(self.share) is not int or not 0 <= self.share <= 100:
            raise ValueError(f"codec share must be an integer from 0 to 100, got {self.share!r}")
        kept, accepted = self.kept, self.kept in FLOAT_VALUES
        if isinstance(kept, Codec):
            plain = kept.values == "integer" and kept.zero == "none"
            accepted = plain and kept.bits in _INTEGER_BITS and kept.scale_dtype in ("fp16", "fp32")
        if not accepted:
            raise ValueError(
                "codec kept must be 'int4' or 'int8', [-gG][-s32], symmetric, or one of "
                f"{tuple(FLOAT_VALUES)}, got {str(kept)!r}"
            )
        # Kept, not formatted on demand: torch.compile traces attributes but not the formatting.
        object.__setattr__(self, "_text", f"sparse{self.share}-{kept}")

    @staticmethod
    def parse(text: str) -> SparseCodec:
        """The codec of a text form such as "sparse50-int8-g128"; ValueError if it is none."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"codec must be one of {'; '.join(GRAMMAR_TABLE)}; got {text!r}")
        kept = match["kept"]
        return SparseCodec(int(match["share"]), kept if kept in FLOAT_VALUES else Codec.parse(kept))

    def __str__(self) -> str:
        return self._text  # type: ignore[attr-defined, no-any-return]

    def kept_in_row(self, columns: int) -> int:
        """Weights of a row that are kept, if none of it is zero already."""
        return columns - columns * self.share // 100

    # What plans and kernels ask of a `Codec`, answered for the kept numbers.

    @property
    def group(self) -> int | None:
        return self.kept.group if isinstance(self.kept, Codec) else None

    @property
    def bits(self) -> int:
        return self.kept.bits if isinstance(self.kept, Codec) else 16

    @property
    def values(self) -> str:
        """ "integer", "fp16" or "bf16"."""
        return "integer" if isinstance(self.kept, Codec) else self.kept

    @property
    def zero(self) -> Zero:
        return "none"

    @property
    def is_table(self) -> bool:
        """Whether kept numbers are no whole ones."""
        return not isinstance(self.kept, Codec)

    @property
    def scale_dtype(self) -> ScaleDtype | None:
        return self.kept.scale_dtype if isinstance(self.kept, Codec) else None

    @functools.cached_property
    def plane_widths(self) -> tuple[int, ...]:
        return (self.bits,)

    @property
    def code_dtype(self) -> torch.dtype:
        """Of the tensor `codes`."""
        return FLOAT_VALUES.get(self.values, torch.uint8 if self.bits == 4 else torch.int8)

    def code_count(self, kept: int) -> int:
        """Elements of `codes` that hold `kept` numbers."""
        return -(-kept // 2) if self.bits == 4 else kept

    def group_size(self, in_features: int) -> int:
        return max(in_features, 1) if self.group is None else self.group

    def num_groups(self, in_features: int) -> int:
        """Groups along K that have a scale each; 16-bit numbers have none."""
        return self.kept.num_groups(in_features) if isinstance(self.kept, Codec) else 0


class SparseTensor(PackedWeight):
    """A weight of logical shape `[N, K]`: bitmap, offsets and kept numbers (above), and scales of
    whole numbers: `[G, N16]`, or None.

    Rows and columns of the padding have no bits and scale 0. Treated as immutable.
    """

    codec: SparseCodec

    def __init__(
        self,
        codec: SparseCodec,
        shape: tuple[int, int],
        codes: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        scales: Tensor | None = None,
    ) -> None:
        self.codec = codec
        self.shape = (int(shape[0]), int(shape[1]))
        self.codes, self.bitmap, self.offsets, self.scales = codes, bitmap, offsets, scales
        if (scales is None) != codec.is_table:
            want = "absent" if codec.is_table else "present"
            raise ValueError(f"scales of a {codec} must be {want}")
        # How many codes there are only the offsets know: `check_values`.
        check_layout(self, _layout(codec, self.shape, codes.numel()))

    parse_codec = staticmethod(SparseCodec.parse)

    @staticmethod
    def tensor_names(codec: SparseCodec) -> tuple[str, ...]:
        return tuple(_layout(codec, (0, 0), 0))

    @classmethod
    def empty(
        cls, codec: SparseCodec, shape: tuple[int, int], device: torch.device | str = "meta"
    ) -> SparseTensor:
        count = codec.code_count(shape[0] * codec.kept_in_row(shape[1]))
        tensors = {
            name: torch.empty(size, dtype=dtype, device=device)
            for name, (size, dtype) in _layout(codec, shape, count).items()
        }
        return cls(codec, shape, **tensors)

    @property
    def kept(self) -> int:
        """Weights that are stored: waits for the device."""
        return int(self.offsets[-1])

    def mask(self) -> Tensor:
        """bool [N, K]: which weights are kept."""
        tiles = unpack_bitmap(self.bitmap)
        return _from_tiles(tiles, self.shape)

    def numbers(self) -> Tensor:
        """[N, K] int8, or 16-bit floats: kept numbers in their places, without scales, 0 elsewhere.
        ValueError if there are not as many codes as bits."""
        self._check_count(int(unpack_bitmap(self.bitmap).sum()))
        return self._spread()

    def _spread(self) -> Tensor:
        """`numbers`, by operations whose shapes depend on no number, as tracing needs."""
        bits, kept = unpack_bitmap(self.bitmap), self.codes
        if self.codec.bits == 4:
            # The sign of a half byte: shifted up, and down again as a signed number.
            halves = torch.stack([self.codes << 4, self.codes & 0xF0], dim=1)
            kept = halves.reshape(-1).view(torch.int8) >> 4
        if kept.numel() == 0:
            return _from_tiles(
                torch.zeros(bits.shape, dtype=kept.dtype, device=kept.device), self.shape
            )
        inside = bits.reshape(-1, packing.PANEL * packing.BLOCK).cumsum(dim=1)
        place = (self.offsets[:-1, None] + inside - 1).reshape(bits.shape)
        # Where no bit is, any place will do, and one before the first is there.
        tiles = torch.where(bits, kept[place.clamp(min=0) * bits], torch.zeros_like(kept[:1]))
        return _from_tiles(tiles, self.shape)

    def _check_count(self, kept: int) -> None:
        expected = self.codec.code_count(kept)
        if len(self.codes) != expected:
            raise ValueError(
                f"codes of a {self.codec} with {kept} bits in its bitmap must have {expected} "
                f"elements, got {len(self.codes)}"
            )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch dtype, got {dtype}")
        numbers, (rows, columns) = self._spread(), self.shape
        if self.scales is None:
            return numbers.to(dtype)
        scales = self.scales[:, :rows].float().T
        size = self.codec.group_size(columns)
        return (numbers.float() * scales.repeat_interleave(size, dim=1)[:, :columns]).to(dtype)

    def check_values(self) -> None:
        """A bitmap and offsets that do not belong together, codes too many or too few, bits in the
        padding, a number that is not finite, a scale that is negative or not finite."""
        codec, bits = self.codec, unpack_bitmap(self.bitmap)
        expected = tile_offsets(bits)
        if not torch.equal(self.offsets, expected):
            tile = int((self.offsets != expected).nonzero()[0])
            raise ValueError(
                f"offsets of a {codec} must count the bits of the bitmap, {int(expected[tile])} "
                f"before tile {tile}, got {int(self.offsets[tile])}"
            )
        if int(_from_tiles(bits, self.shape).sum()) != self.kept:
            raise ValueError(f"bitmap of a {codec} {self.shape} must have no bits in the padding")
        self._check_count(self.kept)
        if codec.is_table and not bool(torch.isfinite(self.codes).all()):
            raise ValueError(f"codes of a {codec} must be finite")
        if codec.bits == 4 and self.kept % 2 and int(self.codes[-1]) > 15:
            raise ValueError(f"codes of a {codec} must end in a half byte of 0")
        if self.scales is not None and not bool(
            (torch.isfinite(self.scales) & (self.scales >= 0)).all()
        ):
            raise ValueError(f"scales of a {codec} must be finite and not negative")


def pack(
    numbers: Tensor, mask: Tensor, codec: SparseCodec, scales: Tensor | None = None
) -> SparseTensor:
    """numbers [N, K] (int8, or 16-bit floats) and bool mask [N, K] → SparseTensor."""
    bits = _to_tiles(mask)
    kept = _to_tiles(numbers)[bits]
    if codec.bits == 4:
        even = torch.nn.functional.pad(kept, (0, len(kept) % 2)).view(torch.uint8).reshape(-1, 2)
        kept = (even[:, 0] & 15) | (even[:, 1] << 4)
    shape = (numbers.shape[0], numbers.shape[1])
    return SparseTensor(codec, shape, kept, _pack_bitmap(bits), tile_offsets(bits), scales)


def tile_offsets(bits: Tensor) -> Tensor:
    """bool [panels, blocks, 16, 128] → int64 [tiles + 1]: kept weights before each tile."""
    counts = bits.sum(dim=(2, 3)).reshape(-1)
    return torch.nn.functional.pad(torch.cumsum(counts, 0), (1, 0))


def unpack_bitmap(bitmap: Tensor) -> Tensor:
    """int32 [panels, blocks, 16, 4] → bool [panels, blocks, 16, 128]."""
    octets = bitmap.contiguous().view(torch.uint8)[..., None]
    bits = (octets >> torch.arange(8, dtype=torch.uint8, device=bitmap.device)) & 1
    return bits.reshape(*bitmap.shape[:3], packing.BLOCK).bool()


def _pack_bitmap(bits: Tensor) -> Tensor:
    octets = bits.reshape(*bits.shape[:3], packing.BLOCK // 8, 8).to(torch.uint8)
    weights = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (octets << weights).sum(dim=-1, dtype=torch.uint8).view(torch.int32)


def _to_tiles(dense: Tensor) -> Tensor:
    """[N, K] → [panels, blocks, 16, 128], padded with 0."""
    rows, columns = dense.shape
    pad = (0, -columns % packing.BLOCK, 0, -rows % packing.PANEL)
    padded = torch.nn.functional.pad(dense, pad)
    panels, blocks = padded.shape[0] // packing.PANEL, padded.shape[1] // packing.BLOCK
    return padded.reshape(panels, packing.PANEL, blocks, packing.BLOCK).transpose(1, 2).contiguous()


def _from_tiles(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `_to_tiles`."""
    panels, blocks = tiles.shape[:2]
    dense = tiles.transpose(1, 2).reshape(panels * packing.PANEL, blocks * packing.BLOCK)
    return dense[: shape[0], : shape[1]].contiguous()


def _layout(
    codec: SparseCodec, shape: tuple[int, int], count: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that the codec has."""
    panels, blocks = -(-shape[0] // packing.PANEL), -(-shape[1] // packing.BLOCK)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((count,), codec.code_dtype),
        "bitmap": ((panels, blocks, packing.PANEL, TILE_WORDS), torch.int32),
        "offsets": ((panels * blocks + 1,), torch.int64),
    }
    if codec.scale_dtype is not None:
        side = (codec.num_groups(shape[1]), panels * packing.PANEL)
        layout["scales"] = (side, SCALE_DTYPES[codec.scale_dtype])
    return layout
