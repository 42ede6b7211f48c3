"""Perplexity of SmolLM2-135M with int8 attention and quantised caches, and the caches' memory.

python bench/attention_perplexity.py [--windows 4] [--backend auto] [--output bench/results]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import lath
from lath.integration.benchmark import machine_facts
from lath.integration.cache import LathCache
from lath.integration.models import load_model
from lath.integration.perplexity import cached_perplexity, perplexity
from lath.integration.text_sample import english_text

# attention, kv
ROWS = [
    ("float", "float"), ("int8", None), ("int8", "float"), ("int8", "int8"),
    ("int8", "int8-planes"), ("int8", "e4m3"), ("int8", "k8v4"), ("int8", "int4"),
    ("int8", "k4v2"),
]  # fmt: skip
WINDOW = 1024
CHUNK = 128
CONTEXT = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--windows", type=int, default=4, help=f"windows of {WINDOW} tokens")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model("smollm2", "bfloat16")
    ids = tokenizer(english_text(), return_tensors="pt", verbose=False).input_ids
    ids = ids[:, : options.windows * WINDOW]
    before = perplexity(model, ids, WINDOW)
    dense = dense_bytes(model)
    rows: list[dict[str, Any]] = [
        {"attention": "torch", "kv": "torch", "perplexity": before, "cache_bytes": dense}
    ]
    print(rows[0], flush=True)
    for attention, kv in ROWS:
        row: dict[str, Any] = {"attention": attention, "kv": kv or "torch"}
        with lath.patch(model, None, attention=attention, kv=kv, backend=options.backend):
            row["perplexity"], row["cache_bytes"] = measure(model, ids, kv, options.backend, dense)
        rows.append(row)
        print(row, flush=True)
    for row in rows:
        row["change"] = row["perplexity"] / before - 1
    result = {
        "machine": machine_facts(), "backend": options.backend, "tokens": ids.shape[1],
        "window": WINDOW, "chunk": CHUNK, "context": CONTEXT, "rows": rows,
    }  # fmt: skip
    write(result, options.output)


def measure(
    model: Any, ids: torch.Tensor, kv: str | None, backend: str, dense: int
) -> tuple[float, int]:
    if kv is None:
        return perplexity(model, ids, WINDOW), dense

    def new_cache() -> LathCache:
        return LathCache(model.config, kv, backend=backend)

    return cached_perplexity(model, ids, new_cache, WINDOW, CHUNK), cache_bytes(model, new_cache())


def sizes(model: Any) -> tuple[int, int, int]:
    config = model.config
    return config.num_hidden_layers, config.num_key_value_heads, config.head_dim


def dense_bytes(model: Any) -> int:
    layers, heads, width = sizes(model)
    return 2 * layers * heads * width * CONTEXT * model.dtype.itemsize


def cache_bytes(model: Any, cache: LathCache) -> int:
    """Bytes in use by a cache of `CONTEXT` tokens; they do not depend on what the tokens are."""
    _, heads, width = sizes(model)
    states = torch.randn(1, heads, CONTEXT, width).to(model.dtype)
    layer = cache.layers[0]
    layer.lazy_initialization(states, states)
    layer.pages.append(states, states)
    return cache.nbytes_in_use * len(cache.layers)


def write(result: dict[str, Any], folder: Path) -> None:
    (folder / "attention_perplexity.json").write_text(json.dumps(result, indent=2) + "\n")
    facts = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    dense = result["rows"][0]["cache_bytes"]
    lines = [
        "# SmolLM2-135M-Instruct: int8 attention and quantised caches",
        "",
        f"{result['tokens']} tokens of the shipped English text in windows of {WINDOW}; bf16 "
        "model. Rows with a cache of pages read each window in pieces of "
        f"{CHUNK} tokens, the first from the 16-bit keys and values, the others from the pages "
        "(the first 64 tokens and an unfilled page are 16-bit there). Memory: one sequence of "
        f"{CONTEXT} tokens, all layers, indexes and 16-bit parts included.",
        "",
        f"{facts}; backend {result['backend']}. Command: `python bench/attention_perplexity.py`",
        "",
        "| attention | cache | perplexity | change | MB at 8k tokens | smaller |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        size = row["cache_bytes"]
        lines.append(
            f"| {row['attention']} | {row['kv']} | {row['perplexity']:.3f} | {row['change']:+.2%} "
            f"| {size / 1e6:.1f} | {dense / size:.2f}x |"
        )
    (folder / "attention_perplexity.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
