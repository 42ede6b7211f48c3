"""Which linear layers a model has, under which names, and which must be left alone and why."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lath.integration.linear import PackedLinear
from lath.verbs.checks import FLOAT_DTYPES

OUTPUT_LAYER = "lm_head"
_ADAPTER = "it belongs to an adapter beside a base layer"
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One linear layer. name: its first path; also_named: the others. places: where it is stored,
    as (parent, attribute, path). reason: why it must stay as it is, or ""."""

    module: nn.Linear | PackedLinear
    name: str
    also_named: tuple[str, ...]
    places: tuple[tuple[nn.Module, str, str], ...]
    reason: str


@dataclass(frozen=True)
class Selection:
    """Which layers were asked for.

    only: patterns, one of which must fit; None: all. skip: patterns, none of which may fit. Among
    both, OUTPUT_LAYER fits the model's output layer under any name.
    """

    skip: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

    def reason_against(self, names: Sequence[str], is_output: bool) -> str:
        """Why a layer of these names is left alone, or ""."""
        if self.only is not None and not _first_fit(names, self.only, is_output):
            return f"not in only={self.only!r}"
        pattern = _first_fit(names, self.skip, is_output)
        return f"skip={pattern!r}" if pattern else ""


def find_linears(
    model: nn.Module, selection: Selection, without_weights: bool = False
) -> list[Found]:
    """Every nn.Linear and PackedLinear of `model`, each module object once, in model order.

    without_weights: a weight on the meta device is no reason to leave a layer alone.
    """
    outputs = {id(layer) for layer in output_layers(model)}
    adapters = _in_adapters(model)
    found = []
    for module, names, places in _walk(model):
        reason = selection.reason_against(names, id(module) in outputs)
        one = Found(module, names[0], tuple(names[1:]), tuple(places), reason)
        if not reason:
            reason = _ADAPTER if id(module) in adapters else _obstacle(one, without_weights)
            one = dataclasses.replace(one, reason=reason)
        found.append(one)
    return found


# A layer, its paths, and the places where it is stored.
_Seen = tuple[nn.Linear | PackedLinear, list[str], list[tuple[nn.Module, str, str]]]


def _walk(model: nn.Module) -> list[_Seen]:
    if isinstance(model, nn.Linear | PackedLinear):
        return [(model, ["(the model itself)"], [])]
    seen: dict[int, _Seen] = {}
    stored = set()
    for path, parent in model.named_modules(remove_duplicate=False):
        for attribute, child in parent._modules.items():
            if not isinstance(child, nn.Linear | PackedLinear):
                continue
            name = f"{path}.{attribute}" if path else attribute
            _, names, places = seen.setdefault(id(child), (child, [], []))
            names.append(name)
            # A shared parent is met under each of its names, but stores its child once.
            if (id(parent), attribute) not in stored:
                stored.add((id(parent), attribute))
                places.append((parent, attribute, name))
    return list(seen.values())


def _in_adapters(model: nn.Module) -> set[int]:
    """What stands beside a `base_layer`, as PEFT names the layer that an adapter changes: small,
    and often in training."""
    owners = [module for module in model.modules() if "base_layer" in module._modules]
    return {
        id(inner)
        for owner in owners
        for name, child in owner._modules.items()
        if name != "base_layer" and child is not None
        for inner in child.modules()
    }


def _obstacle(one: Found, without_weights: bool) -> str:
    """Why a layer that was asked for cannot be replaced, or ""."""
    module = one.module
    if isinstance(module, PackedLinear):
        return ""
    if not one.places:
        return "it has no parent to be replaced in"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__}, a subclass of nn.Linear"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "it has hooks, which would be lost"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if any(isinstance(parent, nn.TransformerEncoderLayer) for parent, _, _ in one.places):
        return "nn.TransformerEncoderLayer reads its weight itself"
    if module.weight.is_meta and not without_weights:
        return "on the meta device: it has no weights yet"
    if module.weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {module.weight.dtype}"
    return "" if module.weight.numel() else "its weight is empty"


def _first_fit(names: Sequence[str], patterns: Sequence[str], is_output: bool) -> str:
    for pattern in patterns:
        if is_output and pattern == OUTPUT_LAYER:
            return pattern
        if any(matches(name, pattern) for name in names):
            return pattern
    return ""


def matches(path: str, pattern: str) -> bool:
    """Whether `pattern` fits the end of `path`, or of a module above it."""
    parts = path.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        fnmatch.fnmatchcase(p, pattern) or fnmatch.fnmatchcase(p, f"*.{pattern}") for p in above
    )


def check_selection(model: nn.Module, skip: Sequence[str], only: Sequence[str] | None) -> Selection:
    """The patterns, checked: one that fits no module protects or names nothing and is an error.

    "lm_head" in `skip` may be absent: it is the default, and models without a head have none.
    """
    for name, patterns in (("skip", skip), ("only", only)):
        if patterns is None:
            continue
        if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
            raise TypeError(
                f"{name} must be a sequence of str, such as ('lm_head',), got {patterns!r}"
            )
        for pattern in patterns:
            if (name, pattern) != ("skip", OUTPUT_LAYER):
                _check_pattern(model, name, pattern)
    return Selection(tuple(skip), None if only is None else tuple(only))


def _check_pattern(model: nn.Module, name: str, pattern: str) -> None:
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    if any(matches(path, pattern) for path in paths):
        return
    if pattern == OUTPUT_LAYER and any(True for _ in output_layers(model)):
        return
    parts = sorted({part for path in paths for part in path.split(".")})
    close = difflib.get_close_matches(pattern.split(".")[-1], parts, n=3)
    raise ValueError(
        f"{name} pattern {pattern!r} fits no module of {type(model).__name__}"
        f"{'; close names: ' + ', '.join(close) if close else ''}"
    )


def wrapped(model: nn.Module) -> nn.Module:
    """The model that a wrapper of PEFT's kind is about; any other model itself."""
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    return inner if isinstance(inner, nn.Module) else model


def output_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The output layers that Hugging Face models in `model` name by `get_output_embeddings`."""
    for owner in model.modules():
        layer = output_layer(owner)
        if layer is not None:
            yield layer


def output_layer(owner: nn.Module) -> nn.Module | None:
    get = getattr(owner, "get_output_embeddings", None)
    if not callable(get):
        return None
    try:
        layer = get()
    except (NotImplementedError, AttributeError):
        return None
    return layer if isinstance(layer, nn.Module) else None
