"""The plain-text table of a PatchReport, a line for each group of layers that fared alike."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING

from lath.formats import values
from lath.formats.activations import activation_format
from lath.integration.text_table import align

if TYPE_CHECKING:
    from lath.integration.report import AttentionRow, PatchReport, PatchRow, SelectionRow

_HEADER = ("layer", "", "shape [N, K]", "", "error", "MB before", "MB after")
_LEFT = (True, True, True, True, False, False, False)


def report_table(report: PatchReport) -> str:
    lines = [_summary(report)]
    if report.weights == "unchanged":
        lines = [f"lath.patch {_verb(report)} no linear layers (weights=None)"]
    cells = [_cells(list(group)) for group in _groups(report.rows)]
    if cells:
        lines += align([_HEADER, *cells], _LEFT)
    before, after = report.bytes_before, report.bytes_after
    ratio = f" ({before / after:.2f} times smaller)" if 0 < after < before else ""
    lines += [_attention_line(row) for row in report.attention]
    if report.selection is not None:
        lines.append(selection_line(report.selection))
    if report.decode is not None:
        lines.append(f"  {report.decode}")
    lines.append(f"whole model: {before / 1e6:.1f} MB → {after / 1e6:.1f} MB{ratio}")
    return "\n".join(lines)


def _verb(report: PatchReport) -> str:
    return "would replace" if report.dry_run else "replaced"


def _attention_line(row: AttentionRow) -> str:
    text = f"  {row.name}: {row.action} {row.before} by {row.after}"
    if row.bytes_per_token_after:
        before, after = row.bytes_per_token_before, row.bytes_per_token_after
        text += f", {before:,.0f} → {after:,.0f} bytes per token ({before / after:.2f} times less)"
    return text


def selection_line(row: SelectionRow) -> str:
    text = (
        f"  selection: {row.action} reading everything by {row.what} in "
        f"{row.layers - len(row.dense)} of {row.layers} layers"
    )
    for reason in dict.fromkeys(row.dense.values()):
        layers = [layer for layer, own in row.dense.items() if own == reason]
        text += f"; dense for {reason}: {_ranges(layers)}"
    if row.bytes_after is not None:
        text += (
            f"; a step at {row.context:,} tokens moves {row.bytes_before:,} → {row.bytes_after:,} "
            f"bytes ({row.bytes_before / max(row.bytes_after, 1):.2f} times less)"
        )
    return text


def _ranges(numbers: list[int]) -> str:
    """ "0-2, 5" of ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _summary(report: PatchReport) -> str:
    text = (
        f"lath.patch {_verb(report)} {len(report.replaced)} of {len(report.rows)} linear layers: "
        f"weights {report.weights}, activations {report.activations}, backend {report.backend}"
    )
    packed = [row.activations for row in report.rows if row.activations not in ("", "float")]
    if packed:
        text += f" (rounding {packed[0]} adds {typical_error(packed[0]):.1%} to normal inputs)"
    return text


def typical_error(activations: str) -> float:
    """Relative rounding error of an activation format on normally distributed inputs.

    Of whole codes: the largest of g values is near sqrt(2 ln 2g) standard deviations; the step is
    that over the largest code, and rounding to a step errs by step / sqrt(12). A per-token scale is
    counted as g = 1024. Of floats with m bits of mantissa: the step is 2**-m of a power of two, and
    numbers between two of those, spread evenly over logarithms, have a mean square of 3 / (2 ln 2).
    """
    fmt = activation_format(activations)
    if fmt.values is not None:
        step = 2.0 ** -values.FLOATS[fmt.values][1]
        return step / math.sqrt(12 * 3 / (2 * math.log(2)))
    group = fmt.group or 1024
    return math.sqrt(2 * math.log(2 * group)) / fmt.largest / math.sqrt(12)


def _groups(rows: list[PatchRow]) -> list[list[PatchRow]]:
    def key(row: PatchRow) -> tuple[str, ...]:
        return (
            row.pattern, str(row.shape), row.action, row.reason, row.codec, row.activations,
            row.backend, row.quantizer,
        )  # fmt: skip

    order = {key(row): position for position, row in reversed(list(enumerate(rows)))}
    ordered = sorted(rows, key=lambda row: order[key(row)])
    return [list(group) for _, group in groupby(ordered, key)]


def _cells(group: list[PatchRow]) -> tuple[str, ...]:
    row = group[0]
    errors = [r.error for r in group if r.error is not None]
    names = row.pattern if len(group) > 1 else row.name
    if len(group) == 1 and row.also_named:
        names += f" (= {', '.join(row.also_named)})"
    if row.action == "kept":
        what = f"kept: {row.reason}"
    else:
        what = f"{row.codec}, {row.activations}, {row.backend}"
        if row.quantizer not in ("", "rtn"):
            what += f", {row.quantizer}"
        if row.action == "already packed":
            what = f"already packed: {what}"
    return (
        names,
        f"x{len(group)}",
        f"[{row.shape[0]}, {row.shape[1]}]",
        what,
        f"{sum(errors) / len(errors):.2%}" if errors else "",
        f"{sum(r.bytes_before for r in group) / 1e6:.2f}",
        f"{sum(r.bytes_after for r in group) / 1e6:.2f}",
    )
