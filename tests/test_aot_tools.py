"""The ahead-of-time tools on a small matmul: what they record, compile and read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tools.cache import cache_folder, remember
from tools.control_flow import natural_loops
from tools.fake_gpu import CompileError, Specialisation, compile_recorded, fake_gpu, target_of
from tools.machine_code import analyze, resources

pytestmark = pytest.mark.aot

NVIDIA = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
AMD = ["gfx90a", "gfx942", "gfx950"]


@triton.jit
def matmul_kernel(
    x, weight, y, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + depth
        a = tl.load(x + row[:, None] * K + k[None, :], mask=row[:, None] < M, other=0.0)
        total = tl.dot(a, tl.load(weight + k[:, None] * N + column[None, :]), total)
    where = row[:, None] * N + column[None, :]
    tl.store(y + where, total.to(y.dtype.element_ty), mask=row[:, None] < M)


def matmul(
    m: int = 100, k: int = 512, block: tuple[int, int, int] = (64, 64, 64), **options: int
) -> None:
    n = 256
    x, weight = torch.empty(m, k, dtype=torch.float16), torch.empty(k, n, dtype=torch.float16)
    y = torch.empty(m, n, dtype=torch.float16)
    grid = (triton.cdiv(m, block[0]), n // block[1])
    matmul_kernel[grid](x, weight, y, m, n, k, *block, **options)


def recorded(architecture: str, **arguments) -> Specialisation:
    with fake_gpu(architecture) as recording:
        matmul(**arguments)
    (specialisation,) = recording.specialisations()
    return specialisation


def test_a_launch_is_recorded() -> None:
    with fake_gpu("sm_80") as recording:
        matmul(num_warps=8)
    (launch,) = recording.launches
    found = launch.specialisation
    assert launch.grid == (2, 4, 1)
    assert launch.kernel is None
    assert found.name == "matmul_kernel"
    assert found.signature["x"] == "*fp16"
    assert found.signature["M"] == "i32"
    assert found.named_constexprs == {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
    assert found.attributes[(0,)] == [["tt.divisibility", 16]]
    assert found.attributes[(3,)] == []  # M = 100
    assert found.options == {"num_warps": 8}
    assert "BLOCK_K=64, num_warps=8" in str(found)


def test_equal_specialisations_are_one() -> None:
    with fake_gpu("sm_80") as recording:
        matmul(m=100)
        matmul(m=52)  # as divisible as 100
        matmul(m=112)  # divisible by 16
        matmul(m=1)  # 1 is a constant of its own
        matmul(num_stages=2)
        matmul(block=(32, 64, 64))
    assert len(recording.launches) == 6
    assert len(recording.specialisations()) == 5
    assert recorded("sm_80") == recorded("sm_80")
    assert recorded("sm_80") != recorded("sm_90")


def test_compiling_at_once_keeps_the_binary() -> None:
    with fake_gpu("sm_80", compile=True) as recording:
        matmul()
        matmul()
    first, second = recording.launches
    assert first.kernel is second.kernel
    assert "cubin" in first.kernel.asm


def test_everything_is_restored() -> None:
    before = triton.runtime.jit.JITFunction.run
    with pytest.raises(KeyError), fake_gpu("sm_80"):
        raise KeyError
    assert triton.runtime.jit.JITFunction.run is before
    with pytest.raises(RuntimeError, match="0 active drivers"):
        matmul()


@pytest.mark.parametrize(
    ("architecture", "family", "name"),
    [
        ("sm_80", "HMMA", "HMMA.16816.F32"),
        ("sm_86", "HMMA", "HMMA.16816.F32"),
        ("sm_89", "HMMA", "HMMA.16816.F32"),
        ("sm_90", "HGMMA", "HGMMA.64x64x16.F32"),
        ("sm_100", "UTCHMMA", "UTCHMMA"),
        ("gfx90a", "v_mfma", "v_mfma_f32_32x32x8f16"),
        ("gfx942", "v_mfma", "v_mfma_f32_32x32x8_f16"),
        ("gfx950", "v_mfma", "v_mfma_f32_32x32x16_f16"),
    ],
)
def test_tensor_cores_without_spills(architecture: str, family: str, name: str) -> None:
    kernel = compile_recorded(recorded(architecture, num_warps=4, num_stages=2))
    usage = resources(kernel)
    assert usage.architecture == architecture
    assert usage.uses(family)
    assert usage.spill_bytes == 0
    assert usage.blocks_per_unit >= 2
    analysis = analyze(kernel)
    assert analysis.resources == usage
    assert analysis.looped
    assert list(analysis.hot.tensor) == [name]
    assert sum(analysis.hot.counts.values()) == analysis.hot.instructions
    assert "other" not in analysis.hot.counts
    # One trip loads a 64 x 64 tile of x and of the weight, 16 bytes per lane and load.
    warp_bytes = 2 * 64 * 64 * 2 // usage.warps
    assert analysis.hot.global_bytes == warp_bytes
    assert all(load.endswith(".128") for load in analysis.hot.global_loads)
    if architecture == "sm_100":
        with pytest.raises(ValueError, match="have no shape"):
            analysis.weights_per_trip(tokens=64)
    else:
        assert analysis.weights_per_trip(tokens=64) == 64 * 64
        assert 1 < analysis.non_tensor_per_weight(64 * 64) < 8


def test_families_agree_with_the_disassembly() -> None:
    """The opcodes that `resources` counts are those that the disassembler prints."""
    for architecture in ("sm_80", "sm_90", "sm_100", "sm_120"):
        kernel = compile_recorded(recorded(architecture, num_warps=4))
        (family,) = resources(kernel).tensor_instructions
        assert {name.split(".")[0] for name in analyze(kernel).hot.tensor} == {family}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_a_shallow_dot_does_not_compile(architecture: str) -> None:
    with pytest.raises(CompileError, match=r"BLOCK_K=8\) does not compile: .*K >= 16"):
        compile_recorded(recorded(architecture, block=(64, 64, 8)))


def test_a_huge_tile_does_not_fit() -> None:
    usage = resources(compile_recorded(recorded("sm_89", block=(128, 128, 128), num_stages=4)))
    assert usage.shared_memory > 101376
    assert (usage.blocks_per_unit, usage.limiter) == (0, "shared memory")


def test_spills_are_seen() -> None:
    kernel = compile_recorded(recorded("sm_80", block=(128, 128, 64), num_warps=1))
    assert resources(kernel).spill_bytes > 0
    assert analyze(kernel).hot.counts["local"] > 0


def test_another_architecture_of_the_same_vendor() -> None:
    kernel = compile_recorded(recorded("sm_80"), "sm_86")
    assert resources(kernel).architecture == "sm_86"
    with pytest.raises(ValueError, match="must be of the vendor of sm_80"):
        compile_recorded(recorded("sm_80"), "gfx942")
    with pytest.raises(ValueError, match="must be sm_NN or gfxNNN"):
        target_of("avx2")


def test_remember_computes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATH_CACHE_DIR", str(tmp_path / "cache"))
    calls = []

    def compute() -> dict[str, int]:
        calls.append(1)
        return {"answer": 42}

    assert remember("test", "abcd", compute) == {"answer": 42}
    assert remember("test", "abcd", compute) == {"answer": 42}
    assert len(calls) == 1
    assert cache_folder() == tmp_path / "cache"
    assert [path.name for path in (tmp_path / "cache").rglob("*.*")] == ["abcd.json"]


def test_natural_loops_nest() -> None:
    # 0 enters; 1..5 is a loop around 2..3; 4 leaves the outer loop to 6, the end.
    flow = [None, None, None, (2, 4), (5, 6), (1,), ()]
    outer, inner = natural_loops(flow)
    assert outer.instructions == (1, 2, 3, 4, 5)
    assert inner.instructions == (2, 3)
    assert (outer.inner, inner.inner) == ((1,), ())
    assert natural_loops([]) == []
