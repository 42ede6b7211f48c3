"""`lath.load`: a model packed while it is read, layer by layer.

`lath.patch` packs a model that is in memory and can undo it. This never has the dense model: each
weight is read in pieces, rounded and packed, and what stays is the packed model and what of it is
not packed (the embedding, the norms).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.families import load_weight, weight_codec
from lath.formats.memory import give_back
from lath.formats.packed_weight import PackedWeight, WeightCodec
from lath.integration.bitnet import bitnet_layers, is_bitnet, quantization_of
from lath.integration.checkpoint import Checkpoint
from lath.integration.find import check_selection, find_linears, output_layer
from lath.integration.gguf_llama import GgufCheckpoint
from lath.integration.linear import META, tensor_of
from lath.integration.models import parse_dtype
from lath.integration.patch_rows import auto_activations
from lath.integration.progress import progress_bar
from lath.integration.skeleton import Skeleton, named
from lath.integration.store import ModelError
from lath.verbs.backends import BACKENDS, resolve_backend
from lath.verbs.checks import check_flag

DEFAULT_WEIGHTS, DEFAULT_TERNARY, DEFAULT_HEAD = "int4-g64", "ternary-s32", "int8-g64"


@dataclass(frozen=True)
class _Layer:
    """What is to become of a linear layer. names: its paths. make: reads its packed weight.
    activations: None: as they were asked for."""

    names: tuple[str, ...]
    make: Callable[[], PackedWeight]
    activations: ActivationFormat | None
    is_output: bool = False


def load(
    path: str | Path,
    weights: str | WeightCodec | None = None,
    *,
    head: str | WeightCodec | None = DEFAULT_HEAD,
    skip: Sequence[str] = (),
    activations: str | ActivationFormat = "auto",
    backend: str = "auto",
    dtype: str | torch.dtype | None = "auto",
    search: bool = False,
    keep_codes: bool = False,
    progress: bool | None = None,
) -> Any:
    """A causal language model with its linear layers packed, on the CPU.

    path: of a Hugging Face folder, config.json and safetensors: dense ones; BitNet's, whose layers
    stay ternary; or what `save_pretrained` wrote of a packed model, whose layers stay as they were
    saved; or of a GGUF file of the architecture "llama" in F32, F16, Q4_0, Q4_1 and Q8_0
    ("int4-g32-fzero" holds Q4_1 exactly). weights: the
    codec of dense layers, "int4-g64" if None; of a BitNet folder the ternary codec of those that it
    packs, "ternary-s32" if None, and the others stay dense. head: the codec of the output layer,
    which is untied from the embedding then; None leaves it dense. skip: patterns of layers to leave
    dense. activations, backend, search: as for `lath.patch`; BitNet's are int8 per token. dtype: of
    what stays dense, "auto": the checkpoint's, fp32 for GGUF. keep_codes: keep packed codes beside
    the view that the compiled CPU kernels multiply by, which is as large; without them saving and
    moving make them anew (`PackedLinear.compact`). progress: show a bar; None shows it on a
    terminal.

    Memory at any time: what is packed by then, and some tens of MB (one dense weight and its
    rounding where a codec has one scale or table for all of it, or books). Attention, cache and
    decoding are left to `lath.patch(model, None, attention=…, kv=…)`. Codes are chosen by rounding
    to nearest; quantisers that calibrate need the dense model, and so `lath.patch`.

    ModelError for a file or folder that is damaged or does not fit its config; models whose weights
    transformers rearranges as it loads them (mixtures of experts) do not fit.
    """
    check_flag("search", search)
    check_flag("keep_codes", keep_codes)
    resolve_backend(_known(backend), torch.device("cpu"))
    chosen = None if activations == "auto" else activation_format(activations)
    config, checkpoint = _opened(Path(path).expanduser())
    ternary = quantization_of(config) if is_bitnet(config) else None
    if ternary is not None:
        del config.quantization_config
    wanted = parse_dtype(dtype) or getattr(config, "dtype", None) or torch.float32
    skeleton = Skeleton(config, checkpoint, wanted)
    layers = _layers(skeleton, ternary, weights, head, skip, search)
    with progress_bar("packing", len(layers), progress) as advance:
        # The output layer, the largest, first: while it is packed it is in memory twice.
        for layer in sorted(layers, key=lambda layer: not layer.is_output):
            weight = layer.make()
            own = layer.activations or chosen or auto_activations(weight.codec, backend != "triton")
            skeleton.put(
                layer.names, weight, activations=own, backend=backend, keep_codes=keep_codes
            )
            del weight
            give_back()
            advance(1)
    model = skeleton.fill()
    give_back()
    return model


def _opened(path: Path) -> tuple[Any, Checkpoint | GgufCheckpoint]:
    """The config and the tensors of a folder or a GGUF file."""
    from transformers import AutoConfig

    if path.is_file():
        file = GgufCheckpoint(path)
        return file.config, file
    if not (path / "config.json").is_file():
        raise ModelError(
            f"path must be a Hugging Face folder or a GGUF file; {path} has no config.json"
        )
    return AutoConfig.from_pretrained(path, local_files_only=True), Checkpoint(path)


def _layers(
    skeleton: Skeleton,
    ternary: dict[str, Any] | None,
    weights: str | WeightCodec | None,
    head: str | WeightCodec | None,
    skip: Sequence[str],
    search: bool,
) -> list[_Layer]:
    """Every layer that is to be packed; ModelError where the checkpoint does not fit the model.

    ternary: the `quantization_config` of a BitNet checkpoint.
    """
    model, known = skeleton.model, {}
    if ternary is not None:
        trits = weight_codec(DEFAULT_TERNARY if weights is None else weights)
        known = bitnet_layers(skeleton, ternary, trits)
    body = None if known else weight_codec(DEFAULT_WEIGHTS if weights is None else weights)
    codecs = {False: body, True: None if head is None else weight_codec(head)}
    layers = [_Layer((name,), make, ActivationFormat("int8")) for name, make in known.items()]
    packed = set(known)
    for one in find_linears(model, check_selection(model, skip, None)):
        is_output = one.module is output_layer(model)
        codec, names = codecs[is_output], (one.name, *one.also_named)
        if one.name in known:
            continue
        if f"{one.name}.{META}" in skeleton.checkpoint.names:
            packed.add(one.name)
            make = functools.partial(_saved, skeleton, one.name)
        elif codec is None or one.reason:
            continue
        else:
            make = functools.partial(skeleton.quantized, one.name, codec, search)
        layers.append(_Layer(names, make, None, is_output))
    skeleton.check(packed)
    return layers


def _known(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    return backend


def _saved(skeleton: Skeleton, name: str) -> PackedWeight:
    """A layer that was packed when it was saved."""
    prefix, checkpoint = f"{name}.", skeleton.checkpoint
    own = {
        tensor_of(key.removeprefix(prefix)): checkpoint.read(key)
        for key in checkpoint.names
        if key.startswith(prefix) and key != f"{prefix}bias"
    }
    with named(name):
        return load_weight(own)
