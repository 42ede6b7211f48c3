"""What selectors capture of synthetic caches, and how far off the attention over it is.

    python bench/selection_accuracy.py [--backend auto] [--tokens 8192] [--queries 4] [--plot]
        [--selectors quest-16,clusterkv] [--ceilings]

writes bench/results/selection_accuracy.md and .json, and with matplotlib selection_accuracy.png;
--plot draws the .json that is there, --selectors measures these and keeps its other rows,
--ceilings measures nothing but what repair could reach. The sets are those of
tests/tools/selection_data.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from selection_ceilings import ceiling_part, measure_ceilings
from selection_tables import SHARPNESS, SHOWN, Row, grid, rounded, share

import lath
from lath.integration.benchmark import machine_facts
from tools.selection_data import BY_NAME, RECIPES, Recipe, Size, ask, measure

RESULTS = Path(__file__).parent / "results"
OUTLIERS = ["quest", "centroid", "centroid-mass", "paged_eviction", "clusterkv"]
SELECTORS = [
    *lath.selectors.SELECTORS, "quest-16", "centroid-mass", "centroid-mass-16", "quest+tokens",
    "centroid-mass+tokens", *(f"{s}+outliers" for s in OUTLIERS),
]  # fmt: skip
BUDGETS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
PAGE_METHODS = ["quest", "quest-16", "centroid", "centroid-mass", "centroid-mass-16"]


@dataclass(frozen=True)
class Table:
    """The rows of a run, found again by what was asked."""

    rows: list[Row]

    def at(self, name: str, sharpness: float, selector: str, budget: float) -> Row:
        wanted = {"set": name, "sharpness": sharpness, "selector": selector, "budget": budget}
        return next(r for r in self.rows if all(r[key] == wanted[key] for key in wanted))

    def sets(self) -> list[Recipe]:
        return [recipe for recipe in RECIPES if any(r["set"] == recipe.name for r in self.rows)]


def run(size: Size, backend: str, selectors: Sequence[str], seed: int = 0) -> list[Row]:
    rows = []
    for recipe in RECIPES:
        start = time.perf_counter()
        for sharpness in SHARPNESS:
            asked = ask(recipe.make(size, sharpness, seed), backend)
            for selector in selectors:
                for budget in BUDGETS:
                    found = asdict(measure(asked, selector, budget))
                    key = {"set": recipe.name, "sharpness": sharpness}
                    rows.append({**key, "selector": selector, "budget": budget, **rounded(found)})
        seconds = time.perf_counter() - start
        print(f"{recipe.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return rows


def store(result: dict[str, Any], path: Path) -> None:
    """JSON with a line for each row."""
    lists = ("ceilings", "rows")
    facts = json.dumps({key: value for key, value in result.items() if key not in lists}, indent=1)
    text = facts.removesuffix("\n}")
    for key in lists:
        rows = ",\n".join(json.dumps(row, allow_nan=False) for row in result[key])
        text += f',\n "{key}": [\n{rows}\n]'
    path.write_text(text + "}\n")


# The report


def gain(row: Row) -> str:
    if row["repaired"] == 0:
        return "exact"
    return f"{row['dropped']:.3f} → {row['repaired']:.3f} ({row['dropped'] / row['repaired']:.1f}×)"


def mass_summary(table: Table, sharpness: float) -> str:
    lines = [
        [recipe.name]
        + [f"{table.at(recipe.name, sharpness, s, SHOWN)['mass']:.2f}" for s in SELECTORS]
        for recipe in table.sets()
    ]
    reads = [f"{table.at(lines[0][0], sharpness, s, SHOWN)['read']:.2f}" for s in SELECTORS]
    return grid(["set", *SELECTORS], [*lines, [f"*read, of {lines[0][0]}*", *reads]])


def error_summary(table: Table, sharpness: float) -> str:
    lines = [
        [recipe.name] + [gain(table.at(recipe.name, sharpness, s, SHOWN)) for s in SELECTORS]
        for recipe in table.sets()
    ]
    return grid(["set", *SELECTORS], lines)


def defeats(table: Table, sharpness: float) -> str:
    """Each set that was built against a method: the method there, where it works, and the best
    other one."""
    lines = []
    for recipe in table.sets():
        if recipe.defeats in ("", "repair"):
            continue
        beaten = PAGE_METHODS if recipe.defeats == "pages" else [recipe.defeats]
        others = [s for s in SELECTORS if s.partition("-")[0] not in beaten and s not in beaten]
        masses = {s: table.at(recipe.name, sharpness, s, SHOWN)["mass"] for s in SELECTORS}
        best = max(others, key=lambda name: masses[name])
        for method in beaten:
            control = table.at(recipe.control, sharpness, method, SHOWN)["mass"]
            lines.append([
                recipe.name, recipe.what, method, f"{control:.2f} ({recipe.control})",
                f"{masses[method]:.2f}", f"{masses[best]:.2f} ({best})",
            ])  # fmt: skip
    head = ["set", "why", "method", "captures elsewhere", "captures here", "best other method"]
    return grid(head, lines)


def whole_table(table: Table, recipe: Recipe, sharpness: float) -> str:
    lines = []
    for selector in SELECTORS:
        cells = [selector]
        for budget in BUDGETS:
            row = table.at(recipe.name, sharpness, selector, budget)
            mixed = "" if row["mixed"] is None else f" / {row['mixed']:.3f}"
            cells.append(
                f"{row['mass']:.3f}, {row['recall']:.2f}; "
                f"{row['dropped']:.3f} / {row['repaired']:.3f}{mixed}"
            )
        lines.append(cells)
    return grid(["selector", *map(share, BUDGETS)], lines)


def kind_gains(table: Table) -> str:
    """Where repair is less than twice as good as dropping, of the sets that are no trap."""
    lines = []
    for recipe in table.sets():
        for sharpness in SHARPNESS if not recipe.defeats else []:
            for selector in [*PAGE_METHODS, "clusterkv"]:
                row = table.at(recipe.name, sharpness, selector, SHOWN)
                if row["dropped"] < 2 * row["repaired"]:
                    lines.append(f"- {recipe.name}, q {sharpness:g}, {selector}: {gain(row)}")
    return "\n".join(lines) or "None."


def outlier_gains(table: Table) -> str:
    """Dropping with the selector as it is, and repair with outliers, of the sets that are no trap;
    in brackets repair against dropping, both with outliers."""
    lines = []
    for recipe in table.sets():
        for sharpness in SHARPNESS if not recipe.defeats else []:
            cells = [f"{recipe.name}, q {sharpness:g}"]
            for selector in OUTLIERS:
                plain = table.at(recipe.name, sharpness, selector, SHOWN)
                own = table.at(recipe.name, sharpness, f"{selector}+outliers", SHOWN)
                both = {"dropped": plain["dropped"], "repaired": own["repaired"]}
                cells.append(f"{gain(both)} [{own['dropped'] / own['repaired']:.1f}×]")
            lines.append(cells)
    return grid(["set", *OUTLIERS], lines)


def report(result: dict[str, Any]) -> str:
    assert __doc__ is not None
    table, size = Table(result["rows"]), Size(**result["size"])
    facts = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    full = [row for row in table.rows if row["budget"] == 1]
    exact = sum(row["exact"] for row in full)
    parts = [
        "# Selection on synthetic caches", "", __doc__.strip(), "",
        f"{facts}; backend {result['backend']}. Command: `{result['command']}`{result['kept']}", "",
        f"{size.tokens} tokens, D {size.dim}, {size.kv_heads} KV heads of {size.group} query heads "
        f"each, {size.queries} queries of one row, int8 keys and values. Keys have standard "
        "deviation 1 in every channel, queries 1 or 2, and so have scores. Budgets are shares of "
        "the tokens; read besides: the first 64 tokens and the last page (clusterkv: 5 pages, "
        "hgca: 4). A list serves the query heads of a KV head; tokenselect has one for all heads, "
        "hgca one for each, which together read more. Errors are Σ|o - dense| / Σ|dense| against "
        "dense attention over the same cache, without repair and with it; captured mass and recall "
        "are means.", "",
        f"With a budget of all tokens {exact} of {len(full)} results equal dense attention bit for "
        "bit, without and with repair.", "",
    ]  # fmt: skip
    for sharpness in SHARPNESS:
        parts += [
            f"## Queries of {sharpness:g}", "", f"### Captured mass, budget {share(SHOWN)}", "",
            mass_summary(table, sharpness), "",
            f"### Error dropped → repaired, budget {share(SHOWN)}", "",
            error_summary(table, sharpness), "", "### Built to defeat", "",
            defeats(table, sharpness), "",
        ]  # fmt: skip
    parts += [
        f"## Repair gains less than 2× at {share(SHOWN)}", "",
        "Selectors of pages, of units and of clusters, sets that are no trap:", "",
        kind_gains(table), "",
        f"## With outliers, at {share(SHOWN)}", "",
        "Error of the selector as it is, dropped → with the outlier of every page among its tokens "
        "(`+outliers`, the same budget), repaired; in brackets what repair does to the error of "
        "that list alone. Sets that are no trap.", "", outlier_gains(table), "",
        *ceiling_part(result["ceilings"]),
        "## All budgets", "",
        "A cell: captured mass, recall; error dropped / repaired / with repair='mean' (sparq, "
        "tokenselect, hgca).", "",
    ]  # fmt: skip
    for recipe in table.sets():
        for sharpness in SHARPNESS:
            title = f"### {recipe.name}, q {sharpness:g}: {recipe.what}"
            parts += [title, "", whole_table(table, recipe, sharpness), ""]
    return "\n".join(parts)


def plot(result: dict[str, Any], path: Path) -> bool:
    """Captured mass and error against the budget, sharpness 1; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: no plot", file=sys.stderr)
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image  # matplotlib needs it too

    table, sharpness = Table(result["rows"]), SHARPNESS[0]
    sets = table.sets()
    across = 3
    down = -(-len(sets) // across)
    figure, axes = pyplot.subplots(down, 2 * across, figsize=(26, 3.4 * down), squeeze=False)
    for i, recipe in enumerate(sets):
        mass, error = axes[i // across, 2 * (i % across) : 2 * (i % across) + 2]
        for number, selector in enumerate(SELECTORS):
            rows = [table.at(recipe.name, sharpness, selector, b) for b in BUDGETS[:-1]]
            colour = f"C{number}"
            mass.plot(BUDGETS[:-1], [r["mass"] for r in rows], color=colour, label=selector)
            error.plot(BUDGETS[:-1], [r["dropped"] for r in rows], color=colour, ls=":")
            error.plot(BUDGETS[:-1], [r["repaired"] for r in rows], color=colour)
        for axis, title in ((mass, "captured mass"), (error, "error: dotted dropped")):
            axis.set(xscale="log", title=f"{recipe.name}: {title}")
            axis.set_xticks(BUDGETS[:-1], [share(b) for b in BUDGETS[:-1]])
            axis.minorticks_off()
        mass.set_ylim(0, 1.02)
        error.set_yscale("log")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(SELECTORS))
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=60)
    with Image.open(path) as drawn:
        few_colours = drawn.convert("RGB").quantize(160)
    few_colours.save(path, optimize=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--selectors", default="", help="these alone, beside the stored rows")
    parser.add_argument("--ceilings", action="store_true", help="these alone, beside the stored")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--plot", action="store_true", help="only draw what was measured before")
    options = parser.parse_args()
    stored = options.output / "selection_accuracy.json"
    if options.plot:
        plot(json.loads(stored.read_text()), stored.with_suffix(".png"))
        return
    torch.set_num_threads(1)
    size = Size(options.tokens, options.queries)
    command = "python bench/selection_accuracy.py"
    for name, value in (("tokens", size.tokens), ("queries", size.queries)):
        if value != parser.get_default(name):
            command += f" --{name} {value}"
    selectors, kept, rows, before = SELECTORS, "", [], {}
    if options.selectors or options.ceilings:
        before = json.loads(stored.read_text())
        if before["size"] != asdict(size):
            parser.error(f"{stored} has other sizes: {before['size']}")
    if options.ceilings:
        commit = machine_facts()["commit"]
        kept = before["kept"].partition("; what repair could")[0]
        kept += f"; what repair could reach: `{command} --ceilings`, commit {commit}"
        result = before | {"kept": kept, "ceilings": measure_ceilings(size, options.backend)}
        store(result, stored)
        stored.with_suffix(".md").write_text(report(result))
        return
    if options.selectors:
        selectors = options.selectors.split(",")
        command += f" --selectors {options.selectors}"
        kept = f"; all other selectors: commit {before['machine']['commit']}"
        rows = [row for row in before["rows"] if row["selector"] not in selectors]
    result = {
        "machine": machine_facts(), "backend": options.backend, "command": command, "kept": kept,
        "size": asdict(size), "sets": {r.name: r.what for r in BY_NAME.values()},
        "ceilings": before.get("ceilings") or measure_ceilings(size, options.backend),
        "rows": [*rows, *run(size, options.backend, selectors)],
    }  # fmt: skip
    store(result, stored)
    stored.with_suffix(".md").write_text(report(result))
    plot(result, stored.with_suffix(".png"))


if __name__ == "__main__":
    main()
