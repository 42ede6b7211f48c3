"""Perplexity of SmolLM2-135M with sums of codecs, importance and sorted pairs, as a Markdown table.

python bench/sums_perplexity.py [--windows 2] [--weights …] > bench/results/sums_perplexity.md
"""

from __future__ import annotations

import argparse
import contextlib

import torch

import lath
from lath.integration.benchmark import machine_facts
from lath.integration.models import load_model
from lath.integration.perplexity import perplexity
from lath.integration.text_sample import english_text

# Codec, whether importance is given, whether pairs are sorted, whether ranges and shares are
# searched.
ROWS = [
    ("int4-g64", False, False, False), ("int4-g64", False, True, False),
    ("int4-g64+out1%", False, False, False), ("int4-g64+out1%", True, False, False),
    ("int3-g64-asym", False, False, False), ("int3-g64-asym", False, False, True),
    ("int3-g64-asym+out1%", False, False, False), ("int3-g64-asym+out1%", True, False, False),
    ("mix3-g64-asym", False, False, False), ("mix3-g64-asym", True, False, False),
    ("mix3-p1-g64-asym", True, False, True), ("mix3-g64-asym", True, False, True),
    ("mix3.5-g64-asym", False, False, False), ("mix3.5-g64-asym", True, False, False),
    ("int2-g32-asym", False, False, False), ("mix2:4-2.25-g32-asym+out1%", True, False, False),
    ("int1-g64+int1-g64", False, False, False), ("billm10%-g64", True, False, False),
]  # fmt: skip
WINDOW, CALIBRATION = 512, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=2, help="windows of 512 tokens")
    parser.add_argument("--weights", default="", help="only the rows of these codecs, by commas")
    given = parser.parse_args()
    windows, only = given.windows, {text for text in given.weights.split(",") if text}
    torch.set_num_threads(1)
    model, tokenizer = load_model("smollm2", "float32")
    ids = tokenizer(english_text(), return_tensors="pt").input_ids
    calibration, ids = ids[:, -CALIBRATION:], ids[:, : windows * WINDOW]
    with torch.no_grad(), lath.mean_square_inputs(model) as importance:
        for window in calibration.split(WINDOW, dim=1):
            model(window)
    before = perplexity(model, ids, WINDOW)
    print(f"# Perplexity of SmolLM2-135M-Instruct with sums of codecs\n\n{ids.shape[1]} tokens of "
          f"the shipped English text in windows of {WINDOW}; importance from its last "
          f"{CALIBRATION} tokens, which are none of them; fp32 model, float activations, lm_head "
          "not packed. K is 576 or 1536 here: the terms of a mix, each padded to 128 columns, cost "
          "bits that longer layers do not pay.\n")  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in machine_facts().items()) + "\n")
    print("Command: `python bench/sums_perplexity.py`\n")
    print("| weights | importance | sorted pairs | search | bits | perplexity | change |")
    print("|---|---|---|---|---|---|---|")
    print(f"| (unpatched) | | | | 32 | {before:.2f} | |", flush=True)
    for weights, weighted, ordered, search in ROWS:
        if only and weights not in only:
            continue
        own = importance if weighted else None
        pairs = lath.sort_pairs(model, importance) if ordered else contextlib.nullcontext()
        with (
            pairs,
            lath.patch(
                model, weights, activations="float", importance=own, search=search, progress=False
            ),
        ):
            modules = [m for m in model.modules() if hasattr(m, "qtensor")]
            bits = sum(8 * m.qtensor.nbytes for m in modules)
            count = sum(m.qtensor.shape[0] * m.qtensor.shape[1] for m in modules)
            after = perplexity(model, ids, WINDOW)
        print(f"| `{weights}` | {'yes' if weighted else ''} | {'yes' if ordered else ''} | "
              f"{'yes' if search else ''} | "
              f"{bits / count:.2f} | {after:.2f} | {after / before - 1:+.1%} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
