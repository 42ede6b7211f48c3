"""The report of `selection_needle`: tables of what was found, of perplexity and of mass."""

from __future__ import annotations

from typing import Any

BUDGETS = [256, 512, 1024]
CHOICE_SEEDS, CHOICE_LENGTH = [2, 3], 8192  # shorter prompts tell the forms less well apart
LAYERS_LENGTH = 4096  # where dense finds all and pages find half
SEQUENCES, STEPS = 8, 16  # of the perplexity: 128 tokens


def named(row: dict[str, Any]) -> str:
    if row["heads"] is not None:
        return f"{row['selector']}, a list per query head"
    if row.get("dense_layers"):
        first, last = row["dense_layers"][0], row["dense_layers"][-1]
        return f"{row['selector']}, layers {first}-{last} read whole"
    if isinstance(row["repair"], str):
        return f"{row['selector']}, repair='{row['repair']}'"
    return row["selector"] + (" with repair" if row["repair"] else "")


def by_name(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(named(row), []).append(row)
    return lines


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    rows = [f"| {' | '.join(line)} |" for line in [head, *lines]]
    return [rows[0], "|---" * len(head) + "|", *rows[1:], ""]


def hits(rows: list[dict[str, Any]], **wanted: Any) -> str:
    found = [hit for row in rows for hit in row["found"]
             if all(row[key] == value for key, value in wanted.items())]  # fmt: skip
    return f"{sum(found)}/{len(found)}" if found else ""


def needle_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for name, own in by_name(rows).items():
        # Dense and the control have no budget.
        fixed = not {row["budget"] for row in own} & set(BUDGETS)
        cells = [hits(own) if fixed else hits(own, budget=budget) for budget in BUDGETS]
        lines.append([name, *cells])
    return table(["reads", *(f"budget {budget}" for budget in BUDGETS)], lines)


def length_table(rows: list[dict[str, Any]], budget: int) -> list[str]:
    lengths = sorted({row["length"] for row in rows})
    some = [row for row in rows if row["budget"] in (0, 64, budget)]
    lines = [
        [name, *(hits(own, length=length) for length in lengths)]
        for name, own in by_name(some).items()
    ]
    return table([f"budget {budget}", *(f"{length} tokens" for length in lengths)], lines)


def at_budgets(cells: dict[int, str]) -> list[str]:
    """A cell for each of BUDGETS; dense and the control, which have none, are the same at all."""
    if not cells.keys() & set(BUDGETS):
        return list(cells.values()) * len(BUDGETS)
    return [cells.get(budget, "") for budget in BUDGETS]


def perplexity_table(rows: list[dict[str, Any]]) -> list[str]:
    dense = next(row["perplexity"] for row in rows if row["selector"] == "dense")
    lines = []
    for name, own in by_name(rows).items():
        cells = {
            r["budget"]: f"{r['perplexity']:.3f} ({r['perplexity'] / dense - 1:+.2%})" for r in own
        }
        lines.append([name, *at_budgets(cells)])
    return table(["reads", *(f"budget {budget}" for budget in BUDGETS)], lines)


def mass_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for name, own in by_name([row for row in rows if "mass" in row]).items():
        cells = {r["budget"]: f"{r['mass']:.3f}, {r['recall']:.2f}" for r in own}
        lines.append([name, *at_budgets(cells)])
    return table(["reads", *(f"budget {budget}" for budget in BUDGETS)], lines)


def held_table(rows: list[dict[str, Any]]) -> list[str]:
    totals: dict[str, tuple[float, float]] = {}
    for row in rows:
        mass, held = totals.get(row["selector"], (0.0, 0.0))
        totals[row["selector"]] = mass + row["mass"], held + row["held"]
    count = len({row["needle"] for row in rows})
    lines = [[name, f"{held / mass:.2f}"] for name, (mass, held) in totals.items()]
    return [
        f"What lists of {BUDGETS[-1]} tokens hold of the weight that attention gives to the tokens "
        f"of the needle, summed over all heads and layers: in the step behind the prompt, for the "
        f"{count} of these needles that lie in full pages. Every layer is read by tokenselect, so "
        "that the queries are those of a model that finds it.", "",
        *table(["lists of", "held"], lines),
    ]  # fmt: skip


def as_good_as_dense(rows: list[dict[str, Any]], budget: int) -> list[str]:
    """Lines that find as many needles as dense, with the budget."""
    dense = sum(sum(row["found"]) for row in rows if row["selector"] == "dense")
    some = by_name([row for row in rows if row["budget"] == budget])
    return [name for name, own in some.items() if sum(sum(r["found"]) for r in own) >= dense]


def circumstances(run: dict[str, Any]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in run["machine"].items())
    return (
        f"{facts}; backend {run['backend']}, {run['threads']} thread(s), bf16 model, "
        f"{run['seconds']:.0f} s in all, {run['processor_seconds']:.0f} s of a processor. "
        f"Command: `{run['command']}`"
    )


def report(result: dict[str, Any], about: str) -> str:
    """The text of the .md; `about`: what it begins with."""
    rows = result["needles"]
    parts = [
        "# SmolLM2-135M-Instruct: decoding over selections", "", about.strip(), "",
        *(line for run in result["runs"] for line in (circumstances(run), "")),
        "## Needles found", "",
        f"{result['count']} at each of five depths (0, 25, 50, 75, 100 %) of "
        f"{', '.join(map(str, result['lengths']))} tokens. recent: the first 64 tokens and the "
        "last 64 to 128 alone, the negative control: it finds needles that stand there. A budget "
        "counts the tokens of pages that are read besides those (clusterkv: besides the last 5 "
        "pages, hgca: the last 4). A list serves the 3 query heads of a KV head; tokenselect has "
        "one for all 9, hgca one for each, and so has what is named so. With +tokens the keys of "
        "four times the budget are read to choose from: with 1024 all of up to 4096 tokens, half "
        "of 8192.", "",
        *needle_table(rows),
    ]  # fmt: skip
    good = as_good_as_dense(rows, BUDGETS[-1])
    parts += [f"As many as dense at budget {BUDGETS[-1]}: {'; '.join(good) or 'none'}.", ""]
    parts += length_table(rows, BUDGETS[-1])
    choice = result["choice"]
    lines = [[name, hits(own)] for name, own in by_name(choice).items()]
    parts += [
        "## Needles that forms were chosen on", "",
        f"Two others (seeds {', '.join(map(str, CHOICE_SEEDS))}) at each depth of {CHOICE_LENGTH} "
        f"tokens, budget {BUDGETS[-1]}.", "", *table(["reads", "found"], lines),
    ]  # fmt: skip
    parts += held_table(result["held"])
    lines = [[name, hits(own)] for name, own in by_name(result["layers"]).items()]
    parts += [
        f"Needles of the first table, {LAYERS_LENGTH} tokens, budget {BUDGETS[-1]}, with some "
        "layers read whole:", "", *table(["reads", "found"], lines),
    ]  # fmt: skip
    parts += [
        "## Perplexity", "",
        f"{SEQUENCES * STEPS} tokens, each behind {result['context']} tokens or more of the same "
        f"text, in {SEQUENCES} pieces of {STEPS}: within a piece every token is read with the "
        "selection, what stands before a piece was read whole. In brackets the change against "
        "dense.", "", *perplexity_table(result["perplexities"]),
        "## Captured mass, recall", "", *mass_table(result["perplexities"]),
    ]  # fmt: skip
    return "\n".join(parts)
