"""One step of decoding: what a decoder of Llama's shape computes for one new token. Pure data.

For each layer, with r the residual stream, RMSNorm n(x) = w x / sqrt(mean x² + epsilon):

    h = n(r);  q, k, v = products of h;  q, k normalised per head and rotated, where the layer does
    k, v appended to the layer's cache;  o = attention of q over the cache
    r += product of o, normalised before where the layer does
    h = n(r);  g = a(gate(h)) * up(h);  r += down(g), g normalised before where the layer does

with a one of GATES,

and at the end the head's product of the last norm: logits. r is fp32 throughout; q, k, v and o are
rounded once, to the model's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.qtensor import QTensor

# What stands between gate and up: x / (1 + exp(-x)); GELU in its form with tanh (1606.08415),
# x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x³))); max(x, 0)² (2109.08668).
Gate = Literal["silu", "gelu_tanh", "relu2"]
GATES: tuple[Gate, ...] = ("silu", "gelu_tanh", "relu2")
GELU_SLOPE, GELU_CUBIC = 2 * (2 / math.pi) ** 0.5, 0.044715


@dataclass(frozen=True)
class Norm:
    """RMSNorm: weight [C] float, C a multiple of 16."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Product:
    """A linear layer: weight [N, K], bias [N] or None, how its input is rounded."""

    weight: QTensor
    bias: Tensor | None
    activations: ActivationFormat


@dataclass(frozen=True)
class DecoderLayer:
    """One layer. query_norm, key_norm: over a head's channels, or None. rotate: whether queries and
    keys are rotated by their position. scale: of q·k. window: as in ScoreOptions. output_norm,
    down_norm: of what `output` and `down` multiply, or None (the sub-norms of BitNet). function:
    between gate and up."""

    attention_norm: Norm
    query: Product
    key: Product
    value: Product
    output: Product
    query_norm: Norm | None
    key_norm: Norm | None
    rotate: bool
    scale: float
    window: int | None
    mlp_norm: Norm
    gate: Product
    up: Product
    down: Product
    output_norm: Norm | None = None
    down_norm: Norm | None = None
    function: Gate = "silu"


@dataclass(frozen=True)
class DecoderStack:
    """A decoder. embedding: [V, H] of `dtype`, the model's. head: None where the logits are someone
    else's work and the step ends with the last norm. head_dim: a multiple of 16, as H is."""

    embedding: Tensor
    layers: tuple[DecoderLayer, ...]
    norm: Norm
    head: Product | None
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def hidden_size(self) -> int:
        return int(self.embedding.shape[1])
