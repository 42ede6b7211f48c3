"""`lath.attention`: quantised attention over dense or packed keys and values."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lath.formats.attention import ScoreOptions
from lath.verbs.attention_options import (
    Shape,
    check_choice,
    check_device,
    check_head_dim,
    check_heads,
    check_lengths,
    check_scores,
    integers,
)
from lath.verbs.attention_pages import Layout, run_attention
from lath.verbs.backends import resolve_backend
from lath.verbs.checks import check_flag, check_tensor

ATTENTION_PRECISIONS = ("float", "int8", "int16", "e4m3")


def attention(
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
    lengths: Any = None,
    query_lengths: Any = None,
    cu_seqlens: Any = None,
    precision: str = "float",
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """softmax(scale * q kᵀ + …) v with q and k rounded to int8, keys centred on their page's mean.

    q: [B, Hq, Lq, D], k: [B, Hkv, Lk, D], v: [B, Hkv, Lk, E], one floating dtype and device, any
    Lq, Lk >= 0, D and E 1 .. 256; Hq a multiple of Hkv (query head h reads KV head h // (Hq //
    Hkv)). Not changed. Row i stands at position i + Lk - Lq of the keys.
    causal: read only keys at or before that position. window: read only keys less than `window`
    positions away. mask (bool, True = read) and bias (float, added): broadcastable to [B, Hq, Lq,
    Lk]. alibi: [Hq] slopes; slope * distance is subtracted. scale: default D**-0.5. softcap: s →
    softcap * tanh(s / softcap), before bias. sink: [Hq] scores that join the denominator alone.
    lengths: [B] ints or tensor, keys that each sequence has (the first ones; what lies beyond is
    not read and may be NaN). query_lengths: likewise rows of q; by default `lengths` where Lq = Lk
    and positions matter (causal, window or alibi: padded self-attention), else Lq. The sequence's
    own numbers stand for Lq and Lk above.
    cu_seqlens: [S + 1] ascending ints or tensor, or a pair of them for queries and keys: sequence s
    of a packed batch (B = 1) has the tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1 and reads no
    other's; without mask, bias and lengths.
    precision: of P·V. "float": v as it is. "int8" (127 levels) or "int16" (127 * 256): v rounded to
    int8 per channel of a page. "e4m3": both float8. The first 64 keys and values (attention sinks)
    are always read as they are; the last three read an unfilled last page so, too. backend: "auto",
    "triton", "cpu" or "reference".

    Returns o [B, Hq, Lq, E] of q's dtype; with return_lse also lse fp32 [B, Hq, Lq], natural log. A
    row that reads nothing, or is of no sequence, is 0 with lse -inf (a sink counts as read). Not
    differentiable: backward raises NotImplementedError.
    """
    q, k, v = _check_inputs(q, k, v)
    shape = Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    given = {
        "causal": causal, "window": window, "mask": mask, "bias": bias, "alibi": alibi,
        "scale": scale, "softcap": softcap, "sink": sink,
    }  # fmt: skip
    scores = check_scores(shape, given, q.shape[3])
    check_choice("precision", precision, ATTENTION_PRECISIONS)
    check_flag("return_lse", return_lse)
    cu_queries, cu_keys = _check_packed(cu_seqlens, scores, lengths, query_lengths, shape)
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    ):
        ragged = [
            _as_tensor("lengths", lengths, q),
            _as_tensor("query_lengths", query_lengths, q),
            _as_tensor("cu_seqlens of queries", cu_queries, q),
            _as_tensor("cu_seqlens of keys", cu_keys, q),
        ]
        o, lse = _operator(
            q, k, v, scores["mask"], scores["bias"], scores["alibi"], scores["sink"], *ragged,
            scores["causal"], scores["window"], scores["scale"], scores["softcap"],
            precision, backend,
        )  # fmt: skip
    else:
        layout = _layout(shape, scores, lengths, query_lengths, cu_queries, cu_keys)
        options = ScoreOptions(**scores, precision=precision)  # type: ignore[arg-type]
        chosen = resolve_backend(backend, q.device)
        o, lse = run_attention(q.detach(), k.detach(), v.detach(), options, layout, chosen)
    return (o, lse) if return_lse else o


def _check_inputs(q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = check_tensor("q", q), check_tensor("k", k), check_tensor("v", v)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [B, Hkv, Lk, channels], got shape {[*tensor.shape]}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype} like q, got {tensor.dtype}")
        check_device(name, tensor, q.device)
    check_head_dim("k's head dim", k.shape[3])
    check_head_dim("v's head dim", v.shape[3])
    if k.shape[1] == 0 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k and v must be [B, Hkv, Lk, channels] alike with Hkv >= 1, got shapes "
            f"{[*k.shape]} and {[*v.shape]}"
        )
    check_heads(q, k.shape[1], k.shape[3], "k")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q must have k's batch, {k.shape[0]}, got shape {[*q.shape]}")
    return q, k, v


def _check_packed(
    cu_seqlens: Any, scores: dict[str, Any], lengths: Any, query_lengths: Any, shape: Shape
) -> tuple[Any, Any]:
    """cu_seqlens of queries and keys, or None twice."""
    if cu_seqlens is None:
        return None, None
    for name, present in (
        ("lengths", lengths is not None),
        ("query_lengths", query_lengths is not None),
        ("mask", scores["mask"] is not None),
        ("bias", scores["bias"] is not None),
    ):
        if present:
            raise NotImplementedError(f"cu_seqlens cannot be combined with {name}")
    if shape.batch != 1:
        raise ValueError(f"cu_seqlens needs q of batch 1 (packed sequences), got {shape.batch}")
    is_pair = (
        isinstance(cu_seqlens, (tuple, list))
        and len(cu_seqlens) == 2
        and not any(isinstance(part, int) for part in cu_seqlens)
    )
    return tuple(cu_seqlens) if is_pair else (cu_seqlens, cu_seqlens)


def _as_tensor(name: str, numbers: Any, like: Tensor) -> Tensor | None:
    if numbers is None or isinstance(numbers, Tensor):
        return numbers
    return torch.tensor(integers(name, numbers), dtype=torch.int64, device=like.device)


def _layout(
    shape: Shape,
    scores: dict[str, Any],
    lengths: Any,
    query_lengths: Any,
    cu_queries: Any,
    cu_keys: Any,
) -> Layout:
    """Where each sequence's rows and keys lie; reads the numbers, which on a GPU waits for it."""
    if cu_queries is not None:
        query_ends = _check_offsets("cu_seqlens of queries", cu_queries, shape.rows)
        key_ends = _check_offsets("cu_seqlens of keys", cu_keys, shape.keys)
        if len(query_ends) != len(key_ends):
            raise ValueError(
                "cu_seqlens must hold as many sequences for queries as for keys, got "
                f"{len(query_ends) - 1} and {len(key_ends) - 1}"
            )
        return Layout.packed(query_ends, key_ends)
    keys = check_lengths("lengths", lengths, shape.batch, shape.keys)
    rows = check_lengths("query_lengths", query_lengths, shape.batch, shape.rows)
    if keys is None:
        keys = [shape.keys] * shape.batch
    elif rows is None and shape.rows == shape.keys:
        positioned = scores["causal"] or scores["window"] is not None
        if positioned or scores["alibi"] is not None:
            rows = keys
    return Layout.dense(rows if rows is not None else [shape.rows] * shape.batch, keys)


def _check_offsets(name: str, value: Any, total: int) -> list[int]:
    offsets = integers(name, value)
    ascending = all(a <= b for a, b in pairwise(offsets))
    if not offsets or offsets[0] != 0 or not ascending or offsets[-1] > total:
        raise ValueError(f"{name} must ascend from 0 to at most {total} tokens, got {offsets}")
    return offsets


@torch.library.custom_op("lath::attention", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    sink: Tensor | None,
    lengths: Tensor | None,
    query_lengths: Tensor | None,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`attention` on bare tensors: what torch.compile and torch.export record."""
    shape = Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    scores = {
        "scale": scale, "causal": causal, "window": window, "softcap": softcap,
        "mask": mask, "bias": bias, "alibi": alibi, "sink": sink,
    }  # fmt: skip
    layout = _layout(shape, scores, lengths, query_lengths, cu_queries, cu_keys)
    options = ScoreOptions(**scores, precision=precision)  # type: ignore[arg-type]
    chosen = resolve_backend(backend, q.device)
    o, lse = run_attention(q.detach(), k.detach(), v.detach(), options, layout, chosen)
    return o.contiguous(), lse.contiguous()


@_operator.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    sink: Tensor | None,
    lengths: Tensor | None,
    query_lengths: Tensor | None,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = q.shape[:3]
    return q.new_empty((*rows, v.shape[3])), q.new_empty(rows, dtype=torch.float32)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "lath.attention has no backward: it multiplies rounded numbers; call it under no_grad()"
    )


_operator.register_autograd(_backward)
