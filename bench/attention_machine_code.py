"""What a score costs: instructions of the attention loops, read from machine code, beside a peer.

    PYTHONPATH=tests python bench/attention_machine_code.py

writes bench/results/attention_machine_code.md and .json; no GPU is needed. A cell is: thread
instructions other than tensor ones, per score, of the loop over tiles that need no mask and, after
a dash, of the one over tiles that do (one figure where one loop does both); registers per thread,
with "spill" and bytes of stack per thread where they did not suffice; blocks x warps that one
compute unit holds at once. Counts say what is issued, not how long it takes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import sageattention_peer
import torch
import triton

from lath.formats.pages import PAGE
from lath.integration.benchmark import machine_facts
from tools.attention_launches import record_attend
from tools.fake_gpu import CompileError, Specialisation, compile_recorded, fake_gpu
from tools.machine_code import Loop, Resources, resources, working_loops

RESULTS = Path(__file__).parent / "results"
TARGETS = [
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950",
]  # fmt: skip
PEER_TILE = (128, 64)  # BLOCK_M, BLOCK_N of its forward(), for every head dim
# Codecs, head dim, dtype, precision, phase, features: tests/tools/attention_launches.py.
CASES = [
    *(
        f"{codecs} {dim} fp16 {precision} {phase}{' causal' if phase == 'prefill' else ''}"
        for phase in ("prefill", "decode")
        for dim in (64, 128, 256)
        for codecs, precision in (("int8/float", "float"), ("int8/int8", "int8"))
    ),
    "int8/int8 128 fp16 float prefill causal",
    "int8/int8 128 fp16 float decode",
    "int4/int4 128 fp16 int8 decode",
]


@dataclass(frozen=True)
class Cell:
    """One kernel on one architecture. tile: rows by keys of a trip. loops: those that do the
    work, the shortest first. usage None: `reason` says why."""

    tile: tuple[int, int]
    stages: int
    usage: Resources | None
    loops: tuple[Loop, ...] = ()
    reason: str = ""

    @property
    def per_score(self) -> list[float]:
        """Thread instructions other than tensor ones per score, of each loop."""
        assert self.usage is not None
        threads = self.usage.warps * self.usage.lanes / (self.tile[0] * self.tile[1])
        return [(x.instructions - x.counts.get("tensor", 0)) * threads for x in self.loops]

    def __str__(self) -> str:
        if self.usage is None:
            return self.reason
        counts = self.per_score
        shown = "-".join(f"{count:.1f}" for count in dict.fromkeys([counts[0], counts[-1]]))
        spill = f" spill {self.usage.spill_bytes}" if self.usage.spill_bytes else ""
        occupancy = f"{self.usage.blocks_per_unit}x{self.usage.warps}"
        return f"{shown} / {self.usage.registers}{spill} / {occupancy}"

    def as_json(self) -> dict[str, Any]:
        if self.usage is None:
            return {"reason": self.reason}
        return {
            "tile": self.tile,
            "stages": self.stages,
            "non_tensor_per_score": [round(count, 2) for count in self.per_score],
            **asdict(self.usage),
            "warps_per_unit": self.usage.warps_per_unit,
            "loops": [{"classes": x.counts, "global_loads": x.global_loads} for x in self.loops],
        }


def measured(found: Specialisation, tile: tuple[int, int]) -> Cell:
    stages = int(found.options.get("num_stages", 0))
    try:
        kernel = compile_recorded(found)
    except CompileError as error:
        print(error, file=sys.stderr)
        return Cell(tile, stages, None, reason="does not compile")
    return Cell(tile, stages, resources(kernel), tuple(working_loops(kernel)))


def own(text: str) -> Callable[[str], Cell]:
    """A case of ours, as planned for an architecture."""

    def cell(architecture: str) -> Cell:
        launched = record_attend(text, architecture)
        (loop,) = [s for s in launched.specialisations if s.name == "attend_kernel"]
        return measured(loop, (launched.plan.block_m, PAGE))

    return cell


def peer(dim: int, causal: bool) -> Callable[[str], Cell]:
    """The peer's kernel with the launch options of its own code."""

    def cell(architecture: str) -> Cell:
        q, k, v = (torch.zeros(1, 2, 1024, dim, dtype=torch.float16) for _ in range(3))
        with fake_gpu(architecture) as recording:
            sageattention_peer.sageattn(q, k, v, is_causal=causal)
        (loop,) = [s for s in recording.specialisations() if s.name == "_attn_fwd"]
        return measured(loop, PEER_TILE)

    return cell


def lines() -> list[tuple[str, Callable[[str], Cell]]]:
    """The lines of the table: the peer's first."""
    found: list[tuple[str, Callable[[str], Cell]]] = []
    if sageattention_peer.reason_missing() is None:
        for dim in (64, 128):
            for causal in (False, True):
                name = f"sageattention {dim}{' causal' if causal else ''}"
                found.append((name, peer(dim, causal)))
    return found + [(f"lath {text}", own(text)) for text in CASES]


def report(facts: dict[str, str], table: Sequence[tuple[str, dict[str, Cell]]]) -> str:
    assert __doc__ is not None
    versions = ", ".join(f"{key} {value}" for key, value in facts.items())
    rows = ["| kernel | " + " | ".join(TARGETS) + " |", "|---" * (len(TARGETS) + 1) + "|"]
    for name, cells in table:
        rows.append(f"| {name} | " + " | ".join(str(cells[target]) for target in TARGETS) + " |")
    return "\n".join([
        "# Machine code of attention\n", __doc__.strip(), "", f"{versions}.", "",
        "sageattention: `_attn_fwd` of its forward(), tiles of 128 x 64, P and V in fp16 with an "
        "fp16 accumulator, one scale per 128 rows of q. lath: codecs of keys / values, head dim, "
        "dtype, precision of P, then what is masked; the tile is what `plan_attention` chooses, "
        "the accumulator fp32, one scale per row of q; decode has 4 heads of q per head of keys in "
        "a tile. AMD has 64 lanes per wave.", "", *rows, "",
    ])  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    facts = {**machine_facts(), "triton": triton.__version__}
    facts["sageattention"] = sageattention_peer.reason_missing() or sageattention_peer.version()
    table = []
    for name, cell in lines():
        cells = {target: cell(target) for target in TARGETS}
        print(name, *map(str, cells.values()), sep=" | ", file=sys.stderr, flush=True)
        table.append((name, cells))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "attention_machine_code.md").write_text(report(facts, table))
    stored = {name: {t: cell.as_json() for t, cell in cells.items()} for name, cells in table}
    text = json.dumps({"facts": facts, "kernels": stored}, indent=1)
    (RESULTS / "attention_machine_code.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
