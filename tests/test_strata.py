"""Units of pages and clusters as strata: their index rows, the lists of units, repair by them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import oracle_select as oracle
import pytest
import torch
from cases_select import BACKENDS, DIM, GROUP, HEADS, make_cache
from torch import Tensor

import lath
from cases_attention import as_array, as_cache
from lath.formats.attention import Queries
from lath.formats.pages import PAGE
from lath.formats.selection import IndexList, Strata
from lath.reference import select as reference
from lath.reference import strata as definition
from lath.verbs import select_backends
from lath.verbs.backends import is_installed
from lath.verbs.queries import queries_of
from lath.verbs.strata import cut, queries_of_heads, unread_of_strata

KERNELS = [name for name, needs in (("cpu", "numba"), ("triton", "triton")) if is_installed(needs)]
KINDS: Any = ["bound", "mean", "mass", "floor"]


def cropped(codec: str = "int8", backend: str = "reference") -> tuple[lath.PagedKV, Tensor]:
    """A page of 37 tokens among whole ones."""
    kv, q = make_cache(600, batch=2, backend=backend, codec=codec)
    kv.crop(64 + 4 * PAGE + 37)
    kv.append(*(torch.randn(2, HEADS, 300, DIM, generator=seeded(i)) for i in (1, 2)))
    return kv, q


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("codec", ["int8", "int4", "float", "e4m3"])
@pytest.mark.parametrize("unit", [8, 16, 32])
def test_rows_are_the_definitions(codec: str, unit: int) -> None:
    """Byte for byte, of pages that were cropped too."""
    kv, q = cropped(codec)
    view = kv.view()
    expected, got = definition.cut(as_cache(view, q.dtype), unit), cut(kv, view, unit)
    for name in ("table", "starts", "counts", "page_counts"):
        assert np.array_equal(as_array(getattr(got, name)), getattr(expected, name)), name
    used = [page * PAGE // unit + i for span in kv.spans for page in span.pages
            for i in range(PAGE // unit)]  # fmt: skip
    assert np.array_equal(as_array(got.index)[used], expected.index[used])


@pytest.mark.parametrize("unit", [8, 16])
def test_rows_say_what_is_true_of_their_tokens(unit: int) -> None:
    """Against the decoded keys and values alone: bounds are rigorous, means are means."""
    kv, q = make_cache(700)
    view, keys, values = kv.view(), *(side.double() for side in kv.dequantize(0))
    own = cut(kv, view, unit)
    cache, rows = as_cache(own, q.dtype), np.ones(1, np.int32)
    found = {
        kind: reference.page_scores(as_array(q), rows, cache, kind, 1.0)[0, :, 0] for kind in KINDS
    }
    for i in range(own.table.shape[1]):
        at = slice(64 + unit * i, 64 + unit * (i + 1))
        for head in range(HEADS * GROUP):
            k = keys[head // GROUP, at]
            scores = k @ q[0, head, 0].double()
            assert found["bound"][head, i] >= scores.max() - 1e-5
            assert found["floor"][head, i] <= torch.logsumexp(scores, 0) + 1e-5
            slack = q[0, head, 0].abs().double() @ k.mean(0).abs() * 2.0**-8
            assert abs(found["mean"][head, i] - scores.mean()) <= slack + 1e-5
            row = reference.read_index(
                as_array(own.index)[int(own.table[0, i]), head // GROUP], own.format
            )
            assert row.tokens == unit
            mean = values[head // GROUP, at].mean(0).numpy()
            assert np.abs(row.value_mean - mean).max() <= 2.0**-8 * np.abs(mean).max() + 1e-6
            step = np.abs(row.deviation - k.std(0, unbiased=False).numpy()).max()
            assert step <= row.unit / 4 + 1e-6


def test_a_broken_key_breaks_its_unit_alone() -> None:
    kv = lath.PagedKV(1, DIM, key_codec="float", value_codec="float", dtype=torch.float32)
    keys = torch.randn(1, 1, 400, DIM, generator=seeded(1))
    keys[0, 0, 64 + 70] = math.nan
    kv.append(keys, torch.randn(1, 1, 400, DIM, generator=seeded(2)))
    q = torch.randn(1, 1, 1, DIM, generator=seeded(3))
    found = select_backends.page_scores(
        queries_of(q, None), cut(kv, kv.view(), 16), "bound", 1.0, "reference"
    )
    assert torch.isnan(found[0, 0, 0]).nonzero().flatten().tolist() == [70 // 16]
    ids = lath.select(q, kv, "quest-16", 16, recent=0)
    assert ids.tolist() == [[[*range(64, 80)]]]  # what is broken is read, and seen


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_kernels_read_units_as_pages(backend: Any, codec: str) -> None:
    """Scores and repair within the bounds of pages; a wrong byte is found."""
    kv, q = cropped(codec)
    queries, view = queries_of(q, None), cut(kv, kv.view(), 16)
    there = (view.counts > 0)[:, None, None].expand(-1, HEADS * GROUP, -1, -1).numpy()
    for kind in KINDS:
        exact, bound = oracle.page_scores(queries, view, kind, 0.3)
        got = select_backends.page_scores(queries, view, kind, 0.3, backend).numpy()
        assert oracle.admitted(got[there], exact[there], bound[there]) <= 1, kind
    z = torch.randn(2, HEADS, view.table.shape[1], generator=seeded(4))
    z[torch.rand(z.shape, generator=seeded(5)) < 0.3] = math.inf
    z = z.masked_fill((view.counts == 0)[:, None], -math.inf)
    o, lse, o_bound, lse_bound = oracle.repair(queries, view, z, 0.3)
    got_o, got_lse = select_backends.repair(queries, view, z, 0.3, backend)
    assert oracle.admitted(got_o.numpy(), o, o_bound) <= 1
    assert oracle.admitted(got_lse.numpy(), lse, lse_bound) <= 1
    field = view.format.index_fields["value_mean"]
    view.index[int(view.table[0, 3]), 0, field.offset + 1] ^= 1
    got_o, _ = select_backends.repair(queries, view, z, 0.3, backend)
    assert oracle.admitted(got_o.numpy(), o, o_bound) > 1


def exact_repair(kv: lath.PagedKV, q: Tensor, ids: IndexList, groups: Any) -> Tensor:
    """What repair is to be, in float64 from the decoded tokens alone: groups(sequence, KV head) is
    a list of lists of positions; q [S, Hq, 1, D] and one list for each KV head. What is listed in
    any case is in the means of its group, but it was not chosen from it."""
    assert ids.always is not None
    o, lse = lath.decode_attention(q, kv, pages=ids, return_lse=True, precision="int16")
    out = o.double().clone()
    for s, head in np.ndindex(q.shape[0], HEADS * GROUP):
        keys, values = (side[head // GROUP].double() for side in kv.dequantize(s))
        read = {slot + 64 for slot in ids.tolist()[s][head // GROUP]}
        always = {slot + 64 for slot in ids.always[s, 0].nonzero().flatten().tolist()}
        row, total, mixed = q[s, head, 0].double(), [float(lse[s, head, 0])], [out[s, head, 0]]
        for group in groups(s, head // GROUP):
            count, left = len(set(group) - always), len(set(group) - read)
            if not left:
                continue
            scores = DIM**-0.5 * keys[group] @ row
            sigma = float(scores.std(unbiased=False))
            z = float(torch.special.ndtri(torch.tensor(left / count).double()))
            mass = float(scores.mean()) + float(reference.log_mean(np.array(sigma)))
            rest = float(reference.log_rest(np.array(z - sigma)))
            total.append(mass + math.log(count) + rest)
            mixed.append(values[group].mean(0))
        out[s, head, 0] = torch.softmax(torch.tensor(total).double(), 0) @ torch.stack(mixed)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_repair_goes_by_units(backend: str) -> None:
    """σ of a unit is taken channel by channel, as of a page: close to the spread of its scores
    alone where channels are independent, so the data are flat."""
    kv, q = make_cache(1100, batch=2, backend=backend)
    q = 0.05 * q
    ids = lath.select(q, kv, "quest-16", 256)
    count = len(kv.spans[0].pages) * 4
    units = [[*range(64 + 16 * i, 80 + 16 * i)] for i in range(count)]
    expected = exact_repair(kv, q, ids, lambda s, head: units)
    got = lath.decode_attention(q, kv, pages=ids, repair=True, precision="int16")
    assert (got - expected).abs().max() < 5e-3
    # Negative control: by pages it is something else.
    by_pages = dataclasses.replace(ids, strata=None)
    other = lath.decode_attention(q, kv, pages=by_pages, repair=True, precision="int16")
    assert (other - expected).abs().max() > 2e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_repair_goes_by_clusters(backend: str) -> None:
    kv, q = make_cache(1100, batch=2, backend=backend)
    q = 0.05 * q
    ids = lath.select(q, kv, "clusterkv-16", 128)
    assert ids.strata is not None
    of = clusters_of(ids, kv).of

    def groups(s: int, head: int) -> list[list[int]]:
        numbers = range(int(of[s, head].max()) + 1)
        return [(64 + (of[s, head] == c).nonzero().flatten()).tolist() for c in numbers]

    expected = exact_repair(kv, q, ids, groups)
    got = lath.decode_attention(q, kv, pages=ids, repair=True, precision="int16")
    assert (got - expected).abs().max() < 5e-3
    by_pages = dataclasses.replace(ids, strata=None)
    other = lath.decode_attention(q, kv, pages=by_pages, repair=True, precision="int16")
    assert (other - expected).abs().max() > 2e-2


def clusters_of(ids: IndexList, kv: lath.PagedKV) -> Strata:
    assert ids.strata is not None
    strata = ids.strata(kv, kv.view())
    assert strata is not None
    return strata


def test_clusters_are_strata() -> None:
    """Every token of the clustered pages lies in one cluster; a crop takes its tokens out."""
    kv, q = make_cache(1100, batch=2)
    ids = lath.select(q, kv, "clusterkv-16", 128)
    strata = clusters_of(ids, kv)
    assert strata.per_head
    assert strata.view.num_sequences == 2 * HEADS
    counts = strata.view.counts.reshape(2, HEADS, -1)
    for s, head in np.ndindex(2, HEADS):
        own = strata.of[s, head]
        number = torch.bincount(own[own >= 0], minlength=counts.shape[2])
        assert torch.equal(number.int(), counts[s, head])
    kv.crop(64 + 2 * PAGE + 10)
    cropped = clusters_of(ids, kv)
    assert cropped.view.counts.sum() == 2 * HEADS * (2 * PAGE + 10)


def test_lists_of_all_heads_and_of_each() -> None:
    """What was read of a stratum, for every whose of a list: counted one by one. What is listed in
    any case is not counted."""
    kv, q = make_cache(1100, batch=2)
    for name in ("quest-16", "clusterkv-16"):
        for heads, lists in (("kv", HEADS), ("query", HEADS * GROUP), ("layer", 1)):
            ids = lath.select(q, kv, name, 128, heads=heads)
            assert ids.always is not None
            strata, always = clusters_of(ids, kv), ids.always[:, 0]
            view, z = unread_of_strata(strata, ids, 1)
            width = view.table.shape[1]
            per_head = max(lists, HEADS) if strata.per_head else lists
            z, counts = z.reshape(2, per_head, width), view.counts.reshape(2, -1, width)
            for s, head in np.ndindex(2, per_head):
                kv_head = head * HEADS // per_head
                of = strata.of[s, kv_head].masked_fill(always[s], -1)
                entries = of[ids.tolist()[s][head * lists // per_head]]
                read = torch.bincount(entries[entries >= 0], minlength=width)
                total = counts[s, kv_head if strata.per_head else 0]
                assert torch.equal(torch.bincount(of[of >= 0], minlength=width), total.long())
                assert torch.equal(z[s, head] == -math.inf, read == total)
                assert torch.equal(z[s, head] == math.inf, (read == 0) & (total > 0))


def test_queries_of_heads() -> None:
    q = torch.randn(2, HEADS * GROUP, 3, DIM)
    own = queries_of_heads(Queries(q, torch.tensor([3, 2], dtype=torch.int32), 3), HEADS)
    assert torch.equal(own.q[1], q[0, GROUP : 2 * GROUP])
    assert own.lengths.tolist() == [3, 3, 2, 2]


def test_budgets_are_of_units() -> None:
    kv, q = make_cache(1100)
    for unit in (8, 16, 32):
        ids = lath.select(q, kv, f"centroid-{unit}", 100, recent=0)
        assert ids.granularity == "token"
        for own in ids.tolist()[0]:
            assert len(own) == 100 // unit * unit
            assert {slot // unit for slot in own} == {slot // unit for slot in own[::unit]}
    by_mass = lath.select(q, kv, "quest-16", "p0.9")
    assert lath.captured_mass(q, kv, by_mass).min() >= 0.9
    assert by_mass.counts.max() <= lath.select(q, kv, "quest", "p0.9").counts.max() * PAGE
    for wrong in (0, 4, 24, 128):
        with pytest.raises(ValueError, match="size must be one of"):
            lath.selectors.Quest(wrong)
