"""Natural loops of a straight list of instructions, from where each of them may go next."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

# Where an instruction goes: None if just to the next one, else the indices it may go to.
Flow = Sequence[tuple[int, ...] | None]


@dataclasses.dataclass(frozen=True)
class NaturalLoop:
    """instructions: indices in program order. inner: the loops inside it, by their position."""

    instructions: tuple[int, ...]
    inner: tuple[int, ...]


def natural_loops(flow: Flow) -> list[NaturalLoop]:
    """Loops of the control-flow graph: back edges to a dominator, merged per loop header.

    Address ranges between a backward branch and its target would count slow paths that the
    compiler moved out of line, and miss those inside.
    """
    if not flow:
        return []
    starts, successors = _basic_blocks(flow)
    ends = [*starts[1:], len(flow)]
    bodies = _loop_bodies(successors)
    loops = []
    for body in bodies:
        indices = [i for block in sorted(body) for i in range(starts[block], ends[block])]
        inner = tuple(position for position, other in enumerate(bodies) if other < body)
        loops.append(NaturalLoop(tuple(indices), inner))
    return loops


def _basic_blocks(flow: Flow) -> tuple[list[int], list[list[int]]]:
    """First instruction of each block, and the successors of each block."""
    leaders = {0}
    for index, targets in enumerate(flow):
        if targets is not None:
            leaders.update(t for t in (*targets, index + 1) if t < len(flow))
    starts = sorted(leaders)
    block_at = {start: block for block, start in enumerate(starts)}
    successors = []
    for end in [*starts[1:], len(flow)]:
        targets = flow[end - 1]
        following = (end,) if targets is None else targets
        successors.append([block_at[t] for t in following if t in block_at])
    return starts, successors


def _reverse_postorder(successors: list[list[int]]) -> list[int]:
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, remaining = stack[-1]
        for following in remaining:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(successors[following])))
                break
        else:
            order.append(block)
            stack.pop()
    return order[::-1]


def _immediate_dominators(order: list[int], predecessors: list[list[int]]) -> dict[int, int]:
    """The iterative algorithm of Cooper, Harvey and Kennedy over the reverse postorder."""
    number = {block: position for position, block in enumerate(order)}
    dominator = {order[0]: order[0]}

    def common(a: int, b: int) -> int:
        while a != b:
            while number[a] > number[b]:
                a = dominator[a]
            while number[b] > number[a]:
                b = dominator[b]
        return a

    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [p for p in predecessors[block] if p in dominator]
            best = known[0]
            for other in known[1:]:
                best = common(other, best)
            if dominator.get(block) != best:
                dominator[block] = best
                changed = True
    return dominator


def _loop_bodies(successors: list[list[int]]) -> list[frozenset[int]]:
    order = _reverse_postorder(successors)
    reachable = set(order)
    predecessors: list[list[int]] = [[] for _ in successors]
    for block in order:
        for following in successors[block]:
            predecessors[following].append(block)
    dominator = _immediate_dominators(order, predecessors)

    def dominates(header: int, block: int) -> bool:
        while block != header:
            if block == dominator[block]:
                return False
            block = dominator[block]
        return True

    bodies: dict[int, set[int]] = {}
    for block in order:
        for header in successors[block]:
            if not dominates(header, block):
                continue
            body = bodies.setdefault(header, {header})
            pending = [block]
            while pending:
                inside = pending.pop()
                if inside not in body:
                    body.add(inside)
                    pending.extend(p for p in predecessors[inside] if p in reachable)
    return [frozenset(body) for _, body in sorted(bodies.items())]
