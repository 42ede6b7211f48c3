"""A LathCache and a compiled step in step: which slot a token takes, and what is counted where."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from lath.formats.attention import ScoreOptions
from lath.formats.page_span import Span
from lath.formats.page_step import Part, close_page, count_tokens, is_plain, open_part
from lath.formats.pages import PAGE
from lath.formats.selection import PageChoice
from lath.integration.attention import Readable, Scores
from lath.integration.cache import LathCache, PagedLayer
from lath.integration.decode_recognise import NotFusedError
from lath.kernels.decode_step.cpu import DecodeStep
from lath.kernels.decode_step.cpu_arguments import STATE
from lath.kernels.decode_step.cpu_bound import BoundStep, Reader
from lath.kernels.decode_step.cpu_greedy import Greedy
from lath.kernels.simd.openmp import one_thread
from lath.verbs.attention_options import choose_precision, choose_query
from lath.verbs.backends import resolve_backend
from lath.verbs.decode import decode_attention
from lath.verbs.selection import page_choice


class StepCache:
    """One cache of one sequence, as a step reads it.

    Between two steps anything may have happened to the cache (a prompt, a crop, another beam): each
    step looks whether every layer is as the last one left it, and looks anew where it is not.
    """

    def __init__(self, cache: LathCache, step: DecodeStep) -> None:
        # Not the cache itself: who keeps this for a cache must not keep the cache alive.
        self._step, self._reading = step, cache.reading
        self._layers: list[Any] = list(cache.layers)
        _check_layers(cache, step)
        self._stale = False  # whether the open part is full, so that the next token goes elsewhere
        self._part: Part = "last"
        self._bound: BoundStep | None = None
        self._seen: list[tuple[Any, ...]] = []
        self.slots = 0
        self._counting: _Before | None = None  # the call that is counted and not yet computed
        self._locate()

    @property
    def bound(self) -> BoundStep:
        assert self._bound is not None
        return self._bound

    def prepare(self) -> None:
        """Make `bound` fit the cache as it is now; NotFusedError where it cannot be."""
        self._undo()
        if self._reading.draft:
            raise NotFusedError("the cache is read as a draft")
        if self._stale:
            self._locate()
            return
        slots = self.slots
        for layer, pages, span, structure, records, last in self._seen:
            if (
                layer.pages is not pages
                or pages._structure is not structure
                or pages.spans[0] is not span
                or pages.pool.records is not records
                or pages.last_keys is not last
                or layer.slots != slots
                or layer.valid is not None
                or layer.pending is not None
            ):
                self._locate()
                return

    def _locate(self) -> None:
        slots = {layer.slots for layer in self._layers}
        if len(slots) != 1:
            raise NotFusedError("the layers of the cache have different lengths")
        parts = set()
        for layer in self._layers:
            _check_contents(layer, self._step)
            parts.add(open_part(layer.pages))
        if len(parts) != 1:
            raise NotFusedError("the layers of the cache fill different slots")
        self.slots = slots.pop()
        ((self._part, _),) = parts
        self._stale = False
        self._bind()

    def _bind(self) -> None:
        stores = [layer.pages for layer in self._layers]
        views = [store.view() for store in stores]
        if self._bound is None:
            options = [
                ScoreOptions(
                    layer.scale, causal=True, window=layer.window,
                    query=choose_query("auto", view.format),
                    precision=choose_precision("auto", view.format),
                )
                for layer, view in zip(self._step.stack.layers, views, strict=True)
            ]  # fmt: skip
            readers = {
                n: self._reader(n)
                for n, layer in enumerate(self._layers)
                if layer.lists is not None
            }
            self._bound = BoundStep(self._step, views, options, self._part, readers)
        else:
            self._bound.move(views, self._part)
        self._seen = [
            (layer, store, store.spans[0], store._structure, store.pool.records, store.last_keys)
            for layer, store in zip(self._layers, stores, strict=True)
        ]

    def _reader(self, number: int) -> Reader | PageChoice:
        """What a layer with a selection reads, or who reads it."""
        stack, lists = self._step.stack, self._layers[number].lists
        if lists.audit is None:
            choice = page_choice(lists.selection, lists.number, stack.kv_heads, stack.query_heads)
            if choice is not None:
                return choice
        return functools.partial(self._read_listed, number)

    def _read_listed(self, number: int) -> bool:
        """Attend to what the selection of a layer chooses for the step's query, whose token is
        stored and counted already; False where that is everything. In one thread: how a list is
        split must not depend on how many there are."""
        layer, step = self._layers[number], self._step
        scores, readable = Scores(step.stack.layers[number].scale), Readable(causal=True)
        given: dict[str, Any] = {"query_lengths": None, "backend": self._reading.backend}
        query = step.q.clone()  # a list may be kept with the query that it was made for
        with one_thread():
            lists = layer.lists.arguments(query, layer.pages, readable, scores, given, False)
            if lists:
                given |= readable.arguments | scores.arguments | lists
                step.o.copy_(decode_attention(query, layer.pages, **given))
        return bool(lists)

    @property
    def _slot(self) -> int:
        """The row of the open part that the next token goes to."""
        span: Span = self._seen[0][2]
        return span.first if self._part == "first" else span.last

    @property
    def room(self) -> int:
        """Tokens that one call may take: those before the one that fills a page, or that one."""
        return max(PAGE - self._slot - (self._part == "last"), 1)

    def advance(self) -> tuple[int, int]:
        """Count one token in every layer, and its page where it fills one. Returns its slot in the
        open part, and 1 where the kernel has to count it in the tables that attention reads."""
        slot = self._slot
        closes = self._part == "last" and slot == PAGE - 1
        spans = [layer.pages.spans[0].copy() for layer in self._layers] if closes else None
        self._counting = _Before(self.slots, self._part, slot, spans)
        if closes:
            for n, layer in enumerate(self._layers):
                self.bound.pages[n] = close_page(layer.pages)
                layer.slots += 1
            self.slots += 1
            self._bind()
            self.bound.switch(True)
            return slot, 0
        self.bound.switch(False)
        self._count(1)
        return slot, 1

    def _count(self, tokens: int) -> None:
        for layer, _, own, *_ in self._seen:
            count_tokens(own, self._part, tokens)
            layer.slots += tokens
        self.slots += tokens
        self._stale = self._part == "first" and self._slot == PAGE

    def run(self, greedy: Greedy | None = None, most: int = 1) -> int:
        """One token, whose number and position the step knows, and greedily up to `most` (and
        `room`): counted, stored, computed. Returns how many. Where anything is raised meanwhile,
        such as an interrupt, the cache is as it was."""
        state = self._step.state
        try:
            state[STATE["slot"]], state[STATE["grown"]] = self.advance()
            count = 1
            if greedy is None:
                self.bound.run()
            elif (count := greedy.run(most)) > 1:
                self._count(count - 1)
            self._counting = None
            return count
        finally:
            self._undo()

    def _undo(self) -> None:
        """Forget the tokens of a call that were counted in some layers or in all, if it did not
        come to its end.

        What was written of them lies behind the ends of the sequences. It may be done twice:
        another interrupt may come meanwhile.
        """
        before = self._counting
        if before is None:
            return
        for n, layer in enumerate(self._layers):
            store = layer.pages
            span = store.spans[0]
            if before.spans is None:
                setattr(span, before.part, before.slot)
                span.length = before.slots
            elif span is not before.spans[n]:
                taken = span.pages[len(before.spans[n].pages) :]
                store.spans[0] = before.spans[n]
                store.pool.release(taken)
            store.changed()
            layer.slots = before.slots
            if layer.lists is not None:
                layer.lists.forget()
        self.slots, self._stale = before.slots, True
        self._counting = None


class _Before(NamedTuple):
    """A cache before a call: its slots, the open part and the row in it; spans: of each layer, if
    the call's token fills a page."""

    slots: int
    part: Part
    slot: int
    spans: list[Span] | None


def _check_layers(cache: LathCache, step: DecodeStep) -> None:
    if len(cache.layers) != len(step.stack.layers):
        raise NotFusedError(f"the cache has {len(cache.layers)} layers")
    for layer in cache.layers:
        if type(layer) is not PagedLayer:
            raise NotFusedError(f"the cache has a {type(layer).__name__}")


def _check_contents(layer: PagedLayer, step: DecodeStep) -> None:
    pages = layer.pages
    if pages is None or layer.slots == 0:
        raise NotFusedError("the cache is empty")
    if layer.pending is not None:
        raise NotFusedError("the cache holds tokens that were not stored")
    stack, fmt = step.stack, pages.format
    have = (pages.dtype, pages.num_kv_heads, fmt.key_dim, fmt.value_dim, pages.device.type)
    if have != (stack.dtype, stack.kv_heads, stack.head_dim, stack.head_dim, "cpu"):
        raise NotFusedError(f"the cache is of another kind: {have}")
    if (
        pages.key_channel_scales is not None
        or resolve_backend(pages.backend, pages.device) != "cpu"
    ):
        raise NotFusedError("the cache is not read by the compiled CPU kernels as it is")
    if pages.batch != 1:
        raise NotFusedError(f"a batch of {pages.batch}")
    if layer.valid is not None:
        raise NotFusedError("padding in the cache")
    if not is_plain(pages.spans[0]) or len(pages) != layer.slots:
        raise NotFusedError("tokens were dropped from the cache")
