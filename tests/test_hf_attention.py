"""lath's attention in transformers: masks of every kind, patching and undoing, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lath
from hf_models import (
    bare_module,
    call_attention,
    forward,
    generate,
    hf_model,
    padded,
    positions,
    qkv,
    relative,
    tokens,
)

pytest.importorskip("transformers")

ROUNDING = 1e-5
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def patched(model: Any, **options: Any) -> lath.PatchReport:
    return lath.patch(model, None, **{"backend": "reference", **options})


# Patching


def test_patch_and_undo_leave_no_trace() -> None:
    model, other = hf_model("Llama"), hf_model("Llama")
    ids = tokens(1, 70)
    before = dict(model.__dict__)
    expected, text = forward(model, ids), generate(model, ids)
    report = patched(model, attention="int8", kv="int8")
    assert report.active
    assert not torch.equal(forward(model, ids), expected)
    assert torch.equal(forward(other, ids), expected)
    report.undo()
    report.undo()
    assert dict(model.__dict__) == before
    assert model.config._attn_implementation == "eager"
    assert torch.equal(forward(model, ids), expected)
    assert torch.equal(generate(model, ids), text)
    report.redo()
    assert model.config._attn_implementation == "lath-reference"
    report.undo()


def test_patching_again() -> None:
    model = hf_model("Llama")
    first = patched(model, attention="int8", kv="k8v4")
    second = patched(model, attention="int8", kv="k8v4")
    assert {row.action for row in second.attention} == {"already patched"}
    second.undo()
    assert model.config._attn_implementation == "lath-reference"
    with pytest.raises(ValueError, match=r"int8/int4.*undo"):
        patched(model, attention="int8", kv="int8")
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"attention was changed.*'eager'"):
        first.undo()
    model.set_attn_implementation("lath-reference")
    first.undo()
    assert model.config._attn_implementation == "eager"


def test_redo_waits_for_the_other_patch() -> None:
    model = hf_model("Llama")
    first = patched(model, attention="int8")
    first.undo()
    with patched(model, kv="int8"), pytest.raises(RuntimeError, match=r"kv='int8'.*undo"):
        first.redo()
    first.redo()
    assert model.config._attn_implementation == "lath-reference"
    first.undo()
    assert model.config._attn_implementation == "eager"


def test_undone_after_an_exception() -> None:
    model = hf_model("Llama")
    with pytest.raises(KeyError):  # noqa: SIM117
        with patched(model, attention="int8"):
            raise KeyError
    assert model.config._attn_implementation == "eager"


def test_the_report() -> None:
    model = hf_model("Llama", torch.bfloat16, head_dim=64)
    plan = patched(model, attention="int8", kv="int8", dry_run=True)
    assert model.config._attn_implementation == "eager"
    assert "would replace" in str(plan)
    report = patched(model, attention="int8", kv="int8")
    attention, cache = report.attention
    assert (attention.name, attention.before, attention.after) == ("attention", "eager", "int8")
    # 2 layers, 2 heads, 64 channels of keys and of values, 2 bytes each
    assert cache.bytes_per_token_before == 2 * 2 * 64 * 2 * 2
    # codes 64 + 64, per page 4 * 64 scales, 16 of keys, up to 128 aligned; index 7 * 64 + 16
    assert cache.bytes_per_token_after == 2 * 2 * (128 + (64 * 4 + 16 + 112 + 7 * 64 + 16) / 64)
    assert "bytes per token" in str(report)
    assert report.weights == "unchanged"
    assert report.rows == []
    report.undo()


def test_weights_and_attention_in_one_patch() -> None:
    model = hf_model("Llama")
    ids = tokens(1, 70)
    expected = forward(model, ids)
    with lath.patch(
        model, "int8-g16", attention="int8", kv="int8", backend="reference", progress=False,
        activations="float",
    ) as report:  # fmt: skip
        assert report.replaced
        assert report.attention
        assert relative(forward(model, ids) - expected, expected) < 0.05
        assert generate(model, ids).shape == (1, 78)
    assert torch.equal(forward(model, ids), expected)


def test_a_copy_of_a_patched_model_works() -> None:
    model = hf_model("Llama")
    ids = tokens(1, 100)
    with patched(model, attention="int8", kv="int8"):
        expected = generate(model, ids)
        other = copy.deepcopy(model)
    assert torch.equal(generate(other, ids), expected)
    assert other._prepare_cache_for_generation.__self__ is other


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention": "int4"}, ValueError, "attention must be.*int4"),
        ({"attention": True}, TypeError, "attention must be a str.*bool"),
        ({"kv": "int3"}, ValueError, "kv must be.*int3"),
        ({"kv": 8}, TypeError, "kv must be a str.*8"),
        ({"kv": "int8", "backend": "gpu"}, ValueError, "backend.*gpu"),
    ],
)
def test_malformed_options(options: Any, error: type[Exception], message: str) -> None:
    model = hf_model("Llama")
    with pytest.raises(error, match=message):
        patched(model, **options)
    assert model.config._attn_implementation == "eager"


def test_models_that_cannot_be_patched() -> None:
    with pytest.raises(TypeError, match=r"PreTrainedModel.*Linear"):
        patched(torch.nn.Linear(4, 4), attention="int8")
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match=r"kv='int8'.*encoder-decoder"):
        patched(BartForConditionalGeneration(config), kv="int8")


def test_nothing_to_patch_warns() -> None:
    with pytest.warns(UserWarning, match="weights, attention and kv are None"):
        patched(hf_model("Llama"))


# Caches that a caller asks for


def test_the_callers_own_cache_is_left_alone() -> None:
    from transformers import DynamicCache

    model = hf_model("Llama")
    ids = tokens(1, 70)
    expected = generate(model, ids)
    with patched(model, kv="float"):
        cache = DynamicCache(config=model.config)
        assert torch.equal(generate(model, ids, cache=cache), expected)
        assert cache.get_seq_length() == 77
        assert torch.equal(generate(model, ids, cache_implementation="static",
                                    disable_compile=True), expected)  # fmt: skip
        assert torch.equal(generate(model, ids, use_cache=False), expected)
        with pytest.raises(NotImplementedError, match="offloaded"):
            generate(model, ids, cache_implementation="offloaded")


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_static_cache_equals_the_dynamic_one(name: str) -> None:
    """int8 over the buffer of a static cache: what lies behind the tokens is no part of a page."""
    model = hf_model(name)
    ids, mask = padded([90, 70], "left")
    kw = {"attention_mask": mask, "disable_compile": True}
    expected = generate(model, ids, attention_mask=mask)
    with patched(model, attention="int8"):
        static = generate(model, ids, cache_implementation="static", **kw)
        assert torch.equal(static, generate(model, ids, attention_mask=mask))
    assert (static == expected).float().mean() > 0.95


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_static_cache_compiles_to_one_graph(name: str, compiler: str) -> None:
    from transformers import CompileConfig

    model = hf_model(name)
    ids = tokens(1, 70)
    mode = None if compiler == "aot_eager" else "default"
    config = CompileConfig(backend=compiler, fullgraph=True, mode=mode)
    config._compile_all_devices = True
    with patched(model, attention="int8"):
        expected = generate(model, ids, cache_implementation="static", disable_compile=True)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        out = generate(model, ids, cache_implementation="static", compile_config=config)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs >= 1
        assert not torch._dynamo.utils.counters["graph_break"]
        out2 = generate(model, ids, cache_implementation="static", compile_config=config)
    torch._dynamo.reset()
    assert torch.equal(out, expected)
    assert torch.equal(out2, expected)


def test_weights_of_attention_are_refused() -> None:
    model = hf_model("Llama")
    with patched(model, attention="int8"):
        for call_model, options in ((model, {}), (model.generate, {"max_new_tokens": 2})):
            with pytest.raises(NotImplementedError, match="output_attentions"):
                call_model(tokens(1, 9), output_attentions=True, **options)


# Refused


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"output_attentions": True}, "output_attentions"),
        ({"position_bias": torch.zeros(1, 4, 5, 5)}, "position_bias"),
        ({"head_mask": torch.ones(4)}, "head_mask"),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, "cu_seq_lens_q"),
        ({"block_indices": torch.zeros(1)}, "block_indices"),
        ({"cache": object()}, "cache"),
        ({"something_new": 3}, "something_new=3"),
    ],
)
def test_unsupported_arguments_are_named(options: Any, named: str) -> None:
    q, k, v = qkv(5, 5)
    with pytest.raises(NotImplementedError, match=named):
        call_attention(bare_module(), q, k, v, None, **options)


def test_training_with_dropout_is_refused() -> None:
    model = hf_model("Llama", attention_dropout=0.1).train()
    refused = pytest.raises(NotImplementedError, match=r"dropout=0\.1")
    with patched(model, attention="int8"), refused:
        forward(model, tokens(1, 5))


def test_there_is_no_backward() -> None:
    model = hf_model("Llama")
    with torch.enable_grad(), patched(model, attention="int8"):
        loss = forward(model, tokens(1, 5)).sum()
        with pytest.raises(NotImplementedError, match="backward"):
            loss.backward()


def test_padded_rows_are_the_rows_alone_without_a_cache() -> None:
    model = hf_model("Qwen3")
    ids, mask = padded([130, 70], "left")
    with patched(model, attention="int8"):
        out = forward(model, ids, attention_mask=mask, position_ids=positions(mask))
        for row, length in enumerate([130, 70]):
            alone = forward(model, tokens(1, length, row))
            assert relative(out[row, -length:] - alone[0], alone) < ROUNDING


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_a_model_compiles_without_a_cache(name: str) -> None:
    model = hf_model(name)
    ids, mask = padded([70, 40], "right")
    kw = {"attention_mask": mask, "use_cache": False}
    with patched(model, attention="int8"):
        expected = model(ids, **kw).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = compiled(ids, **kw).logits
    torch._dynamo.reset()
    # Inside a graph the mask is a tensor and padding is part of pages: rounded, not equal.
    assert relative((out - expected)[mask.bool()], expected) < 0.03
