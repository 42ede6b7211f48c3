"""The arguments that `attention` and `decode_attention` share, checked by table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lath.formats.attention import Precision, QueryFormat
from lath.formats.pages import PageFormat
from lath.verbs.checks import FLOAT_DTYPES, check_flag, check_tensor

LARGEST_HEAD_DIM = 256
INTEGERS = (torch.int32, torch.int64)
# Which precisions of P·V a map of the values admits; the first is the default.
PRECISIONS = {
    "float": ("float",),
    "integer": ("int8", "int16", "float"),
    "e4m3": ("e4m3", "float"),
}


class Shape(NamedTuple):
    """Sizes of one attention: sequences, query heads, rows, keys, and where it runs."""

    batch: int
    heads: int
    rows: int
    keys: int
    device: torch.device


def check_heads(q: Tensor, kv_heads: int, head_dim: int, keys_name: str) -> None:
    """q [B, Hq, L, D] against the KV heads and head dim of `keys_name`."""
    if q.dim() != 4:
        raise ValueError(f"q must be [B, Hq, Lq, D], got shape {[*q.shape]}")
    if q.shape[3] != head_dim:
        raise ValueError(
            f"q must have the head dim of {keys_name}, {head_dim}, got shape {[*q.shape]}"
        )
    if q.shape[1] == 0 or q.shape[1] % kv_heads:
        raise ValueError(
            f"q must have a multiple of {keys_name}'s {kv_heads} heads, got {q.shape[1]} heads"
        )


def check_head_dim(name: str, size: int) -> int:
    if not 1 <= size <= LARGEST_HEAD_DIM:
        raise NotImplementedError(f"{name} must be 1 .. {LARGEST_HEAD_DIM}, got {size}")
    return size


def check_number(name: str, value: Any, *, positive: bool = True) -> float:
    """`value` as a finite float, greater than 0 where `positive`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}")
    if not math.isfinite(value) or (positive and value <= 0):
        accepted = "finite and greater than 0" if positive else "finite"
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
    return float(value)


def check_window(window: Any) -> int | None:
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window must be an int or None, got {type(window).__name__}: {window!r}")
    if window < 1:
        raise ValueError(f"window must be 1 or more keys, or None for all, got {window}")
    return window


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}: {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value


def check_scores(shape: Shape, given: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The fields of `ScoreOptions` from the arguments of the same names.

    given: causal, window, mask, bias, alibi, scale, softcap, sink. mask and bias come out 4-D with
    their last two sizes those of the scores; alibi and sink fp32.
    """
    scale, softcap = given["scale"], given["softcap"]
    return {
        "scale": head_dim**-0.5 if scale is None else check_number("scale", scale),
        "causal": check_flag("causal", given["causal"]),
        "window": check_window(given["window"]),
        "softcap": None if softcap is None else check_number("softcap", softcap),
        "mask": check_scores_like("mask", given["mask"], (torch.bool,), shape),
        "bias": check_scores_like("bias", given["bias"], FLOAT_DTYPES, shape),
        "alibi": check_per_head("alibi", given["alibi"], shape),
        "sink": check_per_head("sink", given["sink"], shape),
    }


def check_scores_like(
    name: str, value: Any, dtypes: tuple[torch.dtype, ...], shape: Shape
) -> Tensor | None:
    """`value`, broadcastable to [B, Hq, Lq, Lk], as [B or 1, Hq or 1, Lq, Lk]."""
    if value is None:
        return None
    tensor = check_tensor(name, value, dtypes)
    check_device(name, tensor, shape.device)
    full = (shape.batch, shape.heads, shape.rows, shape.keys)
    sizes = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    if tensor.dim() > 4 or any(s not in (1, f) for s, f in zip(sizes, full, strict=True)):
        raise ValueError(
            f"{name} must broadcast to [B, Hq, Lq, Lk] = {list(full)}, got shape {[*tensor.shape]}"
        )
    return tensor.reshape(sizes).expand(-1, -1, shape.rows, shape.keys)


def check_per_head(name: str, value: Any, shape: Shape) -> Tensor | None:
    """`value` as fp32 [Hq]."""
    if value is None:
        return None
    tensor = check_tensor(name, value, (*FLOAT_DTYPES, torch.float64))
    check_device(name, tensor, shape.device)
    if tuple(tensor.shape) != (shape.heads,):
        raise ValueError(
            f"{name} must be [{shape.heads}], one per query head, got shape {[*tensor.shape]}"
        )
    return tensor.detach().float()


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the other inputs, got {value.device}")


def check_lengths(name: str, value: Any, batch: int, longest: int) -> list[int] | None:
    """`value`, ints or an integer tensor [batch] of 0 .. longest, as ints."""
    if value is None:
        return None
    numbers = integers(name, value)
    if len(numbers) != batch:
        raise ValueError(f"{name} must have one entry per sequence, {batch}, got {len(numbers)}")
    if any(not 0 <= number <= longest for number in numbers):
        raise ValueError(f"{name} must be 0 .. {longest}, got {numbers}")
    return numbers


def integers(name: str, value: Any) -> list[int]:
    """A one-dimensional sequence of ints or integer tensor as ints."""
    if isinstance(value, Tensor):
        check_tensor(name, value, INTEGERS)
        if value.dim() != 1:
            raise ValueError(f"{name} must be one-dimensional, got shape {[*value.shape]}")
        return [int(number) for number in value.tolist()]
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(
            f"{name} must be a sequence of ints or an integer tensor, got {type(value).__name__}"
        )
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must hold ints, got {type(number).__name__}: {number!r}")
    return list(value)


def choose_query(query: Any, fmt: PageFormat) -> QueryFormat:
    """The rounding of q that the keys' codec admits."""
    check_choice("query", query, ("auto", "int8", "e4m3"))
    wants_e4m3 = fmt.key.map == "e4m3"
    if query == "auto":
        return "e4m3" if wants_e4m3 else "int8"
    if wants_e4m3 and query != "e4m3":
        raise ValueError(f"query must be 'e4m3' for e4m3 keys, got {query!r}")
    if query == "e4m3" and fmt.key.name not in ("int4", "int2", "e4m3"):
        raise ValueError(f"query 'e4m3' needs int4, int2 or e4m3 keys, got {fmt.key} keys")
    return cast(QueryFormat, query)


def choose_precision(precision: Any, fmt: PageFormat) -> Precision:
    """The precision of P·V that the values' codec admits."""
    check_choice("precision", precision, ("auto", "float", "int8", "int16", "e4m3"))
    admitted = PRECISIONS[fmt.value.map]
    if precision == "auto":
        return cast(Precision, admitted[0])
    if precision not in admitted:
        raise ValueError(
            f"precision must be one of {admitted} for {fmt.value} values, got {precision!r}"
        )
    return cast(Precision, precision)
