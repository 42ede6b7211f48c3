"""SumTensor: a packed weight that is a sum of packed weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lath.formats.codec import GROUP_MULTIPLE
from lath.formats.outliers import OutlierCodec, Outliers
from lath.formats.packed_weight import PackedWeight, WeightCodec, check_names
from lath.formats.sum_codec import SumCodec, Term

RUN = GROUP_MULTIPLE


class SumTensor(PackedWeight):
    """A weight [N, K] = Σ over terms, each a packed weight [N, K_t] of all or of some columns.

    Tensors: those of each term, "codes", "scales", then "codes_1", "scales_1" of the second and so
    on, and, where a part deals out the columns, `columns`: int32 [K], all columns of x in the order
    in which the terms take them (`pieces`: from where to where; None: all of x in its own
    order). terms: the packed weights themselves.
    """

    codec: SumCodec
    columns: Tensor | None

    def __init__(
        self,
        codec: SumCodec,
        shape: tuple[int, int],
        terms: list[PackedWeight],
        columns: Tensor | None = None,
    ) -> None:
        self.codec, self.shape = codec, (int(shape[0]), int(shape[1]))
        self.terms = tuple(terms)
        self.columns = columns
        wanted = [(term.codec, size) for term, size in _term_shapes(codec, self.shape)]
        have = [(term.codec, term.shape) for term in terms]
        if wanted != have:
            raise ValueError(f"terms of a {codec} {self.shape} must be {wanted}, got {have}")
        if (columns is None) != (codec.dealer is None):
            raise ValueError(f"columns of a {codec} must be {_presence(codec)}")
        if columns is not None and (
            tuple(columns.shape) != (self.shape[1],) or columns.dtype != torch.int32
        ):
            raise ValueError(
                f"columns of a {codec} {self.shape} must be torch.int32 [{self.shape[1]}], got "
                f"{columns.dtype} {list(columns.shape)}"
            )
        self.pieces = tuple(term.columns for term in codec.terms(self.shape[1]))
        for name, tensor in _named(codec, self.terms, columns).items():
            setattr(self, name, tensor)
            if tensor.device != self.codes.device:
                raise ValueError(f"{name} is on {tensor.device}, codes are on {self.codes.device}")

    parse_codec = staticmethod(SumCodec.parse)

    @staticmethod
    def tensor_names(codec: SumCodec) -> tuple[str, ...]:
        names = [
            _suffixed(name, index)
            for index, term in enumerate(codec.terms(0))
            for name in class_of(term.codec).tensor_names(term.codec)
        ]
        return (*names, "columns") if codec.dealer is not None else tuple(names)

    @classmethod
    def empty(
        cls, codec: SumCodec, shape: tuple[int, int], device: torch.device | str = "meta"
    ) -> SumTensor:
        terms = [
            class_of(term.codec).empty(term.codec, size, device)
            for term, size in _term_shapes(codec, shape)
        ]
        columns = None
        if codec.dealer is not None:  # an order that every index is valid in
            columns = torch.arange(shape[1], dtype=torch.int32, device=device)
        return cls(codec, shape, terms, columns)

    @classmethod
    def from_tensors(
        cls, codec: SumCodec, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> SumTensor:
        check_names(cls, codec, tensors)
        terms = []
        for index, (term, size) in enumerate(_term_shapes(codec, shape)):
            kind = class_of(term.codec)
            names = kind.tensor_names(term.codec)
            own = {name: tensors[_suffixed(name, index)] for name in names}
            terms.append(kind.from_tensors(term.codec, size, own))
        return cls(codec, shape, terms, tensors.get("columns"))

    def columns_of(self, index: int) -> Tensor | None:
        """The columns of x that a term multiplies, int32 [K_t]; None: all."""
        piece = self.pieces[index]
        if piece is None:
            return None
        assert self.columns is not None
        return self.columns[piece[0] : piece[1]]

    def runs_of(self, index: int) -> Tensor | None:
        """Where in x the runs of RUN columns begin that a term multiplies, int32 [ceil(K_t / RUN)]:
        a kernel that reads by runs needs no gather before it. None: it multiplies all columns, none
        or single ones (groups of a mix are whole runs, salient columns are not)."""
        columns = self.columns_of(index)
        if columns is None or not len(columns):
            return None
        starts = columns[::RUN].contiguous()
        inside = torch.arange(RUN, dtype=torch.int32, device=columns.device)
        whole = (starts[:, None] + inside).reshape(-1)[: len(columns)]
        return starts if torch.equal(whole, columns) else None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]: terms in fp32, added first to last in fp32, rounded once to dtype."""
        dense = torch.zeros(self.shape, dtype=torch.float32, device=self.device)
        for index, term in enumerate(self.terms):
            columns = self.columns_of(index)
            if columns is None:
                dense += term.dequantize()
            else:
                dense[:, columns.long()] += term.dequantize()
        return dense.to(dtype)

    def check_values(self) -> None:
        for term in self.terms:
            term.check_values()
        if self.columns is not None:
            every = torch.arange(self.shape[1], dtype=torch.int32, device=self.device)
            if not torch.equal(self.columns.sort().values, every):
                raise ValueError(
                    f"columns of a {self.codec} must hold each of 0 to {self.shape[1] - 1} once"
                )

    @property
    def view_nbytes(self) -> int:
        """Bytes of the repacked views of the terms; the sum has none of its own."""
        return sum(term.view_nbytes for term in self.terms)


def class_of(codec: WeightCodec) -> type[PackedWeight]:
    """The class of a term's packed weights."""
    # Imported here: the list of families names this one too.
    from lath.formats.families import weight_class

    return Outliers if isinstance(codec, OutlierCodec) else weight_class(codec)


def _term_shapes(codec: SumCodec, shape: tuple[int, int]) -> list[tuple[Term, tuple[int, int]]]:
    """Each term and the shape of its packed weight."""
    found = []
    for term in codec.terms(shape[1]):
        first, last = term.columns or (0, shape[1])
        found.append((term, (shape[0], last - first)))
    return found


def _suffixed(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def _named(
    codec: SumCodec, terms: tuple[PackedWeight, ...], columns: Tensor | None
) -> dict[str, Tensor]:
    tensors = {
        _suffixed(name, index): tensor
        for index, term in enumerate(terms)
        for name, tensor in term.tensors.items()
    }
    return tensors if columns is None else {**tensors, "columns": columns}


def _presence(codec: SumCodec) -> str:
    return "absent" if codec.dealer is None else "present"
