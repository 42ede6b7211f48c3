"""examples/self_speculation.py: greedy output is that of plain decoding, token for token."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lath
from hf_models import generate, hf_model, tokens

pytest.importorskip("transformers")
from lath.integration.cache import LathCache


@pytest.fixture(scope="module")
def example() -> Any:
    path = Path(__file__).parents[1] / "examples" / "self_speculation.py"
    spec = importlib.util.spec_from_file_location("self_speculation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["self_speculation"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("weights", [None, "int4-g16"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_tokens_are_those_of_plain_decoding(example: Any, name: str, weights: str | None) -> None:
    """The drafts come to the end of a page, and some of them are rejected."""
    model = hf_model(name)
    model.generation_config.eos_token_id = None  # the example does not stop
    ids = tokens(1, 180)
    packed = None
    if weights is not None:
        packed = lath.patch(
            model, weights, activations="float", backend="reference", progress=False
        )
        packed.undo()
    with (
        torch.no_grad(),
        lath.patch(model, None, attention="int8", kv="int8-planes", backend="reference"),
    ):
        cache = LathCache(model.config, "int8-planes", backend="reference")
        expected = generate(model, ids, 60, cache)[0, 180:]
        result = example.speculate(model, ids, 60, 5, "reference", packed)
        plain = example.speculate(model, ids, 10, 0, "reference")
    assert torch.equal(result.tokens, expected)
    assert torch.equal(plain.tokens, expected[:10])
    assert (plain.passes, plain.drafted) == (10, 0)
    assert result.accepted > 0
    # Four bits are enough for all drafts of the plain Llama: it shows the other road.
    assert result.accepted < result.drafted or (name, weights) == ("Llama", None)
    assert result.passes == 60 - result.accepted


def test_room_keeps_drafts_out_of_pages(example: Any) -> None:
    assert [example.room(n) for n in (0, 64, 100, 126, 127, 128)] == [62, 62, 26, 0, 0, 62]
