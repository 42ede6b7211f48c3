"""`lath.quantize`: a dense weight to a packed one, by any quantiser."""

from __future__ import annotations

import torch
from torch import Tensor

from lath.formats.codec import Codec
from lath.formats.families import weight_class, weight_codec
from lath.formats.packed_weight import PackedWeight, WeightCodec
from lath.formats.qtensor import QTensor
from lath.formats.quantizer import RTN, Quantizer
from lath.formats.quantizer import quantizer as parse_quantizer
from lath.verbs.checks import check_flag, check_tensor
from lath.verbs.kinds import kind_of
from lath.verbs.quantizers import check_hessian, check_quantizer, requantize, weighted_table


@torch.library.custom_op("lath::quantize", mutates_args=())
def _quantize(
    weight: Tensor,
    codec: str,
    search: bool,
    table: Tensor | None,
    importance: Tensor | None = None,
) -> list[Tensor]:
    """The tensors of a packed weight, in their order."""
    parsed = weight_codec(codec)
    given = () if importance is None else (importance,)
    packed = kind_of(parsed).function("quantize", "quantize")(weight, parsed, search, table, *given)
    return [tensor.clone() for tensor in packed.tensors.values()]


@_quantize.register_fake
def _(
    weight: Tensor,
    codec: str,
    search: bool,
    table: Tensor | None,
    importance: Tensor | None = None,
) -> list[Tensor]:
    rows, columns = weight.shape
    parsed = weight_codec(codec)
    empty = weight_class(parsed).empty(parsed, (rows, columns), device=weight.device)
    return list(empty.tensors.values())


def quantize(
    weight: Tensor,
    codec: str | WeightCodec,
    *,
    quantizer: str | Quantizer = "rtn",
    hessian: Tensor | None = None,
    search: bool = False,
    table: Tensor | None = None,
    importance: Tensor | None = None,
) -> PackedWeight:
    """Round a weight in a codec and pack it.

    weight: [N, K] float16, bfloat16 or float32, any N and K (K need not be a multiple of the
    group), on any device; not changed. codec: a codec or its text form, "int4-g128".
    quantizer: "rtn" (to nearest), "gptq" (needs the Hessian), "hqq" (needs a codec with "-fzero"),
    or `lath.GPTQ(...)`, `lath.HQQ(...)`; see `lath.reference.quantizers`. For "awq" the columns of
    the weight must be scaled first: `lath.awq_scales`. hessian: Σ x xᵀ over the inputs x of this
    weight, [K, K] float32 or float64 on its device, in any unit (`lath.Hessian` gathers it).
    search: choose each group's range among 33 fractions of the full one by squared error (about
    forty times the work, usually a better weight; see `lath.reference.codecs.quantize`); of a mix
    of three widths ("mix3-g64") also how many groups each of them has, which the codec of the
    result then says ("mix3-p4-g64"; see `lath.reference.sums.settle`). table: the
    ascending numbers of a "lut" codec, [2**bits]; None: found by k-means, in which a column counts
    as much as its mean squared input where the Hessian is given. importance: for
    codecs that choose which weights matter (outliers, mix, billm) or entries of books (vectors):
    what a squared error of a weight costs, not negative, [K] (such as the mean square of each
    input) or, but for vectors, [N, K] (a squared gradient).

    Returns a QTensor, or another kind of packed weight if the codec is of another, on the same
    device. Raises ValueError if the weight has NaN or infinity, does not fit the codec's scale
    dtype, or the Hessian is not positive definite when damped.
    """
    weight = check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got shape {list(weight.shape)}")
    parsed, how = weight_codec(codec), parse_quantizer(quantizer)
    check_quantizer(how, parsed, hessian is not None)
    if hessian is not None:
        hessian = check_hessian(hessian, weight.shape[1], weight.device)
    learns = getattr(parsed, "values", None) == "learned"
    if table is not None and not learns:
        raise ValueError(f"table is for 'lut' codecs, got codec {str(parsed)!r}")
    if table is None and hessian is not None and isinstance(parsed, Codec) and learns:
        table = weighted_table(weight.detach(), parsed, hessian)
    given = (
        None if table is None else check_tensor("table", table).detach().float(),
        None if importance is None else _check_importance(importance, weight, parsed),
    )
    if check_flag("search", search) and getattr(parsed, "is_open", False):
        # What is saved depends on the codec alone: so the codec says what was found.
        parsed = kind_of(parsed).function("quantize", "settle")(
            weight.detach(), parsed, search, *given
        )
    tensors = _quantize(weight.detach(), str(parsed), search, *given)
    cls = weight_class(parsed)
    named = dict(zip(cls.tensor_names(parsed), tensors, strict=True))
    start = cls.from_tensors(parsed, (weight.shape[0], weight.shape[1]), named)
    if isinstance(how, RTN):
        return start
    assert isinstance(start, QTensor)  # check_quantizer lets no other kind through
    return requantize(weight.detach(), start, how, hessian)


def _check_importance(importance: Tensor, weight: Tensor, codec: WeightCodec) -> Tensor:
    if not getattr(codec, "takes_importance", False):
        raise ValueError(
            f"importance is for outliers, mix, billm and vectors, got codec {str(codec)!r}"
        )
    importance = check_tensor("importance", importance).detach()
    rows, columns = weight.shape
    if tuple(importance.shape) not in ((columns,), (rows, columns)):
        raise ValueError(
            f"importance must be [{columns}] or [{rows}, {columns}], got {[*importance.shape]}"
        )
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise ValueError("importance must be finite and not negative")
    return importance
