"""What `lath plan` prints: how each layer of a model would run, here or on a device that is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from rich.table import Table

from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.families import weight_codec
from lath.integration.find import check_selection, find_linears
from lath.integration.models import empty_model
from lath.integration.patch_rows import auto_activations
from lath.integration.report import PatchRow
from lath.verbs.planning import describe_device, plan


def plan_table(
    model: str,
    weights: str,
    tokens: Sequence[int],
    device: str,
    dtype: torch.dtype,
    activations: str = "auto",
    skip: Sequence[str] = ("lm_head",),
) -> Table:
    """A line for each distinct layer shape of the model and each number of tokens."""
    codec, target = weight_codec(weights), describe_device(device)
    chosen: ActivationFormat = (
        auto_activations(codec, target.kind == "cpu")
        if activations == "auto"
        else activation_format(activations)
    )
    table = Table(
        title=f"{model}: weights {codec}, activations {chosen}, on {target.name} "
        f"({target.architecture})",
        title_justify="left",
    )
    for heading in ("layer", "N", "K", "tokens", "dataflow", "tile", "MB moved", "GFLOP", "reason"):
        table.add_column(heading, justify="left" if heading in ("layer", "reason") else "right")
    for (rows, columns), label in _layers(model, skip).items():
        for m in tokens:
            one = plan(m, rows, columns, codec, dtype, target, chosen)
            table.add_row(
                label,
                str(rows),
                str(columns),
                str(m),
                f"{one.backend} {one.dataflow} {one.dot}",
                _tile(one.block_m, one.block_n, one.block_k, one.split_k),
                f"{one.bytes_moved / 1e6:.2f}",
                f"{one.operations / 1e9:.3f}",
                one.reason,
            )
    return table


def _layers(model: str, skip: Sequence[str]) -> dict[tuple[int, int], str]:
    """(N, K) of the layers that `patch` would pack → which they are and how many."""
    names: dict[tuple[int, int], Counter[str]] = {}
    empty = empty_model(model)
    selection = check_selection(empty, skip, None)
    for one in find_linears(empty, selection, without_weights=True):
        if not one.reason:
            shape = (one.module.out_features, one.module.in_features)
            pattern = PatchRow(one.name, shape, "kept").pattern
            names.setdefault(shape, Counter())[pattern.rpartition("*.")[2]] += 1
    return {
        shape: f"{', '.join(counts)} x{sum(counts.values())}" for shape, counts in names.items()
    }


def _tile(block_m: int, block_n: int, block_k: int, split_k: int) -> str:
    if not block_n:
        return "-"
    return f"{block_m}x{block_n}x{block_k}" + (f" /{split_k}" if split_k > 1 else "")
