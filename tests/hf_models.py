"""Tiny random models of Hugging Face, one for each thing that attention must get right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lath

# What sets each apart. Windows are shorter than a page and than every prompt of the tests.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 24, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "Mistral": {"sliding_window": 24},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
}
# Decoders whose layers are Llama's but for a flag or a constant, for the fused step alone.
DECODERS: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "SmolLM3": {"no_rope_layer_interval": 2},
    "BitNet": {},
    "Granite": {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
}
_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def hf_model(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model in evaluation mode with its eager attention, the same weights every time.

    Queries and keys are scaled up: with transformers' initial weights every softmax is flat, and
    a wrong mask would hardly be seen.
    """
    import transformers

    config = getattr(transformers, f"{name}Config")(
        **{**_SIZES, **(MODELS | DECODERS)[name], **options}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if path.endswith("sinks"):
                    parameter.normal_()
                if path.endswith(("q_proj.weight", "k_proj.weight")):
                    parameter.mul_(4)
    model.set_attn_implementation("eager")
    return model


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (rows, length), generator=generator)


def padded(lengths: list[int], side: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [B, longest] and the attention mask, padded with 0 on one side."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(longest - length, None) if side == "left" else slice(length)
        ids[row, place] = tokens(1, length, seed + row)[0]
        mask[row, place] = 1
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def forward(model: Any, ids: Tensor, cache: Any = None, **options: Any) -> Tensor:
    """Logits; the cache under the name that this version of transformers gives it."""
    if cache is None:
        logits: Tensor = model(ids, use_cache=False, **options).logits
        return logits
    from lath.integration.cache import cache_argument

    logits = model(ids, use_cache=True, **{cache_argument(model): cache}, **options).logits
    return logits


def generate(model: Any, ids: Tensor, new_tokens: int = 8, cache: Any = None, **kw: Any) -> Tensor:
    if cache is not None:
        from lath.integration.cache import cache_argument

        kw[cache_argument(model)] = cache
    kw.setdefault("attention_mask", torch.ones_like(ids))
    out: Tensor = model.generate(
        ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **kw
    )
    return out


def relative(difference: Tensor, reference: Tensor) -> float:
    """The largest difference over the largest entry."""
    return float(difference.abs().max() / reference.abs().max())


def call_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
) -> Tensor:
    """The registered function over float pages: [B, H, L, E]."""
    from transformers import AttentionInterface

    from lath.integration import attention as lath_attention

    lath_attention.register()
    function = AttentionInterface()["lath-float-reference"]
    out: Tensor = function(module, q, k, v, mask, **options)[0]
    return out.transpose(1, 2)


def qkv(queries: int, keys: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, 4, queries, 16), torch.randn(batch, 2, keys, 16),
        torch.randn(batch, 2, keys, 16),
    )  # fmt: skip


def bare_module(causal: bool = True) -> torch.nn.Module:
    made = torch.nn.Module().eval()
    made.is_causal = causal
    return made


def patched(model: Any, **options: Any) -> lath.PatchReport:
    """A patch of the cache alone: int8 pages of the definition, unless `options` say otherwise."""
    return lath.patch(model, None, **{"backend": "reference", "kv": "int8", **options})
