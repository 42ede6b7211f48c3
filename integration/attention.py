"""lath's attention under a name of its own in transformers.

    lath.patch(model, weights=None, attention="int8")      # sets attn_implementation "lath"

The attention function and its mask function are registered together: without a mask function of the
same name transformers passes no mask at all, and padded batches come out silently wrong.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lath.integration.attention_mask import Mask, lath_mask, split_additive
from lath.integration.ragged import Packing
from lath.verbs.attention import attention
from lath.verbs.backends import BACKENDS
from lath.verbs.decode import decode_attention
from lath.verbs.paged_kv import PagedKV

NAME = "lath"
ATTENTION = ("int8", "float")

# What models hand to every attention function and what changes nothing of the result.
_WITHOUT_EFFECT = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "output_router_logits", "return_dict",
        "output_hidden_states", "num_items_in_batch", "logits_to_keep", "labels", "deterministic",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """What a model asks of its scores, beside the mask. sink: [Hq]. window: only without a Mask."""

    scale: float
    softcap: float | None = None
    sink: Tensor | None = None
    causal: bool = True
    window: int | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, "sink": self.sink}


@dataclass(frozen=True)
class Readable:
    """Which keys each query reads, in the terms of `lath.attention` (right-aligned)."""

    causal: bool = False
    window: int | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "causal": self.causal, "window": self.window, "mask": self.mask, "bias": self.bias,
        }  # fmt: skip


def implementation_name(attention: str, backend: str) -> str:
    """The name in transformers of an attention ("int8" or "float") on a backend."""
    if attention not in ATTENTION:
        raise ValueError(f"attention must be one of {ATTENTION}, got {attention!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    name = NAME if attention == "int8" else f"{NAME}-float"
    return name if backend == "auto" else f"{name}-{backend}"


@functools.cache
def register() -> None:
    """Register every name with transformers, attention and mask functions together; once."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for kind in ATTENTION:
        for backend in BACKENDS:
            name = implementation_name(kind, backend)
            AttentionInterface.register(name, _bind(kind, backend))
            AttentionMaskInterface.register(name, lath_mask)


def _bind(kind: str, backend: str) -> Any:
    # A plain function: torch.compile follows it, and `functools.partial` has no name in its errors.
    def lath_attention(
        module: nn.Module,
        query: Tensor,
        key: Any,
        value: Any,
        attention_mask: Mask | Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, None]:
        scores = read_options(module, query, scaling, dropout, options)
        if isinstance(key, Tensor):
            output = attend_tensors(
                query, key, value, attention_mask, scores, kind=kind, backend=backend
            )
        else:
            output = key.attend(query, attention_mask, scores, kind=kind)
        return output.transpose(1, 2).contiguous(), None

    return lath_attention


def read_options(
    module: nn.Module,
    query: Tensor,
    scaling: float | None,
    dropout: float,
    options: dict[str, Any],
) -> Scores:
    """The options of one call; NotImplementedError naming what lath's attention does not do."""
    options = dict(options)
    if dropout:
        raise NotImplementedError(f"lath attention has no dropout, got dropout={dropout}")
    if options.pop("output_attentions", None):
        raise NotImplementedError(
            "lath attention returns no weights: output_attentions=True needs "
            "attn_implementation='eager'"
        )
    causal = options.pop("is_causal", None)
    sinks = [options.pop(name, None) for name in ("s_aux", "sinks")]
    scores = Scores(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=options.pop("softcap", None) or None,
        sink=next((sink for sink in sinks if sink is not None), None),
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        window=options.pop("sliding_window", None),
    )
    for name, value in options.items():
        if value is not None and name not in _WITHOUT_EFFECT:
            raise NotImplementedError(
                f"lath attention does not support {name}={_short(value)} (passed by "
                f"{type(module).__name__}); use another attn_implementation for this model"
            )
    return scores


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, (Tensor, list, tuple)) else repr(value)


def attend_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None,
    scores: Scores,
    *,
    kind: str,
    backend: str,
) -> Tensor:
    """Attention over keys and values as tensors. Returns [B, Hq, Lq, E].

    query: [B, Hq, Lq, D]; key, value: [B, Hkv, Lk, D or E]. mask: as transformers hands it over.
    kind: "int8", or "float" for keys and values as they are.
    """
    keys = _readable_keys(query, key, mask, scores)
    if keys < key.shape[2]:
        # A static cache in its prefill: the buffer goes on behind the last token.
        key, value = key[:, :, :keys], value[:, :, :keys]
    readable = resolve(query, key, mask, scores)
    if isinstance(mask, Mask) and mask.dense is None:
        padding = mask.key_padding(keys)
        if padding is not None and mask.causal and keys == query.shape[2]:
            return _attend_ragged(
                query, key, value, padding, readable, scores, kind=kind, backend=backend
            )
        if padding is not None:
            # Keys alone have padding here: another sequence's (cross attention), or the past's.
            readable = Readable(readable.causal, readable.window, padding[:, None, None])
    return _attend(query, key, value, readable, scores, None, kind=kind, backend=backend)


def _readable_keys(query: Tensor, key: Tensor, mask: Mask | Tensor | None, scores: Scores) -> int:
    """How many keys, from the first, any query can read: those up to the last query's own slot."""
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(mask, Mask) and mask.causal and mask.dense is None:
        end = mask.query_offset + queries - mask.key_offset
        if end > keys:
            raise ValueError(f"the mask places the last query at key {end - 1} of {keys} keys")
        return end
    if mask is None and scores.causal and queries > 1:
        return min(queries, keys)  # transformers' convention: no mask means the upper left
    return keys


def resolve(query: Tensor, key: Tensor, mask: Mask | Tensor | None, scores: Scores) -> Readable:
    """The mask in lath's terms, padding left out; key: what `_readable_keys` has left of it."""
    if mask is None:
        causal = scores.causal and query.shape[2] > 1
        return Readable(causal, scores.window)
    if isinstance(mask, Mask):
        if mask.dense is not None:
            return Readable(mask=mask.dense)
        return Readable(mask.causal, mask.window)
    mask = mask[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        return Readable(mask=mask)
    allowed, bias = split_additive(mask)
    return Readable(mask=allowed, bias=bias)


def _attend_ragged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor,
    readable: Readable,
    scores: Scores,
    *,
    kind: str,
    backend: str,
) -> Tensor:
    """A prompt with padding: each row's tokens alone, so that no page holds a padding token."""
    packing = Packing.of(padding)
    if readable.window is not None and packing.has_holes:
        # The window counts slots, and slots are not tokens any more: say it slot by slot.
        readable = Readable(True, None, packing.slot_window(packing, readable.window))
    outputs = _attend(
        packing.pack(query), packing.pack(key), packing.pack(value), readable, scores,
        packing.counts, kind=kind, backend=backend,
    )  # fmt: skip
    return packing.unpack(outputs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    readable: Readable,
    scores: Scores,
    lengths: Tensor | None,
    *,
    kind: str,
    backend: str,
) -> Tensor:
    if kind == "int8":
        rows = lengths
        if lengths is None and readable.mask is not None and not readable.causal:
            # A static cache's buffer goes on behind its tokens: no page is made of what no row
            # reads.
            rows, lengths = None, _end_of(readable.mask, key)
        output: Tensor = attention(
            query, key, value, **readable.arguments, **scores.arguments, lengths=lengths,
            query_lengths=rows, backend=backend,
        )  # fmt: skip
        return output
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "attention='float' over a cache of tensors cannot be compiled; patch attention='int8'"
        )
    pages = PagedKV(
        key.shape[1], key.shape[3], key.shape[0], value_dim=value.shape[3], key_codec="float",
        value_codec="float", dtype=key.dtype, device=key.device, backend=backend,
    )  # fmt: skip
    pages.append(key, value, lengths=lengths)
    output = decode_attention(
        query, pages, **readable.arguments, **scores.arguments, query_lengths=lengths,
        backend=backend,
    )  # fmt: skip
    return output


def _end_of(mask: Tensor, key: Tensor) -> Tensor:
    """int64 [B]: one more than the last key that a row of the sequence may read."""
    places = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    ends = (mask.flatten(1, 2).any(1) * places).amax(-1)
    return ends.expand(key.shape[0])
