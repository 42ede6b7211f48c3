"""Cases of sums of packed weights: weights worth a sum, and answers with their bounds."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases_tables import answer
from numpy.typing import NDArray

import cases
import lath
import oracle
from lath.formats.outliers import Outliers
from lath.formats.qtensor import QTensor
from lath.formats.sum_tensor import SumTensor

# Every part beside every other: symmetric and not, tables, 8-bit scales, two and three widths,
# outliers of all kinds of base, also of one that has no code for 0.
TEXTS = [
    "int4-g64+out1%", "int3-g32-asym+out0.5%", "int4-fzero+out2%", "int1-g32+out3%",
    "nf4-g64+out1%", "int4-g64-s8+out1%", "mix2.5-g64", "mix2-g16", "mix3-g48-asym",
    "mix2:4-2.25-g32-s8", "mix4:8-4.5-g128-fzero-s32", "mix2.25-g32+out0.5%",
    "int1-g128+int1-g128", "int2-g64+int2-g64+int1", "billm10%-g64", "billm25%-g128+out1%",
]  # fmt: skip


def heavy_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Groups of columns of unequal size, and a few weights that are far larger than the rest."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal((1, columns)))
    large = rng.random((rows, columns)) < 0.01
    weight[large] *= 12
    weight[1] = 0
    return torch.from_numpy(weight.astype(np.float32))


class Answer(NamedTuple):
    """y64 and the gauge Σ|a||w| of all terms, float64 [M, N]."""

    y64: NDArray[np.float64]
    gauge: NDArray[np.float64]


def answer_of(
    x: torch.Tensor, weight: SumTensor, bias: torch.Tensor | None, activations: str
) -> Answer:
    """Term by term, each by the definition of its own kind; outliers by a loop over entries."""
    shape = (x.shape[0], weight.shape[0])
    y64, gauge = np.zeros(shape), np.zeros(shape)
    for index, term in enumerate(weight.terms):
        columns = weight.columns_of(index)
        own = x if columns is None else x[:, columns.long()]
        if isinstance(term, Outliers):
            entry = 0
            for n in range(term.shape[0]):
                while entry < int(term.offsets[n + 1]):
                    product = own[:, int(term.codes[entry])].double() * float(term.values[entry])
                    y64[:, n] += product.numpy()
                    gauge[:, n] += product.abs().numpy()
                    entry += 1
            continue
        assert isinstance(term, QTensor)
        if term.shape[1] == 0:
            continue
        if term.codec.is_table or term.codec.scale_dtype == "int8":
            part = answer(own, term, None, activations)
            y64, gauge = y64 + part.y64, gauge + part.gauge
        else:
            values, sizes = cases.definition(own, term, None, activations)
            y64, gauge = y64 + values, gauge + sizes
    if bias is not None:
        y64, gauge = y64 + bias.double().numpy(), gauge + bias.double().abs().numpy()
    return Answer(y64, gauge)


def ratio_of(y: torch.Tensor, found: Answer, weight: SumTensor, roundings: int = 0) -> float:
    """max |error| / bound. roundings: of looked-up entries to a dot's 16 bits; each term is one
    addition more."""
    size = weight.shape[1] + len(weight.terms)
    bound = oracle.linear_bound(
        found.y64, found.gauge, size, y.dtype, roundings, torch.float16 if roundings else None
    )
    return oracle.test_ratio(y, found.y64, bound)


def make_sum(text: str, rows: int = 37, columns: int = 200, seed: int = 0) -> SumTensor:
    packed = lath.quantize(heavy_weight(rows, columns, seed), text)
    assert isinstance(packed, SumTensor)
    return packed


def error_of(packed: lath.PackedWeight, weight: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((packed.dequantize() - weight).norm() / weight.norm())


def slow_but_every_second(texts: list[str]) -> list[Any]:
    """Kernels are compiled or interpreted for each of them: half at every run, all in slow ones."""
    return [
        pytest.param(text, marks=[pytest.mark.slow] if i % 2 else [])
        for i, text in enumerate(texts)
    ]
