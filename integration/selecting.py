"""What `select`, `repair` and `audit` of `lath.patch` and LathCache mean, and where they hold.

A layer reads everything, in this order of reasons: it has a sliding window (its window is what it
reads); the Selection names it in `dense_layers`. Within the other layers a step reads everything
while the Selection says so (`dense_below`, budget not exceeded, more rows than decoding has), and
the first piece of a prompt is attended as without a selection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lath.integration.misses import Audit
from lath.verbs.selection import Selection

WINDOW = "sliding window"
NAMED = "dense_layers"


def select_options(
    select: Any, repair: Any, audit: Any, kv: object
) -> tuple[Selection | None, Audit | None]:
    """The Selection and the Audit of the arguments; ValueError for what does not go together."""
    if select is None:
        for name, value in (("repair", repair), ("audit", audit)):
            if value is not None:
                raise ValueError(f"{name}={value!r} needs select, got select=None")
        return None, None
    if kv is None:
        raise ValueError(
            f"select={str(select)!r} needs kv, the codec of a paged cache, got kv=None: only pages "
            "can be selected"
        )
    options = {} if repair is None else {"repair": repair}
    selection = Selection.parse(select, **options)
    if audit is None or isinstance(audit, Audit):
        return selection, audit
    return selection, Audit.of(audit)


def dense_layers(selection: Selection, windows: Sequence[bool | None]) -> dict[int, str]:
    """Layers that read everything and why; the others select.

    windows: of each layer of the cache whether it has a sliding window, None where it holds no
    pages. ValueError where the Selection speaks of layers that there are not.
    """
    beyond = [layer for layer in sorted(selection.dense_layers) if not 0 <= layer < len(windows)]
    if beyond:
        raise ValueError(
            f"dense_layers must be layers 0 .. {len(windows) - 1} of the model, got {beyond}"
        )
    budgets = selection.layer_budgets
    if budgets is not None and len(budgets) != len(windows):
        raise ValueError(
            f"layer_budgets must have one budget for each of the model's {len(windows)} layers, "
            f"got {len(budgets)}"
        )
    reasons = {}
    for layer, window in enumerate(windows):
        if window:
            reasons[layer] = WINDOW
        elif window is not None and layer in selection.dense_layers:
            reasons[layer] = NAMED
    return reasons


def check_config(selection: Selection, audit: Audit | None, config: Any) -> None:
    """NotImplementedError for what the model's scores do not admit."""
    softcap = getattr(config, "attn_logit_softcapping", None)
    if not softcap:
        return
    if selection.repair is not False:
        raise NotImplementedError(
            f"repair={selection.repair!r} cannot be combined with softcap: the model's config has "
            f"attn_logit_softcapping={softcap}, and repair estimates scores without it; repair "
            "must be False"
        )
    if audit is not None:
        raise NotImplementedError(
            f"audit={audit.threshold} cannot be combined with softcap: the model's config has "
            f"attn_logit_softcapping={softcap}, and lath.captured_mass measures scores without it"
        )


def describe(selection: Selection) -> str:
    """The text form and every field that is not as it would be by itself."""
    bare = Selection(selection.selector, selection.budget)
    changed = [
        (field.name, value)
        for field in dataclasses.fields(selection)
        if (value := getattr(selection, field.name)) != getattr(bare, field.name)
    ] if selection != bare else []  # fmt: skip
    text = str(dataclasses.replace(selection, repair=False))
    for name, value in changed:
        if isinstance(value, frozenset):
            value = sorted(value)
        elif isinstance(value, tuple):
            value = [str(budget) for budget in value]
        text += f" with {name}" if value is True else f", {name}={value!r}"
    return text


def comparable(value: Any) -> Any:
    """A value as plain data that `==` compares: selectors may hold arrays."""
    if dataclasses.is_dataclass(value):
        fields = [field for field in dataclasses.fields(value) if field.compare]
        return type(value), [comparable(getattr(value, field.name)) for field in fields]
    if isinstance(value, (Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: comparable(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(own) for own in value]
    return value
