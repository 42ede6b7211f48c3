"""PatchReport: what was replaced, what was not and why, bytes before and after, and undoing it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from lath.integration.linear import PackedLinear

if TYPE_CHECKING:
    from lath.integration.cache import LathCache
    from lath.integration.misses import MissReport
    from lath.integration.patch_attention import AttentionPatch
    from lath.integration.patch_decode import DecodePatch, DecodeReport

Action = Literal["replaced", "kept", "already packed"]


@dataclass(frozen=True)
class PatchRow:
    """One linear layer of the model.

    name: its path in the model; also_named: further paths of the same module object. shape: (N, K).
    reason: why it was kept, "" otherwise. codec, activations, backend: of a packed layer. error:
    ||W - packed W|| / ||W|| in the Frobenius norm; None if nothing was measured. bytes_before and
    bytes_after: weight and bias. quantizer: how its codes were chosen.
    """

    name: str
    shape: tuple[int, int]
    action: Action
    reason: str = ""
    codec: str = ""
    activations: str = ""
    backend: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    error: float | None = None
    also_named: tuple[str, ...] = ()
    quantizer: str = ""

    @property
    def pattern(self) -> str:
        """The name with its numbers replaced by stars: rows that belong together share it."""
        return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", self.name)


@dataclass(frozen=True)
class AttentionRow:
    """What became of the model's attention or of its cache.

    name: "attention" or "cache". action: "replaced", "would replace" or "already patched". before,
    after: the attention implementation or cache class, and the format that takes its place.
    bytes_per_token_before, _after: of the cache, all layers, one token of one sequence in a full
    page; 0 for the attention.
    """

    name: str
    action: str
    before: str
    after: str
    bytes_per_token_before: float = 0.0
    bytes_per_token_after: float = 0.0


@dataclass(frozen=True)
class SelectionRow:
    """Which part of the cache a step of decoding reads.

    action: as in AttentionRow. what: the selection with all that is special to it; selector,
    budget, repair: its parts. layers: how many hold pages; dense: those of them that read
    everything, and why. context: the model's longest; bytes_before, bytes_after: what one step of
    one sequence of that length moves for the layers without a window, reading everything and
    selecting (scores, the longest lists, repair); 0 and None where they are not known beforehand.
    """

    action: str
    what: str
    selector: str
    budget: str
    repair: bool | str
    layers: int
    dense: dict[int, str]
    context: int = 0
    bytes_before: int = 0
    bytes_after: int | None = None


@dataclass(frozen=True)
class Place:
    """One place of the model, and the two modules that can stand in it: a linear layer and its
    packed form, or a norm and its scaled copy."""

    parent: nn.Module
    attribute: str
    name: str
    original: nn.Module
    packed: nn.Module

    def follow(self, module: nn.Module, other: nn.Module) -> nn.Module:
        """`module` on the device of `other`, with its dtype and mode, about to take its place."""
        want, have = _whereabouts(other), _whereabouts(module)
        if have != want:
            module.to(device=want[0], dtype=want[1])
        return module.train(other.training)


@dataclass
class PatchReport:
    """The result of `lath.patch`; printing it shows the table.

    rows: every linear layer of the model. attention: what became of attention and cache, empty if
    the patch left both alone; selection: what of the cache is read, None for all. bytes_before,
    bytes_after: all parameters and buffers of the model, those with several names counted once.
    dry_run: nothing was changed.

    `undo()` puts the original module objects back, `redo()` the packed ones; both may be called
    again and do nothing the second time. As a context manager it undoes itself at the end, after an
    exception too.
    """

    rows: list[PatchRow]
    bytes_before: int
    bytes_after: int
    weights: str
    activations: str
    backend: str
    dry_run: bool = False
    attention: list[AttentionRow] = field(default_factory=list)
    selection: SelectionRow | None = None
    _attention: AttentionPatch | None = field(default=None, repr=False)
    _decode: DecodePatch | None = field(default=None, repr=False)
    _places: list[Place] = field(default_factory=list, repr=False)
    # Strikes the places from the records of tied weights and returns what restores them.
    _untie: Callable[[], Callable[[], None]] | None = field(default=None, repr=False)
    _tie: Callable[[], None] | None = field(default=None, repr=False)
    _active: bool = False

    @property
    def replaced(self) -> list[PatchRow]:
        return [row for row in self.rows if row.action == "replaced"]

    @property
    def kept(self) -> list[PatchRow]:
        return [row for row in self.rows if row.action == "kept"]

    @property
    def view_bytes(self) -> int:
        """Bytes of repacked views made so far, in memory beside `bytes_after`."""
        modules = {id(place.packed): place.packed for place in self._places}
        packed = [module for module in modules.values() if isinstance(module, PackedLinear)]
        return sum(module.qtensor.view_nbytes for module in packed)

    @property
    def active(self) -> bool:
        """Whether the packed modules, the attention and the cache are in the model."""
        return self._active

    @property
    def mean_error(self) -> float | None:
        """Mean of the replaced rows' relative errors."""
        errors = [row.error for row in self.replaced if row.error is not None]
        return sum(errors) / len(errors) if errors else None

    @property
    def misses(self) -> MissReport | None:
        """What the selection has missed so far; None without audit."""
        audit = None if self._attention is None else self._attention.options.audit
        return None if audit is None else audit.report

    @property
    def decode(self) -> DecodeReport | None:
        """How tokens are decoded, and were so far; None where nothing was to be fused."""
        return None if self._decode is None else self._decode.report

    @property
    def new_cache(self) -> Callable[[], LathCache] | None:
        """Makes an empty cache as `generate` does under this patch; None without kv."""
        attention = self._attention
        if attention is None or attention.options.kv is None:
            return None
        return lambda: attention.options.new_cache(attention.model.config)

    def redo(self) -> None:
        """Put the packed modules in again, on the device of the originals and with their dtype."""
        if self._active or not (self._places or self._attention):
            return
        self._check_occupants([place.original for place in self._places])
        if self._attention is not None:
            self._attention.check_apply()
        self._tie = self._untie() if self._untie else None
        for place in self._places:
            _put(place, place.follow(place.packed, place.original))
        if self._attention is not None:
            self._attention.apply()
        if self._decode is not None:
            self._decode.apply()
        self._active = True

    def undo(self) -> None:
        """Put the original module objects back, moved and cast as the model was in between.

        Raises RuntimeError, and changes nothing, if something else took the place of a packed
        module since: undo that first.
        """
        if not self._active:
            return
        self._check_occupants([place.packed for place in self._places])
        if self._attention is not None:
            self._attention.check_revert()
        if self._decode is not None:
            self._decode.check_revert()
            self._decode.revert()
        for place in self._places:
            _put(place, place.follow(place.original, place.packed))
        if self._tie:
            self._tie()
        if self._attention is not None:
            self._attention.revert()
        self._active = False

    def _check_occupants(self, expected: Sequence[nn.Module]) -> None:
        wrong = [
            place.name
            for place, module in zip(self._places, expected, strict=True)
            if place.parent._modules.get(place.attribute) is not module
        ]
        if wrong:
            raise RuntimeError(
                f"the model was changed since lath.patch: {', '.join(wrong[:3])}"
                f"{' and others' if len(wrong) > 3 else ''} hold other modules now; "
                "undo the later change first"
            )

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __str__(self) -> str:
        from lath.integration.report_table import report_table

        return report_table(self)


def _whereabouts(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's weight; of a packed one, what a dense weight would have."""
    if isinstance(module, PackedLinear):
        return module.device, module.dense_dtype
    weight = module.get_parameter("weight")
    return weight.device, weight.dtype


def _put(place: Place, module: nn.Module) -> None:
    # The entry keeps its position, so names and order of the state_dict do not change.
    place.parent._modules[place.attribute] = module


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, those that are one object counted once."""
    return unique_bytes([*model.parameters(), *model.buffers()])


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
