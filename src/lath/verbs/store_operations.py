"""What can be done to a cache besides appending: shorten, rearrange, drop, compact, transform."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lath.formats.page_store import PageStore
from lath.formats.selection import IndexList
from lath.verbs import page_edit, store_transforms
from lath.verbs.attention_options import check_number, integers
from lath.verbs.checks import FLOAT_DTYPES, check_flag, check_size, check_tensor


class StoreOperations(PageStore):
    """The edits of a `PagedKV`. None of them loses count of positions: `lengths` are one more than
    the last position of a sequence, whatever it still holds."""

    key_channel_scales: Tensor | None = None

    # Positions

    def positions(self, sequence: int) -> list[int]:
        """The positions of the tokens that a sequence holds, in the order of `dequantize`."""
        return self.spans[self._check_sequence(sequence)].positions

    def advance(self, tokens: int | Sequence[int] | Tensor) -> None:
        """Count positions on without holding anything there: tokens dropped before they are stored.

        tokens: 0 or more, an int for all sequences or one per sequence. While the last float part
        holds tokens, attention takes them to stand at the end: `exact_positions` ends then.
        """
        counts = self._per_sequence("tokens", tokens)
        if any(count < 0 for count in counts):
            raise ValueError(f"tokens must be 0 or more, got {tokens}")
        self.skip(counts)

    def dequantize(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys [Hkv, n, D] and values [Hkv, n, E] of one sequence as attention reads them, fp32.

        The n tokens that are held, at `positions`. Channel scales are multiplied in again. For
        tests and repair: attention needs no copy.
        """
        return page_edit.dequantize(self, self._check_sequence(sequence))

    # Shortening and rearranging

    def crop(self, length: int | Sequence[int] | Tensor) -> None:
        """Forget tokens at the end.

        length: an int, to which longer sequences are cut, or one per sequence; a negative number
        drops that many positions. ValueError past what there is. A page that is cut keeps its
        record and counts fewer of its tokens (its index row still bounds them); what is appended
        afterwards starts a new page, at the position `length` even where it lies in a gap.
        """
        lengths = self.lengths
        if isinstance(length, int) and not isinstance(length, bool):
            if not -min(lengths, default=0) <= length <= len(self):
                raise ValueError(
                    f"length must be 0 .. {len(self)}, the longest sequence, or "
                    f"{-min(lengths, default=0)} .. -1 to drop tokens, got {length}"
                )
            wanted = [min(length, own) if length >= 0 else own + length for own in lengths]
        else:
            given = self._per_sequence("length", length)
            wanted = [n if n >= 0 else own + n for n, own in zip(given, lengths, strict=True)]
            if any(not 0 <= n <= own for n, own in zip(wanted, lengths, strict=True)):
                raise ValueError(f"length must lie within the lengths {lengths}, got {given}")
        self.cut(wanted)

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Make sequence i what sequence indices[i] was, sharing its pages.

        indices: ints or an integer tensor of 0 .. batch - 1, any number of them, repeats too: beams
        (a permutation with repeats), several returned sequences, or a selection.
        """
        rows = integers("indices", indices)
        if any(not 0 <= row < self.batch for row in rows):
            raise ValueError(f"indices must be 0 .. {self.batch - 1}, got {rows}")
        self.take_sequences(rows)

    def repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times in a row, sharing its pages."""
        check_size("repeats", repeats)
        self.reorder([s for s in range(self.batch) for _ in range(repeats)])

    # Dropping

    def drop_pages(self, entries: Sequence[Sequence[int] | Tensor]) -> None:
        """Forget some pages of each sequence; every other token stays at its position.

        entries: for each sequence, ascending entries of its page table (0 for its first page,
        `page_counts` for how many). Attention afterwards is attention without those tokens. Pages
        that no other sequence or fork holds are free again. Float parts are never dropped.
        """
        dropped = check_ascending("entries", entries, self.page_counts, "entries of its page table")
        for s, own in enumerate(dropped):
            self.drop_entries(s, own)

    def evict(self, ids: IndexList) -> None:
        """Keep the pages of a list and forget the others; float parts stay.

        ids: of granularity "page", what `lath.select` returns or a list of one's own: one list for
        each sequence, or several that are equal, because the KV heads of a cache share its pages.
        Waits for the device.
        """
        if not isinstance(ids, IndexList):
            raise TypeError(f"ids must be a lath.IndexList, got {type(ids).__name__}")
        if ids.granularity != "page":
            raise ValueError(
                f"ids must be of granularity 'page', got {ids.granularity!r}: "
                "`compact` keeps single tokens"
            )
        lists = ids.tolist()
        if len(lists) != self.batch:
            raise ValueError(f"ids must have lists for {self.batch} sequences, got {len(lists)}")
        for s, heads in enumerate(lists):
            if any(own != heads[0] for own in heads):
                raise ValueError(
                    f"ids must hold equal lists for all heads of sequence {s}: pages are shared by "
                    f"all KV heads of a cache, got {heads}"
                )
        counts = self.page_counts
        kept = check_ascending("ids", [heads[0] for heads in lists], counts, "entries")
        for s, (own, count) in enumerate(zip(kept, counts, strict=True)):
            self.drop_entries(s, set(range(count)).difference(own))

    def compact(self, keep: Sequence[Sequence[int] | Tensor], renumber: bool = True) -> None:
        """Keep only some tokens, such as the accepted path of a tree of drafts.

        keep: for each sequence the ascending positions to keep; positions that hold nothing any
        more may be among them. renumber: position keep[s][i] becomes i, and the length that of
        keep[s] (a kept position that holds nothing stays one). False: every token keeps its
        position, and the sequence its length (tokens of an image or video that are not needed any
        more: METok, Skip-Vision, Dynamic-LLaVA).

        Float parts are gathered as they are. A page of which the first n tokens are kept, and no
        others or n >= 32, keeps its record and counts n. Other tokens are decoded: those after the
        last page that stays go to the tail if it has room (and goes on where they end); the rest is
        quantised once more, into new pages: an error as large as the first rounding's, on those
        tokens alone. A page whose tokens do not stand one after another ends `exact_positions`.
        """
        chosen = check_ascending("keep", keep, self.lengths, "positions")
        renumber = check_flag("renumber", renumber)
        for s, positions in enumerate(chosen):
            page_edit.compact(self, s, positions, renumber)

    # Transforming

    def rerotate(self, delta: int | Sequence[int] | Tensor, inverse_frequencies: Tensor) -> None:
        """Turn every key by `delta` positions of a rotary embedding (CacheBlend: a text's cache at
        another place). What `positions` says does not change.

        delta: an int or one per sequence. inverse_frequencies: [R/2] radians per position, R <= D;
        channels c and c + R/2 turn together, as in Hugging Face models; channels from R on stay.
        Float parts are turned and rounded to dtype; keys of pages are decoded, turned and quantised
        once more into new pages (what other caches share is not touched), with an error as large as
        the first rounding's. Values stay as they are.
        """
        deltas = self._per_sequence("delta", delta)
        check_tensor("inverse_frequencies", inverse_frequencies, (*FLOAT_DTYPES, torch.float64))
        half = inverse_frequencies.shape[0] if inverse_frequencies.dim() == 1 else -1
        if not 0 <= 2 * half <= self.format.key_dim:
            raise ValueError(
                f"inverse_frequencies must be [R/2] with R <= {self.format.key_dim}, got shape "
                f"{[*inverse_frequencies.shape]}"
            )
        for s, turn in enumerate(deltas):
            page_edit.rerotate(self, s, turn, inverse_frequencies)

    def compact_frequencies(self, keep: int | float, first: int = 64, last: int = 64) -> None:
        """FreqKV: fewer tokens in place of the middle ones, their low frequencies along the tokens.

        The middle: the pages that lie wholly behind the first `first` and before the last `last`
        tokens that a sequence holds (the float parts are never among them). Its N keys and values,
        as they are stored and decoded, are transformed along the tokens by an orthonormal DCT-II;
        the M lowest coefficients are kept and transformed back by a DCT of size M, times sqrt(M/N),
        so that a constant stays what it is. The M tokens are quantised into new pages. keep: M as
        an int >= 1, or as a float in (0, 1] the share of N, rounded up. M >= N changes nothing, bit
        for bit. The lengths stay; token m is given the position of the middle token
        floor((2m + 1) N / 2M), around which it lies. Repeat it to stay at a fixed size.

        A signal that changes slowly along the tokens is kept, noise is not: the share 1 - M/N of
        its energy is lost. Keys that a rotary embedding has turned do not change slowly in their
        fast channels, which all but vanish here, whatever the key was: what the method wants is a
        cache of keys before the embedding, turned when they are read (`key_channel_scales` do not
        matter). Attention with this cache is not rotary attention over M tokens.
        """
        if isinstance(keep, bool) or not isinstance(keep, (int, float)):
            raise TypeError(
                f"keep must be an int (coefficients) or a float (share), got "
                f"{type(keep).__name__}: {keep!r}"
            )
        if isinstance(keep, int) and keep < 1:
            raise ValueError(f"keep must be 1 or more coefficients, got {keep}")
        if isinstance(keep, float) and not 0 < keep <= 1:
            raise ValueError(
                f"keep must be a share in (0, 1], or an int of coefficients, got {keep}"
            )
        check_size("first", first)
        check_size("last", last)
        for s in range(self.batch):
            store_transforms.compact_frequencies(self, s, keep, first, last)

    def threshold_deltas(self, threshold: float, window: int) -> float:
        """DeltaLLM: keys that repeat the token before, where they differ from it by little.

        Token by token through the pages that lie wholly before the last `window` positions, a
        channel of a key whose difference to that channel's last kept value is <= threshold takes
        that value; another is kept, and is what the next ones are compared with. threshold: >= 0,
        in units of the keys as they were appended. Pages in which anything changes are quantised
        once more (keys alone); the others, and so all of them at threshold 0, stay bit for bit.
        Every score q·k moves by no more than threshold * Σ|q|, and what quantising adds.

        Returns the sparsity, the share of deltas that are 0 among all channels of those keys (the
        first token of a sequence has no delta and counts as one that is kept); 0.0 where no page is
        that old. It is a number, not speed: pages are as large as before.
        """
        threshold = check_number("threshold", threshold, positive=False)
        if threshold < 0:
            raise ValueError(f"threshold must be 0 or more, got {threshold}")
        check_size("window", window)
        counts = [
            store_transforms.threshold_deltas(self, s, threshold, window) for s in range(self.batch)
        ]
        total = sum(of for _, of in counts)
        return sum(zero for zero, _ in counts) / total if total else 0.0

    # Checks

    def _check_sequence(self, sequence: int) -> int:
        if not 0 <= check_size("sequence", sequence) < self.batch:
            raise ValueError(f"sequence must be 0 .. {self.batch - 1}, got {sequence}")
        return sequence

    def _per_sequence(self, name: str, value: Any) -> list[int]:
        """An int for all sequences, or ints or an integer tensor [batch]."""
        if isinstance(value, int) and not isinstance(value, bool):
            return [value] * self.batch
        numbers = integers(name, value)
        if len(numbers) != self.batch:
            raise ValueError(
                f"{name} must have one entry per sequence, {self.batch}, got {len(numbers)}"
            )
        return numbers


def check_ascending(name: str, value: Any, limits: Sequence[int], what: str) -> list[list[int]]:
    """For each sequence s ascending ints 0 .. limits[s] - 1."""
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not is_list or len(value) != len(limits):
        got = f"{len(value)} of them" if is_list else type(value).__name__
        raise ValueError(
            f"{name} must be a sequence of {len(limits)} sequences of {what}, one per sequence of "
            f"the cache, got {got}"
        )
    chosen = [integers(f"{name}[{s}]", own) for s, own in enumerate(value)]
    for s, (own, limit) in enumerate(zip(chosen, limits, strict=True)):
        wrong = [number for number in own if not 0 <= number < limit]
        wrong += [b for a, b in pairwise(own) if a >= b]
        if wrong:
            raise ValueError(
                f"{name}[{s}] must hold ascending {what}, 0 .. {limit - 1}, each once, got "
                f"{wrong[0]} in {own}"
            )
    return chosen


def check_keep(keep: Any, counts: Sequence[int]) -> list[list[int]]:
    """The argument `keep` of `PagedKV.append`."""
    return check_ascending("keep", keep, counts, "indices of the tokens given")
