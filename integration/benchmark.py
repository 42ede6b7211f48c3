"""Paired timing of `lath.linear` against other implementations, in one process and one run.

Every contender is called in turn within each round, so that a disturbance hits all of them; weights
are cold (each call takes the next of enough copies to exceed the caches), as in a decode step; what
is reported are medians over rounds and the ratio of the medians.
"""

from __future__ import annotations

import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import lath
from lath.formats.activations import ActivationFormat
from lath.formats.families import weight_codec
from lath.integration import ceilings
from lath.integration.ceilings import CeilingCalls, Ceilings
from lath.integration.peers import PEERS, PeerMissingError, PeerSetting, make_peer
from lath.verbs.backends import resolve_backend
from lath.verbs.kinds import kind_of

# A block of calls is long against the clock's resolution and short against a time slice.
BLOCK_SECONDS = 0.03
# With several threads: how long each contender's threads may take to stop waiting for work.
PAUSE_SECONDS = 0.005


@dataclass(frozen=True)
class BenchRow:
    """One comparison. shape: "KxN" (in_features x out_features). ratio: peer time / lath time.

    ceilings: of the same rounds. of_read: bytes of the CPU's view per second, of those; of_dots:
    operations, None where activations are not multiplied as int8.
    """

    shape: str
    m: int
    codec: str
    activations: str
    backend: str
    threads: int
    median_us: float
    spread_us: tuple[float, float]
    gb_per_s: float
    gops: float
    ceilings: Ceilings
    of_read: float
    of_dots: float | None
    peer: str = ""
    peer_median_us: float = 0.0
    peer_spread_us: tuple[float, float] = (0.0, 0.0)
    ratio: float = 0.0


def parse_shape(text: str) -> tuple[int, int]:
    """ "2560x6912" → (K, N)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"shapes must be like '2560x6912' (K x N), got {text!r}")
    return int(parts[0]), int(parts[1])


def default_activations(codec: str) -> ActivationFormat:
    """int8 with the weight's own group: what `patch` picks on a CPU."""
    return ActivationFormat("int8", weight_codec(codec).group)


def bench_linear(
    k: int,
    n: int,
    m: int,
    codec: str,
    peers: list[str],
    activations: ActivationFormat | None = None,
    rounds: int = 9,
    paths: Mapping[str, Path] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[BenchRow], dict[str, str]]:
    """x [m, k] against a weight [n, k]: lath on the CPU and each peer, interleaved.

    x is bf16 for lath and each peer's own dtype for the peer; the quantisation of activations is
    part of lath's time. paths: of peers, as in `PeerSetting`. clock: seconds; `time.thread_time`
    leaves out what other processes take from a thread that works alone. Returns a row for each
    peer (one without a peer if there is none), and the peers that are missing with the reason.
    Raises ValueError for an unknown peer.
    """
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"peers must be among {sorted(PEERS)}, got {peer!r}")
    activations = activations or default_activations(codec)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0))
    dense, layers, weight = _cold_layers(k, n, codec, activations)
    values = x.bfloat16()
    highest = CeilingCalls()
    others, missing = _peer_calls(peers, dense, x, paths)
    calls: dict[str, Callable[[int], object]] = {
        "lath": lambda i: layers[i % len(layers)](values), **highest.calls(), **others,
    }  # fmt: skip
    with torch.inference_mode():
        seconds = time_interleaved(calls, rounds, clock)
    found, own = highest.take(seconds), seconds.pop("lath")
    gops = 2 * m * n * k / statistics.median(own) / 1e9
    shared = BenchRow(
        shape=f"{k}x{n}",
        m=m,
        codec=codec,
        activations=str(activations),
        backend=resolve_backend("auto", torch.device("cpu")),
        threads=torch.get_num_threads(),
        median_us=statistics.median(own) * 1e6,
        spread_us=_spread(own),
        gb_per_s=weight.nbytes / statistics.median(own) / 1e9,
        gops=gops,
        ceilings=found,
        of_read=found.of_read(weight.view_nbytes / statistics.median(own) / 1e9),
        of_dots=found.of_dots(gops) if activations.is_integer else None,
    )
    return [_beside(shared, peer, theirs) for peer, theirs in seconds.items()] or [shared], missing


def _peer_calls(
    names: Sequence[str], dense: torch.Tensor, x: torch.Tensor, paths: Mapping[str, Path] | None
) -> tuple[dict[str, Callable[[int], object]], dict[str, str]]:
    """The calls of the peers that are here, and why the others are not."""
    calls, missing = {}, {}
    setting = PeerSetting(_copies, torch.get_num_threads(), paths or {})
    for name in names:
        try:
            calls[name], _ = make_peer(name, dense, x, setting)
        except PeerMissingError as error:
            missing[name] = str(error)
    return calls, missing


def _beside(row: BenchRow, peer: str, seconds: list[float]) -> BenchRow:
    """The row of lath's time with that of a peer."""
    median = statistics.median(seconds) * 1e6
    return replace(
        row, peer=peer, peer_median_us=median, peer_spread_us=_spread(seconds),
        ratio=median / row.median_us,
    )  # fmt: skip


def _spread(seconds: list[float]) -> tuple[float, float]:
    return min(seconds) * 1e6, max(seconds) * 1e6


@functools.lru_cache(maxsize=1)
def _cold_layers(
    k: int, n: int, codec: str, activations: ActivationFormat
) -> tuple[torch.Tensor, list[Callable[[torch.Tensor], object]], lath.PackedWeight]:
    """A weight [n, k], layers over enough copies of it to be cold, and one of the copies."""
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) / k**0.5
    packed = lath.quantize(dense, codec)

    def copy() -> lath.PackedWeight:
        tensors = {name: tensor.clone() for name, tensor in packed.tensors.items()}
        return packed.from_tensors(packed.codec, packed.shape, tensors)

    weights = [copy() for _ in range(_copies(packed.nbytes))]
    # As a patched module calls it: prepared once. Each weight is repacked for this CPU by that.
    prepare = kind_of(packed).function("cpu", "prepare")
    return dense, [prepare(weight, None, activations) for weight in weights], weights[0]


def _copies(nbytes: int) -> int:
    return max(2, -(-ceilings.COLD_BYTES // max(nbytes, 1)))


def time_interleaved(
    calls: dict[str, Callable[[int], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of each contender in each round; `calls[name](i)` runs its i-th call."""
    counts, positions = {}, dict.fromkeys(calls, 0)
    for name, call in calls.items():
        call(0)  # compiles, repacks, allocates
        start = clock()
        call(1)
        once = clock() - start
        counts[name] = max(1, min(2000, int(BLOCK_SECONDS / max(once, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            first = positions[name]
            if torch.get_num_threads() > 1:
                # Threads of the one before still spin on the cores; those of this one are woken.
                time.sleep(PAUSE_SECONDS)
                call(first - 1 if first else 0)
            start = clock()
            for i in range(first, first + counts[name]):
                call(i)
            seconds[name].append((clock() - start) / counts[name])
            positions[name] = first + counts[name]
    return seconds


def machine_facts() -> dict[str, str]:
    """What a figure is worth nothing without: processor, cores, versions, commit."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # not Linux: the platform's own name has to do
    facts = {
        "processor": model,
        "cores": str(os.cpu_count()),
        "architecture": lath.describe_device("cpu").architecture,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lath": lath.__version__,
        "commit": _commit(),
    }
    try:
        import numba
    except ImportError:
        facts["numba"] = "not installed"
    else:
        facts["numba"] = numba.__version__
    return facts


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip() or "unknown"


def rows_as_markdown(rows: list[BenchRow], command: str, notes: Sequence[str] = ()) -> str:
    """A table for a report: the command, the machine, a line per comparison, then the notes."""
    facts = ", ".join(f"{key} {value}" for key, value in machine_facts().items())
    lines = [
        f"    {command}",
        "",
        f"{facts}. {rows[0].threads} thread(s), weights cold, calls interleaved, medians (fastest "
        "and slowest round in brackets), x in bf16, quantisation of activations included. Of read: "
        "bytes of the CPU's view per second, of a plain read in the same rounds (GB/s in "
        "brackets); of dots: of int8 products in registers (GOPS in brackets).",
        "",
        "| K x N | M | codec | activations | lath µs | peer | peer µs | ratio | GB/s | of read | "
        "GOPS | of dots |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own, theirs = (
            f"{median:.0f} ({low:.0f}-{high:.0f})"
            for median, (low, high) in (
                (row.median_us, row.spread_us),
                (row.peer_median_us, row.peer_spread_us),
            )
        )
        peer = f"{row.peer} | {theirs} | {row.ratio:.2f}" if row.peer else " | | "
        lines.append(
            f"| {row.shape} | {row.m} | `{row.codec}` | `{row.activations}` | {own} | {peer} | "
            f"{row.gb_per_s:.1f} | {row.of_read:.2f} ({row.ceilings.gb_per_s:.1f}) | "
            f"{row.gops:.0f} | {share_of_dots(row)} |"
        )
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def share_of_dots(row: BenchRow) -> str:
    """ "0.63 (461)", or a dash where int8 products are not what is computed."""
    return "–" if row.of_dots is None else f"{row.of_dots:.2f} ({row.ceilings.gops:.0f})"


def rows_as_json(rows: list[BenchRow]) -> list[dict[str, object]]:
    """A list of rows, each with the machine it was measured on."""
    facts = machine_facts()
    return [{**asdict(row), "machine": facts} for row in rows]
