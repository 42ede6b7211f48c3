"""The masks of transformers as lath's attention takes them: known, built, made by the caller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import lath
from hf_models import bare_module, call_attention, forward, hf_model, padded, qkv, relative, tokens

pytest.importorskip("transformers")
from lath.integration.attention_mask import Mask, lath_mask, recognise

ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def patched(model: Any, **options: Any) -> lath.PatchReport:
    return lath.patch(model, None, **{"backend": "reference", **options})


def test_known_mask_functions_are_recognised() -> None:
    from transformers import masking_utils as hf

    assert recognise(hf.causal_mask_function) == (True, None)
    assert recognise(hf.bidirectional_mask_function) == (False, None)
    assert recognise(hf.sliding_window_causal_mask_function(7)) == (True, 7)
    assert recognise(hf.sliding_window_bidirectional_mask_function(7)) == (False, 8)
    chunked = hf.chunked_causal_mask_function(7, torch.zeros(1, dtype=torch.int64))
    for other in (chunked, lambda b, h, q, k: q >= k, hf.or_masks(hf.causal_mask_function)):
        assert recognise(other) is None


def test_a_mask_is_not_built_where_it_is_known() -> None:
    from transformers import masking_utils as hf

    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 9, "q_offset": 4}
    mask = lath_mask(**sizes, mask_function=hf.sliding_window_causal_mask_function(3))
    assert isinstance(mask, Mask)
    assert mask.dense is None
    assert (mask.causal, mask.window, mask.query_offset, mask.padding) == (True, 3, 4, None)
    chunked = hf.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64))
    mask = lath_mask(**sizes, mask_function=chunked)
    assert isinstance(mask, Mask)
    assert mask.dense is not None
    assert mask.dense.shape == (2, 1, 5, 9)
    assert mask.contiguous() is mask


def test_no_mask_means_what_it_means_in_transformers() -> None:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)

    q, k, v = qkv(5, 9)
    kept = k[:, :, :5], v[:, :, :5]
    assert_close(call_attention(bare_module(), q, k, v, None), sdpa(q, *kept, is_causal=True))
    assert_close(call_attention(bare_module(False), q, k, v, None), sdpa(q, k, v))
    assert_close(call_attention(bare_module(), q, k, v, None, is_causal=False), sdpa(q, k, v))
    assert_close(call_attention(bare_module(), q[:, :, :1], k, v, None), sdpa(q[:, :, :1], k, v))


def test_masks_that_a_caller_made() -> None:
    q, k, v = qkv(5, 9, 2)
    allowed = torch.rand(2, 1, 5, 9) > 0.4
    allowed[0, 0, 2] = False
    additive = torch.where(allowed, torch.randn(2, 1, 5, 9), torch.finfo(torch.float32).min)
    want = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    assert_close(call_attention(bare_module(), q, k, v, allowed), torch.nan_to_num(want))
    biased = torch.where(allowed, additive, float("-inf"))
    want = functional.scaled_dot_product_attention(q, k, v, attn_mask=biased, enable_gqa=True)
    out = call_attention(bare_module(), q, k, v, additive)
    assert_close(out, torch.nan_to_num(want))
    assert not out[0, :, 2].any()


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=ROUNDING, rtol=ROUNDING)


def test_unknown_mask_functions_are_built() -> None:
    """Image tokens that see each other, and packed sequences: other models' and trainers' masks."""
    model = hf_model("Llama")
    ids = tokens(1, 90)
    place = torch.cat([torch.arange(50), torch.arange(40)])[None]
    expected = forward(model, ids, position_ids=place)
    whole = forward(model, ids)
    with patched(model, kv="float"):
        packed = forward(model, ids, position_ids=place)
    assert relative(packed - expected, expected) < ROUNDING
    assert relative(whole - expected, expected) > 0.01


def test_a_bidirectional_model() -> None:
    model = hf_model("Mistral")
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    ids, mask = padded([90, 60], "right")
    expected = forward(model, ids, attention_mask=mask)[mask.bool()]
    causal = forward(hf_model("Mistral"), ids, attention_mask=mask)[mask.bool()]
    with patched(model, kv="float"):
        out = forward(model, ids, attention_mask=mask)[mask.bool()]
    assert relative(out - expected, expected) < ROUNDING
    assert relative(causal - expected, expected) > 0.01


def test_an_encoder_decoder_reads_across() -> None:
    from transformers import BartConfig, BartModel

    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = BartModel(config).eval()
    ids, mask = padded([40, 25], "right")
    ids = ids % 64
    inputs = {"attention_mask": mask, "decoder_input_ids": tokens(2, 12) % 64}
    expected = model(ids, **inputs).last_hidden_state
    with patched(model, attention="int8"):
        out = model(ids, **inputs).last_hidden_state
    assert 0 < relative(out - expected, expected) < 0.02
