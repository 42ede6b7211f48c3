"""LathCache: the keys and values of a model in `PagedKV`, quantised once and read as they are.

A layer's `update` hands the attention function a handle instead of tensors. The handle appends the
new tokens to the pages and attends over them, so that nothing is ever dequantised. Only
attn_implementation "lath" can read a handle; `lath.patch(model, kv=...)` sets both.

transformers counts slots, padding included; the pages hold tokens alone, ragged between the rows.
Each layer keeps the table of slots that hold a token and checks every mask against it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from lath.integration.attention import Readable, Scores, attend_tensors, register, resolve
from lath.integration.attention_mask import Mask
from lath.integration.handle import Handle, NewTokens
from lath.integration.kv_codecs import KVCodecs, kv_codecs
from lath.integration.layer_lists import LayerLists
from lath.integration.misses import Audit, MissReport
from lath.integration.ragged import Packing, same_slots
from lath.integration.selecting import WINDOW, check_config, dense_layers, select_options
from lath.verbs.decode import decode_attention
from lath.verbs.paged_kv import PagedKV
from lath.verbs.selection import Selection

# Layers that hold no keys and values; by name, for not every version has them.
_KEPT = ("LinearAttentionLayer", "DummyLayer")


@dataclass
class Reading:
    """What all layers of a cache share: codecs, backend and whether the draft view is read."""

    codecs: KVCodecs
    backend: str
    draft: bool = False


class LathCache(Cache):  # type: ignore[misc]
    """A `transformers.Cache` of pages.

    config: the model's config. kv: as for `lath.patch`: a page codec for keys and values, or
    "k8v4". backend: as for `lath.attention`. select, repair, audit: as for `lath.patch`.

    Layers with a sliding window keep the pages of all tokens, and read those in the window. Layers
    that hold no keys and values (linear attention) keep transformers' own class.
    """

    def __init__(
        self,
        config: Any,
        kv: str | KVCodecs = "int8",
        *,
        backend: str = "auto",
        select: str | Selection | None = None,
        repair: bool | str | None = None,
        audit: float | Audit | None = None,
    ) -> None:
        register()  # a model may be set to attention "lath" without a patch
        self.selection, self.audit = select_options(select, repair, audit, kv)
        self.reading = Reading(kv_codecs(kv), backend)
        decoder = config.get_text_config(decoder=True)
        stocks = DynamicCache(config=decoder).layers
        windows = [_has_window(stock) for stock in stocks]
        self.dense_layers: dict[int, str] = {}
        if self.selection is not None:
            self.dense_layers = dense_layers(self.selection, windows)
            check_config(self.selection, self.audit, decoder)
        layers: list[Any] = [
            stock if window is None else PagedLayer(self.reading, self._lists(number))
            for number, (stock, window) in enumerate(zip(stocks, windows, strict=True))
        ]
        super().__init__(layers=layers)

    def _lists(self, number: int) -> LayerLists | None:
        if self.selection is None or self.dense_layers.get(number) == WINDOW:
            return None
        return LayerLists(self.selection, self.audit, number)

    @property
    def misses(self) -> MissReport | None:
        """What the selection missed; None without audit."""
        return None if self.audit is None else self.audit.report

    @property
    def nbytes(self) -> int:
        """Bytes that the layers have allocated: pages, indexes, float parts, tables."""
        return sum(pages.nbytes for pages in self._pages())

    @property
    def nbytes_in_use(self) -> int:
        """Bytes of the pages and float tokens that are there, without room to grow."""
        return sum(pages.nbytes_in_use for pages in self._pages())

    def _pages(self) -> list[PagedKV]:
        layers = [layer for layer in self.layers if isinstance(layer, PagedLayer)]
        return [layer.pages for layer in layers if layer.pages is not None]

    @contextlib.contextmanager
    def draft(self) -> Iterator[None]:
        """Within it, attention reads the upper four bits of "int8-planes" pages alone."""
        if "int8-planes" not in (str(self.reading.codecs.key), str(self.reading.codecs.value)):
            raise ValueError(f"a draft needs kv='int8-planes', got kv={str(self.reading.codecs)!r}")
        self.reading.draft = True
        try:
            yield
        finally:
            self.reading.draft = False


def _has_window(stock: Any) -> bool | None:
    """Whether a layer of transformers' cache has a sliding window; None where it stays as it is."""
    if type(stock) in (DynamicLayer, DynamicSlidingWindowLayer):
        return type(stock) is DynamicSlidingWindowLayer
    if type(stock).__name__ in _KEPT:
        return None
    raise NotImplementedError(
        f"LathCache has no layer in place of transformers' {type(stock).__name__}; it replaces "
        "DynamicLayer and DynamicSlidingWindowLayer"
    )


def cache_argument(model: Any) -> str:
    """The name of the cache in `model`'s forward: it was `past_key_values` before 5.24."""
    parameters = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values.

    lists: of what it reads; None: it always reads everything. pages: None until the first token.
    slots: columns of the padded batch so far. valid: bool [B, slots], which of them hold a token;
    None if all do.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, reading: Reading, lists: LayerLists | None = None) -> None:
        super().__init__()
        self.reading = reading
        self.lists = lists
        self.pages: PagedKV | None = None
        self.slots = 0
        self.valid: Tensor | None = None
        self.pending: NewTokens | None = None

    def _forget_lists(self) -> None:
        if self.lists is not None:
            self.lists.forget()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, width = key_states.shape
        self.batch_size = batch
        self.dtype, self.device = key_states.dtype, key_states.device
        self.pages = PagedKV(
            heads,
            width,
            batch,
            value_dim=value_states.shape[-1],
            key_codec=self.reading.codecs.key,
            value_codec=self.reading.codecs.value,
            dtype=self.dtype,
            device=self.device,
            backend=self.reading.backend,
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        """Take new keys and values [B, Hkv, L, D]; they are stored when attention reads them."""
        if self.pending is not None:
            raise RuntimeError(
                "the keys of the last forward pass were never read: it ended with an error (call "
                "reset()), or the model's attn_implementation is not 'lath'"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise ValueError(
                f"the cache holds a batch of {self.batch_size}, got key states of a batch of "
                f"{key_states.shape[0]}"
            )
        self.pending = NewTokens(key_states, value_states)
        self.slots += key_states.shape[2]
        return Handle(self, key_states), Handle(self, value_states)

    # What transformers asks

    def get_seq_length(self) -> int:
        return self.slots

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # Before 4.57 and 5.5 this was the tensor of positions.
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.slots + new, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in older versions."""
        return -1

    def reset(self) -> None:
        self.pages, self.valid, self.pending = None, None, None
        self.slots = 0
        self.is_initialized = False
        self._forget_lists()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last slots: -n drops n; a positive number is what is kept, as it once was."""
        removed = -tokens_to_remove
        if tokens_to_remove > 0:
            removed = max(self.slots - tokens_to_remove, 0)
        if removed == 0 or self.pages is None:
            return
        if removed > self.slots:
            raise ValueError(f"crop({tokens_to_remove}) of a cache of {self.slots} tokens")
        lengths = [int(length) for length in self.pages.lengths]
        if self.valid is None:
            dropped = [removed] * len(lengths)
        else:
            dropped = self.valid[:, self.slots - removed :].sum(-1).tolist()
            self.valid = self.valid[:, : self.slots - removed]
        self.pages.crop([length - gone for length, gone in zip(lengths, dropped, strict=True)])
        self.slots -= removed
        self._forget_lists()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.pages is None:
            return
        self.pages.reorder(beam_idx.cpu())
        self.batch_size = int(beam_idx.shape[0])
        if self.valid is not None:
            self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))
        self._forget_lists()

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.pages is not None:
            rows = torch.arange(self.batch_size, device=self.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.pages is not None:
            rows = torch.arange(self.batch_size, device=self.device)
            self.reorder_cache(rows[indices.to(self.device)])

    def offload(self) -> None:
        raise NotImplementedError("LathCache is not offloaded: its pages stay where they are")

    prefetch = offload

    # What the attention function asks, through a handle

    def attend(
        self, query: Tensor, mask: Mask | Tensor | None, scores: Scores, *, kind: str
    ) -> Tensor:
        """Store the pending tokens and attend from `query` [B, Hq, L, D]; returns [B, Hq, L, E].

        kind "int8": a prompt's first piece is attended from the keys and values as they came,
        with `lath.attention`. Everything else reads the pages.
        """
        if self.pending is None or self.pages is None:
            raise RuntimeError("a handle of LathCache can be read once, in the pass that made it")
        new, self.pending = self.pending, None
        if query.shape[2] != new.keys.shape[2]:
            raise NotImplementedError(
                f"{query.shape[2]} queries for {new.keys.shape[2]} new tokens: LathCache is a "
                "cache of self-attention"
            )
        before = self.slots - new.keys.shape[2]
        self._record(mask, before)
        fresh = None if self.valid is None else self.valid[:, before:]
        if fresh is not None and bool(fresh.all()):
            fresh = None
        packing = None if fresh is None else Packing.of(fresh)
        if packing is None:
            self.pages.append(new.keys, new.values)
        else:
            self.pages.append(
                packing.pack(new.keys), packing.pack(new.values), lengths=packing.counts
            )
        if before == 0 and kind == "int8":
            return attend_tensors(
                query, new.keys, new.values, mask, scores, kind=kind, backend=self.reading.backend
            )
        return self._read_pages(query, mask, scores, packing, before)

    def _read_pages(
        self,
        query: Tensor,
        mask: Mask | Tensor | None,
        scores: Scores,
        packing: Packing | None,
        before: int,
    ) -> Tensor:
        readable = self._readable(query, mask, scores, packing, before)
        if packing is not None:
            query = packing.pack(query)
        assert self.pages is not None
        given: dict[str, Any] = {
            "query_lengths": None if packing is None else packing.counts,
            "backend": self.reading.backend,
        }
        if self.lists is not None and before:
            given |= self.lists.arguments(
                query, self.pages, readable, scores, given, self.reading.draft
            )
        output = decode_attention(
            query, self.pages, **readable.arguments, **scores.arguments, **given,
            draft=self.reading.draft,
        )  # fmt: skip
        return output if packing is None else packing.unpack(output)

    def _readable(
        self,
        query: Tensor,
        mask: Mask | Tensor | None,
        scores: Scores,
        packing: Packing | None,
        before: int,
    ) -> Readable:
        """The mask over the tokens of the pages, from the mask over slots."""
        if mask is None:
            # No mask at all: one token reads everything, several read up to themselves.
            return Readable(scores.causal, scores.window)
        slots = torch.empty(1, 0, self.slots, 0, device=query.device)
        readable = resolve(query, slots, mask, scores)
        if self.valid is None:
            return readable
        keys = Packing.of(self.valid)
        queries = packing or Packing.of(self.valid[:, before:])
        if readable.mask is not None:
            gathered = queries.gather_mask(keys, readable.mask)
            bias = readable.bias
            bias = None if bias is None else queries.gather_mask(keys, bias)
            return dataclasses.replace(readable, mask=gathered, bias=bias)
        if readable.window is None or not keys.has_holes:
            return readable
        # Between a row's tokens lie slots of padding, and the window counts slots.
        return Readable(True, None, queries.slot_window(keys, readable.window, before))

    def _record(self, mask: Mask | Tensor | None, before: int) -> None:
        """Extend `valid` by the new slots; ValueError if the mask contradicts what is stored."""
        padding = mask.padding if isinstance(mask, Mask) else None
        if not isinstance(mask, Mask) and mask is not None:
            # A mask that the caller made says nothing of padding: every new slot holds a token.
            if self.valid is not None:
                new = self.valid.new_ones(self.valid.shape[0], self.slots - before)
                self.valid = torch.cat([self.valid, new], dim=1)
            return
        if isinstance(mask, Mask):
            known = mask.verified.get(id(self.valid))
            if known is not None and known[0] is self.valid:
                self.valid = known[1]
                return
        old = self.valid
        self.valid = None if padding is None else padding[:, : self.slots]
        if padding is not None and padding.shape[1] < self.slots:
            raise ValueError(
                f"attention_mask has {padding.shape[1]} columns, the cache {self.slots} slots"
            )
        if before and not same_slots(old, self.valid, before):
            self.valid = old
            raise ValueError(
                "attention_mask contradicts the cache: a slot that was padding when it was stored "
                "is not padding now, or the reverse; padding is not stored and cannot come back"
            )
        if isinstance(mask, Mask):
            mask.verified[id(old)] = (old, self.valid)
