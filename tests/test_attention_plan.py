"""`plan_attention`: what it chooses, why, and that it is pure."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from lath.formats.attention import ScoreOptions
from lath.formats.device import KNOWN_DEVICES, DeviceDescription, known_device
from lath.formats.pages import PAGE_CODECS, PageCodec, PageFormat
from lath.formats.plan import Plan
from lath.kernels.attention.plan import (
    BUSY_ENOUGH,
    MOST_SPLITS,
    NEAR_BEST,
    multiplies_e4m3,
    plan_attention,
    shared_bytes,
    splits,
)

GPUS = [name for name, device in KNOWN_DEVICES.items() if device.kind != "cpu"]
OPTIONS = ScoreOptions(scale=0.1, causal=True, precision="int8")


def described(device: str | DeviceDescription) -> DeviceDescription:
    return known_device(device) if isinstance(device, str) else device


def plan(
    queries: int = 1,
    keys: int = 4096,
    codecs: str = "int8/int8",
    dims: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    device: str | DeviceDescription = "sm_90",
    backend: str = "triton",
    heads: str = "32/8",
    sequences: int = 1,
    options: ScoreOptions = OPTIONS,
    **listed: Any,
) -> Plan:
    key, value = (PageCodec(name) for name in codecs.split("/"))
    query_heads, kv_heads = (int(count) for count in heads.split("/"))
    return plan_attention(
        sequences=sequences, query_heads=query_heads, kv_heads=kv_heads, queries=queries,
        keys=keys, fmt=PageFormat(key, value, *dims, dtype.itemsize), dtype=dtype,
        options=options, device=described(device), backend=backend,  # type: ignore[arg-type]
        **listed,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("queries", "heads", "dataflow", "pack", "rows"),
    [
        (1, "32/8", "decode", 4, 16),
        (1, "71/1", "decode", 71, 64),  # one KV head for all: two tiles
        (5, "32/8", "decode", 4, 32),
        (16, "32/8", "decode", 4, 64),
        (17, "32/8", "prefill", 1, 128),
        (2000, "8/8", "prefill", 1, 128),
    ],
)
def test_few_rows_share_a_tile(
    queries: int, heads: str, dataflow: str, pack: int, rows: int
) -> None:
    chosen = plan(queries, heads=heads)
    assert (chosen.dataflow, chosen.pack, chosen.block_m) == (dataflow, pack, rows)
    assert (chosen.block_n, chosen.block_k, chosen.backend) == (64, 128, "triton")
    assert ("share each page" if dataflow == "decode" else "fill tiles") in chosen.reason


def test_the_dot_follows_keys_queries_and_device() -> None:
    e4m3 = dataclasses.replace(OPTIONS, query="e4m3")
    assert plan().dot == "int8"
    assert plan(codecs="float/int8", dtype=torch.float16).dot == "fp16"
    assert plan(codecs="int4/int8", options=e4m3, device="sm_89").dot == "e4m3"
    assert plan(codecs="e4m3/int8", options=e4m3, device="gfx950").dot == "e4m3"
    chosen = plan(codecs="e4m3/int8", options=e4m3, device="sm_80")
    assert chosen.dot == "fp16"
    assert "sm_80 has none of e4m3" in chosen.reason
    assert not multiplies_e4m3(known_device("gfx942"))


def test_splits_fill_the_device() -> None:
    """8 KV heads on 132 units: 16 pieces of 4 pages make 128 programs, one wave."""
    chosen = plan(keys=4096)
    assert chosen.split_k == 16
    assert "8 tiles on 132 units: 64 pages in 16 pieces" in chosen.reason
    assert plan(sequences=64).split_k == 1
    assert plan(queries=4096).split_k == 1
    assert chosen.bytes_moved > plan(keys=4096, sequences=64).bytes_moved / 64


@pytest.mark.parametrize("units", [40, 108, 132, 304])
def test_the_rule_of_splits(units: int) -> None:
    for blocks in (1, 3, 8, 31, 100, 200, 1000):
        for pages in (1, 4, 5, 17, 64, 2000):
            chosen = splits(blocks, pages, units)
            if blocks >= BUSY_ENOUGH * units or pages <= 4:
                assert chosen == 1
                continue
            assert 1 <= chosen <= min(pages, MOST_SPLITS)
            each = -(-pages // chosen)
            assert each * (chosen - 1) < pages  # no piece is empty
            shares = {
                pieces: (waves := blocks * pieces / units) / math.ceil(waves)
                for pieces in range(1, min(pages, MOST_SPLITS) + 1)
                if -(-pages // pieces) * (pieces - 1) < pages
            }
            enough = NEAR_BEST * max(shares.values())
            assert shares[chosen] >= enough
            assert all(share < enough for pieces, share in shares.items() if pieces < chosen)


def test_a_window_reads_fewer_pages() -> None:
    windowed = dataclasses.replace(OPTIONS, window=256)
    assert plan(keys=100_000, options=windowed).bytes_moved < plan(keys=1000).bytes_moved
    assert plan(keys=100_000, options=windowed).split_k <= 5
    assert plan(keys=100_000, options=windowed).operations < plan(keys=1000).operations


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("codec", PAGE_CODECS)
def test_tiles_fit_every_device(device: str, codec: str) -> None:
    options = dataclasses.replace(OPTIONS, query="e4m3" if codec == "e4m3" else "int8")
    for dims in ((64, 64), (128, 128), (80, 96), (256, 256)):
        for queries in (1, 12, 512):
            for dtype in (torch.bfloat16, torch.float32):
                codecs = f"{codec}/{codec}"
                chosen = plan(queries, 4096, codecs, dims, dtype, device, options=options)
                fmt = PageFormat(PageCodec(codec), PageCodec(codec), *dims, dtype.itemsize)
                assert chosen.block_m in (16, 32, 64, 128)
                assert chosen.warps in (1, 2, 4, 8)
                assert 1 <= chosen.stages <= 3
                needed = shared_bytes(chosen, chosen.stages, fmt)
                assert chosen.stages == 1 or needed <= known_device(device).shared_memory
                assert chosen.reason


def test_operations_and_bytes() -> None:
    """q·k and P·V of the pairs that causality leaves; every page and its mean once per KV head."""
    assert plan(1, 100).operations == 2 * 32 * 100 * (128 + 128)
    assert plan(100, 100).operations == 2 * 32 * (100 * 101 // 2) * 256
    fmt = PageFormat(PageCodec("int8"), PageCodec("int8"), 128, 128)
    page, q_and_o = fmt.record_bytes + 2 * 128, 32 * 256 * 2
    assert plan(1, 100).bytes_moved == 8 * 2 * page + q_and_o
    floats = plan(1, 100, float_keys=64 + 36)
    assert floats.bytes_moved == 8 * 100 * 256 * 2 + q_and_o
    unified = dataclasses.replace(OPTIONS, scheme="unified")
    assert plan(1, 100, options=unified).bytes_moved == 8 * 2 * (page + 2 * 128 + 4) + q_and_o


def test_lists_move_what_they_hold() -> None:
    """A list of every KV head is what all read; one of every query head is read by it alone."""
    shared, own = plan(keys=1000), plan(keys=1000, lists=8)
    assert shared == own
    single = plan(keys=1000, lists=32)
    assert (single.pack, single.block_m, single.dataflow) == (1, 16, "decode")
    assert "1 row(s) per query head, which has its own list of pages" in single.reason
    assert single.split_k < own.split_k  # four times the tiles
    one_unit = dataclasses.replace(known_device("sm_90"), compute_units=1)
    q_and_o = 32 * 256 * 2
    kv, query = (plan(keys=1000, lists=lists, device=one_unit) for lists in (8, 32))
    assert query.bytes_moved - q_and_o == 4 * (kv.bytes_moved - q_and_o)
    # Rows of one query head: as many as fill a tile make a prefill.
    assert plan(64, lists=32).dataflow == "decode"
    assert plan(65, lists=32).dataflow == "prefill"
    few = dataclasses.replace(known_device("avx512_vnni"), threads=8)
    on_cpu = plan(backend="cpu", device=few, heads="4/1", lists=4)
    assert on_cpu.split_k == 2
    assert "4 query head(s): 64 pages in 2 pieces" in on_cpu.reason
    with pytest.raises(ValueError, match="lists must be None, kv_heads, 8, or query_heads, 32"):
        plan(lists=4)
    with pytest.raises(ValueError, match="tokens, masks of the pages of lists, need lists"):
        plan(tokens=True)


def test_a_draft_moves_its_planes() -> None:
    codecs = "int8-planes/int8-planes"
    whole, draft = (
        plan(640, 640, codecs, backend="reference", draft=draft) for draft in (False, True)
    )
    assert whole.bytes_moved - draft.bytes_moved == 8 * 10 * 2 * 64 * 64


def test_other_backends() -> None:
    assert plan(backend="reference").dataflow == "definition"
    chosen = plan(backend="cpu", device="avx512_vnni")
    assert (chosen.backend, chosen.dataflow, chosen.dot) == ("cpu", "decode", "int8")
    assert chosen.threads == known_device("avx512_vnni").threads
    eight = dataclasses.replace(known_device("avx512_vnni"), threads=8)
    assert plan(backend="cpu", device=eight).split_k == 1  # a KV head for each thread
    few = plan(backend="cpu", device=eight, heads="8/2")
    assert few.split_k == 4
    assert "2 KV head(s): 64 pages in 4 pieces" in few.reason
    assert plan(keys=0, backend="cpu", device=eight, heads="8/2").split_k == 1
    assert plan(100, backend="cpu", codecs="float/float", device="avx2").dot == "fp32"
    # The interpreter: planned as for a GPU.
    assert plan(device="avx2").backend == "triton"
    assert plan(device="avx2").block_m == 16


def test_equal_questions_have_one_answer() -> None:
    """A mask is a tensor; the plan asks whether it is there, and is kept all the same."""
    masks = [torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1, 9, dtype=torch.bool)]
    one, other = (plan(options=dataclasses.replace(OPTIONS, mask=mask)) for mask in masks)
    assert one is other


def test_what_takes_registers_makes_tiles_lower() -> None:
    masked = dataclasses.replace(OPTIONS, mask=torch.ones(1, 1, 1, 1, dtype=torch.bool))
    rows = [
        plan(512).block_m,
        plan(512, codecs="int4/int4").block_m,
        plan(512, options=masked).block_m,
        plan(512, lists=8, tokens=True).block_m,
        plan(512, dims=(256, 256)).block_m,
        plan(512, dtype=torch.float32).block_m,
    ]
    assert rows == [128, 64, 32, 32, 32, 16]
