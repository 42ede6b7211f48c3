"""`lath.quantize`: a dense weight to a packed one, by any quantiser."""

from __future__ import annotations

import torch
from torch import Tensor

from lath.formats.codec import Codec
from lath.formats.codec import codec as parse_codec
from lath.formats.qtensor import OUTER_DTYPES, QTensor
from lath.formats.quantizer import RTN, Quantizer
from lath.formats.quantizer import quantizer as parse_quantizer
from lath.kernels import quantize as kernel
from lath.verbs.checks import check_flag, check_tensor
from lath.verbs.quantizers import check_hessian, check_quantizer, requantize, weighted_table


@torch.library.custom_op("lath::quantize", mutates_args=())
def _quantize(
    weight: Tensor, codec: str, search: bool, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a QTensor, empty where the codec has none."""
    return _five(kernel.quantize(weight, parse_codec(codec), search, table))


@_quantize.register_fake
def _(
    weight: Tensor, codec: str, search: bool, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    return _five(QTensor.empty(parse_codec(codec), (rows, columns), device=weight.device))


def _five(packed: QTensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def present(tensor: Tensor | None) -> Tensor:
        return packed.scales.new_empty(0) if tensor is None else tensor.clone()

    zeros, outer, table = (present(t) for t in (packed.zeros, packed.outer, packed.table))
    return packed.codes, packed.scales, zeros, outer, table


def quantize(
    weight: Tensor,
    codec: str | Codec,
    *,
    quantizer: str | Quantizer = "rtn",
    hessian: Tensor | None = None,
    search: bool = False,
    table: Tensor | None = None,
) -> QTensor:
    """Round a weight in a codec and pack it.

    weight: [N, K] float16, bfloat16 or float32, any N and K (K need not be a multiple of the
    group), on any device; not changed. codec: a `Codec` or its text form, "int4-g128".
    quantizer: "rtn" (to nearest), "gptq" (needs the Hessian), "hqq" (needs a codec with "-fzero"),
    or `lath.GPTQ(...)`, `lath.HQQ(...)`; see `lath.reference.quantizers`. For "awq" the columns of
    the weight must be scaled first: `lath.awq_scales`. hessian: Σ x xᵀ over the inputs x of this
    weight, [K, K] float32 or float64 on its device, in any unit (`lath.Hessian` gathers it).
    search: choose each group's range among 33 fractions of the full one by squared error (about
    forty times the work, usually a better weight; see `lath.reference.codecs.quantize`). table: the
    ascending numbers of a "lut" codec, [2**bits]; None: found by k-means, in which a column counts
    as much as its mean squared input where the Hessian is given.

    Returns a QTensor on the same device. Raises ValueError if the weight has NaN or infinity, does
    not fit the codec's scale dtype, or the Hessian is not positive definite when damped.
    """
    weight = check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got shape {list(weight.shape)}")
    parsed, how = parse_codec(codec), parse_quantizer(quantizer)
    check_quantizer(how, parsed, hessian is not None)
    if hessian is not None:
        hessian = check_hessian(hessian, weight.shape[1], weight.device)
    if table is not None and parsed.values != "learned":
        raise ValueError(f"table is for 'lut' codecs, got codec {str(parsed)!r}")
    if table is None and hessian is not None and parsed.values == "learned":
        table = weighted_table(weight.detach(), parsed, hessian)
    tensors = _quantize(
        weight.detach(), str(parsed), check_flag("search", search),
        None if table is None else check_tensor("table", table).detach().float(),
    )  # fmt: skip
    codes, scales, zeros, outer, learned = tensors
    start = QTensor(
        parsed, (weight.shape[0], weight.shape[1]), codes, scales,
        None if parsed.zero == "none" else zeros,
        outer if parsed.scale_dtype in OUTER_DTYPES else None,
        learned if parsed.values == "learned" else None,
    )  # fmt: skip
    return start if isinstance(how, RTN) else requantize(weight.detach(), start, how, hessian)
