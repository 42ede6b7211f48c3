"""The compiled CPU kernels over value tables and scales of 8 bits: every codec against its
definition, every code of every table, other instruction sets."""

from __future__ import annotations

import itertools

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_cpu_processes import LOWERINGS, run_lowered

import cases
import lath
import oracle
from lath.formats import packing, values
from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.qtensor import QTensor
from lath.kernels.linear import cpu, cpu_kernels
from lath.kernels.linear.cpu_record import Record
from lath.kernels.linear.cpu_view import kind_of
from lath.kernels.linear.cpu_views import cpu_view
from lath.kernels.simd import emitter, host_isa, tables
from lath.kernels.simd.compile import compile_kernel
from lath.reference import linear as reference

CODECS = [
    "ternary", "ternary-g64", "ternary-g32-s32", "ternary-1.6",
    "ternary-1.6-g80-s32", "int4-g64-s8", "int3-g48-asym-s8",
    "int2-g96-asym-s8", "int4-s8", "int4-g64-fp8", "int3-g48-fp8", "int2-fp8",
    "nf4-g64", "nf4-g64-dq", "nf4-s32", "fp4-g64", "fp4-g16-dq", "fp4-s32", "fp4-g128",
    "lut1-g16", "lut2-g32-s32", "lut3-g64-dq", "lut4-g128", "lut5", "lut6-g48", "lut7-g112",
    "lut8-g64", "e4m3", "e4m3-g48", "e5m2-g128", "mxfp4", "mxfp6", "mxfp6-e3m2", "mxfp8",
    "mxfp8-e5m2", "nvfp4",
]  # fmt: skip
ACTIVATIONS = ("float", "int8", "int8-g32", "int8-g64", "int8-g48", "int6", "fp8", "fp8-e5m2-g64")
TOKENS = (1, 2, 7, 9, 33)


def make_weight(
    text: str, rows: int, columns: int, rng: np.random.Generator, broken: bool = False
) -> QTensor:
    """Every code in turn in every row, scales all different. broken: codes of NaN and infinity."""
    codec = Codec.parse(text)
    usable = np.arange(codec.levels)
    table = None
    if codec.values == "learned":
        entries = np.sort(rng.standard_normal(codec.levels))
        entries[np.abs(entries).argmin()] = 0
        table = torch.from_numpy(entries).float()
    elif codec.is_table and not broken:
        usable = np.flatnonzero(np.isfinite(values.table(codec.values)))
    order = np.array([rng.permutation(usable) for _ in range(rows)])
    codes = order[:, np.arange(columns) % len(usable)].astype(np.uint8)
    groups, padded = codec.num_groups(columns), packing.round_up(rows, packing.PANEL)
    scales = torch.zeros(groups, padded)
    scales[:, :rows] = torch.from_numpy(0.02 + 0.04 * rng.random((groups, rows)))
    outer = None
    if codec.scale_dtype == "fp8":
        inner = torch.arange(1, 127, dtype=torch.uint8)
        inner = inner[inner.view(torch.float8_e4m3fn).float() <= codec.largest_inner_scale]
        scales = inner[torch.from_numpy(rng.integers(0, len(inner), (groups, padded)))]
        scales[:, rows:] = 0
        outer = torch.zeros(padded)
        outer[:rows] = torch.from_numpy(0.001 + 0.002 * rng.random(rows))
    elif codec.scale_dtype in ("int8", "e8m0", "e4m3"):
        # 8-bit floats reach to 57344: the sums must fit fp16.
        powers = (104, 113) if codec.bits == 8 else (118, 127)
        low, high = {"int8": (1, codec.largest_inner_scale + 1), "e8m0": powers}.get(
            codec.scale_dtype, (1, 0x7E)
        )
        scales[:, :rows] = torch.from_numpy(rng.integers(low, high, (groups, rows)))
        scales = scales.to(torch.uint8)
        if codec.scale_dtype == "int8":
            outer = torch.full((padded,), 0.003).half()
        elif codec.scale_dtype == "e4m3":
            outer = torch.full((1,), 0.0007)
    elif codec.scale_dtype == "fp16":
        scales = scales.half()
    zeros = None
    if codec.zero == "integer":
        zeros = torch.zeros(groups, padded, dtype=torch.uint8)
        zeros[:, :rows] = torch.from_numpy(rng.integers(0, codec.levels, (groups, rows)))
    packed = packing.pack(torch.from_numpy(codes), codec)
    return QTensor(codec, (rows, columns), packed, scales, zeros, outer, table)


def definition(
    x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None, activations: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """y64 of `lath.reference`, and Σ|a||w| + |bias|; whole numbers count with their zero points."""
    rows = weight.shape[0]
    tensors = {
        name: (t if name in ("codes", "table") else t[..., :rows]).numpy()
        for name, t in weight.tensors.items()
    }
    fmt = ActivationFormat.parse(activations)
    offsets = None if bias is None else bias.float().numpy()
    with np.errstate(invalid="ignore"):
        y64 = reference.linear(
            x.float().numpy(), weight.unpack_codes().numpy(), tensors["scales"],
            tensors.get("zeros"), weight.codec, offsets, fmt, tensors.get("outer"),
            tensors.get("table"),
        )  # fmt: skip
        group = np.arange(weight.shape[1]) // weight.codec.group_size(weight.shape[1])
        parts = weight.effective_scales()[:, :rows].double().numpy().T[:, group]
        if weight.codec.is_table:
            parts = np.abs(weight.entries().double()[weight.unpack_codes().long()].numpy()) * parts
        else:
            parts = 2 * weight.codec.levels * parts
        gauge = np.abs(reference.decode_activations(x.float().numpy(), fmt)) @ parts.T
    return y64, gauge if offsets is None else gauge + np.abs(offsets)


def ratio_of(
    x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None, activations: str
) -> float:
    """max |error| / bound; infinite where a NaN or an infinity is not the definition's."""
    y64, gauge = definition(x, weight, bias, activations)
    y = cpu.linear(x, weight, bias, ActivationFormat.parse(activations))
    assert y.dtype == x.dtype
    broken = ~np.isfinite(y64)
    if not np.array_equal(y.double().numpy()[broken], y64[broken], equal_nan=True):
        return np.inf
    # Activations that are rounded to int8 and multiplied as fp32 numbers are rounded once more.
    columns = weight.shape[1] + (activations != "float")
    bound = oracle.linear_bound(y64, gauge, columns, x.dtype)
    with np.errstate(invalid="ignore"):
        return oracle.test_ratio(y, y64, bound)


def check(text: str, m: int, n: int, k: int, dtype: str, activations: str, bias: bool) -> None:
    rng = np.random.default_rng([m, n, k])
    weight = make_weight(text, n, k, rng)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(cases.DTYPES[dtype])
    offsets = torch.from_numpy(rng.standard_normal(n)).to(x.dtype) if bias else None
    ratio = ratio_of(x, weight, offsets, activations)
    assert ratio <= 1, (text, m, n, k, dtype, activations, bias, ratio)


@pytest.mark.parametrize("text", CODECS)
def test_bounds(text: str) -> None:
    """Every dtype, format and count of tokens; odd N and K, one panel to several."""
    turns = itertools.product(cases.DTYPES, ACTIVATIONS, TOKENS)
    for turn, (dtype, activations, m) in enumerate(turns):
        n, k = (37, 16, 51, 5)[turn % 4], (201, 330, 129, 64, 17)[turn % 5]
        check(text, m, n, k, dtype, activations, bool(turn % 2))


def test_long_panels_of_one_token() -> None:
    """Four panels at a time: the tile of wide layers."""
    for text in ("mxfp4", "nvfp4", "fp4-g64", "mxfp6", "ternary-g64"):
        check(text, 1, 83, 17000, "fp32", "int8", True)


@pytest.mark.parametrize("text", [t for t in CODECS if Codec.parse(t).is_table])
def test_identity_gives_every_code(text: str) -> None:
    """Of one product nothing is rounded but by the scale: the numbers are equal bit for bit."""
    weight = make_weight(text, 37, 300, np.random.default_rng(1))
    dense = weight.dequantize()
    assert len(dense.unique()) > weight.codec.levels // 2
    y = cpu.linear(torch.eye(300), weight, None, ActivationFormat())
    assert torch.equal(y.T, dense)
    if weight.codec.values in values.UNITS:
        y = cpu.linear(127 * torch.eye(300), weight, None, ActivationFormat("int8"))
        group = torch.arange(300) // weight.codec.group_size(300)
        scales = weight.effective_scales().double()[group, :37].T
        exact = weight.entries()[weight.unpack_codes().long()].double() * scales * 127
        assert torch.equal(y.T, exact.float())


@pytest.mark.parametrize("text", ["e4m3-g48", "e5m2-g128", "mxfp8", "mxfp8-e5m2"])
def test_codes_of_nan_and_infinity(text: str) -> None:
    """A row that has one gives what the definition gives; other rows do not notice."""
    rng = np.random.default_rng(2)
    weight = make_weight(text, 37, 300, rng)
    codes = weight.unpack_codes()
    special = np.flatnonzero(~np.isfinite(values.table(weight.codec.values)))
    for row, code in enumerate(special):
        codes[2 * row + 1, 7 * row] = int(code)
    packed = packing.pack(codes, weight.codec)
    broken = QTensor(weight.codec, weight.shape, packed, weight.scales)
    x = torch.randn(3, 300)
    for activations in ("float", "int8-g32"):
        assert ratio_of(x, broken, None, activations) <= 1
        y = cpu.linear(x, broken, None, ActivationFormat.parse(activations))
        clean = cpu.linear(x, weight, None, ActivationFormat.parse(activations))
        keep = [n for n in range(37) if n % 2 == 0 or n > 2 * len(special)]
        assert torch.equal(y[:, keep], clean[:, keep])
        assert not torch.isfinite(y[:, 1 : 2 * len(special) : 2]).any()


@pytest.mark.parametrize("text", ["nf4-g64", "mxfp4", "mxfp6", "e4m3", "lut8-g64", "nvfp4"])
def test_tokens_do_not_meet(text: str) -> None:
    """NaN or infinity in one token changes no other, whatever tile they share."""
    weight = make_weight(text, 50, 160, np.random.default_rng(3))
    for m, activations, bad in itertools.product(
        (2, 7, 9), ("float", "int8", "int8-g32"), (np.nan, np.inf)
    ):
        x = torch.randn(m, 160)
        clean = cpu.linear(x, weight, None, ActivationFormat.parse(activations))
        x[1, 7] = bad
        y = cpu.linear(x, weight, None, ActivationFormat.parse(activations))
        keep = [row for row in range(m) if row != 1]
        assert torch.equal(y[keep], clean[keep])
        assert not torch.isfinite(y[1]).any()
        assert ratio_of(x, weight, None, activations) <= 1


@pytest.mark.parametrize("byte", [0, 1, 254, 255])
def test_powers_of_two_at_the_ends(byte: int) -> None:
    """Bytes that are no exponent of a normal number are kept as fp32 scales."""
    for text in ("mxfp4", "mxfp6", "mxfp8"):
        weight = make_weight(text, 20, 64, np.random.default_rng(4))
        weight.scales[1, 3] = byte
        x = torch.zeros(2, 64)
        x[1, 32:] = torch.randn(32) * (1e-6 if byte > 127 else 1.0)
        record = cpu_view(weight, ActivationFormat()).record
        assert record.byte_scale == ("" if byte in (0, 255) else "e8m0")
        # Byte 255 is NaN in the standard; a loaded weight that has it is refused.
        for activations in ("float", "int8", "int8-g32") if byte != 255 else ():
            assert ratio_of(x, weight, None, activations) <= 1
        if byte == 0:
            y = cpu.linear(torch.eye(64), weight, None, ActivationFormat())
            assert torch.equal(y.T, weight.dequantize())


def test_flushing_denormals_changes_no_code() -> None:
    """E4M3 and E5M2 have subnormals of their own; they are ordinary numbers in fp32."""
    weight = make_weight("e4m3", 37, 300, np.random.default_rng(5))
    want = weight.dequantize()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormals")
    try:
        y = cpu.linear(torch.eye(300), weight, None, ActivationFormat())
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y.T, want)


@pytest.mark.parametrize("text", ["nf4-g64", "mxfp4", "mxfp6", "e5m2-g128", "lut6-g48", "nvfp4"])
def test_results_do_not_depend_on_threads(text: str) -> None:
    weight = make_weight(text, 517, 1100, np.random.default_rng(6))
    for m, activations in itertools.product((1, 7, 33), ("float", "int8-g64")):
        x = torch.randn(m, 1100)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cpu.linear(x, weight, None, ActivationFormat.parse(activations)))
        torch.set_num_threads(1)
        assert all(torch.equal(found[0], y) for y in found), (m, activations)


def test_records_and_their_bytes() -> None:
    """What a weight costs in memory: 4-bit codes stay 4 bits, scales of 8 bits one byte."""
    for text, bits in (("mxfp4", 4.25), ("nvfp4", 4.5), ("nf4-g64", 4.25), ("fp4-g64", 4.25),
                       ("mxfp6", 8.25), ("mxfp8", 8.25), ("e4m3-g64", 8.5)):  # fmt: skip
        weight = make_weight(text, 64, 1024, np.random.default_rng(7))
        for activations in (ActivationFormat(), ActivationFormat("int8")):
            view = cpu_view(weight, activations)
            extra = sum(t.nbytes for t in (view.table, view.outer) if t is not None)
            assert view.nbytes == 64 * 1024 * bits / 8 + extra, text
            assert extra <= 1024
    weight = make_weight("fp4-g64", 16, 64, np.random.default_rng(7))
    whole, plain = (cpu_view(weight, a) for a in (ActivationFormat("int8"), ActivationFormat()))
    assert whole is plain  # one copy serves both kernels
    assert kind_of(weight.codec, ActivationFormat("int8")) == "int8"
    assert kind_of(Codec.parse("nf4"), ActivationFormat("int8")) == "rounded"
    assert kind_of(Codec.parse("lut3"), ActivationFormat()) == "float"


def test_the_view_follows_a_changed_table() -> None:
    weight = make_weight("lut4-g128", 20, 128, np.random.default_rng(8))
    x = torch.randn(2, 128)
    first = cpu.linear(x, weight, None, ActivationFormat())
    assert weight.table is not None
    weight.table.mul_(2)
    assert torch.equal(cpu.linear(x, weight, None, ActivationFormat()), 2 * first)


@pytest.mark.parametrize("text", ["nf4-g64", "lut8-g64", "mxfp4", "e4m3", "mxfp6"])
def test_a_wrong_entry_is_seen(text: str) -> None:
    """Negative control of the bounds: the definition with one code's neighbour fails them."""
    weight = make_weight(text, 20, 256, np.random.default_rng(9))
    codes = weight.unpack_codes()
    entries = weight.entries().nan_to_num(nan=0)
    largest = int(entries.argmax())
    codes[codes == largest] = largest - 1
    wrong = QTensor(weight.codec, weight.shape, packing.pack(codes, weight.codec),
                    weight.scales, None, weight.outer, weight.table)  # fmt: skip
    x = torch.randn(3, 256)
    for activations in ("float", "int8"):
        y64, gauge = definition(x, wrong, None, activations)
        y = cpu.linear(x, weight, None, ActivationFormat.parse(activations))
        bound = oracle.linear_bound(y64, gauge, 256, torch.float32)
        assert oracle.test_ratio(y, y64, bound) > 10, activations


@pytest.mark.parametrize(
    ("kind", "record", "name"),
    [
        ("int8", Record(4, "none", True, "fp4"), "look_up_bytes"),
        ("float", Record(4, "none", False, "fp4", "e8m0"), "look_up"),
        ("rounded", Record(4, "none", True, "table"), "look_up"),
        ("float", Record(8, "none", True, "table"), "gather"),
        ("float", Record(8, "none", False, "e4m3"), "load_e4m3"),
        ("rounded", Record(8, "none", False, "e5m2", "e8m0"), "load_e5m2"),
        ("int8", Record(4, "none", False, "fp4", "e4m3"), "load_e4m3"),
        ("int8", Record(8, "none", False, "e2m3", "e8m0"), "load_powers"),
        ("e5m2", Record(4, "none", True, "table"), "look_up"),
    ],
)
def test_a_wrong_kernel_is_refused(
    kind: str, record: Record, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the check at first use: rows that change places must not pass."""
    honest = getattr(tables, name)

    def wrong(e, *arguments):  # type: ignore[no-untyped-def]
        value = honest(e, *arguments)
        return e.shuffle(value, value, [1, 0, *range(2, 16)])

    monkeypatch.setattr(tables, name, wrong)
    monkeypatch.setattr("lath.kernels.simd.compile.callback", numba.cfunc)
    monkeypatch.setattr(cpu_kernels, "compile_kernel", compile_kernel.__wrapped__)
    with pytest.raises(RuntimeError, match=f"{kind} .*{host_isa()}"):
        cpu_kernels._check.__wrapped__(kind, record, emitter.FP32, (4, 1))


@pytest.mark.parametrize("name", LOWERINGS)
def test_other_instruction_sets(name: str) -> None:
    run_lowered(
        name,
        """
        import torch; torch.set_num_threads(1)
        from test_cpu_tables import check
        for text in ("fp4-g64", "mxfp4", "nvfp4", "mxfp6", "nf4-g64-dq", "lut2-g32-s32",
                     "lut5", "e4m3-g48", "mxfp8-e5m2", "ternary", "int4-g32-s8", "int2-asym-s8"):
            for m, activations in ((1, "float"), (1, "int8"), (9, "float"), (9, "int8-g32")):
                check(text, m, 37, 201, "bf16" if m == 1 else "fp16", activations, True)
        check("int4-g64-fp8", 9, 37, 201, "fp16", "fp8", True)
        check("int4-g64", 9, 37, 201, "fp16", "fp8-e5m2", True)
        """,
    )


@pytest.mark.parametrize("text", ["nf4-g64", "mxfp4", "nvfp4", "e4m3", "lut8", "int4-g64-fp8"])
def test_small_and_empty_weights(text: str) -> None:
    codec = Codec.parse(text)
    for rows, columns in ((0, 64), (16, 0), (1, 1), (3, 17)):
        weight = QTensor.empty(codec, (rows, columns), device="cpu")
        for tensor in weight.tensors.values():
            tensor.fill_(1)
        for activations in ("float", "int8"):
            y = lath.linear(torch.ones(2, columns), weight, activations=activations, backend="cpu")
            assert y.shape == (2, rows)


def test_warmup_covers_tables() -> None:
    steps: list[str] = []
    cpu.warmup(["nf4-g64", "nvfp4", "mxfp6"], steps.append, dtypes=[torch.float32])
    assert len(steps) == 6
