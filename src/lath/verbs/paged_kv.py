"""`lath.PagedKV`: the quantised key-value cache of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lath.formats.attention import PageView
from lath.formats.page_span import as_positions
from lath.formats.pages import PAGE, PageCodec, PageFormat, page_codec
from lath.verbs.attention_options import check_device, check_head_dim, check_lengths
from lath.verbs.backends import resolve_backend
from lath.verbs.checks import FLOAT_DTYPES, check_flag, check_size, check_tensor
from lath.verbs.page_operators import write_pages
from lath.verbs.store_operations import StoreOperations, check_keep


class PagedKV(StoreOperations):
    """Keys and values of `batch` sequences, in pages of 64 tokens.

        kv = lath.PagedKV(8, 128, dtype=k.dtype)
        kv.append(k, v)                          # [B, Hkv, L, D] and [B, Hkv, L, E]
        o = lath.decode_attention(q, kv)

    num_kv_heads, head_dim, batch: sizes; value_dim: E if not head_dim (1 .. 256 each).
    key_codec, value_codec: "float" (`dtype`), "int8", "int8-planes" (int8 whose upper four bits can
    be read alone, see `draft`), "int4", "int2" or "e4m3", a name or a `PageCodec`. page_size: 64.
    dtype: of what is appended and of the float parts. key_channel_scales: floats [Hkv, D] > 0; keys
    are divided by them when stored and queries multiplied by them when they read, which evens out
    channels of very different size (each product rounded once to `dtype`: exact for powers of two).
    keep_first: keep the first 64 tokens of a sequence, where attention sinks are, in `dtype`.
    backend: who writes pages, "auto", "triton", "cpu" or "reference"; it is also what "auto" means
    to `decode_attention` on this cache.

    The first 64 tokens and an unfilled last page are in `dtype`. A page is quantised once, when it
    fills, and then only read; appending one token at a time gives the same records as all at once.
    Tokens and pages can be dropped (`drop_pages`, `evict`, `compact`): `lengths` go on counting
    positions, and `tokens` says what is held.
    Differentiable in nothing: a cache holds no graph.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        batch: int = 1,
        key_codec: str | PageCodec = "int8",
        value_codec: str | PageCodec = "int8",
        page_size: int = PAGE,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        value_dim: int | None = None,
        key_channel_scales: Tensor | None = None,
        keep_first: bool = True,
        backend: str = "auto",
    ) -> None:
        if check_size("num_kv_heads", num_kv_heads) == 0:
            raise ValueError("num_kv_heads must be 1 or more, got 0")
        check_head_dim("head_dim", check_size("head_dim", head_dim))
        value_dim = head_dim if value_dim is None else value_dim
        check_head_dim("value_dim", check_size("value_dim", value_dim))
        if page_size != PAGE:
            raise ValueError(f"page_size must be {PAGE}, got {page_size!r}")
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
        codecs = page_codec(key_codec, "key_codec"), page_codec(value_codec, "value_codec")
        fmt = PageFormat(*codecs, head_dim, value_dim, dtype.itemsize)
        resolved = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        resolve_backend(backend, resolved)
        super().__init__(
            fmt, num_kv_heads, check_size("batch", batch), dtype, resolved,
            check_flag("keep_first", keep_first),
        )  # fmt: skip
        self.backend = backend
        self.key_channel_scales = self._check_channel_scales(key_channel_scales)
        self._draft = False

    def _check_channel_scales(self, value: Any) -> Tensor | None:
        if value is None:
            return None
        scales = check_tensor("key_channel_scales", value)
        shape = (self.num_kv_heads, self.format.key_dim)
        if tuple(scales.shape) != shape:
            raise ValueError(
                f"key_channel_scales must be {list(shape)}, got shape {[*scales.shape]}"
            )
        check_device("key_channel_scales", scales, self.device)
        scales = scales.detach().float()
        if not bool((torch.isfinite(scales) & (scales > 0)).all()):
            raise ValueError("key_channel_scales must be finite and greater than 0")
        return scales.clone()

    def __repr__(self) -> str:
        return (
            f"PagedKV({self.format}, {self.num_kv_heads} heads, lengths {self.lengths}, "
            f"{self.pool.pages_in_use} pages, {self.nbytes} bytes on {self.device})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated: the whole pool (shared with forks), float parts, tables and scales."""
        scales = self.key_channel_scales
        return super().nbytes + (0 if scales is None else scales.nbytes)

    def append(self, k: Tensor, v: Tensor, lengths: Any = None, keep: Any = None) -> None:
        """Add tokens at the end of every sequence.

        k: [B, Hkv, L, D], v: [B, Hkv, L, E], of the cache's dtype and device, any L >= 0; not
        changed and not kept. lengths: ints or an integer tensor [B], how many of the L tokens each
        sequence takes (the first ones); None for all. keep: for each sequence, the ascending
        indices of those of its tokens that are stored; the others are dropped, and their positions
        are counted on (`advance`). Tokens from both sides of a gap share a page, which attention
        then cannot place exactly: see `exact_positions`.
        """
        self._check_tokens("k", k, self.format.key_dim)
        self._check_tokens("v", v, self.format.value_dim)
        if v.shape[2] != k.shape[2]:
            raise ValueError(
                f"v must hold as many tokens as k, {k.shape[2]}, got shape {[*v.shape]}"
            )
        counts = check_lengths("lengths", lengths, self.batch, k.shape[2])
        if counts is None:
            counts = [k.shape[2]] * self.batch
        k, v = k.detach(), v.detach()
        if self.key_channel_scales is not None:
            k = (k.float() / self.key_channel_scales[:, None]).to(self.dtype)
        k = k if k.stride(3) == 1 else k.contiguous()
        v = v if v.stride(3) == 1 else v.contiguous()
        if keep is None:
            self.append_tokens(k, v, counts)
        else:
            self._append_kept(k, v, counts, check_keep(keep, counts))

    def _append_kept(
        self, k: Tensor, v: Tensor, counts: Sequence[int], keep: list[list[int]]
    ) -> None:
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        places = [
            as_positions([length + i for i in own])
            for length, own in zip(self.lengths, keep, strict=True)
        ]
        width = max(map(len, keep), default=0)
        slots = torch.tensor(
            [own + [0] * (width - len(own)) for own in keep], dtype=torch.int64, device=self.device
        ).reshape(self.batch, 1, width, 1)
        k, v = (x.gather(2, slots.expand(-1, *x.shape[1:2], -1, x.shape[3])) for x in (k, v))
        self.append_tokens(k, v, list(map(len, keep)), places)
        self.skip([end - length for end, length in zip(ends, self.lengths, strict=True)])

    def _check_tokens(self, name: str, value: Any, channels: int) -> None:
        tensor = check_tensor(name, value)
        shape, wanted = tuple(tensor.shape), (self.batch, self.num_kv_heads, channels)
        if len(shape) != 4 or (shape[0], shape[1], shape[3]) != wanted:
            raise ValueError(
                f"{name} must be [{wanted[0]}, {wanted[1]}, L, {wanted[2]}] for this cache, got "
                f"shape {list(shape)}"
            )
        if tensor.dtype != self.dtype:
            raise TypeError(
                f"{name} must be {str(self.dtype).removeprefix('torch.')} like the cache, got "
                f"{str(tensor.dtype).removeprefix('torch.')}"
            )
        check_device(name, tensor, self.device)

    def write_pages(self, keys: Tensor, values: Tensor, jobs: Tensor) -> None:
        """Quantise pages into the pool: see `PageStore.write_pages`."""
        chosen = resolve_backend(self.backend, self.device)
        write_pages(keys, values, self.format, self.pool.records, self.pool.index, jobs, chosen)

    def view(self, draft: bool = False) -> PageView:
        """What attention reads; good until the cache next changes.

        draft: read only the upper four bits of "int8-planes" (QuantSpec: half the bytes of the
        codes); ValueError where neither codec has planes.
        """
        if (draft or self._draft) and max(self.format.key.planes, self.format.value.planes) < 2:
            raise ValueError(
                f"draft needs the codec 'int8-planes' for keys or values, got {self.format}"
            )
        return super().view(draft or self._draft)

    @contextmanager
    def draft(self) -> Iterator[PagedKV]:
        """Within it every reader sees the draft view; appending goes on as ever."""
        before, self._draft = self._draft, True
        try:
            yield self
        finally:
            self._draft = before

    def fork(self) -> PagedKV:
        """A cache that goes its own way from here: pages shared, float parts copied."""
        other = self._empty_like()
        other.adopt(self)
        return other

    def to(self, device: str | torch.device, backend: str = "auto") -> PagedKV:
        """A copy on `device` with a pool of its own; `backend` as in the constructor."""
        target = torch.empty(0, device=device).device
        resolve_backend(backend, target)
        other = self.fork()
        other.move(target)
        other.backend = backend
        if other.key_channel_scales is not None:
            other.key_channel_scales = other.key_channel_scales.to(target)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedKV:
        return self.to(self.device, self.backend)

    def _empty_like(self) -> PagedKV:
        fmt = self.format
        return PagedKV(
            self.num_kv_heads, fmt.key_dim, 0, fmt.key, fmt.value, PAGE, self.dtype, self.device,
            fmt.value_dim, self.key_channel_scales, self.keep_first, self.backend,
        )  # fmt: skip

    def reset(self) -> None:
        """Forget every token; the batch and the pool's memory stay."""
        self.cut([0] * self.batch)

    def reserve(self, tokens: int) -> None:
        """Room in the pool for sequences of `tokens` tokens each, so that it need not grow."""
        self.pool.reserve(self.batch * (check_size("tokens", tokens) // PAGE))
