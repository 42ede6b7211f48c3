"""`lath bench`: paired comparisons against peers, as a table and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from lath.formats.activations import activation_format
from lath.formats.families import weight_codec
from lath.integration import attention_benchmark, curves
from lath.integration.benchmark import (
    BenchRow,
    bench_linear,
    machine_facts,
    parse_shape,
    rows_as_json,
    rows_as_markdown,
    share_of_dots,
)
from lath.integration.compare_plot import require_matplotlib
from lath.integration.console import wide_console
from lath.integration.curves_plot import plot_curves
from lath.integration.peers import PEERS

bench_app = typer.Typer(help="Paired timing against peers, in one run.", no_args_is_help=True)

Ggml = Annotated[
    Path | None, typer.Option(help="folder of ggml's libraries; else llama-cpp-python's")
]
Vlut = Annotated[Path | None, typer.Option(help="folder of vlut.cpp's ggml libraries")]
Bitnet = Annotated[
    Path | None, typer.Option(help="library of bitnet.cpp's kernels (bench/bitnet_i2_s.cpp)")
]
CpuTime = Annotated[
    bool, typer.Option(help="CPU time of the thread, not wall time; one thread only")
]
Threads = Annotated[int, typer.Option(min=1)]
Rounds = Annotated[int, typer.Option(min=3)]
Json = Annotated[Path | None, typer.Option("--json", help="write the rows here")]
Markdown = Annotated[Path | None, typer.Option(help="write a table here")]


@bench_app.command("linear")
def linear_command(
    shapes: Annotated[str, typer.Option(help="K x N, comma separated")] = "2560x6912,4096x14336",
    m: Annotated[str, typer.Option(help="tokens, comma separated")] = "1,8,128",
    codecs: Annotated[str, typer.Option(help="codecs, comma separated")] = "int4-g128,int2",
    peers: Annotated[
        str, typer.Option(help=f"comma separated, of {', '.join(PEERS)}; '' for none")
    ] = "torch-bf16,torch-fp32",
    ggml: Ggml = None,
    vlut: Vlut = None,
    bitnet: Bitnet = None,
    cpu_time: CpuTime = False,
    activations: Annotated[
        str, typer.Option(help="'auto' is int8 in the weight's groups")
    ] = "auto",
    threads: Threads = 1,
    rounds: Rounds = 9,
    json_file: Json = None,
    markdown: Markdown = None,
) -> None:
    """Time `lath.linear` on this CPU against other libraries, weights cold, calls interleaved."""
    clock = _start(threads, cpu_time)
    chosen = None if activations == "auto" else activation_format(activations)
    pairs = [parse_shape(text) for text in shapes.split(",")]
    tokens = _numbers("--m", m)
    names = [str(weight_codec(text)) for text in codecs.split(",")]
    if not tokens:
        raise ValueError("--m must be positive whole numbers, got none")
    paths = _paths(ggml=ggml, vlut=vlut, bitnet=bitnet)
    rows: list[BenchRow] = []
    missing: dict[str, str] = {}
    for k, n in pairs:
        for name in names:
            for count in tokens:
                found, absent = bench_linear(
                    k, n, count, name, _texts(peers), chosen, rounds, paths, clock
                )
                rows += found
                missing |= absent
    wide_console().print(_table(rows))
    notes = _not_measured(missing)
    command = f"lath bench linear --shapes {shapes} --m {m} --codecs {codecs} --peers {peers}"
    command += f" --rounds {rounds} --threads {threads}" + (" --cpu-time" if cpu_time else "")
    _save(json_file, rows_as_json(rows))
    _save(markdown, rows_as_markdown(rows, command, notes))


@bench_app.command("attention")
def attention_command(
    contexts: Annotated[str, typer.Option(help="keys, comma separated; '' for none")] = (
        "4096,8192,32768"
    ),
    batches: Annotated[str, typer.Option(help="sequences, comma separated")] = "1",
    caches: Annotated[
        str, typer.Option(help="codecs of keys and values, key/value or one for both")
    ] = "int8,int4",
    prompts: Annotated[str, typer.Option(help="tokens of prompts; '' for none")] = "2048,4096",
    rounds: Rounds = 9,
    threads: Threads = 1,
    json_file: Json = None,
    markdown: Markdown = None,
) -> None:
    """Time decoding and prompts against torch's scaled_dot_product_attention, caches cold."""
    _start(threads, False)
    rows: list[attention_benchmark.AttentionRow] = []
    for text in _texts(caches):
        codecs = tuple(text.split("/")) if "/" in text else (text, text)
        if len(codecs) != 2:
            raise ValueError(f"--caches must be like 'int8' or 'int8/int4', got {text!r}")
        for batch in _numbers("--batches", batches):
            for keys in _numbers("--contexts", contexts):
                rows += attention_benchmark.bench_decode(keys, codecs, rounds, batch)
    for tokens in _numbers("--prompts", prompts):
        shape = attention_benchmark.Prefill(8, 8, 128, tokens)
        rows += attention_benchmark.bench_prefill(shape, rounds)
    command = (
        f"lath bench attention --contexts {contexts or repr('')} --batches {batches} --caches "
        f"{caches} --prompts {prompts or repr('')} --rounds {rounds} --threads {threads}"
    )
    if not rows:
        raise ValueError("nothing to measure: --contexts and --prompts are empty")
    table = attention_benchmark.attention_markdown(rows, {}, command)
    wide_console().print(_attention_table(rows))
    facts = machine_facts()
    content = [{**row, "machine": facts} for row in attention_benchmark.attention_json(rows)]
    _save(json_file, content)
    _save(markdown, table)


@bench_app.command("curves")
def curves_command(
    m: Annotated[str, typer.Option(help="tokens of a layer; '' for no such curve")] = (
        ",".join(map(str, curves.TOKENS))
    ),
    sizes: Annotated[str, typer.Option(help="K = N; '' for no such curve")] = (
        ",".join(map(str, curves.SIZES))
    ),
    contexts: Annotated[str, typer.Option(help="keys; '' for no such curve")] = (
        ",".join(map(str, curves.CONTEXTS))
    ),
    batches: Annotated[str, typer.Option(help="sequences; '' for no such curve")] = (
        ",".join(map(str, curves.BATCHES))
    ),
    codecs: Annotated[str, typer.Option(help="codecs, comma separated")] = ",".join(curves.CODECS),
    peers: Annotated[str, typer.Option(help="of `lath bench linear`")] = ",".join(curves.PEERS),
    ggml: Ggml = None,
    vlut: Vlut = None,
    bitnet: Bitnet = None,
    threads: Threads = 1,
    rounds: Rounds = 5,
    json_file: Json = None,
    markdown: Markdown = None,
    plot: Annotated[Path | None, typer.Option(help="write a PNG here")] = None,
) -> None:
    """How cost grows with tokens, size, context and batch, beside the strongest peer."""
    clock = _start(threads, False)
    if plot is not None:
        require_matplotlib()
    options = curves.CurveOptions(
        _numbers("--m", m), _numbers("--sizes", sizes), _numbers("--contexts", contexts),
        _numbers("--batches", batches), tuple(str(weight_codec(text)) for text in _texts(codecs)),
        tuple(_texts(peers)), rounds,
    )  # fmt: skip
    console = wide_console()
    points, missing = curves.measure_curves(
        options, _paths(ggml=ggml, vlut=vlut, bitnet=bitnet), clock, console.print
    )
    if not points:
        raise ValueError("nothing to measure: --m, --sizes, --contexts and --batches are empty")
    notes = _not_measured(missing)
    command = f"lath bench curves --m {m} --sizes {sizes} --contexts {contexts} --batches {batches}"
    command += f" --codecs {codecs} --peers {peers} --rounds {rounds} --threads {threads}"
    facts = machine_facts()
    _save(json_file, [{**row, "machine": facts} for row in curves.curves_json(points)])
    _save(markdown, curves.curves_markdown(points, command, notes))
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_curves(points, plot)


def _start(threads: int, cpu_time: bool) -> Callable[[], float]:
    """Set torch's threads; the clock to measure with."""
    if cpu_time and threads > 1:
        raise ValueError(f"--cpu-time times one thread, got --threads {threads}")
    torch.set_num_threads(threads)
    return time.thread_time if cpu_time else time.perf_counter


def _paths(**given: Path | None) -> dict[str, Path]:
    return {name: path for name, path in given.items() if path is not None}


def _texts(text: str) -> list[str]:
    return text.split(",") if text else []


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = _texts(text)
    for part in parts:
        if not part.isdigit() or int(part) == 0:
            raise ValueError(f"{option} must be positive whole numbers, got {part!r}")
    return tuple(int(part) for part in parts)


def _not_measured(missing: dict[str, str]) -> list[str]:
    """Print which peers are missing and why; the same as notes for a report."""
    for peer, reason in missing.items():
        wide_console().print(f"not measured: {peer}: {reason}")
    return [f"Not measured: {peer}: {reason}." for peer, reason in missing.items()]


def _save(path: Path | None, content: Any) -> None:
    """Text as it is, anything else as JSON, if there is a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        path.write_text(text)


def _table(rows: list[BenchRow]) -> Table:
    caption = (
        "ratio: time of the peer / time of lath; medians. of read: bytes of the weight's view, of "
        "a plain read (GB/s); of dots: of int8 products in registers (GOPS); in the same rounds"
    )
    table = Table(title=_title(), caption=caption)
    for column in ("K x N", "M", "codec", "activations", "peer"):
        table.add_column(column)
    for column in ("lath µs", "peer µs", "ratio", "GB/s", "of read", "GOPS", "of dots"):
        table.add_column(column, justify="right")
    for row in rows:
        peer = (f"{row.peer_median_us:.0f}", f"{row.ratio:.2f}") if row.peer else ("", "")
        table.add_row(
            row.shape, str(row.m), row.codec, row.activations, row.peer, f"{row.median_us:.0f}",
            *peer, f"{row.gb_per_s:.1f}", f"{row.of_read:.2f} ({row.ceilings.gb_per_s:.1f})",
            f"{row.gops:.0f}", share_of_dots(row),
        )  # fmt: skip
    return table


def _attention_table(rows: list[attention_benchmark.AttentionRow]) -> Table:
    caption = "ratio: median over rounds of time of the peer / time of lath"
    table = Table(title=_title(), caption=caption)
    for column in ("", "peer"):
        table.add_column(column)
    for column in ("lath µs", "peer µs", "ratio", "GB/s", "of read"):
        table.add_column(column, justify="right")
    for row in rows:
        rate = share = ""
        if row.gb_per_s is not None:
            rate, share = f"{row.gb_per_s:.1f}", f"{row.of_read:.2f} ({row.ceilings.gb_per_s:.1f})"
        table.add_row(
            row.what, row.peer, f"{row.seconds * 1e6:.0f}", f"{row.peer_seconds * 1e6:.0f}",
            f"{row.ratio:.2f}", rate, share,
        )  # fmt: skip
    return table


def _title() -> str:
    return ", ".join(f"{key} {value}" for key, value in machine_facts().items())
