"""Models that the fused step is not made of, each with what is said of it; and what may change
under a step that was made. Helpers are those of test_hf_decode.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_hf_decode import PROMPT, ROUNDING, decoder, fused_tokens, patched, steps
from torch import Tensor, nn

import lath
from hf_models import relative

pytest.importorskip("transformers")
pytest.importorskip("numba")
from transformers.models.llama.modeling_llama import LlamaAttention

from lath.integration.decode_probe import rotations
from lath.integration.decode_recognise import NotFusedError, find_decoder

pytestmark = pytest.mark.usefixtures("no_grad")


def other_class(module: Any, **methods: Any) -> None:
    """Give a module a class of its own with other methods."""
    cls = type(module)
    module.__class__ = type(f"Other{cls.__name__}", (cls,), methods)


def attention_with(**options: Any) -> Callable[[Any], None]:
    """Layer 1 asks something more of its scores."""

    def spoil(model: Any) -> None:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return LlamaAttention.forward(self, *args, **{**kwargs, **options})

        other_class(model.model.layers[1].self_attn, forward=forward)

    return spoil


def own_mask(model: Any) -> None:
    """Layer 1 does not see the first token."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = kwargs["past_key_values" if "past_key_values" in kwargs else "cache"]
        rows = hidden_states.shape[1]
        mask = torch.ones(1, 1, rows, given.layers[1].slots + rows, dtype=torch.bool)
        mask = mask.tril(given.layers[1].slots)
        mask[..., 1:, 0] = False
        mask[..., :, 0] &= rows > 1
        return LlamaAttention.forward(
            self, hidden_states, *args, **{**kwargs, "attention_mask": mask}
        )

    other_class(model.model.layers[1].self_attn, forward=forward)


def doubled_embedding(model: Any) -> None:
    own = nn.Embedding.forward
    other_class(model.model.embed_tokens, forward=lambda self, ids: 2 * own(self, ids))


def shifted_norm(model: Any) -> None:
    """As Gemma's: scaled by 1 + weight."""
    own = type(model.model.norm).forward

    def forward(self: Any, x: Tensor) -> Tensor:
        return own(self, x) + x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    other_class(model.model.norm, forward=forward)


def without_base(model: Any) -> None:
    model.base_model_prefix = "nothing"


def second_head(model: Any) -> None:
    model.second = nn.Linear(64, 128, bias=False)


def more_in_base(model: Any) -> None:
    model.model.more = nn.Identity()


def more_in_layer(model: Any) -> None:
    model.model.layers[1].more = nn.Identity()


def no_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm = nn.Identity()


def other_head_dim(model: Any) -> None:
    model.model.layers[0].self_attn.head_dim = 24


def mixed_dtypes(model: Any) -> None:
    model.model.norm.to(torch.bfloat16)


def other_heads(model: Any) -> None:
    """Layer 1 of another model, with two heads in the place of four."""
    fewer = decoder("Llama", num_attention_heads=2, num_key_value_heads=1)
    model.model.layers[1] = fewer.model.layers[1]


def norm_of_all_heads(model: Any) -> None:
    """As OLMo 2's."""
    norm = nn.RMSNorm(64, eps=1e-6)
    model.model.layers[1].self_attn.q_norm = norm


def hooked(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: None)


# By name: what is done to a model, options of it, options of the patch, what is said.
REFUSED: dict[str, tuple[Callable[[Any], None] | None, dict[str, Any], dict[str, Any], str]] = {
    "base": (without_base, {}, {}, "no list of layers under its base model"),
    "second head": (second_head, {}, {}, r"must be one output layer, not \{.*second"),
    "more in base": (more_in_base, {}, {}, r"the base model has \['more'\] too"),
    "more in layer": (more_in_layer, {}, {}, r"layer 1 has \['more'\] too"),
    "embedding": (doubled_embedding, {}, {}, "the embedding is a OtherEmbedding"),
    "no norm": (no_norm, {}, {}, "Identity in layer 1 is no RMSNorm"),
    "head dim": (other_head_dim, {}, {}, "heads of 24 channels do not divide"),
    "heads": (None, {"num_attention_heads": 3, "num_key_value_heads": 2, "hidden_size": 48}, {},
              "3 heads for 2 KV heads"),
    "dtypes": (mixed_dtypes, {}, {}, "embedding and norms must have one float dtype"),
    "other heads": (other_heads, {}, {}, "layers differ in their heads"),
    "norm of all heads": (norm_of_all_heads, {}, {}, r"q_norm is of \[64\], not of one head"),
    "sums": (None, {}, {"weights": "int4-g32+out1%"}, "which only modules multiply"),
    "backend": (None, {}, {"backend": "reference"}, "not run on the compiled CPU kernels"),
    "hooks": (hooked, {}, {}, "a module has hooks"),
    "softcap": (attention_with(softcap=50.0), {}, {}, "a softcap, a sink, or is not causal"),
    "sink": (attention_with(s_aux=torch.full((4,), -20.0)), {}, {},
             "a softcap, a sink, or is not causal"),
    "mask": (own_mask, {}, {}, "a mask of its own"),
    "no cache": (attention_with(cache=None, past_key_values=None), {}, {},
                 "does not keep its keys and values in the cache"),
    "last norm": (shifted_norm, {}, {}, "the last norm is computed differently"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_said(name: str) -> None:
    """A model that is refused is as it was."""
    spoil, options, given, message = REFUSED[name]
    model = decoder("Llama", **options)
    if spoil is not None:
        spoil(model)
    given = {"weights": "int4-g32", "skip": (), "kv": "float", "activations": "float", **given}
    before = type(model), set(model.__dict__)
    with pytest.raises(ValueError, match=message):
        lath.patch(model, decode="fused", **given)
    assert (type(model), set(model.__dict__)) == before


def test_small_softcaps_and_sinks_would_pass_the_probe() -> None:
    """Why these are asked for by name: what they change on random vectors is as little as codes of
    activations do."""
    for options in ({"softcap": 50.0}, {"s_aux": torch.full((4,), -20.0)}):
        model, plain = decoder("Llama"), decoder("Llama")
        attention_with(**options)(model)
        outs = []
        for one in (model, plain):
            with patched(one, "modules"):
                outs.append(steps(one, 3, 1))
        assert relative(outs[0] - outs[1], outs[1]) < 0.01


def test_rotations_of_another_shape() -> None:
    model = decoder("Llama")
    patched(model, "modules")
    found = find_decoder(model)
    own = type(found.rotary).forward
    other_class(
        found.rotary, forward=lambda *arguments: [part[..., :8] for part in own(*arguments)]
    )
    with pytest.raises(NotFusedError, match=r"rotations are \[1, 5, 8\], not \[1, 5, 16\]"):
        rotations(found, 5)


# What changes under a step


def scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def epsilon(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def other_forward(model: Any) -> None:
    """The function of a class, as kernels for training are put in."""
    cls = type(model.model.layers[1].mlp)
    own = cls.forward
    cls.forward = lambda self, x: 2 * own(self, x)


def other_class_of_one(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    own = type(mlp).forward
    other_class(mlp, forward=lambda self, x: 2 * own(self, x))


def bias(model: Any) -> None:
    linear = model.model.layers[1].self_attn.v_proj
    linear.bias = nn.Parameter(9 * linear.bias, requires_grad=False)


# By name: what is changed, and whether there is a step behind it.
CHANGES: dict[str, tuple[Callable[[Any], None], bool]] = {
    "scale": (scale, True),
    "epsilon": (epsilon, True),
    "frequencies": (frequencies, True),
    "forward of a class": (other_forward, False),
    "class": (other_class_of_one, False),
    "bias": (bias, True),
}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str, compact: bool) -> None:
    """Of a number, a class, a bias: the next token is the modules'."""
    change, fused = CHANGES[name]
    outs = []
    for decode in ("modules", "auto"):
        model = decoder("Qwen2")
        other_class(model.model.layers[1].mlp)  # whose forward may be replaced
        report = patched(model, decode)
        if compact:
            for module in model.modules():
                assert not hasattr(module, "compact") or module.compact()
        before = steps(model, PROMPT, 2)
        change(model)
        outs.append(steps(model, PROMPT, 2))
        assert relative(outs[-1] - before, before) > 100 * ROUNDING
    assert fused_tokens(report) == 2 + 2 * fused
    assert relative(outs[1] - outs[0], outs[0]) < ROUNDING


def test_a_model_made_in_inference_mode() -> None:
    """Whose tensors count no versions."""
    outs = []
    with torch.inference_mode():
        for decode in ("modules", "fused"):
            model = decoder("Llama")
            assert model.model.rotary_emb.inv_freq.is_inference()
            with patched(model, decode):
                outs.append(steps(model, PROMPT, 3))
    assert relative(outs[1] - outs[0], outs[0]) < ROUNDING


def test_undo_refuses_a_class_that_another_put_over_it() -> None:
    model = decoder("Llama")
    report = patched(model, "auto")
    fused = type(model)
    other_class(model)
    with pytest.raises(RuntimeError, match=r"class was changed since lath\.patch"):
        report.undo()
    model.__class__ = fused
    report.undo()
    assert type(model) is fused.__mro__[1]
