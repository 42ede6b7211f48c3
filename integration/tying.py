"""Tied weights of Hugging Face models: the records that tie an output layer to the embedding.

`tie_weights()`, which saving, resizing and loading call, assigns the embedding's weight to the
output layer wherever `config.tie_word_embeddings` and `all_tied_weights_keys` say so. A packed
output layer has a weight of its own, so for as long as it is in the model they must not say so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from lath.integration.find import output_layer


def untie(model: nn.Module, modules: Collection[nn.Module]) -> Callable[[], None]:
    """Strike `modules`, still in place, from every record of tied weights.

    Returns the call that restores the records. Does nothing to models that keep none.
    """
    chosen = {id(module) for module in modules}
    restore: list[Callable[[], None]] = []
    for owner in model.modules():
        config = getattr(owner, "config", None)
        tied = getattr(config, "tie_word_embeddings", None) is True
        if tied and id(output_layer(owner)) in chosen:
            restore.append(_set(config, "tie_word_embeddings", False))
        keys = owner.__dict__.get("all_tied_weights_keys")
        if isinstance(keys, dict):
            others = {k: v for k, v in keys.items() if id(_module_of(owner, k)) not in chosen}
            if len(others) < len(keys):
                restore.append(_set(owner, "all_tied_weights_keys", others))

    def undo() -> None:
        for change in reversed(restore):
            change()

    return undo


def _module_of(owner: nn.Module, parameter: str) -> nn.Module | None:
    try:
        return owner.get_submodule(parameter.rpartition(".")[0])
    except AttributeError:
        return None


def _set(target: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute; returns the call that sets it back."""
    before = getattr(target, name)
    setattr(target, name, value)
    return lambda: setattr(target, name, before)
