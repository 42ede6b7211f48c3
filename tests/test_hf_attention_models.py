"""Six kinds of model against their own eager attention: GQA, norms on q and k, softcap, sliding
windows, experts, sinks.

Float pages: equal to fp32 rounding. int8 scores: within a bound that follows from the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lath
from hf_models import MODELS, forward, generate, hf_model, padded, positions, relative, tokens

pytest.importorskip("transformers")
from lath.integration import attention as lath_attention
from lath.integration.attention_mask import lath_mask

ROUNDING = 1e-5
PROMPT = 150


pytestmark = pytest.mark.usefixtures("no_grad")


def patched(model: Any, **options: Any) -> lath.PatchReport:
    return lath.patch(model, None, **{"backend": "reference", **options})


def smooth(name: str, **options: Any) -> Any:
    """The model with all of its experts in use: which ones a router picks may jump with any error,
    however small, and no bound holds there."""
    experts = {"num_experts_per_tok": 4} if "num_local_experts" in MODELS[name] else {}
    return hf_model(name, **experts, **options)


# Float pages


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_float_pages_equal_eager(name: str, side: str) -> None:
    model = hf_model(name)
    ids, mask = padded([PROMPT, 101], side)
    options = {"attention_mask": mask, "position_ids": positions(mask)}
    expected = forward(model, ids, **options)[mask.bool()]
    with patched(model, kv="float"):
        out = forward(model, ids, **options)[mask.bool()]
    assert relative(out - expected, expected) < ROUNDING


@pytest.mark.parametrize("name", MODELS)
def test_float_pages_generate_what_eager_does(name: str) -> None:
    model = hf_model(name)
    ids, mask = padded([PROMPT, 101], "left")
    expected = generate(model, ids, attention_mask=mask)
    with patched(model, kv="float"):
        assert torch.equal(generate(model, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("change", ["window", "softcap", "sink"])
def test_the_models_would_show_an_argument_that_is_ignored(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the two tests above."""
    model = hf_model("GptOss" if change == "sink" else "Gemma2")
    ids = tokens(1, PROMPT)
    expected = forward(model, ids)
    real = lath_attention.decode_attention

    def without(*arguments: Any, **options: Any) -> Tensor:
        out: Tensor = real(*arguments, **{**options, change: None})
        return out

    monkeypatch.setattr(lath_attention, "decode_attention", without)
    with patched(model, kv="float"):
        out = forward(model, ids)
    assert relative(out - expected, expected) > 100 * ROUNDING


# int8 scores


def score_deviation(query: Tensor, key: Tensor, scale: float) -> float:
    """Root mean square, over rows, of the deviation that rounding q and k gives a score.

    A rounded number is off by step / sqrt(12) in the mean square; q's steps are weighed with a
    centred key, k's with the query. The largest key and step of a head stand for all of its.
    """
    group = query.shape[1] // key.shape[1]
    centred = key - torch.cat(
        [page.mean(2, keepdim=True).expand_as(page) for page in key.split(64, dim=2)], dim=2
    )
    key_norm = centred.norm(dim=-1).amax(-1, keepdim=True).repeat_interleave(group, 1)
    key_step = centred.abs().amax((2, 3)).repeat_interleave(group, 1)[..., None] / 127
    query_step = query.abs().amax(-1) / 127
    variance = (key_norm * query_step).square() + (query.norm(dim=-1) * key_step).square()
    return float((scale**2 * variance / 12).mean().sqrt())


class Probe:
    """An attention that returns the float result: once to see how far int8 is from it, and then
    changed by `disturb`."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.errors: list[float] = []
        self.bounds: list[float] = []
        self.disturb: Callable[[int, Tensor], Tensor] | None = None

    def __call__(self, module: Any, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        from transformers import AttentionInterface

        functions = AttentionInterface()
        exact = functions["lath-float-reference"](module, query, key, *rest, **options)[0]
        if self.disturb is not None:
            return self.disturb(module.layer_idx, exact), None
        name = lath_attention.implementation_name("int8", self.backend)
        low = functions[name](module, query, key, *rest, **options)[0]
        self.errors.append(float((low - exact).norm() / exact.norm()))
        self.bounds.append(2 * score_deviation(query, key, options["scaling"]))
        return exact, None


def probe(model: Any, backend: str) -> Probe:
    from transformers import AttentionInterface, AttentionMaskInterface

    lath_attention.register()
    made = Probe(backend)
    AttentionInterface.register("probe", made)
    AttentionMaskInterface.register("probe", lath_mask)
    model.set_attn_implementation("probe")
    return made


def deviation(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", MODELS)
def test_int8_attention_is_within_its_bound(name: str, backend: str) -> None:
    """Two bounds. A layer's output: twice the deviation of its scores, as weights answer a change
    of their scores in proportion. The logits: twice what the model itself makes of random noise of
    that size, put on the attention outputs.
    """
    model = smooth(name)
    ids = tokens(1, PROMPT)
    expected = forward(model, ids)
    seen = probe(model, backend)
    assert relative(forward(model, ids) - expected, expected) < ROUNDING
    errors = seen.errors
    for error, bound in zip(errors, seen.bounds, strict=True):
        assert 0 < error < bound < 0.2
    answers = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)

        def noise(layer: int, out: Tensor, generator: torch.Generator = generator) -> Tensor:
            size = errors[layer] * out.norm() / math.sqrt(out.numel())
            return out + size * torch.randn(out.shape, generator=generator)

        seen.disturb = noise
        answers.append(deviation(forward(model, ids), expected))
    model.set_attn_implementation("eager")
    with patched(model, attention="int8", backend=backend):
        error = deviation(forward(model, ids), expected)
    assert 0 < error < 2 * max(answers)


def test_the_bound_would_show_wrong_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a tenth more of every score."""
    real = lath_attention.attention

    def steeper(*arguments: Any, scale: float, **options: Any) -> Tensor:
        out: Tensor = real(*arguments, scale=1.1 * scale, **options)
        return out

    monkeypatch.setattr(lath_attention, "attention", steeper)
    for name in MODELS:
        model = smooth(name)
        seen = probe(model, "reference")
        forward(model, tokens(1, PROMPT))
        assert max(e / b for e, b in zip(seen.errors, seen.bounds, strict=True)) > 1


@pytest.mark.parametrize("kv", ["int8", "k8v4", "int4", "k4v2"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_quantised_caches_err_in_the_order_of_their_bits(name: str, kv: str) -> None:
    """A prompt, then a piece that reads its pages: logits near the model's own.

    int8 by the bound of a layer's output above, 0.01, twice as the models may enlarge it. The steps
    of int4 and int2 are 16 and 64 times as wide as those of int8, and so are the errors; half as
    much again for the scale, which fewer levels bring nearer to the outliers.
    """
    from lath.integration.cache import LathCache

    model = smooth(name)
    ids = tokens(1, 260)
    expected = forward(model, ids)[:, 200:]
    with patched(model, kv=kv):
        cache = LathCache(model.config, kv, backend="reference")
        forward(model, ids[:, :200], cache)
        error = deviation(forward(model, ids[:, 200:], cache), expected)
    wider = {"int8": 1, "k8v4": 16 * 1.5, "int4": 16 * 1.5, "k4v2": 64 * 1.5}
    assert 0 < error < 2 * 0.01 * wider[kv]


# Backends


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_kernels_generate_what_the_definition_does(backend: str, name: str) -> None:
    """The tiny models through the compiled kernels, and through Triton's in the interpreter: a
    prompt that leaves a full page, ragged, then tokens that read it.
    """
    model = smooth(name, num_attention_heads=2, num_key_value_heads=1)
    ids, mask = padded([130, 20], "left")
    texts = {}
    for chosen in ("reference", backend):
        with patched(model, attention="int8", kv="int8", backend=chosen):
            texts[chosen] = generate(model, ids, 3, attention_mask=mask)
    assert torch.equal(texts[backend], texts["reference"])


# The real model


@pytest.mark.slow
def test_smollm2_answers_as_before() -> None:
    from lath.integration.models import load_model
    from lath.integration.run_command import encode_prompt

    model, tokenizer = load_model("smollm2", torch.bfloat16)
    ids = encode_prompt(tokenizer, "What is the capital of France? " * 30)
    before = generate(model, ids, 12)
    with lath.patch(model, None, attention="int8", kv="int8"):
        after = generate(model, ids, 12)
    assert "Paris" in tokenizer.decode(before[0, ids.shape[1] :])
    assert "Paris" in tokenizer.decode(after[0, ids.shape[1] :])
