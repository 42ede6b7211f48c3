"""Where AWQ's column scales go: into the norm or the linear layer that makes the input.

    input_layernorm                        → q_proj, k_proj, v_proj
    pre_feedforward_ or post_attention_layernorm → gate_proj, up_proj
    v_proj (rows)                          → o_proj, heads that share a head of values alike
    up_proj (rows)                         → down_proj of a gated MLP

Names are only where to look. That a norm can be scaled is tried on the norm, that nothing else
reads it on the whole layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NORMS = {
    "q_proj": ("input_layernorm",),
    "gate_proj": ("pre_feedforward_layernorm", "post_attention_layernorm"),
}


@dataclass(frozen=True)
class Folding:
    """What reads x (paths in the layer), and what makes it. shared: int64 [K], the scale of each
    column, where the producer has fewer rows than the readers have columns."""

    readers: tuple[str, ...]
    producer: str
    shared: Tensor | None = None


def find_folding(layer: nn.Module, readers: Sequence[str]) -> Folding | str:
    """The folding of linear layers that read one input, or why there is none."""
    last = {path.rsplit(".", 1)[-1]: path for path in readers}
    modules = dict(layer.named_modules())
    for first, norms in _NORMS.items():
        if first in last:
            norm = next((name for name in norms if name in modules), None)
            if norm is None:
                return f"the layer has none of {norms}, which would make its input"
            if scaled_norm(modules[norm], None) is None:
                return f"{norm} ({type(modules[norm]).__name__}) cannot be scaled by its weight"
            return Folding(tuple(readers), norm)
    for reader, producer in (("o_proj", "v_proj"), ("down_proj", "up_proj")):
        if tuple(last) == (reader,):
            return _linear_folding(layer, last[reader], producer)
    return f"nothing is known to make the input of {', '.join(last)}"


def _linear_folding(layer: nn.Module, reader: str, producer: str) -> Folding | str:
    path = f"{reader.rpartition('.')[0]}.{producer}".lstrip(".")
    modules = dict(layer.named_modules())
    source, target = modules.get(path), modules[reader]
    parent = modules[reader.rpartition(".")[0]]
    if type(source) is not nn.Linear or not isinstance(target, nn.Linear):
        return f"there is no {producer} beside it that is an nn.Linear"
    if producer == "up_proj":
        if not hasattr(parent, "gate_proj") or source.out_features != target.in_features:
            return "its MLP is not a gated one"
        return Folding((reader,), path)
    head = getattr(parent, "head_dim", None)
    if not isinstance(head, int) or source.out_features % head or target.in_features % head:
        return "the head_dim of its attention is not known"
    heads, kept = target.in_features // head, source.out_features // head
    if heads % kept:
        return f"{heads} heads do not share {kept} heads of values evenly"
    head_of = torch.arange(heads) // (heads // kept)
    return Folding((reader,), path, (head_of[:, None] * head + torch.arange(head)).reshape(-1))


def scaled_norm(norm: nn.Module, scales: Tensor | None) -> nn.Module | None:
    """A copy in fp32 whose output is divided by scales [D]; None if its weight does not do that.

    scales None: only try. The weight w may act as w or as 1 + w (Gemma).
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    size = len(weight)
    if scales is None:
        scales = torch.linspace(0.5, 2, size, device=weight.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, size, generator=generator).to(weight.device)
    with torch.no_grad():
        own = copy.deepcopy(norm).float()
        wide, s = own.get_parameter("weight"), scales.float()
        for changed in (wide / s, (1 + wide) / s - 1):
            made = copy.deepcopy(own)
            made.get_parameter("weight").data = changed
            bias = getattr(made, "bias", None)
            if isinstance(bias, Tensor):
                bias.data = bias / s
            expected, got = own(x), made(x) * s
            # A handful of fp32 roundings; 1 + weight may cancel.
            allowed = 2.0**-20 * (expected.abs() + 1)
            if bool(((got - expected).abs() <= allowed).all()):
                return made
    return None


def row_scales(scales: Tensor, folding: Folding, rows: int) -> Tensor:
    """Scales [K] of the readers' columns → of the producer's rows [N]."""
    if folding.shared is None:
        return scales
    own = scales.new_empty(rows)
    own[folding.shared.to(scales.device)] = scales
    return own
