"""Scores of pages from their index rows, 16 entries of a table by 4 rows of q at a time."""

from __future__ import annotations

from typing import Any

from lath.formats.selection import FREEZING
from lath.kernels.select.cpu_arguments import ROWS, TILE, Arguments, Context
from lath.kernels.select.cpu_dots import Quads
from lath.kernels.select.cpu_units import (
    Tile,
    Unit,
    prepare_pages,
    prepare_rows,
    prepare_targets,
    share,
    tiles_of,
)
from lath.kernels.simd.emitter import F32, FLOATS, I64, Emitter


def emit_page_scores(
    e: Emitter, thread: Any, threads: Any, arguments: Any, kind: str, dtype: int
) -> None:
    """The units thread, thread + threads, … of all. kind: of `PageScore`."""
    a = Arguments(e, arguments)
    c = Context(e, a, dtype)
    with e.loop(share(c, thread, threads)) as i:
        unit = Unit(c, thread, e.add(thread, e.multiply(i, threads)))
        with e.when(c.b.not_(unit.empty)):
            prepare_rows(c, unit, kind == "mass")
            prepare_targets(c, unit, a["out"], e.multiply(a["width"], 4))
            prepare_pages(c, unit, kind in ("mass", "floor"))
            with e.loop(tiles_of(c, unit)) as t, e.loop(unit.heads) as h:
                tile = Tile(c, unit, t, h)
                with e.loop(unit.blocks) as block:
                    _sum(c, tile, block, kind)
                    for r in range(ROWS):
                        _store_row(c, tile, block, r, _score(c, tile, kind, r))


def _sum(c: Context, tile: Tile, block: Any, kind: str) -> None:
    if kind == "mass":
        sum_mass(c, tile, block)
        return
    rows = rows_of_block(c, tile, block, "q")
    quads = Quads(c, tile, rows)
    {"mean": quads.means, "bound": quads.bounds, "floor": quads.floors}[kind]()


def rows_of_block(c: Context, tile: Tile, block: Any, name: str) -> Any:
    row_bytes = c.e.multiply(c.a["stored_keys"], 4)
    return tile.unit.row_of(name, tile.h, c.e.multiply(block, ROWS), row_bytes)


def sum_mass(c: Context, tile: Tile, block: Any) -> None:
    """Centres and spreads of the entries of a tile for 4 rows, and the entries' index units."""
    e = c.e
    sum_centres(c, tile, block)
    Quads(c, tile, rows_of_block(c, tile, block, "squares")).deviations()
    units = tile.unit.piece("units")
    with e.loop(tile.count) as entry:
        unit = e.load(e.add(tile.row(entry), c.a["numbers"]), F32)
        e.store(e.offset(units, entry, 4), unit)


def sum_centres(c: Context, tile: Tile, block: Any) -> None:
    """Centres of the entries of a tile for 4 rows."""
    Quads(c, tile, rows_of_block(c, tile, block, "q")).means()


def centre_of(c: Context, tile: Tile, r: int) -> Any:
    """log Σ exp of the scores of 16 entries, were they all those of the centre, for row r."""
    log = c.e.load(tile.per_entry("logs"), FLOATS)
    return c.e.fma(c.e.splat(c.a.real("scale")), dots_of(c, tile, r), log)


def mass_of(c: Context, tile: Tile, r: int) -> tuple[Any, Any]:
    """log Σ exp of the scores of 16 entries, about, and their spread σ, for row r."""
    e, b = c.e, c.b
    scale = e.splat(c.a.real("scale"))
    squares = dots_of(c, tile, ROWS + r)
    root = e.function("llvm.sqrt.v16f32", FLOATS, [FLOATS])
    unit = b.fmul(e.load(tile.unit.piece("units"), FLOATS), e.floats(0.5))
    sigma = b.fmul(b.fmul(scale, unit), b.call(root, [squares]))
    normal = b.fmul(b.fmul(sigma, sigma), e.floats(0.5))
    frozen = e.fma(sigma, e.floats(FREEZING), e.floats(-(FREEZING**2) / 2))
    mean_of_exp = b.select(b.fcmp_ordered("<=", sigma, e.floats(FREEZING)), normal, frozen)
    log = e.load(tile.per_entry("logs"), FLOATS)
    return b.fadd(e.fma(scale, dots_of(c, tile, r), mean_of_exp), log), sigma


def dots_of(c: Context, tile: Tile, row: int) -> Any:
    return c.e.load(c.e.add(tile.unit.piece("dots"), 4 * TILE * row), FLOATS)


def _score(c: Context, tile: Tile, kind: str, r: int) -> Any:
    e = c.e
    if kind == "mass":
        return mass_of(c, tile, r)[0]
    if kind == "floor":
        return centre_of(c, tile, r)
    return c.b.fmul(e.splat(c.a.real("scale")), dots_of(c, tile, r))


def _store_row(c: Context, tile: Tile, block: Any, r: int, scores: Any) -> None:
    e = c.e
    n = e.add(e.multiply(block, ROWS), r)
    target = e.load(tile.unit.row_of("targets", tile.h, n, e.integer(8)), I64)
    place = e.offset(target, e.add(tile.unit.begin, tile.first), 4)
    with e.choice(e.less(tile.count, TILE)) as (part, whole):
        with whole:
            e.store(place, scores)
        with part:
            e.store(c.tail, scores)
            with e.loop(tile.count) as i:
                e.store(e.offset(place, i, 4), e.load(e.offset(c.tail, i, 4), F32))
