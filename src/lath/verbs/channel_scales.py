"""`lath.key_channel_scales`: even out the channels of keys before they are rounded to few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lath.verbs.checks import check_tensor

ROTARY_PAIRS = ("half", "interleaved")


def key_channel_scales(
    keys: Tensor, *, rotary_pairs: str | None = None, power: float = 0.5
) -> Tensor:
    """Scales [Hkv, D], fp32, that make the channels of keys [B, Hkv, L, D] more alike.

    keys / scales is what a `lath.PagedKV(key_channel_scales=...)` stores; its attention multiplies
    the queries by them, so that no score changes but by rounding (FireQ, 2505.20839). A scale is
    (largest |key| of the channel) ** power, the geometric mean of a head brought to 1; a channel of
    zeros has scale 1.

    rotary_pairs: None for keys as they are cached (after RoPE). For keys before RoPE, how it pairs
    channels: "half" (d with d + D/2) or "interleaved" (2d with 2d + 1). The channels of a pair then
    share the larger scale, which is what commutes with the rotation: RoPE(k / s) = RoPE(k) / s.
    Both may be combined: scales of keys before RoPE times scales of RoPE(keys / those).

    ValueError for keys that are not 4-D or not finite, an odd D with pairs, or a power outside
    0 .. 1.
    """
    check_tensor("keys", keys)
    if keys.dim() != 4:
        raise ValueError(f"keys must be [B, Hkv, L, D], got {[*keys.shape]}")
    if rotary_pairs is not None and rotary_pairs not in ROTARY_PAIRS:
        raise ValueError(
            f"rotary_pairs must be None or one of {ROTARY_PAIRS}, got {rotary_pairs!r}"
        )
    if not 0 <= power <= 1:
        raise ValueError(f"power must be between 0 and 1, got {power!r}")
    batch, heads, length, channels = keys.shape
    if batch * length == 0:
        return torch.ones(heads, channels, device=keys.device)
    largest = keys.detach().float().abs().amax(dim=(0, 2))
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("keys must be finite: a NaN or infinity has no scale")
    if rotary_pairs is not None:
        largest = _share_pairs(largest, rotary_pairs)
    used = largest > 0
    logs = torch.where(used, largest, 1).log() * power
    mean = logs.sum(dim=1, keepdim=True) / used.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.where(used, (logs - mean).exp(), 1)


def _share_pairs(largest: Tensor, rotary_pairs: str) -> Tensor:
    """The larger of both channels of a pair, for both."""
    heads, channels = largest.shape
    if channels % 2:
        raise ValueError(f"keys must have an even D for rotary_pairs, got D = {channels}")
    if rotary_pairs == "half":
        pairs = largest.view(heads, 2, channels // 2).amax(dim=1)
        return pairs.repeat(1, 2)
    return largest.view(heads, channels // 2, 2).amax(dim=2).repeat_interleave(2, dim=1)
