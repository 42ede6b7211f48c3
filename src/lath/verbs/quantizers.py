"""GPTQ, AWQ and HQQ: their arguments checked, and the Hessian that two of them need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lath.formats.codec import Codec
from lath.formats.codec import codec as parse_codec
from lath.formats.packed_weight import WeightCodec
from lath.formats.qtensor import QTensor
from lath.formats.quantizer import AWQ, GPTQ, HQQ, RTN, Quantizer
from lath.formats.quantizer import quantizer as parse_quantizer
from lath.kernels import quantize as kernel
from lath.kernels.quantize_tables import learn_table
from lath.kernels.quantizers import awq, gptq, hqq
from lath.verbs.checks import check_flag, check_same_device, check_tensor

HESSIAN_DTYPES = (torch.float32, torch.float64)


class Hessian:
    """Σ x xᵀ over the inputs x of a linear layer, gathered piece by piece.

    in_features: K. `matrix`: [K, K] float32 on the device of the first piece, summed in float32;
    `count`: inputs so far.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(in_features, in_features, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Add inputs x [..., K] of any float dtype; ValueError if one is not finite."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if rows.shape[1] != len(self.matrix):
            raise ValueError(f"x must be [..., {len(self.matrix)}], got {list(x.shape)}")
        self.matrix.addmm_(rows.T, rows)
        self.count += len(rows)
        if not bool(torch.isfinite(self.matrix.diagonal()).all()):
            raise ValueError("x must be finite and its squares must not overflow float32")


def check_quantizer(how: Quantizer, codec: WeightCodec, has_hessian: bool) -> None:
    """Refuse what a quantiser cannot do with a codec, and a Hessian that would be ignored."""
    if not isinstance(codec, Codec) and not isinstance(how, RTN):
        raise ValueError(
            f"quantizer {str(how)!r} rounds one weight at a time, codec {str(codec)!r} does not: "
            "take quantizer 'rtn'"
        )
    if isinstance(how, HQQ) and isinstance(codec, Codec) and codec.zero != "float":
        raise ValueError(
            f"quantizer 'hqq' optimises float minima, codec {str(codec)!r} has none; "
            "take a codec with '-fzero'"
        )
    if isinstance(how, AWQ):
        raise ValueError(
            "quantizer 'awq' scales columns, and what makes x must be scaled back: take "
            "lath.awq_scales(weights, codec, hessian) and quantize weight * scales, or lath.patch"
        )
    if isinstance(how, GPTQ) and not has_hessian:
        raise ValueError(f"quantizer {str(how)!r} needs hessian=, the sum of x xᵀ of the inputs")
    if has_hessian and not isinstance(how, GPTQ):
        raise ValueError(f"hessian is for quantizer 'gptq', got quantizer {str(how)!r}")


def check_hessian(hessian: Any, columns: int, device: torch.device) -> Tensor:
    """`hessian` as a symmetric [K, K] tensor with a diagonal that is not negative."""
    hessian = check_tensor("hessian", hessian, HESSIAN_DTYPES)
    if tuple(hessian.shape) != (columns, columns):
        raise ValueError(f"hessian must be [{columns}, {columns}], got {list(hessian.shape)}")
    check_same_device("hessian", hessian, device)
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("hessian must be finite: it has NaN or infinity")
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()):
        raise ValueError(f"hessian must have no negative diagonal, got {float(diagonal.min()):.3g}")
    largest = float(diagonal.max()) if columns else 0.0
    # |H[i, j]| <= the largest of the diagonal; fp32 sums in another order stay far below this.
    if columns and float((hessian - hessian.T).abs().max()) > 1e-3 * largest:
        raise ValueError("hessian must be symmetric")
    symmetric: Tensor = hessian.detach()
    return symmetric


def weighted_table(weight: Tensor, codec: Codec, hessian: Tensor) -> Tensor | None:
    """The table of a learned codec by k-means weighted by the Hessian's diagonal; None: unweighted,
    as there is no weight that counts."""
    square = hessian.diagonal().double()
    if not bool(square.any()) or not bool(torch.isfinite(weight).all()):
        return None
    return learn_table(weight.float(), codec, square / square.mean())


def requantize(weight: Tensor, start: QTensor, how: Quantizer, hessian: Tensor | None) -> QTensor:
    """`start`, the weight rounded to nearest, with the codes or zeros of another quantiser."""
    if not isinstance(start, QTensor):
        raise NotImplementedError(
            f"quantizer {str(how)!r} rounds one weight at a time, and codec {start.codec} does not"
        )
    if isinstance(how, HQQ):
        return hqq.hqq(weight, start, how)
    assert isinstance(how, GPTQ)
    assert hessian is not None
    return gptq.gptq(weight, start, gptq.factorize(hessian, how), how.block)


def awq_scales(
    weights: Tensor | Sequence[Tensor],
    codec: str | Codec,
    hessian: Tensor,
    *,
    quantizer: str | AWQ = "awq",
    shared: Tensor | None = None,
    search: bool = False,
) -> Tensor:
    """AWQ's column scales of the weights that read one input: multiply columns, divide the input.

    weights: one [N, K] or several with the same K. hessian: as for `lath.quantize`. shared: int64
    [K], for each column the number of its scale, where what makes the input ties several (one head
    of values read by several heads of queries). search: as for `lath.quantize`, in every trial.

        s = lath.awq_scales([q, k, v], "int4-g128", hessian)
        norm.weight /= s;  packed = lath.quantize(q * s, "int4-g128")

    Returns fp32 [K], positive. Raises ValueError as `lath.quantize` does.
    """
    how, parsed = parse_quantizer(quantizer), parse_codec(codec)
    if not isinstance(how, AWQ):
        raise ValueError(f"quantizer must be 'awq', 'awq+gptq' or lath.AWQ(), got {quantizer!r}")
    all_weights = [weights] if isinstance(weights, Tensor) else list(weights)
    if not all_weights:
        raise ValueError("weights must hold a tensor, got none")
    for weight in all_weights:
        check_tensor("weights", weight)
        if weight.dim() != 2 or weight.shape[1] != all_weights[0].shape[1]:
            shapes = [list(w.shape) for w in all_weights]
            raise ValueError(f"weights must be [N, K] with one K, got shapes {shapes}")
        check_same_device("weights", weight, all_weights[0].device)
    columns, device = all_weights[0].shape[1], all_weights[0].device
    hessian = check_hessian(hessian, columns, device)
    if shared is not None:
        shared = check_tensor("shared", shared, (torch.int64,))
        if tuple(shared.shape) != (columns,) or bool((shared < 0).any()):
            raise ValueError(f"shared must be [{columns}] numbers of scales, 0 or more")
        shared = torch.unique(shared, return_inverse=True)[1]
    wanted = check_flag("search", search)
    return awq.awq_scales(
        [weight.detach() for weight in all_weights], hessian, how.grid,
        lambda scaled: kernel.quantize(scaled, parsed, wanted), shared,
    )  # fmt: skip
