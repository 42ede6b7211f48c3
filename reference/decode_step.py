"""The definition of one step of decoding in NumPy, float64 inside (`lath.formats.decode_step`).

What is rounded, and when: the residual stream, the norms' outputs and the gated product of the MLP
are fp32; queries, keys, values and the attention's output are rounded once to the model's dtype;
each product rounds its input as its activation format says (`lath.reference.linear`), attention as
its pages say (`lath.reference.attention`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.decode_step import GELU_CUBIC, Gate
from lath.formats.pages import PAGE
from lath.reference import floats
from lath.reference.attention import Cache, Options, attend
from lath.reference.linear import linear
from lath.reference.pages import write_page

Array = NDArray[np.float64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Norm:
    """weight [C]."""

    weight: Floats
    epsilon: float


@dataclass(frozen=True)
class Product:
    """The arguments of `lath.reference.linear.linear` behind x."""

    codes: NDArray[np.uint8]
    scales: Floats
    zeros: Floats | None
    codec: Codec
    bias: Floats | None
    activations: ActivationFormat
    outer: Floats | None = None
    table: Floats | None = None


@dataclass(frozen=True)
class Layer:
    """`lath.formats.decode_step.DecoderLayer` with arrays."""

    attention_norm: Norm
    query: Product
    key: Product
    value: Product
    output: Product
    query_norm: Norm | None
    key_norm: Norm | None
    rotate: bool
    mlp_norm: Norm
    gate: Product
    up: Product
    down: Product
    output_norm: Norm | None = None
    down_norm: Norm | None = None
    function: Gate = "silu"


def normalise(x: Array, norm: Norm) -> Array:
    """x [..., C] / sqrt(mean x² + epsilon) * weight (RMSNorm, 1910.07467)."""
    mean = (x**2).mean(axis=-1, keepdims=True) + np.float32(norm.epsilon)
    normed: Array = x / np.sqrt(mean) * norm.weight
    return normed


def multiply(x: Array, product: Product) -> Array:
    """The product of a vector x [K], rounded to fp32 first: [N]."""
    given = dataclasses.asdict(product)
    given["codec"], given["activations"] = product.codec, product.activations
    y: Array = linear(x.astype(np.float32)[None], **given)[0]
    return y


def rotate(x: Array, cosines: Floats, sines: Floats) -> Array:
    """x [heads, D]; channel j turns with channel j + D/2 (RoPE, 2104.09864, in halves).

    cosines, sines: [D], those of the first half repeated.
    """
    first, second = np.split(x, 2, axis=-1)
    return x * cosines + np.concatenate([-second, first], axis=-1) * sines


def silu(x: Array) -> Array:
    """x / (1 + exp(-x)), without overflow."""
    power = np.exp(-np.abs(x))
    y: Array = x * np.where(x < 0, power, 1) / (1 + power)
    return y


def gelu_tanh(x: Array) -> Array:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³))) / 2 (1606.08415)."""
    y: Array = x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + GELU_CUBIC * x**3))) / 2
    return y


def relu2(x: Array) -> Array:
    """max(x, 0)² (2109.08668)."""
    y: Array = np.maximum(x, 0) ** 2
    return y


FUNCTIONS: dict[Gate, Callable[[Array], Array]] = {
    "silu": silu, "gelu_tanh": gelu_tanh, "relu2": relu2,
}  # fmt: skip


def round_to(x: Array, dtype: str) -> Floats:
    """Rounded once to "fp32", "fp16" or "bf16", as fp32."""
    narrow = x.astype(np.float32)
    if dtype == "bf16":
        return floats.round_bfloat16(narrow)
    return narrow.astype(np.float16).astype(np.float32) if dtype == "fp16" else narrow


def append(cache: Cache, keys: Floats, values: Floats) -> Cache:
    """The cache of one sequence with one more token, keys [Hkv, D] and values [Hkv, E].

    It goes to the first float part while that has room and nothing stands behind it, else to the
    last; when that has 64 tokens it becomes a page, in a new record.
    """
    fields: dict[str, Any] = {"lengths": cache.lengths + 1}
    length = int(cache.lengths[0])
    first = cache.first_lengths is not None and int(cache.first_lengths[0]) == length < PAGE
    part = "first" if first else "last"
    counts = getattr(cache, f"{part}_lengths")
    for name, new in ((f"{part}_keys", keys), (f"{part}_values", values)):
        fields[name] = getattr(cache, name).copy()
        fields[name][0, :, int(counts[0])] = new
    fields[f"{part}_lengths"] = counts + 1
    grown = dataclasses.replace(cache, **fields)
    if first or int(counts[0]) + 1 < PAGE:
        return grown
    return _with_page(grown, length + 1 - PAGE)


def _with_page(cache: Cache, start: int) -> Cache:
    """The full last part as a page."""
    assert cache.last_keys is not None
    assert cache.last_values is not None
    pages = [
        write_page(keys, values, cache.format, cache.dtype)
        for keys, values in zip(cache.last_keys[0], cache.last_values[0], strict=True)
    ]
    number, used = len(cache.records), int(cache.page_counts[0])
    entries = {"table": number, "starts": start, "counts": PAGE}
    return dataclasses.replace(
        cache,
        records=np.concatenate([cache.records, np.stack([record for record, _ in pages])[None]]),
        index=np.concatenate([cache.index, np.stack([row for _, row in pages])[None]]),
        page_counts=cache.page_counts + 1,
        last_lengths=np.zeros_like(cache.page_counts),
        **{
            name: np.append(getattr(cache, name)[:, :used], [[entry]], axis=1).astype(np.int32)
            for name, entry in entries.items()
        },
    )


def decode_layer(
    residual: Floats,
    layer: Layer,
    cache: Cache,
    options: Options,
    cosines: Floats,
    sines: Floats,
) -> tuple[Array, Cache]:
    """One layer for one token: residual [H] → residual [H] and the cache with the token.

    options: of the attention; cosines, sines: [D] of the token's position.
    """
    width = cache.format.key_dim
    hidden = normalise(residual.astype(np.float64), layer.attention_norm)
    heads = {}
    for name in ("query", "key", "value"):
        heads[name] = multiply(hidden, getattr(layer, name)).reshape(-1, width)
        norm = getattr(layer, f"{name}_norm", None)
        if norm is not None:
            heads[name] = normalise(heads[name], norm)
        if layer.rotate and name != "value":
            heads[name] = rotate(heads[name], cosines, sines)
    q, k, v = (round_to(heads[name], cache.dtype) for name in ("query", "key", "value"))
    cache = append(cache, k, v)
    o, _ = attend(q[None, :, None], np.ones(1, np.int32), cache, options)
    attended = round_to(o.reshape(-1), cache.dtype).astype(np.float64)
    if layer.output_norm is not None:
        attended = normalise(attended, layer.output_norm)
    stream = residual + multiply(attended, layer.output)
    hidden = normalise(stream, layer.mlp_norm)
    gated = FUNCTIONS[layer.function](multiply(hidden, layer.gate)) * multiply(hidden, layer.up)
    if layer.down_norm is not None:
        gated = normalise(gated, layer.down_norm)
    return stream + multiply(gated, layer.down), cache
