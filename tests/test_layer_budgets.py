"""Budgets shared out among layers: against a search without any cleverness, and by table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lath.verbs.layer_budgets import prefix_kv_budgets, scale_kv_budgets


def masses(seed: int, layers: int, tokens: int) -> list[np.ndarray]:
    """Layers from even to skewed."""
    generator = np.random.default_rng(seed)
    return [generator.random(tokens + 7 * i) ** (1 + 3 * i) + 1e-9 for i in range(layers)]


def kept_at(layers: list[np.ndarray], level: float, least: int) -> list[int]:
    """The fewest tokens of each layer that hold `level` of its mass."""
    budgets = []
    for layer in layers:
        ordered = sorted((float(x) for x in layer / layer.max()), reverse=True)
        shares = np.cumsum(ordered)
        count = next(
            n for n in range(len(ordered) + 1) if n and shares[n - 1] / shares[-1] >= level
        )
        budgets.append(max(count, min(least, len(ordered))))
    return budgets


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("least", [0, 1, 20])
def test_one_level_for_all(seed: int, least: int) -> None:
    layers = masses(seed, 5, 60)
    held = sum(map(len, layers))
    for total in (100, 101, 150, 233, held - 1):
        got = prefix_kv_budgets([layer.tolist() for layer in layers], total, least)
        assert sum(got) <= total
        levels = sorted({0.0} | {float(x) for layer in layers for x in shares_of(layer)})
        fitting = [
            level for level in levels[1:] if sum(kept_at(layers, level, least)) <= total
        ]  # every level, one by one
        expected = kept_at(layers, max(fitting), least)
        assert got == expected
        above = levels[levels.index(max(fitting)) + 1 :]
        if above:
            assert sum(kept_at(layers, above[0], least)) > total


def shares_of(layer: np.ndarray) -> np.ndarray:
    shares = np.cumsum(sorted((float(x) for x in layer / layer.max()), reverse=True))
    return shares / shares[-1]


def test_equal_layers_get_equal_budgets_and_skewed_ones_fewer() -> None:
    even, skewed = torch.ones(100), torch.cat([torch.full((5,), 50.0), torch.ones(95)])
    generator = torch.Generator().manual_seed(0)
    shuffled = skewed[torch.randperm(100, generator=generator)]
    got = prefix_kv_budgets([even, skewed, even, shuffled, skewed * 3], 150)
    assert got[0] == got[2]
    assert got[1] == got[3] == got[4]
    assert got[1] < got[0]
    assert 140 <= sum(got) <= 150  # a level moves at most five tokens
    for total in range(7, 20):  # alike: nobody is preferred, the rest stays free
        assert prefix_kv_budgets([even] * 7, total) == [total // 7] * 7


def test_ends_of_the_range() -> None:
    layers = masses(1, 3, 10)
    held = [len(layer) for layer in layers]
    given = [layer.tolist() for layer in layers]
    for total in (sum(held), sum(held) + 5):
        assert prefix_kv_budgets(given, total) == held
    assert prefix_kv_budgets([[1.0, 0.0, 0.0]], 3) == [3]
    assert prefix_kv_budgets([[1.0, 0.0, 0.0]], 2) == [1]  # no more hold no more
    assert prefix_kv_budgets(given, 3, least=1) == [1, 1, 1]
    assert prefix_kv_budgets(given, 0, least=0) == [0, 0, 0]
    assert prefix_kv_budgets(given, sum(held), least=1000) == held


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], -1), ValueError, "total must be 0 or more, got -1"),
        (([[1.0]], 1.0), TypeError, "total must be an int"),
        (([[1.0, 1.0], [1.0]], 2, 2), ValueError, "total must be at least 3"),
        (([[1.0]], 1, -1), ValueError, "least must be 0 or more"),
        (([], 1), ValueError, "masses must hold one layer"),
        ((3, 1), TypeError, "masses must be a sequence"),
        (([[1.0], []], 2), ValueError, r"masses\[1\] must be \[tokens\]"),
        (([[1.0], [[1.0]]], 2), ValueError, r"masses\[1\] must be \[tokens\]"),
        (([[1.0], [-1.0]], 2), ValueError, r"masses\[1\] must be finite, 0 or more"),
        (([[0.0]], 2), ValueError, r"masses\[0\] must be .* not all 0"),
        (([[float("nan")]], 2), ValueError, r"masses\[0\] must be finite"),
        (([["a"]], 2), TypeError, r"masses\[0\] must hold numbers"),
        (([torch.ones(2).long()], 2), TypeError, r"masses\[0\] must be float16"),
    ],
)
def test_bad_masses(arguments: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        prefix_kv_budgets(*arguments)


def test_the_table_is_respected() -> None:
    classes = [["drafter", "refiner", "refiner"], ["refiner", "drafter", "refiner"]]
    assert scale_kv_budgets(classes, 1000, 100) == [[1000, 100, 100], [100, 1000, 100]]
    assert scale_kv_budgets(classes, [10, 500], [10, 0]) == [[10, 10, 10], [0, 500, 0]]
    assert scale_kv_budgets([], 5, 1) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["drafter"], 2, 1), TypeError, r"classes\[0\] must be a sequence"),
        (("drafter", 2, 1), TypeError, "classes must be a sequence of scales"),
        (([["draft"]], 2, 1), ValueError, r"classes\[0\] must hold .* got 'draft'"),
        (([["drafter"], []], 2, 1), ValueError, r"as many layers at every scale, got \[1, 0\]"),
        (([["drafter"]], 1, 2), ValueError, "small must be no larger than large, got 2 > 1"),
        (([["drafter"]], -1, 0), ValueError, "large must be 0 or more, got -1"),
        (([["drafter"]], [1, 2], 0), ValueError, "large must have one entry per scale, 1, got 2"),
        (([["drafter"]], 2, 0.5), TypeError, "small must be a sequence of ints"),
    ],
)
def test_bad_tables(arguments: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        scale_kv_budgets(*arguments)
