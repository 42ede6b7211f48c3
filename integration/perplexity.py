"""Perplexity of a causal language model: exp of the mean negative log-likelihood per token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lath.integration.progress import Advance


def perplexity(model: Any, ids: Tensor, window: int = 512, advance: Advance | None = None) -> float:
    """Perplexity of `model` on the tokens `ids` [L] or [1, L], cut into windows that stand alone.

    The first token of each window is given, the others are predicted; a last piece of fewer than
    two tokens is left out. Log-likelihoods are fp32, their sum is exact enough in Python floats.
    advance: called with 1 after each window.

    Raises ValueError for fewer than two tokens or a window below 2.
    """
    flat = ids.reshape(-1)
    if window < 2:
        raise ValueError(f"window must be 2 or more tokens, got {window}")
    if flat.numel() < 2:
        raise ValueError(f"ids must hold 2 or more tokens, got {flat.numel()}")
    total, count = 0.0, 0
    for piece in torch.split(flat, window):
        if piece.numel() < 2:
            continue
        with torch.inference_mode():
            logits = model(piece[None], use_cache=False).logits[0, :-1].float()
            total += functional.cross_entropy(logits, piece[1:], reduction="sum").item()
        count += piece.numel() - 1
        if advance is not None:
            advance(1)
    return math.exp(total / count) if total / count < 700 else math.inf


def cached_perplexity(
    model: Any,
    ids: Tensor,
    new_cache: Callable[[], Any],
    window: int = 1024,
    chunk: int = 128,
    advance: Advance | None = None,
) -> float:
    """`perplexity`, but each window in pieces of `chunk` tokens that read the ones before from a
    cache of its own, so that what the cache does to its keys and values is in the figure.

    new_cache: makes an empty `transformers.Cache`. Raises ValueError for fewer than two tokens, a
    window below 2 or a chunk below 1.
    """
    from lath.integration.cache import cache_argument

    flat = ids.reshape(-1)
    if window < 2 or chunk < 1:
        raise ValueError(f"window must be 2 or more and chunk 1 or more, got {window} and {chunk}")
    if flat.numel() < 2:
        raise ValueError(f"ids must hold 2 or more tokens, got {flat.numel()}")
    total, count, name = 0.0, 0, cache_argument(model)
    for piece in torch.split(flat, window):
        if piece.numel() < 2:
            continue
        cache = new_cache()
        targets = torch.cat([piece[1:], piece.new_full((1,), -100)])
        parts = torch.split(piece, chunk), torch.split(targets, chunk)
        with torch.inference_mode():
            for tokens, wanted in zip(*parts, strict=True):
                logits = model(tokens[None], use_cache=True, **{name: cache}).logits[0].float()
                total += functional.cross_entropy(
                    logits, wanted, ignore_index=-100, reduction="sum"
                ).item()
        count += piece.numel() - 1
        if advance is not None:
            advance(1)
    return math.exp(total / count) if total / count < 700 else math.inf


def num_windows(tokens: int, window: int) -> int:
    """How often `perplexity` calls `advance`."""
    return tokens // window + (tokens % window >= 2)
