"""The loop over new tokens inside `generate`, for one sequence of a fused model.

transformers' loop prepares arguments, masks and positions for every token, which costs about half
a millisecond; this one has a compiled step and calls nothing of the model between two tokens. What
the user brings (logits processors, stopping criteria, streamer) is called as transformers does; a
random draw is another one of the same distribution (decode_sample.py). Greedy tokens that nobody
is to see one by one are several in a call.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lath.integration.cache import LathCache, cache_argument
from lath.integration.decode_recognise import NotFusedError
from lath.integration.decode_sample import Sampler
from lath.integration.decode_watch import obstacle_of_mode, own_class
from lath.kernels.simd.openmp import one_thread

if TYPE_CHECKING:
    from lath.integration.decode_step import FusedDecoding, Ready
    from lath.kernels.decode_step.cpu_greedy import Greedy

_CACHES = ("cache", "past_key_values")
# Arguments of the model that a loop over single tokens knows what to do with.
_HANDLED = frozenset({"attention_mask", "position_ids", "logits_to_keep", "use_cache",
                      "cache_position", *_CACHES})  # fmt: skip
_ROOM = 4096  # new tokens that are made room for at once
_ANSWER = 0.05  # seconds, about, of one compiled call: Ctrl-C is heard behind it
# What transformers' loop calls for every token and this one does not.
_CALLED = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


class Stop:
    """When to stop: the length and the end tokens known from the criteria, the others asked."""

    def __init__(self, criteria: Any) -> None:
        from transformers.generation import stopping_criteria as known

        self.length: int | None = None
        self.ends: set[int] = set()
        self._others = known.StoppingCriteriaList()
        for one in criteria:
            if type(one) is known.MaxLengthCriteria:
                longest = int(one.max_length)
                self.length = longest if self.length is None else min(self.length, longest)
            elif type(one) is known.EosTokenCriteria:
                self.ends |= {int(token) for token in one.eos_token_id.reshape(-1)}
            else:
                self._others.append(one)

    def most(self, length: int) -> int:
        """Tokens behind `length` that are known not to stop, if they are no ends, but the last."""
        if len(self._others):
            return 1
        return _ROOM if self.length is None else max(1, self.length - length)

    def __call__(self, loop: Loop, token: int) -> bool:
        """Whether to stop behind `token`, the last of the loop's ids."""
        others = bool(self._others(loop.ids, None).any()) if len(self._others) else False
        full = self.length is not None and loop.length >= self.length
        return others or full or token in self.ends


def check_loop(
    model: Any, ids: Tensor, config: Any, synced: bool, arguments: dict[str, Any]
) -> None:
    """NotFusedError where transformers' own loop must be taken (whose steps may still be fused)."""
    if tuple(ids.shape[:1]) != (1,) or ids.shape[1] == 0 or not ids.is_cpu:
        raise NotFusedError("the loop: a batch, or no prompt")
    if config.return_dict_in_generate or synced or getattr(config, "is_assistant", False):
        raise NotFusedError("the loop: return_dict_in_generate, synced_gpus or an assistant")
    if not hasattr(model, "_prefill"):
        raise NotFusedError("the loop: this version of transformers has no _prefill")
    if not arguments.get("use_cache"):
        raise NotFusedError("the loop: use_cache is False")
    for name, value in arguments.items():
        if value is not None and name not in _HANDLED:
            raise NotFusedError(f"the loop: the argument {name}")
    mode = obstacle_of_mode(model)
    if mode:
        raise NotFusedError(f"the loop: {mode}")
    _check_methods(model)
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is not None and (mask.dim() != 2 or not bool(mask.all())):
        raise NotFusedError("the loop: padding, or a mask that is not 2-D")
    if positions is not None and positions.dim() != 2:
        raise NotFusedError("the loop: position_ids that are not 2-D")
    if not any(type(arguments.get(name)) is LathCache for name in _CACHES):
        raise NotFusedError("the loop: another cache")


def _check_methods(model: Any) -> None:
    """NotFusedError where something else than transformers' own would be called for a token."""
    from transformers import GenerationMixin

    hooks = (model._forward_hooks, model._forward_pre_hooks)
    if any(hooks) or any(name in model.__dict__ for name in ("forward", *_CALLED)):
        raise NotFusedError("the loop: hooks on the model, or methods replaced on the instance")
    cls = own_class(model)
    for name in ("_sample", *_CALLED):
        if getattr(cls, name) is not getattr(GenerationMixin, name):
            raise NotFusedError(f"the loop: {cls.__name__} has a {name} of its own")


class Loop:
    """New tokens of one sequence. `tokens` runs to the end and returns ids [1, T]."""

    def __init__(
        self,
        model: Any,
        state: FusedDecoding,
        ids: Tensor,
        processors: Any,
        criteria: Any,
        sample: bool,
        streamer: Any,
    ) -> None:
        self.model, self.state, self.streamer = model, state, streamer
        self.sampler, self.stop = Sampler(processors, sample), Stop(criteria)
        self.length = ids.shape[1]
        wanted = _ROOM if self.stop.length is None else self.stop.length - self.length
        self._ids = torch.zeros(1, self.length + min(max(wanted, 1), _ROOM), dtype=ids.dtype)
        self._ids[:, : self.length] = ids
        self._row = self._ids.numpy()[0]  # the same memory: a tensor's items take longer to reach

    @property
    def ids(self) -> Tensor:
        return self._ids[:, : self.length]

    @property
    def most(self) -> int:
        """New tokens that nobody wants to see one by one; a streamer does."""
        return 1 if self.streamer is not None else self.stop.most(self.length)

    def put(self, token: int) -> None:
        if self.length == self._ids.shape[1]:
            self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)], dim=1)
            self._row = self._ids.numpy()[0]
        self._row[self.length] = token
        self.length += 1
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token], dtype=self._ids.dtype))

    def choose(self, logits: Tensor) -> int:
        """The next token of logits [1, V], which are not changed."""
        with one_thread():
            return self.sampler(self.ids, logits.to(copy=True, dtype=torch.float32))

    def run(self, outputs: Any, positions: Tensor | None) -> Tensor:
        """outputs: of the prompt. positions: its position_ids."""
        cache = next(outputs[name] for name in _CACHES if name in outputs)
        token = self.choose(outputs.logits[:, -1])
        del outputs
        position = cache.get_seq_length() if positions is None else int(positions[0, -1]) + 1
        position -= self.length
        step = self._step(cache)
        while True:
            self.put(token)
            if self.stop(self, token):
                break
            try:
                token = step(token, position + self.length - 1)
            except NotFusedError:  # before anything was counted or computed
                step = functools.partial(self._by_modules, cache)
                token = step(token, position + self.length - 1)
        if self.streamer is not None:
            self.streamer.end()
        return self.ids.clone()

    def _step(self, cache: Any) -> Callable[[int, int], int]:
        """step(token, its position) → the next token that is not put yet."""
        try:
            with self.state.lock:
                ready = self.state.ready(self.model)
                ready.cache_of(cache)
        except NotFusedError:
            return functools.partial(self._by_modules, cache)
        return _FusedTokens(self, ready, cache)

    def _by_modules(self, cache: Any, token: int, position: int) -> int:
        """A step through `forward`, which counts why it is not fused."""
        outputs = self.model(
            input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[position]]),
            use_cache=True, **{cache_argument(self.model): cache},
        )  # fmt: skip
        return self.choose(outputs.logits[:, -1])


class _FusedTokens:
    """The compiled step of one call of `generate`; the model was looked over at its beginning."""

    def __init__(self, loop: Loop, ready: Ready, cache: Any) -> None:
        self.loop, self.ready = loop, ready
        self._cache = cache  # `own` does not keep it alive
        self.logits = torch.empty(1, 1, ready.vocabulary, dtype=ready.step.stack.dtype)
        self.own = own = ready.cache_of(cache)
        self.greedy: Greedy | None = None
        self._together = 1  # tokens that _ANSWER leaves time for
        if loop.sampler.is_plain and ready.head is None:
            from lath.kernels.decode_step.cpu_greedy import Greedy

            self.greedy = Greedy(own.bound, self.logits, loop.stop.ends | loop.sampler.ends)

    def __call__(self, token: int, position: int) -> int:
        if self.greedy is not None:
            return self._go_on(self.greedy, token, position)
        loop = self.loop
        with loop.state.lock:
            self.own.prepare()
            logits = self.ready.run(self.own, token, position, self.logits)
        loop.state.counts["fused"] += 1
        return loop.choose(logits[:, -1])

    def _go_on(self, greedy: Greedy, token: int, position: int) -> int:
        """Put all tokens that one call finds but the last."""
        loop = self.loop
        most = min(self._together, loop.most)
        begun = time.perf_counter()
        with loop.state.lock:
            self.own.prepare()
            found = self.ready.run_greedily(self.own, token, position, greedy, most)
        self._together = max(1, int(_ANSWER * len(found) / (time.perf_counter() - begun)))
        loop.state.counts["fused"] += len(found)
        for one in found[:-1]:
            loop.put(one)
        if loop.sampler.allows(loop.length, found[-1]):
            return found[-1]
        return loop.choose(self.logits[:, -1])
