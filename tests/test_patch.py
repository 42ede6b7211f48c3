"""lath.patch and PackedLinear on plain torch models: what is replaced, what is kept, undoing it.

Every test computes with the NumPy definition: the kernels have tests of their own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lath
from lath.integration.linear import PackedLinear
from lath.integration.report import model_bytes

CODECS = ["int4-g64", "int3-g32-asym", "int4-g32-fzero", "int8-s32", "int1"]


class Net(nn.Module):
    """Two linears, one of them used twice, a tied head and things that must be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 48)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(48, 80), "down": nn.Linear(80, 48, bias=False)})
            for _ in range(2)
        )
        self.attention = nn.MultiheadAttention(48, 4)  # its out_proj is a subclass of nn.Linear
        self.lm_head = nn.Linear(48, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["down"](functional.silu(layer["up"](x)))
        return self.lm_head(x)


def net() -> Net:
    torch.manual_seed(1)
    return Net().eval()


def patch(model: nn.Module, weights: str = "int4-g16", **options: object) -> lath.PatchReport:
    return lath.patch(model, weights, **{"backend": "reference", "progress": False, **options})  # type: ignore[arg-type]


def test_replaces_in_place_and_undoes_to_the_same_objects() -> None:
    model, ids = net(), torch.arange(10)[None]
    before, modules, keys = model(ids), dict(model.named_modules()), list(model.state_dict())
    report = patch(model)
    assert isinstance(model.layers[0]["up"], PackedLinear)
    assert [row.name for row in report.replaced] == [
        f"layers.{i}.{name}" for i in range(2) for name in ("up", "down")
    ]
    assert not torch.equal(model(ids), before)
    report.undo()
    report.undo()
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == keys
    assert torch.equal(model(ids), before)
    report.redo()
    assert isinstance(model.layers[0]["up"], PackedLinear)


def test_with_undoes_after_an_exception() -> None:
    model = net()
    original = model.layers[0]["up"]
    with pytest.raises(KeyError):  # noqa: PT012, SIM117
        with patch(model) as report:
            assert report.active
            raise KeyError
    assert model.layers[0]["up"] is original
    assert not report.active


def test_what_is_kept_and_why() -> None:
    model = net()
    model.layers[0]["up"].register_forward_hook(lambda *_: None)
    model.layers[1]["up"].forward = lambda x: x  # type: ignore[method-assign]
    model.extra = nn.Linear(4, 4, device="meta")
    model.wide = nn.Linear(4, 4, dtype=torch.float64)
    model.encoder = nn.TransformerEncoderLayer(8, 2)
    reasons = {row.name: row.reason for row in patch(model).kept}
    assert "subclass" in reasons["attention.out_proj"]
    assert "hooks" in reasons["layers.0.up"]
    assert "forward" in reasons["layers.1.up"]
    assert "meta" in reasons["extra"]
    assert "float64" in reasons["wide"]
    assert "TransformerEncoderLayer" in reasons["encoder.linear1"]
    assert "lm_head" in reasons["lm_head"]


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        (("layers.0",), {"layers.0.up", "layers.0.down"}),
        (("*.down",), {"layers.0.down", "layers.1.down"}),
        (("down", "layers.1.up"), {"layers.0.down", "layers.1.down", "layers.1.up"}),
        (("layers.?.up",), {"layers.0.up", "layers.1.up"}),
        ((), set()),
    ],
)
def test_skip_patterns(skip: tuple[str, ...], kept: set[str]) -> None:
    report = patch(net(), skip=skip)
    assert {row.name for row in report.kept if row.reason.startswith("skip")} == kept


def test_a_second_call_gives_other_layers_another_codec() -> None:
    model = net()
    body = patch(model)
    head = patch(model, "int8-g16", skip=(), only=("lm_head",))
    assert [row.name for row in head.replaced] == ["lm_head"]
    assert "only" in head.kept[0].reason
    head.undo()
    body.undo()
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    with pytest.raises(ValueError, match=r"only.*'layers.7'"):
        patch(model, only=("layers.7",))


def test_a_tied_weight_is_packed_on_request_and_the_embedding_kept() -> None:
    model = net()
    embedding = model.embed.weight
    report = patch(model, skip=())
    assert isinstance(model.lm_head, PackedLinear)
    assert model.embed.weight is embedding
    assert report.bytes_after == model_bytes(model)
    report.undo()
    assert model.lm_head.weight is embedding


def test_a_module_in_two_places_is_packed_once() -> None:
    shared = nn.Linear(32, 32)
    block = nn.Sequential(shared, nn.ReLU())
    model = nn.ModuleDict({"a": block, "b": block, "c": nn.Sequential(nn.ReLU(), shared)})
    report = patch(model)
    assert len(report.rows) == 1
    assert report.rows[0].also_named == ("b.0", "c.1")
    assert model["a"][0] is model["b"][0] is model["c"][1]
    assert isinstance(model["c"][1], PackedLinear)
    assert report.bytes_after == model_bytes(model)
    report.undo()
    assert model["a"][0] is model["c"][1] is shared


def test_two_layers_that_share_a_weight_share_the_packed_one() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, bias=False))
    model[1].weight = model[0].weight
    report = patch(model)
    assert model[0].weight is model[1].weight
    assert report.bytes_after == model_bytes(model)


@pytest.mark.parametrize("skip", [("lm_head",), ()])
@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_those_of_the_model(codec: str, skip: tuple[str, ...]) -> None:
    model = net()
    plan = patch(model, codec, skip=skip, dry_run=True)
    assert plan.bytes_before == model_bytes(model)
    report = patch(model, codec, skip=skip)
    assert report.bytes_after == plan.bytes_after == model_bytes(model)
    assert report.bytes_after < report.bytes_before


def test_dry_run_changes_nothing() -> None:
    model = net()
    modules = dict(model.named_modules())
    report = patch(model, dry_run=True)
    assert len(report.replaced) == 4
    assert "would replace" in str(report)
    report.undo()
    report.redo()
    assert dict(model.named_modules()) == modules


def test_patching_again() -> None:
    model = net()
    first = patch(model)
    module = model.layers[0]["up"]
    second = patch(model)
    assert model.layers[0]["up"] is module
    assert not second.replaced
    second.undo()
    assert model.layers[0]["up"] is module
    with pytest.raises(ValueError, match=r"layers.0.up.*int4-g16.*undo"):
        patch(model, "int8")
    head = patch(model, "int8", skip=("layers",))
    assert [row.name for row in head.replaced] == ["lm_head"]
    head.undo()
    first.undo()
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_undo_refuses_when_the_model_was_changed_since() -> None:
    model = net()
    report = patch(model)
    model.layers[0]["up"] = nn.Linear(48, 80)
    with pytest.raises(RuntimeError, match=r"layers\.0\.up"):
        report.undo()
    assert isinstance(model.layers[1]["up"], PackedLinear)


def test_undo_follows_casts_and_modes() -> None:
    model = net()
    report = patch(model)
    model.to(torch.bfloat16).train()
    report.undo()
    assert model.layers[0]["up"].weight.dtype == torch.bfloat16
    assert model.layers[0]["up"].training
    assert model(torch.arange(4)[None]).dtype == torch.bfloat16


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = net()
    model.layers[1]["down"].weight.data[3, 5] = float("nan")
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"layers\.1\.down.*NaN"):
        patch(model)
    assert dict(model.named_modules()) == modules


def test_warns_when_nothing_was_replaced() -> None:
    with pytest.warns(UserWarning, match="no nn.Linear"):
        patch(nn.Sequential(nn.ReLU()))
    with pytest.warns(UserWarning, match="no parent"):
        patch(nn.Linear(4, 4))


def test_activations_and_errors_are_reported() -> None:
    report = patch(net(), "int8-g16")
    assert {row.activations for row in report.replaced} == {"int8-g16"}
    assert report.mean_error is not None
    assert 0 < report.mean_error < 0.01
    assert {row.activations for row in patch(net(), "int8").replaced} == {"int8"}
    report = patch(net(), "int4-g16", activations="float")
    assert {row.activations for row in report.replaced} == {"float"}
    better = patch(net(), "int4-g16", search=True)
    assert better.mean_error is not None
    assert report.mean_error is not None
    assert better.mean_error < report.mean_error


def test_the_table_groups_layers(capsys: pytest.CaptureFixture[str]) -> None:
    report = patch(net())
    assert capsys.readouterr() == ("", "")
    text = str(report)
    assert "layers.*.up" in text
    assert "x2" in text
    assert "kept: skip='lm_head'" in text
    assert "whole model" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "int9"}, ValueError, "int9"),
        ({"activations": "int7"}, ValueError, "activations.*int7"),
        ({"backend": "gpu"}, ValueError, "backend.*gpu"),
        ({"skip": "lm_head"}, TypeError, "skip.*lm_head"),
        ({"skip": ("lm_haed",)}, ValueError, "lm_haed.*lm_head"),
        ({"search": 1}, TypeError, "search"),
        ({"dry_run": "yes"}, TypeError, "dry_run"),
    ],
)
def test_malformed_options(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    model = net()
    with pytest.raises(error, match=message):
        patch(model, **options)  # type: ignore[arg-type]
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match="model"):
        patch("net")  # type: ignore[arg-type]


# Hugging Face


def test_hugging_face_model_with_a_tied_head() -> None:
    pytest.importorskip("transformers")
    from lath.integration.models import tiny_model

    model, _ = tiny_model()
    ids = torch.arange(20)[None]
    before = model(ids).logits
    tied = dict(model.all_tied_weights_keys)
    with patch(model, "int8-g16", skip=(), activations="float"):
        model.tie_weights()
        assert isinstance(model.lm_head, PackedLinear)
        torch.testing.assert_close(model(ids).logits, before, atol=0.02, rtol=0.02)
        model(ids).logits.sum().backward()
    assert model.config.tie_word_embeddings
    assert model.all_tied_weights_keys == tied
    assert torch.equal(model(ids).logits, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_hugging_face_model_generates_and_compiles() -> None:
    pytest.importorskip("transformers")
    from lath.integration.models import tiny_model

    model, _ = tiny_model()
    ids = torch.arange(20)[None]
    with patch(model), torch.no_grad():
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 24)
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
