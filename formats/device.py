"""DeviceDescription: what a plan needs to know of a device, so that devices can be invented."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["cuda", "hip", "cpu"]


@dataclass(frozen=True)
class DeviceDescription:
    """kind: "cuda", "hip" or "cpu". architecture: "sm_90", "gfx942", or for a CPU "avx512_vnni",
    "avx2" or "portable". compute_units: SMs, CUs or cores. shared_memory: bytes one block may use.
    bandwidth: bytes per second from memory, an estimate that only ranks plans. lanes: threads of a
    warp or wavefront. threads: threads a CPU operation may use. wide_look_up: a CPU looks bytes up
    in 128 others in registers (AVX512_VBMI). quick_permutation: it looks sums of three
    activations up in less time than it multiplies them (Zen 4).
    """

    kind: Kind
    name: str
    architecture: str
    compute_units: int
    shared_memory: int = 0
    bandwidth: float = 0.0
    lanes: int = 32
    threads: int = 1
    wide_look_up: bool = False
    quick_permutation: bool = False

    @property
    def capability(self) -> int:
        """NVIDIA compute capability times ten (90 for sm_90); 0 elsewhere."""
        return int(self.architecture[3:]) if self.kind == "cuda" else 0


def _nvidia(name: str, sm: int, units: int, shared: int, bandwidth: float) -> DeviceDescription:
    return DeviceDescription("cuda", name, f"sm_{sm}", units, shared, bandwidth)


def _amd(name: str, gfx: str, units: int, shared: int, bandwidth: float) -> DeviceDescription:
    return DeviceDescription("hip", name, gfx, units, shared, bandwidth, lanes=64)


# One device per architecture: unit counts, shared memory and bandwidth from the vendors' data
# sheets. They stand in for a device that is not here, in `lath plan --device` and in tests.
KNOWN_DEVICES = {
    device.architecture: device
    for device in [
        _nvidia("Tesla T4", 75, 40, 65536, 320e9),
        _nvidia("A100 SXM 80 GB", 80, 108, 166912, 2039e9),
        _nvidia("A10", 86, 72, 101376, 600e9),
        _nvidia("GeForce RTX 4090", 89, 128, 101376, 1008e9),
        _nvidia("H100 SXM", 90, 132, 232448, 3352e9),
        _nvidia("B200", 100, 148, 232448, 8000e9),
        _nvidia("GeForce RTX 5090", 120, 170, 101376, 1792e9),
        _amd("Instinct MI250X (one die)", "gfx90a", 110, 65536, 1638e9),
        _amd("Instinct MI300X", "gfx942", 304, 65536, 5300e9),
        _amd("Instinct MI355X", "gfx950", 256, 163840, 8000e9),
        DeviceDescription(
            "cpu", "x86-64 with AVX512-VNNI", "avx512_vnni", 8, bandwidth=40e9, wide_look_up=True
        ),
        DeviceDescription("cpu", "x86-64 with AVX2", "avx2", 8, bandwidth=40e9),
        DeviceDescription("cpu", "portable CPU", "portable", 8, bandwidth=40e9),
    ]
}


def known_device(architecture: str) -> DeviceDescription:
    """The stand-in for an architecture; ValueError listing the known ones."""
    if architecture not in KNOWN_DEVICES:
        raise ValueError(f"device must be one of {sorted(KNOWN_DEVICES)}, got {architecture!r}")
    return KNOWN_DEVICES[architecture]


def has_e4m3(architecture: str) -> bool:
    """Whether Triton has E4M3 (OCP) numbers and their dot on "sm_90", "gfx950", ..., "interpreter";
    elsewhere fp16 holds them. gfx942 has only numbers of another bias."""
    if architecture.startswith("sm_"):
        return int(architecture[3:]) >= 89
    return architecture in ("gfx950", "interpreter")


@functools.cache
def describe_gpu(index: int) -> DeviceDescription:
    """The GPU `cuda:index` of this machine, read from the driver once."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        architecture = str(properties.gcnArchName).split(":")[0]
        kind: Kind = "hip"
    else:
        architecture, kind = f"sm_{properties.major}{properties.minor}", "cuda"
    like = KNOWN_DEVICES.get(architecture)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 49152
    return DeviceDescription(
        kind=kind,
        name=properties.name,
        architecture=architecture,
        compute_units=properties.multi_processor_count,
        shared_memory=shared,
        bandwidth=like.bandwidth if like else 0.0,
        lanes=getattr(properties, "warp_size", 32),
    )
