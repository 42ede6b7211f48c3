"""What `lath compare` does: perplexity against bits per weight, codec by codec, quantiser by
quantiser, of one model on one text that no quantiser has seen."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lath.formats.quantizer import quantizer as parse_quantizer
from lath.integration.calibration import Calibration, split_text
from lath.integration.linear import PackedLinear
from lath.integration.patch import patch
from lath.integration.perplexity import perplexity
from lath.integration.text_table import align

WINDOW = 512
SEARCH = "+search"


@dataclass(frozen=True)
class CompareOptions:
    """quantizers: text forms, "+search" behind one chooses scales by squared error. tokens: how
    many are measured; calibration_tokens: how many of the rest of the text calibrate."""

    model: str
    codecs: tuple[str, ...]
    quantizers: tuple[str, ...]
    tokens: int
    calibration_tokens: int
    window: int = WINDOW
    seed: int = 0
    skip: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        for text in self.quantizers:
            split_search(text)
        if self.tokens < 2:
            raise ValueError(f"tokens must be 2 or more, got {self.tokens}")


@dataclass(frozen=True)
class CompareRow:
    """One codec by one quantiser. perplexity None: it is refused, `reason` says why. bits: per
    weight of the packed layers, scales, zeros, tables and padding counted. error: mean of
    ||W - packed W|| / ||W||. seconds: of rounding, calibration included."""

    codec: str
    quantizer: str
    bits: float | None = None
    perplexity: float | None = None
    error: float | None = None
    seconds: float | None = None
    reason: str = ""


@dataclass
class Comparison:
    """options: as given. before: perplexity of the model as it is."""

    options: CompareOptions
    before: float
    calibrated_on: int
    rows: list[CompareRow]

    def write(self, path: Path, **more: Any) -> None:
        """As JSON; a file that was there is replaced in one step."""
        record = {**more, **json.loads(json.dumps(dataclasses.asdict(self)))}
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(path)

    @staticmethod
    def rows_of(path: Path, options: CompareOptions) -> list[CompareRow]:
        """The rows of a file, to go on from; ValueError if they are of other options.

        Other codecs and quantisers are no other options: rows are kept, new ones added.
        """
        try:
            record = json.loads(path.read_text())
            rows = [CompareRow(**row) for row in record["rows"]]
            found = record["options"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of lath compare: {error}") from error
        wanted = json.loads(json.dumps(dataclasses.asdict(options)))
        free = ("codecs", "quantizers")
        differ = sorted(k for k in wanted if k not in free and wanted[k] != found.get(k))
        if differ:
            raise ValueError(
                f"{path} was made with another {differ[0]}: {found.get(differ[0])!r}, here "
                f"{wanted[differ[0]]!r}"
            )
        return rows


def split_search(text: str) -> tuple[str, bool]:
    """ "gptq+search" → ("gptq", True); ValueError for what is no quantiser."""
    searched = text.endswith(SEARCH)
    name = text[: -len(SEARCH)] if searched else text
    parse_quantizer(name)
    return name, searched


def compare(
    model: Any,
    ids: Tensor,
    options: CompareOptions,
    known: Sequence[CompareRow] = (),
    done: Callable[[Comparison, CompareRow], None] | None = None,
) -> Comparison:
    """Every codec by every quantiser. known: rows that need not be measured again. done: called
    after each new row. The model is as before when this returns."""
    measured, calibration = split_text(
        ids, options.tokens, options.calibration_tokens, options.window, options.seed
    )
    count = 0 if calibration is None else calibration.ids.numel()
    result = Comparison(options, perplexity(model, measured, options.window), count, [*known])
    have = {(row.codec, row.quantizer) for row in known}
    for quantizer in options.quantizers:
        for codec in options.codecs:
            if (codec, quantizer) in have:
                continue
            row = _measure(model, measured, codec, quantizer, calibration, options)
            result.rows.append(row)
            if done is not None:
                done(result, row)
    return result


def _measure(
    model: Any,
    measured: Tensor,
    codec: str,
    text: str,
    calibration: Calibration | None,
    options: CompareOptions,
) -> CompareRow:
    name, search = split_search(text)
    calibrated = parse_quantizer(name).calibrated
    begin = time.perf_counter()
    try:
        report = patch(
            model, codec, quantizer=name, calibration=calibration if calibrated else None,
            search=search, activations="float", skip=options.skip,
        )  # fmt: skip
    except (ValueError, NotImplementedError) as error:
        return CompareRow(codec, text, reason=_without_layer(str(error)))
    seconds = time.perf_counter() - begin
    with report:
        return CompareRow(
            codec, text, bits_per_weight(model), perplexity(model, measured, options.window),
            report.mean_error, seconds,
        )  # fmt: skip


def bits_per_weight(model: nn.Module) -> float:
    """Of the packed linear layers of a model, everything that is stored counted."""
    packed = [m.qtensor for m in model.modules() if isinstance(m, PackedLinear)]
    weights = sum(weight.shape[0] * weight.shape[1] for weight in packed)
    return 8 * sum(weight.nbytes for weight in packed) / weights if weights else 0.0


def _without_layer(message: str) -> str:
    """ "model.layers.0.self_attn.q_proj: why" → "why"."""
    parts = message.split(": ")
    while len(parts) > 1 and " " not in parts[0] and "." in parts[0]:
        parts = parts[1:]
    if len(parts) > 1 and parts[0].endswith("_proj"):
        parts = parts[1:]
    return ": ".join(parts)


def comparison_table(result: Comparison) -> str:
    """A line for each codec, by bits per weight; a column for each quantiser; reasons below."""
    names = list(dict.fromkeys(row.quantizer for row in result.rows))
    by_codec: dict[str, dict[str, CompareRow]] = {}
    for row in result.rows:
        by_codec.setdefault(row.codec, {})[row.quantizer] = row
    lines = []
    reasons: dict[tuple[str, str], list[str]] = {}
    for codec, rows in by_codec.items():
        bits = next((row.bits for row in rows.values() if row.bits is not None), None)
        cells = []
        for name in names:
            row = rows.get(name, CompareRow(codec, name))
            if row.reason:
                reasons.setdefault((name, row.reason.replace(repr(codec), "it")), []).append(codec)
            cells.append("refused" if row.reason else _figure(row.perplexity))
        lines.append((bits or 0.0, (codec, "" if bits is None else f"{bits:.3f}", *cells)))
    lines.sort(key=lambda line: (-line[0], line[1][0]))
    table = align(
        [("codec", "bits per weight", *names), *(cells for _, cells in lines)],
        (True, *(False,) * (1 + len(names))),
    )
    notes = [f"{name}, {', '.join(codecs)}: {why}" for (name, why), codecs in reasons.items()]
    return "\n".join([*table, "", *notes]).rstrip()


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"
