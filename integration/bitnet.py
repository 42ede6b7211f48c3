"""Hugging Face BitNet checkpoints: ternary weights, four in a byte along the rows.

    weight         uint8 [ceil(N/4), K]: bits 2i, 2i + 1 of row r are the code, 0 .. 2, of row
                   i * ceil(N/4) + r; the weight is code - 1
    weight_scale   [1]: "bitlinear" divides by it, "autobitlinear" multiplies
    activations    int8 codes of each token, 127 / max|x|

The config's `quantization_config` says which. What it says and this reader does not know is
refused: a scale that is taken for its inverse runs and writes nonsense.

transformers rounds activations in the model's dtype and takes no token's maximum below 1e-5; here
they are rounded in fp32, as everywhere in lath, and a token below 2**-100 counts as zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lath.formats import packing
from lath.formats.codec import Codec
from lath.formats.families import weight_codec
from lath.formats.packed_weight import WeightCodec
from lath.formats.qtensor import SCALE_DTYPES, QTensor
from lath.integration.skeleton import Skeleton, named
from lath.integration.store import ModelError

_CODES_PER_BYTE = 4
_SCALE = ".weight_scale"
# Every field of a BitNet quantization_config, and what transformers takes where it is absent.
_DEFAULTS: dict[str, Any] = {
    "quant_method": None, "linear_class": "bitlinear", "quantization_mode": "offline",
    "use_rms_norm": False, "rms_norm_eps": 1e-6, "modules_to_not_convert": None,
}  # fmt: skip


@dataclass(frozen=True)
class BitNetLayout:
    """What a checkpoint's config says of its packed layers. divides: by weight_scale."""

    divides: bool

    @staticmethod
    def of(fields: dict[str, Any]) -> BitNetLayout:
        """The layout of a `quantization_config`; ModelError for one that is not known."""
        unknown = sorted(fields.keys() - _DEFAULTS.keys())
        if unknown:
            raise ModelError(
                f"quantization_config of a BitNet checkpoint must hold {sorted(_DEFAULTS)} alone, "
                f"it also has {unknown}"
            )
        chosen = {**_DEFAULTS, **fields}
        accepted: dict[str, tuple[Any, ...]] = {
            "quant_method": ("bitnet",),
            "linear_class": ("bitlinear", "autobitlinear"),
            "quantization_mode": ("offline",),
            "use_rms_norm": (False,),
        }
        for name, values in accepted.items():
            if chosen[name] not in values:
                raise ModelError(
                    f"quantization_config {name} of a BitNet checkpoint must be one of {values}, "
                    f"got {chosen[name]!r}"
                )
        return BitNetLayout(divides=chosen["linear_class"] == "bitlinear")


def is_bitnet(config: Any) -> bool:
    """Whether a transformers config is that of a BitNet checkpoint."""
    return bool(quantization_of(config).get("quant_method") == "bitnet")


def unpack_rows(packed: Tensor, rows: int) -> Tensor:
    """uint8 [ceil(N/4), K] → codes uint8 [N, K], 0 .. 2; ValueError for another shape or code."""
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        raise ValueError(
            f"packed must be uint8 [ceil(N/4), K], got {packed.dtype} {[*packed.shape]}"
        )
    if len(packed) != -(-rows // _CODES_PER_BYTE):
        raise ValueError(f"packed must have ceil({rows}/4) rows, got {len(packed)}")
    fields = [(packed >> (2 * i)) & 3 for i in range(_CODES_PER_BYTE)]
    codes = torch.cat(fields)[:rows]
    if bool((codes == 3).any()):
        raise ValueError("packed must hold the codes 0, 1 and 2 alone, it has 3")
    return codes


def bitnet_weight(
    packed: Tensor, weight_scale: Tensor, rows: int, layout: BitNetLayout, codec: str | WeightCodec
) -> QTensor:
    """The packed weight [N, K] of a layer. packed: uint8 [ceil(N/4), K]. weight_scale: [1].

    rows: N. codec: a ternary one without groups; with "-s32" the scale is rounded to fp32 once
    (where it divides), otherwise to fp16. ValueError naming what is wrong.
    """
    parsed = weight_codec(codec)
    if not isinstance(parsed, Codec) or parsed.values != "ternary" or parsed.group is not None:
        raise ValueError(
            f"codec of a BitNet weight must be a ternary one without groups, got {str(parsed)!r}"
        )
    if weight_scale.numel() != 1:
        raise ValueError(f"weight_scale must hold one number, got shape {[*weight_scale.shape]}")
    number = float(weight_scale)
    if not 0 < number < float("inf"):
        raise ValueError(f"weight_scale must be positive and finite, got {number}")
    codes = unpack_rows(packed, rows)
    scales = torch.zeros(1, packing.round_up(rows, packing.PANEL), dtype=torch.float64)
    scales[:, :rows] = 1 / number if layout.divides else number
    stored = scales.to(SCALE_DTYPES[parsed.scale_dtype])
    if not bool(torch.isfinite(stored).all()) or bool((stored[:, :rows] == 0).any()):
        raise ValueError(
            f"weight_scale {number} of a BitNet weight does not fit the scales of {str(parsed)!r}: "
            "use '-s32'"
        )
    return QTensor(parsed, (rows, packed.shape[1]), packing.pack(codes, parsed), stored)


def load_bitnet(
    folder: str | Path,
    *,
    codec: str | Codec = "ternary-s32",
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> Any:
    """The causal language model of a BitNet checkpoint, its packed layers PackedLinear, on the CPU:
    `lath.load` with an output layer that stays dense and codes that are kept.

    folder: config.json and safetensors. codec: "ternary-s32" or "ternary-1.6-s32" (or without
    "-s32", scales in fp16). backend: as for `lath.linear`. dtype: of everything else; None: the
    checkpoint's. Activations of the packed layers are int8 per token, as the format has them.

    Raises ModelError for a checkpoint that is damaged or in a convention that is not known.
    """
    from transformers import AutoConfig

    from lath.integration.load import load

    if not is_bitnet(AutoConfig.from_pretrained(folder, local_files_only=True)):
        raise ModelError(f"{folder} is no BitNet checkpoint: its config names no such quantisation")
    return load(folder, codec, head=None, backend=backend, dtype=dtype, keep_codes=True)


def quantization_of(config: Any) -> dict[str, Any]:
    """The `quantization_config` of a transformers config, {} where there is none."""
    fields = getattr(config, "quantization_config", None) or {}
    return dict(fields) if isinstance(fields, dict) else dict(fields.to_dict())


def bitnet_layers(
    skeleton: Skeleton, fields: dict[str, Any], codec: str | WeightCodec
) -> dict[str, Callable[[], QTensor]]:
    """Each linear layer that a BitNet checkpoint packs, and what reads its weight.

    fields: of its `quantization_config`. ModelError for a convention that is not known, or where
    half of a layer is there.
    """
    layout, checkpoint = BitNetLayout.of(fields), skeleton.checkpoint
    linears = {n: m for n, m in skeleton.model.named_modules() if isinstance(m, nn.Linear)}
    scaled = {name.removesuffix(_SCALE) for name in checkpoint.names if name.endswith(_SCALE)}
    packed = {
        name.removesuffix(".weight")
        for name in checkpoint.names
        if checkpoint.dtype(name) == torch.uint8
    }
    for name in sorted(scaled ^ packed):
        have = "a weight_scale but no uint8 weight" if name in scaled else "no weight_scale"
        raise ModelError(f"{name} of a BitNet checkpoint has {have}")
    for name in sorted(scaled - linears.keys()):
        raise ModelError(
            f"{name} is packed, but {type(skeleton.model).__name__} has no such linear layer"
        )
    if not scaled:
        raise ModelError("a BitNet checkpoint must have packed layers, this one has none")
    for name in sorted(scaled):
        for pattern in fields.get("modules_to_not_convert") or []:
            if pattern == name or name.startswith(f"{pattern}."):
                raise ModelError(f"{name} is packed, but modules_to_not_convert names it")

    def read(name: str) -> QTensor:
        packed, scale = (checkpoint.read(f"{name}{end}") for end in (".weight", _SCALE))
        with named(name):
            if packed.shape[-1] != linears[name].in_features:
                raise ValueError(
                    f"packed must have K = {linears[name].in_features}, got {[*packed.shape]}"
                )
            return bitnet_weight(packed, scale, linears[name].out_features, layout, codec)

    return {name: functools.partial(read, name) for name in linears if name in scaled}
