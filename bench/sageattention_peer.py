"""The published Triton kernels of PyPI `sageattention` on CPU tensors, through its own entry.

It is no dependency of lath and may be missing: `reason_missing()` then says why. To have it without
touching this environment, install it elsewhere and name the place:

    pip install --no-deps --target /some/folder sageattention==1.0.6
    PYTHONPATH=tests:/some/folder python bench/attention_accuracy.py
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from tools.attention_accuracy import Array, Inputs


class _CalledOnGpu(Tensor):
    """A CPU tensor that says it is on a GPU, which is all that `sageattn` asks before it runs."""

    is_cuda = True


def reason_missing() -> str | None:
    """Why `sageattention` cannot be used here, or None."""
    try:
        import sageattention  # noqa: F401
    except ImportError as error:
        return f"sageattention is not importable ({error})"
    return None


def version() -> str:
    return importlib.metadata.version("sageattention")


def sageattn(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """`sageattention.sageattn` of [B, H, L, D] tensors. It subtracts the keys' mean in place."""
    from sageattention import sageattn as entry

    given = (x.as_subclass(_CalledOnGpu) for x in (q, k, v))
    o: Tensor = entry(*given, tensor_layout="HND", **arguments).as_subclass(Tensor)
    return o


def attend(inputs: Inputs) -> Array:
    """Its output for one synthetic case, in the interpreter. Raises what it raises.

    A mask or bias goes in as `attn_mask`, the name that `scaled_dot_product_attention` has for it.
    """
    q, k, v = (torch.from_numpy(x[None]).half() for x in (inputs.q, inputs.k, inputs.v))
    arguments: dict[str, Any] = {"is_causal": True} if inputs.causal else {}
    for extra in (inputs.mask, inputs.bias):
        if extra is not None:
            arguments["attn_mask"] = torch.from_numpy(extra)
    return sageattn(q, k, v, **arguments)[0].double().numpy()
