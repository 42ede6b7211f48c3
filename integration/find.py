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


def find_linears(
    model: nn.Module, skip: Sequence[str], without_weights: bool = False
) -> list[Found]:
    """Every nn.Linear and PackedLinear of `model`, each module object once, in model order.

    without_weights: a weight on the meta device is no reason to leave a layer alone.
    """
    found = [
        Found(module, names[0], tuple(names[1:]), tuple(places), "")
        for module, names, places in _walk(model)
    ]
    outputs = {id(layer) for layer in output_layers(model)} if OUTPUT_LAYER in skip else set()
    return [
        dataclasses.replace(one, reason=_reason(one, skip, outputs, without_weights))
        for one in found
    ]


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


def _reason(one: Found, skip: Sequence[str], outputs: set[int], without_weights: bool) -> str:
    for name in (one.name, *one.also_named):
        for pattern in skip:
            if matches(name, pattern):
                return f"skip={pattern!r}"
    module = one.module
    if id(module) in outputs:
        return f"output layer, which skip={OUTPUT_LAYER!r} means"
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


def matches(path: str, pattern: str) -> bool:
    """Whether `pattern` fits the end of `path`, or of a module above it."""
    parts = path.split(".")
    above = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(
        fnmatch.fnmatchcase(p, f"*.{pattern}") or fnmatch.fnmatchcase(p, pattern) for p in above
    )


def check_skip(model: nn.Module, skip: Sequence[str]) -> tuple[str, ...]:
    """`skip` as a tuple; a pattern that fits no module is an error, for it protects nothing.

    "lm_head" may be absent: it is the default, and models without a head have none.
    """
    if isinstance(skip, str) or not all(isinstance(pattern, str) for pattern in skip):
        raise TypeError(f"skip must be a sequence of str, such as ('lm_head',), got {skip!r}")
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    for pattern in skip:
        if pattern == OUTPUT_LAYER or any(matches(path, pattern) for path in paths):
            continue
        names = sorted({part for path in paths for part in path.split(".")})
        close = difflib.get_close_matches(pattern.split(".")[-1], names, n=3)
        raise ValueError(
            f"skip pattern {pattern!r} fits no module of {type(model).__name__}"
            f"{'; close names: ' + ', '.join(close) if close else ''}"
        )
    return tuple(skip)


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
