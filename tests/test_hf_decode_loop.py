"""The loop over new tokens inside `generate`: what the user brings works as in transformers' own.

With float activations and float pages logits are the modules' to fp32 rounding, and so are tokens.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from test_hf_decode import PROMPT, decoder, fused_tokens, patched
from test_hf_decode_rules import models, reasons
from torch import Tensor

from hf_models import generate, tokens

pytest.importorskip("transformers")
pytest.importorskip("numba")
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    logits_process,
)

import lath
from lath.integration import decode_loop
from lath.integration.decode_sample import Sampler, draw
from lath.integration.decode_step import fused_class
from lath.integration.decode_warmup import warm_decoding
from lath.integration.decode_watch import own_class
from lath.integration.models import tiny_model
from lath.kernels.simd.compile import compile_kernel

__all__ = ["models"]  # a fixture


def test_the_loop_gives_the_modules_tokens(models: tuple[Any, Any]) -> None:
    for length in (1, 40, PROMPT):
        ids = tokens(1, length)
        expected, out = (generate(model, ids, 80) for model in models)
        assert torch.equal(out, expected)
    greedy = [model.generate(tokens(1, 20), max_new_tokens=9, do_sample=False) for model in models]
    assert torch.equal(*greedy)


def test_more_tokens_than_room(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_loop, "_ROOM", 3)
    expected, out = (generate(model, tokens(1, 7), 20) for model in models)
    assert torch.equal(out, expected)


class Noted:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.seen.append(value.clone())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer(models: tuple[Any, Any]) -> None:
    streamers = [Noted(), Noted()]
    for model, streamer in zip(models, streamers, strict=True):
        generate(model, tokens(1, 70), 10, streamer=streamer)
    expected, own = streamers
    assert own.ended == expected.ended == 1
    assert [value.tolist() for value in own.seen] == [value.tolist() for value in expected.seen]


class Third(StoppingCriteria):  # type: ignore[misc]
    """Stops at the third new token."""

    def __init__(self, prompt: int) -> None:
        self.end = prompt + 3

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.tensor([input_ids.shape[1] >= self.end])


class Odd(LogitsProcessor):  # type: ignore[misc]
    """Nothing but odd tokens, and none twice."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
        return scores.scatter(1, input_ids, -torch.inf)


def test_criteria_and_processors_of_the_user(models: tuple[Any, Any]) -> None:
    ids = tokens(1, 70)
    outs = [
        model.generate(
            ids, max_new_tokens=20, do_sample=False,
            stopping_criteria=StoppingCriteriaList([Third(70)]),
            logits_processor=LogitsProcessorList([Odd()]),
        )
        for model in models
    ]  # fmt: skip
    assert torch.equal(*outs)
    assert outs[1].shape[1] == 73
    assert bool((outs[1][:, 70:] % 2 == 1).all())


def test_end_tokens_stop(models: tuple[Any, Any]) -> None:
    ids = tokens(1, 70)
    free = generate(models[0], ids, 12)[0, 70:].tolist()
    end = free[6]
    outs = [
        model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=[end, 2])
        for model in models
    ]
    assert torch.equal(*outs)
    assert outs[1][0, -1] in (end, 2)


SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "top-k": {"top_k": 7},
    "all": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02,
            "repetition_penalty": 1.3},
    "without top-k": {"temperature": 1.5, "top_k": 0, "top_p": 0.8, "min_p": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("options", SAMPLING)
def test_sampling_with_a_seed(options: str, models: tuple[Any, Any]) -> None:
    def tokens_of(seed: int) -> Tensor:
        torch.manual_seed(seed)
        out: Tensor = models[1].generate(
            tokens(1, 70), max_new_tokens=20, do_sample=True, eos_token_id=None,
            **SAMPLING[options],
        )  # fmt: skip
        return out

    assert torch.equal(tokens_of(3), tokens_of(3))
    assert not torch.equal(tokens_of(3), tokens_of(4))
    assert reasons(models[1])["fused"] == 4 * 19


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("options", SAMPLING)
def test_draws_have_the_probabilities_that_transformers_gives(options: str) -> None:
    """The chi-squared statistic of 2000 draws; beside it a distribution that is not theirs."""
    model = decoder("Llama")
    generation = copy.deepcopy(model.generation_config)
    generation.update(do_sample=True, **{"top_k": 50, **SAMPLING[options]})
    processors = model._get_logits_processor(generation)
    ids = tokens(1, 30)
    scores = 2 * torch.randn(1, 128)
    scores[0, 3:9] = scores.max() - 1  # ties, also at the edge of a top-k
    wanted = processors(ids, scores.clone()).softmax(-1)[0]
    sampler = Sampler(processors, True)
    drawn = torch.zeros(128)
    for _ in range(2000):
        drawn[sampler(ids, scores.clone())] += 1
    assert float(drawn[wanted == 0].sum()) == 0
    often = wanted > 0.005  # the others are one cell: the statistic needs some draws in each

    def statistic(probabilities: Tensor) -> float:
        expected, seen = (
            torch.cat([values[often], values[~often].sum()[None]])
            for values in (2000 * probabilities, drawn)
        )
        return float(((seen - expected) ** 2 / expected.clamp_min(1e-6)).sum())

    freedom = int(often.sum())
    limit = freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations over the mean
    assert statistic(wanted) < limit
    flatter = torch.where(wanted > 0, wanted**0.5, 0)
    assert statistic(flatter / flatter.sum()) > limit


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("names", [("length",), ("new",), ("new", "length"), ("new", "penalty")])
def test_no_end_before_the_minimum(names: tuple[str, ...], sample: bool) -> None:
    """What transformers' processors leave, on both sides of the length; ends that no token is."""
    ends = torch.tensor([5, 9, 4000])
    every = {
        "length": logits_process.MinLengthLogitsProcessor(7, ends),
        "new": logits_process.MinNewTokensLengthLogitsProcessor(4, 2, ends),
        "penalty": logits_process.RepetitionPenaltyLogitsProcessor(1.3),
    }
    processors = [every[name] for name in names]
    sampler = Sampler(processors, sample)
    assert sampler.is_plain is (not sample and "penalty" not in names)
    for length, largest in itertools.product((5, 6, 7), (5, 9, 3)):
        ids, scores = torch.full((1, length), 11), torch.zeros(1, 64)
        scores[0, largest], scores[0, 17] = 500, 250  # no draw is another one
        wanted = scores.clone()
        for processor in processors:
            wanted = processor(ids, wanted)
        token = int(wanted.argmax())
        kept = scores.clone()
        assert sampler(ids, scores) == token, (length, largest)
        assert torch.equal(scores, kept)  # another processor may have kept them
        if sampler.is_plain:
            assert sampler.allows(length, largest) is (token == largest)


def test_an_end_that_comes_too_early_is_passed_over(models: tuple[Any, Any]) -> None:
    """The compiled step finds the largest logit; where that is an end, the next one counts."""
    ids = tokens(1, 70)
    free = generate(models[0], ids, 12)[0, 70:].tolist()
    ends = sorted(set(free[2:6]))  # of what would be written
    outs = [
        model.generate(ids, max_new_tokens=20, min_new_tokens=9, do_sample=False, eos_token_id=ends)
        for model in models
    ]
    assert torch.equal(*outs)
    assert not set(outs[1][0, 70:78].tolist()) & set(ends)
    assert outs[1][0, 70:79].tolist() != free[:9]
    assert reasons(models[1])["fused"] == outs[1].shape[1] - 71


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        draw(torch.tensor([0.0, torch.nan]))
    assert draw(torch.tensor([-torch.inf, 0.0, -torch.inf])) == 1


def test_hooks_on_the_model_itself(models: tuple[Any, Any]) -> None:
    """A step does not go round them, and so the loop must not."""
    calls = []
    models[1].register_forward_hook(lambda *arguments: calls.append(1))
    expected, out = (generate(model, tokens(1, 70), 6) for model in models)
    assert torch.equal(out, expected)
    assert len(calls) == 6
    assert reasons(models[1])["fused"] == 5


def test_the_report_says_it(models: tuple[Any, Any]) -> None:
    model = decoder("Llama")
    report = patched(model, "auto")
    assert "decode: compiled at the first token" in str(report)
    generate(model, tokens(1, 70), 6)
    assert fused_tokens(report) == 5
    assert "one compiled call per token; 5 tokens fused, 1 calls by modules" in str(report)


def test_warmup_leaves_nothing_to_compile() -> None:
    def fuse() -> None:
        tiny, _ = tiny_model(torch.bfloat16)
        with lath.patch(
            tiny, "int4-g32", attention="int8", kv="int8", skip=(), decode="fused"
        ) as report:
            tiny.generate(tokens(1, 3), max_new_tokens=2, do_sample=False)
            assert fused_tokens(report) == 1

    warm_decoding(["int4-g32"])
    before = compile_kernel.cache_info().misses
    fuse()
    assert compile_kernel.cache_info().misses == before


# When transformers' own loop is taken


@contextlib.contextmanager
def in_training(model: Any) -> Any:
    model.train()
    try:
        yield {}
    finally:
        model.eval()


@contextlib.contextmanager
def under_autocast(model: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        yield {}


@contextlib.contextmanager
def no_cache(model: Any) -> Any:
    yield {"use_cache": False}


@contextlib.contextmanager
def embedded(model: Any) -> Any:
    """A prompt of vectors that are no tokens'."""
    yield {"inputs_embeds": 2 * model.model.embed_tokens(tokens(1, PROMPT))}


@contextlib.contextmanager
def own_preparation(model: Any) -> Any:
    """As wrappers of models do: every new token is given another position."""
    own = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda ids, **kwargs: elsewhere(own(ids, **kwargs))
    try:
        yield {}
    finally:
        del model.prepare_inputs_for_generation


def elsewhere(made: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `forward`: a single token stands at position 7."""
    if made["input_ids"].shape[1] == 1:
        made["position_ids"] = torch.tensor([[7]])
    return made


@contextlib.contextmanager
def class_preparation(model: Any) -> Any:
    """As code that comes with a checkpoint does it."""
    cls, before = own_class(model), type(model)
    own = cls.prepare_inputs_for_generation
    other = type("Other", (cls,), {
        "prepare_inputs_for_generation": lambda s, i, **kwargs: elsewhere(own(s, i, **kwargs))
    })  # fmt: skip
    model.__class__ = other if before is cls else fused_class(other)
    try:
        yield {}
    finally:
        model.__class__ = before


# By name: what is done, what the report says, and how many of 11 steps behind a prompt are fused.
LOOPS: dict[str, tuple[Any, str, int]] = {
    "training": (in_training, "training mode", 0),
    "autocast": (under_autocast, "autocast", 0),
    "use_cache": (no_cache, "the loop: use_cache is False", 0),
    "vectors": (embedded, "the loop: ", 11),
    "preparation by class": (class_preparation, "Other has a prepare_inputs_for_generation", 11),
    "own preparation": (own_preparation, "methods replaced on the instance", 11),
}


@pytest.mark.parametrize("rule", LOOPS)
def test_generate_gives_the_modules_tokens(rule: str, models: tuple[Any, Any]) -> None:
    way, reason, fused = LOOPS[rule]
    outs = []
    for model in models:
        generate(model, tokens(1, 5), 2)  # the step is ready
        with way(model) as options:
            if "inputs_embeds" in options:
                out = model.generate(**options, max_new_tokens=12, min_new_tokens=12,
                                     do_sample=False)  # fmt: skip
            else:
                out = generate(model, tokens(1, PROMPT), 12, **options)
        outs.append(out)
    assert torch.equal(*outs)
    assert any(reason in why for why in reasons(models[1])), reasons(models[1])
    assert reasons(models[1])["fused"] == 1 + fused


def with_more_arguments() -> Any:
    """A model whose forward takes a factor of its logits, and positions in three axes."""
    model = decoder("Llama")
    cls = type(model)
    own = cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        factor, positions = kwargs.pop("factor", None), kwargs.get("position_ids")
        if positions is not None and positions.dim() == 3:
            kwargs["position_ids"] = positions[2]
        out = own(self, *args, **kwargs)
        out.logits = out.logits if factor is None else out.logits * factor
        return out

    signature = inspect.signature(own)
    extra = inspect.Parameter("factor", inspect.Parameter.KEYWORD_ONLY, default=None)
    *names, rest = signature.parameters.values()
    assert rest.kind is inspect.Parameter.VAR_KEYWORD
    forward.__signature__ = signature.replace(parameters=[*names, extra, rest])  # type: ignore[attr-defined]
    model.__class__ = type("More", (cls,), {"forward": forward})
    return model


@pytest.mark.parametrize(("options", "reason"), [
    ({"factor": -torch.ones(())}, "the loop: the argument factor"),
    ({"position_ids": torch.arange(3 * PROMPT).view(3, 1, PROMPT)}, "that are not 2-D"),
])  # fmt: skip
def test_arguments_of_other_models(options: dict[str, Any], reason: str, no_grad: None) -> None:
    outs = []
    for way in ("modules", "auto"):
        model = with_more_arguments()
        patched(model, way)
        outs.append(generate(model, tokens(1, PROMPT), 12, **options))
    assert torch.equal(*outs)
    assert any(reason in why for why in reasons(model)), reasons(model)
