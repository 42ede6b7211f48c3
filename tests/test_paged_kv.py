"""`lath.PagedKV`: what it holds after appending, cropping, reordering, forking and editing."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor

from lath.formats.pages import PAGE_CODECS, PageCodec, PageFormat
from lath.reference import pages as reference_pages
from lath.verbs.page_decode import decode_pages
from tools.caches import DIM, HEADS, VALUE_DIM, assert_same, cache, contents, tokens


@pytest.mark.parametrize("key", PAGE_CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_pages_decode_to_the_definitions_numbers(key: str, dtype: torch.dtype) -> None:
    """torch's decoding against `reference.read_page`, bit for bit, all pairs of codecs."""
    k, v = tokens(64, dtype=dtype)
    for value in PAGE_CODECS:
        fmt = PageFormat(PageCodec(key), PageCodec(value), DIM, VALUE_DIM, dtype.itemsize)
        name = "bf16" if dtype == torch.bfloat16 else "fp32"
        record, index = reference_pages.write_page(
            k[0, 0].float().numpy(), v[0, 0].float().numpy(), fmt, name
        )
        page = reference_pages.read_page(record, index, fmt, name)
        keys, values = decode_pages(
            torch.from_numpy(record)[None], torch.from_numpy(index)[None], fmt, dtype
        )
        assert torch.equal(keys[0], torch.from_numpy(page.keys))
        assert torch.equal(values[0], torch.from_numpy(page.values))


@pytest.mark.parametrize("codec", PAGE_CODECS)
@pytest.mark.parametrize("keep_first", [True, False])
def test_one_by_one_is_all_at_once(codec: str, keep_first: bool) -> None:
    k, v = tokens(150, batch=2)
    whole, single, chunks = (cache(codec, 2, keep_first=keep_first) for _ in range(3))
    whole.append(k, v)
    for i in range(150):
        single.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    for a, b in ((0, 0), (0, 63), (63, 66), (66, 131), (131, 150)):
        chunks.append(k[:, :, a:b], v[:, :, a:b])
    assert_same(whole, single)
    assert_same(whole, chunks)
    first = 64 if keep_first else 0
    assert [(s.first, s.counts, s.last) for s in whole.spans] == [
        (first, [64] * ((150 - first) // 64), (150 - first) % 64)
    ] * 2


def test_float_parts_are_exact_and_pages_within_half_a_step() -> None:
    k, v = tokens(200)
    kv = cache()
    kv.append(k, v)
    keys, values = kv.dequantize(0)
    exact = [*range(64), *range(192, 200)]
    assert torch.equal(keys[:, exact], k[0, :, exact].float())
    assert torch.equal(values[:, exact], v[0, :, exact].float())
    for start in (64, 128):
        page = slice(start, start + 64)
        part = k[0, :, page].float()
        centred = (part - part.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2), keepdim=True)
        # Half of amax/127; the mean's bfloat16 rounding moves amax by 2**-8 of the mean.
        assert ((keys[:, page] - part).abs() <= 1.02 * centred / 254 + 1e-3).all()
        channel = v[0, :, page].float().abs().amax(dim=1, keepdim=True)
        assert ((values[:, page] - v[0, :, page].float()).abs() <= 1.0001 * channel / 254).all()


def test_ragged_is_a_loop() -> None:
    k, v = tokens(140, batch=3)
    takes = [[140, 3, 0], [10, 70, 64], [1, 1, 1]]
    ragged, alone = cache(batch=3), [cache() for _ in range(3)]
    for step, take in enumerate(takes):
        lengths = torch.tensor(take) if step == 1 else take
        ragged.append(k, v, lengths)
        for s, n in enumerate(take):
            alone[s].append(k[s : s + 1, :, :n], v[s : s + 1, :, :n])
    assert ragged.lengths == [151, 74, 65]
    assert len(ragged) == 151
    for s, single in enumerate(alone):
        chosen = ragged.fork()
        chosen.reorder([s])
        assert_same(chosen, single)


def test_a_page_is_written_once() -> None:
    """Whatever happens afterwards, a page that someone holds keeps its bytes."""
    k, v = tokens(300)
    kv = cache()
    kv.append(k, v)
    fork = kv.fork()
    before = kv.pool.records[kv.spans[0].pages].clone()
    fork.crop(100)
    fork.append(k, v)
    fork.rerotate(5, torch.ones(4))
    fork.compact([list(range(0, len(fork), 3))])
    assert torch.equal(kv.pool.records[kv.spans[0].pages], before)
    other = cache()
    other.append(k, v)
    assert_same(kv, other)


def test_crop_keeps_records_and_starts_a_new_page() -> None:
    k, v = tokens(300)
    kv = cache()
    kv.append(k, v)
    keys, values = kv.dequantize(0)
    page = kv.spans[0].pages[1]
    record = kv.pool.records[page].clone()
    kv.crop(150)
    assert [(s.first, s.counts, s.last) for s in kv.spans] == [(64, [64, 22], 0)]
    assert torch.equal(kv.dequantize(0)[0], keys[:, :150])
    kv.append(k[:, :, 150:], v[:, :, 150:])
    assert [(s.first, s.counts, s.last) for s in kv.spans] == [(64, [64, 22, 64, 64], 22)]
    assert kv.spans[0].pages[1] == page
    assert torch.equal(kv.pool.records[page], record)
    view = kv.view()
    assert view.starts.tolist() == [[64, 128, 150, 214]]
    assert view.counts.tolist() == [[64, 22, 64, 64]]
    assert torch.equal(kv.dequantize(0)[1][:, :150], values[:, :150])
    kv.crop(-250)
    assert kv.lengths == [50]
    kv.append(k[:, :, 50:64], v[:, :, 50:64])
    assert [(s.first, s.counts, s.last) for s in kv.spans] == [(64, [], 0)]
    assert torch.equal(kv.dequantize(0)[0], k[0, :, :64].float())
    kv.reset()
    assert (len(kv), kv.pool.pages_in_use) == (0, 0)


def test_crop_lists_and_short_sequences() -> None:
    k, v = tokens(100, batch=3)
    kv = cache(batch=3)
    kv.append(k, v, [100, 20, 70])
    kv.crop(50)  # the one of 20 is not longer
    assert kv.lengths == [50, 20, 50]
    kv.crop([-10, 20, 0])
    assert kv.lengths == [40, 20, 0]
    kv.crop(torch.tensor([0, -20, 0]))
    assert kv.lengths == [0, 0, 0]


def test_reorder_shares_pages_and_each_goes_its_own_way() -> None:
    k, v = tokens(200, batch=3)
    kv = cache(batch=3)
    kv.append(k, v)
    old = contents(kv)
    used = kv.pool.pages_in_use
    kv.reorder(torch.tensor([2, 0, 2, 2]))
    assert kv.batch == 4
    assert kv.pool.pages_in_use == used - 2  # sequence 1 is gone
    for now, was in zip(contents(kv), (old[2], old[0], old[2], old[2]), strict=True):
        assert torch.equal(now[0], was[0])
        assert torch.equal(now[1], was[1])
    more = tokens(70, batch=4, seed=1)
    kv.append(*more, [70, 0, 1, 2])
    kv.crop([260, 100, 201, 150])
    assert torch.equal(kv.dequantize(0)[0][:, :192], old[2][0][:, :192])  # the tail is a page now
    assert torch.equal(kv.dequantize(1)[0], old[0][0][:, :100])
    assert torch.equal(kv.dequantize(3)[0], old[2][0][:, :150])
    kv.repeat_interleave(2)
    assert kv.lengths == [260, 260, 100, 100, 201, 201, 150, 150]
    kv.reorder([])
    assert (kv.batch, len(kv), kv.pool.pages_in_use) == (0, 0, 0)


def test_forks_share_pages_until_the_last_holder_goes() -> None:
    k, v = tokens(200)
    kv = cache()
    kv.append(k, v)
    fork = kv.fork()
    assert fork.pool is kv.pool
    assert kv.pool.pages_in_use == 2
    fork.append(*tokens(64, seed=1))
    assert kv.pool.pages_in_use == 3
    assert torch.equal(kv.dequantize(0)[0][:, :192], fork.dequantize(0)[0][:, :192])
    assert torch.equal(kv.dequantize(0)[0][:, 192:], k[0, :, 192:].float())  # not yet a page here
    assert kv.lengths == [200]
    pool = kv.pool
    del kv
    gc.collect()
    assert pool.pages_in_use == 3
    del fork
    gc.collect()
    assert pool.pages_in_use == 0


def test_copies_have_pools_of_their_own() -> None:
    k, v = tokens(200, batch=2)
    kv = cache(batch=2)
    kv.append(k, v)
    kv.reorder([1, 1])
    for other in (copy.deepcopy(kv), kv.to("cpu", "reference")):
        assert other.pool is not kv.pool
        assert other.pool.pages_in_use == 2
        assert_same(kv, other)
    assert kv.pool.pages_in_use == 2


def test_pages_are_used_again() -> None:
    k, v = tokens(64 * 9)
    kv = cache()
    for _ in range(5):
        kv.append(k, v)
        kv.crop(0)
    assert len(kv.pool.references) == 8
    kv.reserve(64 * 100)
    assert len(kv.pool.references) == 100
    grown = cache(keep_first=False)
    for _ in range(5):
        grown.append(k[:, :, :64], v[:, :, :64])
    assert len(grown.pool.references) == 8  # by doubling


def test_bytes_are_counted() -> None:
    k, v = tokens(64 * 3 + 7)
    kv = cache()
    empty = kv.nbytes
    kv.append(k, v)
    page = HEADS * (kv.format.record_bytes + kv.format.index_bytes)
    floats = HEADS * (DIM + VALUE_DIM) * 2
    assert empty == page + 2 * 64 * floats
    assert kv.nbytes == 2 * page + 2 * 64 * floats
    assert kv.nbytes_in_use == 2 * page + 71 * floats
    kv.view()
    assert kv.nbytes == 2 * page + 2 * 64 * floats + 4 * (3 * 2 + 4)
    kv.reorder([0, 0])
    assert kv.nbytes_in_use == 2 * page + 2 * 71 * floats  # pages are shared


def test_the_view_follows_each_append() -> None:
    """Its tensors are kept while nothing but the tail grows, and still say what is so."""
    k, v = tokens(200)
    kv = cache()
    tables = []
    for i in range(200):
        kv.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        view = kv.view()
        assert (view.longest, view.lengths.tolist()) == (i + 1, [i + 1])
        parts = view.first_lengths.tolist()[0] + view.last_lengths.tolist()[0]
        assert parts + int(view.counts.sum()) == i + 1
        tables.append(view.table)
    assert all(tables[i] is tables[70] for i in range(64, 127))
    assert tables[127] is not tables[126]


def test_compact_keeps_pages_and_moves_loose_tokens_to_the_tail() -> None:
    k, v = tokens(330)
    kv = cache(dtype=torch.float32)
    kv.append(k.float(), v.float())
    keys, values = kv.dequantize(0)
    pages = list(kv.spans[0].pages)
    keep = [0, 5, *range(64, 128), *range(128, 168), 170, 190, 192, 194, 256, 258, 320, 329]
    kv.compact([keep])
    span = kv.spans[0]
    assert (span.first, span.counts, span.last) == (2, [64, 40], 8)
    assert span.pages == pages[:2]
    assert kv.pool.pages_in_use == 2
    now_k, now_v = kv.dequantize(0)
    assert torch.equal(now_k, keys[:, keep])
    assert torch.equal(now_v, values[:, keep])
    kv.compact([[]])
    assert (kv.lengths, kv.pool.pages_in_use) == ([0], 0)


def test_compact_fills_the_tail_below_a_page_only() -> None:
    """63 tokens fit the tail, of 64 the loose ones are a page. A shrunken first part is closed."""
    k, v = tokens(192)
    for scattered, structure in ((31, (64, [], 63)), (32, (64, [32], 32))):
        kv = cache()
        kv.append(k[:, :, :160], v[:, :, :160])
        kv.compact([[*range(64), *range(64, 64 + 2 * scattered, 2), *range(128, 160)]])
        assert [(s.first, s.counts, s.last) for s in kv.spans] == [structure]
    kv = cache("float")
    kv.append(k, v)
    kv.compact([[0, 1, *range(64, 192)]])
    kv.append(k[:, :, :1], v[:, :, :1])
    assert [(s.first, s.counts, s.last) for s in kv.spans] == [(2, [64, 64], 1)]
    assert torch.equal(kv.dequantize(0)[0][:, -1], k[0, :, 0].float())


def test_compact_quantises_scattered_tokens_once_more() -> None:
    k, v = tokens(330)
    kv = cache(dtype=torch.float32)
    kv.append(k.float(), v.float())
    keys, values = kv.dequantize(0)
    keep = [*range(64), *range(64, 256, 3), *range(256, 330)]
    kv.compact([keep])
    span = kv.spans[0]
    assert (span.first, span.counts, span.last) == (64, [64, 64], 10)
    now_k, now_v = kv.dequantize(0)
    exact = [*range(64), *range(128, len(keep))]
    picked = [keep[i] for i in exact]
    assert torch.equal(now_k[:, exact], keys[:, picked])
    assert torch.equal(now_v[:, exact], values[:, picked])
    moved = keys[:, 64:256:3]
    amax = (moved - moved.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2), keepdim=True)
    assert ((now_k[:, 64:128] - moved).abs() <= 1.02 * amax / 254 + 1e-3).all()
    channel = values[:, 64:256:3].abs().amax(dim=1, keepdim=True)
    assert ((now_v[:, 64:128] - values[:, 64:256:3]).abs() <= 1.0001 * channel / 254).all()


def rotate(x: Tensor, turn: float, frequencies: Tensor) -> Tensor:
    """Rotary embedding by complex numbers."""
    half = frequencies.shape[0]
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    turned = pairs * torch.polar(torch.ones_like(frequencies), turn * frequencies)
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :].double()], dim=-1)


@pytest.mark.parametrize("scaled", [False, True])
def test_rerotate_turns_decoded_keys(scaled: bool) -> None:
    scales = torch.rand(HEADS, DIM) + 0.5 if scaled else None
    kv = cache(dtype=torch.float32, batch=2, key_channel_scales=scales)
    k, v = tokens(140, batch=2, dtype=torch.float32)
    kv.append(k, v)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01, 0.001, 0.0], dtype=torch.float64)
    before = contents(kv)
    kv.rerotate([7, 0], frequencies)
    keys, values = kv.dequantize(0)
    expected = rotate(before[0][0], 7, frequencies)
    error = (keys - expected).abs()
    assert error[:, :64].max() < 1e-5  # float parts
    assert error[:, 128:].max() < 1e-5
    amax = (expected[:, 64:128] - expected[:, 64:128].mean(dim=1, keepdim=True)).abs().amax()
    assert error.max() <= 1.05 * amax / 254 * (2 if scaled else 1) + 5e-3
    assert (values - before[0][1]).abs().max() < 1e-2
    assert torch.equal(kv.dequantize(1)[0], before[1][0])
    kv.rerotate(-7, frequencies)
    assert (kv.dequantize(0)[0] - before[0][0]).abs().max() < 0.1


def test_channel_scales_even_out_a_large_channel() -> None:
    """Keys come back as they went in, and the other channels keep their precision."""
    scales = torch.ones(HEADS, DIM)
    scales[:, 3] = 32
    k, v = tokens(128)
    k[..., 3] *= 32
    plain, scaled = cache(), cache(key_channel_scales=scales)
    errors = []
    for kv in (plain, scaled):
        kv.append(k, v)
        keys = kv.dequantize(0)[0]
        assert torch.equal(keys[:, :64], k[0, :, :64].float())  # powers of two are exact
        errors.append((keys - k[0].float())[..., :3].abs().mean())
    assert errors[1] < errors[0] / 5


def test_draft_is_the_upper_plane() -> None:
    k, v = tokens(128)
    kv = cache("int8-planes")
    kv.append(k, v)
    assert not kv.view().draft
    with kv.draft() as same:
        assert same is kv
        assert kv.view().draft
    assert not kv.view().draft
    assert kv.view(draft=True).draft
    with pytest.raises(ValueError, match="int8-planes"):
        cache().view(draft=True)


def test_inputs_are_not_changed_and_not_kept() -> None:
    k, v = tokens(130)
    before = k.clone(), v.clone()
    kv = cache(key_channel_scales=torch.full((HEADS, DIM), 2.0))
    kv.append(k, v)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])
    held = contents(kv)
    k.zero_()
    v.zero_()
    assert torch.equal(kv.dequantize(0)[0], held[0][0])


def test_strides_do_not_matter() -> None:
    k, v = tokens(130)
    a, b = cache(), cache()
    a.append(k, v)
    b.append(
        k.transpose(2, 3).contiguous().transpose(2, 3),
        v.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert_same(a, b)
