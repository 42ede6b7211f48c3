"""More rules of the fused step: of calls and of caches. Each with a result, or an error
of the modules, that would be another without it. Helpers are those of test_hf_decode_rules.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_hf_decode import ROUNDING, decoder, new_cache
from test_hf_decode_rules import models, primed, reasons
from torch import Tensor

from hf_models import relative, tokens

pytest.importorskip("transformers")
pytest.importorskip("numba")
from transformers.cache_utils import DynamicLayer

from lath.integration.cache import LathCache, cache_argument

__all__ = ["models"]  # a fixture


def cache_in(given: dict[str, Any]) -> Any:
    (cache,) = [value for value in given.values() if value is not True]
    return cache


def outcome(call: Callable[[], Tensor]) -> Tensor | str:
    """What a call gives: a tensor, or the kind of error and its text."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def same(expected: Tensor | str, out: Tensor | str) -> bool:
    if isinstance(expected, str) or isinstance(out, str):
        return isinstance(expected, str) and isinstance(out, str) and expected == out
    if expected.shape != out.shape or expected.dtype != out.dtype:
        return False
    return relative(out - expected, expected) < ROUNDING


# Calls behind a prompt of 80 tokens


def without_cache(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    out: Tensor = model(token, use_cache=False).logits
    return out


def cache_without_use(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    """Then the output names no cache."""
    out = model(token, **{**given, "use_cache": False})
    assert getattr(out, cache_argument(model)) is None
    logits: Tensor = out.logits
    return logits


def attentions(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    out: Tensor = model(token, output_attentions=True, **given).logits
    return out


def kept_twice(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    out: Tensor = model(token, logits_to_keep=torch.tensor([0, 0]), **given).logits
    return out


def negative_position(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    out: Tensor = model(token, position_ids=torch.tensor([[-3]]), **given).logits
    return out


def two_positions(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    out: Tensor = model(token, position_ids=torch.tensor([[40, 41]]), **given).logits
    return out


def short_mask(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    mask = torch.ones(1, 40, dtype=torch.int64)
    out: Tensor = model(token, attention_mask=mask, **given).logits
    return out


def mask_of_stored(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    """Padding where tokens were stored."""
    mask = torch.ones(1, cache_in(given).get_seq_length() + 1, dtype=torch.int64)
    mask[:, :20] = 0
    out: Tensor = model(token, attention_mask=mask, **given).logits
    return out


def mask_of_itself(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    """The new token is padding, and is not there for the next one."""
    mask = torch.ones(1, cache_in(given).get_seq_length() + 1, dtype=torch.int64)
    mask[:, -1] = 0
    model(token, attention_mask=mask, **given)
    mask = torch.cat([mask, torch.ones_like(token)], dim=1)
    out: Tensor = model(tokens(1, 1, seed=5), attention_mask=mask, **given).logits
    return out


def by_place(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    out: Tensor = model(token, None, None, cache_in(given), use_cache=True).logits
    return out


def autocast(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out: Tensor = model(token, **given).logits
    return out


class Other(Tensor):
    """As torch.export's and functorch's."""


def subclass(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    out: Tensor = model(token.as_subclass(Other), **given).logits
    return out.as_subclass(Tensor)


def no_numbers(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    out: Tensor = model(token.float(), **given).logits
    return out


def no_tokens(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    out: Tensor = model(token[:, :0], **given).logits
    return out


Rules = dict[str, tuple[Callable[[Any, dict[str, Any], Tensor], Tensor], str]]
CALLS: Rules = {
    "without a cache": (without_cache, "no cache"),
    "use_cache": (cache_without_use, "use_cache or return_dict is False"),
    "attentions": (attentions, "output_attentions"),
    "logits_to_keep": (kept_twice, "logits_to_keep as a tensor"),
    "negative position": (negative_position, "a negative position"),
    "two positions": (two_positions, "position_ids of several tokens"),
    "short mask": (short_mask, "of another length than the cache"),
    "mask of stored tokens": (mask_of_stored, "padding in the attention mask"),
    "mask of itself": (mask_of_itself, "padding in the attention mask"),
    "by place": (by_place, "positional arguments"),
    "autocast": (autocast, "autocast"),
    "subclass": (subclass, "torch.compile, export or tracing"),
    "no numbers": (no_numbers, "token ids in torch.float32"),
    "no tokens": (no_tokens, "no tokens"),
}


# Caches that the step cannot read


def other_layers(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    """A cache that was made for a longer model."""
    longer = decoder("Llama", num_hidden_layers=3).config
    cache = model.__dict__["_lath_attention"].new_cache(longer)
    given = {**given, cache_argument(model): cache}
    model(tokens(1, 80), **given)
    out: Tensor = model(token, **given).logits
    return out


def other_layer(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    """transformers' own layer among those of pages."""
    cache = new_cache(model)
    cache.layers[1] = DynamicLayer()
    given = {**given, cache_argument(model): cache}
    model(tokens(1, 80), **given)
    out: Tensor = model(token, **given).logits
    return out


def empty(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    out: Tensor = model(token, **{**given, cache_argument(model): new_cache(model)}).logits
    return out


def unread(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    """A pass ended before its keys were read."""
    for layer in cache_in(given).layers:
        layer.update(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16))
    out: Tensor = model(token, **given).logits
    return out


def other_dtype(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    cache = LathCache(model.config, "float")
    for layer in cache.layers:
        torch.manual_seed(0)
        layer.lazy_initialization(*[torch.randn(1, 2, 80, 16, dtype=torch.bfloat16)] * 2)
        layer.pages.append(*[torch.randn(1, 2, 80, 16, dtype=torch.bfloat16)] * 2)
        layer.slots = 80
    out: Tensor = model(token, **{**given, cache_argument(model): cache}).logits
    return out


def named_backend(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    cache = LathCache(model.config, "float", backend="reference")
    given = {**given, cache_argument(model): cache}
    model(tokens(1, 80), **given)
    out: Tensor = model(token, **given).logits
    return out


def two_rows(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    given = {**given, cache_argument(model): new_cache(model)}
    model(tokens(2, 80), **given)
    out: Tensor = model(token, **given).logits
    return out


def dropped_page(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    """A page of the middle evicted, as every layer's."""
    given = {**given, cache_argument(model): new_cache(model)}
    model(tokens(1, 300), **given)
    for layer in cache_in(given).layers:
        layer.pages.drop_pages([[1]])
    out: Tensor = model(token, **given).logits
    return out


def shorter_layer(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    cache_in(given).layers[1].crop(-5)
    out: Tensor = model(token, **given).logits
    return out


def other_slots(model: Any, given: dict[str, Any], token: Tensor) -> Tensor:
    """Layers of one length whose pages were cut in unlike places."""
    given = {**given, cache_argument(model): new_cache(model)}
    model(tokens(1, 200), **given)
    layer = cache_in(given).layers[1]
    layer.crop(-30)
    torch.manual_seed(0)
    layer.pages.append(torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16))
    layer.slots += 30
    out: Tensor = model(token, **given).logits
    return out


CACHES: Rules = {
    "other layers": (other_layers, "the cache has 3 layers"),
    "other layer": (other_layer, "the cache has a DynamicLayer"),
    "empty": (empty, "the cache is empty"),
    "unread": (unread, "tokens that were not stored"),
    "other dtype": (other_dtype, "the cache is of another kind"),
    "named backend": (named_backend, "not read by the compiled CPU kernels"),
    "two rows": (two_rows, "a batch of 2"),
    "dropped page": (dropped_page, "tokens were dropped from the cache"),
    "shorter layer": (shorter_layer, "layers of the cache have different lengths"),
    "other slots": (other_slots, "layers of the cache fill different slots"),
}


@pytest.mark.parametrize("rule", CALLS | CACHES)
def test_a_call_is_what_the_modules_make_of_it(rule: str, models: tuple[Any, Any]) -> None:
    call, reason = (CALLS | CACHES)[rule]
    results = []
    for model in models:
        given, token = primed(model)
        model(token, **given)  # the step is ready, and would be taken
        results.append(outcome(lambda: call(model, given, token)))  # noqa: B023 (called at once)
    assert same(*results), results
    assert any(reason in why for why in reasons(models[1])), reasons(models[1])
    assert reasons(models[1])["fused"] == 1


def test_positional_arguments_are_fused(models: tuple[Any, Any]) -> None:
    outs = []
    for model in models:
        given, token = primed(model)
        mask = torch.ones(1, 81, dtype=torch.int64)
        outs.append(model(token, mask, torch.tensor([[80]]), **given).logits)
    assert relative(outs[1] - outs[0], outs[0]) < ROUNDING
    assert reasons(models[1])["fused"] == 1


@pytest.mark.slow
def test_a_compiled_model(models: tuple[Any, Any]) -> None:
    """torch.compile sees the modules."""
    outs = []
    for model in models:
        given, token = primed(model)
        model(token, **given)
        torch.compiler.reset()
        outs.append(torch.compile(model, backend="eager")(token, **given).logits)
    torch.compiler.reset()
    assert relative(outs[1] - outs[0], outs[0]) < ROUNDING
    assert reasons(models[1])["fused"] == 1
