"""`lath.quantize`: a dense weight to a packed one."""

from __future__ import annotations

import torch
from torch import Tensor

from lath.formats.codec import Codec
from lath.formats.codec import codec as parse_codec
from lath.formats.qtensor import QTensor
from lath.kernels import quantize as kernel
from lath.verbs.checks import check_flag, check_tensor


@torch.library.custom_op("lath::quantize", mutates_args=())
def _quantize(weight: Tensor, codec: str, search: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of a QTensor: codes, scales, zeros (empty where the codec has none)."""
    packed = kernel.quantize(weight, parse_codec(codec), search)
    zeros = packed.zeros if packed.zeros is not None else packed.scales.new_empty(0)
    return packed.codes, packed.scales, zeros


@_quantize.register_fake
def _(weight: Tensor, codec: str, search: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    empty = QTensor.empty(parse_codec(codec), (rows, columns), device=weight.device)
    zeros = empty.zeros if empty.zeros is not None else empty.scales.new_empty(0)
    return empty.codes, empty.scales, zeros


def quantize(weight: Tensor, codec: str | Codec, *, search: bool = False) -> QTensor:
    """Round a weight to nearest in a codec and pack it.

    weight: [N, K] float16, bfloat16 or float32, any N and K (K need not be a multiple of the
    group), on any device; not changed. codec: a `Codec` or its text form, "int4-g128".
    search: choose each group's range among 33 fractions of the full one by squared error (about
    forty times the work, usually a better weight; see `lath.reference.codecs.quantize`).

    Returns a QTensor on the same device. Raises ValueError if the weight has NaN or infinity or
    does not fit the codec's scale dtype.
    """
    weight = check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got shape {list(weight.shape)}")
    parsed = parse_codec(codec)
    codes, scales, zeros = _quantize(weight.detach(), str(parsed), check_flag("search", search))
    shape = (weight.shape[0], weight.shape[1])
    return QTensor(parsed, shape, codes, scales, None if parsed.zero == "none" else zeros)
