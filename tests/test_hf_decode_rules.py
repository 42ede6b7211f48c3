"""When the fused step is not taken: each rule with a result that would be wrong without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_hf_decode import PROMPT, ROUNDING, decoder, new_cache, patched
from torch import Tensor

from hf_models import generate, padded, positions, relative, tokens

pytest.importorskip("transformers")
pytest.importorskip("numba")
from transformers import DynamicCache

from lath.integration.cache import cache_argument

Call = Callable[[Any, dict[str, Any], Tensor], Any]


@pytest.fixture
def models(no_grad: None) -> tuple[Any, Any]:
    """The same model by modules and fused."""
    both = decoder("Llama"), decoder("Llama")
    patched(both[0], "modules")
    patched(both[1], "auto")
    return both


def reasons(model: Any) -> dict[str, int]:
    return dict(model.__dict__["_lath_decode"].counts)


def primed(model: Any, prompt: int = 80) -> tuple[dict[str, Any], Tensor]:
    """A cache with a prompt in it, as an argument, and the next token."""
    cache = new_cache(model)
    ids = tokens(1, prompt + 1)
    model(ids[:, :-1], use_cache=True, **{cache_argument(model): cache})
    return {cache_argument(model): cache, "use_cache": True}, ids[:, -1:]


def hidden_states(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    return torch.stack(model(token, output_hidden_states=True, **given).hidden_states)


def hidden_states_by_config(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    model.config.output_hidden_states = True
    try:
        return torch.stack(model(token, **given).hidden_states)
    finally:
        model.config.output_hidden_states = False


def embeddings(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    embedded = 2 * model.model.embed_tokens(token)
    out: Tensor = model(inputs_embeds=embedded, **given).logits
    return out


def several(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    out: Tensor = model(tokens(1, 3, seed=4), **given).logits
    return out


def labels(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    out = model(token, labels=token, **given)
    assert out.loss is not None
    logits: Tensor = out.logits
    return logits


def tuple_of(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    out: Tensor = model(token, return_dict=False, **given)[0]
    return out


def mask_of_four(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    (cache,) = [value for value in given.values() if value is not True]
    mask = torch.ones(1, 1, 1, cache.get_seq_length() + 1, dtype=torch.bool)
    mask[..., 10:60] = False
    out: Tensor = model(token, attention_mask=mask, **given).logits
    return out


def module_hook(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    handle = model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: 2 * out)
    try:
        return several_single(model, given, token)
    finally:
        handle.remove()


def pre_hook(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda m, args: (2 * args[0],)
    )
    try:
        return several_single(model, given, token)
    finally:
        handle.remove()


def global_hook(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    def double(module: Any, args: Any, out: Any) -> Any:
        return 2 * out if module is model.model.layers[0].mlp else None

    handle = torch.nn.modules.module.register_module_forward_hook(double)
    try:
        return several_single(model, given, token)
    finally:
        handle.remove()


def instance_forward(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    """As accelerate does it."""
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: 2 * own(x)
    try:
        return several_single(model, given, token)
    finally:
        del mlp.forward


def several_single(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    return torch.cat([model(token, **given).logits for _ in range(2)])


def wrapped_layer(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    """As PEFT does it: another module stands in the place of a linear layer."""
    attention = model.model.layers[1].self_attn
    own = attention.q_proj
    attention.q_proj = torch.nn.Sequential(own, torch.nn.Dropout(0.0))
    try:
        return several_single(model, given, token)
    finally:
        attention.q_proj = own


def training(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    model.train()
    try:
        out: Tensor = model(token, **given).logits
        return out
    finally:
        model.eval()


def draft(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    (cache,) = [value for value in given.values() if value is not True]
    with cache.draft():
        out: Tensor = model(token, **given).logits
    return out


# By name: a call behind a prompt, and what the report says of it.
RULES: dict[str, tuple[Call, str]] = {
    "several tokens": (several, "several tokens"),
    "hidden states": (hidden_states, "output_hidden_states"),
    "hidden states by config": (hidden_states_by_config, "output_hidden_states"),
    "embeddings": (embeddings, "inputs_embeds"),
    "labels": (labels, "the argument labels"),
    "tuple": (tuple_of, "return_dict is False"),
    "4-D mask": (mask_of_four, "not 2-D"),
    "hook": (module_hook, "a module has hooks"),
    "pre-hook": (pre_hook, "a module has hooks"),
    "global hook": (global_hook, "hooks of all modules"),
    "instance forward": (instance_forward, "replaced on the instance"),
    "wrapped layer": (wrapped_layer, "q_proj of layer 1 is a Sequential"),
    "training": (training, "training mode"),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule(rule: str, models: tuple[Any, Any]) -> None:
    call, reason = RULES[rule]
    results = []
    for model in models:
        given, token = primed(model)
        model(token, **given)  # the step is ready, and would be taken
        results.append(call(model, given, token))
        results[-1] = torch.cat([results[-1].flatten(), model(token, **given).logits.flatten()])
    expected, out = results
    assert relative(out - expected, expected) < ROUNDING
    assert any(reason in why for why in reasons(models[1])), reasons(models[1])
    assert reasons(models[1])["fused"] == 2  # before, and again behind it


def test_a_rule_that_is_not_asked_gives_a_wrong_result(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without the look at the modules a hook is passed over in silence."""
    from lath.integration.decode_watch import Skipped

    modules, fused = models
    expected = module_hook(modules, *primed(modules))
    given, token = primed(fused)
    fused(token, **given)
    given, token = primed(fused)
    monkeypatch.setattr(Skipped, "obstacle", "")
    out = module_hook(fused, given, token)
    assert relative(out - expected, expected) > 100 * ROUNDING


@pytest.mark.parametrize("token", [-1, 128, 10**6])
def test_tokens_that_are_none(token: int, models: tuple[Any, Any]) -> None:
    """The embedding's row is read by address: nobody else would notice."""
    for model in models:
        given, _ = primed(model)
        with pytest.raises(IndexError):
            model(torch.tensor([[token]]), **given)
    assert reasons(models[1])["a token outside the embedding"] == 1


def test_far_positions(models: tuple[Any, Any]) -> None:
    outs = []
    for model in models:
        given, token = primed(model)
        outs.append(model(token, position_ids=torch.tensor([[1 << 21]]), **given).logits)
    assert torch.equal(*outs)
    assert reasons(models[1])["a position beyond a million"] == 1


def test_gradients(models: tuple[Any, Any]) -> None:
    for model in models:
        given, token = primed(model)
        with torch.enable_grad():
            logits = model(token, **given).logits
        assert logits.requires_grad
    assert reasons(models[1])["gradients are recorded"] == 1


def test_draft_pages(no_grad: None) -> None:
    both = decoder("Llama"), decoder("Llama")
    for model, decode in zip(both, ("modules", "auto"), strict=True):
        patched(model, decode, kv="int8-planes", activations="float")
    outs = []
    for model in both:
        given, token = primed(model, 200)
        outs.append(torch.cat([draft(model, given, token), model(token, **given).logits]))
    expected, out = outs
    assert relative(expected[0] - expected[1], expected) > 100 * ROUNDING
    assert relative(out - expected, expected) < ROUNDING
    found = reasons(both[1])
    assert found["the cache is read as a draft"] == 1
    assert found["fused"] == 1


def test_a_batch_and_padding(models: tuple[Any, Any]) -> None:
    ids, mask = padded([PROMPT, 101], "left")
    expected, out = (generate(model, ids, 5, attention_mask=mask) for model in models)
    assert torch.equal(out, expected)
    ids, mask = ids[1:], mask[1:]  # one sequence, with padding before it
    expected, out = (generate(model, ids, 5, attention_mask=mask) for model in models)
    assert torch.equal(out, expected)
    found = reasons(models[1])
    assert "fused" not in found
    assert {"a batch", "padding in the cache"} <= set(found)


def test_a_padded_step(models: tuple[Any, Any]) -> None:
    """Padding that a call says without `generate`; position and slot are two numbers there."""
    ids, mask = padded([90], "left")
    ids = torch.cat([torch.zeros(1, 20, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 20, dtype=torch.int64), mask], dim=1)
    outs = []
    for model in models:
        cache = new_cache(model)
        given = {cache_argument(model): cache, "use_cache": True}
        model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions(mask)[:, :-1],
              **given)  # fmt: skip
        outs.append(
            model(ids[:, -1:], attention_mask=mask, position_ids=positions(mask)[:, -1:],
                  **given).logits
        )  # fmt: skip
    assert relative(outs[1] - outs[0], outs[0]) < ROUNDING
    assert "fused" not in reasons(models[1])


def test_positions_of_the_caller(models: tuple[Any, Any]) -> None:
    """A position is not a slot: the step takes it, and the loop goes on from it."""
    outs = []
    for model in models:
        given, token = primed(model)
        outs.append(model(token, position_ids=torch.tensor([[40]]), **given).logits)
    assert relative(outs[1] - outs[0], outs[0]) < ROUNDING
    assert reasons(models[1])["fused"] == 1
    ids = tokens(1, 90)
    places = torch.arange(100, 190)[None]
    expected, out = (generate(model, ids, 6, position_ids=places) for model in models)
    assert torch.equal(out, expected)
    assert reasons(models[1])["fused"] == 6


@pytest.mark.parametrize("options", [
    {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3},
    {"prefill_chunk_size": 40}, {"return_dict_in_generate": True, "output_scores": True},
])  # fmt: skip
def test_other_ways_to_generate(options: dict[str, Any], models: tuple[Any, Any]) -> None:
    ids = tokens(1, PROMPT)
    ids[:, 60:120] = ids[:, :60]
    expected, out = (generate(model, ids, 12, **options) for model in models)
    if "return_dict_in_generate" in options:
        theirs, ours = (torch.cat(each.scores).nan_to_num() for each in (expected, out))
        assert torch.allclose(ours, theirs, atol=ROUNDING)  # of scores about 1
        expected, out = expected.sequences, out.sequences
    assert torch.equal(out, expected)


def test_an_assistant(models: tuple[Any, Any]) -> None:
    ids = tokens(1, PROMPT)
    assistant = decoder("Llama")
    for layer in assistant.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.9)
    assistant.generation_config.assistant_confidence_threshold = 0.0  # it drafts several tokens
    patched(assistant, "auto")
    expected, out = (generate(model, ids, 16, assistant_model=assistant) for model in models)
    assert torch.equal(out, expected)
    assert reasons(assistant)["fused"] > 0


def test_foreign_caches(models: tuple[Any, Any]) -> None:
    ids = tokens(1, PROMPT)
    caches = [DynamicCache(config=model.config) for model in models]
    expected, out = (
        generate(model, ids, 6, cache) for model, cache in zip(models, caches, strict=True)
    )
    assert torch.equal(out, expected)
    found = reasons(models[1])
    assert "fused" not in found
    assert found["DynamicCache"] == 5
