"""One step of decoding: what a decoder of Llama's shape computes for one new token. Pure data.

For each layer, with r the residual stream, RMSNorm n(x) = w x / sqrt(mean x² + epsilon):

    h = n(r);  q, k, v = products of h;  q, k normalised per head and rotated, where the layer does
    k, v appended to the layer's cache;  o = attention of q over the cache
    r += product of o
    h = n(r);  r += down(silu(gate(h)) * up(h))

and at the end the head's product of the last norm: logits. r is fp32 throughout; q, k, v and o are
rounded once, to the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.qtensor import QTensor


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
    keys are rotated by their position. scale: of q·k. window: as in ScoreOptions."""

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
