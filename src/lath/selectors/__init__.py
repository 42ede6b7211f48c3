"""The selectors by name."""

from __future__ import annotations

from typing import Any

from lath.selectors.base import Request, Scored, Selector, parse_count
from lath.selectors.channel_selectors import DoubleSparsity, SparQ, double_sparsity_channels
from lath.selectors.clusterkv import ClusterKV
from lath.selectors.outliers import SUFFIX, Outliers
from lath.selectors.page_selectors import Centroid, PagedEviction, Quest
from lath.selectors.refined import Refined
from lath.selectors.token_selectors import HGCA, TokenSelect

__all__ = [
    "HGCA",
    "SELECTORS",
    "Centroid",
    "ClusterKV",
    "DoubleSparsity",
    "Outliers",
    "PagedEviction",
    "Quest",
    "Refined",
    "Request",
    "Scored",
    "Selector",
    "SparQ",
    "TokenSelect",
    "double_sparsity_channels",
    "selector",
]

SELECTORS: dict[str, type[Selector]] = {
    kind.name: kind
    for kind in (
        Quest, SparQ, DoubleSparsity, TokenSelect, ClusterKV, HGCA, PagedEviction, Centroid,
    )
}  # fmt: skip


def selector(name: str | Selector) -> Selector:
    """The selector of a text form, "quest" or "sparq-32": a name and its option; "quest+outliers",
    "quest+tokens", "quest+tokens-8".

    TypeError or ValueError for anything that is none.
    """
    if isinstance(name, Selector):
        return name
    if not isinstance(name, str):
        raise TypeError(f"selector must be a str or a Selector, got {_described(name)}")
    if name.endswith(SUFFIX):
        return Outliers(selector(name.removesuffix(SUFFIX)))
    inner, plus, suffix = name.rpartition("+")
    if plus and suffix.partition("-")[0] == Refined.name:
        option = suffix.partition("-")[2]
        return Refined(selector(inner), parse_count(name, option, Refined.factor))
    kind, _, option = name.partition("-")
    if kind not in SELECTORS:
        raise ValueError(f"selector must be one of {tuple(SELECTORS)}, got {name!r}")
    return SELECTORS[kind].parse(option)


def _described(value: Any) -> str:
    return f"{type(value).__name__}: {value!r}"
