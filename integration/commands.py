"""The commands of `lath`, with their options. What they do is in a module each."""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from lath.formats.activations import activation_format
from lath.formats.families import weight_codec
from lath.formats.quantizer import quantizer as parse_quantizer
from lath.formats.registry import systems_table
from lath.integration.bench_command import bench_app
from lath.integration.compare_command import compare_command
from lath.integration.console import wide_console
from lath.integration.models import ACCEPTED_MODELS, parse_dtype
from lath.integration.patch_attention import attention_options
from lath.integration.patch_decode import check_decode
from lath.integration.plan_command import plan_table
from lath.integration.run_command import (
    AUTO_CACHE,
    DEFAULT_CACHE,
    DEFAULT_HEAD,
    DEFAULT_PROMPT,
    DEFAULT_WEIGHTS,
    NO_HEAD,
    RunOptions,
    run_model,
)
from lath.verbs.backends import resolve_backend

NOT_PATCHED = "none"

app = typer.Typer(
    help="lath: low-bit weights for language models.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
app.command("compare")(compare_command)

Model = Annotated[str, typer.Option(help=f"{ACCEPTED_MODELS}.")]
Weights = Annotated[
    str, typer.Option(help="Codec of the weights, such as int4-g64 or int3-g32-asym.")
]
Activations = Annotated[
    str, typer.Option(help="'auto', 'float', 'int8' or 'int8-g{multiple of 16}'.")
]
Skip = Annotated[list[str], typer.Option(help="Pattern of layers to leave alone; may be repeated.")]
Dtype = Annotated[str, typer.Option(help="'bfloat16', 'float16', 'float32' or 'auto'.")]


@app.command()
def run(
    model: Model = "smollm2",
    weights: Weights = DEFAULT_WEIGHTS,
    activations: Activations = "auto",
    attention: Annotated[
        str, typer.Option(help="'int8', or 'none' for the model's own.")
    ] = NOT_PATCHED,
    kv: Annotated[
        str,
        typer.Option(
            help="Codecs of the cache, such as int8 or k8v4; 'none': not paged; 'auto': int8 where "
            "compiled kernels decode."
        ),
    ] = AUTO_CACHE,
    select: Annotated[
        str | None,
        typer.Option(help="What of the cache is read, such as quest:1024; needs --kv."),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Estimate what --select leaves out.")
    ] = False,
    audit: Annotated[
        float | None,
        typer.Option(help="Count queries for which --select captures less of the softmax."),
    ] = None,
    decode: Annotated[
        str,
        typer.Option(help="'fused': a token in one compiled call, needs --kv; 'modules'; 'auto'."),
    ] = "auto",
    backend: Annotated[str, typer.Option(help="'auto', 'cpu', 'triton' or 'reference'.")] = "auto",
    skip: Skip = ["lm_head"],  # noqa: B006 (typer reads the default and copies it)
    head: Annotated[
        str, typer.Option(help="Codec of the output layer, or 'none' to leave it as it is.")
    ] = DEFAULT_HEAD,
    search: Annotated[bool, typer.Option(help="Choose scales by squared error.")] = False,
    quantizer: Annotated[
        str, typer.Option(help="'rtn', 'hqq', 'gptq', 'awq' or 'awq+gptq'.")
    ] = "rtn",
    calibration_folder: Annotated[
        Path | None, typer.Option(help="Keep calibrated layers here, and go on from them.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What to ask the model.")] = DEFAULT_PROMPT,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 96,
    dtype: Dtype = "bfloat16",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the speed measurement.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Compare a model with its packed self.

    Bytes, perplexity, speed and answers, before and after, in one run.
    """
    weight_codec(weights)
    if head != NO_HEAD:
        weight_codec(head)
    parse_dtype(dtype)
    if activations != "auto":
        activation_format(activations)
    how = parse_quantizer(quantizer)
    if calibration_folder is not None and not how.calibrated:
        raise ValueError(f"--calibration-folder is for gptq and awq, got --quantizer {quantizer}")
    _check_backend(backend)
    patched = [None if value == NOT_PATCHED else value for value in (attention, kv)]
    mending = True if repair else None
    if kv == AUTO_CACHE and (check_decode(decode) == "fused" or select is not None):
        patched[1] = DEFAULT_CACHE
    checked = None if patched[1] == AUTO_CACHE else patched[1]
    attention_options(patched[0], checked, backend, select, mending, audit)
    if json is not None:
        _check_writable(json)
    if threads:
        torch.set_num_threads(threads)
    options = RunOptions(
        model, weights, activations, backend, tuple(skip), head, search, prompt, max_new_tokens,
        dtype, rounds, patched[0], patched[1], select, mending, audit, quantizer,
        calibration_folder=calibration_folder, decode=check_decode(decode),
    )  # fmt: skip
    result = run_model(options, wide_console())
    if json is not None:
        result.write(json)


@app.command()
def plan(
    model: Model = "smollm2",
    weights: Weights = "int4-g64",
    m: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1,16,256",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', or an architecture: sm_90.")] = "cpu",
    activations: Activations = "auto",
    dtype: Dtype = "bfloat16",
    skip: Skip = ["lm_head"],  # noqa: B006
) -> None:
    """Show how each layer would run, and why.

    For this machine, or for a device that is not here.
    """
    numbers = _numbers(m)
    target = parse_dtype(dtype) or torch.bfloat16
    wide_console().print(plan_table(model, weights, numbers, device, target, activations, skip))


@app.command()
def systems() -> None:
    """List the published techniques that work here, and as what."""
    typer.echo(systems_table(), nl=False)


@app.command()
def warmup(
    weights: Annotated[
        list[str] | None, typer.Option(help="Codec to prepare for; may be repeated.")
    ] = None,
) -> None:
    """Compile the CPU kernels ahead of use.

    They are kept on disk, so that the first call of a later process need not wait for them.
    """
    codecs = [
        str(weight_codec(text)) for text in weights or (DEFAULT_WEIGHTS, DEFAULT_HEAD, "int4-g64")
    ]
    _check_backend("cpu")
    from lath.kernels.linear.cpu import warmup as compile_kernels

    begin = time.perf_counter()
    with Console(stderr=True).status("compiling") as status:
        compile_kernels(codecs, lambda step: status.update(f"compiling {step}"))
        if importlib.util.find_spec("transformers") is not None:
            from lath.integration.decode_warmup import warm_decoding

            status.update("compiling a step of decoding")
            warm_decoding(codecs)
    seconds = time.perf_counter() - begin
    wide_console().print(f"kernels for {', '.join(codecs)} are ready ({seconds:.1f} s)")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(piece) for piece in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise ValueError(
            f"--m must be whole numbers separated by commas, such as 1,16, got {text!r}"
        )
    return numbers


def _check_backend(backend: str) -> None:
    """The model will be on the CPU: say now if the backend cannot run there."""
    try:
        resolve_backend(backend, torch.device("cpu"))
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--json must be a file in a folder that exists, got {str(path)!r}")
    if shutil.disk_usage(path.absolute().parent).free < 1_000_000:
        raise ValueError(f"no disk space for --json {str(path)!r}: 1,000,000 bytes needed")
