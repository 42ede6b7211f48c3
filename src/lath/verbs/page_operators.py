"""`lath::write_pages` and `lath::attend_pages`: what torch.compile and torch.export record.

In eager mode the verbs call the kernels directly: an operator costs tens of microseconds a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.formats.pages import PageCodec, PageFormat
from lath.formats.plan import Backend
from lath.verbs import page_backends
from lath.verbs.backends import resolve_backend


def write_pages(
    keys: Tensor,
    values: Tensor,
    fmt: PageFormat,
    records: Tensor,
    index: Tensor,
    jobs: Tensor,
    backend: Backend,
) -> None:
    """As `page_backends.write_pages`; an operator while a graph is recorded."""
    if torch.compiler.is_compiling():
        _write_operator(keys, values, records, index, jobs, str(fmt.key), str(fmt.value), backend)
    else:
        page_backends.write_pages(keys, values, fmt, records, index, jobs, backend)


def attend(
    queries: Queries,
    pages: PageView,
    options: ScoreOptions,
    backend: Backend,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `page_backends.attend` for dense queries; an operator while a graph is recorded."""
    if not torch.compiler.is_compiling():
        return page_backends.attend(queries, pages, options, backend, splits)
    fmt, view, o = pages.format, pages, options
    output: tuple[Tensor, Tensor] = _attend_operator(
        queries.q, queries.lengths, view.records, view.index, view.table, view.starts, view.counts,
        view.page_counts, view.lengths, view.first_keys, view.first_values, view.first_lengths,
        view.last_keys, view.last_values, view.last_lengths, o.mask, o.bias, o.alibi, o.sink,
        o.tree, str(fmt.key), str(fmt.value), fmt.key_dim, fmt.value_dim, queries.longest,
        view.longest, view.draft, o.scale, o.causal, o.window, o.softcap, o.query, o.precision,
        o.scheme, backend, splits, view.tokens, view.listed,
    )  # fmt: skip
    return output


@torch.library.custom_op("lath::write_pages", mutates_args=("records", "index"))
def _write_operator(
    keys: Tensor,
    values: Tensor,
    records: Tensor,
    index: Tensor,
    jobs: Tensor,
    key_codec: str,
    value_codec: str,
    backend: str,
) -> None:
    fmt = PageFormat(
        PageCodec(key_codec), PageCodec(value_codec), keys.shape[3], values.shape[3],
        keys.element_size(),
    )  # fmt: skip
    chosen = resolve_backend(backend, keys.device)
    page_backends.write_pages(keys, values, fmt, records, index, jobs, chosen)


@_write_operator.register_fake
def _write_fake(
    keys: Tensor,
    values: Tensor,
    records: Tensor,
    index: Tensor,
    jobs: Tensor,
    key_codec: str,
    value_codec: str,
    backend: str,
) -> None:
    return None


@torch.library.custom_op("lath::attend_pages", mutates_args=())
def _attend_operator(
    q: Tensor,
    query_lengths: Tensor,
    records: Tensor,
    index: Tensor,
    table: Tensor,
    starts: Tensor,
    counts: Tensor,
    page_counts: Tensor,
    lengths: Tensor,
    first_keys: Tensor | None,
    first_values: Tensor | None,
    first_lengths: Tensor | None,
    last_keys: Tensor | None,
    last_values: Tensor | None,
    last_lengths: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    sink: Tensor | None,
    tree: Tensor | None,
    key_codec: str,
    value_codec: str,
    key_dim: int,
    value_dim: int,
    longest_query: int,
    longest: int,
    draft: bool,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    query: str,
    precision: str,
    scheme: str,
    backend: str,
    splits: int | None,
    tokens: Tensor | None = None,
    listed: int | None = None,
) -> tuple[Tensor, Tensor]:
    fmt = PageFormat(
        PageCodec(key_codec), PageCodec(value_codec), key_dim, value_dim, q.element_size()
    )
    view = PageView(
        fmt, records, index, table, starts, counts, page_counts, lengths, longest, first_keys,
        first_values, first_lengths, last_keys, last_values, last_lengths, draft, tokens, listed,
    )  # fmt: skip
    options = ScoreOptions(
        scale, causal, window, softcap, mask, bias, alibi, sink, tree,
        query, precision, scheme,  # type: ignore[arg-type]
    )  # fmt: skip
    chosen = resolve_backend(backend, q.device)
    queries = Queries(q.detach(), query_lengths, longest_query)
    o, lse = page_backends.attend(queries, view, options, chosen, splits)
    return o.contiguous(), lse.contiguous()


@_attend_operator.register_fake
def _attend_fake(
    q: Tensor,
    query_lengths: Tensor,
    records: Tensor,
    index: Tensor,
    table: Tensor,
    starts: Tensor,
    counts: Tensor,
    page_counts: Tensor,
    lengths: Tensor,
    first_keys: Tensor | None,
    first_values: Tensor | None,
    first_lengths: Tensor | None,
    last_keys: Tensor | None,
    last_values: Tensor | None,
    last_lengths: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    sink: Tensor | None,
    tree: Tensor | None,
    key_codec: str,
    value_codec: str,
    key_dim: int,
    value_dim: int,
    longest_query: int,
    longest: int,
    draft: bool,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    query: str,
    precision: str,
    scheme: str,
    backend: str,
    splits: int | None,
    tokens: Tensor | None = None,
    listed: int | None = None,
) -> tuple[Tensor, Tensor]:
    rows = q.shape[:3]
    return q.new_empty((*rows, value_dim)), q.new_empty(rows, dtype=torch.float32)
