"""One decoder layer: the Hessians of its linear layers' inputs, AWQ's folding, and the rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lath.formats.codec import Codec
from lath.formats.packed_weight import PackedWeight
from lath.formats.quantizer import AWQ, RTN, Quantizer
from lath.integration.awq_folding import Folding, find_folding, row_scales, scaled_norm
from lath.integration.layer_chain import watching
from lath.integration.progress import Advance
from lath.verbs.quantize import quantize
from lath.verbs.quantizers import Hessian, awq_scales

# Runs the layer on hidden states [1, L, D].
Run = Callable[[Tensor], Tensor]
# The same in fp32 with these parameters in place of the layer's own.
RunWide = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Rounding:
    """What every layer is rounded to, and how."""

    codec: Codec
    quantizer: Quantizer
    search: bool


@dataclass
class LayerResult:
    """By path in the layer. packed: of linear layers. parameters: what else changed: norms that
    were scaled, biases of rows that were. notes: the quantiser of each linear layer, and where
    AWQ did not scale, why. errors: ||W - packed W|| / ||W||, W scaled."""

    packed: dict[str, PackedWeight] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def values(self, layer: nn.Module) -> dict[str, Tensor]:
        """The parameters of `layer` that compute what the packed layers do."""
        dense = {
            f"{path}.weight": weight.dequantize(layer.get_parameter(f"{path}.weight").dtype)
            for path, weight in self.packed.items()
        }
        return {**dense, **self.parameters}


@contextmanager
def holding(layer: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """While the block runs, `layer` has these parameters; then its own, the same tensors, again."""
    kept = {name: layer.get_parameter(name).data for name in values}
    try:
        for name, value in values.items():
            own = layer.get_parameter(name)
            own.data = value.to(device=own.device, dtype=own.dtype)
        yield
    finally:
        for name, data in kept.items():
            layer.get_parameter(name).data = data


def calibrate_layer(
    layer: nn.Module,
    wanted: Sequence[str],
    run: Run,
    run_wide: RunWide,
    hidden: Sequence[Tensor],
    rounding: Rounding,
    advance: Advance,
) -> LayerResult:
    """Round the linear layers at the paths `wanted`, for the hidden states that enter `layer`.

    Raises ValueError naming the linear layer that cannot be rounded.
    """
    groups = input_groups(layer, wanted, run, hidden[0])
    hessians = _gather(layer, groups, run, hidden, advance)
    weights = {path: layer.get_parameter(f"{path}.weight").detach() for path in wanted}
    result = LayerResult(notes=dict.fromkeys(wanted, str(rounding.quantizer)))
    how: Quantizer = rounding.quantizer
    if isinstance(how, AWQ):
        _scale(layer, groups, hessians, weights, rounding, result)
        _check_scaled(weights, result, run_wide, hidden[0])
        how = how.rounding
    for group, hessian in zip(groups, hessians, strict=True):
        for path in group:
            if path not in weights:
                continue
            weight = weights[path]
            needed = None if isinstance(how, RTN) else hessian
            try:
                packed = quantize(
                    weight, rounding.codec, quantizer=how, hessian=needed, search=rounding.search
                )
            except (ValueError, NotImplementedError) as error:
                raise type(error)(f"{path}: {error}") from error
            result.packed[path] = packed
            result.errors[path] = relative_error(weight, packed)
            advance(1)
    return result


def relative_error(dense: Tensor, weight: PackedWeight) -> float:
    """||W - packed W|| / ||W|| in the Frobenius norm; 0 for a weight of zeros."""

    def norm(matrix: Tensor) -> float:
        return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))

    size = norm(dense)
    return norm(weight.dequantize() - dense.float()) / size if size > 0 else 0.0


def input_groups(
    layer: nn.Module, wanted: Sequence[str], run: Run, hidden: Tensor
) -> list[list[str]]:
    """Paths of the linear layers that read the very same tensor, in the order they were found.

    Those that are not wanted are in as well: AWQ must not scale what they read.
    """
    linears = [(path, m) for path, m in layer.named_modules() if isinstance(m, nn.Linear)]
    seen: dict[str, Tensor] = {}
    with watching(linears, seen):
        run(hidden)
    idle = [path for path in wanted if path not in seen]
    if idle:
        raise NotImplementedError(f"{idle[0]} did not run on the first calibration text")
    groups: dict[int, list[str]] = {}
    for path, x in seen.items():
        groups.setdefault(id(x), []).append(path)
    return [sorted(group, key=list(dict(linears)).index) for group in groups.values()
            if set(group) & set(wanted)]  # fmt: skip


def _gather(
    layer: nn.Module,
    groups: Sequence[Sequence[str]],
    run: Run,
    hidden: Sequence[Tensor],
    advance: Advance,
) -> list[Tensor]:
    """Σ x xᵀ of each group, [K, K] fp32, over all hidden states."""
    sums = []
    handles = []
    for group in groups:
        leader = layer.get_submodule(group[0])
        own = Hessian(leader.in_features, leader.weight.device)  # type: ignore[arg-type]
        sums.append(own)
        handles.append(leader.register_forward_pre_hook(_adding(own)))
    try:
        for one in hidden:
            run(one)
            advance(1)
    finally:
        for handle in handles:
            handle.remove()
    return [own.matrix for own in sums]


def _adding(own: Hessian) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, positional: tuple[Any, ...]) -> None:
        own.add(positional[0])

    return hook


def _scale(
    layer: nn.Module,
    groups: Sequence[Sequence[str]],
    hessians: list[Tensor],
    weights: dict[str, Tensor],
    rounding: Rounding,
    result: LayerResult,
) -> None:
    """AWQ: scale columns of `weights` and what makes their input; the Hessians follow."""
    how = rounding.quantizer
    assert isinstance(how, AWQ)
    reasons = {}
    for i, group in enumerate(groups):
        folding = _folding_of(layer, group, weights)
        if isinstance(folding, str):
            reasons[group[0]] = folding
            for path in set(group) & weights.keys():
                result.notes[path] = f"{how.rounding} (awq cannot scale it: {folding})"
            continue
        scales = awq_scales(
            [weights[path] for path in group], rounding.codec, hessians[i],
            quantizer=how, shared=folding.shared, search=rounding.search,
        )  # fmt: skip
        for path in group:
            weights[path] = weights[path].float() * scales
        hessians[i] = hessians[i] / (scales[:, None] * scales)
        _unscale(layer, folding, scales, weights, result)
    if len(reasons) == len(groups):
        raise NotImplementedError(
            "awq has nowhere to put its scales: "
            + "; ".join(f"{path}: {reason}" for path, reason in reasons.items())
        )


def _folding_of(
    layer: nn.Module, group: Sequence[str], weights: Mapping[str, Tensor]
) -> Folding | str:
    kept = [path for path in group if path not in weights]
    if kept:
        return f"{kept[0]}, which is kept, reads its input as well"
    folding = find_folding(layer, group)
    if isinstance(folding, Folding):
        source = layer.get_submodule(folding.producer)
        if isinstance(source, nn.Linear) and folding.producer not in weights:
            return f"{folding.producer}, which makes its input, is kept"
    return folding


def _unscale(
    layer: nn.Module,
    folding: Folding,
    scales: Tensor,
    weights: dict[str, Tensor],
    result: LayerResult,
) -> None:
    """Divide what makes the input by the scales."""
    source, path = layer.get_submodule(folding.producer), folding.producer
    if isinstance(source, nn.Linear):
        rows = row_scales(scales, folding, source.out_features)
        weights[path] = weights[path].float() / rows[:, None]
        if source.bias is not None:
            result.parameters[f"{path}.bias"] = source.bias.detach().float() / rows
        return
    made = scaled_norm(source, scales)
    if made is None:
        raise ValueError(f"{path} cannot hold scales from {scales.min():.3g} to {scales.max():.3g}")
    for name, parameter in made.named_parameters():
        result.parameters[f"{path}.{name}"] = parameter.detach()


def _check_scaled(
    weights: Mapping[str, Tensor], result: LayerResult, run_wide: RunWide, hidden: Tensor
) -> None:
    """With scaled columns and unscaled sources the layer, not yet rounded, is the same function."""
    dense = {f"{path}.weight": weight for path, weight in weights.items()}
    before = run_wide(hidden, {})
    moved = float((run_wide(hidden, {**dense, **result.parameters}) - before).norm())
    # In fp32: some hundred times what its roundings (2**-24) add up to, and some hundred times
    # less than scales that differ from 1 by a hundredth and do not cancel.
    allowed = 2.0**-14 * float(before.norm())
    if not moved <= allowed:
        raise NotImplementedError(
            f"awq's scales change the layer's output by {moved:.3g} (allowed {allowed:.3g}): "
            "something else reads what was scaled"
        )
