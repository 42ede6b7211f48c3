"""The codecs of a cache by name: one for both, or "k8v4" for keys and values apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lath.formats.pages import PAGE, PAGE_CODECS, PageCodec, PageFormat

_BY_BITS = {"16": "float", "8": "int8", "4": "int4", "2": "int2"}


@dataclass(frozen=True)
class KVCodecs:
    """The page codecs of keys and values."""

    key: PageCodec
    value: PageCodec

    def __str__(self) -> str:
        return self.key.name if self.key == self.value else f"{self.key}/{self.value}"

    def bytes_per_token(self, kv_heads: int, key_dim: int, value_dim: int, itemsize: int) -> float:
        """Bytes of one token of one layer in a full page, with its share of the index."""
        fmt = PageFormat(self.key, self.value, key_dim, value_dim, itemsize)
        return kv_heads * (fmt.record_bytes + fmt.index_bytes) / PAGE


def kv_codecs(kv: str | KVCodecs) -> KVCodecs:
    """The `KVCodecs` of a name: a page codec ("int8", "int4", "int8-planes", "float", ...) for
    both, or "k{bits}v{bits}" with 16, 8, 4 or 2 bits. TypeError or ValueError otherwise.
    """
    if isinstance(kv, KVCodecs):
        return kv
    if not isinstance(kv, str):
        raise TypeError(f"kv must be a str or None, got {type(kv).__name__}: {kv!r}")
    if kv in PAGE_CODECS:
        return KVCodecs(PageCodec(kv), PageCodec(kv))
    match = re.fullmatch(r"k(16|8|4|2)v(16|8|4|2)", kv)
    if match is None:
        raise ValueError(
            f"kv must be one of {PAGE_CODECS} or 'k8v4' and the like with 16, 8, 4 or 2 bits, "
            f"got {kv!r}"
        )
    key, value = (PageCodec(_BY_BITS[bits]) for bits in match.groups())
    return KVCodecs(key, value)
