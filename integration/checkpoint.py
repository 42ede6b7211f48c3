"""The tensors of a model folder, read one at a time: nothing of the files stays in memory.

A file is opened for each read and closed again: what safetensors maps of it counts as resident for
as long as any tensor of it is there.
"""

from __future__ import annotations

import json
from collections.abc import KeysView
from pathlib import Path
from typing import Any

from torch import Tensor

from lath.integration.store import ModelError

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The safetensors files of a folder: those that its index names, or all. ModelError where there
    are none or one cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, Path] = {}
        self._kinds: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in _files(folder):
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping, it has no other
                    piece = opened.get_slice(name)
                    self._places[name] = file
                    self._kinds[name] = (tuple(piece.get_shape()), str(piece.get_dtype()))

    @property
    def names(self) -> KeysView[str]:
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._kinds[name][0]

    def is_bytes(self, name: str) -> bool:
        """Whether a tensor is uint8."""
        return self._kinds[name][1] == "U8"

    def read(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        with _opened(self._places[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor.clone()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of a tensor, in memory of their own."""
        with _opened(self._places[name]) as opened:
            tensor: Tensor = opened.get_slice(name)[start:stop]
            return tensor.clone()


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"cannot read {index}: {error}") from error
        return [folder / name for name in sorted(named)]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no .safetensors file")
    return files


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
