"""`lath.PagedKV` after any history, against lists of tokens; and what it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import lath
from tools.caches import DIM, HEADS, VALUE_DIM, cache, tokens
from tools.decoding import short


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"page_size": 32}, ValueError, "page_size must be 64, got 32"),
        ({"key_codec": "int3"}, ValueError, "key_codec"),
        ({"value_codec": 8}, TypeError, "value_codec"),
        ({"dtype": torch.float64}, TypeError, "dtype"),
        ({"head_dim": 0}, NotImplementedError, "head_dim"),
        ({"head_dim": 257}, NotImplementedError, "head_dim"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads"),
        ({"batch": -1}, ValueError, "batch"),
        ({"value_dim": 300}, NotImplementedError, "value_dim"),
        ({"backend": "fast"}, ValueError, "backend"),
        ({"keep_first": 1}, TypeError, "keep_first"),
        ({"key_channel_scales": torch.ones(3)}, ValueError, "key_channel_scales"),
        ({"key_channel_scales": torch.zeros(2, 16)}, ValueError, "key_channel_scales"),
    ],
    ids=short,
)
def test_bad_constructions(options: dict[str, Any], error: type, names: str) -> None:
    given = {"num_kv_heads": 2, "head_dim": 16, "backend": "reference", **options}
    with pytest.raises(error, match=names):
        lath.PagedKV(**given)


def test_bad_appends_change_nothing() -> None:
    k, v = tokens(10, batch=2)
    kv = cache(batch=2)
    kv.append(k, v)
    bad = [
        (k[:1], v, None, ValueError, "k must be"),
        (k, v[..., :8], None, ValueError, "v must be"),
        (k, v[:, :, :9], None, ValueError, "as many tokens"),
        (k.float(), v, None, TypeError, "k must be bfloat16"),
        (k, v.half(), None, TypeError, "v must be bfloat16"),
        (k.long(), v, None, TypeError, "k must be"),
        ([1], v, None, TypeError, "k must be"),
        (k, v, [11, 0], ValueError, "lengths must be 0 .. 10"),
        (k, v, [-1, 0], ValueError, "lengths must be 0 .. 10"),
        (k, v, [1], ValueError, "lengths must have"),
        (k, v, [1.0, 2], TypeError, "lengths must hold ints"),
        (k, v, 3, TypeError, "lengths must be"),
        (k, v, torch.ones(2), TypeError, "lengths must be"),
        (k.to("meta"), v, None, ValueError, "k must be on cpu"),
    ]
    for keys, values, lengths, error, names in bad:
        with pytest.raises(error, match=names):
            kv.append(keys, values, lengths)
    assert kv.lengths == [10, 10]


def test_a_writer_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = tokens(200)
    kv = cache()
    kv.append(k[:, :, :100], v[:, :, :100])
    before = kv.dequantize(0)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kv, "write_pages", fail)
        with pytest.raises(KeyboardInterrupt):
            kv.append(k, v)
    assert (kv.lengths, kv.pool.pages_in_use) == ([100], 0)
    assert all(torch.equal(a, b) for a, b in zip(kv.dequantize(0), before, strict=True))
    kv.append(k[:, :, 100:], v[:, :, 100:])
    whole = cache()
    whole.append(k, v)
    assert torch.equal(kv.dequantize(0)[0], whole.dequantize(0)[0])


def test_bad_edits() -> None:
    kv = cache(batch=2)
    kv.append(*tokens(10, batch=2), [10, 5])
    bad = [
        (kv.crop, (11,), ValueError, "length must be 0 .. 10"),
        (kv.crop, (-6,), ValueError, "-5"),
        (kv.crop, ([10, 6],), ValueError, "lengths"),
        (kv.crop, ([1],), ValueError, "one entry per sequence"),
        (kv.crop, (1.5,), TypeError, "length"),
        (kv.crop, (True,), TypeError, "length"),
        (kv.reorder, ([2],), ValueError, "indices must be 0 .. 1"),
        (kv.reorder, ([-1],), ValueError, "indices"),
        (kv.reorder, (torch.zeros(2, 2, dtype=torch.int64),), ValueError, "one-dimensional"),
        (kv.repeat_interleave, (-1,), ValueError, "repeats"),
        (kv.compact, ([[0]],), ValueError, "keep must be"),
        (kv.compact, ([[0], []], 0), TypeError, "renumber"),
        (kv.advance, (-1,), ValueError, "tokens must be 0 or more"),
        (kv.advance, ([1],), ValueError, "tokens must have one entry"),
        (kv.positions, (2,), ValueError, "sequence"),
        (kv.compact, ([[0], [3, 2]],), ValueError, r"keep\[1\]"),
        (kv.compact, ([[0], [5]],), ValueError, r"keep\[1\]"),
        (kv.compact, ([[-1], []],), ValueError, r"keep\[0\]"),
        (kv.rerotate, ([1], torch.ones(2)), ValueError, "delta"),
        (kv.rerotate, (1, torch.ones(9)), ValueError, "inverse_frequencies"),
        (kv.rerotate, (1, [1.0]), TypeError, "inverse_frequencies"),
        (kv.dequantize, (2,), ValueError, "sequence"),
        (kv.reserve, (-1,), ValueError, "tokens"),
    ]
    for call, arguments, error, names in bad:
        with pytest.raises(error, match=names):
            call(*arguments)
    assert kv.lengths == [10, 5]


class Caches(RuleBasedStateMachine):
    """Caches with float codecs against lists of token numbers: equal, exactly, after any history.

    Token t's key and value are row t of two tables; None is a position that holds nothing. All
    caches here share one pool.
    """

    @initialize(keep_first=st.booleans())
    def start(self, keep_first: bool) -> None:
        k, v = tokens(600, seed=9)
        self.keys, self.values = k[0], v[0]
        self.next = 0
        self.caches = [cache("float", 2, keep_first=keep_first)]
        self.models: list[list[list[int | None]]] = [[[], []]]

    def _pick(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.caches) - 1))

    @rule(
        data=st.data(),
        longest=st.sampled_from([0, 1, 2, 63, 64, 65, 150]),
        every=st.sampled_from([None, None, 1, 2, 100]),
    )
    def append(self, data: st.DataObject, longest: int, every: int | None) -> None:
        i = self._pick(data)
        kv, model = self.caches[i], self.models[i]
        counts = [data.draw(st.integers(0, longest)) for _ in model]
        numbers = torch.randint(
            0, 600, (len(model), longest), generator=torch.Generator().manual_seed(self.next)
        )
        self.next += 1
        shape = (len(model), HEADS, longest)
        k = self.keys[:, numbers.reshape(-1)].reshape(HEADS, len(model), longest, DIM)
        v = self.values[:, numbers.reshape(-1)].reshape(HEADS, len(model), longest, VALUE_DIM)
        assert k.transpose(0, 1).shape[:3] == shape
        keep = None if every is None else [list(range(0, count, every)) for count in counts]
        kv.append(k.transpose(0, 1), v.transpose(0, 1), counts, keep)
        for sequence, row, count in zip(model, numbers.tolist(), counts, strict=True):
            sequence += [x if every is None or j % every == 0 else None for j, x in enumerate(row)][
                :count
            ]

    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        i = self._pick(data)
        counts = [data.draw(st.integers(0, 70)) for _ in self.models[i]]
        self.caches[i].advance(counts)
        for sequence, count in zip(self.models[i], counts, strict=True):
            sequence += [None] * count

    @rule(data=st.data())
    def drop_pages(self, data: st.DataObject) -> None:
        i = self._pick(data)
        kv, model = self.caches[i], self.models[i]
        entries = []
        for span, sequence in zip(kv.spans, model, strict=True):
            own = [n for n in range(len(span.pages)) if data.draw(st.booleans())]
            for n in own:
                for position in span.pages_at[n]:
                    sequence[position] = None
            entries.append(own)
        kv.drop_pages(entries)

    @rule(data=st.data(), step=st.integers(2, 3))
    def thin_out(self, data: st.DataObject, step: int) -> None:
        """Compaction in which every token keeps its position."""
        i = self._pick(data)
        keep = []
        for sequence in self.models[i]:
            start = data.draw(st.integers(0, len(sequence)))
            end = data.draw(st.integers(start, len(sequence)))
            keep.append([*range(start), *range(start, end, step), *range(end, len(sequence))])
        self.caches[i].compact(keep, renumber=False)
        self.models[i] = [
            [x if n in set(k) else None for n, x in enumerate(s)]
            for s, k in zip(self.models[i], keep, strict=True)
        ]

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        i = self._pick(data)
        lengths = [data.draw(st.integers(0, len(sequence))) for sequence in self.models[i]]
        self.caches[i].crop(lengths)
        self.models[i] = [s[:n] for s, n in zip(self.models[i], lengths, strict=True)]

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        i = self._pick(data)
        size = len(self.models[i])
        indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3))
        self.caches[i].reorder(indices)
        self.models[i] = [list(self.models[i][index]) for index in indices]

    @rule(data=st.data(), step=st.integers(1, 5))
    def compact(self, data: st.DataObject, step: int) -> None:
        i = self._pick(data)
        keep = []
        for sequence in self.models[i]:
            start = data.draw(st.integers(0, len(sequence)))
            keep.append([*range(start), *range(start, len(sequence), step)])
        self.caches[i].compact(keep)
        self.models[i] = [[s[n] for n in k] for s, k in zip(self.models[i], keep, strict=True)]

    @precondition(lambda self: len(self.caches) < 3)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        i = self._pick(data)
        self.caches.append(self.caches[i].fork())
        self.models.append([list(sequence) for sequence in self.models[i]])

    @precondition(lambda self: len(self.caches) > 1)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        i = self._pick(data)
        self.caches.pop(i)
        self.models.pop(i)

    @invariant()
    def holds_what_the_lists_say(self) -> None:
        if not hasattr(self, "caches"):
            return
        holders = [0] * len(self.caches[0].pool.references)
        for kv, model in zip(self.caches, self.models, strict=True):
            assert kv.lengths == [len(sequence) for sequence in model]
            view = kv.view()
            assert view.lengths.tolist() == kv.lengths
            for s, (sequence, span) in enumerate(zip(model, kv.spans, strict=True)):
                keys, values = kv.dequantize(s)
                held = [n for n, token in enumerate(sequence) if token is not None]
                assert kv.positions(s) == held
                assert kv.tokens[s] == len(held)
                numbers = [sequence[n] for n in held]
                assert torch.equal(keys, self.keys[:, numbers].float())
                assert torch.equal(values, self.values[:, numbers].float())
                self.check_places(kv, s, held)
                used = int(view.page_counts[s])
                assert view.table[s, :used].tolist() == span.pages
                assert view.counts[s].tolist() == span.counts + [0] * (view.table.shape[1] - used)
                assert int(view.last_lengths[s]) == span.last < 64
                for page in span.pages:
                    holders[page] += 1
        assert holders == self.caches[0].pool.references

    def check_places(self, kv: lath.PagedKV, s: int, held: list[int]) -> None:
        """Attention keeps the order of positions, and those from `exact_from` on as they are."""
        view = kv.view()
        tail = int(view.last_lengths[s])
        placed = list(range(int(view.first_lengths[s]) if view.first_lengths is not None else 0))
        for start, count in zip(view.starts[s].tolist(), view.counts[s].tolist(), strict=True):
            placed += range(start, start + count)
        placed += range(kv.lengths[s] - tail, kv.lengths[s])
        limit = kv.exact_from[s]
        assert all(a < b for a, b in pairwise(placed))
        assert [n for n in placed if n >= limit] == [n for n in held if n >= limit]
        assert kv.exact_positions == (not any(kv.exact_from))
        wrong = [max(a, b) for a, b in zip(placed, held, strict=True) if a != b]
        assert limit == max(wrong, default=-1) + 1


TestCaches = Caches.TestCase
TestCaches.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
