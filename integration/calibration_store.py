"""A folder of calibrated layers: one safetensors file a layer, so that a run can be resumed.

Every file carries a key: a hash of what the run is (codec, quantiser, tokens, ...), of the layers
before and of its own unquantised weights. A folder of another run is refused, never mixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

SETTINGS = "settings.json"


def digest_of(tensors: Iterable[tuple[str, Tensor]], start: str = "") -> str:
    """SHA-256 over names, shapes, dtypes and bytes, after `start`."""
    import torch

    state = hashlib.sha256(start.encode())
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()


class CalibrationStore:
    """settings: what the run is; written to an empty folder, compared with one that is not.

    Raises ValueError naming the settings that differ, and OSError if the folder cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / SETTINGS
        wanted = json.loads(json.dumps(dict(settings)))
        if not path.exists():
            if any(folder.iterdir()):
                raise ValueError(
                    f"calibration folder {str(folder)!r} is not empty and holds no {SETTINGS}: "
                    "name a new folder"
                )
            _replace(path, json.dumps(wanted, indent=1).encode())
            return
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; delete the folder") from error
        differ = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        if differ:
            one = differ[0]
            raise ValueError(
                f"calibration folder {str(folder)!r} is of another run: {', '.join(differ)} differ "
                f"({one} there {found.get(one)!r}, here {wanted.get(one)!r}); name another folder"
            )

    def load(self, index: int, key: str) -> dict[str, Tensor] | None:
        """The tensors of a layer, or None if it was not saved; ValueError if its key differs."""
        from safetensors import SafetensorError, safe_open

        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                found = (file.metadata() or {}).get("key")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; delete it") from error
        if found != key:
            raise ValueError(
                f"{path} was made of other weights or after other layers (key {str(found)[:12]}…, "
                f"expected {key[:12]}…): name another folder"
            )
        return tensors

    def save(self, index: int, key: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        _replace(self._path(index), save(whole, metadata={"key": key}))

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index:04d}.safetensors"


def _replace(path: Path, data: bytes) -> None:
    """Write under another name, then rename: what is there is complete."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(path)
