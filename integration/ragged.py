"""Padded batches [B, H, slots, D] and their tokens alone, moved to the front of each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch are.

    valid: bool [B, slots]. counts: int32 [B], tokens of a row. slots: int64 [B, longest], the slot
    of each token in order; behind a row's count, slots of padding.
    """

    valid: Tensor
    counts: Tensor
    slots: Tensor

    @staticmethod
    def of(valid: Tensor) -> Packing:
        counts = valid.sum(-1, dtype=torch.int32)
        longest = int(counts.max()) if counts.numel() else 0
        order = torch.argsort((~valid).to(torch.uint8), dim=-1, stable=True)
        return Packing(valid, counts, order[:, :longest])

    @property
    def has_holes(self) -> bool:
        """Whether a row has padding between its tokens."""
        longest = self.slots.shape[1]
        if longest == 0:
            return False
        last = self.slots.gather(1, (self.counts.long() - 1).clamp_min(0)[:, None])[:, 0]
        spread = last - self.slots[:, 0] + 1
        return bool(((spread != self.counts) & (self.counts > 0)).any())

    def pack(self, x: Tensor) -> Tensor:
        """[B, H, slots, D] → [B, H, longest, D], the tokens of each row in front."""
        index = self.slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index)

    def unpack(self, x: Tensor) -> Tensor:
        """The reverse of `pack`; zeros where there is padding."""
        batch, heads, longest, width = x.shape
        place = torch.arange(longest, device=x.device)[None] < self.counts[:, None]
        x = torch.where(place[:, None, :, None], x, torch.zeros_like(x))
        index = self.slots[:, None, :, None].expand(-1, heads, -1, width)
        padded = x.new_zeros(batch, heads, self.valid.shape[1], width)
        return padded.scatter(2, index, x)

    def slot_window(self, keys: Packing, window: int, offset: int = 0) -> Tensor:
        """bool [B, 1, queries, keys]: distances in slots below `window`.

        self: the queries, whose slots begin `offset` slots behind those of `keys`.
        """
        distance = (self.slots + offset)[:, :, None] - keys.slots[:, None, :]
        return (distance < window)[:, None]

    def gather_mask(self, keys: Packing, mask: Tensor) -> Tensor:
        """A mask or bias over slots [B or 1, H, slots, slots] at the tokens of queries and keys."""
        batch, heads = self.slots.shape[0], mask.shape[1]
        mask = mask.expand(batch, -1, -1, -1)
        rows = self.slots[:, None, :, None].expand(-1, heads, -1, mask.shape[3])
        columns = keys.slots[:, None, None, :].expand(-1, heads, self.slots.shape[1], -1)
        return mask.gather(2, rows).gather(3, columns)


def same_slots(old: Tensor | None, new: Tensor | None, slots: int) -> bool:
    """Whether two tables [B, >= slots] name the same of the first `slots`; None: all tokens."""
    if old is None and new is None:
        return True
    known = old if old is not None else new
    assert known is not None
    everything = known.new_ones(known.shape[0], slots)
    return torch.equal(
        everything if old is None else old, everything if new is None else new[:, :slots]
    )
