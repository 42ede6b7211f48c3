"""A step of decoding bound to one cache: where its pages and float parts lie, which changes when a
page fills, and who reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.formats.page_step import Part
from lath.formats.pages import PAGE
from lath.formats.selection import PageChoice
from lath.kernels.attention.cpu import BoundAttention
from lath.kernels.decode_step.cpu import DecodeStep
from lath.kernels.decode_step.cpu_arguments import HEAD
from lath.kernels.decode_step.cpu_divided import DividedAttention
from lath.kernels.decode_step.cpu_select import BoundSelection
from lath.kernels.pages.cpu import BoundWriter
from lath.kernels.simd.program import Pieces, Program, Row, row

Block = NDArray[np.int64]
# Computes o of q in the place of attention over all pages; False: nothing was done.
Reader = Callable[[], bool]


class BoundStep:
    """A step over one cache, one sequence. views, options: of each layer. readers: by number,
    of the layers that may read a part of their pages (`DecodeStep.o` of `DecodeStep.q`), what they
    read or who reads it.

    `move` says where the cache lies; it must be called again whenever that has changed.
    """

    def __init__(
        self,
        step: DecodeStep,
        views: Sequence[PageView],
        options: Sequence[ScoreOptions],
        part: Part,
        readers: Mapping[int, Reader | PageChoice] | None = None,
    ) -> None:
        self.step, readers = step, readers or {}
        self._layer_rows: list[list[Row | Callable[[], None]]] = []
        self._heads: list[Block] = []
        self._attentions: list[BoundAttention | BoundSelection] = []
        self._writers: list[BoundWriter] = []
        self._divided: dict[int, DividedAttention] = {}
        self.jobs = torch.zeros((len(views), 1, 4), dtype=torch.int32)
        self.jobs[..., 2] = PAGE
        self.pages = self.jobs.numpy()[:, 0, 3]  # of each layer: the one that is written
        self._queries = Queries(step.q, step.one, 1)
        # Layers run one by one: in one scratch, which stays in the cache. Divided attention has
        # another, which helpers write to.
        self._scratch: Tensor | None = None
        self._apart: Tensor | None = None
        for n, (view, scores) in enumerate(zip(views, options, strict=True)):
            heads_row, heads = step.heads_row(step.stack.layers[n])
            writer = BoundWriter(view.format, step.q.dtype, self.jobs[n], step.stack.kv_heads, 1)
            self._layer_rows.append([
                *step.before[n], heads_row, row(writer.kernel, 1, writer.address),
                *self._reads(n, view, scores, readers.get(n)), *step.after[n],
            ])  # fmt: skip
            self._heads.append(heads)
            self._writers.append(writer)
        inner = [row for rows in self._layer_rows for row in rows]
        self.rows = [step.first_row, *inner, *step.last_rows]
        self._program = Pieces(self.rows, step.tally)
        self.move(views, part)
        self.writes = True
        self.switch(False)

    def _reads(
        self, n: int, view: PageView, scores: ScoreOptions, reader: Reader | PageChoice | None
    ) -> list[Row | Callable[[], None]]:
        """What computes o of q in layer n."""
        step, queries = self.step, self._queries
        if isinstance(reader, PageChoice):
            chosen = BoundSelection(
                queries, view, reader, scores, step.o, step.lse, self._scratch
            )  # fmt: skip
            self._attentions.append(chosen)
            self._scratch = chosen.attention.scratch
            return [*chosen.rows]
        attention = BoundAttention(
            queries, view, scores, step.o, step.lse, 1, 1, self._scratch
        )  # fmt: skip
        self._attentions.append(attention)
        self._scratch = attention.scratch
        own = row(attention.kernel, 1, attention.address)
        if reader is not None:
            return [functools.partial(_read, reader, Program([own]))]
        divided = DividedAttention(
            queries, view, scores, step.o, step.lse, self._apart, step.memory
        )  # fmt: skip
        self._divided[n], self._apart = divided, divided.scratch
        return [(*own[:4], divided.share, 1)]

    def move(self, views: Sequence[PageView], part: Part) -> None:
        """views: of each layer, the same formats as ever. part: the open one, to which tokens are
        added."""
        self._views = views
        for view, heads, attention, writer in zip(
            views, self._heads, self._attentions, self._writers, strict=True
        ):
            attention.move(view)
            assert view.last_keys is not None
            assert view.last_values is not None
            writer.move(view.last_keys, view.last_values, view.records, view.index)
            _enter_part(heads, view, part)
        for n, divided in self._divided.items():
            divided.move(views[n])

    def switch(self, writes: bool) -> None:
        """Whether the open part becomes a page in each layer (`pages`) before attention reads."""
        if writes != self.writes:
            for writer in self._writers:
                writer.switch(writes)
            self.writes = writes  # last: an interrupt may come between two of them

    def run(self) -> None:
        """One token: `DecodeStep.state` says which and where."""
        self._program.run(self)

    def run_layer(self, number: int) -> None:
        """One layer: the residual goes in and comes out."""
        Pieces(self._layer_rows[number], self.step.tally).run(self)


def _read(reader: Reader, everything: Program) -> None:
    if not reader():
        everything.run()


def _enter_part(block: Block, view: PageView, part: Part) -> None:
    keys, values = getattr(view, f"{part}_keys"), getattr(view, f"{part}_values")
    for side, tensor in (("key", keys), ("value", values)):
        size = tensor.element_size()
        _, head, token, _ = tensor.stride()
        block[HEAD[f"{side}s"]] = tensor.data_ptr()
        block[HEAD[f"{side}_head"]], block[HEAD[f"{side}_row"]] = head * size, token * size
    block[HEAD["lengths"]] = view.lengths.data_ptr()
    block[HEAD["part_lengths"]] = getattr(view, f"{part}_lengths").data_ptr()
