"""One compiled call per token behind a model's `forward`, and the rules by which it is not taken.

A patched model becomes an instance of a subclass of its own class (`generate` takes its loop from
the class, and copies of the model stay patched). What changes is that class, and one attribute
that holds a FusedDecoding.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lath.formats.memory import give_back
from lath.integration.decode_loop import Loop, check_loop
from lath.integration.decode_recognise import NotFusedError, find_decoder
from lath.integration.decode_watch import Skipped, Weights, obstacle_of_mode, own_class
from lath.verbs.backends import is_installed

if TYPE_CHECKING:
    from lath.integration.cache import LathCache
    from lath.integration.decode_cache import StepCache
    from lath.kernels.decode_step.cpu_greedy import Greedy

STATE_NAME = "_lath_decode"
_CACHES = ("cache", "past_key_values")
# Arguments of `forward` that change nothing of one token's logits, whatever they are.
_WITHOUT_EFFECT = frozenset({"use_cache", "return_dict", "cache_position", *_CACHES})
_NEEDS_NUMBA = "the compiled step needs numba: pip install 'lath[cpu]'"
_FIRST_TABLE = 4096  # positions whose rotations are worked out at once
_LARGEST_TABLE = 1 << 20


class Ready:
    """A compiled step that the probe has admitted, and what it was made of."""

    def __init__(self, model: Any, forward: Callable[..., Any], new_cache: Any) -> None:
        if not is_installed("numba"):
            raise NotFusedError(_NEEDS_NUMBA)
        from lath.integration.decode_probe import probed_step

        self.skipped = Skipped(model)
        if self.skipped.obstacle:
            raise NotFusedError(self.skipped.obstacle)
        self.decoder = find_decoder(model)
        with torch.no_grad():
            self.step, self.readings, example = probed_step(model, forward, self.decoder, new_cache)
        give_back()  # the caches of the probe
        self.weights = Weights(self.decoder)
        self.output_class = type(example)
        self.cache_name = next(name for name in _CACHES if name in example)
        self.vocabulary = int(example.logits.shape[-1])
        self.head = None if self.step.stack.head is not None else model.get_output_embeddings()
        self._embedded = int(self.step.stack.embedding.shape[0])
        self._table, self._rotated = torch.zeros(0), 0  # of how many positions
        self._caches: weakref.WeakKeyDictionary[Any, StepCache] = weakref.WeakKeyDictionary()

    def cache_of(self, cache: LathCache) -> StepCache:
        """The cache as the step reads it, fit for its next token."""
        from lath.integration.decode_cache import StepCache

        known = self._caches.get(cache)
        if known is None:
            known = self._caches[cache] = StepCache(cache, self.step)
        known.prepare()
        return known

    def place(self, token: int, position: int) -> None:
        """Enter a token and its position into the step's numbers. NotFusedError for numbers that
        the modules would refuse, or whose rotations would fill memory."""
        if not 0 <= token < self._embedded:
            raise NotFusedError("a token outside the embedding")
        if position >= _LARGEST_TABLE:
            raise NotFusedError("a position beyond a million")
        if position >= self._rotated:
            self._rotate(position)
        self.step.state[_TOKEN], self.step.state[_POSITION] = token, position

    def _rotate(self, position: int) -> None:
        """Rotations for this position and as many more as there are, at least."""
        from lath.integration.decode_probe import rotations

        while position >= self._rotated:
            # Wherever the table lies, the step finds it through its numbers.
            self._table = rotations(self.decoder, max(_FIRST_TABLE, 2 * self._rotated))
            self.step.state[_ROTATIONS] = self._table.data_ptr()
            self._rotated = len(self._table)

    def run_greedily(
        self, own: StepCache, token: int, position: int, greedy: Greedy, most: int
    ) -> list[int]:
        """A token over a cache that is fit for it, and up to `most - 1` that follow, as they are
        found; returns what is found behind each."""
        self.place(token, position)
        if most > 1 and (not greedy.repeats or self._embedded < self.vocabulary):
            most = 1
        most = min(most, own.room, self._rotated - position)
        self.step.set_logits(greedy.logits)
        return greedy.tokens(own.run(greedy, most))

    def run(self, own: StepCache, token: int, position: int, logits: Tensor) -> Tensor:
        """One token over a cache that is fit for it; returns logits [1, 1, V], those given or, of a
        head that is not packed, others."""
        self.place(token, position)
        if self.head is None:
            self.step.set_logits(logits)
            own.run()
            return logits
        own.run()
        hidden = self.step.hidden[: self.step.stack.hidden_size].to(self.step.stack.dtype)
        out: Tensor = self.head(hidden[None, None])
        return out


# Places in the step's numbers (`lath.kernels.decode_step.cpu_arguments`, which needs numba).
_TOKEN, _POSITION, _SLOT, _GROWN, _ROTATIONS = range(5)


class FusedDecoding:
    """The state of one patched model: its compiled step, made at the first token that can take it,
    and how often what was taken.

    new_cache: makes an empty cache of the kind that `generate` is given. counts: calls of `forward`
    and tokens of the own loop, by "fused" or by the reason why not.
    """

    def __init__(self, new_cache: Callable[[Any], LathCache]) -> None:
        self.new_cache = new_cache
        self.counts: Counter[str] = Counter()
        self.refusal = "" if is_installed("numba") else _NEEDS_NUMBA
        self.lock = threading.Lock()
        self._ready: Ready | None = None
        self._refused: Skipped | None = None

    def __deepcopy__(self, memo: Any) -> FusedDecoding:
        return FusedDecoding(self.new_cache)

    def __reduce__(self) -> Any:
        return FusedDecoding, (self.new_cache,)

    @property
    def is_ready(self) -> bool:
        return self._ready is not None

    @property
    def tally(self) -> dict[str, int]:
        """What several threads did for the step that there is now (`lath.kernels.simd.team`)."""
        if self._ready is None:
            return {}
        from lath.kernels.simd.team import TALLY_FIELDS

        return dict(zip(TALLY_FIELDS, self._ready.step.tally.tolist(), strict=True))

    def ready(self, model: Any) -> Ready:
        """The step of the model as it is now; NotFusedError where there is none."""
        ready = self._ready
        if ready is not None:
            obstacle = ready.skipped.obstacle
            if obstacle:
                raise NotFusedError(obstacle)
            if not ready.skipped.changed and not ready.weights.changed:
                return ready
            self._ready = None
        if self._refused is not None and not self._refused.changed:
            raise NotFusedError(self.refusal)
        self._refused = None
        return self.prepare(model)

    def prepare(self, model: Any) -> Ready:
        """Recognise the model, compile and probe its step."""
        new_cache = self.new_cache
        try:
            forward = functools.partial(own_class(model).forward, model)
            self._ready = Ready(model, forward, lambda: new_cache(model.config))
        except NotFusedError as error:
            # Hooks go as they come; all else stays until a module is replaced.
            if not Skipped(model).obstacle:
                self.refusal, self._refused = str(error), Skipped(model)
            raise
        self.refusal = ""
        return self._ready

    def logits(self, model: Any, arguments: dict[str, Any]) -> tuple[Ready, Tensor, Any]:
        """One token through the step: logits [1, 1, V] and the cache. NotFusedError where a rule
        forbids it, before anything has changed."""
        token, cache, position = _one_token(model, arguments)
        with self.lock:
            ready = self.ready(model)
            own = ready.cache_of(cache)
            _check_mask(arguments.get("attention_mask"), own.slots + 1)
            position = own.slots if position is None else position
            logits = torch.empty(1, 1, ready.vocabulary, dtype=ready.step.stack.dtype)
            logits = ready.run(own, token, position, logits)
        return ready, logits, cache


def _one_token(model: Any, arguments: dict[str, Any]) -> tuple[int, LathCache, int | None]:
    """Token, cache and position of a call that may be fused as far as its arguments go."""
    from lath.integration.cache import LathCache

    ids = arguments.get("input_ids")
    if not isinstance(ids, Tensor) or arguments.get("inputs_embeds") is not None:
        raise NotFusedError("inputs_embeds, or no input_ids")
    if ids.shape != (1, 1):
        rows, columns = ids.shape if ids.dim() == 2 else (0, 0)
        raise NotFusedError(
            "a batch" if rows > 1 else f"{'several' if columns > 1 else 'no'} tokens"
        )
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or type(ids) is not Tensor:
        raise NotFusedError("torch.compile, export or tracing")
    if torch.is_grad_enabled():
        raise NotFusedError("gradients are recorded")
    if ids.dtype not in (torch.int64, torch.int32):
        raise NotFusedError(f"token ids in {ids.dtype}")
    mode = obstacle_of_mode(model)
    if mode:
        raise NotFusedError(mode)
    cache = next((c for c in map(arguments.get, _CACHES) if c is not None), None)
    if type(cache) is not LathCache:
        raise NotFusedError("no cache, or another's" if cache is None else type(cache).__name__)
    if arguments.get("use_cache") is False or arguments.get("return_dict") is False:
        raise NotFusedError("use_cache or return_dict is False")
    _check_outputs(model, arguments)
    position = arguments.get("position_ids")
    if position is not None:
        if not isinstance(position, Tensor) or position.numel() != 1:
            raise NotFusedError("position_ids of several tokens")
        position = int(position)
        if position < 0:
            raise NotFusedError("a negative position")
    return int(ids), cache, position


_HANDLED = _WITHOUT_EFFECT | {
    "input_ids", "attention_mask", "position_ids", "inputs_embeds", "logits_to_keep",
    "output_hidden_states", "output_attentions",
}  # fmt: skip


def _check_outputs(model: Any, arguments: dict[str, Any]) -> None:
    config = model.config
    for name in ("output_hidden_states", "output_attentions"):
        if arguments.get(name) or getattr(config, name, False):
            raise NotFusedError(f"{name}")
    for name, value in arguments.items():
        if value is not None and name not in _HANDLED:
            raise NotFusedError(f"the argument {name}")
    if isinstance(arguments.get("logits_to_keep"), Tensor):
        raise NotFusedError("logits_to_keep as a tensor")


def _check_mask(mask: Any, slots: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise NotFusedError("an attention mask that is not 2-D")
    if tuple(mask.shape) != (1, slots):
        raise NotFusedError("an attention mask of another length than the cache")
    if not bool(mask.all()):
        raise NotFusedError("padding in the attention mask")


@functools.cache
def fused_class(cls: Any) -> Any:
    """The subclass of a model's class whose one-token calls are fused where they can be."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: FusedDecoding | None = self.__dict__.get(STATE_NAME)
        if state is None or torch.compiler.is_compiling():
            return cls.forward(self, *args, **kwargs)
        try:
            arguments = _named(cls, args, kwargs)
            ready, logits, cache = state.logits(self, arguments)
        except NotFusedError as reason:
            state.counts[str(reason)] += 1
            return cls.forward(self, *args, **kwargs)
        state.counts["fused"] += 1
        return ready.output_class(logits=logits, **{ready.cache_name: cache})

    @functools.wraps(cls._sample)
    def sample(
        self: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **arguments: Any,
    ) -> Any:
        state: FusedDecoding | None = self.__dict__.get(STATE_NAME)
        try:
            if state is None:
                raise NotFusedError("not patched")
            check_loop(self, input_ids, generation_config, synced_gpus, arguments)
        except NotFusedError as reason:
            if state is not None:
                state.counts[str(reason)] += 1
            return cls._sample(
                self, input_ids, logits_processor, stopping_criteria, generation_config,
                synced_gpus, streamer, **arguments,
            )  # fmt: skip
        loop = Loop(
            self, state, input_ids, logits_processor, stopping_criteria,
            bool(generation_config.do_sample), streamer,
        )  # fmt: skip
        outputs = self._prefill(input_ids, generation_config, arguments, is_first_iteration=True)
        return loop.run(outputs, arguments.get("position_ids"))

    body = {
        "forward": forward, "_sample": sample, "_lath_fused": True,
        "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__,
    }  # fmt: skip
    return type(cls.__name__, (cls,), body)


_POSITIONAL = ("input_ids", "attention_mask", "position_ids")


def _named(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; only those that come first in every model are positional."""
    if not args:
        return kwargs
    if len(args) > len(_POSITIONAL):
        raise NotFusedError("positional arguments")
    return {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
