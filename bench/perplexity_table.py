"""Perplexity of SmolLM2-135M for several codecs and activation formats, as a Markdown table.

python bench/perplexity_table.py [--windows 4] > bench/results/perplexity.md
"""

from __future__ import annotations

import argparse

import torch

import lath
from lath.integration.benchmark import machine_facts
from lath.integration.models import load_model
from lath.integration.perplexity import perplexity
from lath.integration.text_sample import english_text

ROWS = [
    ("int8", "float"), ("int8", "int8"), ("int8-g64", "int8-g64"),
    ("int4-g32-fzero", "float"), ("int4-g32-fzero", "int8-g32"),
    ("int4-g32", "float"), ("int4-g32", "int8-g32"),
    ("int4-g64", "float"), ("int4-g64", "int8-g64"),
    ("int4-g64-asym", "float"), ("int3-g64", "float"), ("int3-g64", "int8-g64"),
    ("int3-g64-asym", "float"),
]  # fmt: skip
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens")
    windows = parser.parse_args().windows
    torch.set_num_threads(1)
    model, tokenizer = load_model("smollm2", "float32")
    ids = tokenizer(english_text(), return_tensors="pt").input_ids[:, : windows * WINDOW]
    before = perplexity(model, ids, WINDOW)
    print(f"# Perplexity of SmolLM2-135M-Instruct\n\n{ids.shape[1]} tokens of the shipped English "
          f"text in windows of {WINDOW}; fp32 model, lm_head not packed. The checkpoint's own "
          "weights are 4-bit (Q4_1), so `int4-g32-fzero` loses nothing.\n")  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in machine_facts().items()) + "\n")
    print("Command: `python bench/perplexity_table.py`\n")
    print("| weights | search | activations | bits per weight | perplexity | change |")
    print("|---|---|---|---|---|---|")
    print(f"| (unpatched) | | float | 32 | {before:.3f} | |", flush=True)
    for weights, activations in ROWS:
        for search in (False, True):
            if search and (activations != "float" or weights in ("int8", "int4-g32-fzero")):
                continue
            with lath.patch(model, weights=weights, activations=activations, search=search):
                modules = [m for m in model.modules() if hasattr(m, "qtensor")]
                bits = sum(8 * m.qtensor.nbytes for m in modules)
                count = sum(m.qtensor.shape[0] * m.qtensor.shape[1] for m in modules)
                after = perplexity(model, ids, WINDOW)
            print(f"| `{weights}` | {'yes' if search else ''} | `{activations}` | "
                  f"{bits / count:.2f} | {after:.3f} | {after / before - 1:+.1%} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
