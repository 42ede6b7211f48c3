"""`lath bench`: paired comparisons against peers, as a table and as JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from lath.formats.activations import activation_format
from lath.formats.families import weight_codec
from lath.integration.benchmark import (
    BenchRow,
    bench_linear,
    machine_facts,
    parse_shape,
    rows_as_json,
    rows_as_markdown,
)
from lath.integration.peers import PEERS

bench_app = typer.Typer(help="Paired timing against peers, in one run.", no_args_is_help=True)


@bench_app.callback()
def _bench() -> None:
    """Keeps `linear` a named command while it is the only one."""


@bench_app.command("linear")
def linear_command(
    shapes: Annotated[str, typer.Option(help="K x N, comma separated")] = "2560x6912,4096x14336",
    m: Annotated[str, typer.Option(help="tokens, comma separated")] = "1,8,128",
    codecs: Annotated[str, typer.Option(help="codecs, comma separated")] = "int4-g128,int2",
    peers: Annotated[
        str, typer.Option(help=f"comma separated, of {', '.join(PEERS)}")
    ] = "torch-bf16,torch-fp32",
    ggml: Annotated[
        Path | None, typer.Option(help="folder of ggml's libraries; else llama-cpp-python's")
    ] = None,
    cpu_time: Annotated[
        bool, typer.Option(help="CPU time of the thread, not wall time; one thread only")
    ] = False,
    activations: Annotated[
        str, typer.Option(help="'auto' is int8 in the weight's groups")
    ] = "auto",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write a table here")] = None,
) -> None:
    """Time `lath.linear` on this CPU against torch, weights cold, calls interleaved."""
    torch.set_num_threads(threads)
    chosen = None if activations == "auto" else activation_format(activations)
    pairs = [parse_shape(text) for text in shapes.split(",")]
    tokens = [_positive(text) for text in m.split(",")]
    names = [str(weight_codec(text)) for text in codecs.split(",")]
    if cpu_time and threads > 1:
        raise ValueError(f"--cpu-time times one thread, got --threads {threads}")
    clock = time.thread_time if cpu_time else time.perf_counter
    rows: list[BenchRow] = []
    missing: dict[str, str] = {}
    for k, n in pairs:
        for name in names:
            for count in tokens:
                found, absent = bench_linear(
                    k, n, count, name, peers.split(","), chosen, rounds, ggml, clock
                )
                rows += found
                missing |= absent
    if rows:
        Console().print(_table(rows))
    for peer, reason in missing.items():
        Console().print(f"not measured: {peer}: {reason}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(rows_as_json(rows), indent=1) + "\n")
    if markdown is not None and rows:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        command = f"lath bench linear --shapes {shapes} --m {m} --codecs {codecs} --peers {peers}"
        command += f" --threads {threads}" + (" --cpu-time" if cpu_time else "")
        notes = [f"Not measured: {peer}: {reason}." for peer, reason in missing.items()]
        markdown.write_text(rows_as_markdown(rows, command, notes))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise ValueError(f"--m must be positive whole numbers, got {text!r}")
    return int(text)


def _table(rows: list[BenchRow]) -> Table:
    facts = machine_facts()
    title = ", ".join(f"{key} {value}" for key, value in facts.items())
    table = Table(title=title, caption="ratio: time of the peer / time of lath; medians")
    for column in ("K x N", "M", "codec", "activations", "peer"):
        table.add_column(column)
    for column in ("lath µs", "peer µs", "ratio", "GB/s", "GOPS"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.shape, str(row.m), row.codec, row.activations, row.peer,
            f"{row.median_us:.0f}", f"{row.peer_median_us:.0f}", f"{row.ratio:.2f}",
            f"{row.gb_per_s:.1f}", f"{row.gops:.0f}",
        )  # fmt: skip
    return table
