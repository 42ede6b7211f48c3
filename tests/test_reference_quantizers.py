"""The definitions of GPTQ, AWQ and HQQ against other ways to the same numbers, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lath.formats.codec import Codec
from lath.formats.quantizer import AWQ, GPTQ, HQQ
from lath.reference import codecs
from lath.reference import quantizers as reference

CODECS = [
    "int4-g32", "int3-g48-asym", "int2-g16-fzero", "int1-g16", "int8", "ternary-g32", "nf4-g64",
    "lut3-g32", "mxfp4", "nvfp4", "int4-g64-s8", "e4m3",
]  # fmt: skip


def make(rows: int = 9, columns: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the Hessian of correlated inputs, some much larger than others."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    mix = np.eye(columns) + rng.standard_normal((columns, columns)) / columns**0.5
    x = rng.standard_normal((4 * columns, columns)) @ mix * np.exp(rng.normal(size=columns))
    return weight, x.T @ x


def decoded(q: codecs.Quantised, codec: Codec) -> np.ndarray:
    return codecs.dequantize(q.codes, q.scales, q.zeros, codec, q.outer, q.table)


@pytest.mark.parametrize("text", CODECS)
def test_without_correlation_gptq_is_round_to_nearest(text: str) -> None:
    weight, _ = make()
    codec = Codec.parse(text)
    diagonal = np.diag(np.random.default_rng(1).uniform(0.1, 10, 80))
    for hessian, act_order in itertools.product((np.eye(80), diagonal), (True, False)):
        nearest = reference.start_of(weight, codec, hessian)
        if codec.values != "learned":
            assert np.array_equal(nearest.codes, codecs.quantize(weight, codec).codes)
        got = reference.gptq(weight, codec, hessian, GPTQ(act_order=act_order))
        assert np.array_equal(got.codes, nearest.codes)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("text", CODECS)
def test_gptq_is_optimal_brain_quantisation_in_a_fixed_order(text: str, act_order: bool) -> None:
    """No factorisation: after each column the rest is set to its exact least-squares optimum.

    The weights left minimise tr(E H Eᵀ) given the errors E made so far: for each row they solve
    H[left, left] e_left = -H[left, done] e_done.
    """
    weight, hessian = make(5, 24)
    codec, options = Codec.parse(text), GPTQ(act_order=act_order)
    start = reference.start_of(weight, codec, hessian)
    scale, zero = reference.sides(start, codec, 24)
    entries = codecs.entries_of(codec, start.table)
    spread = hessian + 0.01 * np.diag(hessian).mean() * np.eye(24)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(24)
    errors = np.zeros(weight.shape)
    codes = np.zeros(weight.shape, np.uint8)
    for i, k in enumerate(order):
        done, left = order[:i], order[i:]
        if i:
            errors[:, left] = -np.linalg.solve(
                spread[np.ix_(left, left)], spread[np.ix_(left, done)] @ errors[:, done].T
            ).T
        value = weight[:, k] + errors[:, k]
        one = slice(k, k + 1)
        codes[:, one] = reference.nearest_code(
            value[:, None], scale[:, one], zero[:, one], codec, entries
        )
        now = decoded(start._replace(codes=codes), codec)
        errors[:, k] = now[:, k] - weight[:, k]
    got = reference.gptq(weight, codec, hessian, options)
    assert np.array_equal(got.codes, codes)
    for name in ("scales", "zeros", "outer", "table"):
        own, wanted = getattr(got, name), getattr(start, name)
        assert (own is None and wanted is None) or np.array_equal(own, wanted)


def test_gptq_lowers_the_error_of_the_output() -> None:
    """Where every input is nearly the same number, rounding errors of a row can cancel.

    H = n (J + d I), J all ones: the output is the sum of the weights. To nearest, K errors of up to
    half a step add up like independent ones; GPTQ hands each on, so that what is left of the sum is
    the last column's error alone, below one step. The rest is the d-part, in which no code errs by
    more than a step (its target moves by less than the half step of the one before). So GPTQ <=
    step² (1 + d K), while to nearest is about K step² / 12 = 21 step² here.
    """
    columns, d = 256, 1e-4
    rng = np.random.default_rng(4)
    weight = rng.uniform(-1, 1, (32, columns)).astype(np.float32)
    codec = Codec.parse("int4-s32")
    hessian = np.ones((columns, columns)) + d * np.eye(columns)
    nearest = codecs.quantize(weight, codec)
    got = reference.gptq(weight, codec, hessian, GPTQ(damping=0.0))
    step = codecs.effective_scales(nearest.scales, None, codec)[0][:, None]
    losses = [
        (((decoded(q, codec) - weight) / step) @ hessian * (decoded(q, codec) - weight) / step)
        .sum(axis=1).mean()
        for q in (nearest, got)
    ]  # fmt: skip
    assert losses[1] <= 1 + d * columns
    assert losses[0] > columns / 12 / 2


def test_a_table_is_learned_for_the_columns_that_count() -> None:
    """Half of the columns hold one set of numbers and carry all the input, half another."""
    rng = np.random.default_rng(3)
    important, other = np.array([-1, -0.5, 0, 1.0]), np.array([-0.8, -0.3, 0.2, 0.7])
    weight = np.where(
        np.arange(64) % 2, rng.choice(other, (48, 64)), rng.choice(important, (48, 64))
    )
    weight = weight.astype(np.float32)
    square = np.where(np.arange(64) % 2, 1e-6, 1.0)
    codec = Codec.parse("lut2-g32")
    got = reference.start_of(weight, codec, np.diag(square))
    # The other half counts a millionth: it moves an entry by at most a millionth of its distance.
    np.testing.assert_allclose(got.table, important, atol=4e-6)
    assert np.abs(reference.start_of(weight, codec, np.eye(64)).table - important).max() > 0.01


def test_the_order_of_columns_is_an_order_only() -> None:
    """Permuting the columns of weight and Hessian permutes the codes, with act-order."""
    weight, hessian = make(6, 32)
    codec = Codec.parse("int3")
    permutation = np.random.default_rng(2).permutation(32)
    got = reference.gptq(weight, codec, hessian, GPTQ())
    moved = reference.gptq(
        weight[:, permutation], codec, hessian[np.ix_(permutation, permutation)], GPTQ()
    )
    assert np.array_equal(got.codes[:, permutation], moved.codes)
    plain = reference.gptq(weight, codec, hessian, GPTQ(act_order=False))
    assert not np.array_equal(plain.codes, got.codes)


def test_the_unit_of_the_hessian_does_not_matter() -> None:
    weight, hessian = make()
    codec = Codec.parse("int4-g16")
    got = [reference.gptq(weight, codec, hessian * 4.0**e, GPTQ()).codes for e in (-20, 0, 20)]
    assert np.array_equal(got[0], got[1])
    assert np.array_equal(got[1], got[2])


def test_a_singular_hessian_is_refused() -> None:
    weight, _ = make(4, 32)
    x = np.random.default_rng(0).standard_normal((8, 32))  # rank 8 of 32
    with pytest.raises(ValueError, match=r"singular.*damping 0.0"):
        reference.gptq(weight, Codec.parse("int4"), x.T @ x, GPTQ(damping=0.0))
    reference.gptq(weight, Codec.parse("int4"), x.T @ x, GPTQ())
    with pytest.raises(ValueError, match="singular"):
        reference.gptq(weight, Codec.parse("int4"), np.zeros((32, 32)), GPTQ())


@pytest.mark.parametrize(
    "text", ["int4-g16-fzero", "int3-g48-fzero", "int2-fzero", "int1-g16-fzero"]
)
def test_hqq_never_loses_and_splits_as_it_says(text: str) -> None:
    rng = np.random.default_rng(6)
    weight = rng.standard_t(2, (12, 80)).astype(np.float32)  # outliers, which HQQ is made for
    codec, options = Codec.parse(text), HQQ()
    start, got = codecs.quantize(weight, codec), reference.hqq(weight, codec, options)
    assert np.array_equal(start.scales, got.scales)
    size = codec.group_size(80)
    gained = 0
    for g, n in itertools.product(range(codec.num_groups(80)), range(12)):
        own = slice(g * size, (g + 1) * size)
        losses = []
        for q in (start, got):
            r = (weight[n, own] - decoded(q, codec)[n, own]) / float(q.scales[g, n])
            losses.append(float((np.abs(r) ** options.p).sum()))
        assert losses[1] <= losses[0] * (1 + 1e-12)
        gained += losses[1] < losses[0]
    assert gained > 0


def test_the_shrinkage_is_the_first_order_step_of_its_problem() -> None:
    """max(|r| - |r|**(p-1)/b, 0) lowers |e|**p + b/2·p (e - r)² below both e = 0 and e = r, where
    |r| is large against the threshold: what splitting asks of it."""
    p, b = 0.7, 10.0
    r = np.linspace(1, 4, 50)
    e = r - r ** (p - 1) / b

    def cost(e: np.ndarray) -> np.ndarray:
        return np.abs(e) ** p + b * p / 2 * (e - r) ** 2

    assert (cost(e) < cost(r)).all()
    assert (cost(e) < cost(0 * r)).all()


@pytest.mark.parametrize("text", ["int4-g16", "int4-g16-asym", "nf4"])
def test_hqq_without_minima_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"hqq.*{text!r} has none"):
        reference.hqq(make()[0], Codec.parse(text), HQQ())


def test_awq_scales_protect_what_is_large() -> None:
    """A few columns carry nearly all of the input: they get scales above the rest, and the output
    errs less than with no scales; with equal inputs nothing is gained and scales are 1."""
    rng = np.random.default_rng(8)
    weight = rng.standard_normal((16, 64)).astype(np.float32)
    codec = Codec.parse("int3-g32")
    size = np.where(np.arange(64) % 16 == 3, 30.0, 1.0)
    hessian = np.diag(size**2)
    scales = reference.awq_scales([weight], codec, hessian, AWQ())
    assert scales[size > 1].min() > 1 > scales[size == 1].max()

    def error(s: np.ndarray) -> float:
        q = codecs.quantize((weight * s).astype(np.float32), codec)
        return reference.output_error(decoded(q, codec) / s - weight, hessian)

    assert error(scales) < error(np.ones(64, np.float32))
    # By brute force: no other alpha of the grid is better.
    for step in range(20):
        s = size ** (step / 20)
        assert error(scales) <= error((s / np.sqrt(s.max() * s.min())).astype(np.float32))
    assert (reference.awq_scales([weight], codec, np.eye(64), AWQ()) == 1).all()
    assert (reference.awq_scales([weight], codec, np.zeros((64, 64)), AWQ()) == 1).all()


def test_awq_scales_of_columns_that_share_one() -> None:
    weight, hessian = make(7, 64)
    shared = np.tile(np.arange(32), 2)
    scales = reference.awq_scales([weight], Codec.parse("int3-g16"), hessian, AWQ(), shared)
    assert np.array_equal(scales[:32], scales[32:])
    assert len(np.unique(scales)) > 1
