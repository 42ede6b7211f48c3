"""Attention of a step divided among a team: a unit for each KV head."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.kernels.attention.cpu import BoundAttention
from lath.kernels.attention.cpu_arguments import INDEX
from lath.kernels.simd.helpers import team
from lath.kernels.simd.program import Output, Share


class DividedAttention:
    """The same attention as one of all heads at once, bit for bit. `move` as for that.

    share: None where a unit is not a head: one KV head, or more rows than a tile has.
    """

    def __init__(
        self,
        queries: Queries,
        view: PageView,
        options: ScoreOptions,
        o: Tensor,
        lse: Tensor,
        scratch: Tensor | None,
        memory: dict[tuple[int, int], Tensor],
    ) -> None:
        heads = view.num_kv_heads
        self._attention = BoundAttention(queries, view, options, o, lse, 1, heads, scratch)
        self.scratch, self._view = self._attention.scratch, view
        self.share: Share | None = None
        if self._attention.division.units != heads or heads == 1:
            return
        block = np.frombuffer(self._attention.block, np.int64)
        own = {
            INDEX["lse"]: lse.nbytes, INDEX["scratch"]: heads * int(block[INDEX["slot"]]),
            INDEX["states"]: heads * int(block[INDEX["state"]]),
        }  # fmt: skip
        output = Output(INDEX["o"], o.nbytes // heads, o.nbytes)
        self.share = Share(block, output, heads, each=True, own=own, memory=memory)

    def move(self, view: PageView) -> None:
        self._attention.move(view)
        if self.share is not None and self.share.helpers:
            # Helpers get arguments anew: one that lost its core may still follow the old ones.
            team().leave(self._view)
            self.share.prepare(self.share.helpers)
        self._view = view
