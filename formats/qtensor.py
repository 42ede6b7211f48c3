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
from lath.formats import values as value_tables
from lath.formats.codec import Codec

SCALE_DTYPES = {
    "fp16": torch.float16, "fp32": torch.float32, "int8": torch.uint8, "e8m0": torch.uint8,
    "e4m3": torch.uint8,
}  # fmt: skip
# What a second scale is stored in, where the first one has 8 bits and needs one.
OUTER_DTYPES = {"int8": torch.float16, "e4m3": torch.float32}
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
    for a float minimum, or None. Padded rows and columns hold code 0, scale 0, zero 0. outer: the
    scale of the scales, fp16 `[N16]` below "int8", fp32 `[1]` below "e4m3", else None. table: fp32
    `[levels]`, ascending, of learned values, else None.

    Treated as immutable: `to` and `dequantize` make new tensors, nothing writes into these.
    """

    def __init__(
        self,
        codec: Codec,
        shape: tuple[int, int],
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        outer: Tensor | None = None,
        table: Tensor | None = None,
    ) -> None:
        self.codec = codec
        self.shape = (int(shape[0]), int(shape[1]))
        self.codes = codes
        self.scales = scales
        self.zeros = zeros
        self.outer = outer
        self.table = table
        _check_tensors(self)

    @staticmethod
    def empty(codec: Codec, shape: tuple[int, int], device: torch.device | str = "meta") -> QTensor:
        """A QTensor with unset contents, by default on the meta device (no memory)."""
        layout = _layout(codec, shape)
        tensors = {
            name: None if dtype is None else torch.empty(size, dtype=dtype, device=device)
            for name, (size, dtype) in layout.items()
        }
        return QTensor(codec, shape, **tensors)  # type: ignore[arg-type]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        named = {name: getattr(self, name) for name in _TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def planes(self) -> list[Tensor]:
        """int32 views `[N16/16, K/block, 16, 4w]`, the lowest bits of the code first."""
        return packing.split_planes(self.codes, self.codec, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes kept: codes, scales, zeros, outer scales, table and all padding. Repacked views are
        not counted here."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

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
        codes = self.unpack_codes()

        def expand(side: Tensor) -> Tensor:
            per_row = side[:, :rows].float().T
            return per_row.repeat_interleave(group, dim=1)[:, :columns]

        scales = expand(self.effective_scales())
        if self.codec.is_table:
            return (self.entries()[codes.long()] * scales).to(dtype)
        numbers = codes.float()
        if self.zeros is None:
            return ((numbers - self.codec.zero_code) * scales).to(dtype)
        if self.codec.zero == "integer":
            return ((numbers - expand(self.zeros)) * scales).to(dtype)
        return (numbers * scales + expand(self.zeros)).to(dtype)

    def effective_scales(self) -> Tensor:
        """fp32 [G, N16]: what codes are multiplied by, one product of both scales."""
        kind, stored = self.codec.scale_dtype, self.scales
        if kind == "e8m0":
            return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - 127)
        if kind == "e4m3":
            assert self.outer is not None
            return stored.view(torch.float8_e4m3fn).float() * self.outer
        if kind == "int8":
            assert self.outer is not None
            return stored.float() * self.outer.float()
        return stored.float()

    def entries(self) -> Tensor:
        """fp32 [levels]: the table of a codec that has one."""
        if self.table is not None:
            return self.table
        entries = value_tables.table(self.codec.values)
        return torch.tensor(entries, dtype=torch.float32, device=self.device)

    def to(self, device: torch.device | str) -> QTensor:
        """The same weight on another device; itself if it is there already."""
        target = torch.device(device)
        if target == self.device:
            return self
        moved = {name: tensor.to(target) for name, tensor in self.tensors.items()}
        return QTensor(self.codec, self.shape, **moved)

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

    @staticmethod
    def from_state_dict(state: dict[str, Tensor]) -> QTensor:
        """Rebuild a QTensor; ValueError if a tensor is missing, of a wrong shape or corrupted."""
        missing = {"codes", "scales", "meta"} - state.keys()
        unknown = state.keys() - {*_TENSORS, "meta"}
        if missing or unknown:
            raise ValueError(
                "state_dict of a QTensor must hold 'codes', 'scales', 'meta' and optionally "
                f"'zeros', 'outer', 'table'; missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        fields = _read_metadata(state["meta"])
        codec = Codec.parse(fields["codec"])
        shape = (fields["shape"][0], fields["shape"][1])
        own = {name: state[name] for name in _TENSORS if name in state}
        loaded = QTensor(codec, shape, **own)
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
) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype of each tensor; dtype None of those that the codec has not."""
    rows, columns = shape
    count = packing.code_bytes(codec, shape) // 4
    padded = packing.round_up(rows, packing.PANEL)
    side = (codec.num_groups(columns), padded)
    zero_dtype = {
        "none": None,
        "integer": torch.uint8,
        "float": SCALE_DTYPES[codec.scale_dtype],
    }[codec.zero]
    outer = {"int8": (padded,), "e4m3": (1,)}.get(codec.scale_dtype, ())
    return {
        "codes": ((count,), torch.int32),
        "scales": (side, SCALE_DTYPES[codec.scale_dtype]),
        "zeros": (side, zero_dtype),
        "outer": (outer, OUTER_DTYPES.get(codec.scale_dtype)),
        "table": ((codec.levels,), torch.float32 if codec.values == "learned" else None),
    }


_TENSORS = ("codes", "scales", "zeros", "outer", "table")


def _check_tensors(weight: QTensor) -> None:
    """Shapes, dtypes and devices, as the codec demands them."""
    if weight.shape[0] < 0 or weight.shape[1] < 0:
        raise ValueError(f"shape must be (N, K) with N, K >= 0, got {weight.shape}")
    for name, (shape, dtype) in _layout(weight.codec, weight.shape).items():
        tensor: Tensor | None = getattr(weight, name)
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
    codec = weight.codec
    scales = weight.effective_scales()
    if not bool(torch.isfinite(scales).all()) or bool((scales < 0).any()):
        raise ValueError(f"scales of a {codec} must be finite and not negative")
    if codec.scale_dtype == "int8" and bool((weight.scales > codec.largest_inner_scale).any()):
        raise ValueError(
            f"scales of a {codec} must be {codec.largest_inner_scale} or less, so that scale * "
            f"code fits int8, got {int(weight.scales.max())}"
        )
    if weight.table is not None and not bool(torch.isfinite(weight.table).all()):
        raise ValueError(f"table of a {codec} must be finite")
    if codec.values == "ternary" and bool((weight.unpack_codes() > 2).any()):
        raise ValueError("codes of a ternary weight must be 0, 1 or 2")
    if codec.packing == "base3":
        again = packing.pack(weight.unpack_codes(), codec)
        if not torch.equal(again, weight.codes):
            raise ValueError(f"bytes of a {codec} must each be those of five codes, padding of 0")
    if weight.zeros is None:
        return
    if codec.zero == "float" and not bool(torch.isfinite(weight.zeros).all()):
        raise ValueError(f"zeros of a {codec} must be finite")
    if codec.zero == "integer" and bool((weight.zeros.int() >= codec.levels).any()):
        raise ValueError(f"zeros of a {codec} must be below {codec.levels}")


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
