"""The kernel between the products of a layer and its attention: heads normalised, rotated, stored.

Its units are the heads of queries, then of keys, then of values. Queries go to where attention
finds them, keys and values into the open float part of the cache, all rounded once.
"""

from __future__ import annotations

from typing import Any

from lath.kernels.decode_step.cpu_arguments import HeadArguments, StateFields
from lath.kernels.decode_step.cpu_vectors import VECTOR, inverse_root
from lath.kernels.simd.emitter import FLOATS, I32, ITEM_BYTES, LANES, Emitter

LONGEST_HEAD = 256


def emit_heads(
    e: Emitter,
    begin: Any,
    end: Any,
    arguments: Any,
    kind: int,
    rotates: bool,
    query_norm: bool,
    key_norm: bool,
) -> None:
    """Heads begin .. end - 1. kind: type of q, of the cache and of the norms' weights."""
    heads = _Heads(e, arguments, kind)
    a = heads.a
    both = e.add(a["query_heads"], a["kv_heads"])
    with e.loop(e.subtract(end, begin)) as index:
        unit = e.add(begin, index)
        with e.choice(e.less(unit, a["query_heads"])) as (is_query, other):
            with is_query:
                target = heads.place("q", unit)
                heads.emit("query", unit, target, rotates, query_norm)
            with other, e.choice(e.less(unit, both)) as (is_key, is_value):
                with is_key:
                    head = e.subtract(unit, a["query_heads"])
                    heads.emit("key", head, heads.slot("key", head), rotates, key_norm)
                with is_value:
                    head = e.subtract(unit, both)
                    heads.emit("value", head, heads.slot("value", head), False, False)
        with e.when(e.builder.icmp_signed("==", unit, e.integer(0))):
            heads.lengthen()


class _Heads:
    def __init__(self, e: Emitter, arguments: Any, kind: int) -> None:
        self.e, self.kind = e, kind
        self.a = HeadArguments(e, arguments)
        self.state = StateFields(e, self.a["state"])
        self.size = self.a["head_dim"]
        # A head twice in a row: half a head further stands what a channel is rotated with.
        self.wide = e.buffer(2 * LONGEST_HEAD // LANES)

    def place(self, name: str, head: Any) -> Any:
        """The address of a head of `q`."""
        return self.e.offset(self.a[name], self.e.multiply(head, self.size), ITEM_BYTES[self.kind])

    def slot(self, side: str, head: Any) -> Any:
        """Where the cache takes a head of the token's keys or values."""
        e, a = self.e, self.a
        address = e.add(a[f"{side}s"], e.multiply(head, a[f"{side}_head"]))
        return e.add(address, e.multiply(self.state["slot"], a[f"{side}_row"]))

    def emit(self, side: str, head: Any, target: Any, rotates: bool, normalises: bool) -> None:
        e, b = self.e, self.e.builder
        source = e.offset(self.a[side], e.multiply(head, self.size), 4)
        vectors = e.divide(self.size, LANES)
        step = LANES * ITEM_BYTES[self.kind]
        if normalises:
            inverse = inverse_root(e, source, self.size, self.a.real(f"{side}_epsilon"))

        def value_of(i: Any) -> Any:
            value = e.load(e.offset(source, i, VECTOR), FLOATS)
            if not normalises:
                return value
            weight = e.load_floats(e.offset(self.a[f"{side}_weight"], i, step), self.kind)
            return b.fmul(weight, b.fmul(value, inverse))

        if not rotates:
            with e.loop(vectors) as i:
                e.store(e.offset(target, i, step), e.round_floats(value_of(i), self.kind))
            return
        again = e.offset(self.wide, self.size, 4)
        with e.loop(vectors) as i:
            value = value_of(i)
            e.store(e.offset(self.wide, i, VECTOR), value)
            e.store(e.offset(again, i, VECTOR), value)
        partner = e.offset(self.wide, self.size, 2)
        cosines = e.add(
            self.state["rotations"], e.multiply(e.multiply(self.state["position"], self.size), 8)
        )
        sines = e.offset(cosines, self.size, 4)
        with e.loop(vectors) as i:
            x, y, cosine, sine = (
                e.load(e.offset(address, i, VECTOR), FLOATS)
                for address in (self.wide, partner, cosines, sines)
            )
            rotated = b.fadd(b.fmul(x, cosine), b.fmul(y, sine))
            e.store(e.offset(target, i, step), e.round_floats(rotated, self.kind))

    def lengthen(self) -> None:
        """Count the token in the cache's lengths, where that is still to be done."""
        e, grown = self.e, self.e.builder.trunc(self.state["grown"], I32)
        for name in ("lengths", "part_lengths"):
            address = self.a[name]
            e.store(address, e.add(e.load(address, I32), grown))
