"""Vector codebooks: text forms, packed indices, k-means, the definition and torch, saving."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cases_vectors import answer, decode, make_weight
from test_cpu_processes import LOWERINGS, run_lowered
from torch import nn

import lath
from lath.formats.families import GRAMMAR_TABLE, family_of_text, weight_codec
from lath.formats.lattice import LatticeTensor
from lath.formats.vectors import VECTOR_GRAMMAR, VectorCodec, VectorTensor, pack_indices
from lath.integration.linear import PackedLinear
from lath.kernels import quantize_vectors
from lath.reference import codecs as reference_codecs
from lath.reference import vectors as definition
from lath.verbs import linear as verb

FORMS = [
    "vq2-16", "vq2-256", "vq4-16", "vq4-256", "vq4-65536", "vq8-256", "vq8-65536", "vq16-65536",
    "vq8-65536+256", "vq4-256+16-g64", "vq16-65536+65536-g32",
]  # fmt: skip


def correlated(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Neighbours along K go together (0.9), rows differ in size."""
    rng = np.random.default_rng(seed)
    weight = np.zeros((rows, columns))
    weight[:, 0] = rng.standard_normal(rows)
    for k in range(1, columns):
        weight[:, k] = 0.9 * weight[:, k - 1] + math.sqrt(0.19) * rng.standard_normal(rows)
    return (weight * 10.0 ** rng.uniform(-2, 1, (rows, 1))).astype(np.float32)


@pytest.mark.parametrize("text", FORMS)
def test_text_forms_round_trip(text: str) -> None:
    codec = weight_codec(text)
    assert isinstance(codec, VectorCodec)
    assert str(codec) == text
    assert eval(repr(codec), {"VectorCodec": VectorCodec}) == codec
    assert set(VECTOR_GRAMMAR) <= set(GRAMMAR_TABLE)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("vq3-256", "vector must be 2, 4, 8 or 16"), ("vq8-16", r"entries .* 65536\], got 16"),
        ("vq8-4096", "entries"), ("vq2-65536", "entries"), ("vq8-256+0", "residual"),
        ("vq8-256+16", "residual"), ("vq8-256-g24", "multiple of 16"), ("vq8", "codec must be vq"),
        ("vq8-256-asym", "codec must be vq"),
    ],
)  # fmt: skip
def test_text_forms_that_are_none(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        weight_codec(text)


def test_other_sums_are_not_claimed() -> None:
    """What is added to a weight of vectors by another kind is that kind's text."""
    for text in ("vq8-256+out1%", "vq8-65536+256+out1%", "lattice2-d8+out1%"):
        assert family_of_text(text).weight not in (VectorTensor, LatticeTensor)
    for text in (*FORMS, "vq8-256+16", "vq"):
        assert family_of_text(text).weight is VectorTensor


@pytest.mark.parametrize("text", FORMS)
def test_indices_are_exact_and_where_the_definition_puts_them(text: str) -> None:
    """Both ends of every book, every place of a word; odd N and K."""
    codec, rng = VectorCodec.parse(text), np.random.default_rng(0)
    rows, columns = 19, 261
    shape = (rows, codec.num_vectors(columns))
    indices = [rng.integers(0, entries, shape) for entries in codec.books]
    for index, entries in zip(indices, codec.books, strict=True):
        index[0, 0], index[-1, -1], index[3, 2], index[18, 0] = 0, entries - 1, entries - 1, 0
    packed = pack_indices([torch.from_numpy(index) for index in indices], codec)
    weight = VectorTensor.empty(codec, (rows, columns), "cpu")
    assert packed.shape == weight.codes.shape
    weight.codes.copy_(packed)
    for found, index in zip(weight.unpack_indices(), indices, strict=True):
        assert np.array_equal(found.numpy(), index)
    words, start = packed.numpy().view(np.uint32), 0
    for width, bits, index in zip(codec.plane_widths, codec.index_bits, indices, strict=True):
        for n, j in itertools.product(range(rows), range(shape[1])):
            word, bit = definition.place(n, j, width, codec, columns)
            assert int(words[start + word]) >> bit & (1 << bits) - 1 == index[n, j]
        start += 32 * 3 * 64 * width // 16


@pytest.mark.parametrize(
    ("text", "bits"),
    [("vq8-256", 1), ("vq8-65536", 2), ("vq8-65536+256", 3), ("vq4-256-g128", 2), ("vq2-16", 2)],
)
def test_bits_per_weight_are_those_of_the_bytes(text: str, bits: int) -> None:
    """Indices exactly, scales, and the books, which a large weight carries better than a small."""
    weight = VectorTensor.empty(weight_codec(text), (512, 1024))  # type: ignore[arg-type]
    codec = weight.codec
    assert 8 * weight.codes.nbytes == bits * 512 * 1024
    scales = 16 * codec.num_groups(1024) * 512
    books = 16 * sum(codec.books) * codec.vector
    assert weight.bits_per_weight == (bits * 512 * 1024 + scales + books) / (512 * 1024)


@pytest.mark.parametrize("text", ["vq2-16", "vq4-256", "vq8-256-g48", "vq4-256+16-g64"])
def test_torch_equals_the_definition(text: str) -> None:
    """Scales bit for bit; books but for rounding, so that the errors agree closely; and an index is
    that of the nearest entry as far as fp32 tells."""
    weight, codec = correlated(37, 203), VectorCodec.parse(text)
    weight[4] = 0
    importance = np.random.default_rng(3).random(203) ** 4
    expected = definition.quantize(weight, codec, importance)
    packed = quantize_vectors.quantize(
        torch.from_numpy(weight), codec, importance=torch.from_numpy(importance)
    )
    assert np.array_equal(packed.scales[:, :37].numpy(), expected.scales)
    losses = []
    for decoded in (
        decode(packed),
        definition.dequantize(expected.indices, expected.scales, expected.books, codec, 203),
    ):
        assert not decoded[4].any()
        losses.append(((decoded - weight) ** 2 * importance).sum())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    # Of the stored book no other entry is nearer.
    wide = expected.scales.astype(np.float64).T[:, np.arange(203) // codec.group_size(203)]
    scaled = np.divide(weight, wide, out=np.zeros(weight.shape), where=wide > 0)
    left = definition.vectors_of(scaled, codec)
    own = definition.vectors_of(
        np.broadcast_to(definition.importance_of(importance, 203), (37, 203)), codec
    )
    first = 0
    for entries, index in zip(codec.books, packed.unpack_indices(), strict=True):
        book = packed.books[first : first + entries].double().numpy()
        distance = (own[:, :, None] * (left[:, :, None] - book) ** 2).sum(axis=-1)
        chosen = np.take_along_axis(distance, index.numpy()[..., None], axis=-1)[..., 0]
        # fp32: three terms a number, cancelled down to the distance.
        slack = 2.0**-20 * (own * (left**2 + (book**2).max())).sum(axis=-1)
        assert (chosen <= distance.min(axis=-1) + slack).all()
        left, first = left - book[index.numpy()], first + entries


def test_the_nearest_entry_of_few_by_brute_force() -> None:
    rng = np.random.default_rng(5)
    vectors, mass = rng.standard_normal((50, 4)), rng.random((50, 4))
    book = rng.standard_normal((16, 4))
    book[9] = book[2]  # of equals the lower index
    expected = [
        min(range(16), key=lambda c: (float((m * (p - book[c]) ** 2).sum().round(12)), c))
        for p, m in zip(vectors, mass, strict=True)
    ]
    assert definition.nearest(vectors, mass, book).tolist() == expected
    assert 9 not in expected
    found = quantize_vectors.nearest(*[torch.from_numpy(a).float() for a in (vectors, mass, book)])
    assert found.tolist() == expected


@pytest.mark.parametrize("entries", [16, 256, 65536])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("way", ["compiled", "torch"])
def test_the_nearest_entry_of_many(
    entries: int, even: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers, so that fp32 tells exactly: several chunks, runs and equals. Vectors whose
    numbers count alike take a shorter way."""
    if way == "torch":
        monkeypatch.setattr(quantize_vectors, "_compiled", lambda: None)
    else:
        pytest.importorskip("numba")
    rng = np.random.default_rng(entries)
    count = 3 * max(16, (1 << 18) // entries) + 5
    vectors = rng.integers(-9, 10, (count, 8)).astype(np.float64)
    mass = rng.integers(1, 4, (count, 1 if even else 8)).repeat(8 if even else 1, axis=1) * 1.0
    book = rng.integers(-9, 10, (entries, 8)).astype(np.float64)
    book[-1], book[entries // 2] = book[0], book[1]
    found = quantize_vectors.nearest(*[torch.from_numpy(a).float() for a in (vectors, mass, book)])
    some = slice(None) if entries < 65536 else slice(0, None, 7)
    expected = definition.nearest(vectors[some], mass[some], book)
    assert np.array_equal(found.numpy()[some], expected)


@pytest.mark.parametrize("name", LOWERINGS)
def test_the_compiled_search_on_other_instruction_sets(name: str) -> None:
    """Any number of terms, of vectors and of threads; a number that is not finite has a place."""
    run_lowered(
        name,
        """
        import numpy as np, torch
        from lath.kernels.quantizers.cpu_nearest import least_products
        rng = np.random.default_rng(1)
        for terms, count, entries in ((2, 1, 16), (3, 200, 256), (9, 77, 300), (33, 50, 40)):
            x, book = (rng.integers(-9, 10, (n, terms)) for n in (count, entries))
            expected = (x @ book.T).argmin(axis=1)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                vectors, rows = (torch.from_numpy(a).float() for a in (x, book))
                assert least_products(vectors, rows).tolist() == expected.tolist()
            vectors[0] = torch.nan
            assert least_products(vectors, rows)[0] == 0
            assert len(least_products(vectors[:0], rows)) == 0
        """,
    )


def test_weighted_k_means_beats_scalar_codes_at_equal_bits() -> None:
    """Weights that go with their neighbours: 2 bits each by vectors, less than half the error."""
    weight = correlated(128, 512)
    per_row = (weight.astype(np.float64) ** 2).mean(axis=1, keepdims=True)

    def loss(decoded: np.ndarray, share: np.ndarray | float = 1.0) -> float:
        return float(((decoded - weight) ** 2 * share / per_row).mean())

    vectors = lath.quantize(torch.from_numpy(weight), "vq4-256")
    codec = reference_codecs.Codec.parse("int2")
    scalar = lath.quantize(torch.from_numpy(weight), codec, search=True)
    assert loss(vectors.dequantize().numpy()) < 0.5 * loss(scalar.dequantize().numpy())
    # The books cost what is not yet a tenth of a bit at a layer's size; indices are 2 bits exactly.
    assert 8 * vectors.tensors["codes"].nbytes == 8 * scalar.tensors["codes"].nbytes
    # Negative control: of weights that know nothing of one another less is gained.
    shuffled = np.random.default_rng(1).permuted(weight, axis=1)
    gain = loss(scalar.dequantize().numpy()) / loss(vectors.dequantize().numpy())
    alone = torch.from_numpy(shuffled)
    errors = []
    for text, search in (("int2", True), ("vq4-256", False)):
        decoded = lath.quantize(alone, text, search=search).dequantize()
        errors.append(float(((decoded - alone).numpy() ** 2 / per_row).mean()))
    assert errors[0] / errors[1] < 0.75 * gain


def test_importance_moves_the_error_where_it_counts_less() -> None:
    weight = correlated(64, 256, seed=2)
    importance = np.where(np.arange(256) % 4 < 2, 1.0, 0.05)
    errors = []
    for share in (None, torch.from_numpy(importance).float()):
        packed = lath.quantize(torch.from_numpy(weight), "vq4-256", importance=share)
        scaled = (packed.dequantize().numpy() - weight) / np.abs(weight).max(axis=1, keepdims=True)
        errors.append((scaled**2).mean(axis=0))
    assert (errors[1] * importance).sum() < 0.8 * (errors[0] * importance).sum()
    assert errors[1].sum() > errors[0].sum()
    # The verb adds nothing of its own.
    again = quantize_vectors.quantize(torch.from_numpy(weight), packed.codec, importance=share)  # type: ignore[arg-type]
    assert packed.digest() == again.digest()


def test_one_seed_gives_one_weight() -> None:
    weight, codec = torch.from_numpy(correlated(32, 128)), VectorCodec.parse("vq4-256")
    first, again, other = (quantize_vectors.quantize(weight, codec, seed=s) for s in (0, 0, 1))
    assert first.digest() == again.digest() != other.digest()


def test_few_vectors_are_their_own_entries() -> None:
    """Fewer vectors than entries: each decodes to itself, rounded to fp16."""
    weight = torch.from_numpy(correlated(16, 32))
    packed = lath.quantize(weight, "vq8-256")
    # Two roundings to fp16 (the entry; the scale is the number that w was divided by).
    torch.testing.assert_close(packed.dequantize(), weight, rtol=2.0**-10, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 40), (3, 0), (1, 1), (17, 9)])
def test_any_shape(shape: tuple[int, int]) -> None:
    packed = lath.quantize(torch.randn(shape), "vq8-256-g16")
    assert packed.dequantize().shape == shape
    y = lath.linear(torch.randn(2, shape[1]), packed, backend="reference")
    assert y.shape == (2, shape[0])


def test_what_is_refused() -> None:
    weight = torch.randn(16, 32)
    for bad in (math.nan, math.inf):
        broken = weight.clone()
        broken[3, 5] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            lath.quantize(broken, "vq8-256")
        with pytest.raises(ValueError, match="NaN or infinity"):
            definition.quantize(broken.numpy(), VectorCodec.parse("vq8-256"))
    with pytest.raises(ValueError, match="overflows fp16"):
        lath.quantize(weight * 1e6, "vq8-256")
    with pytest.raises(ValueError, match="search must be False"):
        lath.quantize(weight, "vq8-256", search=True)
    with pytest.raises(ValueError, match="table is for"):
        lath.quantize(weight, "vq8-256", table=torch.arange(4.0))
    codec = VectorCodec.parse("vq8-256")
    with pytest.raises(ValueError, match=r"importance must be 32 .* got shape \[16, 32\]"):
        lath.quantize(weight, "vq8-256", importance=torch.ones(16, 32))
    for share in (torch.zeros(32), torch.ones(31), -torch.ones(32), torch.full((32,), math.nan)):
        with pytest.raises(ValueError, match="importance"):
            quantize_vectors.quantize(weight, codec, importance=share)
        with pytest.raises(ValueError, match="importance"):
            lath.quantize(weight, "vq8-256", importance=share)
        with pytest.raises(ValueError, match="importance"):
            definition.quantize(weight.numpy(), codec, share.double().numpy())


def test_stored_tensors_are_checked() -> None:
    weight = make_weight("vq8-256+256-g16", 20, 70, np.random.default_rng(0))
    weight.scales[:, 20:] = 0
    state = weight.state_dict()
    loaded = lath.load_weight(state)
    assert torch.equal(loaded.dequantize(), weight.dequantize())
    with pytest.raises(ValueError, match="corrupted"):
        lath.load_weight({**state, "codes": state["codes"] ^ 1})
    for name, bad, match in (
        ("books", torch.empty(0, 8, dtype=torch.float16), r"books of .* must be .*\[512, 8\]"),
        ("books", torch.full((512, 8), math.nan).half(), "books of .* must be finite"),
        ("scales", -weight.scales - 1, "scales of .* not negative"),
    ):
        with pytest.raises(ValueError, match=match):
            VectorTensor.from_state_dict({**state, name: bad})
    with pytest.raises(ValueError, match=r"missing .*'books'"):
        VectorTensor.from_tensors(weight.codec, weight.shape, {"codes": weight.codes})


def test_the_layer_round_trip_and_the_operator() -> None:
    torch.manual_seed(2)
    source = nn.Linear(80, 40)
    module = PackedLinear.from_linear(source, "vq4-256-g16", "int8-g16", backend="reference")
    x = torch.randn(3, 80)
    other = PackedLinear(80, 40, codec="vq4-256-g16", activations="int8-g16", backend="reference")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert "weight_books" in module.state_dict()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
    packed = module.qtensor
    data = answer(x, packed, module.bias, "int8-g16")  # type: ignore[arg-type]
    np.testing.assert_allclose(module(x).detach().double().numpy(), data.y64, rtol=1e-6, atol=1e-6)
    torch.library.opcheck(
        verb._operator,
        (x.requires_grad_(), list(packed.tensors.values()), module.bias, "vq4-256-g16", 40, 80,
         "float", "reference"),
    )  # fmt: skip
