"""The numbers that each weight may become once scales, zeros and table are fixed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lath.formats import packing
from lath.formats.codec import Codec
from lath.formats.qtensor import QTensor
from lath.kernels.quantize_tables import ascending, nearest_entry


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of every (group, row) of a packed weight, in fp32, without padding.

    `nearest` takes the fp32 steps of round-to-nearest: a weight gets the code it has already.
    """

    codec: Codec
    scale: Tensor  # fp32 [G, N]
    zero: Tensor  # fp32 [G, N]: zero points or minima; empty where the codec has none
    entries: Tensor  # fp32 [levels] of a table, else empty
    by_number: tuple[Tensor, Tensor] | None  # `ascending(entries)`

    @staticmethod
    def of(weight: QTensor) -> Grid:
        rows, codec = weight.shape[0], weight.codec
        scale = weight.effective_scales()[:, :rows].contiguous()
        zero = scale.new_empty(0)
        if weight.zeros is not None:
            zero = weight.zeros[:, :rows].float().contiguous()
        entries = weight.entries() if codec.is_table else scale.new_empty(0)
        return Grid(codec, scale, zero, entries, ascending(entries) if codec.is_table else None)

    def nearest(self, values: Tensor, group: int | slice | Tensor) -> Tensor:
        """uint8 codes of values [..., N]; group: of each column along the first axis, or of all."""
        codec, w, s = self.codec, values.float(), self.scale[group]
        if codec.is_table:
            return nearest_entry(w / s, self.entries, self.by_number)
        if codec.bits == 1 and codec.zero == "none":
            return (w >= 0).to(torch.uint8)
        if codec.zero == "float":
            code = torch.round((w - self.zero[group]) / s)
        else:
            code = torch.round(w / s)
            code += self.zero[group] if codec.zero == "integer" else codec.zero_code
        return code.clamp_(0, codec.levels - 1).to(torch.uint8)

    def decode(self, codes: Tensor, group: int | slice | Tensor) -> Tensor:
        """float64 values of codes [..., N]: exact, as the definition's."""
        scale = self.scale[group].double()
        if self.codec.is_table:
            return self.entries.double()[codes.long()] * scale
        if self.codec.zero == "float":
            return codes.double() * scale + self.zero[group].double()
        offset: Tensor | float = self.codec.zero_code
        if self.codec.zero == "integer":
            offset = self.zero[group].double()
        return (codes.double() - offset) * scale


def with_codes(weight: QTensor, codes: Tensor) -> QTensor:
    """The same scales, zeros and table under other codes, uint8 [N, K]."""
    others = {name: tensor for name, tensor in weight.tensors.items() if name != "codes"}
    return QTensor(weight.codec, weight.shape, packing.pack(codes, weight.codec), **others)
