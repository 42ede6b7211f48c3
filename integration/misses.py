"""MissReport: how much of attention a model's selections missed while it ran."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lath.formats.selection import IndexList
from lath.integration.text_table import align
from lath.verbs.misses import captured_mass, reads_all, recall
from lath.verbs.paged_kv import PagedKV

_HEADER = ("layer", "queries", "mean mass", "least mass", "of head", "mean recall", "below")
_LEFT = (False,) * len(_HEADER)
_WORST = 5


@dataclass(frozen=True)
class MissRow:
    """What one query head of one layer missed.

    steps: passes of the model in which a list of it was measured. queries: rows that were measured,
    of all sequences and steps. mean_mass, least_mass: the share of the softmax that was read, mean
    and least over the queries. below: queries that captured less than the report's threshold.
    mean_recall: of the entries that a list of that length would best hold, the share that it held,
    mean over steps and sequences; heads that share a list share this number.
    """

    layer: int
    head: int
    steps: int
    queries: int
    mean_mass: float
    least_mass: float
    mean_recall: float
    below: int


@dataclass
class MissReport:
    """What the selections of a patched model or of a LathCache missed, by layer and query head.

    threshold: a query that captures less of its softmax than this counts as below. Measured are
    lists that leave something out (not those that hold all there is, and not drafts):
    `lath.captured_mass`, without sinks and without what repair adds, and `lath.recall`. It grows
    with every step, over all calls of the model, until `reset()`. Printing shows a line per layer
    and the worst heads.
    """

    threshold: float
    _layers: dict[int, _Tally] = field(default_factory=dict, repr=False)
    _paused: bool = field(default=False, repr=False)

    @property
    def rows(self) -> list[MissRow]:
        """A row for each layer and query head that was measured, in order; waits for the device."""
        return [row for layer in sorted(self._layers) for row in self._layers[layer].rows(layer)]

    def worst(self, n: int = _WORST) -> list[MissRow]:
        """The n rows of the least mean mass, the worst first."""
        return sorted(self.rows, key=lambda row: row.mean_mass)[:n]

    def to_json(self) -> str:
        """The threshold and the rows as text."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return json.dumps({"threshold": self.threshold, "rows": rows}, indent=2)

    def reset(self) -> None:
        """Forget what was measured."""
        self._layers.clear()

    @property
    def is_paused(self) -> bool:
        return self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it nothing is measured: where speed is."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def record(
        self, layer: int, mass: Tensor, found: Tensor, counts: Tensor | None, whole: Tensor
    ) -> None:
        """Add one step of one layer, without waiting for the device.

        mass: fp32 [B, Hq, L], captured shares. found: fp32 [B, H], recall of each list, Hq a
        multiple of H. counts: int [B], rows that each sequence has (the first); None for all L.
        whole: bool [B, H], lists that leave nothing out and are not measured.
        """
        if layer not in self._layers:
            self._layers[layer] = _Tally(mass.shape[1], mass.device)
        self._layers[layer].add(mass, found, counts, whole, self.threshold)

    def __str__(self) -> str:
        rows = self.rows
        title = f"captured mass of the selections, threshold {self.threshold:g}"
        if not rows:
            return f"{title}: no step has left anything out yet"
        layers: dict[int, list[MissRow]] = {}
        for row in rows:
            layers.setdefault(row.layer, []).append(row)
        lines = align([_HEADER, *(_layer_cells(own) for own in layers.values())], _LEFT)
        below, queries = sum(row.below for row in rows), sum(row.queries for row in rows)
        lines.append(f"{below:,} of {queries:,} queries of single heads were below")
        lines += [
            f"  layer {row.layer}, head {row.head}: mean mass {row.mean_mass:.4f}, least "
            f"{row.least_mass:.4f}, recall {row.mean_recall:.3f}"
            for row in self.worst()
        ]
        return "\n".join([title, *lines])


def _layer_cells(rows: list[MissRow]) -> tuple[str, ...]:
    """One line for the heads of a layer: means over heads, and the head of the least mass."""
    least = min(rows, key=lambda row: row.least_mass)
    count = len(rows)
    queries = sum(row.queries for row in rows)
    return (
        str(least.layer),
        f"{queries:,}",
        f"{sum(row.mean_mass for row in rows) / count:.4f}",
        f"{least.least_mass:.4f}",
        str(least.head),
        f"{sum(row.mean_recall for row in rows) / count:.3f}",
        f"{sum(row.below for row in rows) / queries:.1%}",
    )


class _Tally:
    """Sums over the steps of one layer, fp64 [Hq] on its device."""

    def __init__(self, heads: int, device: torch.device) -> None:
        def zeros() -> Tensor:
            return torch.zeros(heads, dtype=torch.float64, device=device)

        self.steps, self.queries, self.mass, self.below = zeros(), zeros(), zeros(), zeros()
        self.lists, self.recall = zeros(), zeros()
        self.least = zeros().fill_(torch.inf)

    def add(
        self, mass: Tensor, found: Tensor, counts: Tensor | None, whole: Tensor, threshold: float
    ) -> None:
        rows = torch.arange(mass.shape[2], device=mass.device)
        full = torch.full((mass.shape[0],), mass.shape[2], device=mass.device)
        lengths = full if counts is None else counts.to(mass.device)
        heads = mass.shape[1] // found.shape[1]  # that share a list
        asked = ((lengths > 0)[:, None] & ~whole).repeat_interleave(heads, dim=1)  # [B, Hq]
        taken = (rows < lengths[:, None])[:, None] & asked[..., None]  # [B, Hq, L]
        mass = mass.double()
        self.steps += asked.any(0)
        self.queries += taken.sum((0, 2))
        self.mass += mass.masked_fill(~taken, 0).sum((0, 2))
        # A NaN is below every threshold.
        self.below += (taken & ~(mass >= threshold)).sum((0, 2))
        self.least = torch.minimum(self.least, mass.masked_fill(~taken, torch.inf).amin((0, 2)))
        self.lists += asked.sum(0)
        own = found.double().repeat_interleave(heads, dim=1)
        self.recall += own.masked_fill(~asked, 0).sum(0)

    def rows(self, layer: int) -> list[MissRow]:
        sums = (
            self.steps, self.queries, self.mass, self.least, self.lists, self.recall, self.below,
        )  # fmt: skip
        return [
            MissRow(
                layer, head, int(steps), int(queries), mass / queries, least, found / lists,
                int(below),
            )
            for head, (steps, queries, mass, least, lists, found, below) in enumerate(
                zip(*(numbers.tolist() for numbers in sums), strict=True)
            )
            if queries
        ]  # fmt: skip


@dataclass(frozen=True)
class Audit:
    """The wish for a MissReport, and the report. Equal where the thresholds are.

    Copies of a model or of a cache are measured into the same report.
    """

    report: MissReport = field(compare=False)
    threshold: float

    @staticmethod
    def of(threshold: Any) -> Audit:
        """TypeError or ValueError for what is no number between 0 and 1."""
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(
                "audit must be a number between 0 and 1, or None, got "
                f"{type(threshold).__name__}: {threshold!r}"
            )
        if not 0 < threshold < 1:
            raise ValueError(f"audit must lie between 0 and 1, got {threshold}")
        return Audit(MissReport(float(threshold)), float(threshold))

    def __deepcopy__(self, memo: dict[int, Any]) -> Audit:
        return self

    def measure(self, layer: int, q: Tensor, kv: PagedKV, ids: IndexList, **options: Any) -> None:
        """Measure one step. q [B, Hq, Lq, D]; options: scale, query_lengths, backend."""
        if self.report.is_paused:
            return
        mass = captured_mass(q, kv, ids, **options)
        found = recall(q, kv, ids, **options)
        self.report.record(layer, mass, found, options.get("query_lengths"), reads_all(kv, ids))
