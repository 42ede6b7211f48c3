"""Calibration: rounding a model's layers by what passes through them, one layer at a time.

The texts run through the layers together, layer by layer: the Hessians of one layer are gathered,
its weights are rounded, and what the rounded layer returns enters the next. In memory are the
hidden states of all texts and the Hessians of one layer, never more.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lath.formats.codec import Codec
from lath.formats.families import load_weight
from lath.formats.packed_weight import PackedWeight, WeightCodec
from lath.formats.quantizer import Quantizer
from lath.integration.calibrate_layer import LayerResult, Rounding, calibrate_layer, holding
from lath.integration.calibration_store import CalibrationStore, digest_of
from lath.integration.layer_chain import LayerChain, find_layers, record_chain
from lath.integration.progress import Advance, progress_bar

# A new number whenever what is saved in a folder, or how it is computed, changes.
_VERSION = 1


@dataclass(frozen=True, eq=False)
class Calibration:
    """Texts of one length to calibrate on, and where to keep what is done.

    ids: int64 [S, L] token ids. folder: None, or a folder that receives each layer as it is done;
    a later run with the same settings goes on from there, one with others is refused.
    """

    ids: Tensor
    folder: Path | None = None

    def __post_init__(self) -> None:
        ids = self.ids
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
            raise TypeError("calibration ids must be an int64 tensor [texts, tokens]")
        if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise ValueError(
                f"calibration ids must be [texts, tokens], 1 and 2 or more, got {list(ids.shape)}"
            )

    @staticmethod
    def from_text(
        tokenizer: Any,
        text: str | Sequence[str],
        tokens: int = 16384,
        window: int = 512,
        seed: int = 0,
        folder: Path | None = None,
    ) -> Calibration:
        """`tokens // window` windows of a text or texts, chosen by `seed`, none twice.

        Texts are joined by blank lines. Raises ValueError if there are fewer tokens than asked for.
        """
        joined = text if isinstance(text, str) else "\n\n".join(text)
        ids = tokenizer(joined, return_tensors="pt", verbose=False).input_ids
        return Calibration.from_ids(ids, tokens, window, seed, folder)

    @staticmethod
    def from_ids(
        ids: Tensor, tokens: int, window: int = 512, seed: int = 0, folder: Path | None = None
    ) -> Calibration:
        """The same of the token ids of one long text, int64 [L] or [1, L]."""
        ids = ids.reshape(-1)
        if window < 2 or tokens < window:
            raise ValueError(f"tokens must be at least window, 2 or more: {tokens} and {window}")
        there, count = ids.numel() // window, tokens // window
        if there < count:
            raise ValueError(
                f"calibration text has {ids.numel()} tokens, {there} windows of {window}; "
                f"{count} are needed for tokens={tokens}"
            )
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(there, generator=generator)[:count]
        return Calibration(ids[: there * window].reshape(there, window)[chosen], folder)


def split_text(
    ids: Tensor,
    tokens: int,
    calibration_tokens: int,
    window: int,
    seed: int,
    *,
    folder: Path | None = None,
) -> tuple[Tensor, Calibration | None]:
    """Of the ids of a text: the first `tokens`, [tokens], and windows of what follows to calibrate
    on, at most `calibration_tokens`; None if not one window is left. ValueError for a short text.
    """
    flat = ids.reshape(-1)
    if flat.numel() < tokens:
        raise ValueError(f"the text has {flat.numel()} tokens, {tokens} are to be measured")
    count = min(calibration_tokens, flat.numel() - tokens) // window
    if count < 1:
        return flat[:tokens], None
    made = Calibration.from_ids(flat[tokens:], count * window, window, seed, folder)
    return flat[:tokens], made


def calibration_of(
    calibration: Calibration | Tensor | None, quantizer: Quantizer
) -> Calibration | None:
    """What a quantiser calibrates on; ValueError if it is missing, or given where none is used."""
    if quantizer.calibrated and calibration is None:
        raise ValueError(
            f"quantizer {str(quantizer)!r} needs calibration=, token ids [texts, tokens] or "
            "lath.Calibration.from_text(tokenizer, text)"
        )
    if not quantizer.calibrated and calibration is not None:
        raise ValueError(f"quantizer {str(quantizer)!r} uses no calibration, but one was given")
    return Calibration(calibration) if isinstance(calibration, Tensor) else calibration


@dataclass(frozen=True)
class CalibratedLinear:
    """One linear layer. bias: where its rows were scaled. note: the quantiser, as applied."""

    weight: PackedWeight
    bias: Tensor | None
    note: str
    error: float


@dataclass(frozen=True)
class Calibrated:
    """linears: by path in the model. parameters: of norms that were scaled, by path."""

    linears: dict[str, CalibratedLinear]
    norms: dict[str, dict[str, Tensor]]


def calibrate(
    model: nn.Module,
    linears: Sequence[str],
    codec: WeightCodec,
    quantizer: Quantizer,
    calibration: Calibration,
    search: bool = False,
    show_progress: bool | None = None,
) -> Calibrated:
    """Round the linear layers at these paths; the model is as before when this returns or raises.

    Needs a model in evaluation mode whose decoder layers are a chain in one nn.ModuleList.
    Deterministic: the same model, tokens and threads give the same bits. Raises ValueError or
    NotImplementedError naming the layer and what is wrong.
    """
    if model.training:
        raise ValueError("calibration needs the model in evaluation mode: call model.eval()")
    if not isinstance(codec, Codec):
        raise ValueError(
            f"quantizer {str(quantizer)!r} rounds one weight at a time, codec {str(codec)!r} does "
            "not: take quantizer 'rtn'"
        )
    layers = find_layers(model, linears)
    wanted = {
        path: [name[len(path) + 1 :] for name in linears if name.startswith(f"{path}.")]
        for path, _ in layers
    }
    # Nothing behind the last layer that is wanted needs to run.
    last = max(i for i, (path, _) in enumerate(layers) if wanted[path])
    layers = layers[: last + 1]
    texts = len(calibration.ids)
    total = sum(2 * texts + len(wanted[path]) for path, _ in layers)
    rounding = Rounding(codec, quantizer, search)
    title = f"calibrating {len(layers)} layers, {quantizer} {codec}"
    with torch.no_grad(), progress_bar(title, total, show_progress) as advance:
        ids = calibration.ids.to(next(model.parameters()).device)
        chain, hidden = record_chain(model, layers, ids)
        results = _run(chain, hidden, wanted, rounding, calibration, advance)
    return _collect(model, layers, results)


def _run(
    chain: LayerChain,
    hidden: list[Tensor],
    wanted: Mapping[str, list[str]],
    rounding: Rounding,
    calibration: Calibration,
    advance: Advance,
) -> list[LayerResult]:
    """`hidden` is replaced, text by text, by what the layers return."""
    store, key = None, ""
    if calibration.folder is not None:
        settings = _settings(rounding, calibration.ids, wanted)
        store = CalibrationStore(Path(calibration.folder), settings)
        key = digest_of((str(i), one) for i, one in enumerate(hidden))
    results = []
    for index, (path, layer) in enumerate(chain.layers):
        paths = wanted[path]
        if store is not None:
            key = digest_of(layer.state_dict().items(), key)
        done = None if store is None else store.load(index, key)
        if done is not None:
            result = _unpack(done)
            advance(len(hidden) + len(paths))
        elif not paths:
            result = LayerResult()
            advance(len(hidden))
        else:
            try:
                run = functools.partial(chain.run, index)
                wide = functools.partial(chain.run_wide, index)
                result = calibrate_layer(layer, paths, run, wide, hidden, rounding, advance)
            except (ValueError, NotImplementedError) as error:
                raise type(error)(f"{path}: {error}") from error
            if store is not None:
                store.save(index, key, _pack(result))
        results.append(result)
        if index + 1 < len(chain.layers):
            with holding(layer, result.values(layer)):
                for i, one in enumerate(hidden):
                    hidden[i] = chain.run(index, one)
                    advance(1)
    return results


def _settings(rounding: Rounding, ids: Tensor, wanted: Mapping[str, list[str]]) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "codec": str(rounding.codec),
        "quantizer": repr(rounding.quantizer),
        "search": rounding.search,
        "tokens": list(ids.shape),
        "tokens_sha256": digest_of([("ids", ids)]),
        "layers_sha256": hashlib.sha256(json.dumps(dict(wanted)).encode()).hexdigest(),
    }


_PACKED, _PARAMETER, _NOTES = "packed:", "parameter:", "notes"


def _pack(result: LayerResult) -> dict[str, Tensor]:
    """One flat dict of tensors; notes and errors as JSON in bytes."""
    tensors = {
        f"{_PACKED}{path}:{name}": tensor
        for path, weight in result.packed.items()
        for name, tensor in weight.state_dict().items()
    }
    tensors |= {f"{_PARAMETER}{name}": tensor for name, tensor in result.parameters.items()}
    notes = json.dumps([result.notes, result.errors]).encode()
    return {**tensors, _NOTES: torch.frombuffer(bytearray(notes), dtype=torch.uint8)}


def _unpack(tensors: Mapping[str, Tensor]) -> LayerResult:
    states: dict[str, dict[str, Tensor]] = {}
    result = LayerResult()
    for name, tensor in tensors.items():
        if name.startswith(_PACKED):
            _, path, part = name.split(":")
            states.setdefault(path, {})[part] = tensor
        elif name.startswith(_PARAMETER):
            result.parameters[name[len(_PARAMETER) :]] = tensor
    result.packed = {path: load_weight(state) for path, state in states.items()}
    result.notes, result.errors = json.loads(bytes(tensors[_NOTES].tolist()))
    return result


def _collect(
    model: nn.Module, layers: Sequence[tuple[str, nn.Module]], results: Sequence[LayerResult]
) -> Calibrated:
    linears: dict[str, CalibratedLinear] = {}
    norms: dict[str, dict[str, Tensor]] = {}
    for (path, layer), result in zip(layers, results, strict=True):
        for own, weight in result.packed.items():
            linears[f"{path}.{own}"] = CalibratedLinear(
                weight.to(layer.get_parameter(f"{own}.weight").device),
                result.parameters.get(f"{own}.bias"),
                result.notes[own],
                result.errors[own],
            )
        for name, tensor in result.parameters.items():
            module, _, attribute = name.rpartition(".")
            if module not in result.packed:
                norms.setdefault(f"{path}.{module}", {})[attribute] = tensor
    return Calibrated(linears, norms)
