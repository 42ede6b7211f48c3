"""Attention of the verbs' arguments in float64 torch: no page, no tile, no code."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor


def backends() -> list[str]:
    """The backends that CPU tensors run on here."""
    return ["reference", *(["cpu"] if importlib.util.find_spec("numba") else [])]


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    tree_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o, lse of sequences of equal lengths: q [B, Hq, Lq, D] against [B, Hkv, Lk, ...]."""
    s, readable = dense_scores(
        q, k, causal=causal, window=window, mask=mask, bias=bias, alibi=alibi, scale=scale,
        softcap=softcap, tree_mask=tree_mask,
    )  # fmt: skip
    s = torch.where(readable, s, -torch.inf)
    joined = s
    if sink is not None:
        joined = torch.cat([s, sink.double()[None, :, None, None].expand(*s.shape[:3], 1)], dim=3)
    lse = torch.logsumexp(joined, dim=3)
    p = torch.exp(s - torch.where(lse.isinf(), 0.0, lse)[..., None])
    values = v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return p @ values, lse


def dense_scores(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    window: int | None,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    scale: float | None,
    softcap: float | None,
    tree_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores before masking, and which keys may be read."""
    rows, length = q.shape[2], k.shape[2]
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    s = q.double() @ keys.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    distance = torch.arange(rows)[:, None] + length - rows - torch.arange(length)[None]
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.double()
    if alibi is not None:
        s = s - alibi.double()[:, None, None] * distance
    readable = torch.ones(rows, length, dtype=torch.bool)
    if tree_mask is not None:
        readable = torch.cat([readable[:, : length - rows], tree_mask], dim=1)
    elif causal:
        readable = distance >= 0
    if window is not None:
        readable = readable & (distance < window)
        if not causal:
            readable = readable & (-distance < window)
    if mask is not None:
        readable = readable & mask
    return s, readable.expand(s.shape)


def rounding_bound(
    q: Tensor, k: Tensor, v: Tensor, *, levels: float | None, dtype: torch.dtype, **options: Any
) -> Tensor:
    """Largest error of o against `dense_attention` over the same decoded k and v.

    q is rounded to int8 per row, and weights to `levels` relative to the largest of their 64 keys.

    A score moves by δ <= scale * amax(q)/254 * |k|₁, a weight by the factor exp(2 max δ), and by
    half a level of the largest of its tile (bounded by tiles of 64 keys anywhere: twice).
    """
    o, _ = dense_attention(q, k, v, **options)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().abs().repeat_interleave(group, dim=1) for x in (k, v))
    scale = options.get("scale") or q.shape[3] ** -0.5
    largest = q.double().abs().amax(dim=3, keepdim=True)
    delta = (scale * largest / 254 * keys.sum(dim=3).amax(dim=2)[..., None, None])[..., 0]
    moved = torch.expm1(2 * delta)[..., None]
    sizes, _ = dense_attention(q, k, v.abs(), **options)
    bound = moved * sizes + 2.0**-8 * sizes  # and P's rounding to 16 bits where it is not a code
    if levels is not None:
        bound = bound + (1 + moved) * (0.5 / levels) * values.sum(dim=2, keepdim=True)
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}[dtype]
    return bound + unit * o.abs() + 1e-6
