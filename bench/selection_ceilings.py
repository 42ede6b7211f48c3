"""How far repair could go; a part of selection_accuracy.py."""

from __future__ import annotations

import sys

from selection_tables import SHARPNESS, SHOWN, Row, grid, rounded, share

import lath
from tools.selection_ceiling import ceiling, normal_gain, weighed
from tools.selection_data import RECIPES, Size, ask, relative_l1

# Of which repair and its ceiling are compared: those of tokens, then those of pages.
TOKEN_METHODS = [
    "tokenselect", "sparq", "double_sparsity", "hgca", "quest+tokens", "centroid-mass+tokens",
]  # fmt: skip
COMPARED = [
    *TOKEN_METHODS, "clusterkv", "quest", "quest-16", "centroid", "centroid-mass",
    "centroid-mass-16", "paged_eviction",
]  # fmt: skip


def measure_ceilings(size: Size, backend: str, seed: int = 0) -> list[Row]:
    """Errors at 1/8 of the sets that are no trap, or one of repair itself: dropped, repaired,
    repaired with the exact weight of the rest, and of the best repair by pages; and what repair
    takes the rest to weigh, over what it does."""
    rows = []
    for recipe in RECIPES:
        if recipe.defeats not in ("", "repair"):
            continue
        for sharpness in SHARPNESS:
            asked = ask(recipe.make(size, sharpness, seed), backend)
            for selector in COMPARED:
                q, kv = asked.q, asked.kv
                ids = lath.select(q, kv, selector, SHOWN)
                exact, share_of_rest = weighed(asked, ids)
                outputs = {
                    "dropped": lath.decode_attention(q, kv, pages=ids),
                    "repaired": lath.decode_attention(q, kv, pages=ids, repair=True),
                    "weighed": exact,
                    "ceiling": ceiling(asked, ids),
                }
                errors = {name: relative_l1(o, asked.dense) for name, o in outputs.items()}
                key = {"set": recipe.name, "sharpness": sharpness, "selector": selector}
                rows.append({**key, **rounded({**errors, "weight": share_of_rest})})
        print(f"ceilings of {recipe.name}", file=sys.stderr, flush=True)
    return rows


def gains(row: Row) -> str:
    cells = [f"{row['dropped'] / row[key]:.1f}" for key in ("repaired", "weighed", "ceiling")]
    return ", ".join(cells) + "×"


def ceiling_part(rows: list[Row]) -> list[str]:
    """What repair reaches beside what it could."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    at = {(row["set"], row["sharpness"], row["selector"]): row for row in rows}
    parts = [f"## What repair could reach, at {share(SHOWN)}", ""]
    figures = [normal_gain(sharpness, SHOWN) for sharpness in SHARPNESS]
    most, naive = (" and ".join(f"{f[i]:.2f}" for f in figures) for i in range(2))
    parts += [
        "A cell: how many times less than dropping errs repair as it is, repair if it knew the "
        "weight of all unread tokens together, and a ceiling: the unread tokens of each page "
        "(unit, cluster) weigh exactly what they do together, with the exact mean of their values "
        "(tests/tools/selection_ceiling.py). No repair that does not tell the tokens of a page "
        "apart does better on average where values are iid; errors below about 0.003 are int8's.",
        "",
        f"With iid values and normal scores of spread 1 and 2, endlessly many, of which the best "
        f"eighth was read, that ceiling is {most}. It is not 1 / sqrt(1 - E[w]² / E[w²]) over what "
        f"is left, which were {naive}: dropping also gives what was read too much weight, and that "
        "is most of its error. hgca, with a list of each query head, comes near these figures; "
        "lists of several heads read less of what each wants.", "",
    ]  # fmt: skip
    for sharpness in SHARPNESS:
        lines = [
            [selector] + [gains(at[name, sharpness, selector]) for name in sets]
            for selector in COMPARED
        ]
        parts += [f"### Queries of {sharpness:g}", "", grid(["selector", *sets], lines), ""]
    return [*parts, *short_of_ceiling(rows)]


def short_of_ceiling(rows: list[Row]) -> list[str]:
    """Selectors of tokens whose repair reaches less than two thirds of what it could."""
    lines = []
    for row in rows:
        least = 1.5 * row["ceiling"]
        if row["selector"] in TOKEN_METHODS and row["repaired"] > least:
            why = "its weight" if row["weighed"] <= least else "its spread over pages"
            errors = [f"{row[key]:.3f}" for key in ("dropped", "repaired", "weighed", "ceiling")]
            name = f"{row['set']}, q {row['sharpness']:g}"
            lines.append([name, row["selector"], *errors, f"{row['weight']:.2f}", why])
    head = [
        "set", "selector", "dropped", "repaired", "with exact weight", "ceiling",
        "weight, repair's / exact", "at fault",
    ]  # fmt: skip
    return [
        "### Where repair of tokens is more than 1.5 times above its ceiling", "",
        "At fault is the weight of the rest where the exact one alone brings the error within 1.5 "
        "times the ceiling's. Repair takes what was read of a page to be its highest for the query "
        "head at hand; lists that heads share, or that go by estimates, hold others as well, and "
        "more is left than it thinks. Nothing was changed for it: where values go with scores "
        "(correlated) the exact weights make most errors larger, so that too little is safer, and "
        "in SmolLM2, where values do, hgca, whose weights are right on iid, is the selector of "
        "tokens that loses most by repair (28 of 40 needles for 38 at budget 1024, tokenselect 38 "
        "for 38: selection_needle.md).", "", grid(head, lines), "",
    ]  # fmt: skip
