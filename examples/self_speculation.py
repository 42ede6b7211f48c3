"""Self-speculation (QuantSpec, 2502.10424): the model drafts for itself on half of its cache.

The cache holds 8-bit codes as two planes of four bits. Drafting reads the upper planes alone, half
the bytes; then one pass with the full codes verifies all drafts at once. Greedy output is the same,
token for token, as without drafts. There is no second model and no second cache.

"The same" is up to the rounding of the model's own matrix products, which may depend on how many
tokens they take at once: in float32 nothing came of it, in bfloat16 two tokens whose logits are
neighbours may change places.

    python examples/self_speculation.py [--model smollm2] [--drafts 4] [--weights int4-g32-fzero]

--weights packs the linear layers too, for the drafts alone.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lath
from lath.formats.pages import PAGE
from lath.integration.cache import LathCache, cache_argument

KV = "int8-planes"


@dataclass
class Speculation:
    """tokens: int64 [n], what was generated. drafted, accepted: how many; passes: of the model."""

    tokens: Tensor
    drafted: int
    accepted: int
    passes: int


def room(length: int) -> int:
    """How many drafts may be verified on a cache of `length` tokens without filling a page.

    A page is quantised once, when it fills. With a rejected draft among its 64 tokens its scales
    would not be those of plain decoding, so only tokens that are certain may fill one.
    """
    return max(PAGE - 2 - length % PAGE, 0)


@torch.inference_mode()
def speculate(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    drafts: int = 4,
    backend: str = "auto",
    draft_weights: lath.PatchReport | None = None,
) -> Speculation:
    """Generate `new_tokens` greedily after ids [1, L]; drafts=0 is plain decoding.

    model: patched with attention="int8", kv="int8-planes". draft_weights: the report of a patch of
    the linear layers, undone; the drafts run with it.
    """
    cache = LathCache(model.config, KV, backend=backend)
    name = cache_argument(model)

    def step(tokens: list[int]) -> list[int]:
        """The model's own next token after each of `tokens`, which enter the cache."""
        chunk = torch.tensor([tokens], device=ids.device)
        logits = model(chunk, use_cache=True, **{name: cache}).logits
        return [int(token) for token in logits[0].argmax(-1)]

    out = step(ids[0].tolist())[-1:]
    drafted = accepted = 0
    passes = 1
    while len(out) < new_tokens:
        count = min(drafts, new_tokens - len(out) - 1, room(cache.get_seq_length()))
        guesses: list[int] = []
        if count:
            with cache.draft(), draft_weights_in(draft_weights):
                for _ in range(count):
                    guesses += step([guesses[-1] if guesses else out[-1]])
            cache.crop(-count)
        answers = step([out[-1], *guesses])
        right = 0
        while right < count and guesses[right] == answers[right]:
            right += 1
        if right < count:
            cache.crop(right - count)
        out += answers[: right + 1]
        drafted, accepted, passes = drafted + count, accepted + right, passes + 1
    return Speculation(torch.tensor(out), drafted, accepted, passes)


@contextlib.contextmanager
def draft_weights_in(report: lath.PatchReport | None) -> Any:
    if report is not None:
        report.redo()
    try:
        yield
    finally:
        if report is not None:
            report.undo()


def main() -> None:
    from lath.integration.models import load_model
    from lath.integration.text_sample import english_text

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="'smollm2', 'tiny' or a folder")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--weights", default=None, help="codec of the linear layers for the drafts")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()

    model, tokenizer = load_model(options.model, options.dtype)
    ids = tokenizer(english_text(), return_tensors="pt", verbose=False).input_ids
    ids = ids[:, : options.prompt_tokens]
    packed = None
    if options.weights is not None:
        packed = lath.patch(model, options.weights, backend=options.backend)
        packed.undo()
    results = {}
    with lath.patch(model, None, attention="int8", kv=KV, backend=options.backend):
        for drafts in (0, options.drafts):
            start = time.perf_counter()
            results[drafts] = speculate(
                model, ids, options.new_tokens, drafts, options.backend, packed
            )
            print(f"{drafts} drafts: {time.perf_counter() - start:.1f} s with the prompt")
    plain, fast = results[0], results[options.drafts]
    print(tokenizer.decode(fast.tokens))
    print(f"same tokens as plain decoding: {torch.equal(plain.tokens, fast.tokens)}")
    share = fast.accepted / fast.drafted if fast.drafted else 0.0
    print(
        f"{fast.accepted} of {fast.drafted} drafts accepted ({share:.0%}); "
        f"{fast.passes} passes of the full model in place of {plain.passes}"
    )


if __name__ == "__main__":
    main()
