"""How the suite runs: interpreted by default, ahead-of-time compilation with LATH_AOT=1.

Triton decides at import whether its kernels are interpreted, so one process does one or the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

AHEAD_OF_TIME = os.environ.get("LATH_AOT") == "1"
os.environ["TRITON_INTERPRET"] = "0" if AHEAD_OF_TIME else "1"
# Threads of BLAS and of two test processes on two cores slow each other down tenfold.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

collect_ignore_glob = ["test_[!a]*.py", "test_a[!o]*.py"] if AHEAD_OF_TIME else ["test_aot*.py"]


@pytest.fixture(autouse=True)
def _honest_interpreter() -> None:
    """Mend the interpreter's bf16 and casts before any kernel runs (once per process)."""
    if not AHEAD_OF_TIME:
        from tools import interpreter

        interpreter.install()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if AHEAD_OF_TIME:
            item.add_marker(pytest.mark.aot)
