"""QTensor: a packed weight. Portable: what it holds depends on the codec alone, not on a device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lath.formats import packing
from lath.formats.codec import Codec

SCALE_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_FORMAT_NAME = "lath.qtensor"
_FORMAT_VERSION = 1

View = TypeVar("View")

# Views by the tensor of codes and not by QTensor: the custom operator sees only tensors and must
# find what was already repacked. Each entry is (stamp of the tensors, views by name).
_views: MutableMapping[Tensor, tuple[tuple[int, ...], dict[str, Any]]] = WeakTensorKeyDictionary()


class QTensor:
    """A weight of logical shape `[N, K]`, stored as planes of codes, scales and zeros.

    codec: the `Codec`. shape: (N, K). codes: int32 1-D, the planes one after another
    (`lath.formats.packing`). scales: `[G, N16]` in the codec's scale dtype, G groups along K and
    N16 = N rounded up to 16. zeros: `[G, N16]`, uint8 for an integer zero point, the scale dtype
    for a float minimum, or None. Padded rows and columns hold code 0, scale 0, zero 0.

    Treated as immutable: `to` and `dequantize` make new tensors, nothing writes into these.
    """

    def __init__(
        self,
        codec: Codec,
        shape: tuple[int, int],
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
    ) -> None:
        self.codec = codec
        self.shape = (int(shape[0]), int(shape[1]))
        self.codes = codes
        self.scales = scales
        self.zeros = zeros
        _check_tensors(self)

    @staticmethod
    def empty(codec: Codec, shape: tuple[int, int], device: torch.device | str = "meta") -> QTensor:
        """A QTensor with unset contents, by default on the meta device (no memory)."""
        count, side, zero_dtype = _layout(codec, shape)
        zeros = None
        if zero_dtype is not None:
            zeros = torch.empty(side, dtype=zero_dtype, device=device)
        return QTensor(
            codec,
            shape,
            torch.empty(count, dtype=torch.int32, device=device),
            torch.empty(side, dtype=SCALE_DTYPES[codec.scale_dtype], device=device),
            zeros,
        )

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def planes(self) -> list[Tensor]:
        """int32 views `[N16/16, ceil(K/128), 16, 4w]`, the lowest bits of the code first."""
        return packing.split_planes(self.codes, self.codec, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes kept: codes, scales, zeros and all padding. Repacked views are not counted here."""
        tensors = [t for t in (self.codes, self.scales, self.zeros) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def bits_per_weight(self) -> float:
        """`nbytes` in bits over the N*K logical weights; 0 for an empty weight."""
        weights = self.shape[0] * self.shape[1]
        return 8 * self.nbytes / weights if weights else 0.0

    def unpack_codes(self) -> Tensor:
        """uint8 codes [N, K] without padding."""
        return packing.unpack(self.codes, self.codec, self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes stand for: fp32 inside, rounded once to dtype."""
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch dtype, got {dtype}")
        rows, columns = self.shape
        group = self.codec.group_size(columns)
        codes = self.unpack_codes().float()

        def expand(side: Tensor) -> Tensor:
            per_row = side[:, :rows].float().T
            return per_row.repeat_interleave(group, dim=1)[:, :columns]

        scales = expand(self.scales)
        if self.zeros is None:
            return ((codes - self.codec.zero_code) * scales).to(dtype)
        if self.codec.zero == "integer":
            return ((codes - expand(self.zeros)) * scales).to(dtype)
        return (codes * scales + expand(self.zeros)).to(dtype)

    def to(self, device: torch.device | str) -> QTensor:
        """The same weight on another device; itself if it is there already."""
        target = torch.device(device)
        if target == self.device:
            return self
        zeros = None if self.zeros is None else self.zeros.to(target)
        codes, scales = self.codes.to(target), self.scales.to(target)
        return QTensor(self.codec, self.shape, codes, scales, zeros)

    def view(self, key: str, build: Callable[[], View]) -> View:
        """A backend's repacked form: built on first use, kept as long as `codes`, never saved.

        It is built anew after a tensor of this weight was changed in place (a state dict loaded
        into it). The view must not refer to this QTensor or its codes, or neither would be freed.
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
        for tensor in (self.codes, self.scales, self.zeros):
            if tensor is not None:
                version = 0 if tensor.is_inference() else tensor._version
                stamp += [tensor.data_ptr(), version]
        return tuple(stamp)

    def digest(self) -> str:
        """SHA-256 over the codec, the shape and every stored byte."""
        state = hashlib.sha256(f"{self.codec} {self.shape[0]} {self.shape[1]}".encode())
        for tensor in (self.codes, self.scales, self.zeros):
            if tensor is not None:
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
        state = {"codes": self.codes, "scales": self.scales, "meta": self.metadata()}
        return state if self.zeros is None else {**state, "zeros": self.zeros}

    @staticmethod
    def from_state_dict(state: dict[str, Tensor]) -> QTensor:
        """Rebuild a QTensor; ValueError if a tensor is missing, of a wrong shape or corrupted."""
        missing = {"codes", "scales", "meta"} - state.keys()
        unknown = state.keys() - {"codes", "scales", "zeros", "meta"}
        if missing or unknown:
            raise ValueError(
                "state_dict of a QTensor must hold 'codes', 'scales', 'meta' and optionally "
                f"'zeros'; missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        fields = _read_metadata(state["meta"])
        codec = Codec.parse(fields["codec"])
        shape = (fields["shape"][0], fields["shape"][1])
        loaded = QTensor(codec, shape, state["codes"], state["scales"], state.get("zeros"))
        _check_values(loaded)
        if loaded.digest() != fields["digest"]:
            raise ValueError(
                f"QTensor {codec} {shape} is corrupted: digest {loaded.digest()[:12]}… does not "
                f"match the saved {str(fields['digest'])[:12]}…"
            )
        return loaded

    def __repr__(self) -> str:
        rows, columns = self.shape
        return (
            f"QTensor({str(self.codec)!r}, [{rows}, {columns}], "
            f"{self.bits_per_weight:.2f} bits per weight, device={str(self.device)!r})"
        )


def _layout(
    codec: Codec, shape: tuple[int, int]
) -> tuple[int, tuple[int, int], torch.dtype | None]:
    """Words of codes, shape [G, N16] of scales and zeros, and the dtype of zeros if there are."""
    rows, columns = shape
    count = sum(a * b * c * d for a, b, c, d in packing.plane_shapes(codec, shape))
    side = (codec.num_groups(columns), packing.round_up(rows, packing.PANEL))
    zero_dtype = {
        "none": None,
        "integer": torch.uint8,
        "float": SCALE_DTYPES[codec.scale_dtype],
    }[codec.zero]
    return count, side, zero_dtype


def _check_tensors(weight: QTensor) -> None:
    """Shapes, dtypes and devices, as the codec demands them."""
    if weight.shape[0] < 0 or weight.shape[1] < 0:
        raise ValueError(f"shape must be (N, K) with N, K >= 0, got {weight.shape}")
    count, side, zero_dtype = _layout(weight.codec, weight.shape)
    expected: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype | None]] = [
        ("codes", weight.codes, (count,), torch.int32),
        ("scales", weight.scales, side, SCALE_DTYPES[weight.codec.scale_dtype]),
        ("zeros", weight.zeros, side, zero_dtype),
    ]
    for name, tensor, shape, dtype in expected:
        if (tensor is None) != (dtype is None):
            have, want = ("absent", "present") if tensor is None else ("present", "absent")
            raise ValueError(f"{name} of a {weight.codec} must be {want}, it is {have}")
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} of a {weight.codec} {weight.shape} must be {dtype} {list(shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.device != weight.codes.device:
            raise ValueError(f"{name} is on {tensor.device}, codes are on {weight.codes.device}")


def _check_values(weight: QTensor) -> None:
    """Values that no quantiser writes: a scale that is negative or not finite, a zero off range."""
    if not bool(torch.isfinite(weight.scales).all()) or bool((weight.scales < 0).any()):
        raise ValueError(f"scales of a {weight.codec} must be finite and not negative")
    if weight.zeros is None:
        return
    if weight.codec.zero == "float" and not bool(torch.isfinite(weight.zeros).all()):
        raise ValueError(f"zeros of a {weight.codec} must be finite")
    if weight.codec.zero == "integer" and bool((weight.zeros.int() >= weight.codec.levels).any()):
        raise ValueError(f"zeros of a {weight.codec} must be below {weight.codec.levels}")


def _read_metadata(meta: Tensor) -> dict[str, Any]:
    try:
        fields = json.loads(bytes(meta.detach().cpu().to(torch.uint8).tolist()))
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
