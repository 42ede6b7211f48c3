"""The plot of `lath bench curves`: times of lath and of the strongest peer. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lath.integration.compare_plot import require_matplotlib
from lath.integration.curves import CURVES, Point


def plot_curves(points: Sequence[Point], path: Path) -> None:
    """Write a PNG: a panel for each curve, lath's times drawn through, the peers' dashed."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in CURVES if any(point.curve == name for point in points)]
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(5 * len(names), 4.5), layout="constrained", squeeze=False
    )
    for axes, name in zip(panels[0], names, strict=True):
        own = [point for point in points if point.curve == name]
        for number, what in enumerate(dict.fromkeys(point.what for point in own)):
            line = sorted((point for point in own if point.what == what), key=lambda p: p.x)
            x, colour = [point.x for point in line], f"C{number}"
            axes.plot(
                x, [p.median_us for p in line], color=colour, marker="o", label=f"lath {what}"
            )
            beside = [point for point in line if point.peer]
            axes.plot(
                [p.x for p in beside], [p.peer_us for p in beside], color=colour, marker="x",
                linestyle="--", label=f"strongest peer of {what}",
            )  # fmt: skip
            for point in beside:
                axes.annotate(
                    f"{point.ratio:.1f}", (point.x, point.peer_us), xytext=(0, 5),
                    textcoords="offset points", fontsize=6, ha="center", color=colour,
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(
            lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"
        )
        axes.set_yscale("log")
        axes.set_xlabel(CURVES[name][1], fontsize=8)
        axes.set_ylabel("µs; numbers: peer / lath", fontsize=8)
        axes.grid(visible=True, which="major", linewidth=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
