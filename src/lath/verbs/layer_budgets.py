"""How a budget of tokens is shared out among the layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lath.verbs.attention_options import integers
from lath.verbs.checks import FLOAT_DTYPES, check_size, check_tensor

CLASSES = ("drafter", "refiner")


def prefix_kv_budgets(
    masses: Sequence[Sequence[float] | Tensor], total: int, least: int = 1
) -> list[int]:
    """PrefixKV (2412.03409): how many tokens each layer keeps, so that all keep as much attention.

    masses: for each layer, the attention mass of its tokens ([tokens], any order and unit, finite,
    not negative, not all 0; their number may differ). Sorted from the largest, a layer that keeps
    its n largest keeps the share c[n] of its mass. One retention level holds for all: each layer
    keeps the fewest tokens with c[n] >= level, but `least` (or all it has), and the level is the
    highest at which that is no more than `total` in all, found by binary search among the values
    that c takes. Equal layers get equal budgets; so the sum may stay below `total`, by less than
    what the next level would add. A total that all tokens fit in keeps them all.
    """
    check_size("total", total)
    check_size("least", least)
    shares = [_cumulative(i, layer) for i, layer in enumerate(_check_layers(masses))]
    floors = [min(least, len(share)) for share in shares]
    if total < sum(floors):
        raise ValueError(
            f"total must be at least {sum(floors)}, `least` tokens of each layer, got {total}"
        )
    if total >= sum(map(len, shares)):
        return [len(share) for share in shares]
    levels = torch.unique(torch.cat([torch.zeros(1, dtype=torch.float64), *shares]))  # ascending

    def budgets(level: int) -> list[int]:
        wanted = levels[level]
        kept = [int((share < wanted).sum()) + (1 if level else 0) for share in shares]
        return [max(own, floor) for own, floor in zip(kept, floors, strict=True)]

    fits, above = 0, len(levels)
    while above - fits > 1:
        middle = (fits + above) // 2
        if sum(budgets(middle)) <= total:
            fits = middle
        else:
            above = middle
    return budgets(fits)


def _check_layers(masses: Any) -> list[Any]:
    if isinstance(masses, (str, bytes)) or not isinstance(masses, (Sequence, Tensor)):
        raise TypeError(f"masses must be a sequence of layers, got {type(masses).__name__}")
    if len(masses) == 0:
        raise ValueError("masses must hold one layer or more, got none")
    return list(masses)


def _cumulative(i: int, layer: Any) -> Tensor:
    """fp64 [tokens], ascending to 1: the share of the mass that the n + 1 largest tokens have."""
    name = f"masses[{i}]"
    if isinstance(layer, Tensor):
        check_tensor(name, layer, (*FLOAT_DTYPES, torch.float64))
        mass = layer.detach().double().cpu()
    else:
        try:
            mass = torch.tensor(layer, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must hold numbers, got {layer!r}") from error
    if mass.dim() != 1 or mass.numel() == 0:
        raise ValueError(f"{name} must be [tokens], one or more, got shape {[*mass.shape]}")
    if not bool((torch.isfinite(mass) & (mass >= 0)).all()) or not bool((mass > 0).any()):
        raise ValueError(f"{name} must be finite, 0 or more, and not all 0, got {mass.tolist()}")
    held = torch.sort(mass / mass.max(), descending=True).values.cumsum(0)
    return held / held[-1]


def scale_kv_budgets(
    classes: Sequence[Sequence[str]], large: int | Sequence[int], small: int | Sequence[int]
) -> list[list[int]]:
    """ScaleKV (2505.19602): tokens that each layer keeps at each scale of a visual autoregressive
    model, by a table.

    classes: for each scale and layer "drafter" (looks at all scales: the large budget) or "refiner"
    (looks at its own: the small one). large, small: tokens, an int or one per scale, small <=
    large. Returns [scale][layer].
    """
    if isinstance(classes, (str, bytes)) or not isinstance(classes, Sequence):
        raise TypeError(
            f"classes must be a sequence of scales, each a sequence of {CLASSES}, got "
            f"{type(classes).__name__}"
        )
    for i, layers in enumerate(classes):
        if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
            raise TypeError(f"classes[{i}] must be a sequence of {CLASSES}, got {layers!r}")
        for name in layers:
            if name not in CLASSES:
                raise ValueError(f"classes[{i}] must hold {CLASSES}, got {name!r}")
    for a, b in pairwise(classes):
        if len(a) != len(b):
            raise ValueError(
                f"classes must have as many layers at every scale, got {[len(x) for x in classes]}"
            )
    high, low = (_per_scale(n, v, len(classes)) for n, v in (("large", large), ("small", small)))
    for i, (most, fewest) in enumerate(zip(high, low, strict=True)):
        if fewest > most:
            raise ValueError(f"small must be no larger than large, got {fewest} > {most} at {i}")
    return [
        [most if name == "drafter" else fewest for name in layers]
        for layers, most, fewest in zip(classes, high, low, strict=True)
    ]


def _per_scale(name: str, value: Any, scales: int) -> list[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        return [check_size(name, value)] * scales
    numbers = [check_size(name, number) for number in integers(name, value)]
    if len(numbers) != scales:
        raise ValueError(f"{name} must have one entry per scale, {scales}, got {len(numbers)}")
    return numbers
