"""What a layer of the fused decode step may have beside Llama's: other functions between gate and
up, sub-norms, ternary weights, layers without rotation. Helpers and tolerances are those of
test_hf_decode.py."""

from __future__ import annotations

import pytest
import torch

import lath
from hf_models import relative

pytest.importorskip("transformers")
pytest.importorskip("numba")
from test_hf_decode import PROMPT, ROUNDING, STEPS, admitted, decoder, fused_tokens, patched, steps

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize(("act", "function"), [("gelu_pytorch_tanh", "gelu_tanh"),
                                               ("relu2", "relu2")])  # fmt: skip
def test_other_functions_between_gate_and_up(act: str, function: str) -> None:
    model = decoder("Llama", hidden_act=act)
    with patched(model, "modules"):
        expected = steps(model, 70, 3)
    with patched(model, "fused"):
        out = steps(model, 70, 3)
        stack = model.__dict__["_lath_decode"].ready(model).step.stack
        assert [layer.function for layer in stack.layers] == [function] * 2
    assert relative(out - expected, expected) < ROUNDING


def test_sub_norms_go_by_what_they_are() -> None:
    """Under another name a norm is found; two of them, or one that is no RMSNorm, are refused."""
    model = decoder("BitNet")
    for layer in model.model.layers:
        forward = type(layer.mlp).forward
        layer.mlp.ffn_layernorm = layer.mlp._modules.pop("ffn_sub_norm")
        other = type("Other", (type(layer.mlp),), {
            "forward": forward, "ffn_sub_norm": property(lambda self: self.ffn_layernorm),
        })  # fmt: skip
        layer.mlp.__class__ = other
    with patched(model, "modules"):
        expected = steps(model, 70, 3)
    with patched(model, "fused"):
        assert relative(steps(model, 70, 3) - expected, expected) < ROUNDING
    model.model.layers[1].mlp.second = torch.nn.RMSNorm(96, eps=1e-6)
    with pytest.raises(ValueError, match=r"the MLP of layer 1 has \['ffn_layernorm', 'second'\]"):
        patched(model, "fused")
    centred = decoder("BitNet")
    centred.model.layers[0].self_attn.attn_sub_norm = torch.nn.LayerNorm(64)
    with pytest.raises(ValueError, match="layer 0 is computed differently"):
        patched(centred, "fused")
    odd = decoder("BitNet", intermediate_size=100)
    with pytest.raises(ValueError, match="norm of 100 before a product of 100"):
        patched(odd, "fused")


@pytest.mark.parametrize("codec", ["ternary-s32", "ternary-1.6-s32"])
def test_ternary_weights_and_tokens_in_int8(codec: str) -> None:
    model = decoder("BitNet", hidden_size=160, head_dim=32, num_attention_heads=5,
                    num_key_value_heads=5, intermediate_size=320)  # fmt: skip
    given = {"weights": codec, "activations": "int8", "kv": "float", "skip": ()}
    with lath.patch(model, decode="modules", **given):
        expected = steps(model, PROMPT, STEPS)
    with lath.patch(model, decode="fused", **given) as report:
        out, limit = steps(model, PROMPT, STEPS), admitted(model)
        assert fused_tokens(report) == STEPS
    errors = (out - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.max()) < limit
    assert float(errors.median()) < ROUNDING


def test_layers_without_rotation_are_found() -> None:
    model = decoder("SmolLM3")
    with patched(model, "fused"):
        ready = model.__dict__["_lath_decode"].ready(model)
        assert [own.rotate for own in ready.readings] == [True, False]
