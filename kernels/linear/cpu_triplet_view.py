"""The view that cpu_triplets.py reads, and the way back from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lath.formats.memory import WEIGHTS
from lath.formats.packing import PANEL, round_up
from lath.formats.qtensor import QTensor
from lath.kernels.linear.cpu_record import VECTOR_BYTES, Record
from lath.kernels.linear.cpu_triplets import (
    COLUMNS,
    ENTRIES,
    INDEX_BITS,
    INDICES,
    PAIR,
    RUN,
    WEIGHTS_OF_INDEX,
)
from lath.kernels.linear.cpu_view import CpuView, unpacked_panels


@dataclass(frozen=True)
class TripletView(CpuView):
    """records: uint8, 1-D, run after run. scales: fp32 [16 * panels]."""

    scales: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def panels(self) -> int:
        return -(-self.rows // PANEL)

    @property
    def groups(self) -> int:
        return 1

    @property
    def nbytes(self) -> int:
        return self.records.nbytes + self.scales.nbytes

    @property
    def panel_bytes(self) -> int:
        return self.words * VECTOR_BYTES // PAIR

    @property
    def pairs(self) -> int:
        return -(-self.panels // PAIR)

    @property
    def words(self) -> int:
        return -(-self.columns // COLUMNS)

    def run(self, first: int) -> NDArray[np.uint16]:
        """[pairs, words, row, panel of the pair]: the run of words that begins with `first`."""
        count = min(RUN, self.words - first)
        start, size = first * self.pairs * VECTOR_BYTES, count * self.pairs * VECTOR_BYTES
        raw = self.records.numpy()[start : start + size].view(np.uint16)
        return raw.reshape(self.pairs, count, PANEL, PAIR)


def places() -> NDArray[np.uint16]:
    """uint16 [27]: the number stored for 9 c0 + 3 c1 + c2, codes of three columns in a row. Entries
    are made sixteen at a time and laid into the halves of lanes: entry e is item 2e or 2e - 31."""
    numbers = np.arange(ENTRIES)
    return np.where(numbers < PANEL, 2 * numbers, 2 * numbers - 2 * PANEL + 1).astype(np.uint16)


def build_triplets(weight: QTensor, record: Record) -> TripletView:
    """Repack a ternary weight. ValueError unless it has one scale for each row and codes 0 .. 2."""
    rows, columns = weight.shape
    if weight.scales.shape[0] != 1:
        group = weight.codec.group
        raise ValueError(f"weight must have one scale for each row, got groups of {group}")
    # Prepared activations: whole words, a byte more that is read, whole sixteens.
    group = round_up(round_up(columns, COLUMNS) + 1, PANEL)
    scales = weight.scales.detach().float().reshape(-1).contiguous()
    empty = TripletView(record, rows, columns, group, torch.empty(0), scales=scales)
    records = WEIGHTS.room((empty.words * empty.pairs * VECTOR_BYTES,))
    view = replace(empty, records=records)
    powers, place = 3 ** np.arange(WEIGHTS_OF_INDEX - 1, -1, -1, dtype=np.uint8), places()
    for first, last, codes in unpacked_panels(weight, PAIR):
        if codes.max(initial=0) > 2:
            raise ValueError(f"weight must hold ternary codes 0, 1 and 2, got {codes.max()}")
        height, width = round_up(len(codes), PAIR * PANEL), view.words * COLUMNS
        padded = np.pad(codes, ((0, height - len(codes)), (0, width - columns)))
        triplets = padded.reshape(height, view.words, INDICES, WEIGHTS_OF_INDEX) @ powers
        numbers = place[triplets]
        words = numbers[..., 0].copy()
        for index in range(1, INDICES):
            words |= numbers[..., index] << np.uint16(INDEX_BITS * index)
        # pair, panel of it, row, word → pair, word, row, panel of it
        own = words.reshape(-1, PAIR, PANEL, view.words).transpose(0, 3, 2, 1)
        for start in range(0, view.words, RUN):
            view.run(start)[first // PAIR : -(-last // PAIR)] = own[:, start : start + RUN]
    return view


def codes_of(view: TripletView, first: int, last: int) -> NDArray[np.uint8]:
    """uint8 [16 * (last - first), K]: the weight's codes in panels first .. last - 1."""
    begin, end = first // PAIR, -(-last // PAIR)
    runs = [view.run(start)[begin:end] for start in range(0, view.words, RUN)]
    words = np.concatenate(runs, axis=1).transpose(0, 3, 2, 1)  # pair, panel, row, word
    numbers = words[..., None] >> (INDEX_BITS * np.arange(INDICES)).astype(np.uint16) & 31
    entry_at = np.zeros(2**INDEX_BITS, np.uint8)
    entry_at[places()] = np.arange(ENTRIES)
    entries = entry_at[numbers]
    codes = np.stack([entries // 9, entries // 3 % 3, entries % 3], axis=-1)
    flat = codes.reshape(-1, view.words * COLUMNS)[PANEL * (first - PAIR * begin) :]
    return np.ascontiguousarray(flat[: PANEL * (last - first), : view.columns])
