"""Act-order without a gather: the order of a layer's columns, folded into the layers before it.

Sorting the columns of a layer by how large its inputs are puts columns of like importance into one
group, but its input must then come in that order. Between two linear layers with nothing but
elementwise functions that costs nothing: the rows of the layers before are sorted the same way,
once (TP-Aware dequantization, 2402.04925). Scales stay contiguous, and a rank of a tensor-parallel
pair takes its piece of the rows and of the columns as they lie, without an all-gather between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

# The layers of a gated MLP, as Llama and most models since name them.
_PREVIOUS, _FOLLOWING = ("gate_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class Pair:
    """Names of the layers whose outputs, through elementwise functions alone, are the inputs of
    `following`."""

    previous: tuple[str, ...]
    following: str


class SortedPairs:
    """The pairs of a model that are sorted now. orders: by the name of the following layer, int64
    [K], which column of before stands at each place. `undo()` or the end of a `with` restores the
    weights bit for bit."""

    def __init__(self, model: nn.Module, orders: dict[Pair, Tensor]) -> None:
        self._model, self._orders = model, orders
        names = [name for pair in orders for name in (*pair.previous, pair.following)]
        self._modules = {name: model.get_submodule(name) for name in names}
        self.orders = {pair.following: order for pair, order in orders.items()}

    def undo(self) -> None:
        """RuntimeError while a layer is replaced by a packed one: undo that patch first."""
        for name, module in self._modules.items():
            if self._model.get_submodule(name) is not module:
                raise RuntimeError(f"{name} was replaced since it was sorted: undo the patch first")
        for pair, order in self._orders.items():
            _apply(self._model, pair, order.argsort())
        self._orders, self.orders = {}, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo()


def sort_pairs(
    model: nn.Module, importance: Mapping[str, Tensor], pairs: Sequence[Pair] | None = None
) -> SortedPairs:
    """Sort the columns of each following layer by importance, largest first, and the rows and
    biases of the layers before it alike, in place. What the model computes stays the same, up to
    the order in which a layer adds; `lath.patch` then finds columns of like importance in a group.

    importance: [K] by the name of the following layer, such as `mean_square_inputs` gives. pairs:
    None: gate_proj and up_proj before down_proj, in every module that has the three and, besides,
    only parts without parameters. Of equal importance the first column comes first.

    ValueError naming the layer if one is no plain nn.Linear, shares its weight with another, does
    not fit its pair or has no importance; the model is then unchanged.
    """
    pairs = find_pairs(model) if pairs is None else list(pairs)
    if not pairs:
        raise ValueError(
            f"pairs: {type(model).__name__} has no {', '.join(_PREVIOUS)} and {_FOLLOWING} in one "
            "module; name the layers as lath.integration.pairs.Pair"
        )
    orders = {pair: _order(model, pair, importance) for pair in pairs}
    for pair, order in orders.items():
        _apply(model, pair, order)
    return SortedPairs(model, orders)


def find_pairs(model: nn.Module) -> list[Pair]:
    """The gated MLPs of a model with nothing between their layers that has parameters."""
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        wanted = {*_PREVIOUS, _FOLLOWING}
        others = [child for key, child in children.items() if key not in wanted]
        own = [*module.parameters(recurse=False), *(p for c in others for p in c.parameters())]
        if wanted <= children.keys() and not own:
            prefix = f"{name}." if name else ""
            found.append(Pair(tuple(prefix + p for p in _PREVIOUS), prefix + _FOLLOWING))
    return found


@contextmanager
def mean_square_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """In the block, what runs through the nn.Linear layers of a model is recorded: by name, fp32
    [K], the mean square of each input: the diagonal of the Hessian of the squared error of the
    layer's output, over 2. Filled at the end of the block; layers that did not run are left out."""
    sums: dict[str, tuple[Tensor, int]] = {}
    means: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        before, count = sums.get(name, (rows.new_zeros(rows.shape[1]), 0))
        sums[name] = before + rows.square().sum(dim=0), count + len(rows)

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()
        means.update({name: (total / n).float() for name, (total, n) in sums.items() if n})


def _order(model: nn.Module, pair: Pair, importance: Mapping[str, Tensor]) -> Tensor:
    """The order of the columns of the following layer, after every check of the pair."""
    following = _linear(model, pair.following)
    for name in pair.previous:
        rows = _linear(model, name).out_features
        if rows != following.in_features:
            raise ValueError(
                f"{name} has {rows} outputs, {pair.following} {following.in_features} inputs: they "
                "are no pair"
            )
    if pair.following not in importance:
        raise ValueError(f"importance must have {pair.following!r}, got {sorted(importance)}")
    own = importance[pair.following]
    if tuple(own.shape) != (following.in_features,) or not bool(torch.isfinite(own).all()):
        raise ValueError(
            f"importance of {pair.following} must be {following.in_features} finite numbers, got "
            f"shape {[*own.shape]}"
        )
    return own.to(following.weight.device).argsort(descending=True, stable=True)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if type(module) is not nn.Linear:
        raise ValueError(f"{name} must be a plain nn.Linear, got {type(module).__name__}")
    names = [
        other
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is module.weight
    ]
    if len(names) > 1:
        raise ValueError(f"{name} shares its weight: {names}")
    return module


@torch.no_grad()
def _apply(model: nn.Module, pair: Pair, order: Tensor) -> None:
    following = model.get_submodule(pair.following)
    assert isinstance(following, nn.Linear)
    following.weight.copy_(following.weight[:, order])
    for name in pair.previous:
        previous = model.get_submodule(name)
        assert isinstance(previous, nn.Linear)
        previous.weight.copy_(previous.weight[order])
        if previous.bias is not None:
            previous.bias.copy_(previous.bias[order])
