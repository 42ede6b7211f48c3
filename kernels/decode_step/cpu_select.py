"""A selection of pages as rows of a step's program: scores, votes, the largest, attention over the
lists. One sequence, one thread."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.formats.selection import PageChoice
from lath.kernels.attention.cpu import DTYPES, BoundAttention
from lath.kernels.decode_step.cpu_votes import FIELDS, INDEX, emit_lists, emit_votes
from lath.kernels.select import cpu_top_k
from lath.kernels.select.cpu_arguments import FIELDS as SCORE_FIELDS
from lath.kernels.select.cpu_arguments import INDEX as SCORE
from lath.kernels.select.cpu_launch import block_of, divide
from lath.kernels.select.cpu_scores import emit_page_scores
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import LANES
from lath.kernels.simd.program import row


class BoundSelection:
    """What reads a choice of pages of one layer. `rows`: of a program; `move` as for attention."""

    def __init__(
        self,
        queries: Queries,
        view: PageView,
        choice: PageChoice,
        options: ScoreOptions,
        o: Tensor,
        lse: Tensor,
        scratch: Tensor | None,
    ) -> None:
        self._queries, self._choice, self._scale = queries, choice, options.scale
        self._scores = np.zeros(len(SCORE_FIELDS), np.int64)
        self._votes = np.zeros(len(FIELDS), np.int64)
        self._top = np.zeros(len(cpu_top_k.FIELDS), np.int64)
        self._fill(view)
        self.attention = BoundAttention(
            queries, self._listed(view), options, o, lse, 1, 1, scratch
        )  # fmt: skip
        dtype, group = DTYPES[queries.q.dtype], queries.q.shape[1] // choice.lists
        kernels = (
            (compile_kernel(emit_page_scores, choice.score, dtype), 1, self._scores),
            (compile_kernel(emit_votes, int(group == 1)), choice.lists, self._votes),
            (compile_kernel(cpu_top_k.emit_top_k), 1, self._top),
            (compile_kernel(emit_lists), choice.lists, self._votes),
        )
        self.rows = [row(kernel, n, block.ctypes.data) for kernel, n, block in kernels]
        self.rows.append(row(self.attention.kernel, 1, self.attention.address))

    def move(self, view: PageView) -> None:
        self._fill(view)
        self.attention.move(self._listed(view))

    def _fill(self, view: PageView) -> None:
        """Memory for the lists of a view, and the arguments of the rows before attention."""
        if view.table.shape[1] == 0:  # no page yet: one entry that holds nothing
            empty = view.table.new_zeros((1, 1))
            view = dataclasses.replace(view, table=empty, starts=empty, counts=empty)
        lists, heads = self._choice.lists, int(self._queries.q.shape[1])
        width = int(view.table.shape[1])
        k = min(self._choice.pages + self._choice.recent, width)
        padded = -(-width // LANES) * LANES
        division = divide(1, view.num_kv_heads, heads // view.num_kv_heads, 1, width, 1)
        block, alive = block_of(self._queries, view, self._scale, division)
        scores = torch.full((heads, width), float("-inf"))
        block[SCORE["out"]] = scores.data_ptr()
        self._scores[:] = block
        votes, scratch = torch.empty(lists, width), torch.full((2, padded), float("-inf"))
        self._lists = torch.zeros((4, lists, k), dtype=torch.int32)  # and, first, the indices
        self._page_counts = torch.zeros((1, lists), dtype=torch.int32)
        forced = min(self._choice.recent, width)
        for name, value in zip(
            ("scores", "votes", "scratch", "indices", "table", "starts", "counts", "page_counts"),
            (scores, votes, scratch, self._lists, view.table, view.starts, view.counts,
             self._page_counts),
            strict=True,
        ):  # fmt: skip
            self._votes[INDEX[name]] = value.data_ptr()
        for n, name in enumerate(("listed_table", "listed_starts", "listed_counts"), 1):
            self._votes[INDEX[name]] = self._lists[n].data_ptr()
        for name, number in (
            ("width", width), ("group", heads // lists), ("k", k),
            ("forced", forced if int(view.page_counts[0]) else 0),
        ):  # fmt: skip
            self._votes[INDEX[name]] = number
        keys = torch.empty(padded * 4, dtype=torch.uint8)
        self._top[:7] = (
            votes.data_ptr(), keys.data_ptr(), self._lists.data_ptr(), lists, width, k, 4 * padded,
        )  # fmt: skip
        self._kept: list[Any] = [view, alive, scores, votes, scratch, keys]

    def _listed(self, view: PageView) -> PageView:
        """The view with its lists in the place of its pages."""
        heads = max(self._choice.lists, view.num_kv_heads)

        def wide(tensor: Tensor) -> Tensor:
            return tensor[None].expand(1, heads, -1)

        return dataclasses.replace(
            view, table=wide(self._lists[1]), starts=wide(self._lists[2]),
            counts=wide(self._lists[3]), page_counts=self._page_counts.expand(1, heads),
            listed=view.longest,
        )  # fmt: skip
