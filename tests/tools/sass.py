"""Read NVIDIA machine code: `nvdisasm` text into instructions, and the cubin file itself."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import triton

from tools.control_flow import Flow
from tools.instructions import Instruction

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_KINDS = {
    "tensor": """HMMA IMMA BMMA DMMA QMMA OMMA HGMMA IGMMA QGMMA BGMMA UTCHMMA UTCIMMA UTCQMMA
        UTCOMMA UTCMXQMMA""",
    "integer": """LOP LOP3 PLOP3 SHF SHL SHR PRMT IADD IADD3 LEA ISETP SEL IMNMX VIADD VIADDMNMX
        VIMNMX VIMNMX3 IABS BMSK SGXT FSETP FMNMX FMNMX3 FSEL FSET ISCADD BFE BFI VABSDIFF
        VABSDIFF4 I2IP LEPC FCHK P2R R2P VHMNMX VIADD2 VIMNMX2""",
    "multiply_add": "IMAD IDP IDP4A IMUL XMAD",
    "half": "HFMA2 HADD2 HMUL2 HMNMX2 HSET2 HSETP2 HFMA HADD HMUL",
    "float": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FSWZADD DFMA DADD DMUL DSETP",
    "convert": "I2F F2I F2F F2FP I2FP F2IP FRND I2I I2H F2H",
    "special": "MUFU",
    "global_load": "LDG LD LDGSTS UTMALDG UBLKCP UBLKPF LDGMC",
    "global_store": "STG ST RED REDG ATOMG ATOM UTMASTG UTMAREDG UBLKRED",
    "shared_load": "LDS LDSM",
    "shared_store": "STS STSM ATOMS STAS",
    "tensor_memory": "LDTM STTM UTCCP UTCATOMSWS UTCST UTCSHIFT",
    "local": "LDL STL",
    "cross_lane": "SHFL REDUX CREDUX MATCH MOVM FLO POPC BREV",
    "synchronise": """BAR DEPBAR LDGDEPBAR SYNCS WARPSYNC MEMBAR FENCE ERRBAR WARPGROUP ARRIVES
        CCTL BSYNC BSSY BREAK BMOV NANOSLEEP UTCBAR ELECT YIELD UCGABAR_ARV UCGABAR_WAIT
        WARPGROUPSET USETMAXREG CGAERRBAR ACQBULK UTMACMDFLUSH UTMACCTL UCGABAR ENDCOLLECTIVE
        ACQSHMINIT PREEXIT""",
    "control": "BRA EXIT CALL RET BRX JMP JMX KILL RPCMOV BPT",
    "move": """NOP S2R S2UR CS2R MOV MOV32I R2UR UMOV LDC LDCU ULDC GETLMEMBASE VOTE VOTEU R2B
        B2R""",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_MEMORY = frozenset({"global_load", "global_store", "shared_load", "shared_store", "local"})

# Multiply-adds per warp of the shapes that mma.sync instructions carry in their names.
_SHAPES = {
    "16816": 16 * 8 * 16,
    "1688": 16 * 8 * 8,
    "16832": 16 * 8 * 32,
    "16864": 16 * 8 * 64,
    "8816": 8 * 8 * 16,
    "8832": 8 * 8 * 32,
    "884": 8 * 8 * 4,
    "1684": 16 * 8 * 4,
}
# Low nine bits of an instruction word, from Turing (sm_75) to Blackwell (sm_120).
_TENSOR_OPCODES = {
    0x03C: "HMMA",
    0x037: "IMMA",
    0x03F: "DMMA",
    0x07A: "QMMA",
    0x1F0: "HGMMA",
    0x1F1: "IGMMA",
    0x1F3: "QGMMA",
    0x1EA: "UTCMMA",
}

_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.a-z:]*)\s*(.*?);?\s*"
    r"(?:/\*\s*0x([0-9a-f]{16})\s*\*/)?\s*$"
)
_CONTROL_WORD = re.compile(r"^\s*/\*\s*0x([0-9a-f]{16})\s*\*/\s*$")
_LABEL = re.compile(r"^(\.L[\w.]*):")


def disassemble(cubin: bytes) -> str:
    """The text of `nvdisasm -c -hex`: instructions, labels and encodings."""
    return _run("nvdisasm", ["-c", "-hex"], cubin)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack per thread (Triton kernels have a stack only to
    spill registers)."""
    text = _run("cuobjdump", ["-res-usage"], cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text[:500]!r}")
    return int(found[1]), int(found[2])


def tensor_opcodes(cubin: bytes) -> Counter[str]:
    """Tensor-core instructions counted by family, from the encodings: no disassembler needed."""
    counts: Counter[str] = Counter()
    for code in _code_sections(cubin):
        for (low,) in struct.iter_unpack("<Q8x", code):
            family = _TENSOR_OPCODES.get(low & 0x1FF)
            if family is not None:
                counts[family] += 1
    return counts


def parse(text: str) -> tuple[list[Instruction], Flow]:
    """Disassembly -> instructions, and where each may go next."""
    found: list[tuple[int, str, str, str]] = []  # address, predicate, name, operands
    stalls: list[int] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            pending.append(label[1])
        elif match := _INSTRUCTION.match(line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            found.append((address, match[2] or "", match[3], match[4].rstrip(" ;")))
            stalls.append(0)
        elif found and (word := _CONTROL_WORD.match(line)):
            stalls[-1] = (int(word[1], 16) >> 41) & 15
    index_of = {address: index for index, (address, *_) in enumerate(found)}
    instructions = [
        _instruction(name, stall) for (_, _, name, _), stall in zip(found, stalls, strict=True)
    ]
    flow = [
        _next(index, predicate, name, operands, labels, index_of)
        for index, (_, predicate, name, operands) in enumerate(found)
    ]
    return instructions, flow


def _instruction(name: str, stall: int) -> Instruction:
    base = name.split(".")[0]
    kind = _KIND_OF.get(base, "uniform" if base.startswith("U") else "other")
    if name.startswith("IMAD.MOV"):
        kind = "move"
    elif name.startswith("HADD2.F32"):  # how fp16 becomes fp32
        kind = "convert"
    width = _width(name) if kind in _MEMORY and not base.startswith("U") else 0
    return Instruction(name, kind, width, _multiply_adds(name), stall)


def _width(name: str) -> int:
    """Bytes per lane of a load or store."""
    if name.startswith(("LDSM", "STSM")):
        return {"4": 16, "2": 8}.get(name.split(".")[-1], 4)
    for part, width in ((".256", 32), (".128", 16), (".64", 8), ("8", 1), ("16", 2)):
        if part in name and (part.startswith(".") or re.search(rf"\.[US]{part}\b", name)):
            return width
    return 4


def _multiply_adds(name: str) -> int:
    if match := re.match(r"[HIQOBD]MMA\.(?:SP\.)?(\d+)", name):
        return _SHAPES.get(match[1], 0)
    # A warpgroup instruction is issued by four warps together.
    if match := re.match(r"[HIQB]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)", name):
        return int(match[1]) * int(match[2]) * int(match[3]) // 4
    return 0


def _next(
    index: int,
    predicate: str,
    name: str,
    operands: str,
    labels: dict[str, int],
    index_of: dict[int, int],
) -> tuple[int, ...] | None:
    base = name.split(".")[0]
    if base in ("EXIT", "RET"):
        return (index + 1,) if predicate else ()
    if base not in ("BRA", "JMP"):
        return None
    label = re.search(r"`\((\.L[\w.]*)\)", operands)
    literal = re.search(r"(0x[0-9a-f]+)\s*$", operands)
    address = labels.get(label[1]) if label else int(literal[1], 16) if literal else None
    target = index_of.get(address) if address is not None else None
    # Predicates may stand before the mnemonic or among the operands.
    rest = re.sub(r"`\(.*?\)", "", operands)
    conditional = predicate or re.search(r"\bU?P\d|UR\d", rest) or ".DIV" in name
    following = (index + 1,) if conditional else ()
    return (*following, target) if target is not None else following


def _code_sections(cubin: bytes) -> Iterator[bytes]:
    """Contents of the `.text.*` sections of a 64-bit ELF file."""
    section_table = struct.unpack_from("<Q", cubin, 0x28)[0]
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", cubin, section_table + i * entry_size) for i in range(count)
    ]
    names = headers[names_index][4]
    for name, kind, _, _, offset, size in headers:
        label = cubin[names + name : cubin.index(b"\0", names + name)]
        if kind == 1 and label.startswith(b".text."):
            yield cubin[offset : offset + size]


def _run(tool: str, arguments: list[str], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / tool), *arguments, file.name]
        finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{tool} failed: {finished.stderr.strip()[:500]}")
    return finished.stdout
