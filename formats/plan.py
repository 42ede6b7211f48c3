"""Plan: which loop runs one operation, on what tile, and why. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Backend = Literal["triton", "cpu", "reference"]
Dataflow = Literal[
    "gemv",
    "flat",
    "tiled",
    "look_up",
    "decode_matmul",
    "gather",
    "prefill",
    "decode",
    "select",
    "definition",
]


@dataclass(frozen=True)
class Plan:
    """The launch of one operation.

    backend: who computes. dataflow: "gemv" (no dot instruction), "flat" (few tokens, K split with
    an ordered reduction), "tiled", "look_up" (a CPU's tables of sums of activations),
    "decode_matmul" (decode, then a library matmul), "gather" (the columns of x that outliers name)
    or "definition" (NumPy); of attention "prefill" (many rows of one head) or "decode" (few rows,
    the heads of a group together); "select" (scores of pages or tokens, the largest of them,
    repair). dot: the type that is multiplied, "int8", "e4m3", "fp16", "bf16" or "fp32".
    block_m tokens by block_n rows of the weight: tile of y; block_k: columns per step; split_k:
    pieces of K; swap: the weight is the left operand of the dot; warps, stages, threads: as the
    backend understands them (0 where it does not).
    Attention: dot is that of q·k; block_m rows by block_n keys (a page) is the tile, block_k the
    head dim that it is padded to, split_k pieces of the key list, and pack heads share a row tile.
    bytes_moved: predicted traffic of weights, scales, x, y and workspace; of q, pages and o.
    operations: 2*M*N*K; of q·k and P·V.
    terms: of a sum of packed weights the plan of each; the other fields are then those of the
    largest, bytes and operations those of all. reason: one sentence per choice.
    """

    backend: Backend
    dataflow: Dataflow
    dot: str
    reason: str
    bytes_moved: int
    operations: int
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    split_k: int = 1
    pack: int = 1
    swap: bool = False
    warps: int = 0
    stages: int = 0
    threads: int = 0
    terms: tuple[Plan, ...] = ()
