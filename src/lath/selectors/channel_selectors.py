"""Selectors that score tokens by a few channels of their keys: SparQ and Double Sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lath.formats.selection import Granularity
from lath.selectors.base import Request, Scored, Selector, hide, parse_count, part_mass, pool
from lath.selectors.labels import labels
from lath.verbs.checks import check_tensor
from lath.verbs.page_decode import decode_pages
from lath.verbs.select_backends import label_scores


def _labelled(
    request: Request, channels: Tensor, bits: int, rows_of: Tensor, scale: float
) -> Tensor:
    codes, scales = labels(request, channels, bits)
    scores = label_scores(
        request.queries, request.view, codes, scales, channels.to(torch.int32), rows_of, scale,
        request.backend,
    )  # fmt: skip
    return hide(request, scores)


@dataclass(frozen=True)
class SparQ(Selector):
    """Tokens by the `channels` channels of largest |q|, of a copy of the keys by channel; softmax
    with temperature sqrt(|q_r|₁ / |q|₁) (Ribar et al., 2312.04985). The list carries the share of
    the softmax that it is taken to hold, which `repair="mean"` uses.

    Text form "sparq", "sparq-32" (channels; default D / 4).
    """

    channels: int | None = None
    name: ClassVar[str] = "sparq"
    granularity: ClassVar[Granularity] = "token"
    claims_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_channels(self.channels)

    @classmethod
    def parse(cls, option: str) -> SparQ:
        return cls(parse_count(cls.name, option, 0) or None)

    @property
    def option(self) -> str:
        return "" if self.channels is None else str(self.channels)

    def scores(self, request: Request) -> Scored:
        q = request.queries.q.float()
        dim = q.shape[3]
        count = channel_count(self.channels, dim, max(dim // 4, 1))
        sizes = q.abs()
        own = sizes.sum(dim=2)  # rows of one head share their channels
        # The lower channel wins a tie, so that every backend reads the same ones.
        rows_of = torch.sort(own, dim=-1, descending=True, stable=True).indices[..., :count]
        chosen = torch.zeros_like(own).scatter_(2, rows_of, 1.0)[:, :, None]
        share = (sizes * chosen).sum(-1) / sizes.sum(-1).clamp(min=1e-30)
        factor = torch.rsqrt(share.clamp(min=1e-30))[..., None]
        heads = request.view.num_kv_heads
        every = torch.arange(dim, device=q.device).expand(heads, dim)
        rows = _labelled(request, every, 8, rows_of.to(torch.int32), request.scale) * factor
        parts = part_mass(request, q * chosen, request.scale * factor)
        return Scored(pool(rows, request.lists, parts), rows, parts)


@dataclass(frozen=True)
class DoubleSparsity(Selector):
    """Tokens by a label cache: the keys on the channels that dominate q·k, found once (Yang et al.,
    2408.07092).

    channels: how many, D / 8 by default. indices: int [Hkv, C] of `double_sparsity_channels`; None:
    those of the largest spread among the cache's keys when it is first asked. bits: of labels, 8 or
    4. Text form "double_sparsity", "double_sparsity-16" (channels).
    """

    channels: int | None = None
    indices: Any = None
    bits: int = 8
    name: ClassVar[str] = "double_sparsity"
    granularity: ClassVar[Granularity] = "token"

    def __post_init__(self) -> None:
        check_channels(self.channels)
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits!r}")

    @classmethod
    def parse(cls, option: str) -> DoubleSparsity:
        return cls(parse_count(cls.name, option, 0) or None)

    @property
    def option(self) -> str:
        return "" if self.channels is None else str(self.channels)

    def scores(self, request: Request) -> Scored:
        channels = self._channels(request)
        sequences, heads = request.queries.q.shape[:2]
        every = torch.arange(channels.shape[1], dtype=torch.int32, device=channels.device)
        rows_of = every.expand(sequences, heads, -1).contiguous()
        rows = _labelled(request, channels, self.bits, rows_of, request.scale)
        return Scored(pool(rows, request.lists), rows)

    def _channels(self, request: Request) -> Tensor:
        """int64 [Hkv, C]; chosen once for a pool, for the label cache is of these channels."""
        kv, dim = request.kv, request.kv.format.key_dim
        if self.indices is not None:
            return check_indices(self.indices, kv.num_kv_heads, dim, kv.device)
        count = channel_count(self.channels, dim, max(dim // 8, 1))
        found = kv.pool.constants.get(f"double_sparsity-{count}")
        if found is None:
            found = spread_channels(request, count)
            if request.view.longest > 0 and any(request.pages()):
                kv.pool.constants[f"double_sparsity-{count}"] = found
        return found


def spread_channels(request: Request, count: int) -> Tensor:
    """int64 [Hkv, count]: the channels whose keys differ most over the cache's pages."""
    kv = request.kv
    pages = torch.tensor(sorted(set(request.pages())), dtype=torch.int64, device=kv.device)
    keys, _ = decode_pages(kv.pool.records[pages], kv.pool.index[pages], kv.format, kv.dtype)
    flat = keys.transpose(0, 1).flatten(1, 2)  # [Hkv, tokens, D]
    return top_channels(flat.var(dim=1, unbiased=False) if flat.shape[1] else flat.sum(1), count)


def top_channels(importance: Tensor, count: int) -> Tensor:
    """[Hkv, D] → int64 [Hkv, count], the largest, ascending; the lower channel wins a tie."""
    order = torch.sort(torch.nan_to_num(importance), dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def check_channels(channels: int | None) -> None:
    if channels is not None and (isinstance(channels, bool) or channels < 1):
        raise ValueError(f"channels must be 1 or more, or None, got {channels!r}")


def channel_count(channels: int | None, dim: int, default: int) -> int:
    if channels is not None and channels > dim:
        raise ValueError(f"channels must be 1 .. {dim}, the head dim, got {channels}")
    return default if channels is None else channels


def check_indices(indices: Any, heads: int, dim: int, device: torch.device) -> Tensor:
    tensor = torch.as_tensor(indices)
    if tensor.is_floating_point() or tensor.dim() != 2 or tensor.shape[0] != heads:
        raise ValueError(
            f"indices must be integers [{heads}, C], got {tensor.dtype} {[*tensor.shape]}"
        )
    ordered = tensor.sort(dim=-1).values
    if tensor.shape[1] == 0 or int(ordered.min()) < 0 or int(ordered.max()) >= dim:
        raise ValueError(f"indices must be channels 0 .. {dim - 1}, got {tensor.tolist()}")
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError(f"indices must not repeat a channel, got {tensor.tolist()}")
    return tensor.to(device=device, dtype=torch.int64)


def double_sparsity_channels(keys: Tensor, channels: int, queries: Tensor | None = None) -> Tensor:
    """The channels that dominate q·k, for `DoubleSparsity(indices=…)`, from a calibration.

    keys: [..., Hkv, L, D]. queries: [..., Hq, Lq, D], Hq a multiple of Hkv: channels are ranked by
    the mean of |q| times the spread of k over tokens; None: by the spread of k alone. Returns int64
    [Hkv, channels], ascending.
    """
    k = check_tensor("keys", keys).float()
    if k.dim() < 3:
        raise ValueError(f"keys must be [..., Hkv, L, D], got shape {[*k.shape]}")
    count = channel_count(channels, k.shape[-1], channels)
    check_channels(channels)
    k = k.reshape(-1, *k.shape[-3:])
    spread = k.transpose(0, 1).flatten(1, 2).var(dim=1, unbiased=False).sqrt()
    if queries is not None:
        q = check_tensor("queries", queries).float()
        if q.dim() < 3 or q.shape[-1] != k.shape[-1] or q.shape[-3] % k.shape[-3]:
            raise ValueError(
                f"queries must be [..., Hq, Lq, {k.shape[-1]}] with Hq a multiple of "
                f"{k.shape[-3]}, got shape {[*q.shape]}"
            )
        q = q.reshape(-1, k.shape[-3], q.shape[-3] // k.shape[-3], *q.shape[-2:])
        spread = spread * q.abs().mean(dim=(0, 2, 3))
    return top_channels(spread, count)
