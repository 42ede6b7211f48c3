"""The mask that transformers asks for, as an object: nothing of size Lq * Lk unless it has to be.

transformers describes a mask by a function of two positions ("slots": places in the padded batch)
and a table of padding. The functions that attention knows itself are recognised; of any other the
bool mask is built, by transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass
class Mask:
    """Which slots may be read: what the attention function gets in place of a 4-D mask.

    Query i has the slot query_offset + i, key j the slot key_offset + j. causal: key <= query.
    window: distances below it, None for all. padding: bool [B, slots], False where a slot holds no
    token; None where all hold one. dense: bool [B, 1 or H, queries, keys], which then says it all
    (causal, window and padding are in it already).
    verified: memo of a cache, see `lath.integration.cache`.
    """

    queries: int
    keys: int
    query_offset: int
    key_offset: int
    causal: bool
    window: int | None
    padding: Tensor | None
    dense: Tensor | None = None
    verified: dict[int, Any] = field(default_factory=dict, repr=False)

    # transformers takes a mask with four dimensions as made already, and hands it on.
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (1, 1, self.queries, self.keys)

    def contiguous(self) -> Mask:
        return self

    def key_padding(self, keys: int) -> Tensor | None:
        """bool [B, keys]: the padding of the first `keys` keys; None where there is none."""
        if self.padding is None:
            return None
        end = self.key_offset + keys
        missing = end - self.padding.shape[-1]
        padding = functional.pad(self.padding, (0, missing)) if missing > 0 else self.padding
        return padding[:, self.key_offset : end]


def lath_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | Mask | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Mask | Tensor:
    """The mask function to register beside the attention function; arguments as transformers'.

    Returns a Mask, or a bool tensor [B, 1, Lq, Lk] inside torch.compile and for one token of a
    static cache: lengths are tensors there, and a graph must not depend on their values.
    """
    from transformers.masking_utils import causal_mask_function

    if isinstance(attention_mask, Mask):
        return attention_mask
    function = causal_mask_function if mask_function is None else mask_function
    static_step = q_length == 1 and (isinstance(q_offset, Tensor) or not allow_is_causal_skip)
    known = None
    if not torch.compiler.is_compiling() and not static_step:
        known = recognise(function)
    if known is None:
        dense = _dense(
            batch_size, q_length, kv_length, q_offset, kv_offset, function, attention_mask, kwargs
        )
        if torch.compiler.is_compiling() or static_step:
            return dense
        known = (False, None)
    else:
        dense = None
    causal, window = known
    padded = attention_mask is not None and not bool(attention_mask.all())
    return Mask(
        queries=q_length,
        keys=kv_length,
        query_offset=int(q_offset),
        key_offset=kv_offset,
        causal=causal,
        window=window,
        padding=attention_mask.bool() if padded and attention_mask is not None else None,
        dense=dense,
    )


def recognise(function: Callable[..., Any]) -> tuple[bool, int | None] | None:
    """(causal, window) of a mask function of transformers; None for one that is not known.

    The window is in lath's sense: distances below it are read.
    """
    from transformers import masking_utils as hf

    if function is hf.causal_mask_function:
        return True, None
    if function is hf.bidirectional_mask_function:
        return False, None
    parts = _closure(function, "and_masks.<locals>.and_mask", "mask_functions")
    if parts is None or len(parts) != 2:
        return None
    overlay, base = parts
    inner = "<locals>.inner_mask"
    width = _closure(overlay, f"sliding_window_overlay.{inner}", "sliding_window")
    if base is hf.causal_mask_function and width is not None:
        return True, int(width)
    width = _closure(overlay, f"sliding_window_bidirectional_overlay.{inner}", "sliding_window")
    if base is hf.bidirectional_mask_function and width is not None:
        return False, int(width) + 1  # transformers reads a distance equal to its window here
    return None


def _closure(function: Any, qualified_name: str, variable: str) -> Any:
    """The value that a function of transformers' masking module closes over, or None."""
    if getattr(function, "__qualname__", "") != qualified_name:
        return None
    if getattr(function, "__module__", "") != "transformers.masking_utils":
        return None
    names = function.__code__.co_freevars
    if variable not in names:
        return None
    return function.__closure__[names.index(variable)].cell_contents


def _dense(
    batch: int,
    queries: int,
    keys: int,
    query_offset: int | Tensor,
    key_offset: int,
    function: Callable[..., Any],
    padding: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    from transformers.masking_utils import sdpa_mask

    options = {name: value for name, value in options.items() if name not in ("config", "dtype")}
    options["allow_is_bidirectional_skip"] = False
    mask: Tensor = sdpa_mask(
        batch_size=batch,
        q_length=queries,
        kv_length=keys,
        q_offset=query_offset,
        kv_offset=key_offset,
        mask_function=function,
        attention_mask=padding,
        allow_is_causal_skip=False,
        **options,
    )
    return mask


def split_additive(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A float mask as (bool mask, bias): where it holds its dtype's lowest numbers, no key is read.

    transformers writes "not at all" as the lowest finite number, so a row of nothing but that
    number is a row that reads nothing.
    """
    readable = mask > torch.finfo(mask.dtype).min / 2
    return readable, torch.where(readable, mask, torch.zeros_like(mask))
