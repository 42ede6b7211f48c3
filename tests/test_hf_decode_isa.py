"""The fused decode step on another CPU, by override: each in a process of its own.

Within a process the step multiplies, adds and rounds as its modules do, so the tolerances are those
of test_hf_decode.py on every instruction set. Between two sets fp32 sums have another order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_cpu_processes import LOWERINGS, run_lowered, run_python

pytest.importorskip("transformers")
pytest.importorskip("numba")
from test_hf_decode import PROMPT, ROUNDING, admitted, decoder, fused_tokens, new_cache, patched

from hf_models import generate, relative, tokens
from lath.integration.cache import cache_argument
from lath.kernels.simd import program
from lath.kernels.simd.helpers import Team, replace_team

NEW = 70  # a page fills on the way
KINDS: dict[str, dict[str, Any]] = {
    "floats": {},
    "rounded": {"exact": False, "attention": "int8"},
}


def generated(model: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of `generate`, and the logits of the last one behind them."""
    cache, ids = new_cache(model), tokens(1, PROMPT)
    out = generate(model, ids, NEW, cache)
    logits = model(out[:, -1:], use_cache=True, **{cache_argument(model): cache}).logits
    return out, logits[0, -1].float()


@torch.no_grad()
def check_generate(name: str, kind: str) -> None:
    """Through `generate` the step gives the modules' tokens, in two threads the same bits."""
    model = decoder(name)
    with patched(model, "modules", **KINDS[kind]):
        expected, logits = generated(model)
    with patched(model, "fused", **KINDS[kind]) as report:
        (out, own), limit = generated(model), admitted(model)
        assert fused_tokens(report) == NEW
        assert "one compiled call per token" in str(report)
        torch.set_num_threads(2)
        again, bits = generated(model)
        torch.set_num_threads(1)
        assert report.decode is not None
        assert report.decode.threads is not None
        assert report.decode.threads.helped > 0
    assert torch.equal(out, expected), (name, kind, out.tolist(), expected.tolist())
    assert torch.equal(again, out)
    assert torch.equal(bits, own)
    if kind == "floats":
        assert relative(own - logits, logits) < ROUNDING
    else:  # codes that fall on the other side of a rounding, in two layers and the output layer
        assert float((own - logits).norm() / logits.norm()) < limit


def check_all() -> None:
    """A helper that comes first, and products of small models that are cut."""
    program.PIECE_BYTES = 256
    replace_team(own := Team(1, polite=False, handicap=20_000, longest_rest=0))
    check_generate("Llama", "floats")
    check_generate("Qwen3", "rounded")
    assert own.stop(20)


SLOW = ("no vector extension",)


@pytest.mark.parametrize(
    "lowering", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LOWERINGS]
)
def test_generate_on_another_cpu(lowering: str) -> None:
    run_lowered(
        lowering,
        """
        import torch; torch.set_num_threads(1)
        from lath.kernels.simd import host_isa
        import test_hf_decode_isa as own
        own.check_all()
        assert host_isa() == {isa!r}
        """.replace("{isa!r}", repr("avx2" if lowering == "avx2" else "portable")),
    )


def test_an_instruction_set_that_cannot_be_is_named() -> None:
    """At the first use of a kernel, whatever is asked for; nothing else is taken, and the model is
    as it was. Put right, the same process decodes."""
    haswell = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
    out = run_python(
        """
        import contextlib, io, os, torch; torch.set_num_threads(1)
        import lath, test_hf_decode_isa as own
        from hf_models import generate, tokens
        from lath.integration.command_line import run
        torch.set_grad_enabled(False)
        model = own.decoder("Llama")
        before = type(model), set(model.__dict__)
        for name in ("sse", "avx512_vnni"):
            os.environ["LATH_ISA"] = name
            for way in ("fused", "auto"):
                try:
                    with own.patched(model, way): generate(model, tokens(1, 5), 3)
                except (ValueError, RuntimeError) as error: print(type(error).__name__, error)
                assert (type(model), set(model.__dict__)) == before
            for command in (["warmup"], ["plan", "--model", "tiny"],
                            ["run", "--model", "tiny", "--rounds", "1"]):
                err = io.StringIO()
                with contextlib.redirect_stderr(err): code = run(command)
                print(code, err.getvalue().strip().splitlines()[-1])
        os.environ["LATH_ISA"] = ""
        with own.patched(model, "fused") as report: generate(model, tokens(1, 5), 3)
        print(own.fused_tokens(report))
        """,
        **haswell,
    )
    sse = "LATH_ISA must be one of ('avx512_vnni', 'avx2', 'portable'), got 'sse'"
    wide = ("LATH_ISA='avx512_vnni' needs ['avx512bw', 'avx512dq', 'avx512f', 'avx512vl', "
            "'avx512vnni'], which this CPU lacks")  # fmt: skip
    assert out.splitlines() == [
        *[f"ValueError {sse}"] * 2, *[f"2 lath: {sse}"] * 3,
        *[f"MissingInstructionsError {wide}"] * 2, *[f"2 lath: {wide}"] * 3, "2",
    ]  # fmt: skip
