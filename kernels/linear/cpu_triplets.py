"""Ternary weights by look-up in registers, on a CPU whose vpermw is as quick as its vpdpbusd.

Three weights of a row are an index into the 27 sums that three activations can make, and a register
holds those sums: one permutation fetches them for 32 rows, one addition in 16 bits adds them. That
is 96 products for two instructions, which a Zen 4 core does in a cycle (in a loop with all that it
needs 77); its vpdpbusd does 64 a cycle.

    word     uint16 [32 rows], three indices of 5 bits: 9 columns in 16 bits, 1.78 bits a weight; of
             a pair of panels, low halves of lanes are the even one's rows
    run      words [pairs, 28], of 252 columns (the last one of fewer): read from end to end
    tables   int16 [84, tokens, 32], of a run: first-level cache holds those of four tokens

An entry is at most 3 * 127, and 84 of them are added before the sums are widened: 32004 < 2**15.
The integers are those of the products.
"""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir

from lath.formats.activations import LARGEST_CODE
from lath.formats.packing import PANEL
from lath.kernels.linear.cpu_arguments import Arguments
from lath.kernels.linear.cpu_record import VECTOR_BYTES, Output
from lath.kernels.simd import lanes
from lath.kernels.simd.emitter import F32, I16, INTS, Emitter

WEIGHTS_OF_INDEX = 3
INDICES = 3  # of a word
COLUMNS = WEIGHTS_OF_INDEX * INDICES
ENTRIES = 3**WEIGHTS_OF_INDEX
INDEX_BITS = 5
PAIR = 2  # panels whose rows share vectors
# Words until int16 sums are full.
RUN = (2**15 - 1) // (WEIGHTS_OF_INDEX * LARGEST_CODE * INDICES)
# Vectors of sums on the stack (128 KB): tables are made anew for each chunk of rows they are of.
_SUMS = 2048
_TOGETHER = 2  # pairs that a table in a register is looked up for (`lanes.add_permuted`)
# Bytes that a run is asked for ahead, each line twice: the hardware's own prefetching stops at each
# 4 KB, and of what is asked for faster than memory brings it some is dropped. One token of
# 4096 x 14336 took 534 us with 7 KB, 492 with 8, 455 with 8 and 4 (also with 8 and 5, or 6).
_AHEAD = (8192, 4096)
_WORDS = ir.VectorType(I16, 2 * PANEL)
_ALL_ONE = 0x010101  # three codes of 1, in bytes
_HALVES = (1, 1 << 16)  # pairs of 16 bits: 1 beside the half that is taken


def emit_triplets(e: Emitter, begin: Any, end: Any, arguments: Any, tokens: int) -> None:
    """All tokens in tiles of `tokens`, panels [begin, end); begin is even."""
    a = Arguments(e, arguments)
    loop = _Triplets(e, a, tokens)
    room = _SUMS // (PAIR * tokens)
    before, behind = e.divide(begin, PAIR), e.divide(e.add(end, PAIR - 1), PAIR)
    runs = e.divide(e.add(loop.words, RUN - 1), RUN)
    with e.loop(e.divide(e.add(e.subtract(behind, before), room - 1), room)) as chunk:
        first = e.add(before, e.multiply(chunk, room))
        count = e.smaller_of(e.subtract(behind, first), room)
        with e.loop(e.divide(e.add(a["tokens"], tokens - 1), tokens)) as tile:
            loop.clear(count)
            with e.loop(runs) as run:
                start = e.multiply(run, RUN)
                words = e.smaller_of(e.subtract(loop.words, start), RUN)
                loop.make_tables(tile, start, words)
                loop.add_entries(first, count, start, words)
            loop.finish(first, count, tile, end)


class _Triplets:
    """Tables and sums of one chunk of rows and one tile of tokens, on the stack."""

    def __init__(self, e: Emitter, a: Arguments, tokens: int) -> None:
        self.e, self.a, self.tokens = e, a, tokens
        self.words = e.divide(e.add(a["columns"], COLUMNS - 1), COLUMNS)
        self.pairs = e.divide(e.add(a["panels"], PAIR - 1), PAIR)
        self.tables = e.buffer(RUN * INDICES * tokens)
        self.sums = e.buffer(_SUMS)
        self.output = Output(e, a)

    def clear(self, pairs: Any) -> None:
        e = self.e
        with e.loop(e.multiply(pairs, PAIR * self.tokens)) as i:
            e.store(e.offset(self.sums, i, VECTOR_BYTES), e.constant(0))

    def make_tables(self, tile: Any, start: Any, words: Any) -> None:
        """The sums of every three columns of a run, for each token of the tile."""
        e, a = self.e, self.a
        codes = [_codes_of(first) for first in (0, PANEL)]
        order = [half + lane for lane in range(0, 2 * PANEL, 2) for half in (0, 2 * PANEL)]
        last = e.subtract(a["tokens"], 1)
        # A tile over the end computes the last token again, which is harmless.
        tokens = [
            e.smaller_of(e.add(e.multiply(tile, self.tokens), m), last) for m in range(self.tokens)
        ]
        column = e.add(a["codes"], e.multiply(start, COLUMNS))
        sources = [e.add(column, e.multiply(token, a["group"])) for token in tokens]
        with e.loop(e.multiply(words, INDICES)) as index:
            table = e.offset(self.tables, index, VECTOR_BYTES * self.tokens)
            for m, source in enumerate(sources):
                x = e.broadcast(e.offset(source, index, WEIGHTS_OF_INDEX))
                # Codes 0, 1 and 2 stand for -1, 0 and 1.
                ones = e.dot(e.constant(0), e.constant(_ALL_ONE), x, narrow=True)
                least = e.builder.sub(e.constant(0), ones)
                halves = [
                    e.builder.bitcast(e.dot(least, own, x, narrow=True), _WORDS) for own in codes
                ]
                e.store(e.add(table, VECTOR_BYTES * m), e.shuffle(halves[0], halves[1], order))

    def add_entries(self, first: Any, pairs: Any, start: Any, words: Any) -> None:
        """Sums of every row plus the entries that its words of a run name."""
        e = self.e
        skipped = e.multiply(start, self.pairs)
        steps = e.divide(e.add(pairs, _TOGETHER - 1), _TOGETHER)
        size = PAIR * self.tokens * VECTOR_BYTES
        with e.loop(steps) as step:
            begin, last = e.multiply(step, _TOGETHER), e.subtract(pairs, 1)
            # A step over the end does the last pair again, which is harmless.
            some = [e.smaller_of(e.add(begin, n), last) for n in range(_TOGETHER)]
            places = [
                e.add(e.offset(self.sums, pair, size), vector)
                for pair in some
                for vector in range(0, size, VECTOR_BYTES)
            ]
            vectors = []
            for pair in some:
                own = e.add(skipped, e.multiply(e.add(first, pair), words))
                vectors.append(e.offset(self.a["records"], own, VECTOR_BYTES))
            # All are read before any is written: two of them may be the same pair.
            sums = [e.load(place) for place in places]
            for place, value in zip(places, self._add_run(vectors, words, sums), strict=True):
                e.store(place, value)

    def _add_run(self, vectors: list[Any], words: Any, sums: list[Any]) -> list[Any]:
        """Sums and one run of some pairs, in 16 bits first: low halves are even panels."""
        e = self.e
        totals = [
            e.variable(ir.Constant(_WORDS, [0] * _WORDS.count))
            for _ in range(self.tokens * _TOGETHER)
        ]
        with e.loop(words) as i:
            addresses = [e.offset(start, i, VECTOR_BYTES) for start in vectors]
            for address, distance in itertools.product(addresses, _AHEAD):
                e.prefetch(e.add(address, distance))
            own = [e.load(address, _WORDS) for address in addresses]
            table = e.offset(self.tables, i, INDICES * self.tokens * VECTOR_BYTES)
            for index in range(INDICES):
                if index:
                    bits = ir.Constant(_WORDS, [INDEX_BITS] * _WORDS.count)
                    own = [e.builder.lshr(word, bits) for word in own]
                for m in range(self.tokens):
                    place = e.add(table, (index * self.tokens + m) * VECTOR_BYTES)
                    entries = e.load(place, _WORDS)
                    some = totals[m :: self.tokens]
                    values = lanes.add_permuted(e, entries, own, [one.value for one in some])
                    for total, value in zip(some, values, strict=True):
                        total.value = value
        both = [e.builder.bitcast(total.value, INTS) for total in totals]
        halves = itertools.product(both, map(e.constant, _HALVES))
        return [lanes.add_pairs(e, own, *half) for own, half in zip(sums, halves, strict=True)]

    def finish(self, first: Any, pairs: Any, tile: Any, end: Any) -> None:
        """Scale the integers and store y."""
        e, a = self.e, self.a
        token = e.multiply(tile, self.tokens)
        left = e.smaller_of(e.subtract(a["tokens"], token), self.tokens)
        start = e.multiply(first, PAIR)
        # The last pair may have one panel.
        with e.loop(e.smaller_of(e.multiply(pairs, PAIR), e.subtract(end, start))) as i:
            panel = e.add(start, i)
            scales = e.load(e.offset(a["row_scales"], panel, VECTOR_BYTES), e.floats(0.0).type)
            pair, odd = e.divide(i, PAIR), e.remainder(i, PAIR)
            own = e.add(e.multiply(pair, PAIR * self.tokens), odd)
            with e.loop(left) as m:
                side = e.multiply(e.add(token, m), 4)
                exact = e.load(e.offset(self.sums, e.add(own, e.multiply(m, PAIR)), VECTOR_BYTES))
                factor = e.builder.fmul(scales, e.broadcast(e.add(a["scales"], side), F32))
                value = e.builder.fmul(e.to_floats(exact), factor)
                self.output.store(e.add(token, m), panel, value)


def _codes_of(first: int) -> Any:
    """Lane l: the codes of three columns, in bytes, that entry first + l of a table is of; none
    beyond the last."""
    entries = [entry if entry < ENTRIES else 0 for entry in range(first, first + PANEL)]
    codes = [(entry // 9, entry // 3 % 3, entry % 3) for entry in entries]
    return ir.Constant(INTS, [c0 | c1 << 8 | c2 << 16 for c0, c1, c2 in codes])
