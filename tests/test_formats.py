"""Codecs, the packed layout, the quantiser and QTensor against their NumPy definition."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lath
from lath.formats import packing
from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.memory import Packing
from lath.formats.memory import zeros as zeros_in_bulk
from lath.formats.qtensor import QTensor
from lath.reference import codecs as reference

CODECS = st.builds(
    Codec,
    bits=st.integers(1, 8),
    group=st.one_of(st.none(), st.integers(1, 20).map(lambda n: 16 * n)),
    zero=st.sampled_from(["none", "integer", "float"]),
    scale_dtype=st.sampled_from(["fp16", "fp32"]),
)
ALL_ZEROS = ["", "-asym", "-fzero"]


@given(CODECS)
def test_codec_text_round_trips(codec: Codec) -> None:
    assert Codec.parse(str(codec)) == codec
    assert lath.codec(str(codec)) == codec
    assert lath.codec(codec) is codec


@pytest.mark.parametrize(
    "text", ["", "int0", "int9", "int4-g0", "int4-g24", "int4-g-16", "int4 ", "uint4", "int4-sym",
             "int4-fzero-asym", "int4-s32-g64", "int4-g128-s16", "int04"],
)  # fmt: skip
def test_codec_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match="codec"):
        lath.codec(text)


def test_codec_refuses_other_types() -> None:
    with pytest.raises(TypeError, match="codec must be a str or a Codec, got int: 4"):
        lath.codec(4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group must be a positive multiple of 16"):
        Codec(4, group=24)
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 8"):
        Codec(9)


@pytest.mark.parametrize("text", ["float", "int8", "int8-g64"])
def test_activation_format_round_trips(text: str) -> None:
    assert str(ActivationFormat.parse(text)) == text


@pytest.mark.parametrize("text", ["int4", "int8-g24", "fp16", "float-g64", "int8-g0"])
def test_activation_format_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match="activations"):
        ActivationFormat.parse(text)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_the_definition_and_round_trips(bits: int) -> None:
    codec = Codec(bits)
    rng = np.random.default_rng(bits)
    for rows, columns in [(1, 1), (17, 130), (16, 128), (3, 300), (0, 5), (5, 0)]:
        codes = rng.integers(0, codec.levels, (rows, columns)).astype(np.uint8)
        packed = packing.pack(torch.from_numpy(codes), codec)
        assert np.array_equal(packed.numpy().view(np.uint32), reference.pack(codes, codec))
        assert np.array_equal(packing.unpack(packed, codec, codes.shape).numpy(), codes)
        padded = packing.round_up(rows, 16) * packing.round_up(columns, 128)
        assert packed.numel() * 32 == padded * bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_survives_at_every_place(bits: int) -> None:
    """Code c everywhere but at one place: only that place reads back differently."""
    codec = Codec(bits)
    for code in range(codec.levels):
        codes = torch.full((16, 128), code, dtype=torch.uint8)
        codes[code % 16, (37 * code) % 128] = (code + 1) % codec.levels
        assert torch.equal(packing.unpack(packing.pack(codes, codec), codec, (16, 128)), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero", ALL_ZEROS)
def test_quantize_is_the_definition(bits: int, zero: str) -> None:
    rng = np.random.default_rng(bits)
    weight = rng.standard_normal((21, 200)).astype(np.float32)
    weight[3], weight[4, :100], weight[5, 7] = 0, 0.5, 40
    for group, wide, search in itertools.product(["", "-g16", "-g48"], ["", "-s32"], [False, True]):
        codec = lath.codec(f"int{bits}{group}{zero}{wide}")
        packed = lath.quantize(torch.from_numpy(weight), codec, search=search)
        codes, scales, zeros, *_ = reference.quantize(weight, codec, search)
        where = f"{codec} search={search}"
        assert np.array_equal(packed.unpack_codes().numpy(), codes), where
        assert np.array_equal(packed.scales[:, :21].numpy(), scales), where
        if zeros is not None:
            assert packed.zeros is not None
            assert np.array_equal(packed.zeros[:, :21].numpy(), zeros), where
        exact = reference.dequantize(codes, scales, zeros, codec)
        assert np.abs(packed.dequantize().double().numpy() - exact).max() <= 2.0**-23 * 40, where


@pytest.mark.parametrize("codec_text", ["int4-g32", "int8", "int3-g16-asym", "int2-g48-fzero-s32"])
def test_quantisation_error_is_at_most_half_a_step(codec_text: str) -> None:
    codec = lath.codec(codec_text)
    weight = torch.randn(33, 100)
    packed = lath.quantize(weight, codec)
    size = codec.group_size(100)
    step = packed.scales[:, :33].float().T.repeat_interleave(size, 1)[:, :100]
    # Half a step; one more rounding step of a zero point; the rounding of scale and minimum to
    # fp16 moves the end of a range of `levels` steps by up to levels * 2**-11 steps.
    integer = 0.5 if codec.zero == "integer" else 0.0
    slack = codec.levels * 2.0**-11 * (2 if codec.zero == "float" else 1)
    bound = step * (0.5 + integer + slack) + weight.abs().max() * 2.0**-11 * (codec.zero == "float")
    assert bool(((packed.dequantize() - weight).abs() <= bound).all())


def test_search_never_loses() -> None:
    weight = torch.randn(40, 256) ** 3
    for text in ["int4-g64", "int3-g64-asym", "int2-g64-fzero"]:
        plain = lath.quantize(weight, text).dequantize() - weight
        searched = lath.quantize(weight, text, search=True).dequantize() - weight
        groups = (40, 4, 64)
        loss = [e.double().reshape(groups).square().sum(-1) for e in (plain, searched)]
        # 1e-6: the decoded weight is rounded to fp32 here, the search compares float64.
        assert bool((loss[1] <= loss[0] * (1 + 1e-6)).all())
        assert float(loss[1].sum()) < float(loss[0].sum())


def test_float_minimum_holds_its_own_values_exactly() -> None:
    """What was decoded from a float-minimum codec is quantised back without error."""
    weight = lath.quantize(torch.randn(32, 96), "int4-g32-fzero").dequantize()
    again = lath.quantize(weight, "int4-g32-fzero")
    assert torch.equal(again.dequantize(), weight)


def test_zeros_quantise_to_zeros() -> None:
    for bits, zero in itertools.product(range(1, 9), ALL_ZEROS):
        packed = lath.quantize(torch.zeros(3, 40), f"int{bits}-g16{zero}")
        assert torch.equal(packed.dequantize(), torch.zeros(3, 40)), f"int{bits}-g16{zero}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_quantize_refuses_what_is_not_finite(bad: float) -> None:
    weight = torch.randn(8, 32)
    weight[5, 31] = bad
    with pytest.raises(ValueError, match="weight must be finite"):
        lath.quantize(weight, "int4-g16")
    with pytest.raises(ValueError, match="weight must be finite"):
        reference.quantize(weight.numpy(), lath.codec("int4-g16"))


def test_quantize_refuses_overflow_of_the_scale() -> None:
    weight = torch.full((2, 16), 1e6)
    with pytest.raises(ValueError, match="overflows fp16; use '-s32'"):
        lath.quantize(weight, "int4")
    error = (lath.quantize(weight, "int4-s32").dequantize() - weight).abs().max()
    assert float(error) <= 1e6 / 7.5 / 2 * (1 + 2.0**-20)


def test_quantize_does_not_touch_its_argument_and_takes_strides() -> None:
    wide = torch.randn(20, 200)
    before = wide.clone()
    sliced = lath.quantize(wide[::2, ::2], "int4-g32")
    assert torch.equal(wide, before)
    assert torch.equal(sliced.codes, lath.quantize(wide[::2, ::2].contiguous(), "int4-g32").codes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lath.quantize([[1.0]], "int4"), TypeError, "weight must be a torch.Tensor"),
        (lambda: lath.quantize(torch.ones(3), "int4"), ValueError, r"weight must be \[N, K\]"),
        (lambda: lath.quantize(torch.ones(3, 3).double(), "int4"), TypeError, "got float64"),
        (lambda: lath.quantize(torch.ones(3, 3).int(), "int4"), TypeError, "got int32"),
        (lambda: lath.quantize(torch.ones(3, 3), "int4", search=1), TypeError, "search must be"),
        (lambda: lath.quantize(torch.ones(3, 3), "int44"), ValueError, "codec must be"),
    ],
)
def test_quantize_refuses(call, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


@settings(deadline=None, max_examples=30)
@given(CODECS, st.integers(0, 40), st.integers(0, 300))
def test_bytes_are_counted_in_full(codec: Codec, rows: int, columns: int) -> None:
    packed = lath.quantize(torch.randn(rows, columns), codec)
    n16, k128 = packing.round_up(rows, 16), packing.round_up(columns, 128)
    side = codec.num_groups(columns) * n16
    width = {"fp16": 2, "fp32": 4}[codec.scale_dtype]
    zero = {"none": 0, "integer": 1, "float": width}[codec.zero]
    assert packed.nbytes == n16 * k128 * codec.bits // 8 + side * (width + zero)
    tensors = [t for t in (packed.codes, packed.scales, packed.zeros) if t is not None]
    assert packed.nbytes == sum(t.untyped_storage().nbytes() for t in tensors)


def test_exact_bits_per_weight() -> None:
    for bits in range(1, 9):
        packed = lath.quantize(torch.randn(32, 256), f"int{bits}-g128")
        assert packed.bits_per_weight == bits + 16 / 128


@pytest.mark.parametrize("text", ["int4-g64", "int7-g16-asym", "int2-fzero-s32"])
def test_state_dict_through_safetensors(text: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    packed = lath.quantize(torch.randn(37, 200), text)
    save_file(packed.state_dict(), tmp_path / "w.safetensors")
    loaded = QTensor.from_state_dict(load_file(tmp_path / "w.safetensors"))
    assert loaded.codec == packed.codec
    assert loaded.shape == packed.shape
    assert torch.equal(loaded.dequantize(), packed.dequantize())


def _corrupt(name: str, change) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    state = lath.quantize(torch.randn(32, 256), "int4-g64-asym").state_dict()
    state = {key: value.clone() for key, value in state.items()}
    state[name] = change(state[name])
    return state


def _flip_bit(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1).view(torch.uint8)
    flat[flat.numel() // 2] ^= 1
    return tensor


CORRUPTIONS = {
    "one bit of a code": ("codes", _flip_bit),
    "one bit of a scale": ("scales", _flip_bit),
    "one bit of a zero": ("zeros", _flip_bit),
    "codes cut": ("codes", lambda t: t[:-1]),
    "codes of another type": ("codes", lambda t: t.view(torch.float32)),
    "scales transposed": ("scales", lambda t: t.T.contiguous()),
    "scales as bf16": ("scales", lambda t: t.view(torch.bfloat16)),
    "scale NaN": ("scales", lambda t: t.fill_(float("nan"))),
    "scale negative": ("scales", lambda t: -t),
    "zero off range": ("zeros", lambda t: t.fill_(16)),
    "zeros swapped": ("zeros", lambda t: t.flip(0)),
    "metadata of nothing": ("meta", lambda t: t[:0]),
    "metadata cut": ("meta", lambda t: t[:-3]),
    "another shape": (
        "meta",
        lambda t: torch.tensor(
            list(bytes(t).replace(b"[32, 256]", b"[31, 256]")), dtype=torch.uint8
        ),
    ),
    "another codec": (
        "meta",
        lambda t: torch.tensor(list(bytes(t).replace(b"-g64", b"-g32")), dtype=torch.uint8),
    ),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_corrupted_state_is_refused(what: str) -> None:
    with pytest.raises(ValueError, match=r"QTensor|meta|codes|scales|zeros"):
        QTensor.from_state_dict(_corrupt(*CORRUPTIONS[what]))


def test_incomplete_state_is_refused() -> None:
    state = lath.quantize(torch.randn(16, 128), "int4-asym").state_dict()
    for name in ["codes", "scales", "meta", "zeros"]:
        with pytest.raises(ValueError, match=r"missing|zeros"):
            QTensor.from_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match="unknown"):
        QTensor.from_state_dict({**state, "extra": state["codes"]})


def test_meta_device_construction() -> None:
    packed = QTensor.empty(lath.codec("int4-g64-asym"), (48, 300))
    assert packed.device.type == "meta"
    assert packed.nbytes == lath.quantize(torch.randn(48, 300), "int4-g64-asym").nbytes


def test_a_view_is_built_once_and_again_after_a_change() -> None:
    packed = lath.quantize(torch.randn(16, 128), "int4")
    built = []
    for _ in range(2):
        packed.view("test", lambda: built.append(1))
    assert len(built) == 1
    packed.view("sized", lambda: torch.zeros(7))
    assert packed.view_nbytes == 28
    packed.scales.mul_(2)
    packed.view("test", lambda: built.append(1))
    assert len(built) == 2


def test_memory_for_weights_is_shared_out_and_given_back() -> None:
    """Pieces do not overlap, are aligned, and small or very large ones keep no chunk."""
    memory = Packing()
    pieces = [memory.room((size,)) for size in (40_000, 100_001, 5 << 20, 11 << 20, 70_000)]
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    assert [int(piece.unique()) for piece in pieces] == [0, 1, 2, 3, 4]
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)
    shared = {piece.untyped_storage().data_ptr() for piece in pieces}
    assert len(shared) == 2  # 5 and 11 MB do not fit into one chunk beside the others
    for size in (0, 16, 17 << 20):
        alone = memory.room((size,))
        assert alone.untyped_storage().data_ptr() not in shared
        assert alone.untyped_storage().nbytes() - size in (0, 2 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for under Linux")
def test_memory_in_bulk_begins_where_a_huge_page_does() -> None:
    """Of a matrix of 4 MB nearly half could lie in small pages otherwise."""
    memory = Packing()
    bulk = [
        zeros_in_bulk((5 << 20,), torch.device("cpu")),
        memory.room((17 << 20,)),
        memory.room((4096, 9)),
    ]
    assert [tensor.data_ptr() % (2 << 20) for tensor in bulk] == [0, 0, 0]
    assert [tensor.nbytes for tensor in bulk] == [5 << 20, 17 << 20, 4096 * 9]
    assert not bulk[0].any()
