"""Compiling the kernels of a decode step ahead of use."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lath.integration.models import tiny_model
from lath.integration.patch import patch


def warm_decoding(
    codecs: Iterable[str], kv: str = "int8", dtype: torch.dtype = torch.bfloat16
) -> None:
    """Decode two tokens of a tiny model in each codec, so that its step is compiled and kept."""
    ids = torch.ones((1, 3), dtype=torch.int64)
    for codec in codecs:
        model, _ = tiny_model(dtype)
        with patch(model, codec, attention="int8", kv=kv, skip=(), decode="fused"):
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False
            )
