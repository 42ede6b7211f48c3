"""The compiled step of decoding against its definition, and its small kernels one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lath
from cases_attention import DTYPE_NAMES, as_array, as_cache, as_options

pytest.importorskip("numba")
from test_cpu_processes import LOWERINGS, run_lowered

from lath.formats.activations import ActivationFormat
from lath.formats.attention import ScoreOptions
from lath.formats.decode_step import (
    GATES,
    GELU_CUBIC,
    GELU_SLOPE,
    DecoderLayer,
    DecoderStack,
    Gate,
    Norm,
    Product,
)
from lath.formats.page_step import close_page, count_tokens, is_plain, open_part
from lath.kernels.decode_step import cpu, cpu_bound
from lath.kernels.decode_step.cpu_arguments import STATE, STATE_FIELDS, VECTOR, block_of, float_bits
from lath.kernels.decode_step.cpu_vectors import (
    emit_embed,
    emit_gate,
    emit_largest,
    emit_normalise,
)
from lath.kernels.linear.cpu_kernels import FLOAT_KINDS
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.program import Program, row
from lath.reference import decode_step as reference
from lath.verbs.attention_options import choose_precision, choose_query

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of fp32 arithmetic over some hundred numbers, relative to what is added: products, norms and
# exponentials round at 2**-24 each, and scores of about ten pass an absolute error on.
ROUNDING = 2.0**-15


# The small kernels


def run_vector(emission: Any, *options: int, units: int = 1, **fields: int) -> None:
    block = block_of(VECTOR, **fields)
    Program([row(compile_kernel(emission, *options), units, block.ctypes.data)]).run()


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalise(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    for size, scale in ((16, 1.0), (96, 1e-3), (576, 100.0)):
        x, weight = (scale * torch.randn(size)).to(x_dtype), torch.randn(size).to(dtype)
        y = torch.full((size + 16,), torch.nan)
        run_vector(
            emit_normalise, FLOAT_KINDS[dtype], FLOAT_KINDS[x_dtype], x=x.data_ptr(),
            weight=weight.data_ptr(), y=y.data_ptr(), columns=size, epsilon=float_bits(1e-5),
        )  # fmt: skip
        norm = reference.Norm(as_array(weight), 1e-5)
        expected = reference.normalise(x.double().numpy(), norm)
        assert np.abs(y[:size].numpy() - expected).max() <= 2.0**-21 * np.abs(expected).max()
        assert bool(y[size:].isnan().all())


def run_gate(function: Gate, x: Tensor, up: Tensor) -> np.ndarray[Any, Any]:
    y = torch.zeros(len(x))
    run_vector(
        emit_gate, function, units=len(x) // 16, x=x.data_ptr(), second=up.data_ptr(),
        y=y.data_ptr(),
    )  # fmt: skip
    return y.numpy()


@pytest.mark.parametrize("function", GATES)
def test_gate(function: Gate) -> None:
    x = torch.cat([torch.linspace(-100, 100, 317), torch.tensor([0.0, -0.0, torch.nan])])
    up = torch.randn(320)
    y = run_gate(function, x, up)
    wide = x.double().numpy()
    expected = reference.FUNCTIONS[function](wide) * up.double().numpy()
    assert bool(np.isnan(y[-1]))
    # exp2 is exact to 2**-22, and the rounding of its argument grows with it: GELU's is a cubic.
    # Where tanh comes near -1, what the definition loses counts as an absolute error of x / 2**52.
    argument = np.abs(wide) if function != "gelu_tanh" else GELU_SLOPE * (
        np.abs(wide) + GELU_CUBIC * np.abs(wide) ** 3
    )  # fmt: skip
    allowed = 2.0**-21 * (1 + argument) * np.abs(expected) + 1e-36
    if function == "gelu_tanh":
        allowed += 2.0**-50 * np.abs(wide * up.double().numpy())
    assert (np.abs(y - expected) <= allowed)[:-1].all()
    if function == "relu2":
        assert not y[:158].any()


def test_gates_are_no_others() -> None:
    """Negative control: no function passes for another."""
    x, up = torch.linspace(-6, 6, 64), torch.ones(64)
    for own in GATES:
        for other in GATES:
            error = np.abs(run_gate(own, x, up) - reference.FUNCTIONS[other](x.double().numpy()))
            assert (error.max() < 1e-5) == (own == other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_and_largest(dtype: torch.dtype) -> None:
    state = np.zeros(len(STATE_FIELDS), np.int64)
    kind, table = FLOAT_KINDS[dtype], torch.randn(7, 48).to(dtype)
    y = torch.zeros(48)
    state[STATE["token"]] = 5
    run_vector(
        emit_embed, kind, state=state.ctypes.data, weight=table.data_ptr(), y=y.data_ptr(),
        columns=48,
    )  # fmt: skip
    assert torch.equal(y, table[5].float())
    for size in (1, 15, 16, 17, 128, 133):
        for case in range(6):
            x = torch.randint(-4, 4, (size,)).to(dtype)  # ties everywhere
            if case == 1:
                x.fill_(-torch.inf)
            if case == 2:
                x[size // 2 :] = torch.nan
            if case == 3:
                x[-1] = 9
            if case == 4:
                x[-1], x[0] = torch.nan, torch.inf
            run_vector(emit_largest, kind, state=state.ctypes.data, x=x.data_ptr(), columns=size)
            nan, values = x.isnan(), x.float()
            first = nan.nonzero()[0] if bool(nan.any()) else (values == values.max()).nonzero()[0]
            assert state[STATE["token"]] == int(first), (size, case)


# The whole step


@dataclass(frozen=True)
class Case:
    """sizes: hidden, MLP, query heads, KV heads, head_dim."""

    sizes: tuple[int, int, int, int, int]
    dtype: torch.dtype
    weights: str
    activations: str
    kv: tuple[str, str]
    prompt: int
    flags: str = ""  # bias, norms, still (not rotated), window, sub (norms), a function

    @property
    def exact(self) -> bool:
        """Whether no integer rounding falls this way or that by a bit of fp32."""
        return self.activations == "float" and self.kv == ("float", "float")


CASES = (
    Case((64, 96, 4, 2, 16), torch.float32, "int4-g32", "float", ("float", "float"), 150),
    Case((96, 80, 6, 2, 32), torch.float32, "int4-g32-fzero", "int8-g32", ("int8", "int8"), 188,
         "bias norms"),
    Case((48, 100, 3, 3, 16), torch.bfloat16, "int8-g64", "int8-g64", ("int8", "int8"), 60,
         "bias"),
    Case((64, 64, 8, 1, 48), torch.float16, "int4-g128-asym", "int8", ("int8", "int4"), 130,
         "norms window"),
    Case((64, 64, 4, 4, 64), torch.bfloat16, "int2", "int8", ("e4m3", "float"), 189, "still"),
    Case((128, 160, 4, 2, 32), torch.float32, "nf4-g64", "int8-g64", ("int4", "int2"), 1,
         "norms"),
    Case((64, 96, 4, 2, 32), torch.float32, "int4-g32", "float", ("float", "float"), 150,
         "sub relu2"),
    Case((320, 480, 10, 2, 32), torch.bfloat16, "ternary-1.6-s32", "int8", ("int8", "int8"), 188,
         "sub relu2"),
    Case((64, 96, 4, 2, 32), torch.float32, "int4-g32", "float", ("float", "float"), 3,
         "gelu_tanh"),
)  # fmt: skip
STEPS = 6


def random_stack(case: Case) -> DecoderStack:
    hidden, inner, heads, kv_heads, width = case.sizes
    activations = ActivationFormat.parse(case.activations)

    def product(rows: int, columns: int, bias: bool = False) -> Product:
        weight = lath.quantize(torch.randn(rows, columns) / columns**0.5, case.weights)
        return Product(weight, torch.randn(rows) if bias else None, activations)

    def norm(size: int) -> Norm:
        return Norm((1 + 0.3 * torch.randn(size)).to(case.dtype), 1e-5)

    bias, head_norms, sub = (word in case.flags for word in ("bias", "norms", "sub"))
    function = next((one for one in GATES if one in case.flags), "silu")
    layer = DecoderLayer(
        norm(hidden), product(heads * width, hidden, bias), product(kv_heads * width, hidden, bias),
        product(kv_heads * width, hidden, bias), product(hidden, heads * width, bias),
        norm(width) if head_norms else None, norm(width) if head_norms else None,
        "still" not in case.flags, 0.3, 70 if "window" in case.flags else None, norm(hidden),
        product(inner, hidden), product(inner, hidden), product(hidden, inner, bias),
        norm(heads * width) if sub else None, norm(inner) if sub else None, function,
    )  # fmt: skip
    embedding = torch.randn(19, hidden).to(case.dtype)
    return DecoderStack(
        embedding, (layer,), norm(hidden), product(19, hidden), heads, kv_heads, width, case.dtype
    )


def as_product(product: Product) -> reference.Product:
    weight = product.weight
    rows = weight.shape[0]

    def side(tensor: Tensor | None) -> Any:
        return None if tensor is None else as_array(tensor)[:, :rows]

    return reference.Product(
        weight.unpack_codes().numpy(), side(weight.scales), side(weight.zeros), weight.codec,
        None if product.bias is None else product.bias.numpy(), product.activations,
        None if weight.outer is None else weight.outer.numpy(),
        None if weight.table is None else weight.table.numpy(),
    )  # fmt: skip


def as_layer(layer: DecoderLayer) -> reference.Layer:
    def norm(own: Norm | None) -> Any:
        return None if own is None else reference.Norm(as_array(own.weight), own.epsilon)

    names = ("query", "key", "value", "output", "gate", "up", "down")
    return reference.Layer(
        **{name: as_product(getattr(layer, name)) for name in names},
        **{
            name: norm(getattr(layer, name))
            for name in (
                "attention_norm",
                "query_norm",
                "key_norm",
                "mlp_norm",
                "output_norm",
                "down_norm",
            )
        },
        rotate=layer.rotate,
        function=layer.function,
    )


def rotations(positions: int, width: int) -> Tensor:
    """[positions, 2, D]: cosines and sines, not signed."""
    angles = torch.arange(positions)[:, None] / 100 ** (torch.arange(width // 2) * 2 / width)
    return torch.stack([angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)], dim=1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_agree_with_the_definition(case: Case) -> None:
    """One token after another; in most cases a part of the cache fills on the way."""
    stack = random_stack(case)
    hidden, _, _, kv_heads, width = case.sizes
    kv = lath.PagedKV(kv_heads, width, 1, *case.kv, dtype=case.dtype, backend="cpu")
    filled = torch.randn(2, 1, kv_heads, case.prompt, width).to(case.dtype)
    kv.append(*filled)
    layer = stack.layers[0]
    options = ScoreOptions(
        layer.scale, causal=True, window=layer.window, query=choose_query("auto", kv.format),
        precision=choose_precision("auto", kv.format),
    )  # fmt: skip
    table = rotations(case.prompt + STEPS, width)
    signed = table.clone()
    signed[:, 1, : width // 2] *= -1
    step = cpu.DecodeStep(stack)
    step.state[STATE["rotations"]] = signed.data_ptr()
    part, _ = open_part(kv)
    bound = cpu_bound.BoundStep(step, [kv.view()], [options], part)
    cache, own = as_cache(kv.view(), case.dtype), as_layer(layer)
    errors = []
    for position in range(case.prompt, case.prompt + STEPS):
        residual = torch.randn(hidden)
        expected, cache = reference.decode_layer(
            residual.numpy(), own, cache, as_options(options), *table[position].numpy()
        )
        step.residual[:hidden] = residual
        step.state[STATE["position"]] = position
        advance(step, bound, kv)
        bound.run_layer(0)
        added = expected - residual.numpy()
        error = step.residual[:hidden].numpy() - expected
        errors.append(float(np.linalg.norm(error) / np.linalg.norm(added)))
        check_tables(kv, position + 1)
    limit = ROUNDING
    if case.dtype != torch.float32:  # the other neighbour of q, k, v and o in a half: one step
        limit = 8 * float(torch.finfo(case.dtype).eps)
    if case.exact:
        assert max(errors) < limit, errors
    else:
        # A code beside the right one moves a sum of K products by 1/127 of one of them or so.
        assert float(np.median(errors)) < limit, errors
        assert max(errors) < limit + 0.02, errors


def advance(step: cpu.DecodeStep, bound: cpu_bound.BoundStep, kv: lath.PagedKV) -> None:
    """Count a token, as `lath.integration.decode_cache` does for every layer of a cache."""
    part, slot = open_part(kv)
    fills = part == "last" and slot == 63
    if fills:
        bound.pages[0] = close_page(kv)
    bound.move([kv.view()], part)
    bound.switch(fills)
    if not fills:
        count_tokens(kv.spans[0], part, 1)
    step.state[STATE["slot"]], step.state[STATE["grown"]] = slot, int(not fills)


def check_tables(kv: lath.PagedKV, length: int) -> None:
    """What the kernel counted in the tables is what they would be if built anew."""
    assert kv.lengths == [length]
    assert is_plain(kv.spans[0])
    counted = [tensor.clone() for tensor in (kv.view().lengths, kv.view().last_lengths)]
    kv.changed()
    view = kv.view()
    assert torch.equal(counted[0], view.lengths)
    assert torch.equal(counted[1], view.last_lengths)


def test_a_page_is_the_one_that_append_writes() -> None:
    """Records of a cache that was filled by steps and by `append`, bit for bit."""
    case = CASES[1]
    stack = random_stack(case)
    _, _, _, kv_heads, width = case.sizes
    caches = [lath.PagedKV(kv_heads, width, dtype=case.dtype, backend="cpu") for _ in range(2)]
    start = torch.randn(2, 1, kv_heads, 126, width)
    for cache in caches:
        cache.append(*start)
    step = cpu.DecodeStep(stack)
    step.state[STATE["rotations"]] = rotations(200, width).data_ptr()
    options = ScoreOptions(0.3, causal=True, precision="int8")
    bound = cpu_bound.BoundStep(step, [caches[0].view()], [options], "last")
    for _ in range(3):
        step.residual.normal_()
        slot = open_part(caches[0])[1]
        advance(step, bound, caches[0])
        bound.run_layer(0)
        caches[1].append(
            caches[0].last_keys[:, :, slot : slot + 1], caches[0].last_values[:, :, slot : slot + 1]
        )
    page = caches[0].spans[0].pages[0]
    other = caches[1].spans[0].pages[0]
    assert torch.equal(caches[0].pool.records[page], caches[1].pool.records[other])
    assert torch.equal(caches[0].pool.index[page], caches[1].pool.index[other])


@pytest.mark.parametrize("name", LOWERINGS)
def test_other_instruction_sets(name: str) -> None:
    run_lowered(
        name,
        """
        import torch; torch.set_num_threads(1)
        import test_decode_step as own
        torch.manual_seed(0)
        own.test_layers_agree_with_the_definition(own.CASES[1])
        own.test_layers_agree_with_the_definition(own.CASES[3])
        """,
    )


def test_sizes_that_are_refused() -> None:
    for sizes, name in (((40, 64, 4, 2, 16), "hidden_size"), ((64, 64, 4, 2, 24), "head_dim")):
        case = Case(sizes, torch.float32, "int8", "float", ("int8", "int8"), 1)
        with pytest.raises(ValueError, match=f"{name} must be a multiple of 16"):
            cpu.DecodeStep(random_stack(case))


def test_dtype_names_are_known() -> None:
    assert {DTYPE_NAMES[dtype] for dtype in DTYPES} == {"fp32", "fp16", "bf16"}
