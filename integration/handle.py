"""What a LathCache hands to attention in the place of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lath.integration.attention import Scores
from lath.integration.attention_mask import Mask

if TYPE_CHECKING:
    from lath.integration.cache import PagedLayer


@dataclass(frozen=True)
class NewTokens:
    """Keys and values that a layer was given and has not stored yet."""

    keys: Tensor
    values: Tensor


class Handle:
    """Keys or values in the pages of a layer, in the place of a tensor."""

    def __init__(self, layer: PagedLayer, new: Tensor) -> None:
        batch, heads, _, width = new.shape
        self.layer = layer
        self.shape = torch.Size((batch, heads, layer.slots, width))
        self.dtype, self.device = new.dtype, new.device

    def attend(
        self, query: Tensor, mask: Mask | Tensor | None, scores: Scores, *, kind: str
    ) -> Tensor:
        return self.layer.attend(query, mask, scores, kind=kind)

    def __getitem__(self, index: Any) -> Any:
        raise _not_a_tensor(f"[{index!r}]")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _not_a_tensor(f".{name}")


def _not_a_tensor(wanted: str) -> TypeError:
    return TypeError(
        f"keys and values of a LathCache are pages, not tensors (asked for {wanted}): only "
        "attn_implementation='lath' reads them; call lath.patch(model, kv=...) or "
        "model.set_attn_implementation('lath')"
    )
