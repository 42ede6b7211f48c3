"""Which view of a weight the CPU's kernels read for an activation format, made once per weight."""

from __future__ import annotations

from lath.formats.activations import ActivationFormat
from lath.formats.codec import GROUP_MULTIPLE, Codec
from lath.formats.qtensor import QTensor
from lath.kernels.linear.cpu_record import Record, Stored
from lath.kernels.linear.cpu_triplet_view import build_triplets
from lath.kernels.linear.cpu_view import (
    CpuView,
    build_view,
    kind_of,
    multiplied_out,
    record_of,
    stored_codec,
    view_group,
)
from lath.kernels.linear.plan_cpu import TRIT_GROUP, keeps_triplets, keeps_trits
from lath.kernels.linear.plan_facts import folds_scales
from lath.kernels.simd.isa import has_quick_permutation, has_wide_look_up, host_isa


def view_key(columns: int, codec: Codec, activations: ActivationFormat) -> tuple[str, int, Record]:
    """The name of a view, its group and its kind of record."""
    codec = stored_codec(codec)
    isa = host_isa()
    ternary: Stored = "integer"
    multiple = GROUP_MULTIPLE
    if keeps_triplets(columns, codec, activations, has_quick_permutation(isa)):
        ternary = "triplets"
    elif keeps_trits(columns, codec, activations, has_wide_look_up(isa)):
        ternary, multiple = "trits", TRIT_GROUP
    group = view_group(columns, codec, activations, multiple)
    folded = codec.scale_dtype == "int8" and folds_scales(columns, codec, activations)
    record = record_of(codec, kind_of(codec, activations), folded, ternary)
    return f"cpu-g{group}-{record.stored}-{record.byte_scale}", group, record


def cpu_view(weight: QTensor, activations: ActivationFormat) -> CpuView:
    """The view of a weight for an activation format, made on first use and kept with it."""
    key, group, record = view_key(weight.shape[1], weight.codec, activations)
    if record.stored == "triplets":
        return weight.view(key, lambda: build_triplets(weight, record))
    return weight.view(key, lambda: build_view(multiplied_out(weight), group, record))
