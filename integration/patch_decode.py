"""The decode half of `lath.patch`: whether tokens go through one compiled call, and its report."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import nn

from lath.integration.decode_recognise import NotFusedError
from lath.integration.decode_step import STATE_NAME, FusedDecoding, fused_class
from lath.integration.decode_watch import own_class
from lath.integration.patch_attention import AttentionPatch

DECODE = ("auto", "fused", "modules")


@dataclass(frozen=True)
class Threads:
    """What several threads did for the compiled step. threads: of the last run that took several
    (one for each core that the process may use, at most torch's). runs: of compiled pieces of a
    token in which helpers might take part; alone: by one thread, because helpers had not come or
    another Python thread had them. pieces: into which the work of `runs` was cut; helped: of them
    by helpers; again: of them done twice, because a helper lost its core in the middle."""

    threads: int
    runs: int
    alone: int
    pieces: int
    helped: int
    again: int

    def __str__(self) -> str:
        share = self.helped / self.pieces if self.pieces else 0.0
        text = f"{self.threads} threads, {share:.0%} of the pieces by helpers"
        if self.again:
            text += f", {self.again:,} done twice"
        return text + (f", {self.alone:,} runs by one thread" if self.alone else "")


@dataclass(frozen=True)
class DecodeReport:
    """How tokens were decoded so far. ready: whether there is a compiled step. refusal: why there
    is none, "" if none was tried or there is one. counts: forward calls and tokens of the own loop
    by "fused" or the reason why the modules were called. threads: None where torch has one."""

    ready: bool
    refusal: str
    counts: dict[str, int]
    threads: Threads | None = None

    def __str__(self) -> str:
        state = "one compiled call per token" if self.ready else "compiled at the first token"
        if self.refusal:
            state = f"module by module: {self.refusal}"
        fused = self.counts.get("fused", 0)
        rest = sorted((-n, why) for why, n in self.counts.items() if why != "fused")
        text = f"decode: {state}"
        if self.counts:
            text += f"; {fused:,} tokens fused"
            text += "".join(f", {-n:,} calls by modules ({why})" for n, why in rest)
        return text if self.threads is None else f"{text}; {self.threads}"


def _threads(tally: dict[str, int]) -> Threads | None:
    if not tally or not tally["helpers"]:
        return None
    return Threads(
        tally["helpers"] + 1, tally["runs"], tally["refused"] + tally["rested"],
        tally["pieces"], tally["helped"], tally["again"],
    )  # fmt: skip


def check_decode(decode: Any) -> str:
    if decode not in DECODE:
        raise ValueError(f"decode must be one of {DECODE}, got {decode!r}")
    return str(decode)


class DecodePatch:
    """The change of one model: its class, and the state that this looks for.

    A model that is fused already stays so: the report then shows the same counts.
    """

    def __init__(self, model: nn.Module, attends: AttentionPatch) -> None:
        self.model: Any = model
        have = model.__dict__.get(STATE_NAME)
        self.already = have is not None
        options = attends.options
        self.state: FusedDecoding = have or FusedDecoding(functools.partial(_new_cache, options))

    @staticmethod
    def of(model: nn.Module, decode: str, attends: AttentionPatch | None) -> DecodePatch | None:
        """None where nothing is to be fused: by choice, or for want of a paged cache."""
        paged = attends is not None and attends.options.kv is not None
        if decode == "fused" and not paged:
            raise ValueError("decode='fused' needs a paged cache: give kv, such as kv='int8'")
        if decode == "modules" or not paged:
            return None
        assert attends is not None
        return DecodePatch(model, attends)

    @property
    def report(self) -> DecodeReport:
        state = self.state
        return DecodeReport(
            state.is_ready, state.refusal, dict(state.counts), _threads(state.tally)
        )

    def require(self) -> None:
        """ValueError where the model, as it is now, cannot be fused."""
        try:
            self.state.ready(self.model)
        except NotFusedError as error:
            raise ValueError(
                f"decode='fused' cannot be had for this {type(self.model).__name__}: {error}; "
                "decode='auto' takes its modules there"
            ) from error

    def check_revert(self) -> None:
        """RuntimeError if the model's class was changed since."""
        if not self.already and type(self.model) is not fused_class(own_class(self.model)):
            raise RuntimeError(
                f"the model's class was changed since lath.patch (it is {type(self.model)} now); "
                "undo the later change first"
            )

    def apply(self) -> None:
        if not self.already:
            self.model.__dict__[STATE_NAME] = self.state
            self.model.__class__ = fused_class(own_class(self.model))

    def revert(self) -> None:
        if not self.already:
            self.model.__class__ = own_class(self.model)
            self.model.__dict__.pop(STATE_NAME, None)


def _new_cache(options: Any, config: Any) -> Any:
    return options.new_cache(config)
