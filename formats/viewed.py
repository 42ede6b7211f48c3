"""A packed weight whose tensors are not kept: a view of a backend holds the same numbers.

On a CPU the view is what is multiplied; the packed codes beside it are read only to be saved or
moved. Where both would not fit, the view alone is kept and the codes are made anew when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lath.formats.codec import Codec
from lath.formats.packed_weight import View
from lath.formats.qtensor import QTensor


class ViewedTensor(QTensor):
    """A QTensor on the CPU that lives in a view.

    key: the view's name (`PackedWeight.view`). restore: makes every tensor from it, bit for bit;
    each access to one of them (`codes`, `scales`, `tensors`, …) makes them anew and keeps none.
    """

    def __init__(
        self,
        codec: Codec,
        shape: tuple[int, int],
        key: str,
        view: Any,
        restore: Callable[[], dict[str, Tensor]],
    ) -> None:
        self.codec, self.shape = codec, shape
        self._restore = restore
        self._own_views: dict[str, Any] = {key: view}

    def __getattr__(self, name: str) -> Any:
        # What a QTensor has as attributes, these are not.
        if name in ("codes", "scales", "zeros", "outer", "table"):
            return self._restore().get(name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self._restore()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors when they are made."""
        return QTensor.empty(self.codec, self.shape).nbytes

    def view(self, key: str, build: Callable[[], View]) -> View:
        if key not in self._own_views:
            self._own_views[key] = build()
        return self._own_views[key]  # type: ignore[no-any-return]

    @property
    def view_nbytes(self) -> int:
        """What the views add to `nbytes`, of which nothing is in memory: it may be less than 0."""
        return sum(getattr(v, "nbytes", 0) for v in self._own_views.values()) - self.nbytes

    def restored(self) -> QTensor:
        """The weight with tensors of its own."""
        return QTensor(self.codec, self.shape, **self._restore())

    def __reduce__(self) -> Any:
        return QTensor.from_tensors, (self.codec, self.shape, self._restore())
