"""What one attention reads: the scores' options, and the keys and values as pages. Pure data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lath.formats.pages import PageFormat

LOG2E = math.log2(math.e)

QueryFormat = Literal["int8", "e4m3", "float"]
Precision = Literal["float", "int8", "int16", "e4m3"]
Scheme = Literal["online", "unified"]


@dataclass(frozen=True)
class ScoreOptions:
    """How a score becomes a weight. Scores in real units:

        s = scale * q·k;  s = softcap * tanh(s / softcap);  s += bias - slope * (query - key)

    then masked, and softmax over keys and, where there is one, the sink. A query at row i of Lq in
    a sequence of Lk keys has position i + Lk - Lq (right-aligned).

    scale: factor of q·k. causal: key <= query. window: keys with query - key < window (and
    key - query < window where not causal); None for all. softcap: None or > 0. mask: bool, True =
    may be read, broadcastable to [S, Hq, Lq, Lk]. bias: float, same shapes. alibi: float [Hq],
    slopes. sink: float [Hq], a score that joins the denominator alone (natural units). tree: int32
    [S, Lq, W], the last Lq keys are the queries' own tokens and query i reads its j-th only if bit
    j % 32 of word j // 32 is set; all earlier keys are read; it replaces `causal`.
    query: how q is rounded before q·k with quantised keys, "int8" or "e4m3" (one scale per row);
    float pages always take q as it is. precision: how P·V is multiplied over quantised values:
    "float", "int8" (127 levels, one scale per row and page), "int16" (127 * 256 levels) or "e4m3";
    float pages always take "float". scheme: "online" or "unified" softmax; same result.
    """

    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    alibi: Tensor | None = None
    sink: Tensor | None = None
    tree: Tensor | None = None
    query: QueryFormat = "int8"
    precision: Precision = "float"
    scheme: Scheme = "online"


@dataclass(frozen=True)
class PageView:
    """Keys and values of S sequences, as attention reads them.

    Positions of a sequence's keys: the first float part, then pages in the order of `table`, then
    the last float part; `starts` says where each page begins. Positions may have gaps, where pages
    were not selected or were dropped.

    records: uint8 [N, Hkv, record_bytes]. index: uint8 [N, Hkv, index_bytes]. table: int32 [S, P],
    page numbers; starts: int32 [S, P], position of a page's first token; counts: int32 [S, P],
    tokens that count (1..64, the first of the page), 0 for an unused entry; unused entries come
    last. page_counts: int32 [S], entries in use. lengths: int32 [S], one more than the last
    position of a sequence. After a selection these four are lists of each head: [S, H, P] and
    page_counts [S, H], H = Hkv or Hq (every query head its own list; the head axis may have stride
    0), entries in ascending positions. tokens: int64 [S, H, P], only with such lists: token t of
    the page is read where bit t is set and t < count; None for all that count.
    first_keys, first_values: [S, Hkv, 64, D or E] of the caller's dtype, positions 0 ..
    first_lengths[s] - 1; last_keys, last_values: likewise, the last last_lengths[s] positions.
    Either may be None (no such part). Slots beyond a length may hold anything, NaN too.
    draft: read the upper planes of "int8-planes" alone.
    longest: the largest of `lengths`, known to the host. listed: where there are lists, the most
    keys that one of them and the float parts hold, known to the host.
    """

    format: PageFormat
    records: Tensor
    index: Tensor
    table: Tensor
    starts: Tensor
    counts: Tensor
    page_counts: Tensor
    lengths: Tensor
    longest: int
    first_keys: Tensor | None = None
    first_values: Tensor | None = None
    first_lengths: Tensor | None = None
    last_keys: Tensor | None = None
    last_values: Tensor | None = None
    last_lengths: Tensor | None = None
    draft: bool = False
    tokens: Tensor | None = None
    listed: int | None = None

    @property
    def num_sequences(self) -> int:
        return int(self.lengths.shape[0])

    @property
    def num_kv_heads(self) -> int:
        return int(self.records.shape[1])

    @property
    def list_heads(self) -> int | None:
        """Lists of a sequence, Hkv or Hq; None where all heads read one list, [S, P]."""
        return int(self.table.shape[1]) if self.table.dim() == 3 else None

    @property
    def most_keys(self) -> int:
        """How many keys a row reads at most: what a plan is made for."""
        return self.longest if self.listed is None else self.listed


@dataclass(frozen=True)
class Queries:
    """Rows of q for S sequences.

    q: [B, Hq, L, D], any strides with the last one 1. Dense: B = S and sequence s has the rows
    q[s, :, :lengths[s]]. Packed: B = 1 and sequence s has the rows q[0, :, offsets[s] : offsets[s]
    + lengths[s]]. lengths, offsets: int32 [S]; offsets None where dense. longest: the largest of
    lengths, known to the host. Rows of no sequence come out as output 0 and lse -inf.
    """

    q: Tensor
    lengths: Tensor
    longest: int
    offsets: Tensor | None = None
