"""`lath compare`: its options. What it does is in `lath.integration.compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from lath.formats.compared import compared_codecs
from lath.formats.families import weight_codec
from lath.integration.benchmark import machine_facts
from lath.integration.compare import (
    CompareOptions,
    CompareRow,
    Comparison,
    compare,
    comparison_table,
)
from lath.integration.compare_plot import plot as write_plot
from lath.integration.compare_plot import require_matplotlib
from lath.integration.models import ACCEPTED_MODELS, load_model
from lath.integration.text_sample import english_text

DEFAULT_QUANTIZERS = "rtn,rtn+search,hqq,gptq,awq"


def compare_command(
    model: Annotated[str, typer.Option(help=f"{ACCEPTED_MODELS}.")] = "smollm2",
    codecs: Annotated[
        str, typer.Option(help="Separated by commas; 'all': those of every form there is.")
    ] = "all",
    quantizers: Annotated[
        str, typer.Option(help="Separated by commas: rtn, hqq, gptq, awq, awq+gptq; '+search'.")
    ] = DEFAULT_QUANTIZERS,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that are measured.")] = 1024,
    calibration_tokens: Annotated[
        int, typer.Option(min=2, help="At most so many tokens of the rest calibrate.")
    ] = 16384,
    seed: Annotated[int, typer.Option(help="Chooses the calibration windows.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the rows that the --json file has already.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG; needs matplotlib.")] = None,
) -> None:
    """Measure perplexity against bits per weight.

    For every codec and quantiser, on text that was not calibrated on.
    """
    chosen = compared_codecs() if codecs == "all" else _list(codecs)
    options = CompareOptions(
        model, tuple(str(weight_codec(text)) for text in chosen), _list(quantizers), tokens,
        calibration_tokens, seed=seed,
    )  # fmt: skip
    for name, path in (("--json", json), ("--plot", plot)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"{name} must be a file in a folder that exists, got {str(path)!r}")
    if plot is not None:
        require_matplotlib()
    if resume and json is None:
        raise ValueError("--resume needs --json, the file to go on from")
    known = Comparison.rows_of(json, options) if resume and json and json.exists() else []
    if threads:
        torch.set_num_threads(threads)
    result = run_comparison(options, known, json)
    console = Console(width=200)
    console.print(comparison_table(result), highlight=False, markup=False)
    console.print(
        f"Unpatched {result.before:.2f}; {tokens} tokens in windows of {options.window}; "
        f"calibrated on {result.calibrated_on} others.",
        highlight=False,
    )
    if plot is not None:
        write_plot(result, plot)


def run_comparison(
    options: CompareOptions, known: list[CompareRow], json: Path | None
) -> Comparison:
    """Load the model and measure; each row is shown on a terminal and written as it comes."""
    status = Console(stderr=True)
    model, tokenizer = load_model(options.model, "float32")
    ids = tokenizer(english_text(), return_tensors="pt", verbose=False).input_ids

    def done(result: Comparison, row: CompareRow) -> None:
        if status.is_terminal:
            figure = (
                row.reason or f"{row.bits:.3f} bits per weight, perplexity {row.perplexity:.2f}"
            )
            status.print(f"{row.codec}, {row.quantizer}: {figure}", style="dim", markup=False)
        if json is not None:
            result.write(json, machine=machine_facts())

    result = compare(model, ids, options, known, done)
    if json is not None:
        result.write(json, machine=machine_facts())
    return result


def _list(text: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise ValueError(f"expected names separated by commas, got {text!r}")
    return parts
