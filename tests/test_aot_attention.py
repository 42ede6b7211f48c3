"""The Triton kernels of attention and of the page writer, compiled for GPUs that are not here.

Our own launchers run on CPU tensors under the plan that each architecture would get; what they
would have launched is compiled and read: registers suffice, it fits the device, and q·k of
quantised keys became an 8-bit tensor instruction.
"""

from __future__ import annotations

import pytest

from lath.formats.device import known_device
from lath.formats.plan import Plan
from tools.attention_launches import record_attend, record_writer
from tools.fake_gpu import Specialisation, compile_recorded
from tools.machine_code import Resources, resources, working_loops

ARCHITECTURES = [
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950",
]  # fmt: skip
E4M3 = ["sm_89", "sm_90", "sm_100", "sm_120", "gfx950"]
DIMS = (64, 128, 256)
PHASES = ("prefill", "decode")

# Codecs and precisions that every architecture is compiled for, at every head dim.
COVER = ["int8/float {} fp16 float", "int8/int8 {} bf16 int8"]
# The others, and everything that an option adds.
VERBS = [
    "int8/float {} bf16 float prefill causal parts",
    "int8/int8 {} bf16 int8 prefill causal parts",
    "int8/int8 {} bf16 int8 decode parts",
    "int8/int8 {} fp16 float decode parts",
]
# Lists of each KV head, what the verbs launch after a selection; lists of each query head, masks
# of tokens.
LISTS = [
    f"{codecs} {dim} bf16 int8 decode parts lists"
    for codecs in ("int8/int8", "int4/int4")
    for dim in (64, 128)
]
MASKED_LISTS = [
    "int8/int8 64 bf16 int8 decode parts tokens",
    "int8/int8 128 bf16 int8 decode parts query-lists",
    "int4/int4 128 bf16 int8 decode parts query-lists tokens",
    "int8/int8 128 fp16 float decode parts tokens",
    "int8/int8 128 bf16 int8 prefill causal parts lists",
    "int8/int8 128 bf16 int8 prefill causal parts tokens",
]
OTHERS = [
    "int8/int8 {} fp16 float",
    "int8/int8 {} bf16 int16",
    "int4/int4 {} fp16 int8",
    "int4/int2 {} bf16 int8",
    "int2/int2 {} fp16 float",
    "int8-planes/int8-planes {} bf16 int8",
    "int8-planes/int8-planes {} fp16 int8 draft",
    "float/float {} fp16 float",
]
EIGHT_BIT_FLOATS = [
    "e4m3/e4m3 {} fp16 e4m3 q-e4m3",
    "e4m3/e4m3 {} bf16 float q-e4m3",
    "int4/int4 {} fp16 float q-e4m3",
]
FEATURES = {
    "prefill": [
        "causal", "causal window parts", "mask", "bias", "causal softcap sink", "causal alibi",
    ],
    "decode": ["parts", "unified", "tree parts", "sink softcap", "causal window", "mask"],
}  # fmt: skip


def thinned(texts: list[str], one_in: int, architectures: list[str]) -> list[object]:
    """Each text on some architectures at every run, on the others in the slow one."""
    return [
        pytest.param(
            text, architecture, id=f"{architecture} {text}",
            marks=[] if (3 * i + 5 * j) % one_in == 0 else [pytest.mark.slow],
        )
        for i, text in enumerate(texts)
        for j, architecture in enumerate(architectures)
    ]  # fmt: skip


def cover() -> list[object]:
    """At every run each architecture and head dim meets both phases and both ways of P·V."""
    return [
        pytest.param(
            case, architecture, id=f"{architecture} {case}",
            marks=[] if (i % 2 + i // 2 % 3 + i // 6 + j) % 2 == 0 else [pytest.mark.slow],
        )
        for i, case in enumerate(in_phases(COVER))
        for j, architecture in enumerate(ARCHITECTURES)
    ]  # fmt: skip


def over(cases: list[str]) -> list[str]:
    return [f"{c.format(dim)}" for c in cases for dim in DIMS]


def in_phases(cases: list[str]) -> list[str]:
    """The phase stands after the precision, before features."""
    found = []
    for case in over(cases):
        words = case.split()
        found += [" ".join([*words[:4], phase, *words[4:]]) for phase in PHASES]
    return found


def expect_tensor_instructions(usage: Resources, family: str, subject: str) -> None:
    """family: "int8", "e4m3" or "float", what is multiplied."""
    nvidia = {
        "int8": ("IMMA", "IGMMA", "UTCI"),
        "e4m3": ("QMMA", "QGMMA", "UTCQ", "HMMA"),  # few rows of e4m3 go through fp16 on sm_90
        "float": ("HMMA", "HGMMA", "UTCH"),
    }
    amd = {"int8": ("v_mfma_i32",), "e4m3": ("v_mfma_",), "float": ("v_mfma_f32",)}
    families = (amd if usage.architecture.startswith("gfx") else nvidia)[family]
    assert any(usage.uses(name) for name in families), f"{subject}: {usage.tensor_instructions}"


def check(found: Specialisation) -> Resources:
    """It compiles, spills nothing and fits."""
    usage = resources(compile_recorded(found))
    device = known_device(found.architecture)
    assert not usage.spill_bytes, f"{found} spills {usage.spill_bytes} bytes"
    assert usage.shared_memory <= device.shared_memory, str(found)
    assert usage.blocks_per_unit >= 1, f"{found}: {usage.limiter}"
    return usage


def check_attend(text: str, architecture: str) -> Plan:
    launched = record_attend(text, architecture)
    codecs, _, dtype, precision, _, *features = text.split()
    keys, values = codecs.split("/")
    names = [found.name for found in launched.specialisations]
    assert "attend_kernel" in names
    for found in launched.specialisations:
        usage = check(found)
        if found.name != "attend_kernel" or dtype == "fp32":
            continue
        scores = "float" if keys == "float" else "e4m3" if "q-e4m3" in features else "int8"
        expect_tensor_instructions(usage, scores, text)
        sums = {"int16": "int8"}.get(precision, precision)
        expect_tensor_instructions(usage, "float" if values == "float" else sums, text)
    return launched.plan


@pytest.mark.parametrize(("text", "architecture"), cover())
def test_quantised_keys_use_the_tensor_unit(architecture: str, text: str) -> None:
    check_attend(text, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("text", over(VERBS))
def test_what_the_verbs_launch(text: str, architecture: str) -> None:
    """The default attention, the one with int8 values, and decoding, with their float parts."""
    check_attend(text, architecture)


@pytest.mark.parametrize(("text", "architecture"), thinned(LISTS, 4, ARCHITECTURES))
def test_lists_of_pages(architecture: str, text: str) -> None:
    """Every architecture at every run, with one of the codecs and head dims."""
    check_attend(text, architecture)


@pytest.mark.parametrize(("text", "architecture"), thinned(MASKED_LISTS, 7, ARCHITECTURES))
def test_masks_of_tokens_and_lists_of_query_heads(architecture: str, text: str) -> None:
    check_attend(text, architecture)


@pytest.mark.parametrize("text", ["int8/int8 128 bf16 int8", "int4/int4 128 bf16 int8"])
def test_masks_of_tokens_leave_loads_whole(text: str) -> None:
    """Sub-pages are left out by predicates of loads that stay 16 bytes wide."""
    wide = []
    for lists in ("lists", "tokens"):
        launched = record_attend(f"{text} decode parts {lists}", "sm_90")
        (found,) = (own for own in launched.specialisations if own.name == "attend_kernel")
        wide.append(compile_recorded(found).asm["ptx"].count("cp.async.cg.shared.global"))
    assert wide[0] == wide[1] > 0


@pytest.mark.parametrize(("text", "architecture"), thinned(in_phases(OTHERS), 29, ARCHITECTURES))
def test_other_codecs_and_precisions(architecture: str, text: str) -> None:
    check_attend(text, architecture)


@pytest.mark.parametrize(("text", "architecture"), thinned(in_phases(EIGHT_BIT_FLOATS), 13, E4M3))
def test_eight_bit_floats(architecture: str, text: str) -> None:
    check_attend(text, architecture)


@pytest.mark.parametrize(
    ("text", "architecture"),
    thinned(
        [
            f"{case.format(dim)} {phase} {features}"
            for phase in PHASES
            for features in FEATURES[phase]
            for case, dim in ((COVER[0], 128), (COVER[1], 64))
        ],
        19,
        ARCHITECTURES,
    ),
)
def test_options(architecture: str, text: str) -> None:
    check_attend(text, architecture)


WRITTEN = [
    f"{codecs} {dim} {dtype}"
    for dim in DIMS
    for codecs, dtype in (
        ("int8/int8", "bf16"), ("int8/float", "fp16"), ("int4/int2", "bf16"),
        ("int8-planes/int8-planes", "fp16"), ("float/float", "bf16"),
    )
]  # fmt: skip


@pytest.mark.parametrize(("text", "architecture"), thinned(WRITTEN, 7, ARCHITECTURES))
def test_page_writer(architecture: str, text: str) -> None:
    launched = record_writer(text, architecture)
    assert launched
    for found in launched:
        check(found)


@pytest.mark.parametrize(
    ("text", "architecture"), thinned([f"e4m3/e4m3 {dim} bf16" for dim in DIMS], 3, E4M3)
)
def test_page_writer_of_eight_bit_floats(architecture: str, text: str) -> None:
    for found in record_writer(text, architecture):
        check(found)


# Instructions per score other than tensor ones, in the loop over tiles that need no mask: the
# measured figure and 8 %, for a new Triton or ptxas moves counts a little.
FIGURES = [
    ("sm_80", "int8/float 64 fp16 float prefill causal", 10.4),
    ("sm_90", "int8/float 64 fp16 float prefill causal", 11.2),
    ("sm_90", "int8/float 128 fp16 float prefill causal", 13.0),
    ("sm_80", "int8/int8 128 fp16 int8 decode", 32.1),
    ("sm_90", "int8/int8 128 fp16 int8 decode", 35.1),
]


@pytest.mark.parametrize(("architecture", "text", "figure"), FIGURES)
def test_instructions_per_score(architecture: str, text: str, figure: float) -> None:
    launched = record_attend(text, architecture)
    (found,) = [found for found in launched.specialisations if found.name == "attend_kernel"]
    kernel = compile_recorded(found)
    usage, loop = resources(kernel), working_loops(kernel)[0]
    other = (loop.instructions - loop.counts["tensor"]) * usage.warps * usage.lanes
    assert other / (launched.plan.block_m * launched.plan.block_n) <= 1.08 * figure, str(loop)
    assert "LDGSTS.128" in loop.global_loads, "codes are not loaded 16 bytes a lane"
