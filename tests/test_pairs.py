"""Act-order folded into the layers before, and shards of packed weights (TP-Aware)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases_tables import answer, make_weight
from torch import Tensor, nn

import lath
import oracle
from lath.formats.packing import pack
from lath.formats.qtensor import QTensor
from lath.integration.pairs import Pair, find_pairs, mean_square_inputs, sort_pairs

RANKS = (1, 2, 4, 8)
CODECS = [
    "int4-g128", "int3-g64-asym", "int5", "int4-g32-s8", "nf4-g64", "nvfp4", "lut3-g128", "mxfp6",
    "int7-g16", "ternary",
]  # fmt: skip


# Shards


@pytest.mark.parametrize("text", CODECS)
def test_shards_hold_the_numbers_of_the_whole(text: str) -> None:
    weight = make_weight(text, 128, 1024, np.random.default_rng(0))
    dense = weight.dequantize()
    for ranks in RANKS:
        rows = [weight.shard(rank, ranks, 0) for rank in range(ranks)]
        assert torch.equal(torch.cat([shard.dequantize() for shard in rows]), dense)
        columns = [weight.shard(rank, ranks, 1) for rank in range(ranks)]
        assert torch.equal(torch.cat([shard.dequantize() for shard in columns], dim=1), dense)
        for shard in (*rows, *columns):
            again = lath.load_weight(shard.state_dict())
            assert again.shape == shard.shape
        packed = sum(shard.codes.numel() for shard in columns)
        assert packed == weight.codes.numel()


def test_one_shard_is_the_whole_of_any_size() -> None:
    weight = make_weight("int4-g48", 21, 150, np.random.default_rng(1))
    for axis in (0, 1):
        assert torch.equal(weight.shard(0, 1, axis).dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("shape", "codec", "arguments", "match"),
    [
        ((48, 256), "int4", (0, 2, 0), "multiples of 16"),
        ((32, 192), "int4", (0, 2, 1), "multiples of 128"),
        ((32, 1024), "int4-g192", (0, 2, 1), "groups of 192"),
        ((32, 256), "int4", (2, 2, 0), "rank 2 of 2"), ((32, 256), "int4", (-1, 2, 0), "rank -1"),
        ((32, 256), "int4", (0, 0, 0), "of 0"), ((32, 256), "int4", (0, 2, 2), "axis.*2"),
    ],
)  # fmt: skip
def test_cuts_that_split_a_panel_a_block_or_a_group(
    shape: tuple[int, int], codec: str, arguments: tuple[int, int, int], match: str
) -> None:
    weight = lath.quantize(torch.randn(shape), codec)
    assert isinstance(weight, QTensor)
    with pytest.raises(ValueError, match=match):
        weight.shard(*arguments)


def whole_numbers(rows: int, columns: int, seed: int) -> QTensor:
    """Codes and scales of which every product and sum is exact in fp32."""
    rng = np.random.default_rng(seed)
    codec = lath.Codec.parse("int4-g128")
    codes = torch.from_numpy(rng.integers(6, 11, (rows, columns)).astype(np.uint8))
    scales = torch.from_numpy(rng.integers(1, 3, (columns // 128, rows)).astype(np.float16))
    return QTensor(codec, (rows, columns), pack(codes, codec), scales)


def mlp(x: Tensor, gate: QTensor, up: QTensor, down: QTensor, ranks: int, backend: str) -> Tensor:
    """relu(gate x) * up x, then down, by simulated ranks: each has its rows of gate and up and its
    columns of down; the only communication is the sum of what the ranks give."""
    total = torch.zeros(x.shape[0], down.shape[0])
    for rank in range(ranks):
        own = [weight.shard(rank, ranks, 0) for weight in (gate, up)]
        left, right = (lath.linear(x, weight, backend=backend) for weight in own)
        total += lath.linear(left.relu() * right, down.shard(rank, ranks, 1), backend=backend)
    return total


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_add_up_exactly(ranks: int, backend: str) -> None:
    gate, up = (whole_numbers(1024, 128, seed) for seed in (1, 2))
    down = whole_numbers(32, 1024, 3)
    x = torch.randint(-1, 2, (3, 128)).float() * (torch.rand(3, 128) < 0.2)
    hidden = (x.double() @ gate.dequantize().double().T).relu()
    hidden = hidden * (x.double() @ up.dequantize().double().T)
    exact = hidden @ down.dequantize().double().T
    assert float((hidden.abs() @ down.dequantize().double().abs().T).max()) < 2**24
    assert torch.equal(mlp(x, gate, up, down, ranks, backend).double(), exact)


@pytest.mark.parametrize("activations", ["float", "int8-g64"])
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_add_up_within_the_bound(ranks: int, activations: str) -> None:
    """A row-parallel layer: what ranks give, added, against the definition of the whole."""
    weight = make_weight("int4-g128-s8", 48, 1024, np.random.default_rng(ranks))
    x = torch.randn(5, 1024)
    data = answer(x, weight, None, activations)
    y = sum(
        lath.linear(piece, weight.shard(rank, ranks, 1), activations=activations, backend="cpu")
        for rank, piece in enumerate(x.chunk(ranks, dim=1))
    )
    # Each of the ranks' results is rounded once, and so is each of their sums.
    bound = oracle.linear_bound(data.y64, data.gauge, 1024 + 2 * ranks, x.dtype)
    assert isinstance(y, Tensor)
    assert oracle.test_ratio(y, data.y64, bound) <= 1


# Pairs


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), with biases."""

    def __init__(self, width: int = 64, inner: int = 1024) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return y


def uneven_mlp() -> GatedMlp:
    """Hidden units of very unequal size, shuffled: act-order has something to sort."""
    torch.manual_seed(0)
    model = GatedMlp()
    with torch.no_grad():
        model.up_proj.weight.mul_(torch.exp(2 * torch.randn(1024, 1)))
    return model.requires_grad_(False)


def recorded(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with mean_square_inputs(model) as found:
        model(x)
    return found


def test_mean_squares_of_inputs() -> None:
    model, x = uneven_mlp(), torch.randn(7, 64)
    with mean_square_inputs(model) as found:
        model(x[:3])
        model(x[3:])
    np.testing.assert_allclose(found["gate_proj"], x.square().mean(dim=0), rtol=1e-5)
    hidden = model.activation(model.gate_proj(x)) * model.up_proj(x)
    np.testing.assert_allclose(found["down_proj"], hidden.square().mean(dim=0), rtol=1e-5)
    assert not model.gate_proj._forward_pre_hooks


def test_sorting_changes_nothing_and_is_undone_bit_for_bit() -> None:
    model, x = uneven_mlp(), torch.randn(7, 64)
    before, state = model(x), copy.deepcopy(model.state_dict())
    importance = recorded(model, x)
    with sort_pairs(model, importance) as pairs:
        order = pairs.orders["down_proj"]
        assert not torch.equal(order, torch.arange(1024))
        np.testing.assert_allclose(model(x), before, rtol=1e-4, atol=1e-4)
        sizes = recorded(model, x)["down_proj"]
        assert bool((sizes.diff() <= 1e-6 * sizes[:-1]).all())
        assert torch.equal(model.up_proj.bias, state["up_proj.bias"][order])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("ranks", RANKS)
def test_a_sorted_pair_needs_no_gather_on_any_rank(ranks: int) -> None:
    """Each rank takes its rows and columns as they lie; all ranks together give the whole. Without
    the permutation of the layers before (the one that TP-Aware folds in), they must not."""
    model, x = uneven_mlp(), torch.randn(7, 64)
    with torch.no_grad():  # the simulated ranks have no biases
        for layer in (model.gate_proj, model.up_proj, model.down_proj):
            layer.bias.zero_()
    dense = model(x)
    plain = [lath.quantize(w.weight, "int4-g128") for w in (model.gate_proj, model.up_proj)]
    with sort_pairs(model, recorded(model, x)):
        layers = (model.gate_proj, model.up_proj, model.down_proj)
        gate, up, down = (lath.quantize(layer.weight, "int4-g128") for layer in layers)
    assert isinstance(gate, QTensor) and isinstance(up, QTensor) and isinstance(down, QTensor)  # noqa: PT018

    def run(gate: QTensor, up: QTensor, ranks: int) -> Tensor:
        total = torch.zeros(7, 64, dtype=torch.float64)
        for rank in range(ranks):
            left, right = (x @ w.shard(rank, ranks, 0).dequantize().T for w in (gate, up))
            hidden = nn.functional.silu(left) * right
            total += hidden.double() @ down.shard(rank, ranks, 1).dequantize().double().T
        return total

    whole = run(gate, up, 1)
    # The hidden units are the same fp32 numbers on every rank but for the order in which BLAS adds.
    torch.testing.assert_close(run(gate, up, ranks), whole, rtol=1e-4, atol=1e-4)
    assert float((whole - dense).norm() / dense.norm()) < 0.2
    unsorted = run(plain[0], plain[1], ranks)  # type: ignore[arg-type]
    assert float((unsorted - dense).norm() / dense.norm()) > 1


def test_sorted_groups_lose_less() -> None:
    """What act-order is for: one scale for columns of like importance, by the output's error."""
    model, x = uneven_mlp(), torch.randn(64, 64)
    with torch.no_grad():  # columns that are used little are large, as where training left them
        sizes = recorded(model, x)["down_proj"].sqrt()
        model.down_proj.weight.div_(sizes).mul_(sizes.mean())
    dense = model(x)

    def error() -> float:
        with lath.patch(model, "int3-g128", only=["down_proj"], activations="float"):
            return float((model(x) - dense).norm() / dense.norm())

    plain = error()
    with sort_pairs(model, recorded(model, x)):
        assert error() < 0.7 * plain


def test_a_model_of_transformers() -> None:
    pytest.importorskip("transformers")
    from hf_models import hf_model, tokens

    model, ids = hf_model("Llama"), tokens(2, 9)
    with torch.no_grad():
        before = model(ids).logits
        with mean_square_inputs(model) as importance:
            model(ids)
        pairs = find_pairs(model)
        assert [p.following for p in pairs] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
        with sort_pairs(model, importance) as done:
            torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
            with lath.patch(model, "int4-g32", activations="float", backend="cpu"):
                packed = model(ids).logits
                with pytest.raises(RuntimeError, match="undo the patch first"):
                    done.undo()
            assert float((packed - before).norm() / before.norm()) < 0.3
        assert torch.equal(model(ids).logits, before)


def _with(change: Callable[[GatedMlp], object]) -> nn.Module:
    model = uneven_mlp()
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "importance", "pairs", "match"),
    [
        (uneven_mlp(), {}, None, "must have 'down_proj'"),
        (uneven_mlp(), {"down_proj": torch.ones(3)}, None, "1024 finite numbers"),
        (uneven_mlp(), {"down_proj": torch.full((1024,), torch.nan)}, None, "finite"),
        (uneven_mlp(), {"up_proj": torch.ones(64)}, [Pair(("gate_proj",), "up_proj")], "no pair"),
        (_with(lambda m: setattr(m, "norm", nn.LayerNorm(1024))), {}, None, "no gate_proj"),
        (_with(lambda m: setattr(m.up_proj, "weight", m.gate_proj.weight)),
         {"down_proj": torch.ones(1024)}, None, "shares its weight"),
        (_with(lambda m: setattr(m, "up_proj", nn.Bilinear(64, 64, 1024))), {}, None, "nn.Linear"),
    ],
)  # fmt: skip
def test_layers_that_are_no_pair(
    model: nn.Module, importance: dict[str, Tensor], pairs: list[Pair] | None, match: str
) -> None:
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        sort_pairs(model, importance, pairs)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
