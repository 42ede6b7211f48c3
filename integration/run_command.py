"""What `lath run` does: one model, measured as it is and patched, in one run."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lath.formats.quantizer import quantizer as parse_quantizer
from lath.integration.calibration import Calibration, split_text
from lath.integration.find import OUTPUT_LAYER
from lath.integration.linear import PackedLinear
from lath.integration.measure import generate, measure_speeds
from lath.integration.models import load_model, parse_dtype
from lath.integration.patch import patch
from lath.integration.patch_attention import AttentionPatch, attention_options
from lath.integration.perplexity import cached_perplexity, num_windows, perplexity
from lath.integration.progress import progress_bar, shows_progress
from lath.integration.report import PatchReport, model_bytes
from lath.integration.report_table import selection_line
from lath.integration.text_sample import english_text
from lath.verbs.backends import resolve_backend
from lath.verbs.planning import describe_device
from lath.verbs.selection import DECODE_ROWS

DEFAULT_PROMPT = "Explain in two sentences why the sky is blue."
# Four bits and a minimum per 32 weights: as SmolLM2's package stores its own weights, so that what
# is compared by default is the arithmetic, not a second rounding.
DEFAULT_WEIGHTS = "int4-g32-fzero"
# The output layer reads a fifth of SmolLM2 for every token; eight bits of it cost no quality.
DEFAULT_HEAD = "int8-g64"
NO_HEAD = "none"
# A cache in pages is what one compiled call per token reads; eight bits cost no quality.
DEFAULT_CACHE = "int8"
AUTO_CACHE = "auto"
WINDOW = 512
CHUNK = 128
PREFILL_TOKENS = 256
DECODE_TOKENS = 32
# What is measured when the rest of the text calibrates.
MEASURED_TOKENS = 1024
# A selection leaves something out only where there is more than its budget, and selects for steps
# of no more rows than this.
LONG_WINDOW = 2048
LONG_CHUNK = DECODE_ROWS


@dataclass(frozen=True)
class RunOptions:
    """The options of `lath run`; see its help. weights: None: as they are. kv: None, codecs, or
    AUTO_CACHE."""

    model: str
    weights: str | None
    activations: str
    backend: str
    skip: Sequence[str]
    head: str
    search: bool
    prompt: str
    max_new_tokens: int
    dtype: str
    rounds: int
    attention: str | None = None
    kv: str | None = None
    select: str | None = None
    repair: bool | None = None
    audit: float | None = None
    quantizer: str = "rtn"
    calibration_tokens: int = 16384
    calibration_folder: Path | None = None
    decode: str = "auto"


@dataclass(frozen=True)
class Lengths:
    """Tokens: of a window of perplexity, of its pieces where a cache is read, of the prompt whose
    speed is measured."""

    window: int
    chunk: int
    prefill: int

    @staticmethod
    def of(model: Any, options: RunOptions) -> Lengths:
        if options.select is None:
            return Lengths(WINDOW, CHUNK, PREFILL_TOKENS)
        longest = getattr(model.config, "max_position_embeddings", LONG_WINDOW)
        window = min(LONG_WINDOW, longest)
        return Lengths(window, LONG_CHUNK, max(window - DECODE_TOKENS, 1))


@dataclass
class RunResult:
    """The fields of `--json`, before and after patching. bytes: of the whole model. misses: with an
    audit, the rows of its MissReport."""

    bytes_before: int = 0
    bytes_after: int = 0
    perplexity_before: float = 0.0
    perplexity_after: float = 0.0
    prefill_tokens_per_s_before: float = 0.0
    prefill_tokens_per_s_after: float = 0.0
    decode_tokens_per_s_before: float = 0.0
    decode_tokens_per_s_after: float = 0.0
    backend: str = ""
    weights: str = ""
    text_before: str = ""
    text_after: str = ""
    misses: list[dict[str, Any]] | None = None

    def write(self, path: Path) -> None:
        figures = dataclasses.asdict(self)
        if self.misses is None:
            del figures["misses"]
        path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


class Patches:
    """The patch of the layers and, with a codec of its own, that of the output layer."""

    def __init__(
        self, model: Any, options: RunOptions, calibration: Calibration | None = None
    ) -> None:
        def pack(weights: str | None, **which: Any) -> PatchReport:
            return patch(
                model,
                weights,
                activations=options.activations,
                backend=options.backend,
                search=options.search,
                **which,
            )

        self.body = pack(
            options.weights, skip=options.skip, attention=options.attention, kv=options.kv,
            select=options.select, repair=options.repair, audit=options.audit,
            quantizer=options.quantizer, calibration=calibration,
            decode=options.decode,
        )  # fmt: skip
        self.reports = [self.body]
        self.name = ", ".join(
            [self.body.weights, *(f"{row.name} {row.after}" for row in self.body.attention)]
        )
        if options.quantizer != "rtn":
            self.name = f"{options.quantizer} {self.name}"
        if self.body.selection is not None:
            self.name += f", selection {self.body.selection.what}"
        if options.head != NO_HEAD:
            self.reports.append(pack(options.head, skip=(), only=(OUTPUT_LAYER,)))
            self.name += f", output layer {options.head}"

    def unmeasured(self) -> contextlib.AbstractContextManager[None]:
        """Within it no audit slows what is timed."""
        misses = self.body.misses
        return contextlib.nullcontext() if misses is None else misses.paused()

    def undo(self) -> None:
        for report in reversed(self.reports):
            report.undo()

    def redo(self) -> None:
        for report in self.reports:
            report.redo()


def run_model(options: RunOptions, console: Console) -> RunResult:
    """Load, pack, measure both, show both answers as they are written, print the table."""
    if shows_progress():
        Console(stderr=True).print(f"loading {options.model}", style="dim", markup=False)
    # In the checkpoint's own dtype: codes are made from the numbers that were saved, not from their
    # rounding to the dtype in which the rest of the model then runs.
    model, tokenizer = load_model(options.model)
    text_ids = tokenizer(english_text(), return_tensors="pt", verbose=False).input_ids
    text_ids, calibration = _split(text_ids, options)
    options, weights_note = with_weights(model, options)
    options, cache_note = with_cache(model, options)
    patches = Patches(model, options, calibration)
    patches.undo()
    dtype = parse_dtype(options.dtype)
    if dtype is not None:
        model.to(dtype)
    result = RunResult(weights=patches.body.weights, backend=patches.body.backend)
    prompt_ids = encode_prompt(tokenizer, options.prompt)
    lengths = Lengths.of(model, options)
    with progress_bar("perplexity", 2 * num_windows(text_ids.numel(), lengths.window)) as advance:
        result.bytes_before = model_bytes(model)
        result.perplexity_before = perplexity(model, text_ids, lengths.window, advance)
        patches.redo()
        result.bytes_after = model_bytes(model)
        result.perplexity_after = _perplexity_after(model, patches, text_ids, lengths, advance)
    with patches.unmeasured():
        _measure_both(model, patches, text_ids[:, : lengths.prefill], options.rounds, result)
    names = [_dtype_name(model), patches.name]
    console.print(Text(f"> {options.prompt}", style="bold"))
    patches.undo()
    result.text_before = _answer(model, tokenizer, prompt_ids, names[0], options, console)
    patches.redo()
    result.text_after = _answer(model, tokenizer, prompt_ids, names[1], options, console)
    console.print(result_table(result, names, options))
    console.print(circumstances(result, patches, options, lengths))
    if calibration is not None:
        console.print(
            f"Calibrated on {calibration.ids.numel()} tokens of the text; perplexity is of "
            f"{text_ids.numel()} others."
        )
    for note in (weights_note, cache_note):
        if note:
            console.print(note, highlight=False)
    if patches.body.decode is not None:
        console.print(str(patches.body.decode), highlight=False)
    if patches.body.selection is not None:
        console.print(selection_line(patches.body.selection).strip(), highlight=False)
    if patches.body.misses is not None:
        result.misses = [dataclasses.asdict(row) for row in patches.body.misses.rows]
        console.print(str(patches.body.misses), highlight=False)
    console.print(difference(result.text_before, result.text_after))
    return result


def with_weights(model: Any, options: RunOptions) -> tuple[RunOptions, str]:
    """The options with layers that a checkpoint packs (BitNet's) left as they are, and the line
    that says so, or "". Another codec than the default was asked for, and `patch` refuses it."""
    packed = {str(m.codec) for m in model.modules() if isinstance(m, PackedLinear)}
    if not packed or options.weights != DEFAULT_WEIGHTS:
        return options, ""
    note = f"weights: {', '.join(sorted(packed))}, as the checkpoint has them, before and after"
    return dataclasses.replace(options, weights=None), note


def with_cache(model: Any, options: RunOptions) -> tuple[RunOptions, str]:
    """The options with AUTO_CACHE resolved, and why the cache stays the model's own, or "".

    DEFAULT_CACHE where tokens can go through one compiled call: with the compiled kernels of a CPU,
    in a model whose attention takes pages. Whether it is then fused, the decode report says.
    """
    if options.kv != AUTO_CACHE:
        return options, ""
    chosen = dataclasses.replace(options, kv=DEFAULT_CACHE)
    without = dataclasses.replace(options, kv=None)
    backend = resolve_backend(options.backend, torch.device("cpu"))
    if options.decode == "modules" or backend != "cpu":
        why = "--decode modules" if options.decode == "modules" else f"backend {backend}"
        return without, f"cache: the model's own ({why})"
    attending = attention_options(options.attention, chosen.kv, options.backend)
    assert attending is not None
    try:
        AttentionPatch.prepare(model, attending)
    except (NotImplementedError, TypeError, ValueError) as error:
        return without, f"cache: the model's own ({error})"
    return chosen, ""


def _split(ids: Tensor, options: RunOptions) -> tuple[Tensor, Calibration | None]:
    """The text to be measured, [1, L]: all of it, or what a quantiser does not calibrate on."""
    if not parse_quantizer(options.quantizer).calibrated:
        return ids, None
    measured, calibration = split_text(
        ids, MEASURED_TOKENS, options.calibration_tokens, WINDOW, 0,
        folder=options.calibration_folder,
    )  # fmt: skip
    return measured[None], calibration


def _perplexity_after(
    model: Any, patches: Patches, ids: Tensor, lengths: Lengths, advance: Any
) -> float:
    """With a cache of pages in pieces of text that read it, for only then is it read at all."""
    new_cache = patches.body.new_cache
    if new_cache is None:
        return perplexity(model, ids, lengths.window, advance)
    return cached_perplexity(model, ids, new_cache, lengths.window, lengths.chunk, advance)


def _measure_both(
    model: Any, patches: Patches, text_ids: Tensor, rounds: int, result: RunResult
) -> None:
    with progress_bar("speed", 2 * (rounds + 1)) as advance:
        speeds = measure_speeds(
            model,
            text_ids,
            {"before": patches.undo, "after": patches.redo},
            new_tokens=DECODE_TOKENS,
            rounds=rounds,
            advance=advance,
        )
    result.prefill_tokens_per_s_before = speeds["before"].prefill
    result.prefill_tokens_per_s_after = speeds["after"].prefill
    result.decode_tokens_per_s_before = speeds["before"].decode
    result.decode_tokens_per_s_after = speeds["after"].decode


def encode_prompt(tokenizer: Any, prompt: str) -> Tensor:
    """The prompt as token ids [1, L], in the model's chat form if it has one."""
    if tokenizer.chat_template is None:
        ids: Tensor = tokenizer(prompt, return_tensors="pt").input_ids
        return ids
    messages = [{"role": "user", "content": prompt}]
    chat: Tensor = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    return chat


def _answer(
    model: Any, tokenizer: Any, ids: Tensor, name: str, options: RunOptions, console: Console
) -> str:
    """Generate greedily, showing the text as it comes."""
    from transformers import TextStreamer

    console.rule(name, align="left")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    tokens = generate(model, ids, options.max_new_tokens, streamer=streamer)
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def result_table(result: RunResult, names: Sequence[str], options: RunOptions) -> Table:
    """Bytes, perplexity and speed, before, after and as a ratio."""
    table = Table(title=f"{options.model}: {names[0]} and {names[1]}", title_justify="left")
    table.add_column("")
    for heading in (f"before: {names[0]}", f"after: {names[1]}", "change"):
        table.add_column(heading, justify="right")
    before, after = result.bytes_before, result.bytes_after
    table.add_row("bytes", f"{before:,}", f"{after:,}", f"{before / after:.2f} times smaller")
    old, new = result.perplexity_before, result.perplexity_after
    table.add_row("perplexity", f"{old:.3f}", f"{new:.3f}", f"{new / old - 1:+.2%}")
    for label, field in (("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s")):
        slow, fast = getattr(result, f"{field}_before"), getattr(result, f"{field}_after")
        table.add_row(f"{label} tokens/s", f"{slow:.1f}", f"{fast:.1f}", f"{fast / slow:.2f} times")
    return table


def circumstances(
    result: RunResult, patches: Patches, options: RunOptions, lengths: Lengths
) -> str:
    """Where and how the figures were taken, and what memory they took that the table leaves out."""
    report = patches.body
    views = sum(part.view_bytes for part in patches.reports)
    return (
        f"Backend {result.backend} on {describe_device('cpu').architecture}, "
        f"{torch.get_num_threads()} thread(s); activations {report.activations}; prefill of "
        f"{lengths.prefill} tokens, then {DECODE_TOKENS}; medians of {options.rounds} rounds. "
        f"Views of the packed weights, made for this backend and never saved: {views:,} bytes more."
        + (
            f" Perplexity in windows of {lengths.window} tokens, {lengths.chunk} at a time."
            if options.select is not None
            else ""
        )
    )


def difference(before: str, after: str) -> Text:
    """Both answers in one text, word by word: [-only before-], {+only after+}."""
    if before == after:
        return Text("The two answers are the same.")
    old, new = before.split(), after.split()
    text = Text("Difference of the answers: ")
    for tag, i, j, k, n in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            text.append(" ".join(old[i:j]) + " ")
            continue
        if i < j:
            text.append(f"[-{' '.join(old[i:j])}-] ", style="red")
        if k < n:
            text.append(f"{{+{' '.join(new[k:n])}+}} ", style="green")
    text.rstrip()
    return text
