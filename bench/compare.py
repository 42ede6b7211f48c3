"""Perplexity of SmolLM2-135M against bits per weight: every codec, every quantiser.

python bench/compare.py [--codecs …] [--quantizers …] [--tokens 1024] [--resume]

Writes bench/results/compare.md, .json and, with matplotlib, .png. It is `lath compare` with the
text of a report around it; --resume goes on from compare.json.
"""

from __future__ import annotations

from report import command_of, parsed, parser_of

from lath.formats.compared import compared_codecs
from lath.integration.benchmark import machine_facts
from lath.integration.compare import CompareOptions, Comparison, comparison_table
from lath.integration.compare_command import DEFAULT_QUANTIZERS, run_comparison
from lath.integration.compare_plot import plot, require_matplotlib


def main() -> None:
    assert __doc__ is not None
    parser = parser_of(__doc__)
    parser.add_argument("--codecs", default="all")
    parser.add_argument("--quantizers", default=DEFAULT_QUANTIZERS)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--resume", action="store_true")
    given = parsed(parser)
    require_matplotlib()
    codecs = compared_codecs() if given.codecs == "all" else tuple(given.codecs.split(","))
    options = CompareOptions(
        "smollm2", codecs, tuple(given.quantizers.split(",")), given.tokens,
        given.calibration_tokens,
    )  # fmt: skip
    path = given.output / "compare.json"
    known = Comparison.rows_of(path, options) if given.resume and path.exists() else []
    result = run_comparison(options, known, path)
    (given.output / "compare.md").write_text(report(result, command_of("compare.py")))
    plot(result, given.output / "compare.png")
    print(comparison_table(result))


def report(result: Comparison, command: str) -> str:
    """The Markdown page."""
    options = result.options
    facts = ", ".join(f"{key} {value}" for key, value in machine_facts().items())
    return (
        "# Perplexity against bits per weight\n\n"
        f"SmolLM2-135M-Instruct in fp32, output layer not packed, activations as they come: "
        f"{result.before:.2f} unpatched. {options.tokens} tokens of the shipped English text in "
        f"windows of {options.window}; `gptq` and `awq` are calibrated on {result.calibrated_on} "
        "tokens that follow them in the same text, none of which is measured. `+search`: scales "
        "by squared error. Bits count codes, scales, zeros, tables and padding.\n\n"
        "The checkpoint's own weights are 4-bit (Q4_1, groups of 32 with a minimum): every codec "
        "but `int4-g32-fzero` rounds a second time.\n\n"
        f"{facts}\n\nCommand: `{command}`\n\n![plot](compare.png)\n\n"
        f"```\n{comparison_table(result)}\n```\n"
    )


if __name__ == "__main__":
    main()
