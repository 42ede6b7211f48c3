"""Errors of 8-bit attention on synthetic inputs: lath's definition, its kernels, sageattention.

    PYTHONPATH=tests python bench/attention_accuracy.py [--backends cpu,triton]

writes bench/results/attention_accuracy.md and .json. A cell is relative L1 / largest relative L1
of one row / smallest cosine of one row, against attention in float64 of the same fp16 inputs.
Triton kernels run in the interpreter, with its known faults mended (tests/tools/interpreter.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import sageattention_peer
import torch
import triton

from lath.integration.benchmark import machine_facts
from tools import interpreter
from tools.attention_accuracy import (
    SCHEMES,
    Array,
    Errors,
    Inputs,
    Scheme,
    define,
    errors,
    mask_inputs,
    run_kernel,
    stress_inputs,
    tail_inputs,
    truth,
)
from tools.attention_backends import attend_with

RESULTS = Path(__file__).parent / "results"
SHORT_SCHEMES = [
    scheme for scheme in SCHEMES if scheme.name in ("int8 keys", "int8 K and V, P int8")
]


@dataclass(frozen=True)
class Row:
    """One contender on one case: its errors, or why there are none."""

    case: str
    contender: str
    kept: bool
    errors: Errors | None
    refusal: str = ""

    def __str__(self) -> str:
        return str(self.errors) if self.errors is not None else self.refusal


Contender = tuple[str, bool, Callable[[Inputs], Array]]


def contenders(
    backends: Sequence[str], schemes: Sequence[Scheme], kept: Sequence[bool]
) -> list[Contender]:
    """Name, whether the first page stays in 16 bits, and what computes a case."""
    found: list[Contender] = []
    for scheme in schemes:
        for keep in kept:
            held = replace(scheme, keep=keep)
            found.append((f"lath definition, {scheme.name}", keep, lambda i, s=held: define(i, s)))
            for backend in backends:
                attend = attend_with(backend)
                found.append(
                    (
                        f"lath {backend}, {scheme.name}",
                        keep,
                        lambda i, s=held, a=attend: run_kernel(a, i, s),
                    )
                )
    if sageattention_peer.reason_missing() is None:
        found.append(("sageattention", False, sageattention_peer.attend))
    return found


def measure(cases: Sequence[Inputs], entries: Sequence[Contender]) -> list[Row]:
    rows = []
    for case in cases:
        exact = truth(case)
        for name, keep, compute in entries:
            try:
                found = errors(compute(case), exact)
            except (AssertionError, NotImplementedError, ValueError) as error:
                reason = f"refuses: {error}".splitlines()[0]
                rows.append(Row(case.name, name, keep, None, reason))
            else:
                rows.append(Row(case.name, name, keep, found))
        print(case.name, file=sys.stderr, flush=True)
    return rows


def stress_tables(rows: Sequence[Row]) -> str:
    """One table per case: a line per contender, without and with the first page kept."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == case]
        lines += [
            f"\n### {case}\n",
            "| contender | all in pages | first page in 16 bits |",
            "|---|---|---|",
        ]
        for name in dict.fromkeys(row.contender for row in mine):
            cells = {row.kept: str(row) for row in mine if row.contender == name}
            lines.append(f"| {name} | {cells[False]} | {cells.get(True, '')} |")
    return "\n".join(lines)


def short_table(rows: Sequence[Row]) -> str:
    """A line per case, a column per contender."""
    names = list(dict.fromkeys(row.contender for row in rows))
    lines = ["| case | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for case in dict.fromkeys(row.case for row in rows):
        cells = {row.contender: str(row) for row in rows if row.case == case}
        lines.append(f"| {case} | " + " | ".join(cells[name] for name in names) + " |")
    return "\n".join(lines)


def peer_notes() -> str:
    """What the peer does besides computing: found by running it."""
    if reason := sageattention_peer.reason_missing():
        return f"sageattention: not run, {reason}."
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 64, 64, generator=generator).half() for _ in range(3))
    before, mask = k.clone(), torch.zeros(64, 64, dtype=torch.bool)
    kept = sageattention_peer.sageattn(q, k, v)
    masked = sageattention_peer.sageattn(q, before.clone(), v, attn_mask=mask)
    notes = [f"sageattention {sageattention_peer.version()}, `sageattn` with its defaults."]
    if not torch.equal(before, k):
        notes.append("It changes the caller's keys in place.")
    if torch.equal(kept, masked):
        notes.append("It takes `attn_mask` and ignores it: a mask that forbids every key changes "
                     "nothing.")  # fmt: skip
    notes.append("Its loads of keys past the end name no substitute; the interpreter reads 0 "
                 "there, a GPU whatever lies there.")  # fmt: skip
    return " ".join(notes)


def report(facts: dict[str, str], stress: list[Row], tails: list[Row], masks: list[Row]) -> str:
    assert __doc__ is not None
    versions = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "command")
    return "\n".join([
        "# Accuracy of 8-bit attention\n", __doc__.strip(), "", f"{versions}.", "",
        f"Command: `{facts['command']}`", "", peer_notes(), "",
        "## Inputs that hurt", "",
        "D 128, 1024 keys, 256 rows (two heads of q, one of keys), pages of 64, outputs in fp16. "
        "Values are normal around 0.3 unless the case says otherwise. With the first page in 16 "
        "bits every key after token 63 is in a page. All of lath attends over the pages that its "
        "definition wrote.",
        stress_tables(stress), "", "## Tails and causal squares", "",
        "D 64, one head of keys; flat scores: 128 queries times 0.1.", "", short_table(tails), "",
        "## Masks", "", "100 queries and 192 keys unless the case says otherwise.", "",
        short_table(masks), "",
    ])  # fmt: skip


def as_json(row: Row) -> dict[str, Any]:
    """A row for JSON, which has no infinity and no NaN: they become text."""
    stored = asdict(row)
    if row.errors is not None:
        stored["errors"] = {
            name: value if math.isfinite(value) else str(value)
            for name, value in asdict(row.errors).items()
        }
    return stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--backends", default="cpu", help="kernels to run: cpu, triton, or both")
    backends = [name for name in parser.parse_args().backends.split(",") if name]
    torch.set_num_threads(1)
    interpreter.install()
    facts = {**machine_facts(), "triton": triton.__version__, "numpy": np.__version__}
    facts["command"] = "python bench/attention_accuracy.py --backends " + ",".join(backends)
    facts["sageattention"] = sageattention_peer.reason_missing() or sageattention_peer.version()
    stress = measure(stress_inputs(), contenders(backends, SCHEMES, (False, True)))
    short = contenders(backends, SHORT_SCHEMES, (False,))
    tails, masks = measure(tail_inputs(), short), measure(mask_inputs(), short)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "attention_accuracy.md").write_text(report(facts, stress, tails, masks))
    tables = {"stress": stress, "tails": tails, "masks": masks}
    stored = {name: [as_json(row) for row in rows] for name, rows in tables.items()}
    text = json.dumps({"facts": facts, **stored}, indent=1, allow_nan=False)
    (RESULTS / "attention_accuracy.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
