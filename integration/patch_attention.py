"""The attention and cache half of `lath.patch`: one Hugging Face model instance, in place.

What changes, and what `revert` puts back: the attention implementation in the instance's configs,
and `_prepare_cache_for_generation` on the instance, so that `generate` makes a LathCache where it
would make its default one.
"""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lath.formats.pages import PageFormat
from lath.integration.kv_codecs import KVCodecs, kv_codecs
from lath.integration.misses import Audit
from lath.integration.report import AttentionRow, SelectionRow
from lath.integration.selecting import WINDOW, comparable, describe, select_options
from lath.integration.selection_bytes import Step
from lath.verbs.planning import describe_device
from lath.verbs.selection import Selection

if TYPE_CHECKING:
    from lath.integration.cache import LathCache

_MARK = "_lath_attention"
_HOOK = "_prepare_cache_for_generation"
_CACHE_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True)
class AttentionOptions:
    """attention: "int8", or "float" where only the cache changes. kv: None for the stock cache.
    select: None to read everything; audit: what it is measured into."""

    attention: str
    kv: KVCodecs | None
    backend: str
    select: Selection | None = None
    audit: Audit | None = None

    def __str__(self) -> str:
        kv = None if self.kv is None else str(self.kv)
        text = f"attention={self.attention!r}, kv={kv!r}, backend={self.backend!r}"
        if self.select is not None:
            text += f", select={describe(self.select)!r}"
        return text if self.audit is None else f"{text}, audit={self.audit.threshold}"

    def new_cache(self, config: Any) -> LathCache:
        from lath.integration.cache import LathCache

        assert self.kv is not None
        return LathCache(
            config, self.kv, backend=self.backend, select=self.select, audit=self.audit
        )


def attention_options(
    attention: str | None,
    kv: str | None,
    backend: str,
    select: str | Selection | None = None,
    repair: bool | str | None = None,
    audit: float | None = None,
) -> AttentionOptions | None:
    """The options of a patch; None where neither attention nor cache is to change."""
    if attention is not None and not isinstance(attention, str):
        raise TypeError(
            f"attention must be a str or None, got {type(attention).__name__}: {attention!r}"
        )
    if attention not in (None, "float", "int8"):
        raise ValueError(f"attention must be 'int8', 'float' or None, got {attention!r}")
    codecs = None if kv is None else kv_codecs(kv)
    selection, measured = select_options(select, repair, audit, kv)
    if attention in (None, "float") and codecs is None:
        return None
    return AttentionOptions(attention or "float", codecs, backend, selection, measured)


class AttentionPatch:
    """The change of one model. Made by `prepare`, which checks everything and changes nothing.

    transformers keeps the name of the attention in the config, so models that were built from one
    config object share it; `from_pretrained` gives each model its own.
    """

    def __init__(self, model: nn.Module, options: AttentionOptions, already: bool) -> None:
        self.model: Any = model
        self.options = options
        self.already = already
        self._configs: list[tuple[Any, Any]] = []

    @staticmethod
    def prepare(model: nn.Module, options: AttentionOptions) -> AttentionPatch:
        """Raises TypeError, ValueError or NotImplementedError saying why the model cannot."""
        from transformers import PreTrainedModel

        from lath.integration.attention import register

        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"attention and kv need a transformers PreTrainedModel, got {type(model).__name__}"
            )
        if not model._can_set_attn_implementation():
            raise NotImplementedError(
                f"{type(model).__name__} does not take its attention from transformers' "
                "AttentionInterface, so attention and kv cannot be patched"
            )
        if options.kv is not None and model.config.is_encoder_decoder:
            raise NotImplementedError(
                f"kv={str(options.kv)!r}: {type(model).__name__} is an encoder-decoder; LathCache "
                "is a cache of self-attention alone"
            )
        have = model.__dict__.get(_MARK)
        if have is not None and comparable(have) != comparable(options):
            raise ValueError(
                f"the model is patched already with {have}; asked for {options}: call undo() on "
                "the report of the first patch"
            )
        register()
        if options.kv is not None:
            options.new_cache(model.config)
        # The patch that is in force has the report that its steps are measured into.
        return AttentionPatch(model, have or options, already=have is not None)

    def check_apply(self) -> None:
        """RuntimeError if another patch of the model's attention is in force."""
        have = self.model.__dict__.get(_MARK)
        if not self.already and have is not None:
            raise RuntimeError(f"the model is patched with {have} now; undo that first")

    def apply(self) -> None:
        from lath.integration.attention import implementation_name

        if self.already:
            return
        self._configs = [(config, config._attn_implementation) for config in _configs(self.model)]
        self.model.set_attn_implementation(
            implementation_name(self.options.attention, self.options.backend)
        )
        if self.options.kv is not None:
            self.model.__dict__[_HOOK] = types.MethodType(_prepare_cache, self.model)
        self.model.__dict__[_MARK] = self.options

    def check_revert(self) -> None:
        """RuntimeError if the model's attention was changed since `apply`."""
        from lath.integration.attention import NAME

        if self.already:
            return
        now = self.model.config._attn_implementation
        if self.model.__dict__.get(_MARK) is not self.options or not str(now).startswith(NAME):
            raise RuntimeError(
                f"the model's attention was changed since lath.patch (it is {now!r} now); undo "
                "the later change first"
            )

    def revert(self) -> None:
        if self.already:
            return
        for config, implementation in self._configs:
            config._attn_implementation_internal = implementation
        self.model.__dict__.pop(_HOOK, None)
        self.model.__dict__.pop(_MARK, None)

    def _action(self, dry_run: bool) -> str:
        return "already patched" if self.already else "would replace" if dry_run else "replaced"

    def selection_row(self, dry_run: bool) -> SelectionRow | None:
        return _selection_row(self.model, self.options, self._action(dry_run))

    def rows(self, dry_run: bool) -> list[AttentionRow]:
        action = self._action(dry_run)
        before = str(self.model.config._attn_implementation)
        rows = []
        if self.options.attention == "int8":
            rows.append(AttentionRow("attention", action, before, "int8"))
        if self.options.kv is not None:
            sizes = _cache_bytes(self.model, self.options.kv)
            rows.append(AttentionRow("cache", action, "DynamicCache", str(self.options.kv), *sizes))
        return rows


def _configs(model: Any) -> list[Any]:
    """Every config object that `set_attn_implementation` may write to, once."""
    from transformers import PreTrainedModel

    found: dict[int, Any] = {}
    todo = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while todo:
        config = todo.pop()
        if config is None or id(config) in found:
            continue
        found[id(config)] = config
        todo += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


def _prepare_cache(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """The class's own method, then a LathCache in the place of the default cache it made."""
    from transformers import DynamicCache

    given = {id(model_kwargs.get(name)) for name in _CACHE_NAMES}
    result = getattr(type(self), _HOOK)(self, generation_config, model_kwargs, *args, **kwargs)
    options: AttentionOptions = self.__dict__[_MARK]
    for name in _CACHE_NAMES:
        cache = model_kwargs.get(name)
        if type(cache) is not DynamicCache or id(cache) in given:
            continue
        if getattr(cache, "offloading", False):
            raise NotImplementedError(
                f"cache_implementation={generation_config.cache_implementation!r}: LathCache is "
                "not offloaded; undo the patch of kv for this call"
            )
        model_kwargs[name] = options.new_cache(self.config)
    return result


def _selection_row(model: Any, options: AttentionOptions, action: str) -> SelectionRow | None:
    """What of the model's layers selects, and what a step at the model's full context reads."""
    from lath.integration.cache import PagedLayer

    selection = options.select
    if selection is None or options.kv is None:
        return None
    cache = options.new_cache(model.config)
    paged = [i for i, layer in enumerate(cache.layers) if isinstance(layer, PagedLayer)]
    row = SelectionRow(
        action, describe(selection), str(selection.selector), _budget(selection), selection.repair,
        len(paged), cache.dense_layers,
    )  # fmt: skip
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not context:
        return row
    step = _step(model, options.kv, context)
    whole = [layer for layer in paged if cache.dense_layers.get(layer) != WINDOW]
    after = [
        step.dense() if layer in cache.dense_layers else step.selected(selection, layer)
        for layer in whole
    ]
    known = [size for size in after if size is not None]
    return dataclasses.replace(
        row, context=context, bytes_before=step.dense() * len(whole),
        bytes_after=sum(known) if len(known) == len(after) else None,
    )  # fmt: skip


def _budget(selection: Selection) -> str:
    if selection.layer_budgets is not None:
        return "by layer"
    budget = selection.budget
    if isinstance(budget, float):
        return f"{budget:.4g} of the context"
    return f"{budget} tokens" if isinstance(budget, int) else f"{budget.mass:g} of the mass"


def _step(model: Any, kv: KVCodecs, context: int) -> Step:
    config = model.config.get_text_config(decoder=True)
    heads, width = _head_sizes(config)
    fmt = PageFormat(kv.key, kv.value, width, width, model.dtype.itemsize)
    kind = model.device.type
    device = describe_device(model.device if kind in ("cpu", "cuda") else "cpu")
    return Step(context, config.num_attention_heads, heads, fmt, model.dtype, device)


def _head_sizes(config: Any) -> tuple[int, int]:
    """KV heads, and the width of a head."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, width


def _cache_bytes(model: Any, kv: KVCodecs) -> tuple[float, float]:
    """Bytes of the cache per token of one sequence, all layers: in the model's dtype, in pages."""
    from lath.integration.cache import LathCache, PagedLayer

    config = model.config.get_text_config(decoder=True)
    heads, width = _head_sizes(config)
    layers = sum(isinstance(layer, PagedLayer) for layer in LathCache(config, kv).layers)
    itemsize = model.dtype.itemsize
    before = 2 * heads * width * itemsize * layers
    return float(before), kv.bytes_per_token(heads, width, width, itemsize) * layers
