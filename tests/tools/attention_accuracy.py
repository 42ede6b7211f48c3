"""Synthetic attention inputs that hurt 8-bit arithmetic, and how far a result is off.

Inputs are fp16 numbers, so that every contender sees the same; the truth is attention in float64
of those numbers. An error is never one cosine over everything: outputs whose mean is off by half
can have a flat cosine of 1.000000.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from lath.formats.attention import PageView, Precision, Queries, QueryFormat, ScoreOptions
from lath.formats.pages import PAGE, PageFormat, page_codec
from lath.reference import attention as definition
from lath.reference.pages import write_page

Array = NDArray[np.float64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Inputs:
    """One attention: q [Hq, Lq, D], k [Hkv, Lk, D], v [Hkv, Lk, D], numbers of fp16.

    causal: right-aligned. mask: bool [Lq, Lk], True = may be read. bias: [Lq, Lk].
    """

    name: str
    q: Floats
    k: Floats
    v: Floats
    causal: bool = False
    mask: NDArray[np.bool_] | None = None
    bias: Floats | None = None

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)


@dataclass(frozen=True)
class Scheme:
    """How lath holds keys and values and multiplies by them.

    keep: the first 64 tokens and what does not fill the last page stay as they are.
    """

    name: str
    keys: str
    values: str
    precision: Precision = "float"
    query: QueryFormat = "int8"
    keep: bool = False
    draft: bool = False

    def page_format(self, inputs: Inputs) -> PageFormat:
        dim = inputs.k.shape[-1]
        return PageFormat(page_codec(self.keys), page_codec(self.values), dim, dim)


SCHEMES = [
    Scheme("int8 keys", "int8", "float"),
    Scheme("int4 keys", "int4", "float"),
    Scheme("int8 K and V, P float", "int8", "int8", "float"),
    Scheme("int8 K and V, P int16", "int8", "int8", "int16"),
    Scheme("int8 K and V, P int8", "int8", "int8", "int8"),
    Scheme("e4m3 K and V, P e4m3", "e4m3", "e4m3", "e4m3", "e4m3"),
    Scheme("int8-planes, draft, P int8", "int8-planes", "int8-planes", "int8", draft=True),
    Scheme("int4 K and V, q e4m3, P float", "int4", "int4", "float", "e4m3"),
    Scheme("int4 K and V, P int8", "int4", "int4", "int8"),
    Scheme("int4 K, int2 V (k4v2), P int8", "int4", "int2", "int8"),
]


@dataclass(frozen=True)
class Errors:
    """Of outputs [Hq, Lq, D]; rows that read nothing must be 0 and count as exact.

    relative_l1: Σ|o - o64| / Σ|o64|. worst_row: the largest such quotient of one row.
    least_cosine: the smallest cosine between a row and its truth.
    """

    relative_l1: float
    worst_row: float
    least_cosine: float

    def __str__(self) -> str:
        return f"{self.relative_l1:.4f} / {self.worst_row:.4f} / {self.least_cosine:.6f}"


def errors(o: NDArray[np.floating], exact: Array) -> Errors:
    """How far o is from the truth. NaN where o has one."""
    off, size = np.abs(o - exact).sum(axis=-1), np.abs(exact).sum(axis=-1)
    dead = size == 0
    norms = np.linalg.norm(o, axis=-1) * np.linalg.norm(exact, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.where(dead & (off == 0), 1, (o * exact).sum(axis=-1) / norms)
        rows = np.where(dead, np.where(off == 0, 0, np.inf), off / size)
    return Errors(float(off.sum() / size.sum()), float(rows.max()), float(cosine.min()))


def truth(inputs: Inputs) -> Array:
    """softmax(scale q·k + bias, masked) v in float64, [Hq, Lq, D]; 0 where nothing is read."""
    group = len(inputs.q) // len(inputs.k)
    k, v = (np.repeat(x.astype(np.float64), group, axis=0) for x in (inputs.k, inputs.v))
    s = inputs.scale * inputs.q.astype(np.float64) @ k.transpose(0, 2, 1)
    if inputs.bias is not None:
        s = s + inputs.bias
    rows, length = s.shape[1:]
    readable = np.ones((rows, length), np.bool_) if inputs.mask is None else inputs.mask
    if inputs.causal:
        readable = readable & np.tri(rows, length, length - rows, dtype=np.bool_)
    s = np.where(readable, s, -np.inf)
    largest = s.max(axis=2, keepdims=True)
    p = np.exp(s - np.where(np.isneginf(largest), 0, largest))
    total = p.sum(axis=2, keepdims=True)
    result: Array = p @ v / np.where(total == 0, 1, total)
    return result


# Inputs


def half(x: NDArray[np.floating]) -> Floats:
    """x rounded to fp16, as fp32."""
    return x.astype(np.float16).astype(np.float32)


def gaussian(
    rows: int = 256, length: int = 1024, dim: int = 128, seed: int = 0, sharpness: float = 1.0,
    value_mean: float = 0.3, heads: tuple[int, int] = (2, 1), name: str = "Gaussian",
) -> Inputs:  # fmt: skip
    """Normal q, k, v; the values around `value_mean`; q times `sharpness`. heads: of q, of k."""
    rng = np.random.default_rng(seed)
    q = sharpness * rng.standard_normal((heads[0], rows, dim))
    k = rng.standard_normal((heads[1], length, dim))
    v = rng.standard_normal((heads[1], length, dim)) + value_mean
    return Inputs(name, half(q), half(k), half(v))


def biased_keys(rows: int = 256, length: int = 1024, dim: int = 128, seed: int = 0) -> Inputs:
    """Keys with a bias per channel that drifts slowly along the sequence, as rotary models have.

    The bias is 4 normal numbers wide and the drift one period of a sine, 1.6 wide.
    """
    inputs = gaussian(rows, length, dim, seed)
    rng = np.random.default_rng(seed + 1)
    bias, drift = 4 * rng.standard_normal(dim), 1.6 * rng.standard_normal(dim)
    phase = rng.uniform(0, 2 * np.pi, dim)
    along = np.sin(2 * np.pi * np.arange(length)[:, None] / length + phase)
    return replace(inputs, name="bias and drift", k=half(inputs.k + bias + drift * along))


def outlier_tokens(seed: int = 0) -> Inputs:
    """Four tokens whose values are 20 times as large."""
    inputs = gaussian(seed=seed)
    v = inputs.v.copy()
    v[:, np.random.default_rng(seed + 1).choice(v.shape[1], 4, replace=False)] *= 20
    return replace(inputs, name="4 outlier tokens in V", v=half(v))


def sink(nats: float, channels: int | None = None, length: int = 1024, seed: int = 0) -> Inputs:
    """Token 0 scores `nats` above each row's largest other score, and its values are small.

    Its key, of length 16 where others have 11.3, points where each row of q has been moved to.
    channels: the key is zero but for so many channels, which makes them outliers of page 0.
    """
    inputs = gaussian(length=length, seed=seed)
    q, k, v = inputs.q.astype(np.float64), inputs.k.astype(np.float64), inputs.v.copy()
    towards = np.random.default_rng(seed + 1).standard_normal(k.shape[-1])
    towards[channels or k.shape[-1] :] = 0
    towards /= np.linalg.norm(towards)
    k[0, 0] = 16 * towards
    k = half(k).astype(np.float64)
    v[:, 0] *= 0.05
    low, high = np.full(q.shape[:2], -50.0), np.full(q.shape[:2], 200.0)
    for _ in range(40):  # the sink's lead grows with the move: halve the interval
        middle = (low + high) / 2
        s = inputs.scale * (q + middle[..., None] * towards) @ k[0].T
        short = s[..., 0] - s[..., 1:].max(axis=-1) < nats
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    name = f"sink at {nats:+g} nats" + (f", {channels} outlier channels" if channels else "")
    moved = half(q + high[..., None] * towards)
    return replace(inputs, name=name, q=moved, k=half(k), v=half(v))


def stress_inputs() -> list[Inputs]:
    """The cases that one number per scheme is reported for."""
    return [
        biased_keys(),
        gaussian(),
        gaussian(value_mean=0.0, name="Gaussian, V without mean"),
        gaussian(sharpness=4.0, name="q times 4"),
        outlier_tokens(),
        *(sink(nats) for nats in (0, 4, 6)),
        sink(6, channels=2),
    ]


TAILS = (64, 65, 80, 100, 128, 257)


def tail_inputs(dim: int = 64) -> list[Inputs]:
    """Lengths that fill a page and that do not, all keys nearly equally important."""
    found = []
    for length in TAILS:
        flat = gaussian(128, length, dim, length, 0.1, name=f"{length} keys, flat scores")
        found.append(flat)
        square = gaussian(length, length, dim, length)
        found.append(replace(square, name=f"{length} keys, causal", causal=True))
    return found


def mask_inputs(dim: int = 64) -> list[Inputs]:
    """Causal with fewer and with more queries than keys, masks, a bias."""
    base = gaussian(100, 192, dim, 5)
    rng = np.random.default_rng(6)
    random = rng.random((100, 192)) < 0.4
    dead = random.copy()
    dead[::3] = False
    distance = np.abs(np.arange(100)[:, None] + 92 - np.arange(192)[None, :])
    return [
        replace(base, name="causal, 100 queries, 192 keys", causal=True),
        replace(gaussian(192, 100, dim, 7), name="causal, 192 queries, 100 keys", causal=True),
        replace(base, name="boolean mask", mask=random),
        replace(base, name="boolean mask, every third row dead", mask=dead),
        replace(base, name="bias -0.1 per token of distance", bias=half(-0.1 * distance)),
    ]


# lath's definition and kernels


def cache_of(inputs: Inputs, scheme: Scheme) -> definition.Cache:
    """The keys and values of one sequence in pages, written by the definition."""
    fmt = scheme.page_format(inputs)
    heads, length, dim = inputs.k.shape
    first = min(PAGE, length) if scheme.keep else 0
    last = (length - first) % PAGE if scheme.keep else 0
    starts = np.arange(first, length - last, PAGE, dtype=np.int32)
    counts = np.minimum(PAGE, length - last - starts).astype(np.int32)
    written = [
        [
            write_page(inputs.k[h, a : a + n], inputs.v[h, a : a + n], fmt, "fp16")
            for h in range(heads)
        ]
        for a, n in zip(starts, counts, strict=True)
    ]
    records = np.zeros((len(starts), heads, fmt.record_bytes), np.uint8)
    index = np.zeros((len(starts), heads, fmt.index_bytes), np.uint8)
    for page, row in enumerate(written):
        for head, (record, index_row) in enumerate(row):
            records[page, head], index[page, head] = record, index_row

    def part(x: Floats, begin: int, count: int) -> Floats | None:
        if not scheme.keep:
            return None
        padded = np.full((1, heads, PAGE, dim), np.nan, np.float32)  # slots beyond are not read
        padded[0, :, :count] = x[:, begin : begin + count]
        return padded

    def one(count: int) -> NDArray[np.int32]:
        return np.array([count], np.int32)

    return definition.Cache(
        fmt, records, index, np.arange(len(starts), dtype=np.int32)[None], starts[None],
        counts[None], one(len(starts)), one(length), "fp16",
        part(inputs.k, 0, first), part(inputs.v, 0, first), one(first) if scheme.keep else None,
        part(inputs.k, length - last, last), part(inputs.v, length - last, last),
        one(last) if scheme.keep else None, scheme.draft,
    )  # fmt: skip


def define(inputs: Inputs, scheme: Scheme) -> Array:
    """What lath's definition gives, rounded once to fp16."""
    options = definition.Options(
        inputs.scale, inputs.causal, mask=inputs.mask, bias=inputs.bias, query=scheme.query,
        precision=scheme.precision,
    )  # fmt: skip
    rows = np.array([inputs.q.shape[1]], np.int32)
    o, _ = definition.attend(inputs.q[None], rows, cache_of(inputs, scheme), options)
    return o[0].astype(np.float16).astype(np.float64)


Attend = Callable[[Queries, PageView, ScoreOptions], torch.Tensor]


def run_kernel(attend: Attend, inputs: Inputs, scheme: Scheme) -> Array:
    """What a kernel gives for the pages that the definition wrote; attend returns o alone."""
    cache = cache_of(inputs, scheme)

    def tensor(x: NDArray[np.generic] | None, dtype: torch.dtype | None = None) -> torch.Tensor:
        found = torch.from_numpy(np.ascontiguousarray(x))
        return found if dtype is None else found.to(dtype)

    def maybe(
        x: NDArray[np.generic] | None, dtype: torch.dtype | None = None
    ) -> torch.Tensor | None:
        return None if x is None else tensor(x, dtype)

    view = PageView(
        cache.format, tensor(cache.records), tensor(cache.index), tensor(cache.table),
        tensor(cache.starts), tensor(cache.counts), tensor(cache.page_counts),
        tensor(cache.lengths), int(cache.lengths.max()),
        maybe(cache.first_keys, torch.float16), maybe(cache.first_values, torch.float16),
        maybe(cache.first_lengths), maybe(cache.last_keys, torch.float16),
        maybe(cache.last_values, torch.float16), maybe(cache.last_lengths), cache.draft,
    )  # fmt: skip
    rows = inputs.q.shape[1]
    queries = Queries(
        tensor(inputs.q[None], torch.float16), torch.tensor([rows], dtype=torch.int32), rows
    )
    options = ScoreOptions(
        inputs.scale, inputs.causal, mask=maybe(inputs.mask), bias=maybe(inputs.bias),
        query=scheme.query, precision=scheme.precision,
    )  # fmt: skip
    o = attend(queries, view, options)
    return o[0].double().numpy()


def longest_gap(inputs: Inputs) -> float:
    """By how many nats token 0 exceeds the largest other score, at least, over rows."""
    s = inputs.scale * inputs.q.astype(np.float64) @ inputs.k[0].T.astype(np.float64)
    return float((s[..., 0] - s[..., 1:].max(axis=-1)).min()) if s.shape[-1] > 1 else math.inf
