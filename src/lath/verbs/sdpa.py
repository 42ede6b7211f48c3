"""`lath.scaled_dot_product_attention`: torch's function of that name over quantised keys."""

from __future__ import annotations

import torch
from torch import Tensor

from lath.verbs.attention import attention
from lath.verbs.checks import FLOAT_DTYPES, check_flag, check_tensor


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    precision: str = "float",
    backend: str = "auto",
) -> Tensor:
    """A drop-in of `torch.nn.functional.scaled_dot_product_attention`.

    query [B, Hq, L, D], key [B, Hkv, S, D], value [B, Hkv, S, E]; or without a head axis, [B, L,
    D]. attn_mask: bool (True = read) or float (added), broadcastable to the scores. is_causal: as
    torch has it, aligned at the upper left (query i reads keys 0 .. i), and not with attn_mask.
    dropout_p: 0. enable_gqa: without it key and value must have query's heads. precision, backend:
    as in `lath.attention`. A row that reads nothing is 0.
    """
    if not isinstance(dropout_p, (int, float)) or dropout_p != 0:
        raise NotImplementedError(f"dropout_p must be 0, got {dropout_p!r}")
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    inputs = {"query": query, "key": key, "value": value}
    for name, tensor in inputs.items():
        check_tensor(name, tensor)
        if tensor.dim() not in (3, 4) or tensor.dim() != query.dim():
            raise ValueError(
                f"{name} must have 3 or 4 dimensions, query's number, got shape {[*tensor.shape]}"
            )
    if attn_mask is not None:
        check_tensor("attn_mask", attn_mask, (torch.bool, *FLOAT_DTYPES))
        if is_causal:
            raise ValueError("attn_mask must be None where is_causal is True, as in torch")
    if query.dim() == 3:
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask[:, None]
        heads = [tensor[:, None] for tensor in (query, key, value)]
        return scaled_dot_product_attention(
            heads[0], heads[1], heads[2], attn_mask, 0.0, is_causal, scale,
            precision=precision, backend=backend,
        )[:, 0]  # fmt: skip
    if key.shape[1] != query.shape[1] and not enable_gqa:
        raise ValueError(
            f"key must have query's {query.shape[1]} heads, or enable_gqa be True, got "
            f"{key.shape[1]} heads"
        )
    if is_causal and query.shape[2] < key.shape[2]:  # keys that no row reads
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    elif is_causal and query.shape[2] > key.shape[2]:
        rows = torch.arange(query.shape[2], device=query.device)
        attn_mask = rows[:, None] >= rows[: key.shape[2]]
        is_causal = False
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    o: Tensor = attention(
        query, key, value, causal=is_causal, scale=scale, precision=precision, backend=backend,
        mask=attn_mask if boolean else None, bias=None if boolean else attn_mask,
    )  # fmt: skip
    return o
