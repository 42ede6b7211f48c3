"""The plot of `lath compare`: perplexity against bits per weight. Needs matplotlib."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lath.integration.compare import Comparison

_MARKERS = "osD^vPX*"
# Beyond this many times the model's own perplexity a row says only that the model is broken.
_WORST = 10.0


def require_matplotlib() -> None:
    """ValueError saying what to install."""
    if find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib: pip install 'lath[plot]'")


def plot(result: Comparison, path: Path) -> None:
    """Write a PNG: a mark for each row, one shape and colour a quantiser, the best labelled."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    names = list(dict.fromkeys(row.quantizer for row in result.rows))
    limit = _WORST * result.before
    lowest: dict[str, tuple[float, float]] = {}
    for i, name in enumerate(names):
        rows = [
            (row.bits, row.perplexity, row.codec)
            for row in result.rows
            if row.quantizer == name and row.bits is not None and row.perplexity is not None
        ]
        inside = [row for row in rows if row[1] <= limit]
        axes.scatter(
            [bits for bits, _, _ in inside], [value for _, value, _ in inside],
            marker=_MARKERS[i % len(_MARKERS)], s=28, label=name, alpha=0.8,
        )  # fmt: skip
        for bits, value, codec in inside:
            if codec not in lowest or value < lowest[codec][1]:
                lowest[codec] = bits, value
    for codec, (bits, value) in lowest.items():
        axes.annotate(codec, (bits, value), xytext=(4, -7), textcoords="offset points", fontsize=6)
    outside = sum(row.perplexity is not None and row.perplexity > limit for row in result.rows)
    axes.axhline(result.before, color="grey", linewidth=0.8, linestyle="--", label="unpatched")
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, everything stored counted")
    axes.set_ylabel(f"perplexity, {result.options.tokens} tokens")
    left = f"; {outside} rows above {_WORST:g} times the unpatched are not shown" if outside else ""
    axes.set_title(f"{result.options.model}{left}", fontsize=9)
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
