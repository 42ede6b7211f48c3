"""The fused decode step against the model's own modules: families, the probe, state.

With float activations and float pages nothing is rounded but fp32 sums, so that both ways must
agree to fp32 rounding, in logits and in tokens. With int8 the codes are the same but for those that
fall on the other side of a rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lath
from hf_models import generate, hf_model, relative, tokens

pytest.importorskip("transformers")
pytest.importorskip("numba")
from lath.integration import decode_probe
from lath.integration.cache import LathCache, cache_argument
from lath.integration.decode_recognise import NotFusedError
from lath.integration.decode_tolerance import codes_of, layer_tolerance

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "BitNet")
# fp32 sums in another order: some twenty units in the last place (2^-23) of a score. Scores reach
# twenty here (queries and keys are scaled up), and softmax takes their absolute error as its own.
ROUNDING = 20 * 20 * 2.0**-23
PROMPT = 150  # the 64 first tokens, a full page, and a tail
STEPS = 70  # the tail becomes a page, and another begins

pytestmark = pytest.mark.usefixtures("no_grad")


def decoder(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model whose norms and biases are not what they were initialised with."""
    model = hf_model(name, dtype, **options)
    generator = torch.Generator().manual_seed(1)
    for path, parameter in model.named_parameters():
        if path.endswith(("norm.weight", "proj.bias")):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(dtype), alpha=0.3)
    return model


def patched(model: Any, decode: str, exact: bool = True, **options: Any) -> lath.PatchReport:
    given = {"kv": "float", "activations": "float"} if exact else {"kv": "int8"}
    return lath.patch(model, "int4-g32", decode=decode, **{"skip": (), **given, **options})


def steps(model: Any, prompt: int, count: int, cache: Any = None, seed: int = 0) -> Tensor:
    """Logits of `count` tokens, one at a time, behind a prompt: [count, V]."""
    cache = new_cache(model) if cache is None else cache
    ids = tokens(1, prompt + count, seed)
    name = cache_argument(model)
    if prompt:
        model(ids[:, :prompt], use_cache=True, **{name: cache})
    out = [
        model(ids[:, i : i + 1], use_cache=True, **{name: cache}).logits[0, -1]
        for i in range(prompt, prompt + count)
    ]
    return torch.stack(out).float()


def new_cache(model: Any) -> LathCache:
    return model.__dict__["_lath_attention"].new_cache(model.config)


def fused_tokens(report: lath.PatchReport) -> int:
    assert report.decode is not None
    return report.decode.counts.get("fused", 0)


@pytest.mark.parametrize("prompt", [PROMPT, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_modules(name: str, prompt: int) -> None:
    model = decoder(name)
    with patched(model, "modules"):
        expected = steps(model, prompt, STEPS)
    with patched(model, "fused") as report:
        out = steps(model, prompt, STEPS)
        assert fused_tokens(report) == STEPS
    assert relative(out - expected, expected) < ROUNDING


def admitted(model: Any) -> float:
    """What the probe admits of a layer of normal vectors, of two and of the output layer."""
    stack = model.__dict__["_lath_decode"].ready(model).step.stack
    down = stack.layers[0].down
    codes = codes_of(torch.randn(down.weight.shape[1]), down.activations)
    return 3 * layer_tolerance([codes] * 4, stack.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_rounded_logits_differ_by_few_codes(name: str, dtype: torch.dtype) -> None:
    model = decoder(name, dtype)
    with patched(model, "modules", exact=False, attention="int8"):
        expected = steps(model, PROMPT, STEPS)
    with patched(model, "fused", exact=False, attention="int8"):
        out, limit = steps(model, PROMPT, STEPS), admitted(model)
    errors = (out - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.max()) < limit
    if dtype == torch.float32:  # most tokens meet no rounding that falls otherwise
        assert float(errors.median()) < ROUNDING


def changed(stack: Any, **fields: Any) -> Any:
    """The stack with fields of its second layer replaced."""
    first, second = stack.layers
    return dataclasses.replace(stack, layers=(first, dataclasses.replace(second, **fields)))


def test_a_window_shows() -> None:
    """Negative control: with the window of one layer lost, the logits are others."""
    model = decoder("Mistral")
    with patched(model, "modules"):
        expected = steps(model, PROMPT, 5)
    real = decode_probe.stack_of
    with pytest.MonkeyPatch.context() as monkeypatch, patched(model, "auto"):
        monkeypatch.setattr(decode_probe, "stack_of", lambda *a: changed(real(*a), window=None))
        out = steps(model, PROMPT, 5)
    assert relative(out - expected, expected) > 100 * ROUNDING


def norm_of(factor: float) -> Callable[[Any], Any]:
    return lambda layer: dataclasses.replace(
        layer.attention_norm, epsilon=layer.attention_norm.epsilon * factor
    )


# By name: the model, the field of its second layer that is spoilt, and what it becomes.
FAULTS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "bias": ("Qwen2", "key", lambda layer: dataclasses.replace(layer.key, bias=None)),
    "query norm": ("Qwen3", "query_norm", lambda layer: None),
    "key norm": ("Qwen3", "key_norm", lambda layer: None),
    "rotation": ("SmolLM3", "rotate", lambda layer: True),
    "scale": ("Llama", "scale", lambda layer: 1.1 * layer.scale),
    "epsilon": ("Llama", "attention_norm", norm_of(10)),
    "gate and up": ("Llama", "gate", lambda layer: layer.up),
    "norms": ("Llama", "mlp_norm", lambda layer: layer.attention_norm),
    "output norm": ("BitNet", "output_norm", lambda layer: None),
    "down norm": ("BitNet", "down_norm", lambda layer: None),
    "its weight": ("BitNet", "output_norm", lambda layer: layer.mlp_norm),
    "function": ("BitNet", "function", lambda layer: "silu"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_probe_refuses(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, field, spoil = FAULTS[fault]
    model = decoder(name)
    real = decode_probe.stack_of

    def wrong(*arguments: Any) -> Any:
        stack = real(*arguments)
        return changed(stack, **{field: spoil(stack.layers[1])})

    monkeypatch.setattr(decode_probe, "stack_of", wrong)
    with pytest.raises(ValueError, match=r"layer 1 is computed differently: .*%"):
        patched(model, "fused")
    assert "_lath_decode" not in model.__dict__  # what was patched is undone


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [("embedding_multiplier", "embedding"), ("residual_multiplier", "layer 0"),
     ("logits_scaling", "output layer")],
)  # fmt: skip
def test_constants_in_forward_are_found(spoilt: str, message: str) -> None:
    """Granite is made of Llama's modules; only its constants set it apart."""
    neutral = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
               "attention_multiplier": 0.25}  # fmt: skip
    model = decoder("Granite", **{**neutral, spoilt: 3.0})
    with pytest.raises(ValueError, match=message):
        patched(model, "fused")
    same = decoder("Granite", **neutral)
    patched(same, "fused")


@pytest.mark.parametrize("options", [
    {"hidden_act": "gelu"},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    {"head_dim": 8},
])  # fmt: skip
def test_other_shapes_are_refused(options: dict[str, Any]) -> None:
    model = decoder("Llama", **options)
    with pytest.raises(ValueError, match=r"none of silu|RoPE of type 'dynamic'|head_dim"):
        patched(model, "fused")
    with patched(model, "auto") as report:
        steps(model, 5, 1)
        assert report.decode is not None
        assert report.decode.refusal
        assert report.decode.refusal in str(report)


def test_a_dense_layer_is_refused_and_a_dense_head_is_not() -> None:
    model = decoder("Llama")
    with pytest.raises(ValueError, match="down_proj of layer 1 is a Linear, not packed"):
        patched(model, "fused", skip=("layers.1.mlp.down_proj", "lm_head"))
    with patched(model, "modules", skip=("lm_head",)):
        expected = steps(model, PROMPT, 5)
    with patched(model, "fused", skip=("lm_head",)) as report:
        out = steps(model, PROMPT, 5)
        assert fused_tokens(report) == 5
    assert relative(out - expected, expected) < ROUNDING


def test_fused_needs_a_paged_cache() -> None:
    with pytest.raises(ValueError, match="needs a paged cache"):
        patched(decoder("Llama"), "fused", kv=None)
    with pytest.raises(ValueError, match="decode must be one of"):
        patched(decoder("Llama"), "quick")


def test_undo_leaves_nothing() -> None:
    model = decoder("Llama")
    before, cls = set(model.__dict__), type(model)
    ids = tokens(1, PROMPT)
    expected = model(ids).logits
    report = patched(model, "fused")
    assert isinstance(model, cls)
    assert type(model) is not cls
    generate(model, ids)
    report.undo()
    assert type(model) is cls
    assert set(model.__dict__) == before
    assert torch.equal(model(ids).logits, expected)
    report.redo()
    assert type(model) is not cls
    generate(model, ids)
    assert fused_tokens(report) > 0
    report.undo()


# State


def test_crop_reset_turns_and_two_caches() -> None:
    """Whatever happens to the cache between two steps, the next one reads it as it is."""
    model = decoder("Llama")

    def history() -> Tensor:
        cache, other = new_cache(model), new_cache(model)
        out = [steps(model, PROMPT, 3, cache), steps(model, 20, 3, other, seed=1)]
        cache.crop(-30)  # into a page
        out += [steps(model, 0, 2, cache, seed=2), steps(model, 0, 2, other, seed=3)]
        out.append(steps(model, 40, 30, cache, seed=4))  # another turn, and a page that fills
        cache.reset()
        out.append(steps(model, 60, 10, cache, seed=5))  # over the end of the first part
        return torch.cat(out)

    with patched(model, "modules"):
        expected = history()
    with patched(model, "fused") as report:
        out = history()
        assert fused_tokens(report) == len(expected)
    assert relative(out - expected, expected) < ROUNDING


def test_several_models_at_once() -> None:
    models = [decoder("Llama"), decoder("Qwen3")]
    expected = []
    for model in models:
        with patched(model, "modules"):
            expected.append(steps(model, 70, 3))
    for model in models:
        patched(model, "fused")
    caches = [new_cache(model) for model in models]
    for prompt in (70, 0):
        for model, cache, wanted in zip(models, caches, expected, strict=True):
            out = steps(model, prompt, 2 if prompt else 1, cache, seed=0)
            if prompt:
                assert relative(out - wanted[:2], wanted) < ROUNDING


def test_a_cache_is_not_kept_alive() -> None:
    model = decoder("Llama")
    patched(model, "fused")
    generate(model, tokens(1, 70))
    cache = new_cache(model)
    steps(model, 70, 2, cache)
    known = model.__dict__["_lath_decode"].ready(model)._caches
    assert list(known) == [cache]
    del cache
    assert len(known) == 0


def test_two_python_threads() -> None:
    """One model, two caches: steps of both in turn, none in the other's numbers."""
    model = decoder("Llama")
    patched(model, "fused")
    expected = [steps(model, 70, 40, seed=seed) for seed in (0, 1)]
    found: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        with torch.no_grad():
            found[seed] = steps(model, 70, 40, seed=seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in (0, 1))


def test_a_copy_is_fused_by_itself() -> None:
    model = decoder("Llama")
    patched(model, "fused")
    copied = copy.deepcopy(model)
    copied.model.norm.weight.mul_(2)
    out, other = steps(model, 70, 2), steps(copied, 70, 2)
    assert relative(out - other, out) > 0.1
    state = copied.__dict__["_lath_decode"]
    assert state is not model.__dict__["_lath_decode"]
    assert state.counts["fused"] == 2


def test_saving_a_patched_model(tmp_path: Path) -> None:
    model = decoder("Llama")
    with patched(model, "fused"):
        steps(model, 70, 2)
        model.save_pretrained(tmp_path)
    assert '"LlamaForCausalLM"' in (tmp_path / "config.json").read_text()


def test_probe_errors_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused model is not probed again at every token."""
    model = decoder("Llama")
    tries = []

    def refuse(*arguments: Any) -> Any:
        tries.append(1)
        raise NotFusedError("no")

    monkeypatch.setattr(decode_probe, "probed_step", refuse)
    with patched(model, "auto") as report:
        steps(model, 5, 4)
        assert report.decode is not None
        assert report.decode.counts == {"several tokens": 1, "no": 4}
    assert len(tries) == 1
