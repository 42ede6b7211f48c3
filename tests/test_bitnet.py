"""BitNet checkpoints in Hugging Face's layout: written with transformers' own packing, read here,
run beside transformers' own layers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitNetConfig, BitNetForCausalLM
from transformers.integrations.bitnet import (
    AutoBitLinear,
    BitLinear,
    pack_weights,
    replace_with_bitnet_linear,
    unpack_weights,
)
from transformers.utils.quantization_config import BitNetQuantConfig

import lath
from lath.formats.activations import ActivationFormat
from lath.integration.bitnet import BitNetLayout, bitnet_weight, load_bitnet, unpack_rows
from lath.integration.cache import cache_argument
from lath.integration.linear import PackedLinear
from lath.integration.models import load_model
from lath.integration.run_command import (
    DEFAULT_WEIGHTS,
    NO_HEAD,
    Patches,
    RunOptions,
    with_weights,
)
from lath.integration.store import ModelError
from lath.reference.linear import quantize_activations

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CLASSES = ["bitlinear", "autobitlinear"]
U32 = 2.0**-24


def write_checkpoint(
    folder: Path, linear_class: str, fields: dict[str, Any] | None = None, tied: bool = False
) -> None:
    """Random ternary weights, packed by transformers; scales that no power of two divides."""
    torch.manual_seed(0)
    config = BitNetConfig(**SIZES, tie_word_embeddings=tied)
    config.dtype = torch.float32
    model = BitNetForCausalLM(config)
    state = model.state_dict()
    if tied:
        del state["lm_head.weight"]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            ternary = torch.randint(-1, 2, module.weight.shape).float()
            factor = (module.in_features**-0.5) * (1 + 0.3 * torch.rand(1))
            state[f"{name}.weight"] = pack_weights(ternary)
            state[f"{name}.weight_scale"] = 1 / factor if linear_class == "bitlinear" else factor
    save_file({k: t.contiguous() for k, t in state.items()}, folder / "model.safetensors")
    config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {
        "quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline",
        **(fields or {}),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))


def transformers_model(folder: Path, linear_class: str) -> Any:
    """The checkpoint in transformers' own layers, which unpack to floats in every call."""
    config = BitNetConfig.from_pretrained(folder)
    quantization = BitNetQuantConfig(linear_class=linear_class)
    del config.quantization_config
    model = BitNetForCausalLM(config)
    model = replace_with_bitnet_linear(model, ["lm_head"], quantization)
    state = load_file(folder / "model.safetensors")
    if linear_class == "autobitlinear":
        state = {
            k: unpack_weights(t, torch.float32) if t.dtype == torch.uint8 else t
            for k, t in state.items()
        }
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.dtype = torch.float32
    return model.eval()


@pytest.fixture(autouse=True)
def _eager() -> Any:
    """transformers compiles parts of its layers; the same code runs without a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def layers(model: Any, kind: Any) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


def test_rows_are_unpacked_as_transformers_packs_them() -> None:
    for rows in (1, 3, 4, 6, 64, 97):
        ternary = torch.randint(-1, 2, (rows, 20))
        packed = pack_weights(ternary.clone())
        assert torch.equal(unpack_rows(packed, rows).int() - 1, ternary.int())
    packed[0, 0] |= 3
    with pytest.raises(ValueError, match="it has 3"):
        unpack_rows(packed, 97)


def exact_model(folder: Path, linear_class: str) -> Any:
    """transformers' "bitlinear" in float64, where its sums are exact: what both are measured by."""
    model = transformers_model(folder, "bitlinear").double()
    for module in layers(model, BitLinear).values():
        module.dtype = torch.float64
        if linear_class == "autobitlinear":
            module.weight_scale = 1 / module.weight_scale
    return model


def margin(x: torch.Tensor) -> float:
    """How far the codes of x [..., K] are from a tie: the least distance to a half."""
    scaled = x * (127 / x.abs().amax(dim=-1, keepdim=True))
    return float((scaled - scaled.floor() - 0.5).abs().min())


@pytest.mark.parametrize("codec", ["ternary-s32", "ternary-1.6-s32"])
@pytest.mark.parametrize("linear_class", CLASSES)
def test_every_layer_and_the_logits(tmp_path: Path, linear_class: str, codec: str) -> None:
    """Layer by layer on the same inputs, then the whole model.

    A layer is integers times two scales, rounded a few times in fp32 on each side; autobitlinear
    rounds each activation and sums in fp32 besides. Logits: measured from transformers' in float64,
    ours are no further than eight times as far as transformers' in fp32. No code of the tokens lies
    near a tie, where rounding would decide; that is checked, not hoped for.
    """
    write_checkpoint(tmp_path, linear_class)
    theirs, ours = transformers_model(tmp_path, linear_class), load_bitnet(tmp_path, codec=codec)
    exact = exact_model(tmp_path, linear_class)
    packed = layers(ours, PackedLinear)
    peers = layers(theirs, (BitLinear, AutoBitLinear))
    assert packed.keys() == peers.keys()
    assert len(packed) == 14
    assert all(str(m.codec) == codec and str(m.activations) == "int8" for m in packed.values())
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, peer in peers.items():
        peer.register_forward_hook(
            lambda _, args, y, name=name: seen.__setitem__(name, (args[0], y))
        )
    ids = torch.tensor([[3, 14, 15, 92]])
    with torch.inference_mode():
        truth, expected, logits = exact(ids).logits, theirs(ids).logits, ours(ids).logits
        assert min(margin(x.double()) for x, _ in seen.values()) > 2.0**-14, "choose other tokens"
        for name, (x, y) in seen.items():
            codes, scales = quantize_activations(x[0].numpy(), ActivationFormat("int8"))
            weight = packed[name].qtensor.dequantize().double().numpy()
            gauge = np.abs(codes * scales) @ np.abs(weight).T
            error = (packed[name](x) - y)[0].abs().double().numpy()
            roundings = 8 + (0 if linear_class == "bitlinear" else x.shape[-1])
            assert (error <= roundings * U32 * gauge).all(), name
        limit = 8 * (expected - truth).abs().max()
        assert limit < 1e-4
        assert (logits - truth).abs().max() <= limit
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        wrong = flipped(tmp_path, codec)(ids).logits
        assert (wrong - truth).abs().max() > limit


def flipped(folder: Path, codec: str) -> Any:
    """The checkpoint with one trit that is another."""
    name = "model.layers.0.mlp.up_proj"
    state = load_file(folder / "model.safetensors")
    first = int(state[f"{name}.weight"][0, 0]) & 3
    state[f"{name}.weight"][0, 0] += 1 if first < 2 else -1
    save_file(state, folder / "model.safetensors")
    return load_bitnet(folder, codec=codec)


@pytest.mark.parametrize("tied", [False, True])
def test_it_generates(tmp_path: Path, tied: bool) -> None:
    write_checkpoint(tmp_path, "autobitlinear", tied=tied)
    ids = torch.tensor([[3, 14, 15, 92]])
    options = {"max_new_tokens": 4, "do_sample": False}
    theirs = transformers_model(tmp_path, "autobitlinear").generate(ids, **options)
    ours = load_bitnet(tmp_path)
    assert torch.equal(ours.generate(ids, **options), theirs)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    half = load_bitnet(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.generate(ids, **options).shape == theirs.shape


@pytest.mark.parametrize("codec", ["ternary-s32", "ternary-1.6-s32"])
def test_attention_cache_and_step_are_patched(tmp_path: Path, codec: str) -> None:
    """A loaded model's layers are packed already; a patch of the rest takes it as it is."""
    pytest.importorskip("numba")
    write_checkpoint(tmp_path, "autobitlinear", tied=True)
    model = load_bitnet(tmp_path, codec=codec)
    ids = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(0))

    def logits_of(decode: str) -> torch.Tensor:
        given = {"attention": "int8", "kv": "int8", "decode": decode}
        with torch.no_grad(), lath.patch(model, None, **given) as report:
            head = lath.patch(model, "int8-g64", skip=(), only=("lm_head",))
            written = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
            assert written.shape == (1, 98)
            assert report.new_cache is not None
            given = {cache_argument(model): report.new_cache(), "use_cache": True}
            model(ids, **given)
            logits = model(ids[:, :1], **given).logits[0, -1]
            counts = {} if report.decode is None else report.decode.counts
            assert counts.get("fused", 0) == (8 if decode == "fused" else 0)
            head.undo()
        return logits

    expected, fused = logits_of("modules"), logits_of("fused")
    assert float((fused - expected).norm() / expected.norm()) < 0.03
    rows = lath.patch(model, codec, activations="int8", kv="int8", dry_run=True).rows
    assert [row.name for row in rows if row.action != "already packed"] == ["lm_head"]


def test_scales_divide_or_multiply() -> None:
    packed = pack_weights(torch.ones(16, 4))
    for linear_class, value in zip(CLASSES, (0.25, 4.0), strict=True):
        layout = BitNetLayout.of({"quant_method": "bitnet", "linear_class": linear_class})
        weight = bitnet_weight(packed, torch.tensor([4.0]), 16, layout, "ternary")
        assert bool((weight.dequantize() == value).all())
    for scale, match in ((0.0, "positive"), (-1.0, "positive"), (float("nan"), "positive"),
                         (1e-9, "use '-s32'")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            bitnet_weight(packed, torch.tensor([scale]), 16, BitNetLayout(True), "ternary")
    for codec in ("int2", "ternary-g32"):
        with pytest.raises(ValueError, match="ternary one without groups"):
            bitnet_weight(packed, torch.tensor([1.0]), 16, BitNetLayout(True), codec)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"linear_class": "bitlinear2"}, "linear_class"),
        ({"quantization_mode": "online"}, "quantization_mode"),
        ({"use_rms_norm": True}, "use_rms_norm"),
        ({"zero_point": 1}, r"also has \['zero_point'\]"),
        ({"modules_to_not_convert": ["model.layers.0.mlp"]}, "modules_to_not_convert names it"),
    ],
)
def test_conventions_that_are_not_known_are_refused(
    tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    write_checkpoint(tmp_path, "bitlinear", fields)
    with pytest.raises(ModelError, match=match):
        load_bitnet(tmp_path)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "autobitlinear")
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj"

    def refused(match: str, **changes: Any) -> None:
        changed = {k: t for k, t in {**state, **changes}.items() if t is not None}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=match):
            load_bitnet(tmp_path)

    refused(f"{name} .* has no weight_scale", **{f"{name}.weight_scale": None})
    refused("weight_scale but no uint8", **{f"{name}.weight": torch.zeros(32, 64)})
    refused(f"{name}: packed must have ceil", **{f"{name}.weight": state[f"{name}.weight"][:-1]})
    refused("no such linear layer", **{"model.x.weight": torch.zeros(1, 1, dtype=torch.uint8),
                                       "model.x.weight_scale": torch.ones(1)})  # fmt: skip
    refused("missing .*model.norm.weight", **{"model.norm.weight": None})
    refused("unexpected .*model.other", **{"model.other": torch.ones(1)})


def test_the_command_line_loads_them(tmp_path: Path) -> None:
    """`load_model` knows the checkpoint by its config."""
    write_checkpoint(tmp_path, "autobitlinear")
    load_model("tiny")[1].save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    assert len(layers(model, PackedLinear)) == 14
    assert tokenizer("a").input_ids


def test_run_leaves_its_layers_as_they_are(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "autobitlinear")
    model = load_bitnet(tmp_path)
    options = RunOptions(
        "a folder", DEFAULT_WEIGHTS, "auto", "auto", ("lm_head",), NO_HEAD, False, "", 1, "auto", 1,
        kv="int8",
    )  # fmt: skip
    chosen, note = with_weights(model, options)
    assert chosen.weights is None
    assert "ternary-s32" in note
    patches = Patches(model, chosen)
    assert patches.body.attention
    patches.undo()
    other = dataclasses.replace(options, weights="int8")
    assert with_weights(model, other) == (other, "")
    with pytest.raises(ValueError, match="packed already"):
        Patches(model, other)
    dense = BitNetForCausalLM(BitNetConfig(**SIZES))
    assert with_weights(dense, options) == (options, "")
