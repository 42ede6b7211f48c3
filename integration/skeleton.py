"""A Hugging Face model without its weights, into which they are put one after another.

The memory of a weight that is replaced by a packed one is never touched, so it is never really
taken: at no time is more than a piece of one dense weight resident, beside those that stay dense.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, KeysView, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.packed_weight import PackedWeight, WeightCodec
from lath.formats.packing import PANEL, round_up
from lath.formats.qtensor import QTensor
from lath.formats.shard import put_rows
from lath.integration.linear import PackedLinear
from lath.integration.store import ModelError
from lath.integration.tying import untie
from lath.verbs.quantize import quantize

# Weights of a dense tensor that are read at once; rounding them takes some 40 bytes each.
_CHUNK_WEIGHTS = 1 << 19


class Tensors(Protocol):
    """Where weights come from, by their Hugging Face names: `Checkpoint`, `GgufCheckpoint`.
    folder: where a generation_config.json may lie."""

    @property
    def folder(self) -> Path | None: ...
    @property
    def names(self) -> KeysView[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> Tensor: ...
    def rows(self, name: str, start: int, stop: int) -> Tensor: ...


class Skeleton:
    """model: the causal language model of a config, in evaluation mode once it is filled."""

    def __init__(self, config: Any, checkpoint: Tensors, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.initialization import no_init_weights

        self.checkpoint, self.dtype = checkpoint, dtype
        with no_init_weights():
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        folder = checkpoint.folder
        if folder is not None and (folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(
                folder, local_files_only=True
            )
        self._tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    def key_of(self, name: str) -> str:
        """Where the checkpoint has a parameter: under its own name, or that of what it is tied to;
        ModelError if it has neither."""
        for key in (name, self._tied.get(name, name)):
            if key in self.checkpoint.names:
                return key
        raise ModelError(
            f"checkpoint does not fit {type(self.model).__name__}: missing {[name]}, unexpected []"
        )

    def check(self, packed: Collection[str] = ()) -> None:
        """ModelError unless the checkpoint has all that the model needs and nothing more.

        packed: linear layers that are packed there; whoever reads them knows their tensors.
        """
        own = {name for name, _ in self._tensors()}
        found = set(self.checkpoint.names)
        missing = sorted(
            name for name in own - {f"{layer}.weight" for layer in packed}
            if name not in found and self._tied.get(name, name) not in found
        )  # fmt: skip
        unexpected = sorted(
            name for name in found - own
            if name.rpartition(".")[0] not in packed and not self._is_ignored(name)
        )  # fmt: skip
        if missing or unexpected:
            raise ModelError(
                f"checkpoint does not fit {type(self.model).__name__}: missing {missing}, "
                f"unexpected {unexpected}"
            )

    def _is_ignored(self, name: str) -> bool:
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in patterns)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters(remove_duplicate=False)
        for path, module in self.model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield f"{path}.{name}" if path else name, buffer

    def quantized(self, name: str, codec: WeightCodec, search: bool) -> PackedWeight:
        """The weight of a linear layer, packed."""
        key = self.key_of(f"{name}.weight")
        rows, columns = self.checkpoint.shape(key)
        with named(name):
            if not (isinstance(codec, Codec) and codec.rows_are_independent):
                return quantize(self.checkpoint.read(key), codec, search=search)
            weight = QTensor.empty(codec, (rows, columns), "cpu")
            for start, stop in _pieces(rows, columns):
                part = quantize(self.checkpoint.rows(key, start, stop), codec, search=search)
                assert isinstance(part, QTensor)
                put_rows(weight, part, start)
            return weight

    def put(
        self,
        names: Sequence[str],
        weight: PackedWeight,
        *,
        activations: str | ActivationFormat,
        backend: str,
        keep_codes: bool,
    ) -> None:
        """A packed weight into the places of a linear layer, and its bias."""
        name = names[0]
        module: nn.Linear = self.model.get_submodule(name)
        if tuple(weight.shape) != (module.out_features, module.in_features):
            raise ModelError(
                f"{name}: the weight is {[*weight.shape]}, "
                f"{type(self.model).__name__} has [{module.out_features}, {module.in_features}]"
            )
        bias = None
        if module.bias is not None:
            bias = self.checkpoint.read(self.key_of(f"{name}.bias")).to(self.dtype)
        made = PackedLinear.from_qtensor(
            weight, bias, activations=activations, backend=backend, dtype=self.dtype
        )
        if not keep_codes:
            made.compact()
        if f"{name}.weight" in self._tied:
            untie(self.model, [module])
        for place in names:
            self.model.set_submodule(place, made)

    def fill(self) -> Any:
        """All that is still dense, from the checkpoint; returns the model."""
        inside = {n for n, m in self.model.named_modules() if isinstance(m, PackedLinear)}
        done: set[int] = set()
        for name, tensor in self._tensors():
            if name.rpartition(".")[0] in inside or id(tensor) in done:
                continue
            done.add(id(tensor))
            self._copy(self.key_of(name), tensor.detach())
        tie = getattr(self.model, "tie_weights", None)
        if callable(tie):
            tie()
        return self.model.eval()

    def _copy(self, key: str, target: Tensor) -> None:
        shape = self.checkpoint.shape(key)
        if shape != tuple(target.shape):
            raise ModelError(
                f"{key} of the checkpoint is {[*shape]}, the model has {[*target.shape]}"
            )
        if target.dim() < 2:
            target.copy_(self.checkpoint.read(key))
            return
        for start, stop in _pieces(shape[0], target[0].numel()):
            target[start:stop].copy_(self.checkpoint.rows(key, start, stop))


def _pieces(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Runs of whole panels of rows."""
    step = round_up(max(1, _CHUNK_WEIGHTS // max(columns, 1)), PANEL)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Errors of a layer say which one it was."""
    try:
        yield
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error
