"""Drawing a token in few passes over the vocabulary, from the distribution that transformers draws
from.

transformers sorts, masks and normalises all scores for each warper, and draws one random number for
every token of the vocabulary. Behind a top-k only the k candidates matter, so that what comes after
it works on those alone; and one random number is enough: the cumulated probabilities are searched
for it. It comes from torch's default generator, so that a seed gives the same tokens again, but not
those that transformers' own draws would give.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Minimum:
    """No end before so many tokens, prompt included: transformers' processor looks every token of
    the vocabulary up among the ends, which took a quarter of the time of a step of SmolLM2."""

    def __init__(self, length: int, ends: Tensor) -> None:
        self.length, self.ends = length, sorted({int(token) for token in ends.reshape(-1)})

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[-1] < self.length:
            scores = scores.clone()  # another processor may have kept them
            scores[:, [token for token in self.ends if 0 <= token < scores.shape[-1]]] = -torch.inf
        return scores


class Sampler:
    """Chooses tokens as a list of logits processors asks. Greedy unless `sample`."""

    def __init__(self, processors: Any, sample: bool) -> None:
        from transformers.generation import logits_process as known

        self.sample = sample
        self._before: list[Any] = []
        self._after: list[Any] = []
        for one in processors:
            # The types themselves: a subclass may do anything.
            if type(one) is known.MinNewTokensLengthLogitsProcessor:
                length = one.prompt_length_to_skip + one.min_new_tokens
                self._before.append(_Minimum(length, one.eos_token_id))
            elif type(one) is known.MinLengthLogitsProcessor:
                self._before.append(_Minimum(one.min_length, one.eos_token_id))
            else:
                self._before.append(one)
        self._k: int | None = None
        if not sample:
            return
        tail: list[Any] = []
        # What may stand behind a top-k looks at scores alone, whatever their order.
        while self._before and type(self._before[-1]) in (
            known.TopPLogitsWarper, known.MinPLogitsWarper,
        ):  # fmt: skip
            tail.insert(0, self._before.pop())
        if self._before and type(self._before[-1]) is known.TopKLogitsWarper:
            self._k, self._after = int(self._before.pop().top_k), tail
        else:
            self._before += tail

    @property
    def is_plain(self) -> bool:
        """Whether it is the largest logit, wherever that one is allowed (`allows`)."""
        return not self.sample and all(type(one) is _Minimum for one in self._before)

    @property
    def ends(self) -> set[int]:
        """Tokens that a plain choice may not be allowed to be."""
        return {token for one in self._before if type(one) is _Minimum for token in one.ends}

    def allows(self, length: int, token: int) -> bool:
        """Whether a plain choice may be `token` behind `length` tokens."""
        return not any(length < one.length and token in one.ends for one in self._before)

    def __call__(self, ids: Tensor, scores: Tensor) -> int:
        """ids [1, T], scores fp32 [1, V], which it may change → a token."""
        for processor in self._before:
            scores = processor(ids, scores)
        if not self.sample:
            return int(scores.argmax())
        if self._k is None or self._k >= scores.shape[1]:
            for processor in self._after:
                scores = processor(ids, scores)
            return draw(scores[0])
        best, places = scores.topk(self._k + 1)
        if bool(best[0, -1] == best[0, -2]):  # a top-k keeps all that equal its last
            keep = scores >= best[:, -2:-1]
            places = keep[0].nonzero().T
            best = scores[:, places[0]]
        else:
            best = best[:, :-1]
        for processor in self._after:
            best = processor(ids, best)
        return int(places[0, draw(best[0])])


def draw(scores: Tensor) -> int:
    """An index of scores [n], with the probabilities of their softmax.

    RuntimeError where those are no probabilities (NaN, or infinity among the scores).
    """
    ends = scores.double().softmax(0).cumsum(0)
    total = float(ends[-1])
    if not 0 < total < float("inf"):
        raise RuntimeError(f"the scores hold NaN or infinity: their probabilities sum to {total}")
    # Of the first index whose cumulated probability exceeds the number; one of probability 0 never.
    number = torch.rand((), dtype=torch.float64) * ends[-1]
    index = int(torch.searchsorted(ends, number, right=True))
    return min(index, int((ends < ends[-1]).sum()))
