"""Cutting a packed weight into equal pieces for tensor parallelism: whole panels, whole blocks; and
putting one together from pieces of its rows.

No bit is decoded or moved inside a word: a piece of N is a run of panels of each plane, a piece of
K a run of blocks of each panel (DESIGN.md, 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lath.formats import packing
from lath.formats.codec import Codec

if TYPE_CHECKING:
    from lath.formats.qtensor import QTensor


def check_shard(codec: Codec, shape: tuple[int, int], rank: int, ranks: int, axis: int) -> int:
    """The length of a shard along `axis`; ValueError naming what does not fit."""
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 (rows, N) or 1 (columns, K), got {axis!r}")
    if ranks < 1 or not 0 <= rank < ranks:
        raise ValueError(f"rank must be from 0 to ranks - 1, got rank {rank} of {ranks}")
    size, unit = shape[axis], packing.PANEL if axis == 0 else packing.BLOCK
    if ranks > 1 and size % (ranks * unit):
        raise ValueError(
            f"ranks must cut axis {axis} of a {codec} {shape} into multiples of {unit}, got {ranks}"
        )
    if axis == 1 and ranks > 1 and codec.group is not None and size // ranks % codec.group:
        raise ValueError(
            f"ranks must cut axis 1 of a {codec} {shape} between groups of {codec.group}, got "
            f"{ranks}"
        )
    return size // ranks


def shard_codes(
    planes: list[Tensor], shape: tuple[int, int], start: int, size: int, axis: int
) -> Tensor:
    """int32 1-D: the planes of the rows (axis 0) or columns (1) from `start` on."""
    if size == shape[axis]:
        return torch.cat([plane.reshape(-1) for plane in planes])
    unit = packing.PANEL if axis == 0 else packing.BLOCK
    return torch.cat(
        [plane.narrow(axis, start // unit, size // unit).reshape(-1) for plane in planes]
    )


def put_rows(target: QTensor, piece: QTensor, start: int) -> None:
    """Write a piece of rows, of the same codec and columns, into its place in an empty weight.

    start: a multiple of 16, as the rows of the piece are unless it is the last one.
    """
    first, panels = start // packing.PANEL, -(-piece.shape[0] // packing.PANEL)
    for plane, own in zip(target.planes, piece.planes, strict=True):
        plane[first : first + panels] = own
    for name in ("scales", "zeros", "outer"):
        side, own_side = getattr(target, name), getattr(piece, name)
        if side is not None:
            side[..., start : start + panels * packing.PANEL] = own_side


def shard_side(
    side: Tensor | None, codec: Codec, start: int, size: int, axis: int
) -> Tensor | None:
    """Scales or zeros [G, N16], or an outer scale [N16], of a shard."""
    if side is None or (side.dim() == 1 and (axis == 1 or side.numel() == 1)):
        return side
    if axis == 0:
        return side.narrow(
            side.dim() - 1, start, packing.round_up(size, packing.PANEL)
        ).contiguous()
    if codec.group is None:
        return side
    return side.narrow(0, start // codec.group, -(-size // codec.group)).contiguous()
