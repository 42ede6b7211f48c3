"""Several greedy tokens in one compiled call: the same tokens and the same cache as one by one.

With float activations and float pages tokens are the modules' own, whatever is between them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_hf_decode import PROMPT, decoder, new_cache, patched
from test_hf_decode_loop import Noted, Third
from test_hf_decode_rules import models
from test_hf_decode_threads import Interrupting
from torch import Tensor

import hf_models
from hf_models import tokens

pytest.importorskip("transformers")
pytest.importorskip("numba")
import contextlib

from transformers.generation import StoppingCriteriaList

from lath.formats.pages import PAGE
from lath.integration import decode_loop, decode_step
from lath.integration.cache import cache_argument
from lath.integration.decode_cache import StepCache
from lath.kernels.decode_step import cpu_greedy
from lath.kernels.decode_step.cpu_arguments import FOLLOW, STATE, STATE_FIELDS, block_of
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.program import Program, row

__all__ = ["models"]  # a fixture


def generate(model: Any, ids: Tensor, new_tokens: int, **options: Any) -> Tensor:
    """Without an end, which would stop calls by chance."""
    return hf_models.generate(model, ids, new_tokens, eos_token_id=None, **options)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only pages, ends and the length limit a call, however slow the machine is."""
    monkeypatch.setattr(decode_loop, "_ANSWER", 1e9)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each compiled call."""
    counts: list[int] = []
    own = StepCache.run

    def run(self: Any, *args: Any) -> int:
        counts.append(own(self, *args))
        return counts[-1]

    monkeypatch.setattr(StepCache, "run", run)
    return counts


def contents(cache: Any) -> list[Any]:
    """What a cache holds, and where."""
    found: list[Any] = []
    for layer in cache.layers:
        span = layer.pages.spans[0]
        found.append((layer.slots, span.first, span.last, span.length, list(span.pages)))
        view = layer.pages.view()
        parts = [
            getattr(view, f"{part}_{side}")[:, :, : getattr(span, part)]
            for part in ("first", "last")
            for side in ("keys", "values")
        ]
        found += [view.lengths.tolist(), *parts, *view.records[list(span.pages)]]
    return found


def same(expected: list[Any], found: list[Any]) -> bool:
    return len(expected) == len(found) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(expected, found, strict=True)
    )


@pytest.mark.parametrize("prompt", [1, 40, 63, PROMPT, 191])  # within parts, and where they fill
def test_tokens_and_cache_are_those_of_single_steps(
    prompt: int, models: tuple[Any, Any], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules, model = models
    ids, name = tokens(1, prompt), cache_argument(model)
    expected = generate(modules, ids, 2 * PAGE + 20)
    cache, single = new_cache(model), new_cache(model)
    out = generate(model, ids, 2 * PAGE + 20, **{name: cache})
    assert torch.equal(out, expected)
    assert sum(calls) == 2 * PAGE + 19
    assert len(calls) <= 8  # the first token, at most three pages' borders, a call between each
    monkeypatch.setattr(decode_loop, "_ANSWER", 0.0)
    calls.clear()
    assert torch.equal(generate(model, ids, 2 * PAGE + 20, **{name: single}), expected)
    assert calls == [1] * (2 * PAGE + 19)
    assert same(contents(single), contents(cache))
    turn = torch.cat([out, tokens(1, 5, seed=3)], dim=1)  # and both go on alike
    turns = [generate(model, turn, 30, **{name: own}) for own in (cache, single)]
    assert torch.equal(*turns)


def test_a_slot_that_is_not_counted_shows(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the comparison of caches sees a token that was not counted."""
    model, name = models[1], cache_argument(models[1])
    caches = [new_cache(model), new_cache(model)]
    for cache, lost in zip(caches, (0, 1), strict=True):
        own = StepCache._count
        monkeypatch.setattr(
            StepCache, "_count",
            lambda self, n, own=own, lost=lost: own(self, n - lost if n > 1 else n),
        )  # fmt: skip
        generate(model, tokens(1, 70), 20, **{name: cache})
        monkeypatch.setattr(StepCache, "_count", own)
    assert not same(*map(contents, caches))


def test_threads_change_nothing(models: tuple[Any, Any], calls: list[int]) -> None:
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(generate(models[1], tokens(1, 70), 90))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert max(calls) > 40


def test_a_call_ends_behind_an_end(models: tuple[Any, Any], calls: list[int]) -> None:
    ids = tokens(1, 70)
    new = generate(models[0], ids, 40)[0, 70:].tolist()
    place = max(new.index(token) for token in new)  # the last token that was new
    outs = [
        model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=[new[place], 4000])
        for model in models
    ]
    assert torch.equal(*outs)
    assert outs[1].shape[1] == 70 + place + 1
    assert sum(calls) == place


def test_an_end_that_comes_too_early(models: tuple[Any, Any], calls: list[int]) -> None:
    """A call ends behind it; another token is chosen, and the next call goes on from that."""
    ids = tokens(1, 70)
    ends = sorted(set(generate(models[0], ids, 40)[0, 90:95].tolist()))
    outs = [
        model.generate(
            ids, max_new_tokens=60, min_new_tokens=50, do_sample=False, eos_token_id=ends
        )
        for model in models
    ]
    assert torch.equal(*outs)
    assert outs[1].shape[1] >= 120
    assert max(calls) > 5


def test_who_wants_to_see_each_token(models: tuple[Any, Any], calls: list[int]) -> None:
    """A streamer and criteria of the user are called behind each, before the next is computed."""
    seen: list[int] = []

    class Counting(Noted):
        def put(self, value: Tensor) -> None:
            seen.append(len(calls))

    generate(models[1], tokens(1, 70), 10, streamer=Counting())
    assert seen == [0, *range(10)]  # the prompt first
    assert calls == [1] * 9
    calls.clear()
    models[1].generate(
        tokens(1, 70), max_new_tokens=20, do_sample=False,
        stopping_criteria=StoppingCriteriaList([Third(70)]),
    )  # fmt: skip
    assert calls == [1] * 2


def test_calls_are_short(
    models: tuple[Any, Any], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many tokens as fit into the time in which Ctrl-C is to be heard."""

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            """A token takes a hundredth of a second."""
            return 0.01 * sum(calls)

    monkeypatch.setattr(decode_loop, "_ANSWER", 0.039)
    monkeypatch.setattr(decode_loop, "time", Clock)
    generate(models[1], tokens(1, 70), 20)
    assert calls == [1, 3, 3, 3, 3, 3, 3]


def test_more_positions_than_rotations(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of rotations grows between two calls, never within one."""
    monkeypatch.setattr(decode_step, "_FIRST_TABLE", 83)
    expected, out = (generate(model, tokens(1, 70), 110) for model in models)
    assert torch.equal(out, expected)


def test_python_within_a_layer(no_grad: None, calls: list[int]) -> None:
    """A selection that Python makes is asked for every token."""
    outs = []
    for decode in ("modules", "fused"):
        model = decoder("Llama")
        with patched(model, decode, select="sparq-16:64"):
            outs.append(generate(model, tokens(1, PROMPT), 30))
    assert torch.equal(*outs)
    assert calls == [1] * 29


def test_a_selection_by_pages(no_grad: None, calls: list[int]) -> None:
    """One that is rows of the program is made anew for every token of a call."""
    outs = []
    for decode in ("modules", "fused"):
        model = decoder("Llama")
        with patched(model, decode, select="quest:128"):
            outs.append(generate(model, tokens(1, 3 * PROMPT), 50))
    assert torch.equal(*outs)
    assert max(calls) > 10


@pytest.mark.parametrize("prompt", [40, PROMPT])
def test_an_interrupt_forgets_the_whole_call(prompt: int, models: tuple[Any, Any]) -> None:
    """At every line of Python inside a call; then the same tokens."""
    model = models[1]
    name, ids = cache_argument(model), tokens(1, prompt)
    whole = generate(model, ids, 25)
    line, lengths = 0, set()
    while True:
        cache = new_cache(model)
        with Interrupting(line) as interrupting, contextlib.suppress(KeyboardInterrupt):
            generate(model, ids, 25, **{name: cache})
        if not interrupting.hit:
            break
        length = cache.get_seq_length()
        assert {layer.slots for layer in cache.layers} == {length}
        assert {len(layer.pages) for layer in cache.layers} == {length}
        lengths.add(length)
        again = generate(model, whole[:, : length + 1], 8, **{name: cache})
        assert torch.equal(again[:, : whole.shape[1]], whole[:, : again.shape[1]]), line
        line += 3
    assert {prompt, prompt + 1} <= lengths  # before the first call, and before the second


def test_nothing_is_kept_of_a_call(models: tuple[Any, Any]) -> None:
    """What a `generate` prepares goes with it: logits are as long as the vocabulary."""
    model = models[1]
    generate(model, tokens(1, 70), 5)
    kept = model.__dict__["_lath_decode"].ready(model).step._kept
    before = len(kept)
    generate(model, tokens(1, 70), 5)
    assert len(kept) == before


def test_one_call_of_a_program(models: tuple[Any, Any]) -> None:
    """`tokens` are those that were found, in their order."""
    model, name = models[1], cache_argument(models[1])
    whole = generate(model, tokens(1, 70), 12)
    cache = new_cache(model)
    model(whole[:, :70], use_cache=True, **{name: cache})
    ready = model.__dict__["_lath_decode"].ready(model)
    own = ready.cache_of(cache)
    greedy = cpu_greedy.Greedy(own.bound, torch.empty(1, 1, ready.vocabulary), [])
    assert greedy.repeats
    found = ready.run_greedily(own, int(whole[0, 70]), 70, greedy, 11)
    assert found == whole[0, 71:].tolist()
    assert cache.get_seq_length() == 81


@pytest.mark.parametrize(
    ("token", "left", "goes_on"), [(7, 3, True), (7, 1, False), (5, 3, False), (9, 3, False)]
)
def test_going_on_with_a_token(token: int, left: int, goes_on: bool) -> None:
    """The ends 5 and 9, or no token left, stop a call where it is."""
    state, tokens = np.zeros(len(STATE_FIELDS), np.int64), np.zeros(8, np.int64)
    before = {"token": token, "position": 40, "slot": 11, "left": left, "more": 2, "grown": 1}
    for name, value in before.items():
        state[STATE[name]] = value
    ends = np.array([5, 9])
    block = block_of(
        FOLLOW, state=state.ctypes.data, tokens=tokens.ctypes.data, ends=ends.ctypes.data, count=2
    )
    Program([row(compile_kernel(cpu_greedy.emit_follow), 1, block.ctypes.data)]).run()
    assert tokens.tolist() == [0, 0, token, 0, 0, 0, 0, 0]
    moved = {name: before[name] + goes_on for name in ("position", "slot", "more")}
    expected = before | moved | {"left": left - 1 if goes_on else 0}
    assert {name: state[STATE[name]] for name in before} == expected
