"""A bound step that chooses the likeliest token and goes on with it, several tokens in one call.

What Python does between two tokens, little as it is, finds its memory cold after each of them: the
weights have gone through every cache. So a call goes on without it, to an end or as far as it may.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lath.formats.pages import PAGE
from lath.kernels.decode_step.cpu_arguments import (
    FOLLOW,
    STATE,
    VECTOR,
    FollowArguments,
    StateFields,
    block_of,
)
from lath.kernels.decode_step.cpu_vectors import emit_largest
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import I64, Emitter
from lath.kernels.simd.program import Pieces, row

if TYPE_CHECKING:
    from lath.kernels.decode_step.cpu_bound import BoundStep


class Greedy:
    """bound: a step with a head, which writes `logits` [.., V]. ends: tokens behind which a call
    stops.

    repeats: whether a call may go on; where Python takes part in a layer, each is one token.
    """

    def __init__(self, bound: BoundStep, logits: Tensor, ends: Iterable[int]) -> None:
        step = bound.step
        self.state, self.logits = step.state, logits
        self._tokens: NDArray[np.int64] = np.zeros(PAGE, np.int64)
        last = np.array(sorted(ends), np.int64)
        address = self.state.ctypes.data
        largest = block_of(VECTOR, state=address, columns=logits.numel(), x=logits.data_ptr())
        follow = block_of(
            FOLLOW, state=address, tokens=self._tokens.ctypes.data, ends=last.ctypes.data,
            count=len(last),
        )  # fmt: skip
        self._kept = (bound, last, largest, follow)
        rows = [
            *bound.rows,
            row(compile_kernel(emit_largest, step.kind), 1, largest.ctypes.data),
            row(compile_kernel(emit_follow), 1, follow.ctypes.data),
        ]
        self._program = Pieces(rows, step.tally, address + 8 * STATE["left"])
        self.repeats = self._program.repeats

    def run(self, most: int) -> int:
        """Up to `most` tokens; returns how many."""
        self.state[STATE["left"]], self.state[STATE["more"]] = most, 0
        self._program.run(self)
        return 1 + int(self.state[STATE["more"]])

    def tokens(self, count: int) -> list[int]:
        """What the last call found behind each of its tokens."""
        found: list[int] = self._tokens[:count].tolist()
        return found


def emit_follow(e: Emitter, begin: Any, end: Any, arguments: Any) -> None:
    """Write down the token that was found. Unless it is an end, or the call's last, it is the next
    one to be computed, at the next position and slot; `left` says whether."""
    a, b = FollowArguments(e, arguments), e.builder
    state = StateFields(e, a["state"])
    token, more = state["token"], state["more"]
    e.store(e.offset(a["tokens"], more, 8), token)
    left = e.variable(e.subtract(state["left"], 1))
    with e.loop(a["count"]) as i:
        is_end = b.icmp_signed("==", e.load(e.offset(a["ends"], i, 8), I64), token)
        left.value = b.select(is_end, e.integer(0), left.value)
    goes_on = b.zext(e.less(e.integer(0), left.value), I64)
    changed = {name: e.add(state[name], goes_on) for name in ("more", "position", "slot")}
    for name, value in {"left": left.value, **changed}.items():
        e.store(e.add(a["state"], 8 * STATE[name]), value)
