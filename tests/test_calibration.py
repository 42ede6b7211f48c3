"""`lath.patch(quantizer=…)` on tiny random models: calibrated layer by layer, resumed, undone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import lath
from hf_models import hf_model, relative, tokens
from lath.formats.quantizer import AWQ, GPTQ
from lath.integration import awq_folding, calibrate_layer, calibration
from lath.integration.layer_chain import find_layers, record_chain
from lath.integration.linear import PackedLinear

CODEC = "int4-g16"
IDS = tokens(6, 40)


def patch(model: Any, quantizer: Any = "gptq", ids: Any = IDS, **options: Any) -> lath.PatchReport:
    options = {"backend": "reference", "activations": "float", "progress": False, **options}
    return lath.patch(model, options.pop("weights", CODEC), quantizer=quantizer, calibration=ids,
                      **options)  # fmt: skip


def packed_codes(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.qtensor.unpack_codes()
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
    }


def codes_by_hooks(model: Any, names: list[str]) -> dict[str, Tensor]:
    """The independent way: the whole model runs, hooks see what enters these layers."""
    hessians = {name: lath.Hessian(model.get_submodule(name).in_features) for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, own=own: own.add(args[0])
        )
        for name, own in hessians.items()
    ]
    with torch.no_grad():
        for row in IDS:
            model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {
        name: lath.quantize(
            model.get_submodule(name).weight.detach(), CODEC, quantizer="gptq", hessian=own.matrix
        ).unpack_codes()
        for name, own in hessians.items()
    }


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Qwen3", "Mixtral"])
def test_each_layer_is_rounded_for_what_the_rounded_layers_before_return(name: str) -> None:
    """Against the whole model run with hooks: layer 1 reads what the packed layer 0 makes of it.

    Of layer 0 the codes are the same. What layer 1 reads differs in the last bits of fp32, and a
    code that flips for that moves others: nearly all must agree, and many fewer agree with the
    codes for what the unrounded layer 0 returns.
    """
    model = hf_model(name)
    with patch(model) as report:
        got = packed_codes(model)
        assert {row.quantizer for row in report.replaced} == {"gptq"}
    first = [n for n in got if ".layers.0." in n]
    second = [n for n in got if ".layers.1." in n]
    assert first
    assert len(first) == len(second)
    for layer, codes in codes_by_hooks(model, first).items():
        assert torch.equal(codes, got[layer]), layer
    wrong = codes_by_hooks(model, second)
    with patch(model, only=first):
        right = codes_by_hooks(model, second)

    def differ(codes: dict[str, Tensor]) -> int:
        return sum(int((codes[layer] != got[layer]).sum()) for layer in second)

    assert 10 * differ(right) < differ(wrong), (differ(right), differ(wrong))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Qwen3"])
@pytest.mark.parametrize("quantizer", ["gptq", "awq+gptq"])
def test_undone_the_model_is_what_it_was(name: str, quantizer: str, dtype: torch.dtype) -> None:
    model = hf_model(name, dtype)
    modules = dict(model.named_modules())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = patch(model, quantizer)
    assert len(packed_codes(model)) == 14
    out = model(IDS).logits
    report.undo()
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    report.redo()
    assert torch.equal(model(IDS).logits, out)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Qwen3"])
@torch.no_grad()
def test_awq_scales_cancel_in_the_whole_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is rounded, scaled columns, rows and norms compute the same logits."""
    model = hf_model(name)
    for layer in model.model.layers:  # inputs with outliers, so that scales are far from 1
        layer.input_layernorm.weight[::7] += 20
        layer.mlp.up_proj.weight[::5] *= 8
    before = model(IDS).logits
    norm = model.model.layers[0].input_layernorm
    own = norm.weight.clone()
    seen = []

    def spy(weights: Any, result: Any, *_: Any) -> None:
        dense = {f"{path}.weight": weight for path, weight in weights.items()}
        seen.append((model.model.layers[len(seen)], {**dense, **result.parameters}))

    monkeypatch.setattr(calibrate_layer, "_check_scaled", spy)
    report = patch(model, "awq")
    assert {row.quantizer for row in report.replaced} == {"awq"}
    assert model.model.layers[0].input_layernorm is not norm
    report.undo()
    assert torch.equal(model(IDS).logits, before)
    assert model.model.layers[0].input_layernorm is norm
    for layer, values in seen:
        for path, value in values.items():
            layer.get_parameter(path).data = value
    # fp32: each weight, product and sum is rounded anew, some hundred roundings of 6e-8.
    assert relative(model(IDS).logits - before, before) < 1e-4
    norm.weight.data = own  # the control: one norm that was not scaled back
    assert relative(model(IDS).logits - before, before) > 1e-2


def test_awq_says_where_it_cannot_scale() -> None:
    report = patch(hf_model("Llama"), "awq", skip=("lm_head", "k_proj", "up_proj"))
    notes = {row.name: row.quantizer for row in report.replaced if ".0." in row.name}
    assert "k_proj, which is kept, reads" in notes["model.layers.0.self_attn.q_proj"]
    assert "up_proj, which makes its input, is kept" in notes["model.layers.0.mlp.down_proj"]
    assert notes["model.layers.0.self_attn.o_proj"] == "awq"
    assert "awq cannot scale it" in str(report)
    with pytest.raises(NotImplementedError, match=r"layers\.0.*awq has nowhere.*q_proj"):
        patch(hf_model("Llama"), "awq", skip=("lm_head", "k_proj", "up_proj", "v_proj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reader_that_is_not_known_is_found_out(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A folding that changes the layer is refused: here rows of v_proj in the wrong order."""
    model = hf_model("Llama", dtype)
    wrong = awq_folding.row_scales
    monkeypatch.setattr(calibrate_layer, "row_scales", lambda *a: wrong(*a).roll(1))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[::5] *= 30
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(NotImplementedError, match=r"layers\.0.*awq's scales change the layer"):
        patch(model, "awq")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_norms_that_are_scaled_by_their_weight_or_by_one_more() -> None:
    scales = torch.rand(16) + 0.5
    x = torch.randn(3, 16)

    class Gemma(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, (16,)) * (1 + self.weight)

    class Squared(Gemma):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight**2

    layer_norm = nn.LayerNorm(16)
    nn.init.normal_(layer_norm.bias)
    for norm in (nn.RMSNorm(16), layer_norm, Gemma(torch.randn(16))):
        made = awq_folding.scaled_norm(norm, scales)
        assert made is not None
        torch.testing.assert_close(made(x) * scales, norm(x))
    assert awq_folding.scaled_norm(Squared(torch.randn(16)), None) is None
    assert awq_folding.scaled_norm(nn.Identity(), None) is None


def test_resumed_after_a_failure_it_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for quantizer in ("gptq", "awq"):
        model, folder = hf_model("Llama", num_hidden_layers=3), tmp_path / quantizer
        whole = patch(model, quantizer)
        expected = {k: v.clone() for k, v in model.state_dict().items()}
        whole.undo()
        rounded, calls = calibration.calibrate_layer, []

        def failing(layer: Any, *rest: Any, rounded: Any = rounded, calls: Any = calls) -> Any:
            calls.append(layer)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return rounded(layer, *rest)

        monkeypatch.setattr(calibration, "calibrate_layer", failing)
        where = lath.Calibration(IDS, folder)
        with pytest.raises(KeyboardInterrupt):
            patch(model, quantizer, where)
        assert not packed_codes(model)
        assert len(list(folder.glob("layer-*.safetensors"))) == 2
        report = patch(model, quantizer, where)
        assert len(calls) == 4, "the two layers that were saved must not be rounded again"
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)
        report.undo()
        monkeypatch.undo()


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    model = hf_model("Llama")
    patch(model, ids=lath.Calibration(IDS, folder)).undo()
    for options, field in (
        ({"weights": "int3-g16"}, "codec"), ({"search": True}, "search"),
        ({"quantizer": GPTQ(damping=0.1)}, "quantizer"), ({"quantizer": "awq"}, "quantizer"),
        ({"ids": lath.Calibration(tokens(6, 40, 5), folder)}, "tokens_sha256"),
        ({"only": ("layers.0",)}, "layers_sha256"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"another run.*{field}"):
            patch(model, **{"ids": lath.Calibration(IDS, folder), **options})
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"layer-0001.*other weights"):
        patch(model, ids=lath.Calibration(IDS, folder))
    # A damaged file, and a folder that is something else.
    model = hf_model("Llama")
    path = folder / "layer-0000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="corrupted"):
        patch(model, ids=lath.Calibration(IDS, folder))
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(path, other / "notes.txt")
    with pytest.raises(ValueError, match="not empty"):
        patch(model, ids=lath.Calibration(IDS, other))
    assert not packed_codes(model)


def test_windows_are_chosen_by_the_seed() -> None:
    from lath.integration.models import tiny_model

    _, tokenizer = tiny_model()
    text = "".join(f"{i} bottles of ink, " for i in range(200))
    made = [
        lath.Calibration.from_text(tokenizer, text, tokens=128, window=32, seed=seed).ids
        for seed in (0, 0, 1)
    ]
    assert made[0].shape == (4, 32)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert len({tuple(row.tolist()) for row in made[0]}) == 4
    with pytest.raises(ValueError, match=r"windows of 32.*tokens=100000"):
        lath.Calibration.from_text(tokenizer, text, tokens=100_000, window=32)
    joined = lath.Calibration.from_text(tokenizer, ["a" * 40, "b" * 40], tokens=64, window=32).ids
    assert joined.shape == (2, 32)


def test_memory_holds_the_hessians_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    plain = calibrate_layer.Hessian

    def counted(*arguments: Any) -> Any:
        nonlocal most
        made = plain(*arguments)
        alive.add(made)
        most = max(most, len(alive))
        return made

    monkeypatch.setattr(calibrate_layer, "Hessian", counted)
    patch(hf_model("Llama", num_hidden_layers=4))
    assert most == 4  # q, k and v; o; gate and up; down


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ids": None}, ValueError, "needs calibration="),
        ({"quantizer": "rtn"}, ValueError, "uses no calibration"),
        ({"quantizer": "hqq"}, ValueError, "uses no calibration"),
        ({"quantizer": "hqq", "ids": None}, ValueError, r"q_proj.*has none"),
        ({"weights": None}, ValueError, "needs weights"),
        ({"skip": ()}, NotImplementedError, r"'model.layers' only, not 'lm_head'"),
        ({"ids": IDS[0]}, ValueError, r"\[texts, tokens\]"),
        ({"ids": IDS.float()}, TypeError, "int64"),
        ({"quantizer": GPTQ(damping=0.0), "ids": IDS[:1, :8]}, ValueError, r"layers\.0.*singular"),
        ({"quantizer": AWQ, "ids": None}, TypeError, "quantizer must be"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], match: str) -> None:
    model = hf_model("Llama")
    modules = dict(model.named_modules())
    with pytest.raises(error, match=match):
        patch(model, **options)
    assert dict(model.named_modules()) == modules


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="evaluation mode"):
        patch(hf_model("Llama").train())


def test_patching_again_with_another_quantiser_is_refused() -> None:
    model = hf_model("Llama")
    report = patch(model)
    assert not patch(model).replaced
    with pytest.raises(ValueError, match=r"quantizer='gptq'.*undo"):
        lath.patch(model, CODEC, backend="reference", activations="float")
    report.undo()


def test_layers_in_several_places_are_refused() -> None:
    model = hf_model("Llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(
        NotImplementedError, match=r"gate_proj is used in several places.*layers\.1"
    ):
        patch(model)
    model = hf_model("Llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(NotImplementedError, match=r"layers\.1.*up_proj is used.*layers\.0"):
        patch(model)
    patch(model, skip=("lm_head", "up_proj")).undo()


class Branches(nn.Module):
    """Layers in one list that are no chain: the second reads what the first read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(2))

    def forward(self, ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(ids)
        return self.layers[0](x) + self.layers[1](x)


def test_layers_that_are_no_chain_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"not what layers\.0 returns"):
        patch(Branches().eval(), skip=())
    with pytest.raises(NotImplementedError, match="ModuleList"):
        patch(nn.Sequential(nn.Embedding(128, 16), nn.Linear(16, 16)).eval(), skip=())


def test_the_chain_is_the_model() -> None:
    for name in ("Llama", "Gemma2", "GptOss"):
        model = hf_model(name)
        layers = find_layers(model, ["model.layers.0.self_attn.q_proj"])
        with torch.no_grad():
            chain, hidden = record_chain(model, layers, IDS)
            assert len(hidden) == 6
            for row, x in zip(IDS, hidden, strict=True):
                for index in range(len(layers)):
                    x = chain.run(index, x)
                expected = model(row[None], use_cache=False).logits
                logits = model.lm_head(model.model.norm(x))
                if name == "Gemma2" and model.config.final_logit_softcapping:
                    cap = model.config.final_logit_softcapping
                    logits = torch.tanh(logits / cap) * cap
                torch.testing.assert_close(logits, expected)


def test_packed_models_run_saved_and_loaded(tmp_path: Path) -> None:
    """The state of a model packed by AWQ holds its scaled norms as well."""
    model = hf_model("Llama")
    patch(model, "awq")
    other = hf_model("Llama")
    lath.patch(other, CODEC, backend="reference", activations="float", progress=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(IDS).logits, other(IDS).logits)
