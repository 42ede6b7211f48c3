"""lath's attention kernels by name of their backend, for reports and tests that compare them."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor

import lath
from lath.formats.attention import PageView, Queries, ScoreOptions

# Whose plan the interpreter follows: any will do, for the arithmetic is the same.
PLANNED_FOR = "sm_90"


def attend_with(backend: str) -> Callable[[Queries, PageView, ScoreOptions], Tensor]:
    """`attend` of a backend ("cpu" or "triton") under the plan of its planner; o alone."""
    kernels = importlib.import_module(f"lath.kernels.attention.{backend}")
    planner = importlib.import_module("lath.kernels.attention.plan")
    device = lath.describe_device("cpu" if backend == "cpu" else PLANNED_FOR)

    def attend(queries: Queries, pages: PageView, options: ScoreOptions) -> Tensor:
        plan = planner.plan_attention(
            sequences=pages.num_sequences,
            query_heads=queries.q.shape[1],
            kv_heads=pages.num_kv_heads,
            queries=queries.longest,
            keys=pages.most_keys,
            fmt=pages.format,
            dtype=queries.q.dtype,
            options=options,
            device=device,
            backend=backend,
            lists=pages.list_heads,
            tokens=pages.tokens is not None,
            draft=pages.draft,
        )
        o: Tensor = kernels.attend(queries, pages, options, plan)[0]
        return o

    return attend
