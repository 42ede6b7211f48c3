"""Sums of packed weights: mixed widths, pairs of signs, the saved form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases_sums import TEXTS, error_of, heavy_weight, make_sum

import lath
from lath.formats.activations import activation_format
from lath.formats.codec import Codec
from lath.formats.families import weight_codec
from lath.formats.qtensor import QTensor
from lath.formats.sum_codec import MixCodec, SumCodec
from lath.formats.sum_tensor import SumTensor
from lath.reference import codecs as reference_codecs
from lath.verbs.kinds import kind_of
from lath.verbs.quantize import _quantize
from lath.verbs.sum_quantize import two_signs

# Mixed widths


@pytest.mark.parametrize("columns", [0, 16, 100, 128, 640, 4096, 4100])
@pytest.mark.parametrize(
    "text", ["mix2-g64", "mix2.5-g64", "mix2:4-2.25-g128", "mix1:8-3-g16", "mix6.75-g32"]
)
def test_groups_follow_from_the_codec_and_the_width(text: str, columns: int) -> None:
    codec = MixCodec.parse(text)
    assert codec is not None
    counts = codec.group_counts(columns)
    groups = -(-columns // codec.group)
    assert sum(counts) == groups
    assert min(counts) >= 0
    terms = codec.terms(columns)
    assert [t.columns[0] for t in terms[1:]] == [t.columns[1] for t in terms[:-1]]  # type: ignore[index]
    assert terms[-1].columns[1] == columns  # type: ignore[index]
    mean = sum(w * c for w, c in zip(codec.widths, counts, strict=True)) / max(groups, 1)
    if len(counts) == 3:
        assert counts[0] == counts[2]
        assert mean == codec.mean or not groups
    elif groups:
        step = codec.widths[1] - codec.widths[0]
        assert abs(mean - codec.mean) <= step / 2 / groups


@pytest.mark.parametrize(("text", "mean"), [("mix2-g128", 2), ("mix2.5-g128", 2.5),
                                            ("mix2:4-2.25-g128-s8", 2.25)])  # fmt: skip
def test_mean_bits_are_those_of_the_bytes(text: str, mean: float) -> None:
    """SliM-LLM, Fast 2-bit: the packed codes are exactly so many bits, scales counted beside."""
    packed = make_sum(text, 32, 2048)
    codes = sum(term.codes.nbytes for term in packed.terms)
    assert 8 * codes == mean * 32 * 2048
    sides = sum(t.nbytes for n, t in packed.tensors.items() if "codes" not in n)
    assert packed.nbytes == codes + sides
    scale = 8 if "s8" in text else 16
    outer = 2 * 16 * 32 if "s8" in text else 0
    assert 8 * sides == 32 * 16 * scale + outer + 32 * 2048


@pytest.mark.parametrize("widths", list(itertools.combinations(range(1, 9), 2)))
def test_every_pair_of_widths_round_trips(widths: tuple[int, int]) -> None:
    """Codes of every level come back in the columns that they were taken from."""
    low, high = widths
    text = f"mix{low}:{high}-{low + 0.5 * (high - low):g}-g16"
    if high == low + 1:
        text = f"mix{low}.5-g16"
    packed = make_sum(text, 20, 144, seed=low * 8 + high)
    state = packed.state_dict()
    again = lath.load_weight(state)
    assert isinstance(again, SumTensor)
    assert str(again.codec) == text
    assert torch.equal(again.dequantize(), packed.dequantize())
    for index, term in enumerate(packed.terms):
        assert isinstance(term, QTensor)
        own = packed.columns_of(index)
        assert own is not None
        weight = heavy_weight(20, 144, seed=low * 8 + high)[:, own.long()]
        q = reference_codecs.quantize(weight.numpy(), term.codec)
        assert np.array_equal(term.unpack_codes().numpy(), q.codes)


def test_wide_groups_are_those_that_need_them() -> None:
    weight = torch.randn(24, 512) * 0.1
    weight[:, 64:96] *= 30
    weight[:, 320:352] *= 20
    packed = make_sum_of(weight, "mix2:4-2.25-g32")
    assert packed.columns_of(1).tolist() == [*range(64, 96), *range(320, 352)]  # type: ignore[union-attr]
    # SliM-LLM by the inputs: the least important groups give their bit to the most important.
    inputs = torch.ones(512)
    inputs[96:160] = 1e4
    inputs[0:64] = 1e-6
    packed = make_sum_of(torch.randn(24, 512), "mix2-g64", importance=inputs)
    assert set(packed.columns_of(2).tolist()) & set(range(96, 160))  # type: ignore[union-attr]
    assert packed.columns_of(0).tolist() == [*range(0, 64)]  # type: ignore[union-attr]


PAIRED = ["mix3-g16", "mix2-g32-asym", "int2-g32+mix2-g16", "mix3-g16+out1%"]


@pytest.mark.parametrize("columns", [256, 250])
@pytest.mark.parametrize("text", PAIRED)
def test_the_searched_share_is_the_best_of_all(text: str, columns: int) -> None:
    """SliM-LLM: by trying every number of pairs, so never worse than the fixed eighth."""
    weight, codec = heavy_weight(20, columns, 3), SumCodec.parse(text)
    costs = torch.from_numpy(np.random.default_rng(0).random((20, columns)))
    importance = costs.float()

    def error(one: SumTensor) -> float:
        # Of outliers' values there is nothing to choose.
        left = (one.dequantize() - weight).double()
        if codec.outliers is not None:
            left.view(-1)[one.terms[-1].places()] = 0  # type: ignore[attr-defined]
        return float((importance * left.square()).sum())

    found = make_sum_of(weight, text, search=True, importance=importance)
    assert isinstance(found.codec, SumCodec)
    assert found.codec.opened == codec
    assert not found.codec.is_open
    groups = -(-columns // next(p for p in codec.parts if isinstance(p, MixCodec)).group)
    kernel = kind_of(codec).function("quantize", "quantize")
    errors = [
        error(kernel(weight, codec.with_pairs(pairs), True, None, importance))
        for pairs in range(groups // 2 + 1)
    ]
    fixed = error(kernel(weight, codec, True, None, importance))
    best = error(found)
    assert best <= fixed * (1 + 1e-9)
    assert best == pytest.approx(min(errors), rel=1e-6)
    assert fixed in errors


def test_a_share_is_found_where_groups_differ_and_where_they_do_not() -> None:
    """A bit less costs four times the error: half of the groups far larger, and all pairs pay;
    all alike, and none does. Either way the fixed eighth is worse."""
    torch.manual_seed(0)
    alike = torch.randn(32, 512)
    unlike = alike * torch.tensor([1.0, 100.0]).repeat_interleave(32).repeat(8)
    for weight, pairs in ((unlike, 8), (alike, 0)):
        fixed = make_sum_of(weight, "mix3-g32")
        found = make_sum_of(weight, "mix3-g32", search=True)
        assert str(found.codec) == f"mix3-p{pairs}-g32"
        assert found.codes.nbytes + sum(t.codes.nbytes for t in found.terms[1:]) == 3 * 32 * 512 / 8
        share = make_sum_of(weight, "mix3-p2-g32", search=True)
        assert error_of(found, weight) < 0.97 * error_of(share, weight)
        assert torch.equal(make_sum_of(weight, "mix3-p2-g32").dequantize(), fixed.dequantize())
        again = lath.load_weight(found.state_dict())
        assert torch.equal(again.dequantize(), found.dequantize())
    # Nothing is open: the codec stays.
    for text in ("mix2.5-g32", "mix3-p1-g32"):
        assert str(make_sum_of(alike, text, search=True).codec) == text


def make_sum_of(weight: torch.Tensor, text: str, **options: object) -> SumTensor:
    packed = lath.quantize(weight, text, **options)  # type: ignore[arg-type]
    assert isinstance(packed, SumTensor)
    return packed


@pytest.mark.parametrize("text", ["mix2-g32", "mix2:4-2.25-g32", "mix3.5-g16-asym"])
def test_mixed_is_nearer_than_uniform_where_groups_differ(text: str) -> None:
    weight = heavy_weight(64, 512) * torch.exp(2 * torch.randn(16)).repeat_interleave(32)
    bits = {"mix2-g32": 2, "mix2:4-2.25-g32": 2, "mix3.5-g16-asym": 3}[text]
    group, rest = (16, "-asym") if "asym" in text else (32, "")
    uniform = lath.quantize(weight, f"int{bits}-g{group}{rest}")
    assert error_of(make_sum_of(weight, text), weight) < error_of(uniform, weight)


@pytest.mark.parametrize("text", ["mix2-g32", "mix2.5-g16", "mix2:4-2.25-g64+out1%"])
def test_the_order_of_groups_does_not_matter(text: str) -> None:
    """Groups of weight and x moved together: each keeps its width, and y is the same."""
    group = int(text.split("-g")[1].split("+")[0])
    weight, x = heavy_weight(20, 512), torch.randn(3, 512)
    moved = torch.randperm(512 // group)[:, None] * group + torch.arange(group)
    moved = moved.reshape(-1)
    assert not torch.equal(moved, torch.arange(512))
    one, two = make_sum_of(weight, text), make_sum_of(weight[:, moved], text)
    assert torch.equal(one.dequantize()[:, moved], two.dequantize())
    for activations in ("float", f"int8-g{group}"):
        fmt = activation_format(activations)
        first = kind_of(one).reference(x.numpy(), one, None, fmt)
        second = kind_of(two).reference(x[:, moved].numpy(), two, None, fmt)
        np.testing.assert_allclose(first, second, rtol=1e-11, atol=1e-11)


# Signs


def test_a_mask_between_two_scales_is_two_sums_of_signs() -> None:
    """s (lo + m (hi - lo)) = (hi + lo)/2 s + (hi - lo)/2 s (2m - 1): exactly, in whole numbers."""
    rng = np.random.default_rng(4)
    sign, mask = rng.choice([-1, 1], (9, 40)), rng.integers(0, 2, (9, 40))
    low, high = rng.integers(0, 50, (2, 9, 1)) * 2
    split = sign * (low + mask * (high - low))
    first, second = (high + low) // 2 * sign, (high - low) // 2 * sign * (2 * mask - 1)
    assert np.array_equal(split, first + second)


@pytest.mark.parametrize("split", [False, True])
def test_two_signs_by_brute_force(split: bool) -> None:
    """The scales of a group against all break points, or the mean and the mean of what it leaves;
    every weight gets the nearer of the two numbers of its sign."""
    weight = heavy_weight(6, 48, 5)
    codec = Codec.parse("int1-g16")
    one, two = two_signs(weight, codec, split)
    decoded = (one.dequantize() + two.dequantize()).double().numpy()
    for n, g in itertools.product(range(6), range(3)):
        block = weight[n, 16 * g : 16 * g + 16].double().numpy()
        size = np.sort(np.abs(block))
        errors = []
        for cut in range(1, 16):
            parts = (size[:cut], size[cut:])
            errors.append(sum(((p - p.mean()) ** 2).sum() for p in parts))
        if split:
            low, high = (p.mean() for p in np.split(size, [1 + int(np.argmin(errors))]))
            first, second = (high + low) / 2, (high - low) / 2
        else:
            first = size.mean()
            second = np.abs(size - first).mean()
        stored = [float(t.scales[g, n]) / 2 for t in (one, two)]
        np.testing.assert_allclose(stored, [first, second], rtol=2.0**-10, atol=2.0**-23)
        sign = np.where(block >= 0, 1, -1)[:, None]
        numbers = sign * np.array([stored[0] - stored[1], stored[0] + stored[1]])
        nearer = np.abs(block[:, None] - numbers).argmin(axis=1)
        best = numbers[np.arange(16), nearer]
        own = decoded[n, 16 * g : 16 * g + 16]
        np.testing.assert_allclose(np.abs(own - block), np.abs(best - block), rtol=1e-5, atol=1e-7)


def test_second_signs_lower_the_error_and_a_split_more() -> None:
    weight = heavy_weight(32, 256)
    once = lath.quantize(weight, "int1-g128")
    twice = lath.quantize(weight, "int1-g128+int1-g128")
    assert error_of(twice, weight) < error_of(once, weight)
    one, two = two_signs(weight, Codec.parse("int1-g128"), False)
    assert torch.equal(twice.terms[0].codes, one.codes)  # type: ignore[attr-defined]
    assert torch.equal(twice.terms[1].scales, two.scales)  # type: ignore[attr-defined]
    left, right = two_signs(weight, Codec.parse("int1-g128"), True)
    split = (left.dequantize() + right.dequantize() - weight).norm() / weight.norm()
    assert float(split) < error_of(twice, weight)
    # Salient columns with scales of their own, at their residual and at the better of both.
    salient, better = (
        error_of(lath.quantize(weight, "billm10%-g128", search=search), weight)
        for search in (False, True)
    )
    assert better < salient
    assert better < float(split)


def test_the_mask_is_counted() -> None:
    """Two bits a weight, whatever a paper calls one: a mask costs what a second sign does."""
    packed = make_sum("billm25%-g128", 32, 2048)
    codes = sum(term.codes.nbytes for term in packed.terms)
    assert 8 * codes == 2 * 32 * 2048
    assert packed.bits_per_weight == 2 + 2 * 16 / 128 + 32 / 32
    assert make_sum("int1-g128+int1-g128", 32, 2048).bits_per_weight == 2 + 2 * 16 / 128


def test_salient_columns_are_found() -> None:
    weight = torch.randn(24, 160)
    weight[:, [7, 80, 150]] *= 10
    packed = make_sum_of(weight, "billm2%-g16")
    assert packed.columns[:3].tolist() == [7, 80, 150]  # type: ignore[index]
    inputs = torch.ones(160)
    inputs[[3, 90, 91]] = 1e6
    packed = make_sum_of(weight, "billm2%-g16", importance=inputs)
    assert packed.columns[:3].tolist() == [3, 90, 91]  # type: ignore[index]


# The saved form


@pytest.mark.parametrize("text", TEXTS)
def test_saved_and_loaded(text: str) -> None:
    packed = make_sum(text)
    state = packed.state_dict()
    again = lath.load_weight(state)
    assert again.digest() == packed.digest()
    assert torch.equal(again.dequantize(), packed.dequantize())
    for name, tensor in packed.tensors.items():
        if not tensor.numel():
            continue
        damaged = {**state, name: tensor.clone()}
        damaged[name].view(torch.uint8).reshape(-1)[0] ^= 1
        with pytest.raises(ValueError, match=r"corrupted|must"):
            lath.load_weight(damaged)
    with pytest.raises(ValueError, match="missing"):
        lath.load_weight({n: t for n, t in state.items() if n != "scales_1" and n != "values_1"})


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("columns", lambda t: t.fill_(0), "each of 0 to 199 once"),
        ("columns", lambda t: t.add_(1), "each of 0 to 199 once"),
        ("codes_2", lambda t: t.fill_(200), "columns below 200"),
        ("codes_2", lambda t: t.fill_(-1), "columns below 200"),
        ("codes_2", lambda t: t.fill_(3), "ascend in each row"),
        ("offsets_2", lambda t: t.fill_(0), "ascend from 0"),
        ("offsets_2", lambda t: t[1].fill_(99999), "ascend from 0"),
        ("values_2", lambda t: t.fill_(torch.inf), "finite"),
    ],
)
def test_tensors_that_no_quantiser_writes(name: str, change: object, match: str) -> None:
    """Refused although the digest is theirs: kernels follow columns and offsets blindly."""
    packed = make_sum("mix2.5-g32+out2%")
    tensors = {n: t.clone() for n, t in packed.tensors.items()}
    change(tensors[name])  # type: ignore[operator]
    wrong = SumTensor.from_tensors(packed.codec, packed.shape, tensors)
    with pytest.raises(ValueError, match=match):
        lath.load_weight(wrong.state_dict())


def test_terms_of_another_shape_are_refused() -> None:
    packed = make_sum("mix2.5-g32")
    tensors = packed.tensors
    with pytest.raises(ValueError, match="columns"):
        SumTensor(packed.codec, packed.shape, list(packed.terms), packed.columns[:-1])  # type: ignore[index]
    with pytest.raises(ValueError, match="columns"):
        SumTensor(packed.codec, packed.shape, list(packed.terms))
    with pytest.raises(ValueError, match="terms"):
        SumTensor(packed.codec, packed.shape, list(packed.terms[:1]), packed.columns)
    with pytest.raises(ValueError, match="unknown"):
        SumTensor.from_tensors(packed.codec, packed.shape, {**tensors, "zeros": tensors["codes"]})


@pytest.mark.parametrize("shape", [(0, 64), (16, 0), (1, 1), (3, 17), (5, 33)])
@pytest.mark.parametrize("text", TEXTS)
def test_small_and_empty_weights(text: str, shape: tuple[int, int]) -> None:
    weight = torch.rand(shape) + 0.5
    packed = lath.quantize(weight, text)
    assert tuple(packed.dequantize().shape) == shape
    packed.check_values()
    y = lath.linear(torch.randn(2, shape[1]), packed, backend="reference")
    assert tuple(y.shape) == (2, shape[0])


@pytest.mark.parametrize("text", ["int4-g64+out1%", "mix2-g16", "billm10%-g64"])
def test_sizes_are_known_before_the_numbers(text: str) -> None:
    """The operator's fake, `empty` and the quantiser agree; so does torch's own check."""
    weight = heavy_weight(21, 150)
    torch.library.opcheck(_quantize, (weight, text, False, None, None))
    packed, codec = lath.quantize(weight, text), weight_codec(text)
    empty = SumTensor.empty(codec, (21, 150))  # type: ignore[arg-type]
    assert {n: (t.shape, t.dtype) for n, t in packed.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in empty.tensors.items()
    }
    assert empty.nbytes == packed.nbytes
