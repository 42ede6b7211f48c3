"""`lath.load`: what is packed while it is read is what `lath.patch` makes of the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bitnet import write_checkpoint

import lath
from hf_models import generate, hf_model, tokens
from lath.integration import skeleton
from lath.integration.find import OUTPUT_LAYER
from lath.integration.linear import PackedLinear
from lath.integration.store import ModelError
from lath.verbs.quantize import quantize

pytestmark = pytest.mark.usefixtures("no_grad")
PIECES = ("int4-g16-asym", "int3-g32-fzero", "int1", "int8-s32", "int4-g32-s8", "int4-g32-fp8",
          "nf4-g32", "mxfp4", "e4m3", "ternary-g32", "ternary-1.6-g32")  # fmt: skip
WHOLE = ("nvfp4", "lut3", "ternary", "vq2-16", "sparse50-int8", "int4-g32+out1%")


def write_model(folder: Path, tied: bool, shards: bool = False, **options: Any) -> Any:
    model = hf_model("Llama", tie_word_embeddings=tied, **options)
    model.save_pretrained(folder, max_shard_size="60KB" if shards else "1GB")
    return model


def packed_layers(model: Any) -> dict[str, PackedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keep_codes", [True, False])
def test_it_is_the_patched_model(
    tmp_path: Path, tied: bool, keep_codes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(skeleton, "_CHUNK_WEIGHTS", 64 * 20)
    dense = write_model(tmp_path, tied, shards=True)
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = lath.load(tmp_path, "int4-g32", head="int8-g64", keep_codes=keep_codes)
    lath.patch(dense, "int4-g32")
    lath.patch(dense, "int8-g64", skip=(), only=(OUTPUT_LAYER,))
    ours, theirs = packed_layers(model), packed_layers(dense)
    assert ours.keys() == theirs.keys()
    for name, module in ours.items():
        other = theirs[name]
        assert module.qtensor.digest() == other.qtensor.digest()
        assert (module.activations, module.backend) == (other.activations, other.backend)
        assert module.is_compact is not keep_codes
    assert not model.training
    assert model.config.tie_word_embeddings is False
    model.set_attn_implementation("eager")  # as `hf_model` has it
    ids = tokens(1, 40)
    assert torch.equal(model(ids).logits, dense(ids).logits)
    model.tie_weights()  # an output layer of its own stays so
    assert torch.equal(generate(model, ids), generate(dense, ids))


def test_attention_cache_and_step(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    write_model(tmp_path, True)
    model = lath.load(tmp_path, "int4-g32")
    with lath.patch(model, None, attention="int8", kv="int8", decode="fused") as report:
        generate(model, tokens(1, 70))
        assert report.decode is not None
        assert report.decode.counts["fused"] == 7
    assert all(module.is_compact for module in packed_layers(model).values())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    write_model(tmp_path, True, attention_bias=True)
    first = lath.load(tmp_path, "int3-g32-asym", backend="reference")
    again = tmp_path / "again"
    first.save_pretrained(again)
    second = lath.load(again, "int8", backend="reference")
    for name, module in packed_layers(second).items():
        assert module.qtensor.digest() == packed_layers(first)[name].qtensor.digest()
    ids = tokens(1, 10)
    assert torch.equal(first(ids).logits, second(ids).logits)
    state = load_file(again / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    state[f"{name}.weight"][0] ^= 1
    save_file(state, again / "model.safetensors")
    with pytest.raises(ModelError, match=f"{name}: .*corrupted"):
        lath.load(again, backend="reference")


@pytest.mark.parametrize("codec", [*PIECES, *WHOLE])
def test_a_weight_in_pieces_is_the_weight(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skeleton, "_CHUNK_WEIGHTS", 64 * 20)
    dense = write_model(tmp_path, True)
    model = lath.load(tmp_path, codec, head=None, backend="reference", skip=("layers.1",))
    name = "model.layers.0.mlp.gate_proj"
    assert list(packed_layers(model)) == [n for n in packed_layers(model) if ".0." in n]
    expected = quantize(dense.get_submodule(name).weight, codec)
    found = packed_layers(model)[name].qtensor
    assert found.digest() == expected.digest()
    independent = getattr(expected.codec, "rows_are_independent", False)
    assert independent == (codec in PIECES)


def test_codecs_of_a_whole_weight_need_it_whole() -> None:
    """Negative control: their pieces are other numbers."""
    weight = torch.randn(64, 64) * torch.linspace(1, 20, 64)[:, None]
    for codec in ("nvfp4", "ternary"):
        pieces = [quantize(piece, codec).dequantize() for piece in weight.split(16)]
        assert not torch.equal(torch.cat(pieces), quantize(weight, codec).dequantize())


def test_bitnet_and_its_output_layer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "bitlinear", tied=True)
    model = lath.load(
        tmp_path, "ternary-1.6-s32", head="int8", backend="reference", dtype="bfloat16"
    )
    codecs = {str(module.codec) for module in packed_layers(model).values()}
    assert codecs == {"ternary-1.6-s32", "int8"}
    assert model.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="ternary one without groups"):
        lath.load(tmp_path, "int4", backend="reference")


def test_what_stays_dense(tmp_path: Path) -> None:
    dense = write_model(tmp_path, True)
    model = lath.load(tmp_path, head=None, skip=("down_proj",), backend="reference")
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        if "proj" not in name or "down_proj" in name:
            assert torch.equal(parameter, dense.get_parameter(name)), name
    assert torch.equal(model.model.rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq)
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 5}))
    assert lath.load(tmp_path, backend="reference").generation_config.max_new_tokens == 5


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        lath.load(tmp_path)
    write_model(tmp_path, False)
    with pytest.raises(ValueError, match="backend must be one of"):
        lath.load(tmp_path, backend="gpu")
    state = load_file(tmp_path / "model.safetensors")

    def refused(match: str, **changes: Any) -> None:
        changed = {k: t for k, t in {**state, **changes}.items() if t is not None}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=match):
            lath.load(tmp_path, backend="reference")

    up = "model.layers.0.mlp.up_proj.weight"
    refused("missing .*up_proj", **{up: None})
    refused("unexpected .*other", **{"model.other": torch.ones(1)})
    refused("up_proj: the weight is", **{up: torch.ones(8, 64)})
    refused("norm.weight of the checkpoint is", **{"model.norm.weight": torch.ones(8)})
    refused("up_proj: .*finite", **{up: state[up] / 0})
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot read"):
        lath.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        lath.load(tmp_path)
