"""The Triton kernels of selection, compiled for GPUs that are not here.

Our own launchers run on CPU tensors under the plan that each architecture would get; what they
would have launched is compiled and read: registers suffice, it fits the device, and products of
index rows and labels are left to the tensor unit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lath.formats.attention import PageView, Queries
from lath.formats.device import known_device
from lath.formats.pages import PAGE, PageFormat, page_codec
from lath.kernels.select import triton as kernels
from tools.fake_gpu import Specialisation, compile_recorded, fake_gpu
from tools.machine_code import Resources, resources

ARCHITECTURES = [
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950",
]  # fmt: skip
E4M3 = ["sm_89", "sm_90", "sm_100", "sm_120", "gfx950"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PAGES, KV_HEADS, GROUP = 512, 8, 4
SCALE = 0.1

# Kernel, codec of keys, dtype, rows of a head. What a step of decoding launches:
COVER = [
    "mean int8 bf16 1", "bound int8 bf16 1", "mass int8 bf16 1", "floor int8 bf16 1",
    "repair int8 bf16 1", "token int8 bf16 1", "label int8 bf16 1",
    "repair_by_centroids int8 bf16 1",
]  # fmt: skip
OTHERS = [
    "bound int8 fp16 16", "mass int8 fp16 16", "floor float fp16 1",
    "repair int8 fp16 16", "repair_of_heads int8 fp16 1", "repair int8 fp32 1",
    "bound int8 fp32 16", "mass int8 fp32 1", "token int4 fp16 1",
    "token int8-planes bf16 16", "token float fp16 1", "token int2 fp16 16", "label4 int8 bf16 1",
    "label float fp16 16", "label4 int4 fp32 16",
]  # fmt: skip


def thinned(texts: list[str], one_in: int, architectures: list[str]) -> list[object]:
    """Each text at head dims 64 and 128 on some architectures at every run, on all in the slow."""
    return [
        pytest.param(
            text, dim, architecture, id=f"{architecture} {text} {dim}",
            marks=[] if (3 * i + 5 * j + 2 * (dim // 128)) % one_in == 0 else [pytest.mark.slow],
        )
        for i, text in enumerate(texts)
        for j, architecture in enumerate(architectures)
        for dim in (64, 128)
    ]  # fmt: skip


def record(text: str, dim: int, architecture: str) -> list[Specialisation]:
    """What one launch of "kernel codec dtype rows" would compile."""
    name, codec, dtype_name, rows = text.split()
    dtype = DTYPES[dtype_name]
    fmt = PageFormat(page_codec(codec), page_codec("int8"), dim, dim, dtype.itemsize)
    heads = KV_HEADS * GROUP
    q = torch.zeros(1, heads, int(rows), dim, dtype=dtype)
    queries = Queries(q, torch.tensor([int(rows)], dtype=torch.int32), int(rows))
    pages = _view(fmt)
    query = "e4m3" if codec == "e4m3" else "int8"

    def labels(size: int, kind: torch.dtype, count: int = 32) -> object:
        return kernels.label_scores(
            queries, pages, torch.zeros(4, KV_HEADS, dim, size, dtype=kind),
            torch.ones(4, KV_HEADS), torch.zeros(KV_HEADS, dim, dtype=torch.int32),
            torch.zeros(1, heads, count, dtype=torch.int32), SCALE,
        )  # fmt: skip

    def repair(lists: int, spreads: bool = True) -> object:
        unread = torch.zeros(1, lists, PAGES)
        return kernels.repair(queries, pages, unread, SCALE, spreads=spreads)

    calls: dict[str, Callable[[], object]] = {
        "repair": lambda: repair(KV_HEADS),
        "repair_of_heads": lambda: repair(heads),
        "repair_by_centroids": lambda: repair(KV_HEADS, False),
        "token": lambda: kernels.token_scores(queries, pages, SCALE, query),  # type: ignore[arg-type]
        "label": lambda: labels(PAGE, torch.int8),
        "label4": lambda: labels(PAGE // 2, torch.uint8),
    }
    with fake_gpu(architecture) as recording:
        if name in calls:
            calls[name]()
        else:
            kernels.page_scores(queries, pages, name, SCALE)  # type: ignore[arg-type]
    return recording.specialisations()


def _view(fmt: PageFormat) -> PageView:
    """512 pages of four records: nothing is read."""
    counts = torch.full((1, PAGES), PAGE, dtype=torch.int32)
    table = torch.zeros(1, PAGES, dtype=torch.int32)
    return PageView(
        fmt,
        torch.zeros(4, KV_HEADS, fmt.record_bytes, dtype=torch.uint8),
        torch.zeros(4, KV_HEADS, fmt.index_bytes, dtype=torch.uint8),
        table,
        table,
        counts,
        torch.tensor([PAGES], dtype=torch.int32),
        torch.tensor([PAGES * PAGE], dtype=torch.int32),
        PAGES * PAGE,
    )


def check(found: Specialisation) -> Resources:
    """It compiles, spills nothing and fits."""
    usage = resources(compile_recorded(found))
    device = known_device(found.architecture)
    assert not usage.spill_bytes, f"{found} spills {usage.spill_bytes} bytes"
    assert usage.shared_memory <= device.shared_memory, str(found)
    assert usage.blocks_per_unit >= 1, f"{found}: {usage.limiter}"
    return usage


def expect_tensor_instructions(usage: Resources, integers: bool) -> None:
    nvidia = ("IMMA", "IGMMA", "UTCI") if integers else ("HMMA", "HGMMA", "UTCH")
    amd = ("v_mfma_i32",) if integers else ("v_mfma_f32",)
    names = amd if usage.architecture.startswith("gfx") else nvidia
    assert any(usage.uses(name) for name in names), str(usage.tensor_instructions)


def check_kernels(text: str, dim: int, architecture: str) -> None:
    launched = record(text, dim, architecture)
    name, codec, *_ = text.split()
    for found in launched:
        usage = check(found)
        if found.name == "merge_kernel":
            continue
        codes = found.name == "token_scores_kernel" and codec != "float"
        if codec != "e4m3":
            expect_tensor_instructions(usage, codes)
    main = {"label4": "label"}.get(name, name).split("_")[0]
    main = main if main in ("repair", "token", "label") else "page"
    assert any(found.name.startswith(main) for found in launched)


@pytest.mark.parametrize(("text", "dim", "architecture"), thinned(COVER, 7, ARCHITECTURES))
def test_a_step_of_decoding(text: str, dim: int, architecture: str) -> None:
    check_kernels(text, dim, architecture)


@pytest.mark.parametrize(("text", "dim", "architecture"), thinned(OTHERS, 31, ARCHITECTURES))
def test_other_dtypes_rows_and_codecs(text: str, dim: int, architecture: str) -> None:
    check_kernels(text, dim, architecture)


@pytest.mark.parametrize(
    ("text", "dim", "architecture"), thinned(["token e4m3 bf16 1", "token e4m3 fp16 16"], 5, E4M3)
)
def test_eight_bit_floats(text: str, dim: int, architecture: str) -> None:
    check_kernels(text, dim, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", [512, 32768])
def test_top_k(width: int, architecture: str) -> None:
    """In registers, and by radix passes; neither with atomics on global memory."""
    with fake_gpu(architecture) as recording:
        kernels.top_k(torch.zeros(8, width), width // 8)
    (found,) = recording.specialisations()
    assert found.name == ("top_k_kernel" if width <= 1024 else "radix_top_k_kernel")
    check(found)
    kernel = compile_recorded(found)
    assert "atomic_rmw" not in kernel.asm["ttgir"]
