"""Reading a part of the cache: which pages each step reads, what that misses, and what it says.

The model reads a long text, then a question about it. Every step of the answer scores the pages of
the cache and reads the best of them; --repair estimates the others from what their index rows say,
which makes the answers of this model worse (README). The answer is compared with the one that reads
everything, and the misses are printed: of each layer the share of attention that the pages held,
and of its heads the one that missed most.

    python examples/sparse_selection.py [--select quest:256] [--repair] [--prompt-tokens 2048]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

import lath
from lath.integration.measure import generate
from lath.integration.models import load_model
from lath.integration.text_sample import english_text

QUESTION = "\n\nIn two or three sentences: what is this text about, and who is in it?"


def long_prompt(tokenizer: Any, tokens: int) -> Tensor:
    """The beginning of the text and the question, about `tokens` tokens in all: [1, L]."""
    text = tokenizer(english_text(), verbose=False).input_ids[: max(tokens - 64, 1)]
    content = tokenizer.decode(text) + QUESTION
    ids: Tensor = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )["input_ids"]  # fmt: skip
    return ids


def answer(model: Any, tokenizer: Any, ids: Tensor, new_tokens: int) -> tuple[str, float]:
    """The text and the seconds it took, the prompt included."""
    start = time.perf_counter()
    new = generate(model, ids, new_tokens)
    return tokenizer.decode(new, skip_special_tokens=True).strip(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="'smollm2', 'tiny' or a folder")
    parser.add_argument("--kv", default="int8")
    parser.add_argument("--select", default="quest:256")
    parser.add_argument("--repair", action="store_true")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=80)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()

    model, tokenizer = load_model(options.model, options.dtype)
    ids = long_prompt(tokenizer, options.prompt_tokens)
    print(f"{ids.shape[1]} tokens of prompt")
    common = {"attention": "int8", "kv": options.kv, "backend": options.backend}
    with lath.patch(model, None, **common):
        text, seconds = answer(model, tokenizer, ids, options.new_tokens)
    print(f"\nreading everything ({seconds:.1f} s):\n{text}")
    selecting = {"select": options.select, "repair": options.repair}
    with lath.patch(model, None, **common, **selecting) as report:
        text, seconds = answer(model, tokenizer, ids, options.new_tokens)
    print(f"\n{report}\n\nreading that ({seconds:.1f} s):\n{text}")
    with lath.patch(model, None, **common, **selecting, audit=options.threshold) as report:
        again, seconds = answer(model, tokenizer, ids, options.new_tokens)
    print(f"\nthe same while measuring ({seconds:.1f} s): {again == text}\n\n{report.misses}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
