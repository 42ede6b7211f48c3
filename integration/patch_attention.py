"""The attention and cache half of `lath.patch`: one Hugging Face model instance, in place.

What changes, and what `revert` puts back: the attention implementation in the instance's configs,
and `_prepare_cache_for_generation` on the instance, so that `generate` makes a LathCache where it
would make its default one.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

from torch import nn

from lath.integration.kv_codecs import KVCodecs, kv_codecs
from lath.integration.report import AttentionRow

_MARK = "_lath_attention"
_HOOK = "_prepare_cache_for_generation"
_CACHE_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True)
class AttentionOptions:
    """attention: "int8", or "float" where only the cache changes. kv: None for the stock cache."""

    attention: str
    kv: KVCodecs | None
    backend: str

    def __str__(self) -> str:
        kv = None if self.kv is None else str(self.kv)
        return f"attention={self.attention!r}, kv={kv!r}, backend={self.backend!r}"


def attention_options(
    attention: str | None, kv: str | None, backend: str
) -> AttentionOptions | None:
    """The options of a patch; None where neither attention nor cache is to change."""
    if attention is not None and not isinstance(attention, str):
        raise TypeError(
            f"attention must be a str or None, got {type(attention).__name__}: {attention!r}"
        )
    if attention not in (None, "float", "int8"):
        raise ValueError(f"attention must be 'int8', 'float' or None, got {attention!r}")
    codecs = None if kv is None else kv_codecs(kv)
    if attention in (None, "float") and codecs is None:
        return None
    return AttentionOptions(attention or "float", codecs, backend)


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
        if have is not None and have != options:
            raise ValueError(
                f"the model is patched already with {have}; asked for {options}: call undo() on "
                "the report of the first patch"
            )
        register()
        if options.kv is not None:
            from lath.integration.cache import LathCache

            LathCache(model.config, options.kv, backend=options.backend)
        return AttentionPatch(model, options, already=have is not None)

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
        if self.model.__dict__.get(_MARK) != self.options or not str(now).startswith(NAME):
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

    def rows(self, dry_run: bool) -> list[AttentionRow]:
        action = "already patched" if self.already else "would replace" if dry_run else "replaced"
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

    from lath.integration.cache import LathCache

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
        assert options.kv is not None
        model_kwargs[name] = LathCache(self.config, options.kv, backend=options.backend)
    return result


def _cache_bytes(model: Any, kv: KVCodecs) -> tuple[float, float]:
    """Bytes of the cache per token of one sequence, all layers: in the model's dtype, in pages."""
    from lath.integration.cache import LathCache, PagedLayer

    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = sum(isinstance(layer, PagedLayer) for layer in LathCache(config, kv).layers)
    itemsize = model.dtype.itemsize
    before = 2 * heads * width * itemsize * layers
    return float(before), kv.bytes_per_token(heads, width, width, itemsize) * layers
