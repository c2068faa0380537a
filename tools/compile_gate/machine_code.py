"""What a compiled Triton kernel's machine code shows: registers, spills, matrix instructions, copies, and how much of
the issue bandwidth its main loop needs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Dense 16-bit FLOP a multiprocessor's tensor cores do in a cycle, fp32 accumulation; TF32 half of it. NVIDIA's peak
# TFLOP/s over multiprocessors and boost clock (A100, A40, L40S, H100 SXM, B200, RTX PRO 6000). Of int8 twice as many.
FLOP_PER_CYCLE = {80: 2048, 86: 1024, 89: 1024, 90: 4096, 100: 8192, 120: 1024}
SCHEDULERS = 4  # of a multiprocessor; each issues one instruction a cycle


@dataclass(frozen=True)
class MachineCode:
    registers: int = 0
    spills: int = 0
    matrix: str = "-"  # the matrix instruction
    eight: bool = False  # all of them multiply int8
    copies: int = 0  # cp.async
    tma: int = 0  # cp.async.bulk.tensor
    specialized: bool = False  # warps of different roles
    loads: int = 0  # from global memory,
    wide_loads: int = 0  # 128 bits
    stores: int = 0
    wide_stores: int = 0
    index64: bool = False  # some pointer is offset by 64 bits
    instructions: int = 0  # of the whole kernel
    loop: int = 0  # instructions of the main loop
    loop_flop: float = 0.0  # that a program's warps do with its matrix instructions, once through
    divisions: int = 0  # of the loop's instructions those of integer divisions: to floating point and 1 / x
    behind: int = 0  # instructions behind it
    shuffles: int = 0  # of them SHFL
    issue_per_mma: float | None = None


def read(asm: Any, arch: int, num_warps: int) -> MachineCode:
    """Disassemble what `triton.compile` made for a compute capability, with `num_warps` in its launch options."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    ptx, ttgir = asm["ptx"], asm["ttgir"]

    def count(pattern: str, text: str = sass) -> int:
        return len(re.findall(pattern, text))

    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    kinds = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma.sync": r"mma\.sync"}
    specialized = "ttg.warp_specialize" in ttgir
    loop = main_loop(sass)
    behind = behind_loop(sass, loop)
    return MachineCode(
        registers=int(found[1]),
        spills=count(r"\b(?:STL|LDL)\b") + int(found[2]) // 4,
        matrix=next((kind for kind, pattern in kinds.items() if count(pattern, ptx)), "-"),
        eight=0 < count(_EIGHT, ptx) == count("|".join(kinds.values()), ptx),
        copies=count(r"cp\.async\.c[ag]", ptx),
        tma=count(r"cp\.async\.bulk\.tensor", ptx),
        specialized=specialized,
        loads=count("LDG"),
        wide_loads=count(r"LDG\.E\S*\.128"),
        stores=count("STG"),
        wide_stores=count(r"STG\.E\S*\.128"),
        index64=bool(count(r"tt\.addptr .*xi64>", asm.get("ttir", ttgir))),
        loop=len(loop),
        loop_flop=_loop_flop(loop, ptx, num_warps),
        instructions=count(r"(?m)^\s*/\*[0-9a-f]+\*/.*;"),
        divisions=divisions(loop),
        behind=len(behind),
        shuffles=sum("SHFL" in line for line in behind),
        issue_per_mma=_issue_per_mma(loop, ptx, arch, num_warps, specialized),
    )


def _tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def loops(sass: str) -> list[list[str]]:
    """The instructions of every loop: from a label to a branch back to it."""
    lines = sass.splitlines()
    labels = {line.strip()[:-1]: i for i, line in enumerate(lines) if re.match(r"\s*\.L_\w+:$", line)}
    found = []
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if branch and labels.get(branch[1], i) < i:
            found.append([line for line in lines[labels[branch[1]] : i + 1] if ";" in line])
    return found


_MATRIX = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|IMMA|IGMMA|UTCIMMA)\b\S*")
_EIGHT = r"mma\S*\.s8\.s8|tcgen05\.mma\S*\.kind::i8"  # in PTX


def main_loop(sass: str) -> list[str]:
    """The shortest loop with matrix instructions."""
    return min((body for body in loops(sass) if any(map(_MATRIX.search, body))), key=len, default=[])


def divisions(loop: list[str]) -> int:
    """The instructions of which an integer division is made: conversions to floating point, but those of 8 or 16 bits,
    and reciprocals.
    """
    return sum(bool(re.search(r"\b(?:I2F(?!\.[SU](?:8|16)\b)|MUFU)\b", line)) for line in loop)


def behind_loop(sass: str, loop: list[str]) -> list[str]:
    """The instructions behind a loop; none where there is no loop."""
    instructions = [line for line in sass.splitlines() if ";" in line]
    return instructions[instructions.index(loop[-1]) + 1 :] if loop else []


def _issue_per_mma(loop: list[str], ptx: str, arch: int, num_warps: int, specialized: bool) -> float | None:
    """Issue cycles over tensor core cycles of the main loop; None without one."""
    peak = FLOP_PER_CYCLE[arch] * _rate(ptx)
    flop = _loop_flop(loop, ptx, num_warps)
    if flop == 0:
        return None
    # A warp-specialised tcgen05 loop is run by the one warp that issues the products.
    warps = 1 if specialized and "tcgen05.mma" in ptx else num_warps
    return (len(loop) * warps / SCHEDULERS) / (flop / peak)


def _rate(ptx: str) -> float:
    """Of the products, to 16-bit ones."""
    return 0.5 if "tf32" in ptx else 2.0 if re.search(_EIGHT, ptx) else 1.0


def _loop_flop(loop: list[str], ptx: str, num_warps: int) -> float:
    return sum(_flop(found[0], num_warps, ptx) for line in loop if (found := _MATRIX.search(line)))


def _flop(instruction: str, num_warps: int, ptx: str) -> float:
    """What all warps do with one static matrix instruction."""
    if instruction.startswith(("HGMMA", "IGMMA")):  # one for every four warps: HGMMA.64xNxK
        m, n, k = map(int, re.findall(r"(\d+)x(\d+)x(\d+)", instruction)[0])
        return 2.0 * m * n * k * num_warps / 4
    if instruction.startswith(("HMMA", "IMMA")):  # one for every warp: HMMA.16816 is 16x8x16
        k = {"16832": 32, "16816": 16, "1688": 8, "1684": 4}[re.findall(r"\.(16\d+)", instruction)[0]]
        return 2.0 * 16 * 8 * k * num_warps
    return _tcgen05_flop(ptx)


def _tcgen05_flop(ptx: str) -> float:
    """One for the whole block: the shape is in the instruction descriptor, a constant of the PTX with N/8 in bits 17-22
    and M/16 in bits 24-28; K is 32 bytes. The largest, where there are several; 0 where it is no constant.
    """
    found = re.findall(r"tcgen05\.mma\S*\s+\[[^\]]*\],\s*(?:%\w+|\[[^\]]*\]),\s*%\w+,\s*(%r\d+)", ptx)
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", ptx))
    shapes = {int(constants[register]) for register in found if register in constants}
    if not shapes:
        return 0.0
    descriptor = max(shapes)
    m, n = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
    return 2.0 * m * n * 16 * _rate(ptx)
