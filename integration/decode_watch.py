"""Whether a model is still what a compiled step was made of: modules, weights, hooks."""

from __future__ import annotations

from itertools import repeat
from operator import attrgetter, contains, is_
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_globals

from lath.integration.decode_recognise import Decoder
from lath.integration.linear import PackedLinear

# Hooks of a backward pass are called in none: where gradients are recorded nothing is fused.
_VERSION = attrgetter("_version")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = (
    module_globals._global_forward_hooks, module_globals._global_forward_pre_hooks,
)  # fmt: skip


def own_class(model: Any) -> Any:
    """The model's class without the patch."""
    cls = type(model)
    return cls.__mro__[1] if "_lath_fused" in cls.__dict__ else cls


def obstacle_of_mode(model: Any) -> str:
    """Why the modules compute something else just now, or ""."""
    if model.training:
        return "the model is in training mode"
    return "autocast" if torch.is_autocast_enabled("cpu") else ""


class Skipped:
    """The modules below a model's root, whose calls a compiled step leaves out."""

    def __init__(self, root: nn.Module) -> None:
        parents = list(root.modules())
        self._places = [(m._modules, name) for m in parents for name in m._modules]
        self._children = [table[name] for table, name in self._places]
        inner = [m for m in parents if m is not root]
        self._hooks = [getattr(m, name) for m in inner for name in _HOOKS]
        self._own = [m.__dict__ for m in inner]
        # What a packed layer is made with it looks after itself (Weights).
        plain = [m for m in inner if not isinstance(m, PackedLinear)]
        self._plain, self._classes = plain, [type(m) for m in plain]
        self._forwards = [(cls, cls.forward) for cls in dict.fromkeys(self._classes)]
        constants = [(m.__dict__, name) for m in plain for name in _constants(m)]
        self._tables = [table for table, _ in constants]
        self._names = [name for _, name in constants]
        self._constants = [table[name] for table, name in constants]
        self._buffers = [(m._buffers, name) for m in plain for name in m._buffers]
        self._contents = self._buffers_now()

    @property
    def changed(self) -> bool:
        """Whether another module stands anywhere, or one of them was made another: its class, its
        forward, its numbers (a scale, an epsilon), its buffers (frequencies of rotation)."""
        now = [table.get(name) for table, name in self._places]
        return not (
            all(map(is_, now, self._children))
            and all(map(is_, map(type, self._plain), self._classes))
            and all(map(is_, map(dict.get, self._tables, self._names), self._constants))
            and all(cls.forward is forward for cls, forward in self._forwards)
            and self._buffers_now() == self._contents
        )

    def _buffers_now(self) -> list[tuple[int, int, int]]:
        buffers = [table.get(name) for table, name in self._buffers]
        return [
            (id(b), b.data_ptr(), 0 if b.is_inference() else b._version)
            for b in buffers
            if b is not None
        ]

    @property
    def obstacle(self) -> str:
        """Why the modules must be called one by one, or ""."""
        if any(self._hooks) and not all(map(_is_idle, self._hooks)):
            return "a module has hooks"
        if any(_GLOBAL_HOOKS):
            return "there are hooks of all modules"
        if any(map(contains, self._own, repeat("forward"))):
            return "the forward of a module was replaced on the instance"
        return ""


def _constants(module: nn.Module) -> list[str]:
    """Attributes that are numbers, or None in the place of one; `training` is asked for by
    itself."""
    kinds = (float, int, bool, type(None))
    return [
        name
        for name, value in module.__dict__.items()
        if type(value) in kinds and name[0] != "_" and name != "training"
    ]


def _is_idle(hooks: dict[int, Any]) -> bool:
    """Whether they are but transformers' own, which note outputs that nobody asked for here."""
    return all(
        getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
        for hook in hooks.values()
    )


class Weights:
    """The packed weights, and the parameters that a step reads where they lie.

    What a module makes of a packed weight it forgets when one of its tensors is replaced, or, once
    it is asked for, written in place.
    """

    def __init__(self, decoder: Decoder) -> None:
        linears = list(decoder.linears())
        self._linears = [linear.__dict__ for linear in linears]
        self._packed = [linear.qtensor for linear in linears]
        self._parameters = [
            (m._parameters, name, getattr(m, name)) for m, name in decoder.weights()
        ]
        self._pointers = [parameter.data_ptr() for _, _, parameter in self._parameters]
        self._biases = [linear._parameters["bias"] for linear in linears]
        self._own = [p for linear in linears for p in linear._parameters.values() if p is not None]
        self._counted = [p for p in self._own if not p.is_inference()]
        self._writes = self._writes_now()

    def _writes_now(self) -> tuple[list[int], list[int]]:
        """Where the tensors of linears lie, and how often they were written in place."""
        return [p.data_ptr() for p in self._own], list(map(_VERSION, self._counted))

    @property
    def changed(self) -> bool:
        packed = [own["_packed"] for own in self._linears]
        biases = [own["_parameters"]["bias"] for own in self._linears]
        if not (all(map(is_, packed, self._packed)) and all(map(is_, biases, self._biases))):
            return True
        if self._writes_now() != self._writes:
            return True
        for table, name, parameter in self._parameters:
            if table[name] is not parameter:
                return True
        pointers = [parameter.data_ptr() for _, _, parameter in self._parameters]
        return pointers != self._pointers
