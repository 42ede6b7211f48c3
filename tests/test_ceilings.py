"""The kernels that measure what a core can do: they do read, and they do add."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from test_cpu_processes import LOWERINGS, run_lowered

from lath.kernels.simd import ceilings

UNIT = ceilings.STREAMS * ceilings.VECTOR


def check(threads: int) -> None:
    """Both kernels against NumPy's integers, in torch's threads."""
    torch.set_num_threads(threads)
    memory = np.random.default_rng(0).integers(0, 256, 9 * threads * UNIT).astype(np.uint8)
    for units in (1, 3):
        read = ceilings.Read(memory, units * threads * UNIT, threads)
        for i in (0, 1, read.count):  # the last is the first again
            read(i)
            part = memory.reshape(-1, read.nbytes)[i % read.count]
            assert read.total == int(part.view(np.uint32).sum(dtype=np.uint64)) % 2**32
            assert read.total != int(memory.view(np.uint32).sum(dtype=np.uint64)) % 2**32
    rounds, (codes, signed) = 40, ceilings.tile_of_dots()
    dots = ceilings.Dots(rounds, threads)
    dots(0)
    lanes = dots.operands.reshape(ceilings.OPERANDS, 16, 4).astype(np.int64)
    expected = np.zeros(16, np.int64)
    for i in range(rounds):
        first = 0 if codes == 4 else i % (ceilings.OPERANDS - codes - signed)
        left, right = lanes[first : first + codes], lanes[first + codes : first + codes + signed]
        expected += np.einsum("ilk,jlk->l", left, right)
    assert np.array_equal(dots.sums, np.tile(expected, (threads, 1)))
    assert dots.operations == 2 * 64 * codes * signed * rounds * threads


@pytest.mark.parametrize("threads", [1, 2])
def test_ceilings(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        check(threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", LOWERINGS)
def test_ceilings_of_other_instruction_sets(name: str) -> None:
    run_lowered(name, "import test_ceilings; test_ceilings.check(1)")


@pytest.mark.parametrize("nbytes", [0, UNIT + 64, 4 * UNIT])
def test_what_cannot_be_read(nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"nbytes must be .* got {nbytes}"):
        ceilings.Read(np.zeros(3 * UNIT, np.uint8), nbytes, 1)
