"""What a compiled kernel is made of, read from its assembly: no GPU is asked."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.triton.target import Target

Metrics = dict[str, Any]

MATRIX = ("QGMMA", "HGMMA", "IGMMA", "UTCQMMA", "UTCHMMA", "UTCIMMA", "QMMA", "HMMA", "IMMA")
"""Instructions of the matrix units of NVIDIA GPUs: Q for FP8, H for 16 bits; GMMA by a whole
warpgroup, UTC by the fifth generation, MMA alone by one warp at half of the speed or less."""

_SASS = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", re.MULTILINE
)
_AHEAD = re.compile(r"SB0, 0x([0-9a-f]+)")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    rest: str

    @property
    def family(self) -> str:
        return self.name.split(".")[0]


def measure(kernel: Any, target: Target) -> Metrics:
    """Registers, spills, memory, instructions of a kernel that Triton compiled."""
    found = _nvidia(kernel, target) if target.backend == "cuda" else _amd(kernel, target)
    return {"shared": kernel.metadata.shared, **found}


# ---- NVIDIA -----------------------------------------------------------------------------------


def _nvidia(kernel: Any, target: Target) -> Metrics:
    ptx = kernel.asm["ptx"]
    threads = kernel.metadata.num_warps * 32
    said = _ptxas(ptx, target)
    code = _disassembled(kernel.asm["cubin"])
    hot = hot_loop(code)
    counts = Counter(i.family for i in code)
    registers = said["registers"]
    return {
        **said,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", 0) or 0,
        "occupancy": occupancy(registers, threads, kernel.metadata.shared, target),
        "instructions": len(code),
        "matrix": {name: counts[name] for name in MATRIX if counts[name]},
        "matrix_shapes": sorted(set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\S+)", ptx))),
        "hot": len(hot),
        "hot_matrix": sum(i.family in MATRIX for i in hot),
        "hot_float32": sum(i.family in ("FADD", "FFMA", "FMUL", "FADD2", "FFMA2") for i in hot),
        "promotions": _promotions(ptx),
        "load_bits": _widest(code, "LDG"),
        "store_bits": _widest(code, "STG"),
        "bulk_copies": sum(counts[name] for name in ("UTMALDG", "UTMASTG", "UBLKCP")),
        "async_copies": counts["LDGSTS"],
        "copies_ahead": _copies_ahead(hot),
        "local_accesses": counts["LDL"] + counts["STL"],
        "traps": len(re.findall(r"^\s*trap;", ptx, re.MULTILINE)) if len(code) < 50 else 0,
        "float_atomics": len(re.findall(r"\b(?:atom|red)\.\S*\.f\d+", ptx)),
    }


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def _ptxas(ptx: str, target: Target) -> Metrics:
    """What the assembler says, called as Triton calls it."""
    blackwell = isinstance(target.arch, int) and target.arch >= 100
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        done = subprocess.run(
            [
                _tool("ptxas-blackwell" if blackwell else "ptxas"),
                "-v",
                "--regAllocOptLevel=2",
                f"--gpu-name=sm_{target.arch}a",
                source,
                "-o",
                source.with_suffix(".o"),
            ],
            capture_output=True,
            text=True,
            check=True,
        )

    def numbers(pattern: str) -> list[int]:
        return [int(n) for n in re.findall(pattern, done.stderr)]

    return {
        "registers": max(numbers(r"Used (\d+) registers")),
        # Told of a kernel in which each wgmma waits for the one before it.
        "serialized": done.stderr.count("wgmma.mma_async instructions are serialized"),
        "spilled_bytes": sum(numbers(r"(\d+) bytes spill (?:stores|loads)")),
        "stack_bytes": sum(numbers(r"(\d+) bytes stack frame")),
    }


def _disassembled(cubin: bytes) -> list[Instruction]:
    return [Instruction(int(a, 16), name, rest) for a, name, rest in _SASS.findall(sass(cubin))]


def sass(cubin: bytes) -> str:
    """What an NVIDIA GPU executes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [_tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def hot_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The shortest loop that multiplies matrices; the longest loop where none does.

    A loop is what lies between a branch backwards and where it goes.
    """
    loops = []
    for instruction in code:
        goes = (
            re.search(r"0x([0-9a-f]+)", instruction.rest) if instruction.family == "BRA" else None
        )
        if goes and int(goes[1], 16) <= instruction.address - 32:
            start = int(goes[1], 16)
            loops.append([i for i in code if start <= i.address <= instruction.address])
    with_matrix = [loop for loop in loops if any(i.family in MATRIX for i in loop)]
    if with_matrix:
        return min(with_matrix, key=len)
    return max(loops, key=len, default=[])


def _copies_ahead(hot: Sequence[Instruction]) -> int:
    """Groups of copies to shared memory that may be under way while the loop multiplies: those that
    it does not wait for when a turn begins. 0 also for a loop that has no such copies."""
    waits = [i.rest for i in hot if i.family == "DEPBAR" and "SB0" in i.rest]
    if not any(i.family == "LDGSTS" for i in hot) or not waits:
        return 0
    return min(int(found[1], 16) for found in map(_AHEAD.search, waits) if found)


def _promotions(ptx: str) -> int:
    """Float32 sums and fused multiply-adds in the loop of PTX that multiplies matrices."""
    lines = [line.strip() for line in ptx.splitlines()]
    labels: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    for at, line in enumerate(lines):
        label = re.match(r"(\$L__BB\w+):", line)
        if label:
            labels[label[1]] = at
        goes = re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)
        if goes and goes[1] in labels:
            found.append((labels[goes[1]], at))
    products = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
    loops = [lines[a:b] for a, b in found if any(p in x for x in lines[a:b] for p in products)]
    body = min(loops, key=len, default=[])
    single = sum(bool(re.match(r"(?:@!?%p\d+ )?(?:add|fma)\.(?:rn\.)?f32\s", x)) for x in body)
    double = sum(bool(re.match(r"(?:@!?%p\d+ )?(?:add|fma)\.(?:rn\.)?f32x2\s", x)) for x in body)
    return single + 2 * double


def _widest(code: Sequence[Instruction], family: str) -> int:
    """Bits of the widest access of a kind; 0 where there is none."""
    widths = [0]
    for instruction in code:
        if instruction.family == family:
            parts = instruction.name.split(".")
            widths.append(next((n for n in (256, 128, 64) if str(n) in parts), 32))
    return max(widths)


def occupancy(registers: int, threads: int, shared: int, target: Target) -> int:
    """How many programs a multiprocessor holds at once: registers, shared memory (1 KB of 228 goes
    with each program), threads, and never more than 32."""
    per_thread = -(-max(registers, 1) // 8) * 8
    by_registers = target.registers // (per_thread * threads)
    by_shared = 228 * 1024 // (shared + 1024) if shared <= target.shared_bytes else 0
    return min(by_registers, by_shared, target.threads // threads, 32)


# ---- AMD --------------------------------------------------------------------------------------


def _amd(kernel: Any, target: Target) -> Metrics:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)

    instructions = re.findall(r"^\t([a-z][a-z0-9_]*)\b", text, re.MULTILINE)
    matrix = Counter(i for i in instructions if i.startswith("v_mfma"))
    said = re.search(r"; Occupancy:\s+(\d+)", text)
    vectors, accumulators = number("vgpr_count"), number("agpr_count")
    hot = _amd_hot_loop(text)
    return {
        "registers": vectors,
        "accumulators": accumulators,
        "spilled_bytes": 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        "stack_bytes": number("private_segment_fixed_size"),
        "tensor_memory": 0,
        "occupancy": int(said[1]) if said else 0,
        "instructions": len(instructions),
        "matrix": dict(sorted(matrix.items())),
        "matrix_shapes": [],
        "hot": len(hot),
        "hot_matrix": sum(i.startswith("v_mfma") for i in hot),
        "hot_float32": sum(i.startswith(("v_add_f32", "v_fma", "v_mul_f32", "v_pk_")) for i in hot),
        "promotions": 0,
        "load_bits": _amd_widest(instructions, "load"),
        "store_bits": _amd_widest(instructions, "store"),
        "bulk_copies": 0,
        "async_copies": 0,
        "copies_ahead": 0,
        "serialized": 0,
        "local_accesses": sum(i.startswith("scratch_") for i in instructions),
        "traps": instructions.count("s_trap"),
        "float_atomics": sum("atomic" in i and "_f" in i for i in instructions),
    }


def _amd_hot_loop(text: str) -> list[str]:
    """Instructions of the shortest loop that multiplies matrices, or of the longest of all."""
    lines = text.splitlines()
    labels = {m[1]: i for i, x in enumerate(lines) if (m := re.match(r"(\.LBB\w+):", x))}
    loops = []
    for at, line in enumerate(lines):
        goes = re.match(r"\ts_c?branch\w*\s+(\.LBB\w+)", line)
        if goes and labels.get(goes[1], at) < at:
            body = lines[labels[goes[1]] : at + 1]
            loops.append([m[1] for x in body if (m := re.match(r"\t([a-z][a-z0-9_]*)\b", x))])
    with_matrix = [loop for loop in loops if any(i.startswith("v_mfma") for i in loop)]
    if with_matrix:
        return min(with_matrix, key=len)
    return max(loops, key=len, default=[])


def _amd_widest(instructions: Sequence[str], word: str) -> int:
    """Bits of the widest access to global memory; 0 where there is none."""
    bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    widths = [0]
    for name in instructions:
        found = re.match(rf"(?:global|flat|buffer)_{word}_(\w+)", name)
        if found:
            widths.append(bits.get(found[1], 16))
    return max(widths)
