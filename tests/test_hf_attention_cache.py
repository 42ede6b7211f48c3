"""LathCache under generate: beams, padding, cropping, chunks, several turns, and what it refuses.

With float pages nothing is rounded, so everything must equal the model's own eager attention and
dynamic cache to fp32 rounding, token for token; with quantised pages, what must not depend on the
road taken does not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lath
from hf_models import (
    forward,
    generate,
    hf_model,
    padded,
    positions,
    relative,
    tokens,
)

pytest.importorskip("transformers")
from lath.integration.cache import LathCache
from lath.integration.kv_codecs import kv_codecs

# fp32 sums in another order, two layers of 200 keys: some tens of units in the last place (2^-23).
ROUNDING = 1e-5
# Longer than the 64 first tokens, that a cache keeps as they are, a full page and a tail.
PROMPT = 150


pytestmark = pytest.mark.usefixtures("no_grad")


def patched(model: Any, **options: Any) -> lath.PatchReport:
    return lath.patch(model, None, **{"backend": "reference", **options})


def paged(model: Any, kv: str) -> LathCache:
    return LathCache(model.config, kv, backend="reference")


ROADS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 2, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 40},
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_float_pages_generate_what_the_own_cache_does(name: str, road: str) -> None:
    model = hf_model(name)
    ids = tokens(1, PROMPT)
    ids[:, 60:120] = ids[:, :60]  # something to look up
    expected = generate(model, ids, **ROADS[road])
    with patched(model, kv="float"):
        assert torch.equal(generate(model, ids, **ROADS[road]), expected)


@pytest.mark.parametrize("patched_assistant", [False, True])
def test_an_assistant_drafts(patched_assistant: bool) -> None:
    """The caches of both models are cropped to what was accepted."""
    model, assistant = hf_model("Llama"), hf_model("Llama")
    for layer in assistant.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.9)
    ids = tokens(1, PROMPT)
    expected = generate(model, ids, 16)
    if patched_assistant:
        patched(assistant, kv="int8")
    with patched(model, kv="float"):
        assert torch.equal(generate(model, ids, 16, assistant_model=assistant), expected)


def test_a_pass_that_failed_is_said() -> None:
    model = hf_model("Llama")
    with patched(model, kv="int8"):
        cache = paged(model, "int8")
        with pytest.raises(NotImplementedError, match="output_attentions"):
            forward(model, tokens(1, 5), cache, output_attentions=True)
        with pytest.raises(RuntimeError, match="ended with an error"):
            forward(model, tokens(1, 5), cache)
        cache.reset()
        forward(model, tokens(1, 5), cache)
        assert cache.get_seq_length() == 5


@pytest.mark.parametrize("kv", ["int8", "k4v2", "int8-planes", "e4m3"])
@pytest.mark.parametrize("road", ["several", "lookup", "chunks"])
def test_quantised_pages_generate_on_every_road(kv: str, road: str) -> None:
    model = hf_model("Mistral")
    ids = tokens(1, PROMPT)
    ids[:, 60:120] = ids[:, :60]
    with patched(model, kv=kv, attention="int8"):
        out = generate(model, ids, **ROADS[road])
    assert out.shape[1] == PROMPT + 8
    assert torch.equal(out[:1, :PROMPT], ids)


@pytest.mark.parametrize("attention", [None, "int8"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_left_padded_rows_are_the_rows_alone(name: str, attention: str | None) -> None:
    """Pages hold no padding, so even quantised rows do not see it."""
    model = hf_model(name)
    lengths = [PROMPT, 133, 70]
    ids, mask = padded(lengths, "left")
    with patched(model, kv="int8", attention=attention):
        out = generate(model, ids, attention_mask=mask)
        for row, length in enumerate(lengths):
            alone = generate(model, tokens(1, length, row))
            assert torch.equal(out[row, -8:], alone[0, -8:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_padding_on_either_side_then_more_tokens(name: str, side: str) -> None:
    """A padded prompt, then a padded piece: slots of padding lie between the tokens of a row."""
    model = hf_model(name)
    ids, mask = padded([100, 81], side)
    more, more_mask = padded([30, 17], side, seed=5)
    both = torch.cat([mask, more_mask], dim=1)
    place = positions(both)
    logits = {}
    pieces = (mask, place[:, : ids.shape[1]]), (both, place[:, ids.shape[1] :])
    for kv in (None, "float", "int8"):
        cache: Any = _dynamic(model) if kv is None else paged(model, kv)
        if kv is not None:
            model.set_attn_implementation("lath-float-reference")
        first, second = (
            forward(model, piece, cache, attention_mask=seen, position_ids=at)
            for piece, (seen, at) in zip((ids, more), pieces, strict=True)
        )
        logits[kv] = torch.cat([first[mask.bool()], second[more_mask.bool()]])
        if kv is not None:
            assert cache.layers[0].pages.lengths == both.sum(1).tolist()
        model.set_attn_implementation("eager")
    assert relative(logits["float"] - logits[None], logits[None]) < ROUNDING
    if name == "Llama":  # no window: slots of padding do not count, so rows are the rows alone
        model.set_attn_implementation("lath-float-reference")
        for row, (length, new) in enumerate([(100, 30), (81, 17)]):
            cache = paged(model, "int8")
            a = forward(model, tokens(1, length, row), cache)
            b = forward(model, tokens(1, new, 5 + row), cache)
            alone = torch.cat([a[0], b[0]])
            own = [part[row][m[row].bool()] for part, m in ((first, mask), (second, more_mask))]
            assert relative(torch.cat(own) - alone, alone) < ROUNDING


def _dynamic(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def test_chunks_leave_the_same_pages_as_one_prompt() -> None:
    model = hf_model("Qwen3")
    ids = tokens(2, 200)
    with patched(model, kv="int8", attention="int8"):
        whole, pieces = (paged(model, "int8") for _ in range(2))
        logits = forward(model, ids, whole)
        parts = [forward(model, piece, pieces) for piece in ids.split(48, dim=1)]
    first = [cache.layers[0].pages for cache in (whole, pieces)]
    assert first[0].lengths == first[1].lengths == [200, 200]
    for sequence in range(2):
        for a, b in zip(*(pages.dequantize(sequence) for pages in first), strict=True):
            assert torch.equal(a, b)
    # What attention reads differs: int8 keys of the prompt there, 16-bit ends and pages here.
    assert relative(torch.cat(parts, dim=1) - logits, logits) < 0.05


def test_float_chunks_are_one_prompt() -> None:
    model = hf_model("GptOss")
    ids, mask = padded([200, 90], "left")
    place = positions(mask)
    expected = forward(model, ids, attention_mask=mask, position_ids=place)[mask.bool()]
    with patched(model, kv="float"):
        cache = paged(model, "float")
        parts = [
            forward(
                model, ids[:, at : at + 48], cache,
                attention_mask=mask[:, : at + 48], position_ids=place[:, at : at + 48],
            )
            for at in range(0, 200, 48)
        ]  # fmt: skip
    logits = torch.cat(parts, dim=1)[mask.bool()]
    assert relative(logits - expected, expected) < ROUNDING


def test_several_turns_keep_the_cache() -> None:
    model = hf_model("Mistral")
    turn = generate(model, tokens(1, PROMPT), 6)
    conversation = torch.cat([turn, tokens(1, 20, 3)], dim=1)
    expected = generate(model, conversation, 6)
    with patched(model, kv="float"):
        cache = paged(model, "float")
        assert torch.equal(generate(model, tokens(1, PROMPT), 6, cache), turn)
        assert cache.get_seq_length() == PROMPT + 5
        assert torch.equal(generate(model, conversation, 6, cache), expected)
        assert cache.layers[0].pages.lengths == [PROMPT + 31]
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(generate(model, conversation, 6, cache), expected)


def test_crop_forgets_the_tokens_of_each_row() -> None:
    model = hf_model("Llama")
    ids, mask = padded([100, 90], "right")
    model.set_attn_implementation("lath-float-reference")
    cache = paged(model, "float")
    forward(model, ids, cache, attention_mask=mask, position_ids=positions(mask))
    cache.crop(-15)
    assert cache.get_seq_length() == 85
    assert cache.layers[1].pages.lengths == [85, 85]
    assert cache.layers[1].get_mask_sizes(4) == (89, 0)
    more = tokens(2, 4, 9)
    whole = torch.cat([ids[:, :85], more], dim=1)
    expected = forward(model, whole)[:, 85:]
    logits = forward(model, more, cache)
    assert relative(logits - expected, expected) < ROUNDING
    cache.crop(80)
    assert cache.get_seq_length() == 80
    with pytest.raises(ValueError, match=r"crop\(-81\)"):
        cache.crop(-81)


def test_rows_are_repeated_selected_and_reordered() -> None:
    model = hf_model("Llama")
    ids, mask = padded([90, 70], "left")
    with patched(model, kv="int8", attention="int8"):
        cache = paged(model, "int8")
        forward(model, ids, cache, attention_mask=mask, position_ids=positions(mask))
        before = [layer.pages.lengths for layer in cache.layers]
        assert before[0] == [90, 70]
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        assert cache.layers[1].pages.lengths == [70, 90, 90, 70]
        cache.batch_select_indices(torch.tensor([0, 1]))
        rows = torch.tensor([1, 0])
        both = torch.cat([mask[rows], torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        logits = forward(
            model, torch.tensor([[7], [7]]), cache,
            attention_mask=both, position_ids=positions(both)[:, -1:],
        )  # fmt: skip
        alone = paged(model, "int8")
        forward(model, tokens(1, 90, 0), alone)
        expected = forward(model, torch.tensor([[7]]), alone)
    assert cache.layers[0].batch_size == 2
    assert relative(logits[1] - expected[0], expected) < ROUNDING


def test_a_mask_that_contradicts_the_cache_is_refused() -> None:
    model = hf_model("Llama")
    ids, mask = padded([90, 70], "left")
    model.set_attn_implementation("lath-reference")
    cache = paged(model, "int8")
    forward(model, ids, cache, attention_mask=mask)
    for wrong in (torch.ones(2, 91), torch.cat([mask.flip(0), torch.ones(2, 1)], dim=1)):
        with pytest.raises(ValueError, match="attention_mask contradicts the cache"):
            forward(model, ids[:, :1], cache, attention_mask=wrong)
        cache.reset()
        forward(model, ids, cache, attention_mask=mask)


def test_only_lath_reads_the_pages() -> None:
    model = hf_model("Llama")
    cache = paged(model, "int8")
    with pytest.raises(TypeError, match=r"LathCache.*attn_implementation='lath'"):
        forward(model, tokens(1, 5), cache)


def test_the_cache_is_smaller() -> None:
    model = hf_model("Llama", torch.bfloat16, head_dim=64)
    ids = tokens(1, 512)
    sizes = {}
    for kv in ("float", "int8", "k8v4", "int4"):
        model.set_attn_implementation("lath-reference")
        cache = paged(model, kv)
        forward(model, ids, cache)
        sizes[kv] = cache.nbytes_in_use
        assert cache.nbytes >= sizes[kv]
    assert sizes["float"] > sizes["int8"] > sizes["k8v4"] > sizes["int4"]


def test_names_of_codecs() -> None:
    assert str(kv_codecs("k8v4")) == "int8/int4"
    assert str(kv_codecs("k4v2")) == "int4/int2"
    assert str(kv_codecs("k16v8")) == "float/int8"
    assert str(kv_codecs("k8v8")) == str(kv_codecs("int8")) == "int8"
    for wrong in ("k3v4", "int5", "k8", "fp8"):
        with pytest.raises(ValueError, match=f"kv must be one of.*{wrong}"):
            kv_codecs(wrong)
    with pytest.raises(TypeError, match="kv must be a str"):
        kv_codecs(8)  # type: ignore[arg-type]


def test_layers_without_pages_are_refused() -> None:
    model = hf_model("Llama")
    model.config.layer_types = ["full_attention", "hybrid"]
    with pytest.raises(NotImplementedError, match="LinearAttentionAndFullAttentionLayer"):
        LathCache(model.config)


def test_draft_needs_planes() -> None:
    cache = LathCache(hf_model("Llama").config, "int8")
    with pytest.raises(ValueError, match=r"int8-planes.*'int8'"), cache.draft():
        pass


@pytest.mark.parametrize("holes", [False, True])
def test_an_unknown_mask_function_over_a_padded_cache(holes: bool) -> None:
    """Chunked attention in two pieces: slots of the mask are found again among the tokens."""
    from transformers import masking_utils as hf

    from lath.integration.attention import Scores
    from lath.integration.attention_mask import lath_mask
    from lath.integration.cache import PagedLayer, Reading

    layer = PagedLayer(Reading(kv_codecs("float"), "reference"))
    padding = torch.ones(2, 100, dtype=torch.bool)
    padding[0, :21] = False
    padding[1, 40:55] = not holes
    chunked = hf.chunked_causal_mask_function(16, torch.zeros(2, dtype=torch.int64))
    q, k, v = torch.randn(2, 4, 100, 16), torch.randn(2, 2, 100, 16), torch.randn(2, 2, 100, 16)
    sizes = {"batch_size": 2, "kv_length": 100, "mask_function": chunked}
    allowed = hf.sdpa_mask(
        **sizes, q_length=100, attention_mask=padding, allow_is_causal_skip=False
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, enable_gqa=True
    )
    outputs = []
    for start, end in ((0, 60), (60, 100)):
        sizes = {"batch_size": 2, "q_length": end - start, "kv_length": end, "q_offset": start}
        mask = lath_mask(**sizes, mask_function=chunked, attention_mask=padding[:, :end])
        handle, _ = layer.update(k[:, :, start:end], v[:, :, start:end])
        outputs.append(handle.attend(q[:, :, start:end], mask, Scores(0.25), kind="float"))
    rows = padding[:, None, :, None].expand(expected.shape)
    torch.testing.assert_close(
        torch.cat(outputs, dim=2)[rows], expected[rows], atol=ROUNDING, rtol=ROUNDING
    )


def test_perplexity_through_a_cache_is_perplexity() -> None:
    from lath.integration.perplexity import cached_perplexity, perplexity

    model = hf_model("Llama")
    ids = tokens(1, 200)
    expected = perplexity(model, ids, 90)
    assert cached_perplexity(model, ids, lambda: _dynamic(model), 90, 32) == pytest.approx(
        expected, rel=ROUNDING
    )
    with patched(model, kv="float"):
        through = cached_perplexity(model, ids, lambda: paged(model, "float"), 90, 32)
    assert through == pytest.approx(expected, rel=ROUNDING)
    with pytest.raises(ValueError, match="chunk"):
        cached_perplexity(model, ids, lambda: _dynamic(model), 90, 0)
