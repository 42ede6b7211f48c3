"""The page: 64 tokens of one KV head, the unit of quantisation, of selection and of repair.

A page is one *record*, which attention reads, and one *index row*, which selection and repair read
of every page. Both depend on the codecs alone, never on a device.

Record, in this order, padded to 128 bytes (D and E: padded head dims of keys and values):

    field     shape in memory                       holds
    keys      [4, D/16, 16 tokens, 16 channels]     codes of (K - mean)/scale, in 16-byte units
    values    [4, E, 16 tokens]                     codes of V/scale
    value_scales   fp32 [E]                         one scale per channel
    key_scales     fp32 [4]                         scale of the page, index unit, 0, 0
    token_scales   fp32 [64]                        one scale per token: int4 and int2 keys only

Codes narrower than 8 bits put channels d, d + D/2 (4 bits, low bits first) or d, d + D/4, d + D/2,
d + 3D/4 (2 bits) into one byte, so that every part is a whole tile of units. "int8-planes" keeps
the upper and the lower four bits apart, `keys` then `keys_low`, `values` then `values_low`: its
draft view reads the first alone. Float codecs are stored [64, D] and [64, E], the mean not removed.

Index row: mean bf16 [D], max int8 [D], min int8 [D], numbers fp32 [4] (index unit, tokens written,
0, 0), deviation uint8 [D], value_mean bf16 [E]. Selection reads up to the numbers, repair all. max
and min are in index units, rounded outward, so that q·mean + unit (relu(q)·max - relu(-q)·min) is
an upper bound of every score with decoded keys; deviation is in half units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PAGE = 64
SUBPAGE = 16
SUBPAGES = PAGE // SUBPAGE
# Max and min of an index row are counted in key codes, or where these are no int8 in amax / 120:
# rounded outward they stay inside int8.
INDEX_LEVELS = 120
UNIT = 16  # bytes that a GPU thread or a CPU lane group loads at once along the contracted axis
RECORD_ALIGNMENT = 128

PAGE_CODECS = ("float", "int8", "int8-planes", "int4", "int2", "e4m3")
Map = Literal["float", "integer", "e4m3"]


@dataclass(frozen=True)
class PageCodec:
    """How keys or values of a page are stored: a name of `PAGE_CODECS`.

    "float": fp16, bf16 or fp32 as they came. "int8": symmetric. "int4", "int2": the upper bits of a
    mid-rise code, which decodes to the int8 code 16u + 8 or 64u + 32. "int8-planes": the code of
    "int8" as two planes of four bits; its draft is the "int4" decoding of the upper one.
    "e4m3": float8 E4M3.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in PAGE_CODECS:
            raise ValueError(f"page codec must be one of {PAGE_CODECS}, got {self.name!r}")

    def __str__(self) -> str:
        return self.name

    @property
    def map(self) -> Map:
        if self.name in ("float", "e4m3"):
            return self.name  # type: ignore[return-value]
        return "integer"

    @property
    def bits(self) -> int:
        """Bits of a code; 16 for "float" stands for its own dtype."""
        return {"float": 16, "int8": 8, "int8-planes": 8, "int4": 4, "int2": 2, "e4m3": 8}[
            self.name
        ]

    @property
    def plane_bits(self) -> int:
        """Bits per channel of the first plane: 4 for "int8-planes", else `bits`."""
        return 4 if self.name == "int8-planes" else self.bits

    @property
    def planes(self) -> int:
        return 2 if self.name == "int8-planes" else 1

    @property
    def scale_per_token(self) -> bool:
        """Keys: whether each token has a scale of its own (else one per page)."""
        return self.name in ("int4", "int2")

    @property
    def largest(self) -> float:
        """What amax of a group is divided by to give its scale."""
        return {"int8": 127.0, "int8-planes": 127.0, "int4": 128.0, "int2": 128.0, "e4m3": 448.0}[
            self.name
        ]

    def padded(self, channels: int) -> int:
        """Channels stored: a multiple of 16 whole bytes along the channel axis."""
        multiple = UNIT if self.map == "float" else UNIT * 8 // self.plane_bits
        return -(-channels // multiple) * multiple


def page_codec(codec: str | PageCodec, name: str = "codec") -> PageCodec:
    """The `PageCodec` of a name; TypeError or ValueError naming the argument otherwise."""
    if isinstance(codec, PageCodec):
        return codec
    if not isinstance(codec, str):
        raise TypeError(
            f"{name} must be a str or a PageCodec, got {type(codec).__name__}: {codec!r}"
        )
    if codec not in PAGE_CODECS:
        raise ValueError(f"{name} must be one of {PAGE_CODECS}, got {codec!r}")
    return PageCodec(codec)


@dataclass(frozen=True)
class Field:
    """Where a field lies in a record or index row: byte offset and length."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class PageFormat:
    """The layout of a page: codecs of keys and values, true head dims, bytes of a float.

    float_bytes: 2 or 4, the size of the caller's dtype; matters to "float" codecs only.
    """

    key: PageCodec
    value: PageCodec
    key_dim: int
    value_dim: int
    float_bytes: int = 2

    def __str__(self) -> str:
        return f"{self.key}/{self.value} {self.key_dim}x{self.value_dim}"

    @property
    def padded_key_dim(self) -> int:
        return self.key.padded(self.key_dim)

    @property
    def padded_value_dim(self) -> int:
        return self.value.padded(self.value_dim)

    @property
    def fields(self) -> dict[str, Field]:
        """Fields of the record, in memory order."""
        return _place(
            {
                **_code_fields("keys", self.key, self.padded_key_dim, self.float_bytes),
                **_code_fields("values", self.value, self.padded_value_dim, self.float_bytes),
                "value_scales": 4 * self.padded_value_dim,
                "key_scales": 16,
                **({"token_scales": 4 * PAGE} if self.key.scale_per_token else {}),
            }
        )

    @property
    def record_bytes(self) -> int:
        end = max(field.end for field in self.fields.values())
        return -(-end // RECORD_ALIGNMENT) * RECORD_ALIGNMENT

    @property
    def index_fields(self) -> dict[str, Field]:
        keys, values = self.padded_key_dim, self.padded_value_dim
        return _place(
            {
                "mean": 2 * keys,
                "max": keys,
                "min": keys,
                "numbers": 16,
                "deviation": keys,
                "value_mean": 2 * values,
            }
        )

    @property
    def index_bytes(self) -> int:
        """7 D + 16 for equal head dims; a multiple of 16, because every padded head dim is."""
        return max(field.end for field in self.index_fields.values())

    @property
    def draft_bytes(self) -> int:
        """Bytes of a record that the draft view reads: all but the lower planes."""
        skipped = sum(field.nbytes for name, field in self.fields.items() if name.endswith("_low"))
        return self.record_bytes - skipped

    def read_bytes(self, draft: bool = False) -> int:
        """Bytes of a record that attention reads, or that a draft does."""
        return self.draft_bytes if draft else self.record_bytes

    def subpage_bytes(self, draft: bool = False) -> int:
        """Bytes of these that hold the codes of 16 tokens side by side."""
        names = ["keys", "values", *([] if draft else ["keys_low", "values_low"])]
        codes = sum(self.fields[name].nbytes for name in names if name in self.fields)
        return codes // SUBPAGES


def _code_fields(name: str, codec: PageCodec, channels: int, float_bytes: int) -> dict[str, int]:
    if codec.map == "float":
        return {name: PAGE * channels * float_bytes}
    plane = PAGE * channels * codec.plane_bits // 8
    return {name: plane} if codec.planes == 1 else {name: plane, f"{name}_low": plane}


def _place(sizes: dict[str, int]) -> dict[str, Field]:
    placed, offset = {}, 0
    for name, size in sizes.items():
        placed[name] = Field(offset, size)
        offset += size
    return placed
