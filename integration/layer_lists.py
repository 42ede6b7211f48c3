"""The lists of one layer of a LathCache: asked for, measured, forgotten."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lath.integration.attention import Readable, Scores
from lath.integration.misses import Audit
from lath.verbs.paged_kv import PagedKV
from lath.verbs.selection import Selecting, Selection


class LayerLists:
    """A Selection at work on layer `number` of a model, and what it is measured into."""

    def __init__(self, selection: Selection, audit: Audit | None, number: int) -> None:
        self.selection = selection
        self.audit = audit
        self.number = number
        self.forget()

    def forget(self) -> None:
        """Begin without a list of earlier steps: the cache is another now."""
        self._selecting = Selecting(self.selection, self.number)

    def arguments(
        self,
        query: Tensor,
        pages: PagedKV,
        readable: Readable,
        scores: Scores,
        given: dict[str, Any],
        draft: bool,
    ) -> dict[str, Any]:
        """`pages` and `repair` for `decode_attention` of query [B, Hq, L, D], or nothing where it
        is to read everything. given: its query_lengths and backend.

        A step with a window reads its window. A draft's step is not measured: it is no step of the
        text. A list of a step with padding serves that step alone: a sequence that had no query in
        it has an empty list.
        """
        if readable.window is not None:
            return {}
        padded = given["query_lengths"] is not None
        if padded:
            self.forget()
        lists = self._selecting.lists(query, pages, scale=scores.scale, **given)
        if padded:
            self.forget()
        if lists is None:
            return {}
        if self.audit is not None and not draft:
            check_measurable(self.audit, query, readable, scores)
            self.audit.measure(self.number, query, pages, lists, scale=scores.scale, **given)
        return {"pages": lists, "repair": self.selection.repair}


def check_measurable(audit: Audit, query: Tensor, readable: Readable, scores: Scores) -> None:
    """NotImplementedError for scores that `lath.captured_mass` does not measure."""
    for name, present in (
        ("mask", readable.mask is not None),
        ("bias", readable.bias is not None),
        ("softcap", scores.softcap is not None),
        ("causal=False", not readable.causal and query.shape[2] > 1),
    ):
        if present:
            raise NotImplementedError(
                f"audit={audit.threshold} cannot be combined with {name}: lath.captured_mass "
                "measures causal scores as they are"
            )
