"""The kinds of packed weight, by their codecs: what a text form or a saved weight is looked up in.

A new kind adds a line to `FAMILIES`; the verbs, the module and the command line take any of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lath.formats.codec import GRAMMAR_TABLE as PLANES_GRAMMAR
from lath.formats.codec import Codec
from lath.formats.lattice import LATTICE_CLAIMS, LATTICE_GRAMMAR, LatticeCodec, LatticeTensor
from lath.formats.packed_weight import PackedWeight, WeightCodec, read_metadata
from lath.formats.qtensor import QTensor
from lath.formats.sparse import GRAMMAR_TABLE as SPARSE_GRAMMAR
from lath.formats.sparse import SparseCodec, SparseTensor
from lath.formats.sum_codec import CLAIMS as SUM_CLAIMS
from lath.formats.sum_codec import GRAMMAR_TABLE as SUM_GRAMMAR
from lath.formats.sum_codec import SumCodec
from lath.formats.sum_tensor import SumTensor
from lath.formats.vectors import VECTOR_CLAIMS, VECTOR_GRAMMAR, VectorCodec, VectorTensor


@dataclass(frozen=True)
class Family:
    """codec: the class of its codecs. weight: that of its packed weights. claims: a regular
    expression; a text form that fits it as a whole is of this family and of none before it.
    grammar: text forms and what they mean, for people."""

    codec: type[WeightCodec]
    weight: type[PackedWeight]
    claims: str
    grammar: Mapping[str, str]


# Sums come first, since the text of any other may be a part of theirs. The last one claims all
# texts that are left, and names what is accepted.
FAMILIES: tuple[Family, ...] = (
    Family(SumCodec, SumTensor, SUM_CLAIMS, SUM_GRAMMAR),
    Family(SparseCodec, SparseTensor, r"sparse.*", SPARSE_GRAMMAR),
    Family(VectorCodec, VectorTensor, VECTOR_CLAIMS, VECTOR_GRAMMAR),
    Family(LatticeCodec, LatticeTensor, LATTICE_CLAIMS, LATTICE_GRAMMAR),
    Family(Codec, QTensor, r".*", PLANES_GRAMMAR),
)

GRAMMAR_TABLE = {form: text for family in FAMILIES for form, text in family.grammar.items()}


def weight_codec(codec: str | WeightCodec) -> WeightCodec:
    """The codec of a text form, of whatever family; a codec is returned as it is.

    ValueError if the text is no form of any family, TypeError for anything else.
    """
    for family in FAMILIES:
        if isinstance(codec, family.codec):
            return codec
    if not isinstance(codec, str):
        raise TypeError(f"codec must be a str or a Codec, got {type(codec).__name__}: {codec!r}")
    parsed: WeightCodec = family_of_text(codec).weight.parse_codec(codec)
    return parsed


def family_of_text(text: str) -> Family:
    """The family that claims a text form."""
    return next(family for family in FAMILIES if re.fullmatch(family.claims, text))


def weight_class(codec: WeightCodec) -> type[PackedWeight]:
    """The class of weights packed in a codec."""
    return next(family.weight for family in FAMILIES if isinstance(codec, family.codec))


def load_weight(state: Mapping[str, Tensor]) -> PackedWeight:
    """The packed weight that `PackedWeight.state_dict` saved; ValueError if it is corrupted."""
    return family_of_text(read_metadata(state)["codec"]).weight.from_state_dict(state)
