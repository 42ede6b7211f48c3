"""The common part of all packed weights: tensors by name, bytes, views, digests, saving.

A kind of packed weight is a class below `PackedWeight` with a codec of its own kind. What it holds
depends on the codec and the numbers alone, never on a device, a tile or a core count.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import Self

_FORMAT_NAME = "lath.qtensor"
_FORMAT_VERSION = 1

View = TypeVar("View")

# Views by the tensor of codes and not by weight: the custom operator sees only tensors and must
# find what was already repacked. Each entry is (stamp of the tensors, views by name).
_views: MutableMapping[Tensor, tuple[tuple[int, ...], dict[str, Any]]] = WeakTensorKeyDictionary()


class WeightCodec(Protocol):
    """What every codec of weights has: a text form that parses back to it, and `group`."""

    @property
    def group(self) -> int | None:
        """Columns that share a scale, which rounded activations do best to share too; None: all."""

    def __str__(self) -> str: ...


class PackedWeight(abc.ABC):
    """A weight of logical shape `[N, K]` in some codec.

    Treated as immutable: `to` and `dequantize` make new tensors, nothing writes into these. A kind
    says which tensors it holds (`tensor_names`, "codes" first, and attributes of those names, which
    it takes by name), how it is decoded, and what is wrong with tensors that no quantiser writes.
    """

    codec: Any
    shape: tuple[int, int]
    codes: Tensor

    @staticmethod
    @abc.abstractmethod
    def parse_codec(text: str) -> Any:
        """The codec of a text form; ValueError if it is none of this kind."""

    @staticmethod
    @abc.abstractmethod
    def tensor_names(codec: Any) -> tuple[str, ...]:
        """The tensors of a weight in `codec`, in a fixed order, "codes" first."""

    @classmethod
    @abc.abstractmethod
    def empty(cls, codec: Any, shape: tuple[int, int], device: torch.device | str = "meta") -> Self:
        """A weight with unset contents, by default on the meta device (no memory). Where sizes
        depend on the numbers, as many as `lath.quantize` would expect."""

    @classmethod
    def from_tensors(
        cls, codec: Any, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> Self:
        """The weight of tensors by name; ValueError if one is missing, too many or of a wrong shape
        or dtype."""
        check_names(cls, codec, tensors)
        build: Callable[..., Self] = cls  # a kind takes its tensors by their names
        return build(codec, shape, **tensors)

    @abc.abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that is stored: fp32 inside, rounded once to dtype."""

    @abc.abstractmethod
    def check_values(self) -> None:
        """ValueError for contents that no quantiser writes."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in the order of `tensor_names`."""
        return {name: getattr(self, name) for name in self.tensor_names(self.codec)}

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes kept: all tensors and all padding. Repacked views are not counted here."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """`nbytes` in bits over the N*K logical weights; 0 for an empty weight."""
        weights = self.shape[0] * self.shape[1]
        return 8 * self.nbytes / weights if weights else 0.0

    def to(self, device: torch.device | str) -> Self:
        """The same weight on another device; itself if it is there already."""
        target = torch.device(device)
        if target == self.device:
            return self
        moved = {name: tensor.to(target) for name, tensor in self.tensors.items()}
        return self.from_tensors(self.codec, self.shape, moved)

    def view(self, key: str, build: Callable[[], View]) -> View:
        """A backend's repacked form: built on first use, kept as long as `codes`, never saved.

        It is built anew after a tensor of this weight was changed in place (a state dict loaded
        into it). The view must not refer to this weight or its codes, or neither would be freed.
        """
        stamp = self._stamp()
        kept = _views.get(self.codes)
        if kept is None or kept[0] != stamp:
            kept = (stamp, {})
            _views[self.codes] = kept
        if key not in kept[1]:
            kept[1][key] = build()
        return kept[1][key]  # type: ignore[no-any-return]

    @property
    def view_nbytes(self) -> int:
        """Bytes of the repacked views made so far: what they add to `nbytes` in memory."""
        kept = _views.get(self.codes)
        return 0 if kept is None else sum(getattr(v, "nbytes", 0) for v in kept[1].values())

    def _stamp(self) -> tuple[int, ...]:
        """Changes when a tensor is replaced or written to; inference tensors cannot tell."""
        stamp: list[int] = []
        for tensor in self.tensors.values():
            version = 0 if tensor.is_inference() else tensor._version
            stamp += [tensor.data_ptr(), version]
        return tuple(stamp)

    def digest(self) -> str:
        """SHA-256 over the codec, the shape and every stored byte."""
        state = hashlib.sha256(f"{self.codec} {self.shape[0]} {self.shape[1]}".encode())
        for tensor in self.tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            state.update(flat.view(torch.uint8).numpy().tobytes())
        return state.hexdigest()

    def metadata(self) -> Tensor:
        """uint8 1-D: JSON with codec, shape and digest, to be saved beside the tensors."""
        fields = {
            "format": _FORMAT_NAME,
            "version": _FORMAT_VERSION,
            "codec": str(self.codec),
            "shape": list(self.shape),
            "digest": self.digest(),
        }
        return torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8).clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that safetensors or torch.save can store; `from_state_dict` is the inverse."""
        return {**self.tensors, "meta": self.metadata()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """Rebuild a weight; ValueError if a tensor is missing, of a wrong shape or corrupted."""
        fields = read_metadata(state)
        shape = (fields["shape"][0], fields["shape"][1])
        own = {name: tensor for name, tensor in state.items() if name != "meta"}
        loaded = cls.from_tensors(cls.parse_codec(fields["codec"]), shape, own)
        loaded.check_values()
        if loaded.digest() != fields["digest"]:
            raise ValueError(
                f"{cls.__name__} {loaded.codec} {shape} is corrupted: digest "
                f"{loaded.digest()[:12]}… does not match the saved {str(fields['digest'])[:12]}…"
            )
        return loaded

    def __repr__(self) -> str:
        rows, columns = self.shape
        return (
            f"{type(self).__name__}({str(self.codec)!r}, [{rows}, {columns}], "
            f"{self.bits_per_weight:.2f} bits per weight, device={str(self.device)!r})"
        )


def check_names(cls: type[PackedWeight], codec: Any, tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless the tensors are those of a weight in `codec`."""
    names = cls.tensor_names(codec)
    missing, unknown = set(names) - tensors.keys(), tensors.keys() - set(names)
    if missing or unknown:
        raise ValueError(
            f"tensors of a {codec} must be {list(names)}; missing {sorted(missing)}, "
            f"unknown {sorted(unknown)}"
        )


def check_layout(
    weight: PackedWeight, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """ValueError unless every tensor has its shape and dtype, and the device of the codes."""
    if weight.shape[0] < 0 or weight.shape[1] < 0:
        raise ValueError(f"shape must be (N, K) with N, K >= 0, got {weight.shape}")
    for name, (shape, dtype) in layout.items():
        tensor: Tensor = getattr(weight, name)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} of a {weight.codec} {weight.shape} must be {dtype} {list(shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} of a {weight.codec} must be contiguous, it has strides {tensor.stride()}"
            )
        if tensor.device != weight.codes.device:
            raise ValueError(f"{name} is on {tensor.device}, codes are on {weight.codes.device}")


def read_metadata(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `metadata` wrote: codec (text), shape, digest; ValueError if it is something else."""
    if "meta" not in state:
        raise ValueError(f"state_dict of a packed weight must hold 'meta', got {sorted(state)}")
    try:
        fields = json.loads(bytes(state["meta"].detach().cpu().to(torch.uint8).tolist()))
        known = fields["format"] == _FORMAT_NAME and fields["version"] == _FORMAT_VERSION
        well_formed = (
            isinstance(fields["codec"], str)
            and len(fields["shape"]) == 2
            and all(type(n) is int for n in fields["shape"])
            and isinstance(fields["digest"], str)
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"meta is not the metadata of a QTensor: {error}") from error
    if not known:
        raise ValueError(
            f"meta must say format {_FORMAT_NAME!r} version {_FORMAT_VERSION}, "
            f"got {fields['format']!r} version {fields['version']!r}"
        )
    if not well_formed:
        raise ValueError(f"meta has malformed fields: {fields}")
    return dict(fields)
