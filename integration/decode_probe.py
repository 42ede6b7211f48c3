"""The probe: a compiled step against the model's own modules, part by part, on random vectors.

The model's own forward runs over a few tokens with random vectors put in the place of every
layer's input (and of the last norm's), so that each part is compared by itself; so runs the step.
Vectors are taken at two sizes: at the small one the epsilons of the norms decide.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lath.integration.attention import Scores
from lath.integration.attention_mask import Mask
from lath.integration.cache import LathCache, cache_argument
from lath.integration.decode_cache import StepCache
from lath.integration.decode_recognise import Decoder, NotFusedError, Reading, stack_of
from lath.integration.decode_tolerance import (
    Codes,
    codes_of,
    layer_tolerance,
    norm_tolerance,
    product_tolerance,
)
from lath.kernels.decode_step.cpu import DecodeStep
from lath.kernels.decode_step.cpu_arguments import STATE

# Positions of the prompt's tokens and of the step's: far apart, so that a rotation shows.
POSITIONS = (0, 7, 23)
# Of a layer's input: usual, and with a mean square near the epsilons in use (1e-6, 1e-5).
SIZES = (1.0, 1e-3)


@dataclass
class _Seen:
    """What the model's own forward did at its last token."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    embedded: Tensor | None = None
    readings: dict[int, Reading] = field(default_factory=dict)
    codes: dict[int, Codes] = field(default_factory=dict)  # by the id of a product
    output: Any = None


def probed_step(
    model: Any, forward: Callable[..., Any], decoder: Decoder, new_cache: Callable[[], LathCache]
) -> tuple[DecodeStep, list[Reading], Any]:
    """A step that agrees with the model, what its layers read, and an output of `forward`.

    forward: the model's own, without self. NotFusedError with the numbers where they disagree.
    """
    runs = [_Run(model, forward, decoder, new_cache, size) for size in SIZES]
    readings = [runs[0].seen.readings[n] for n in range(len(decoder.layers))]
    step = DecodeStep(stack_of(decoder, readings))
    failed = _compare(runs, decoder, step, readings)
    if failed:
        # Of what differs between layers, rotation is not seen from outside: try without.
        readings = [
            replace(own, rotate=False) if n in failed else own for n, own in enumerate(readings)
        ]
        step = DecodeStep(stack_of(decoder, readings))
        still = _compare(runs, decoder, step, readings)
        if still:
            number = min(still)
            raise NotFusedError(
                f"layer {number} is computed differently: what it adds differs by "
                f"{failed[number][0]:.3%} from the model's own (without rotation "
                f"{still[number][0]:.3%}; {failed[number][1]:.3%} is admitted)"
            )
    for run in runs:
        _compare_ends(run, decoder, step)
    return step, readings, runs[0].seen.output


class _Run:
    """The model's own forward: two tokens, then one, with random vectors before each layer."""

    def __init__(
        self,
        model: Any,
        forward: Callable[..., Any],
        decoder: Decoder,
        new_cache: Callable[[], LathCache],
        size: float,
    ) -> None:
        self.decoder, self.size, self.new_cache = decoder, size, new_cache
        self.seen = _Seen()
        self._generator = torch.Generator().manual_seed(0)
        self.token = min(5, decoder.embedding.num_embeddings - 1)
        self.cache = new_cache()
        for step, positions in enumerate((POSITIONS[:2], POSITIONS[2:])):
            ids = torch.full((1, len(positions)), self.token)
            if step:
                self.before = _copy_of(self.cache, new_cache())
                for n, layer in enumerate(self.cache.layers):
                    layer.attend = self._watched(n, layer.attend)
            with self._hooks():
                self.seen.output = forward(
                    input_ids=ids, position_ids=torch.tensor([positions]), use_cache=True,
                    **{cache_argument(model): self.cache},
                )  # fmt: skip
        for layer in self.cache.layers:
            del layer.attend  # a circle that would keep the cache until it is looked for

    def _watched(self, number: int, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(query: Tensor, mask: Any, scores: Scores, *, kind: str) -> Tensor:
            self.seen.readings[number] = _reading(mask, scores)
            return attend(query, mask, scores, kind=kind)

        return watched

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = [
            layer.register_forward_pre_hook(self._replace(n), with_kwargs=True)
            for n, layer in enumerate(self.decoder.layers)
        ]
        handles += [
            layer.register_forward_hook(self._note(n))
            for n, layer in enumerate(self.decoder.layers)
        ]
        last = len(self.decoder.layers)
        handles.append(
            self.decoder.norm.register_forward_pre_hook(self._replace(last), with_kwargs=True)
        )
        handles.append(self.decoder.norm.register_forward_hook(self._note(last)))
        handles += [
            product.register_forward_pre_hook(self._note_codes)
            for product in dict.fromkeys(self.decoder.linears())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note_codes(self, product: Any, args: tuple[Any, ...]) -> None:
        codes = codes_of(args[0][0, -1], product.activations)
        self.seen.codes[id(product)] = max(codes, self.seen.codes.get(id(product), codes))

    def codes(self, *products: Any) -> Codes:
        """Of what some products of one vector multiplied, the coarsest."""
        return max(self.seen.codes.get(id(product), Codes(0.0, 0.0)) for product in products)

    def admitted(self, number: int) -> float:
        """How much of what a layer adds may differ."""
        own, mlp = self.decoder.layers[number].self_attn, self.decoder.layers[number].mlp
        stages = (
            self.codes(own.q_proj, own.k_proj, own.v_proj), self.codes(own.o_proj),
            self.codes(mlp.gate_proj, mlp.up_proj), self.codes(mlp.down_proj),
        )  # fmt: skip
        return layer_tolerance(stages, self.decoder.embedding.weight.dtype)

    def _replace(self, number: int) -> Callable[..., Any]:
        def replace_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name = "hidden_states"
            given = args[0] if args else kwargs[name]
            if number == 0:
                self.seen.embedded = given[0, -1]
            noise = torch.randn(given.shape, generator=self._generator) * self.size
            noise = noise.to(given.dtype)
            self.seen.inputs[number] = noise[0, -1]
            return (noise, *args[1:]) if args else (noise,), (
                kwargs if args else {k: v for k, v in kwargs.items() if k != name}
            )

        return replace_input

    def _note(self, number: int) -> Callable[..., None]:
        def note(module: Any, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            self.seen.outputs[number] = output[0, -1]

        return note


def _copy_of(cache: LathCache, empty: LathCache) -> LathCache:
    for layer, target in zip(cache.layers, empty.layers, strict=True):
        if getattr(layer, "pages", None) is None:
            raise NotFusedError("the model does not keep its keys and values in the cache")
        target.pages, target.slots = layer.pages.fork(), layer.slots
        target.batch_size, target.dtype, target.device = 1, layer.dtype, layer.device
        target.is_initialized = True
    return empty


def _reading(mask: Any, scores: Scores) -> Reading:
    if scores.softcap is not None or scores.sink is not None or not scores.causal:
        raise NotFusedError("its attention has a softcap, a sink, or is not causal")
    window = scores.window
    if mask is not None:
        if not isinstance(mask, Mask) or mask.dense is not None or not mask.causal:
            raise NotFusedError("its attention has a mask of its own")
        window = mask.window
    return Reading(scores.scale, window)


def rotations(decoder: Decoder, positions: int) -> Tensor:
    """fp32 [positions, 2, head_dim]: cosines and signed sines, as the model's own module has them
    in its dtype: rotated = x cos + (x turned by half a head) sin."""
    dtype, width = decoder.embedding.weight.dtype, decoder.head_dim
    like = torch.zeros(1, dtype=dtype)
    cosines, sines = decoder.rotary(like, torch.arange(positions)[None])
    if tuple(cosines.shape) != (1, positions, width):
        raise NotFusedError(f"rotations are {[*cosines.shape]}, not [1, {positions}, {width}]")
    table = torch.stack([cosines[0].float(), sines[0].float()], dim=1)
    table[:, 1, : width // 2] *= -1
    return table.contiguous()


def _compare(
    runs: list[_Run], decoder: Decoder, step: DecodeStep, readings: list[Reading]
) -> dict[int, tuple[float, float]]:
    """The layers that differ, with how much, and what is admitted."""
    table = rotations(decoder, POSITIONS[-1] + 1)
    step.state[STATE["rotations"]] = table.data_ptr()
    step.state[STATE["position"]] = POSITIONS[-1]
    failed: dict[int, tuple[float, float]] = {}
    for run in runs:
        cache = _copy_of(run.before, run.new_cache())
        bound = StepCache(cache, step)
        slot, grown = bound.advance()
        step.state[STATE["slot"]], step.state[STATE["grown"]] = slot, grown
        for n in range(len(decoder.layers)):
            x, y = run.seen.inputs[n].float(), run.seen.outputs[n].float()
            step.residual[: len(x)] = x
            bound.bound.run_layer(n)
            error = difference(step.residual[: len(x)], x, y, step.stack.dtype)
            admitted = run.admitted(n)
            if not error <= admitted:
                failed[n] = max((error, admitted), failed.get(n, (0.0, 0.0)))
    return failed


def difference(ours: Tensor, x: Tensor, theirs: Tensor, dtype: torch.dtype) -> float:
    """||ours - theirs|| / ||theirs - x||, less what rounding a sum to `dtype` twice may do."""
    rounding = torch.finfo(dtype).eps * float(theirs.norm())
    error = max(float((ours - theirs).norm()) - rounding, 0.0)
    added = float((theirs - x).norm())
    return error / added if added else float("inf") if error else 0.0


def _compare_ends(run: _Run, decoder: Decoder, step: DecodeStep) -> None:
    """The embedding, the last norm and the logits."""
    dtype, last = step.stack.dtype, len(decoder.layers)
    seen = run.seen
    assert seen.embedded is not None
    step.state[STATE["token"]] = run.token
    step.run_embedding()
    if not torch.equal(step.residual[: len(seen.embedded)], seen.embedded.float()):
        raise NotFusedError("the model does something to the embedding's rows")
    x = seen.inputs[last]
    step.residual[: len(x)] = x.float()
    logits = torch.empty(seen.output.logits.shape[-1], dtype=dtype)
    step.run_end(logits)
    parts = [("the last norm", step.hidden[: len(x)], seen.outputs[last], norm_tolerance(dtype))]
    if step.stack.head is not None:
        admitted = product_tolerance(run.codes(decoder.head), dtype)
        parts.append(("the output layer", logits, seen.output.logits[0, -1], admitted))
    for name, ours, theirs, admitted in parts:
        theirs = theirs.float()
        error = difference(ours.float(), torch.zeros_like(theirs), theirs, dtype)
        if not error <= admitted:
            raise NotFusedError(
                f"{name} is computed differently: {error:.3%} from the model's own "
                f"({admitted:.3%} is admitted)"
            )
