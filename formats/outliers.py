"""A few weights of a matrix, kept apart as floats: the side-car of another codec.

Compressed rows: the entries of row n are `offsets[n]` to `offsets[n + 1]` of `codes` (their
columns, ascending) and `values`. The count follows from the shape, wherever the entries lie: rows
without any cost nothing, and all of them may be in one row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from lath.formats.packed_weight import PackedWeight, check_layout

# Columns of which int16 holds every number; wider weights take int32.
SHORT_COLUMNS = 1 << 15

_PATTERN = re.compile(r"out(?P<percent>\d+(\.\d+)?)%")


@dataclass(frozen=True)
class OutlierCodec:
    """percent: of the N * K weights, above 0 and up to 100, that are kept as fp16 with their
    columns. They multiply x itself, whatever the activation format of the rest."""

    percent: float

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"codec percent of outliers must be in (0, 100], got {self.percent!r}")
        object.__setattr__(self, "_text", f"out{self.percent:g}%")

    @staticmethod
    def parse(text: str) -> OutlierCodec:
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"codec of outliers must be 'outP%', such as 'out1%', got {text!r}")
        return OutlierCodec(float(match["percent"]))

    def __str__(self) -> str:
        return self._text  # type: ignore[attr-defined, no-any-return]

    @property
    def group(self) -> None:
        return None

    def count(self, shape: tuple[int, int]) -> int:
        """Entries of a weight [N, K]."""
        return round(shape[0] * shape[1] * self.percent / 100)


class Outliers(PackedWeight):
    """`count` entries of a weight [N, K] that is 0 elsewhere.

    codes: the columns, int16 for K <= 32768, else int32, [count]; ascending in each row. values:
    fp16 [count]. offsets: int32 [N + 1], where each row begins.
    """

    codec: OutlierCodec
    values: Tensor
    offsets: Tensor

    def __init__(
        self,
        codec: OutlierCodec,
        shape: tuple[int, int],
        codes: Tensor,
        values: Tensor,
        offsets: Tensor,
    ) -> None:
        self.codec, self.shape = codec, (int(shape[0]), int(shape[1]))
        self.codes, self.values, self.offsets = codes, values, offsets
        check_layout(self, _layout(codec, self.shape))

    parse_codec = staticmethod(OutlierCodec.parse)

    @staticmethod
    def tensor_names(codec: OutlierCodec) -> tuple[str, ...]:
        return tuple(_layout(codec, (0, 0)))

    @classmethod
    def empty(
        cls, codec: OutlierCodec, shape: tuple[int, int], device: torch.device | str = "meta"
    ) -> Outliers:
        # Zeros, since kernels follow columns and offsets to wherever they point.
        tensors = {
            name: torch.zeros(size, dtype=dtype, device=device)
            for name, (size, dtype) in _layout(codec, shape).items()
        }
        return cls(codec, shape, **tensors)

    @classmethod
    def from_places(
        cls, codec: OutlierCodec, shape: tuple[int, int], places: Tensor, values: Tensor
    ) -> Outliers:
        """places: int64 [count], ascending, n * K + k of each entry. values: float [count]."""
        columns = max(shape[1], 1)
        rows = torch.arange(shape[0] + 1, device=places.device) * columns
        stored = values.to(torch.float16)
        if not bool(torch.isfinite(stored).all()):
            raise ValueError(
                f"weight is too large for {codec}: an outlier of {float(values.abs().max()):.3g} "
                "overflows fp16; scale the weight"
            )
        return cls(
            codec, shape, (places % columns).to(_layout(codec, shape)["codes"][1]), stored,
            torch.searchsorted(places, rows).to(torch.int32),
        )  # fmt: skip

    def places(self) -> Tensor:
        """int64 [count]: n * K + k of each entry."""
        counts = self.offsets.diff().long()
        rows = torch.arange(self.shape[0], device=self.device).repeat_interleave(counts)
        return rows * self.shape[1] + self.codes.long()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        dense = torch.zeros(self.shape, dtype=torch.float32, device=self.device)
        dense.view(-1)[self.places()] = self.values.float()
        return dense.to(dtype)

    def check_values(self) -> None:
        """Columns outside the weight or out of order, offsets that do not divide the entries."""
        count, columns = self.codes.numel(), self.codes.long()
        offsets = self.offsets.long()
        ends = (int(offsets[0]), int(offsets[-1]))
        if ends != (0, count) or bool((offsets.diff() < 0).any()):
            raise ValueError(f"offsets of a {self.codec} must ascend from 0 to {count}")
        if bool((columns < 0).any()) or bool((columns >= self.shape[1]).any()):
            raise ValueError(f"codes of a {self.codec} must be columns below {self.shape[1]}")
        if bool((self.places().diff() <= 0).any()):
            raise ValueError(f"codes of a {self.codec} must ascend in each row")
        if not bool(torch.isfinite(self.values).all()):
            raise ValueError(f"values of a {self.codec} must be finite")


def _layout(
    codec: OutlierCodec, shape: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    count = codec.count(shape)
    short = shape[1] <= SHORT_COLUMNS
    return {
        "codes": ((count,), torch.int16 if short else torch.int32),
        "values": ((count,), torch.float16),
        "offsets": ((shape[0] + 1,), torch.int32),
    }
