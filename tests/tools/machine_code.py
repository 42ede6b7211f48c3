"""What a compiled kernel will cost, read from its machine code; no GPU is needed.

`resources(kernel)` is quick (milliseconds): registers, spills, shared memory, how many blocks fit
a compute unit, and which tensor instructions there are. `analyze(kernel)` also disassembles the
kernel and describes its hot loop; it takes about 0.4 s for NVIDIA, and the result is remembered on
disk under the sha256 of the binary.

Counts are per warp. They say how much is issued, not how long it takes: latency, bank conflicts
and caches are not in them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tools import amdgcn, sass
from tools.cache import remember
from tools.control_flow import Flow, NaturalLoop, natural_loops
from tools.instructions import CLASSES, Instruction

# Part of the key of remembered analyses: raise it when the meaning of a figure changes.
ANALYSIS_VERSION = 1

# Warps, KiB of shared memory and blocks that one NVIDIA multiprocessor holds at once.
_NVIDIA_LIMITS = {
    75: (32, 64, 16),
    80: (64, 164, 32),
    86: (48, 100, 16),
    89: (48, 100, 24),
    90: (64, 228, 32),
    100: (64, 228, 32),
    120: (48, 100, 24),
}
_AMD_SHARED_MEMORY = {"gfx90a": 65536, "gfx942": 65536, "gfx950": 163840}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one block of a kernel needs.

    registers: per thread. spill_bytes: of stack per thread, 0 if nothing is spilled.
    shared_memory: bytes per block. warps: per block. lanes: threads of a warp.
    blocks_per_unit: blocks that fit one compute unit at once, and `limiter`, what stops one more;
        0 means that the kernel cannot run.
    tensor_instructions: count by family ("HMMA", "IMMA", "HGMMA", "QMMA", "UTCHMMA", or AMD's whole
        name, "v_mfma_f32_16x16x16_f16").
    """

    architecture: str
    registers: int
    spill_bytes: int
    shared_memory: int
    warps: int
    lanes: int
    blocks_per_unit: int
    limiter: str
    tensor_instructions: dict[str, int]

    @property
    def warps_per_unit(self) -> int:
        """Warps that one compute unit holds at once."""
        return self.blocks_per_unit * self.warps

    def uses(self, family: str) -> bool:
        """Whether a tensor instruction of this family ("HMMA", "v_mfma", "UTC") occurs."""
        return any(name.startswith(family) for name in self.tensor_instructions)


@dataclasses.dataclass(frozen=True)
class Loop:
    """One trip of one loop (or of the whole kernel), for one warp.

    counts: instructions by class (tools.instructions.CLASSES), zeros left out. tensor: tensor
    instructions by name with their shape. multiply_adds: of all of them; 0 where the name has no
    shape (tcgen05). global_loads: count by name and bits per lane ("LDGSTS.128"). global_bytes and
    shared_bytes: loaded from global / moved through shared memory; bulk copies (TMA) not counted.
    stall: cycles of issue that the compiler scheduled (NVIDIA).
    """

    instructions: int
    counts: dict[str, int]
    tensor: dict[str, int]
    multiply_adds: int
    global_loads: dict[str, int]
    global_bytes: int
    shared_bytes: int
    stall: int


@dataclasses.dataclass(frozen=True)
class Analysis:
    """resources, the hot loop, and sizes of the whole kernel.

    hot: the innermost loop with the most tensor work, or the longest one that loads; if the kernel
    has no such loop (the compiler unrolled it), the whole kernel, and `looped` is False.
    """

    resources: Resources
    hot: Loop
    looped: bool
    loops: int
    instructions: int

    def weights_per_trip(self, tokens: int) -> int:
        """Weights that one trip of a block multiplies, if each meets `tokens` rows of x (padded).

        ValueError where the tensor instructions do not tell their shapes.
        """
        total = self.hot.multiply_adds * self.resources.warps
        if not total:
            raise ValueError(f"{self.resources.architecture}: tensor instructions have no shape")
        return total // tokens

    def non_tensor_per_weight(self, weights_per_trip: int) -> float:
        """Thread instructions other than tensor ones that a block issues per weight in its loop."""
        other = self.hot.instructions - self.hot.counts.get("tensor", 0)
        return other * self.resources.warps * self.resources.lanes / weights_per_trip

    def __str__(self) -> str:
        r, hot = self.resources, self.hot
        counts = " ".join(f"{name}={hot.counts[name]}" for name in CLASSES if name in hot.counts)
        return (
            f"{r.architecture}: {r.registers} registers, {r.spill_bytes} B spilled, "
            f"{r.shared_memory} B shared, {r.blocks_per_unit} blocks of {r.warps} warps per unit "
            f"({r.limiter}); {'hot loop' if self.looped else 'whole kernel'}: "
            f"{hot.instructions} instructions ({counts}), {hot.tensor}, loads {hot.global_loads}"
        )


def resources(kernel: Any) -> Resources:
    """Resource usage and tensor instructions of a triton CompiledKernel, without disassembling."""
    if kernel.metadata.target.backend == "cuda":
        return _nvidia_resources(kernel)
    return _amd_resources(kernel)


def analyze(kernel: Any) -> Analysis:
    """The whole analysis of a triton CompiledKernel, remembered by the sha256 of its binary."""
    usage = resources(kernel)
    key = hashlib.sha256(kernel.kernel).hexdigest()
    stored = remember(f"analysis-{ANALYSIS_VERSION}", key, lambda: _disassembled(kernel))
    return Analysis(
        resources=usage,
        hot=Loop(**stored["hot"]),
        looped=stored["looped"],
        loops=stored["loops"],
        instructions=stored["instructions"],
    )


def tensor_loops(kernel: Any) -> list[Loop]:
    """Every loop with tensor instructions and no such loop inside, the shortest first; remembered.

    A kernel may have one loop for tiles that need no mask and one for those that do.
    """
    key = hashlib.sha256(kernel.kernel).hexdigest()
    stored = remember(f"tensor-loops-{ANALYSIS_VERSION}", key, lambda: _tensor_loops(kernel))
    return [Loop(**loop) for loop in stored["loops"]]


def working_loops(kernel: Any) -> list[Loop]:
    """The `tensor_loops` over whole tiles: less than half of the most work is a remainder."""
    loops = tensor_loops(kernel)
    most = max((sum(loop.tensor.values()) for loop in loops), default=0)
    return [loop for loop in loops if 2 * sum(loop.tensor.values()) > most]


def _tensor_loops(kernel: Any) -> dict[str, Any]:
    instructions, flow = _instructions(kernel)
    found = _loops_having(instructions, natural_loops(flow), "tensor")
    lanes = kernel.metadata.target.warp_size
    return {
        "loops": [dataclasses.asdict(_describe(body, lanes)) for body in sorted(found, key=len)]
    }


def _instructions(kernel: Any) -> tuple[list[Instruction], Flow]:
    if kernel.metadata.target.backend == "cuda":
        return sass.parse(sass.disassemble(kernel.asm["cubin"]))
    return amdgcn.parse(kernel.asm["amdgcn"])


def _disassembled(kernel: Any) -> dict[str, Any]:
    instructions, flow = _instructions(kernel)
    lanes = kernel.metadata.target.warp_size
    loops = natural_loops(flow)
    hot = _hottest(instructions, loops)
    return {
        "hot": dataclasses.asdict(_describe(hot if hot is not None else instructions, lanes)),
        "looped": hot is not None,
        "loops": len(loops),
        "instructions": len(instructions),
    }


def _hottest(
    instructions: Sequence[Instruction], loops: Sequence[NaturalLoop]
) -> list[Instruction] | None:
    """The loop with the most tensor work of those with none inside, else the longest that loads.

    A loop that waits for a barrier is a loop too: it may lie inside the hot one.
    """

    def tensor_work(body: list[Instruction]) -> tuple[int, int, int]:
        tensor = [i for i in body if i.kind == "tensor"]
        return sum(i.multiply_adds for i in tensor), len(tensor), len(body)

    if with_tensor := _loops_having(instructions, loops, "tensor"):
        return max(with_tensor, key=tensor_work)
    loading = _loops_having(instructions, loops, "global_load", "shared_load")
    return max(loading, key=len, default=None)


def _loops_having(
    instructions: Sequence[Instruction], loops: Sequence[NaturalLoop], *kinds: str
) -> list[list[Instruction]]:
    """Bodies of the loops with such an instruction, but those around another one that has it."""
    bodies = [[instructions[i] for i in loop.instructions] for loop in loops]
    found = [any(i.kind in kinds for i in body) for body in bodies]
    return [
        body
        for body, loop, has in zip(bodies, loops, found, strict=True)
        if has and not any(found[inner] for inner in loop.inner)
    ]


def _describe(body: Sequence[Instruction], lanes: int) -> Loop:
    def moved(*kinds: str) -> int:
        return sum(i.width * lanes for i in body if i.kind in kinds)

    tensor = Counter(_shape_only(i.name) for i in body if i.kind == "tensor")
    loads = Counter(
        f"{re.split(r'[._]', i.name)[0]}.{i.width * 8}" if i.width else i.name.split(".")[0]
        for i in body
        if i.kind == "global_load"
    )
    return Loop(
        instructions=len(body),
        counts=dict(Counter(i.kind for i in body)),
        tensor=dict(tensor),
        multiply_adds=sum(i.multiply_adds for i in body),
        global_loads=dict(loads),
        global_bytes=moved("global_load"),
        shared_bytes=moved("shared_load", "shared_store"),
        stall=sum(i.stall for i in body),
    )


def _shape_only(name: str) -> str:
    return re.sub(r"\.(gdesc|reuse).*", "", name)


def _nvidia_resources(kernel: Any) -> Resources:
    metadata = kernel.metadata
    registers, stack = sass.resource_usage(kernel.asm["cubin"])
    capability, warps = metadata.target.arch, metadata.num_warps
    blocks, limiter = _nvidia_occupancy(capability, registers, metadata.shared, warps)
    counts = dict(sass.tensor_opcodes(kernel.asm["cubin"]))
    if "UTCMMA" in counts:  # one opcode for all types; the PTX names the type of each
        letters = {"i8": "I", "f16": "H", "tf32": "H"}
        kinds = Counter(re.findall(r"tcgen05\.mma\S*kind::(\w+)", kernel.asm["ptx"]))
        total = counts.pop("UTCMMA") if kinds else 0
        for kind, count in kinds.items():
            name = f"UTC{letters.get(kind, 'Q')}MMA"
            counts[name] = counts.get(name, 0) + (count if len(kinds) > 1 else total)
    return Resources(
        architecture=f"sm_{capability}",
        registers=registers,
        spill_bytes=stack,
        shared_memory=metadata.shared,
        warps=warps,
        lanes=32,
        blocks_per_unit=blocks,
        limiter=limiter,
        tensor_instructions=counts,
    )


def _nvidia_occupancy(
    capability: int, registers: int, shared_memory: int, warps: int
) -> tuple[int, str]:
    """Blocks per multiprocessor, and what limits them."""
    if capability not in _NVIDIA_LIMITS:
        raise ValueError(f"architecture must be one of {sorted(_NVIDIA_LIMITS)}, got {capability}")
    most_warps, kibibytes, most_blocks = _NVIDIA_LIMITS[capability]
    # 65536 registers, given to a warp in units of 256, to warps in units of four.
    warp_registers = -(-registers * 32 // 256) * 256
    fitting_warps = 65536 // warp_registers // 4 * 4
    # From Ampere on the system keeps 1 KiB of shared memory per block.
    reserved = 1024 if capability >= 80 else 0
    block_memory = -(-(shared_memory + reserved) // 128) * 128
    limits = {
        "registers": fitting_warps // warps,
        "shared memory": kibibytes * 1024 // block_memory if block_memory else most_blocks,
        "warps": most_warps // warps,
        "blocks": most_blocks,
    }
    limiter = min(limits, key=lambda name: limits[name])
    return limits[limiter], limiter


@functools.lru_cache(maxsize=16)
def _amd_tensor_instructions(text: str) -> dict[str, int]:
    names = re.findall(r"^\s+(v_s?mfma\w*|v_s?wmma\w*)", text, flags=re.MULTILINE)
    return dict(Counter(names))


def _amd_resources(kernel: Any) -> Resources:
    metadata, text = kernel.metadata, kernel.asm["amdgcn"]
    architecture, warps = metadata.target.arch, metadata.num_warps
    if architecture not in _AMD_SHARED_MEMORY:
        known = sorted(_AMD_SHARED_MEMORY)
        raise ValueError(f"architecture must be one of {known}, got {architecture!r}")
    registers = amdgcn.metadata(text, "vgpr_count")
    # Four SIMDs of 512 registers per lane, given in units of 8; at most 8 waves each.
    waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
    by_memory = _AMD_SHARED_MEMORY[architecture] // max(1, metadata.shared)
    limits = {"registers": waves // warps, "shared memory": by_memory, "warps": 32 // warps}
    limiter = min(limits, key=lambda name: limits[name])
    return Resources(
        architecture=architecture,
        registers=registers,
        spill_bytes=amdgcn.metadata(text, "private_segment_fixed_size"),
        shared_memory=metadata.shared,
        warps=warps,
        lanes=metadata.target.warp_size,
        blocks_per_unit=limits[limiter],
        limiter=limiter,
        tensor_instructions=_amd_tensor_instructions(text),
    )
