"""The decoder layers of a model as a chain: each run alone on the hidden states of the one before.

What a layer needs besides hidden states (masks, rotations, positions) is recorded from a run of the
whole model, and so is the proof that the layers are a chain. Nothing here knows an architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN = "hidden_states"


class _StopForward(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass(frozen=True)
class LayerChain:
    """layers: (path, module). arguments: of each layer, positional and named, without hidden
    states; the same for every sequence of this length."""

    layers: tuple[tuple[str, nn.Module], ...]
    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Layer `index` of hidden states [1, L, D] → the same shape."""
        positional, named = self.arguments[index]
        return _first(self.layers[index][1](hidden, *positional, **named))

    def run_wide(self, index: int, hidden: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """`run` in fp32, by a copy of the layer that has these parameters in place of its own."""
        layer = copy.deepcopy(self.layers[index][1]).float()
        for name, value in values.items():
            layer.get_parameter(name).data = value.float()
        positional, named = _wide(self.arguments[index])
        return _first(layer(hidden.float(), *positional, **named))


def find_layers(model: nn.Module, linears: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The layers of the outermost nn.ModuleList that holds every path in `linears`.

    Raises NotImplementedError naming what lies outside, or that there is no such list.
    """
    best: tuple[str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        # The outermost comes first: lists inside layers (experts) are no chain.
        if isinstance(module, nn.ModuleList) and any(n.startswith(f"{path}.") for n in linears):
            best = path, module
            break
    if best is None:
        raise NotImplementedError(
            f"calibration needs a model whose layers are an nn.ModuleList; none holds {linears[:2]}"
        )
    path, layers = best
    outside = [name for name in linears if not name.startswith(f"{path}.")]
    if outside:
        raise NotImplementedError(
            f"calibration reaches the layers in {path!r} only, not {outside[0]!r}"
            f"{f' and {len(outside) - 1} more' if len(outside) > 1 else ''}: skip them, or pack "
            "them by a second lath.patch with quantizer='rtn'"
        )
    return [(f"{path}.{name}", layer) for name, layer in layers.named_children()]


def record_chain(
    model: nn.Module, layers: Sequence[tuple[str, nn.Module]], ids: Tensor
) -> tuple[LayerChain, list[Tensor]]:
    """The chain and the hidden states [1, L, D] that enter its first layer, for ids [S, L].

    Raises NotImplementedError if a layer's input is not the output of the one before, or if its
    other arguments depend on the text.
    """
    runs = [_record(model, layers, row[None]) for row in ids[:2]]
    for other in runs[1:]:
        for (path, _), own, theirs in zip(layers, runs[0][0], other[0], strict=True):
            if not _same(own, theirs):
                raise NotImplementedError(
                    f"calibration needs arguments of {path} that do not depend on the text"
                )
    first = [run[1] for run in runs]
    for row in ids[2:]:
        first.append(_first_hidden(model, layers[0][1], row[None]))
    return LayerChain(tuple(layers), tuple(runs[0][0])), first


def _record(
    model: nn.Module, layers: Sequence[tuple[str, nn.Module]], ids: Tensor
) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], Tensor]:
    seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Tensor] = []

    def before(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(_split(positional, named))

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs.append(_first(output))

    handles = [
        handle
        for _, layer in layers
        for handle in (
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        )
    ]
    try:
        model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != len(layers):
        raise NotImplementedError(
            "calibration needs layers that run once each: "
            f"{len(layers)} layers ran {len(seen)} times"
        )
    for i, (hidden, output) in enumerate(zip([one[0] for one in seen[1:]], outputs, strict=False)):
        if hidden is not output and not torch.equal(hidden, output):
            raise NotImplementedError(
                f"calibration needs layers that are a chain: what enters {layers[i + 1][0]} is not "
                f"what {layers[i][0]} returns"
            )
    return [(positional, named) for _, positional, named in seen], seen[0][0]


def _first_hidden(model: nn.Module, layer: nn.Module, ids: Tensor) -> Tensor:
    kept: list[Tensor] = []

    def stop(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        kept.append(_split(positional, named)[0])
        raise _StopForward

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(ids, use_cache=False)
    except _StopForward:
        pass
    finally:
        handle.remove()
    return kept[0]


@contextmanager
def watching(modules: Sequence[tuple[str, nn.Module]], seen: dict[str, Tensor]) -> Iterator[None]:
    """While the block runs, the latest input of each module is put into `seen` by its name."""

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, positional: tuple[Any, ...]) -> None:
            seen[name] = positional[0]

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _split(
    positional: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, and the other arguments."""
    if positional:
        return positional[0], positional[1:], dict(named)
    others = dict(named)
    return others.pop(HIDDEN), (), others


def _first(output: Any) -> Tensor:
    """A layer returns its hidden states, alone or as the first of a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def _wide(value: Any) -> Any:
    """An argument with every float tensor in it in fp32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)([_wide(one) for one in value])
    if isinstance(value, dict):
        return {key: _wide(one) for key, one in value.items()}
    return value


def _same(own: Any, other: Any) -> bool:
    """Whether two arguments are equal, tensors by value, anything unknown by its type."""
    if isinstance(own, Tensor):
        return isinstance(other, Tensor) and own.shape == other.shape and torch.equal(own, other)
    if isinstance(own, tuple | list):
        return (
            isinstance(other, tuple | list)
            and len(own) == len(other)
            and all(_same(a, b) for a, b in zip(own, other, strict=True))
        )
    if isinstance(own, dict):
        return (
            isinstance(other, dict)
            and own.keys() == other.keys()
            and all(_same(own[key], other[key]) for key in own)
        )
    if own is None or isinstance(own, bool | int | float | str):
        return bool(own == other)
    return type(own) is type(other)
