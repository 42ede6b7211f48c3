"""The catalogue of attention: parity, the sanitizer and the definition's own tests share it.

A case is data. Its text form, printed by a failing test, rebuilds it: `AttentionCase.parse(text)`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cases import DTYPES
from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.formats.pages import PAGE, PageCodec, PageFormat
from lath.reference import attention as reference
from lath.reference import pages as reference_pages

Array = NDArray[np.float64]
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class AttentionCase:
    """codecs "key/value", heads "Hq/Hkv", dims "D/E", rows (the longest), lengths "130,64" of the
    sequences' keys, dtype, precision, and options as words joined by ";" ("-" for none):

    causal, window=N, softcap=X, mask, bias, alibi, sink, tree, unified, e4m3 (the query), draft;
    parts (first and last float parts), holes (pages that are not full in the middle), ragged (rows
    differ by sequence), packed (rows in one batch row), flat (equal keys, channels of zeros),
    lists=kv, lists=query or lists=shared (about half of the pages, chosen by each KV head, each
    query head, or by all together), tokens (about half of the tokens of a list's pages).
    """

    codecs: str = "int8/int8"
    heads: str = "4/2"
    dims: str = "32/32"
    rows: int = 1
    lengths: str = "130"
    dtype: str = "bf16"
    precision: str = "int8"
    options: str = "parts"

    def __str__(self) -> str:
        return " ".join(str(getattr(self, field.name)) for field in dataclasses.fields(self))

    @staticmethod
    def parse(text: str) -> AttentionCase:
        codecs, heads, dims, rows, lengths, dtype, precision, options = text.split()
        return AttentionCase(codecs, heads, dims, int(rows), lengths, dtype, precision, options)

    @property
    def words(self) -> dict[str, str]:
        pairs = [word.partition("=") for word in self.options.split(";") if word != "-"]
        return {name: value for name, _, value in pairs}

    @property
    def format(self) -> PageFormat:
        key, value = self.codecs.split("/")
        key_dim, value_dim = (int(size) for size in self.dims.split("/"))
        return PageFormat(
            PageCodec(key), PageCodec(value), key_dim, value_dim, DTYPES[self.dtype].itemsize
        )


# Every codec on both sides, every option, lengths around a page, odd head dims, GQA of 1 to 4.
CATALOGUE = [
    AttentionCase(),
    AttentionCase(rows=5, lengths="200", options="causal;parts"),
    AttentionCase("int8/float", "4/2", "64/64", 70, "70", "bf16", "float", "causal"),
    AttentionCase("int8/float", "3/1", "80/80", 33, "129,65", "fp16", "float", "-"),
    AttentionCase("int8/float", "2/2", "32/32", 20, "150", "fp32", "float", "window=40;causal"),
    AttentionCase("int8/int8", "4/1", "48/32", 3, "257,64,1", "fp16", "int8", "parts;causal"),
    AttentionCase("int8/int8", "4/4", "64/64", 2, "300", "bf16", "int16", "parts;causal;holes"),
    AttentionCase("int8/int8", "2/1", "32/64", 1, "190,63", "bf16", "float", "parts"),
    AttentionCase("int8-planes/int8-planes", "4/2", "64/64", 1, "260", "bf16", "int8", "parts"),
    AttentionCase("int8-planes/int8-planes", "4/2", "64/64", 2, "260", "bf16", "int8",
                  "parts;draft;causal"),
    AttentionCase("int4/int4", "4/2", "64/64", 1, "260", "bf16", "int8", "parts"),
    AttentionCase("int4/int2", "4/2", "64/128", 2, "200", "fp16", "int8", "parts;causal"),
    AttentionCase("int2/int4", "2/2", "64/96", 1, "140", "fp32", "float", "parts"),
    AttentionCase("int4/int4", "4/2", "96/96", 1, "200", "bf16", "int8", "parts;e4m3"),
    AttentionCase("e4m3/e4m3", "4/2", "32/32", 2, "200", "bf16", "e4m3", "parts;causal;e4m3"),
    AttentionCase("e4m3/float", "2/1", "48/48", 1, "130", "fp16", "float", "e4m3"),
    AttentionCase("float/float", "4/2", "32/32", 4, "200", "bf16", "float", "parts;causal"),
    AttentionCase("float/int4", "2/1", "64/64", 1, "150", "fp32", "int8", "parts"),
    AttentionCase("int8/int8", "4/2", "32/32", 6, "200,90", "bf16", "int8", "parts;mask"),
    AttentionCase("int8/int8", "4/2", "32/32", 6, "200", "fp16", "int8", "parts;bias;causal"),
    AttentionCase("int8/float", "4/2", "32/32", 6, "100", "fp32", "float",
                  "alibi;causal;softcap=3"),
    AttentionCase("int8/int8", "4/2", "32/32", 2, "200", "bf16", "int8",
                  "parts;sink;causal;window=70"),
    AttentionCase("int8/int8", "4/2", "32/32", 9, "170,80", "bf16", "int8", "parts;tree"),
    AttentionCase("int8/int8", "2/1", "32/32", 70, "200", "bf16", "int8", "parts;tree"),
    AttentionCase("int8/int8", "4/1", "32/32", 2, "400", "bf16", "int8", "parts;unified;causal"),
    AttentionCase("int8/int8", "4/2", "32/32", 7, "200,64,10", "bf16", "int8",
                  "parts;ragged;causal"),
    AttentionCase("int8/float", "4/2", "32/32", 40, "40,0,17", "bf16", "float", "packed;causal"),
    AttentionCase("int8/float", "2/1", "32/32", 9, "5", "bf16", "float", "causal"),
    AttentionCase("int8/int8", "2/1", "32/32", 3, "0,70", "bf16", "int8", "parts;sink"),
    AttentionCase("int8/int8", "2/1", "32/32", 2, "200", "fp16", "int8", "parts;flat"),
    AttentionCase("int8/float", "1/1", "256/256", 2, "130", "bf16", "float", "-"),
    AttentionCase("int8/int8", "4/2", "64/64", 1, "900", "bf16", "int8", "parts;lists=kv"),
    AttentionCase("int8/int8", "4/2", "32/48", 2, "700,300", "bf16", "int8",
                  "parts;causal;lists=query"),
    AttentionCase("int8/float", "8/2", "32/32", 3, "520", "fp16", "float",
                  "parts;causal;lists=shared;holes"),
    AttentionCase("int8/int8", "4/1", "64/64", 1, "700,64,130", "bf16", "float",
                  "parts;lists=kv;tokens"),
    AttentionCase("int4/int4", "4/2", "64/64", 5, "600", "bf16", "int8",
                  "parts;causal;lists=query;tokens;softcap=5"),
    AttentionCase("float/float", "4/4", "32/32", 1, "400", "fp32", "float", "lists=kv;tokens"),
    AttentionCase("e4m3/e4m3", "4/2", "32/32", 2, "500", "bf16", "e4m3",
                  "parts;e4m3;lists=query;mask"),
    AttentionCase("int8-planes/int8-planes", "4/2", "64/64", 1, "500", "bf16", "int16",
                  "parts;draft;lists=kv;tokens;sink"),
    AttentionCase("int8/int8", "4/2", "32/32", 2, "700", "bf16", "int8",
                  "parts;unified;causal;lists=kv"),
]  # fmt: skip


@dataclass(frozen=True)
class Sequence:
    """One sequence's keys and values [Hkv, L, D] and how its positions are divided."""

    keys: NDArray[np.float32]
    values: NDArray[np.float32]
    first: int
    counts: list[int]
    last: int


def make_attention(case: AttentionCase) -> tuple[Queries, PageView, ScoreOptions]:
    """The arguments of `attend` for a case: CPU tensors, the same in every process."""
    seed = int.from_bytes(hashlib.sha256(str(case).encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    lengths = [int(length) for length in case.lengths.split(",")]
    sequences = [make_sequence(case, length, rng) for length in lengths]
    pages = make_pages(case, sequences, rng)
    queries = make_queries(case, len(lengths), rng, sequences)
    return queries, pages, make_options(case, queries, pages, rng)


def make_sequence(case: AttentionCase, length: int, rng: np.random.Generator) -> Sequence:
    """Keys with a bias per channel and a drift over positions, values off zero."""
    heads = int(case.heads.split("/")[1])
    fmt, words = case.format, case.words
    keys = rng.standard_normal((heads, length, fmt.key_dim))
    keys += 2 * rng.standard_normal((heads, 1, fmt.key_dim))
    keys += np.linspace(0, 2, length)[None, :, None] * rng.standard_normal((heads, 1, fmt.key_dim))
    values = rng.standard_normal((heads, length, fmt.value_dim)) + 0.3
    if "flat" in words:
        keys = np.ones_like(keys)
        values[..., :4] = 0  # groups of zeros on both sides
    first = min(length, PAGE) if "parts" in words else 0
    rest, counts = length - first, []
    while rest >= PAGE or (rest and "parts" not in words):
        full = min(rest, PAGE)
        count = int(rng.integers(1, full + 1)) if "holes" in words else full
        counts.append(count)
        rest -= count
    return Sequence(round_to(keys, case.dtype), round_to(values, case.dtype), first, counts, rest)


def round_to(x: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    return torch.from_numpy(np.asarray(x, np.float32)).to(DTYPES[dtype]).float().numpy()


def make_pages(
    case: AttentionCase, sequences: list[Sequence], rng: np.random.Generator
) -> PageView:
    """A view with shuffled page numbers; what no position holds is NaN."""
    fmt, heads = case.format, int(case.heads.split("/")[1])
    number_of_pages = sum(len(sequence.counts) for sequence in sequences)
    numbers = [int(i) for i in rng.permutation(number_of_pages)]
    width = max([len(sequence.counts) for sequence in sequences] + [1])
    records = np.full((number_of_pages + 1, heads, fmt.record_bytes), 0xFF, np.uint8)
    index = np.full((number_of_pages + 1, heads, fmt.index_bytes), 0xFF, np.uint8)
    table = np.full((len(sequences), width), number_of_pages, np.int32)
    starts, counts = np.zeros_like(table), np.zeros_like(table)
    for s, sequence in enumerate(sequences):
        position = sequence.first
        for i, count in enumerate(sequence.counts):
            table[s, i], starts[s, i], counts[s, i] = numbers.pop(), position, count
            for head in range(heads):
                span = slice(position, position + count)
                record, row = reference_pages.write_page(
                    sequence.keys[head, span], sequence.values[head, span], fmt, case.dtype
                )
                records[table[s, i], head], index[table[s, i], head] = record, row
            position += count
    parts = make_parts(case, sequences) if "parts" in case.words else {}
    lengths = [sequence.keys.shape[1] for sequence in sequences]
    view = PageView(
        fmt, torch.from_numpy(records), torch.from_numpy(index), torch.from_numpy(table),
        torch.from_numpy(starts), torch.from_numpy(counts),
        integers([len(sequence.counts) for sequence in sequences]), integers(lengths),
        max(lengths), draft="draft" in case.words, **parts,
    )  # fmt: skip
    return make_lists(case, view, rng) if "lists" in case.words else view


def make_lists(case: AttentionCase, view: PageView, rng: np.random.Generator) -> PageView:
    """The view with lists of about half of the pages, ascending, some of them empty."""
    query_heads, kv_heads = (int(number) for number in case.heads.split("/"))
    heads = {"kv": kv_heads, "query": query_heads, "shared": 1}[case.words["lists"]]
    sequences, width = view.table.shape
    lists = torch.zeros((4, sequences, heads, width), dtype=torch.int64)
    for s in range(sequences):
        for head in range(heads):
            chosen = np.flatnonzero(rng.random(int(view.page_counts[s])) < 0.5)
            for source, target in zip((view.table, view.starts, view.counts), lists, strict=False):
                target[s, head, : len(chosen)] = source[s, torch.from_numpy(chosen)]
            lists[3, s, head] = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, width))
            lists[3, s, head, : min(len(chosen), 1)] = -1  # a whole page
    table, starts, counts = (entries.to(torch.int32) for entries in lists[:3])
    tokens, page_counts = lists[3], (counts > 0).sum(-1).to(torch.int32)
    if heads == 1:
        table, starts, counts, tokens = (
            entries.expand(-1, kv_heads, -1) for entries in (table, starts, counts, tokens)
        )
        page_counts = page_counts.expand(-1, kv_heads)
    return dataclasses.replace(
        view, table=table, starts=starts, counts=counts, page_counts=page_counts,
        tokens=tokens if "tokens" in case.words else None,
        listed=int(counts.sum(-1).max()) + 2 * PAGE,
    )  # fmt: skip


def make_parts(case: AttentionCase, sequences: list[Sequence]) -> dict[str, Any]:
    heads = int(case.heads.split("/")[1])
    shape = (len(sequences), heads, PAGE)
    parts: dict[str, Any] = {}
    for name, sizes in (
        ("first", [sequence.first for sequence in sequences]),
        ("last", [sequence.last for sequence in sequences]),
    ):
        for kind, channels in (("keys", case.format.key_dim), ("values", case.format.value_dim)):
            part = np.full((*shape, channels), np.nan, np.float32)
            for s, sequence in enumerate(sequences):
                source = getattr(sequence, kind)
                begin = 0 if name == "first" else source.shape[1] - sizes[s]
                part[s, :, : sizes[s]] = source[:, begin : begin + sizes[s]]
            parts[f"{name}_{kind}"] = torch.from_numpy(part).to(DTYPES[case.dtype])
        parts[f"{name}_lengths"] = integers(sizes)
    return parts


def integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_queries(
    case: AttentionCase, count: int, rng: np.random.Generator, sequences: list[Sequence]
) -> Queries:
    heads, width = int(case.heads.split("/")[0]), case.format.key_dim
    rows = [case.rows] * count
    if "ragged" in case.words:
        rows = [max(case.rows - 3 * s, 0) for s in range(count)]
    if "packed" in case.words:
        rows = [sequence.keys.shape[1] for sequence in sequences]
        offsets = np.concatenate([[0], np.cumsum(rows)])
        q = rng.standard_normal((1, heads, int(offsets[-1]) + 2, width)) * 2
        tensor = torch.from_numpy(q.astype(np.float32)).to(DTYPES[case.dtype])
        starts = integers([int(offset) for offset in offsets[:-1]])
        return Queries(tensor, integers(rows), max(rows), starts)
    q = rng.standard_normal((count, case.rows, heads, width)) * 2
    tensor = torch.from_numpy(q.astype(np.float32)).to(DTYPES[case.dtype])
    return Queries(tensor.transpose(1, 2), integers(rows), max(rows))  # strides as in models


def make_options(
    case: AttentionCase, queries: Queries, pages: PageView, rng: np.random.Generator
) -> ScoreOptions:
    words, heads = case.words, queries.q.shape[1]
    sequences, rows, keys = pages.num_sequences, queries.q.shape[2], pages.longest
    mask = bias = alibi = sink = tree = None
    if "mask" in words:
        allowed = rng.random((sequences, 1, rows, keys)) < 0.6
        allowed[:, :, rows // 2] = False  # a row that reads nothing
        mask = torch.from_numpy(allowed)
    if "bias" in words:
        numbers = rng.standard_normal((1, heads, rows, keys)).astype(np.float32)
        bias = torch.from_numpy(numbers).to(queries.q.dtype)
    if "alibi" in words:
        alibi = torch.tensor([2.0 ** -(i + 1) for i in range(heads)])
    if "sink" in words:
        sink = torch.from_numpy(rng.standard_normal(heads).astype(np.float32) + 2)
    if "tree" in words:
        tree = make_tree(sequences, rows, rng)
    return ScoreOptions(
        scale=1 / math.sqrt(case.format.key_dim),
        causal="causal" in words,
        window=int(words["window"]) if "window" in words else None,
        softcap=float(words["softcap"]) if "softcap" in words else None,
        mask=mask, bias=bias, alibi=alibi, sink=sink, tree=tree,
        query="e4m3" if "e4m3" in words else "int8",
        precision=case.precision,  # type: ignore[arg-type]
        scheme="unified" if "unified" in words else "online",
    )  # fmt: skip


def make_tree(sequences: int, rows: int, rng: np.random.Generator) -> Tensor:
    """int32 [S, rows, words]: each node reads itself and the ancestors of a random parent."""
    tree = np.zeros((sequences, rows, -(-rows // 32)), np.uint32)
    for s in range(sequences):
        for node in range(rows):
            if node:
                tree[s, node] = tree[s, int(rng.integers(0, node))]
            tree[s, node, node // 32] |= np.uint32(1 << (node % 32))
    return torch.from_numpy(tree.view(np.int32))


# From torch to the definition


def as_array(tensor: Tensor | None) -> Any:
    """A NumPy array; floats as fp32."""
    if tensor is None:
        return None
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def as_cache(pages: PageView, dtype: torch.dtype) -> reference.Cache:
    fields = {
        field.name: as_array(getattr(pages, field.name))
        for field in dataclasses.fields(reference.Cache)
        if field.name not in ("format", "dtype", "draft")
    }
    return reference.Cache(
        format=pages.format, dtype=DTYPE_NAMES[dtype], draft=pages.draft, **fields
    )


def as_options(options: ScoreOptions) -> reference.Options:
    tensors = {
        name: as_array(getattr(options, name)) for name in ("mask", "bias", "alibi", "sink", "tree")
    }
    return reference.Options(
        scale=options.scale, causal=options.causal, window=options.window,
        softcap=options.softcap, query=options.query, precision=options.precision, **tensors,
    )  # fmt: skip


def dense_queries(queries: Queries) -> NDArray[np.float32]:
    """q [S, Hq, longest, D]: packed rows taken apart."""
    q = as_array(queries.q)
    if queries.offsets is None:
        return q  # type: ignore[no-any-return]
    dense = np.zeros((len(queries.lengths), q.shape[1], queries.longest, q.shape[3]), np.float32)
    for s, (offset, rows) in enumerate(zip(queries.offsets, queries.lengths, strict=True)):
        dense[s, :, :rows] = q[0, :, offset : offset + rows]
    return dense


def dense_outputs(queries: Queries, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What `attend` returned as [S, Hq, longest, ...], as `dense_queries` lays out the rows."""
    if queries.offsets is None:
        return o, lse
    shape = (len(queries.lengths), o.shape[1], queries.longest)
    dense, logs = o.new_zeros((*shape, o.shape[3])), lse.new_full(shape, -math.inf)
    for s, (offset, rows) in enumerate(zip(queries.offsets, queries.lengths, strict=True)):
        dense[s, :, :rows] = o[0, :, offset : offset + rows]
        logs[s, :, :rows] = lse[0, :, offset : offset + rows]
    return dense, logs


def spoiled(pages: PageView, unread: bool) -> PageView:
    """The pages with 0xFF in the codes of sub-pages that no list reads, or in all others."""
    assert pages.tokens is not None
    fmt, records = pages.format, pages.records.clone()
    for page, head in itertools.product(range(records.shape[0]), range(records.shape[1])):
        lists = pages.table.shape[1] // records.shape[1]
        own = pages.table[:, head * lists : (head + 1) * lists] == page
        masks = pages.tokens[:, head * lists : (head + 1) * lists][own].tolist()
        masks = functools.reduce(operator.or_, masks, 0)
        for subpage in range(4):
            if bool(masks >> 16 * subpage & 0xFFFF) is unread:
                continue
            for name, field in fmt.fields.items():
                if name in ("keys", "values", "keys_low", "values_low"):
                    size = field.nbytes // 4
                    first = field.offset + size * subpage
                    records[page, head, first : first + size] = 0xFF
    return dataclasses.replace(pages, records=records)
