"""Sparse weights: which weights are kept, the bitmap against plain loops, corrupted tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_sparse import make_weight

import lath
from lath.formats.codec import Codec
from lath.formats.families import GRAMMAR_TABLE, weight_codec
from lath.formats.sparse import SparseCodec, SparseTensor
from lath.kernels import quantize_sparse
from lath.reference import sparse as reference
from lath.verbs.kinds import array, kind_of

TEXTS = [
    "sparse50-int8", "sparse50-int8-g128", "sparse70-int4-g64", "sparse80-int8-s32", "sparse0-int4",
    "sparse100-int8", "sparse50-fp16", "sparse33-bf16",
]  # fmt: skip
SHARES = (0, 50, 80, 100)


@pytest.mark.parametrize("text", TEXTS)
def test_text_forms_round_trip(text: str) -> None:
    codec = weight_codec(text)
    assert isinstance(codec, SparseCodec)
    assert str(codec) == text
    assert eval(repr(codec), {"SparseCodec": SparseCodec, "Codec": Codec}) == codec


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("sparse101-int8", "codec must be one of sparse"), ("sparse-int8", "codec must be one of"),
        ("sparse50-int8-asym", "codec kept"), ("sparse50-int5", "codec kept"),
        ("sparse50-nf4", "codec kept"), ("sparse50-int4-g64-s8", "codec kept"),
        ("sparse50-fp32", "codec must be"), ("sparse050-int8", "codec must be one of sparse"),
    ],
)  # fmt: skip
def test_text_forms_that_are_none(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        lath.quantize(torch.zeros(4, 16), text)
    assert any(form.startswith("sparse") for form in GRAMMAR_TABLE)


def weight_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Ties, zeros, a row of zeros and one with a single number."""
    rng = np.random.default_rng(seed)
    weight = np.round(rng.standard_normal((rows, columns)) * 4) / 4
    weight[3], weight[5] = 0, 0
    weight[5, 7] = -2.5
    return torch.from_numpy(weight).float()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", [(21, 150), (16, 128), (37, 300)])
def test_quantize_is_the_definition_bit_for_bit(text: str, shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    packed = lath.quantize(weight, text)
    assert isinstance(packed, SparseTensor)
    expected = reference.quantize(weight.numpy(), packed.codec)
    assert np.array_equal(array(packed.bitmap).view(np.uint32), expected.bitmap)
    assert np.array_equal(array(packed.offsets), expected.offsets)
    if expected.scales is not None:
        assert np.array_equal(array(packed.scales, shape[0]), expected.scales)
    dense = reference.unpack(expected, shape)
    assert np.array_equal(packed.numbers().double().numpy(), dense.astype(np.float64))
    decoded = reference.dequantize(expected, packed.codec, shape)
    assert np.array_equal(kind_of(packed).decode(packed), decoded)
    assert np.array_equal(packed.dequantize().numpy(), decoded.astype(np.float32))
    packed.check_values()


@pytest.mark.parametrize("share", SHARES)
def test_the_decoded_tile_is_the_dense_tile(share: int) -> None:
    """Against a path that knows no bitmap: the kept numbers where the mask says so, else 0."""
    rng = np.random.default_rng(share)
    for rows, columns in ((16, 128), (33, 270)):
        mask = rng.random((rows, columns)) * 100 >= share
        mask[:16, :128] &= rows == 16  # an empty tile
        numbers = rng.integers(-128, 128, (rows, columns))
        bitmap, offsets, kept = reference.pack(numbers, mask)
        sparse = reference.Sparse(bitmap, offsets, kept, None)
        assert len(kept) == mask.sum()
        assert np.array_equal(reference.unpack(sparse, (rows, columns)), np.where(mask, numbers, 0))
        weight = make_weight(f"sparse{share}-int8", rows, columns, rng)
        assert np.array_equal(
            kind_of(weight).decode(weight).astype(np.float32), weight.dequantize().numpy()
        )
        assert not weight.mask()[:16, :128].any()


@pytest.mark.parametrize("share", [0, 1, 50, 80, 99, 100])
def test_what_is_kept(share: int) -> None:
    """Rows are equally long; what is kept is never smaller than the rest; of equals the first."""
    weight = torch.randn(40, 330, generator=torch.Generator().manual_seed(share))
    mask = quantize_sparse.keep(weight, share)
    count = 330 - 330 * share // 100
    assert (mask.sum(dim=1) == count).all()
    size = weight.abs()
    kept = torch.where(mask, size, torch.inf).amin(dim=1)
    dropped = torch.where(mask, -torch.inf, size).amax(dim=1)
    assert (kept >= dropped).all()
    ties = torch.ones(3, 330)
    assert quantize_sparse.keep(ties, share)[:, :count].all()
    assert quantize_sparse.keep(ties, share).sum() == 3 * count


def test_what_is_zero_already_stays_zero() -> None:
    """Pruned before, by whatever method: sparse0 keeps exactly that; a share below adds nothing."""
    rng = np.random.default_rng(2)
    mask = torch.from_numpy(rng.random((48, 260)) < 0.3)
    weight = torch.randn(48, 260) * mask
    for text in ("sparse0-int8", "sparse50-int8", "sparse0-fp16"):
        packed = lath.quantize(weight, text)
        assert torch.equal(packed.mask(), mask), text
    half = lath.quantize(weight, "sparse0-bf16")
    assert torch.equal(half.dequantize(), weight.bfloat16().float())
    dense = lath.quantize(weight, "int8")
    assert torch.equal(lath.quantize(weight, "sparse0-int8").dequantize(), dense.dequantize())


@pytest.mark.parametrize(("text", "bits"), [("int8-g128", 8), ("int4-g64", 4), ("fp16", 16)])
def test_bytes(text: str, bits: int) -> None:
    """A bit for each weight, the kept numbers, 8 bytes for each tile, the scales: all of it."""
    weight = torch.randn(64, 512)
    for share in SHARES:
        packed = lath.quantize(weight, f"sparse{share}-{text}")
        kept = 64 * (512 - 512 * share // 100)
        scales = packed.scales.nbytes if packed.scales is not None else 0
        expected = 64 * 512 // 8 + -(-kept * bits // 8) + 8 * (4 * 4 + 1) + scales
        assert packed.nbytes == expected
        assert packed.bits_per_weight == 8 * expected / (64 * 512)
        assert packed.view_nbytes == 0
    empty = SparseTensor.empty(SparseCodec.parse(f"sparse50-{text}"), (64, 512), "cpu")
    assert empty.nbytes == lath.quantize(weight, f"sparse50-{text}").nbytes


def test_fidelity() -> None:
    """Far less is lost than with a random half of a row, and kept numbers are half a step away."""
    weight = torch.randn(32, 256)
    packed = lath.quantize(weight, "sparse50-int8")
    lost = (weight - packed.dequantize()).square().sum()
    random = torch.argsort(torch.rand(32, 256), dim=1) < 128
    assert lost < (weight * ~random).square().sum() / 4
    mask, scales = packed.mask(), packed.scales[0, :32].float()[:, None]
    error = (weight - packed.dequantize()).abs()
    # Half a step, and at the end of the range, 127.5 steps away, the rounding of the fp16 scale.
    most = (0.5 + 127.5 * 2**-11) * scales
    assert bool((error[mask] <= most.expand(32, 256)[mask]).all())
    assert torch.equal(packed.dequantize()[~mask], torch.zeros(int((~mask).sum())))


CORRUPTIONS = {
    "offsets": lambda t: t.offsets.__setitem__(2, t.offsets[2] + 1),
    "last offset": lambda t: t.offsets.__setitem__(-1, t.offsets[-1] - 1),
    "bitmap": lambda t: t.bitmap.__setitem__((0, 1, 3, 2), t.bitmap[0, 1, 3, 2] ^ 64),
    "padded row": lambda t: (
        t.bitmap.__setitem__((1, 0, 15, 0), 1),
        t.offsets.__setitem__(slice(4, None), t.offsets[4:] + 1),
    ),
    "padded column": lambda t: (
        t.bitmap.__setitem__((0, 2, 0, 3), 1 << 20),
        t.offsets.__setitem__(slice(3, None), t.offsets[3:] + 1),
    ),
    "scales": lambda t: t.scales.__setitem__((0, 3), -1.0),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_tensors_are_refused(name: str) -> None:
    weight = make_weight("sparse50-int8", 24, 300, np.random.default_rng(3))
    weight.check_values()
    CORRUPTIONS[name](weight)
    match = {"offsets": "offsets", "last offset": "offsets", "bitmap": "offsets"}.get(
        name, "padding" if "padded" in name else "scales"
    )
    with pytest.raises(ValueError, match=match):
        weight.check_values()
    with pytest.raises(ValueError, match=match):
        SparseTensor.from_state_dict(weight.state_dict())


def test_codes_too_few_or_too_many_are_refused() -> None:
    for text in ("sparse50-int8", "sparse50-int4", "sparse50-bf16"):
        weight = make_weight(text, 24, 300, np.random.default_rng(4))
        for codes in (weight.codes[:-1], torch.cat([weight.codes, weight.codes[:1]])):
            other = SparseTensor.from_tensors(
                weight.codec, weight.shape, {**weight.tensors, "codes": codes.clone()}
            )
            with pytest.raises(ValueError, match="codes of a sparse50"):
                other.check_values()
            with pytest.raises(ValueError, match="codes of a sparse50"):
                other.numbers()


def test_numbers_that_are_none_are_refused() -> None:
    weight = torch.randn(16, 64)
    weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        lath.quantize(weight, "sparse50-int8")
    weight[3, 5] = 1e5
    with pytest.raises(ValueError, match="overflows fp16"):
        lath.quantize(weight, "sparse50-fp16")
    with pytest.raises(ValueError, match="search is for codecs with scales"):
        lath.quantize(weight, "sparse50-bf16", search=True)
    weight = make_weight("sparse0-fp16", 16, 256, np.random.default_rng(5), "integers")
    weight.codes[3] = torch.nan
    with pytest.raises(ValueError, match="codes of a sparse0-fp16 must be finite"):
        weight.check_values()


@pytest.mark.parametrize("text", ["sparse50-int8-g64", "sparse70-int4", "sparse50-fp16"])
@pytest.mark.parametrize("activations", ["float", "int8", "int8-g32"])
def test_sparse_is_dense_of_the_decoded_weights(text: str, activations: str) -> None:
    """The verb's definition against torch in float64."""
    weight = lath.quantize(torch.randn(24, 200), text)
    x, bias = torch.randn(3, 200), torch.randn(24)
    y = lath.linear(x, weight, bias, activations=activations, backend="reference")
    codes = x.double()
    if activations != "float":
        size = 32 if activations == "int8-g32" else 200
        groups = torch.nn.functional.pad(codes, (0, -200 % size)).reshape(3, -1, size)
        scale = groups.abs().amax(dim=2, keepdim=True) / 127
        codes = (torch.round(groups / scale) * scale).reshape(3, -1)[:, :200]
    expected = codes @ weight.dequantize().double().T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_blocks_of_zeros(backend: str) -> None:
    """Blocks that a pruning method emptied, a whole row of them too: they equal the dense product
    and cost their bits of the bitmap and an offset."""
    full = torch.randn(48, 384)
    present = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    weight = full * present.repeat_interleave(16, dim=0).repeat_interleave(128, dim=1)
    packed = lath.quantize(weight, "sparse0-bf16")
    assert packed.nbytes == 48 * 384 // 8 + 8 * (9 + 1) + 3 * 16 * 128 * 2
    x = torch.randn(3, 384)
    y = lath.linear(x, packed, backend=backend)
    expected = x.double() @ weight.bfloat16().double().T
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(y[:, 16:32], torch.zeros(3, 16))
