"""What `lath.patch` was asked for, and the rows of its report about linear layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lath.formats.activations import ActivationFormat
from lath.formats.families import weight_class
from lath.formats.packed_weight import PackedWeight, WeightCodec
from lath.formats.quantizer import Quantizer
from lath.formats.vectors import VectorCodec
from lath.integration.find import Found
from lath.integration.linear import PackedLinear
from lath.integration.report import PatchReport, PatchRow, model_bytes, unique_bytes
from lath.verbs.backends import resolve_backend


@dataclass(frozen=True)
class PatchOptions:
    codec: WeightCodec
    activations: ActivationFormat | None  # None: as the device suggests
    backend: str
    search: bool
    quantizer: Quantizer
    importance: Mapping[str, Tensor] | None = None

    def activations_on(self, device: torch.device) -> ActivationFormat:
        if self.activations is not None:
            return self.activations
        return auto_activations(self.codec, device.type == "cpu" and self.backend != "triton")


@dataclass(frozen=True)
class Packed:
    dense: nn.Linear
    module: PackedLinear
    error: float
    note: str


def auto_activations(codec: WeightCodec, on_cpu: bool) -> ActivationFormat:
    """int8 on a CPU, where the integer dot is what makes it fast, grouped as the weight is; vectors
    of a codebook are multiplied as fp32 there, which rounding would not make faster."""
    rounded = on_cpu and not isinstance(codec, VectorCodec)
    return ActivationFormat("int8", codec.group) if rounded else ActivationFormat()


def report_of(
    model: nn.Module,
    found: list[Found],
    packed: dict[int, Packed],
    options: PatchOptions,
    dry_run: bool,
) -> PatchReport:
    rows = [_row(one, packed.get(id(one.module)), options) for one in found]
    return PatchReport(
        rows=rows,
        bytes_before=model_bytes(model),
        bytes_after=_bytes_after(model, found, packed, options),
        weights=str(options.codec),
        activations=_each(row.activations for row in rows),
        backend=_each(row.backend for row in rows),
        dry_run=dry_run,
    )


def _row(one: Found, packed: Packed | None, options: PatchOptions) -> PatchRow:
    module = one.module
    shape = (module.out_features, module.in_features)
    own = unique_bytes(module.parameters(recurse=False))
    row = PatchRow(one.name, shape, "kept", one.reason, also_named=one.also_named,
                   bytes_before=own, bytes_after=own)  # fmt: skip
    if one.reason:
        return row
    already = isinstance(module, PackedLinear)
    device = module.device if isinstance(module, PackedLinear) else module.weight.device
    bias = 0 if module.bias is None else unique_bytes([module.bias])
    return dataclasses.replace(
        row,
        action="already packed" if already else "replaced",
        codec=str(_weight_of(one, packed, options).codec),
        activations=str(options.activations_on(device)),
        backend=resolve_backend(options.backend, device),
        bytes_after=own if already else _weight_of(one, packed, options).nbytes + bias,
        error=packed.error if packed else None,
        quantizer=packed.note if packed else "",
    )


def _weight_of(one: Found, packed: Packed | None, options: PatchOptions) -> PackedWeight:
    """The packed weight, or an empty one of its codec where nothing is packed (a dry run)."""
    if isinstance(one.module, PackedLinear):
        return one.module.qtensor
    if packed is not None:
        return packed.module.qtensor
    shape = (one.module.out_features, one.module.in_features)
    return weight_class(options.codec).empty(options.codec, shape)


def _bytes_after(
    model: nn.Module, found: list[Found], packed: dict[int, Packed], options: PatchOptions
) -> int:
    """Bytes of the patched model; a weight that another module holds as well does not go away."""
    replaced = {id(one.module): one for one in found if is_to_do(one)}
    stay = [
        tensor
        for module in model.modules()
        if id(module) not in replaced
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    stay += [one.module.bias for one in replaced.values() if one.module.bias is not None]
    sizes = {
        id(one.module.weight): _weight_of(one, packed.get(key), options).nbytes
        for key, one in replaced.items()
    }
    return unique_bytes(stay) + sum(sizes.values())


def is_to_do(one: Found) -> bool:
    return not one.reason and isinstance(one.module, nn.Linear)


def _each(values: Iterable[str]) -> str:
    """The one value, several joined, or "none"."""
    return ", ".join(sorted({value for value in values if value})) or "none"


def why_nothing(model: nn.Module, rows: list[PatchRow], weights: str | WeightCodec | None) -> str:
    if weights is None:
        return "weights, attention and kv are None"
    if not rows:
        return f"{type(model).__name__} has no nn.Linear"
    reasons = sorted({row.reason for row in rows})
    return f"all {len(rows)} linear layers were kept ({'; '.join(reasons)})"
