"""A patched model under PEFT's adapters, and a model with adapters that is patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lath
from hf_models import hf_model, relative, tokens

peft = pytest.importorskip("peft")
pytest.importorskip("numba")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers warn of each other

OPTIONS: dict[str, Any] = {"attention": "int8", "kv": "int8", "skip": ()}
NEW = 6
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
IA3 = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
ADAPTERS = {"Lora": LORA, "IA3": IA3, "PromptTuning": PROMPT, "PrefixTuning": PROMPT}


def adapted(name: str, model: Any) -> Any:
    """A model with an adapter whose numbers matter."""
    wrapped = peft.get_peft_model(model, getattr(peft, f"{name}Config")(**ADAPTERS[name])).eval()
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.uniform_(0.5, 1.5)
            parameter.data *= 0.1 if name == "Lora" else 1.0
    return wrapped


def generated(model: Any, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    out: Tensor = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False
    )
    return out[0, ids.shape[1] :]


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_a_model_with_adapters_is_patched(name: str, no_grad: None) -> None:
    ids = tokens(1, 70)
    plain = hf_model("Llama")(ids).logits
    model = adapted(name, hf_model("Llama"))
    expected = model(ids).logits
    effect = relative(expected[:, -ids.shape[1] :] - plain, plain)
    with lath.patch(model, "int8-g16", **OPTIONS, decode="modules"):
        text = generated(model, ids)
    report = lath.patch(model, "int8-g16", **OPTIONS)
    # What the codes change is little beside what the adapter does.
    assert relative(model(ids).logits - expected, expected) < effect / 5
    assert torch.equal(generated(model, ids), text)
    assert report.decode is not None
    fused = report.decode.counts.get("fused", 0)
    # Layers with adapters and prompts as embeddings are computed by the modules.
    assert (fused > 0) == (name == "PrefixTuning")
    report.undo()
    assert torch.equal(model(ids).logits, expected)


def test_an_adapter_stays_as_it_is(no_grad: None) -> None:
    model = adapted("Lora", hf_model("Llama"))
    report = lath.patch(model, "int8-g16", skip=())
    kept = {row.name: row.reason for row in report.rows if row.action == "kept"}
    assert kept
    assert all("lora_" in name and "adapter" in reason for name, reason in kept.items())
    assert {n.rpartition(".")[2] for n, m in _packed(model)} >= {"base_layer", "k_proj"}


def test_an_adapter_on_a_patched_model_is_noticed(no_grad: None) -> None:
    """A prompt in front of a model whose step was compiled before."""
    ids = tokens(1, 70)
    model = hf_model("Llama")
    report = lath.patch(model, "int8-g16", **OPTIONS)
    generated(model, ids)
    assert report.decode is not None
    before = report.decode.counts["fused"]
    assert before > 0
    wrapped = adapted("PromptTuning", model)
    text = generated(wrapped, ids)
    assert report.decode.counts["fused"] == before
    report.undo()
    assert torch.equal(text, generated(wrapped, ids))


def test_packed_layers_take_no_lora(no_grad: None) -> None:
    """PEFT says itself that it does not know them: nothing is silently left out."""
    model = hf_model("Llama")
    lath.patch(model, "int8-g16", skip=())
    with pytest.raises(ValueError, match="PackedLinear"):
        adapted("Lora", model)


def _packed(model: Any) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if type(m).__name__ == "PackedLinear"]
