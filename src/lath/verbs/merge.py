"""`lath.merge`: attention over disjoint sets of keys, joined."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lath.verbs.checks import FLOAT_DTYPES, check_tensor


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint sets of keys, from the attention over each.

    parts: pairs (o [..., E], lse [...]) as the attention verbs return them; devices may differ
    (a GPU's dense part and a CPU's sparse part, HGCA). A part with lse -inf read nothing and its o
    takes no part. Associative up to fp32 rounding. Where sinks are used, give them to one part.

    Returns (o, lse) on the first part's device, o of its dtype (fp32 parts stay fp32), lse fp32.
    """
    checked = [_check_part(i, part) for i, part in enumerate(_check_list(parts))]
    first, first_lse = checked[0]
    for i, (o, lse) in enumerate(checked):
        if o.shape != first.shape or lse.shape != first_lse.shape:
            raise ValueError(
                f"parts[{i}] must have the shapes of parts[0], {[*first.shape]} and "
                f"{[*first_lse.shape]}, got {[*o.shape]} and {[*lse.shape]}"
            )
        if o.dtype != first.dtype:
            raise TypeError(f"parts[{i}] must be {first.dtype} like parts[0], got {o.dtype}")
    from lath.kernels.attention.merge import merge as merge_parts

    outputs = torch.stack([o.to(first.device).float() for o, _ in checked])
    lses = torch.stack([lse.to(first.device).float() for _, lse in checked])
    o, lse = merge_parts(outputs, lses)
    return o.to(first.dtype), lse


def _check_list(parts: Any) -> list[Any]:
    if not isinstance(parts, (list, tuple)):
        raise TypeError(f"parts must be a list of (o, lse) pairs, got {type(parts).__name__}")
    if not parts:
        raise ValueError("parts must hold at least one (o, lse) pair, got none")
    return list(parts)


def _check_part(i: int, part: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(part, (list, tuple)) or len(part) != 2:
        raise TypeError(f"parts[{i}] must be a pair (o, lse), got {type(part).__name__}")
    o = check_tensor(f"parts[{i}][0]", part[0])
    lse = check_tensor(f"parts[{i}][1]", part[1], (*FLOAT_DTYPES, torch.float64))
    if o.dim() == 0 or o.shape[:-1] != lse.shape:
        raise ValueError(
            f"parts[{i}] must be o [..., E] and lse [...], got shapes {[*o.shape]} and "
            f"{[*lse.shape]}"
        )
    return o, lse
