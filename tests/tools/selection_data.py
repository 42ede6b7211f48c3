"""Synthetic caches on which selectors are measured: kind ones, and ones built to defeat a method.

Everything is drawn from a generator with a seed. Keys have a standard deviation of about 1 in each
channel, queries one of `sharpness`, so that scores (scale D**-0.5) have about that one too. Several
queries stand behind the same keys, one after the other asked of the same cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import lath
from lath.formats.pages import PAGE

Generator = torch.Generator


@dataclass(frozen=True)
class Size:
    """n tokens, `queries` of them asked of `kv_heads` heads by `group` query heads each."""

    tokens: int = 8192
    queries: int = 4
    kv_heads: int = 2
    group: int = 4
    dim: int = 64

    @property
    def pages(self) -> int:
        return self.tokens // PAGE


@dataclass(frozen=True)
class DataSet:
    """q [Q, Hq, D], k and v [Hkv, n, D], fp32. needles: the position of each query's, if any."""

    q: Tensor
    k: Tensor
    v: Tensor
    needles: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """make(size, sharpness, seed) → DataSet. defeats: the method that it was built against, "" for
    the kind sets; control: the set on which that method does what it is for."""

    name: str
    make: Callable[[Size, float, int], DataSet]
    what: str
    defeats: str = ""
    control: str = ""


# Kind sets


def iid(size: Size, sharpness: float, seed: int) -> DataSet:
    rng = Generator().manual_seed(seed)
    shape = size.kv_heads, size.tokens, size.dim
    return DataSet(_queries(size, sharpness, rng), _normal(shape, rng), _normal(shape, rng))


def clustered(size: Size, sharpness: float, seed: int) -> DataSet:
    """Each page belongs to one of 32 clusters: half of the variance is the cluster's centre."""
    rng = Generator().manual_seed(seed)
    of_page = torch.randint(32, (size.pages,), generator=rng)
    return _by_cluster(size, sharpness, of_page.repeat_interleave(PAGE), rng)


def drifting(size: Size, sharpness: float, seed: int) -> DataSet:
    """Half of the variance is a random walk that forgets over 256 tokens, of keys and of values."""
    rng = Generator().manual_seed(seed)
    keep = math.exp(-1 / 256)
    steps = _normal((2, size.kv_heads, size.tokens, size.dim), rng)
    walk = torch.empty_like(steps)
    walk[:, :, 0] = steps[:, :, 0]
    for i in range(1, size.tokens):
        walk[:, :, i] = keep * walk[:, :, i - 1] + math.sqrt(1 - keep**2) * steps[:, :, i]
    k, v = _mixed(walk, _normal(steps.shape, rng))
    return DataSet(_queries(size, sharpness, rng), k, v)


def heavy_tailed(size: Size, sharpness: float, seed: int) -> DataSet:
    """Student's t with 3 degrees of freedom, scaled to variance 1: keys and values."""
    rng = Generator().manual_seed(seed)
    shape = 2, size.kv_heads, size.tokens, size.dim
    chi = _normal((3, *shape), rng).square().sum(0)
    k, v = _normal(shape, rng) / chi.sqrt()  # t is normal / sqrt(chi² / 3), of variance 3
    return DataSet(_queries(size, sharpness, rng), k, v)


def needle(size: Size, sharpness: float, seed: int) -> DataSet:
    """iid, but one token for each query, whose key answers all of its heads: it holds about 0.9 of
    the softmax."""
    data = iid(size, sharpness, seed)
    return _with_needles(data, size, sharpness)


def heads_agree(size: Size, sharpness: float, seed: int) -> DataSet:
    """All query heads want one and the same sixteenth of the pages."""
    return _wanting(size, sharpness, seed, [0] * (size.kv_heads * size.group))


# Sets that defeat a method


def scattered(size: Size, sharpness: float, seed: int) -> DataSet:
    """The clusters of `clustered`, but every token draws its own: all pages are alike."""
    rng = Generator().manual_seed(seed)
    return _by_cluster(size, sharpness, torch.randint(32, (size.tokens,), generator=rng), rng)


def correlated(size: Size, sharpness: float, seed: int) -> DataSet:
    """iid keys; a token's value is its key: weights and values go together within a page, so that
    the mean value of a page is none of its heavy tokens'."""
    data = iid(size, sharpness, seed)
    return DataSet(data.q, data.k, data.k.clone())


def needle_off_channels(size: Size, sharpness: float, seed: int) -> DataSet:
    """Queries are large on a quarter of the channels; the needles answer on all the others."""
    data = iid(size, sharpness, seed)
    loud, level = size.dim // 4, 1.25
    sizes = torch.full((size.dim,), math.sqrt((size.dim - loud * level**2) / (size.dim - loud)))
    sizes[:loud] = level
    data = DataSet(data.q.sign() * sizes * sharpness, data.k, data.v)
    return _with_needles(data, size, sharpness, (torch.arange(size.dim) >= loud).float())


def needle_on_quiet_channels(size: Size, sharpness: float, seed: int) -> DataSet:
    """Keys spread twice as far on an eighth of the channels; the needles answer on the others."""
    data = iid(size, sharpness, seed)
    loud = size.dim // 8
    sizes = torch.full((size.dim,), math.sqrt((size.dim - 4 * loud) / (size.dim - loud)))
    sizes[:loud] = 2
    data = DataSet(data.q, data.k * sizes, data.v)
    return _with_needles(data, size, sharpness, (torch.arange(size.dim) >= loud).float())


def needle_of_small_norm_ratio(size: Size, sharpness: float, seed: int) -> DataSet:
    """The other values of a needle's page are a fifth as large."""
    data = needle(size, sharpness, seed)
    v = data.v.clone()
    for at in data.needles:
        others = _others(at)
        v[:, others] *= 0.2
    return DataSet(data.q, data.k, v, data.needles)


def needle_against_its_page(size: Size, sharpness: float, seed: int) -> DataSet:
    """The other keys of a needle's page score 3 less for its query."""
    data = needle(size, sharpness, seed)
    k = data.k.clone()
    for head in range(size.kv_heads):
        for at, answer in zip(data.needles, _answers(data.q, size, head), strict=True):
            k[head, _others(at)] -= 3 * answer
    return DataSet(data.q, k, data.v, data.needles)


def outliers_everywhere(size: Size, sharpness: float, seed: int) -> DataSet:
    """`clustered`, but on each channel one token of every page has 6 and another -6: all pages have
    the same extremes."""
    data = clustered(size, sharpness, seed)
    rng = Generator().manual_seed(seed + 1)
    k = data.k.unflatten(1, (size.pages, PAGE)).clone()
    places = torch.rand(k.shape, generator=rng).argsort(dim=2)[:, :, :2]
    values = torch.tensor([6.0, -6.0])[:, None].expand_as(places)
    return DataSet(data.q, k.scatter(2, places, values).flatten(1, 2), data.v)


def heads_disagree(size: Size, sharpness: float, seed: int) -> DataSet:
    """Each query head wants another sixteenth of the pages."""
    return _wanting(size, sharpness, seed, range(size.kv_heads * size.group))


def needle_against_its_cluster(size: Size, sharpness: float, seed: int) -> DataSet:
    """One token in 40 has a key near a needle's direction, which is mostly one that no query looks
    along, and scores 1 less than nothing: by cosine they are the needle's cluster, and its mean
    points away."""
    data = needle(size, sharpness, seed)
    rng = Generator().manual_seed(seed + 1)
    k = data.k.clone()
    free = torch.randperm(size.tokens, generator=rng)
    free = free[~torch.isin(free, torch.tensor(data.needles))]
    for head in range(size.kv_heads):
        own = _heads(data.q, size, head).flatten(0, 1)
        for i, answer in enumerate(_answers(data.q, size, head)):
            blind = _normal((size.dim,), rng)
            blind -= torch.linalg.pinv(own) @ (own @ blind)
            blind /= blind.norm()
            k[head, data.needles[i]] += 1.5 * data.k[head, data.needles[i]].norm() * blind
            mates = free[i :: size.queries][: size.tokens // 40]
            noise = 0.3 * _normal((len(mates), size.dim), rng)
            k[head, mates] = math.sqrt(size.dim) * blind - answer + noise
    return DataSet(data.q, k, data.v, data.needles)


RECIPES = [
    Recipe("iid", iid, "normal keys and values"),
    Recipe("clustered", clustered, "clusters aligned with pages, values by cluster"),
    Recipe("drifting", drifting, "keys and values walk over 256 tokens"),
    Recipe("heavy-tailed", heavy_tailed, "Student t, 3 degrees of freedom"),
    Recipe("needle", needle, "iid and one token that answers"),
    Recipe("heads agree", heads_agree, "all heads want one sixteenth of the pages"),
    Recipe("scattered", scattered, "clusters across pages", "pages", "clustered"),
    Recipe("correlated", correlated, "values are the keys", "repair", "iid"),
    Recipe(
        "needle off channels", needle_off_channels,
        "it answers outside the largest query channels", "sparq", "needle",
    ),
    Recipe(
        "needle on quiet channels", needle_on_quiet_channels,
        "it answers where keys spread least", "double_sparsity", "needle",
    ),
    Recipe(
        "needle of small ratio", needle_of_small_norm_ratio,
        "the values of its page are small", "paged_eviction", "iid",
    ),
    Recipe(
        "needle against its page", needle_against_its_page,
        "its page's mean points away", "centroid", "needle",
    ),
    Recipe(
        "needle against its cluster", needle_against_its_cluster,
        "its cluster's mean points away", "clusterkv", "needle",
    ),
    Recipe(
        "outliers everywhere", outliers_everywhere,
        "two opposite outliers on each channel of each page", "quest", "clustered",
    ),
    Recipe(
        "heads disagree", heads_disagree,
        "each head wants other pages", "tokenselect", "heads agree",
    ),
]  # fmt: skip
BY_NAME = {recipe.name: recipe for recipe in RECIPES}


def _normal(shape: tuple[int, ...] | torch.Size, rng: Generator) -> Tensor:
    return torch.randn(shape, generator=rng)


def _queries(size: Size, sharpness: float, rng: Generator) -> Tensor:
    return sharpness * _normal((size.queries, size.kv_heads * size.group, size.dim), rng)


def _mixed(a: Tensor, b: Tensor) -> Tensor:
    return math.sqrt(0.5) * (a + b)


def _by_cluster(size: Size, sharpness: float, cluster_of: Tensor, rng: Generator) -> DataSet:
    centres = _normal((2, size.kv_heads, int(cluster_of.max()) + 1, size.dim), rng)
    own = centres[:, :, cluster_of]
    k, v = _mixed(own, _normal(own.shape, rng))
    return DataSet(_queries(size, sharpness, rng), k, v)


def _wanting(size: Size, sharpness: float, seed: int, groups: Sequence[int]) -> DataSet:
    """Pages fall into 16 groups at random; query head h finds about 0.9 of its softmax in group
    groups[h], 5 nats above the rest."""
    rng = Generator().manual_seed(seed)
    heads = size.kv_heads * size.group
    shape = size.kv_heads, size.tokens, size.dim
    k, v = _normal(shape, rng), _normal(shape, rng)
    wanted = torch.linalg.qr(_normal((size.dim, heads), rng)).Q.T
    q = _queries(size, sharpness, rng)
    along = (q * wanted).sum(-1, keepdim=True)
    q = q + (4 * sharpness - along) * wanted
    group_of = (torch.randperm(size.pages, generator=rng) % 16).repeat_interleave(PAGE)
    gain = 5 * math.sqrt(size.dim) / (4 * sharpness)
    for head in range(heads):
        own = group_of == groups[head]
        k[head // size.group, own] += gain * wanted[head]
        v[head // size.group, own] += _normal((size.dim,), rng)
    return DataSet(q, k, v)


def _others(at: int) -> Tensor:
    """The positions of a token's page but its own."""
    page = torch.arange(at // PAGE * PAGE, (at // PAGE + 1) * PAGE)
    return page[page != at]


def _heads(q: Tensor, size: Size, head: int) -> Tensor:
    """The queries of a KV head, [Q, G, D]."""
    return q[:, head * size.group : (head + 1) * size.group]


def _answers(q: Tensor, size: Size, head: int, channels: Tensor | None = None) -> Tensor:
    """[Q, D]: the shortest keys, on some channels alone, that score 1 for all heads of their query
    and 0 for those of every other."""
    own = _heads(q, size, head).flatten(0, 1)
    wanted = torch.eye(size.queries).repeat_interleave(size.group, dim=0) * math.sqrt(size.dim)
    return (torch.linalg.pinv(own if channels is None else own * channels) @ wanted).T


def _places(size: Size) -> list[int]:
    """A needle for each query, in pages from the second on and before the last third, where no
    method reads in any case."""
    at = torch.linspace(2 * PAGE, 0.65 * size.tokens, size.queries).long().tolist()
    return [place // PAGE * PAGE + (11 + 17 * i) % PAGE for i, place in enumerate(at)]


def _with_needles(
    data: DataSet, size: Size, sharpness: float, channels: Tensor | None = None
) -> DataSet:
    """Keys that answer all heads of a query, on some channels alone: e² times what all other tokens
    hold on average, 0.88 of the softmax."""
    nats = math.log(size.tokens) + sharpness**2 / 2 + 2
    needles, k = _places(size), data.k.clone()
    for head in range(size.kv_heads):
        k[head, needles] = nats * _answers(data.q, size, head, channels)
    return DataSet(data.q, k, data.v, tuple(needles))


# Measuring


@dataclass(frozen=True)
class Asked:
    """A cache, its queries [Q, Hq, 1, D] and what dense attention answers. The Q sequences of the
    cache are one: they share their pages."""

    q: Tensor
    kv: lath.PagedKV
    dense: Tensor
    backend: str


@dataclass(frozen=True)
class Measured:
    """Means over queries and heads. read: the share of the tokens that are read, those outside the
    budget included. mass: of the softmax, recall: of the best list of the same length. dropped,
    repaired, mixed: Σ|o - dense| / Σ|dense| with repair False, True, "mean" (None: no such).
    exact: without and with repair it is the dense result, bit for bit."""

    read: float
    mass: float
    recall: float
    dropped: float
    repaired: float
    mixed: float | None
    exact: bool


def ask(data: DataSet, backend: str) -> Asked:
    heads, _, dim = data.k.shape
    kv = lath.PagedKV(heads, dim, 1, backend=backend)
    kv.append(data.k[None].bfloat16(), data.v[None].bfloat16())
    kv.reorder([0] * len(data.q))
    q = data.q[:, :, None].bfloat16()
    return Asked(q, kv, lath.decode_attention(q, kv), backend)


def measure(asked: Asked, selector: str, budget: int | float) -> Measured:
    q, kv = asked.q, asked.kv
    ids = lath.select(q, kv, selector, budget)

    def read(repair: bool | str) -> Tensor:
        return lath.decode_attention(q, kv, pages=ids, repair=repair)

    tokens = ids.counts.double().mean().item() * (PAGE if ids.granularity == "page" else 1)
    parts = sum(span.first + span.last for span in kv.spans) / kv.batch
    some, mended = read(False), read(True)
    return Measured(
        (tokens + parts) / len(kv),
        lath.captured_mass(q, kv, ids).mean().item(),
        lath.recall(q, kv, ids).mean().item(),
        relative_l1(some, asked.dense),
        relative_l1(mended, asked.dense),
        None if ids.mass is None else relative_l1(read("mean"), asked.dense),
        torch.equal(some, asked.dense) and torch.equal(mended, asked.dense),
    )


def relative_l1(o: Tensor, dense: Tensor) -> float:
    return ((o.double() - dense.double()).abs().sum() / dense.double().abs().sum()).item()
