"""Compile every CUDA kernel for every architecture, without a GPU, and check the machine code against recorded limits.

    python -m tools.compile_gate.cuda_gate [--arch 90] [--kernel bn_stats] [--library FILE]

Builds csrc/ as setup.py does (TORCH_CUDA_ARCH_LIST, MAX_JOBS), then reads the library with cuobjdump, the toolkit's or
the Triton wheel's. Checked for each kernel instance: registers within the limit of its family, no stack and so no
spills, shared memory, and 16-byte loads and stores in the instances that work on octets. Exit code 1 on any violation,
2 where nothing can be compiled.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
STATIC_SHARED_LIMIT = 48 * 1024


@dataclass(frozen=True)
class Limit:
    """Of a kernel: the most registers of any instance; whether its octet instances load and store 16 bytes at once."""

    registers: int
    wide_loads: bool = True
    wide_stores: bool = False


# Of 256 threads, two blocks fit a multiprocessor up to 128 registers, one beyond: enough with the 12 loads of a patch.
LIMITS = {
    "bn_stats_nhwc": Limit(128),
    "bn_stats_nchw": Limit(64),
    "bn_finalize_kernel": Limit(64, wide_loads=False),
    "bn_apply_kernel": Limit(112, wide_stores=True),
    "bn_backward_reduce_nhwc": Limit(128),
    "bn_backward_reduce_nchw": Limit(96),
    "bn_backward_apply_kernel": Limit(128, wide_stores=True),
    "add_act_kernel": Limit(80, wide_stores=True),
    "add_act_backward_kernel": Limit(80, wide_stores=True),
    "bn_act_max_pool_kernel": Limit(128, wide_stores=True),
    "max_pool_backward_reduce_nhwc": Limit(168),
    "max_pool_backward_reduce_nchw": Limit(88),
    "max_pool_backward_apply_kernel": Limit(168, wide_stores=True),
    "reduce_rows_kernel": Limit(64, wide_stores=True),
    "pack_weight_kernel": Limit(64, wide_loads=False),
}
# Instances that go element by element: their template arguments say so.
_SCALAR = re.compile(r"<[^>]*, 1(, \w+)?>|max_pool_backward_reduce_nchw")


@dataclass
class Instance:
    """One kernel instance on one architecture."""

    arch: str
    name: str
    registers: int
    stack: int
    shared: int
    wide_loads: int = 0
    wide_stores: int = 0
    violations: list[str] = field(default_factory=list)

    @property
    def family(self) -> str:
        return self.name.partition("<")[0]

    def check(self) -> None:
        limit = LIMITS.get(self.family)
        if limit is None:
            self.violations.append("no recorded limit")
            return
        octets = not _SCALAR.search(self.name)
        if self.registers > limit.registers:
            self.violations.append(f"{self.registers} registers, limit {limit.registers}")
        if self.stack:
            self.violations.append(f"{self.stack} bytes of stack: spills")
        if self.shared > STATIC_SHARED_LIMIT:
            self.violations.append(f"{self.shared} bytes of shared memory, limit {STATIC_SHARED_LIMIT}")
        if octets and limit.wide_loads and not self.wide_loads:
            self.violations.append("no 16-byte load")
        if octets and limit.wide_stores and not self.wide_stores:
            self.violations.append("no 16-byte store")


def _build_module() -> ModuleType:
    path = ROOT / "csrc" / "build.py"
    if not path.exists():
        raise SystemExit(f"compile gate: {path} not found; the gate runs in a checkout or an unpacked sdist")
    spec = importlib.util.spec_from_file_location("resnet_fused_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _tool(name: str, toolkit: Path | None) -> Path:
    places = [toolkit / "bin" / name] if toolkit else []
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name)
    if (on_path := shutil.which(name)) is not None:
        places.append(Path(on_path))
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(f"{name} is neither in the CUDA toolkit nor in a Triton wheel nor on PATH")


def _run(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def _demangle(names: list[str]) -> dict[str, str]:
    """Mangled to short: no return type, namespace or parameters."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    short = {}
    for name, text in zip(names, plain.splitlines(), strict=True):
        text = text.removeprefix("void ").replace("resnet_fused::", "").replace("__nv_bfloat16", "bf16")
        text = text.replace("__half", "fp16").replace("float", "fp32").replace("(Channels)0", "octet")
        text = text.replace("(Channels)1", "plane").replace("(Channels)2", "each")
        short[name] = text.partition("(")[0]
    return short


def inspect(library: Path, cuobjdump: Path) -> Iterator[Instance]:
    """Every kernel instance of every architecture in the library."""
    usage = _run(cuobjdump, "--dump-resource-usage", library)
    found: dict[tuple[str, str], Instance] = {}
    arch = ""
    pattern = re.compile(
        r"^arch = (?P<arch>sm_\w+)|"
        r"Function (?P<name>\S+):\s+REG:(?P<reg>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)",
        re.M,
    )
    for match in pattern.finditer(usage):
        if match["arch"]:
            arch = match["arch"]
        else:
            numbers = int(match["reg"]), int(match["stack"]), int(match["shared"])
            found[arch, match["name"]] = Instance(arch, match["name"], *numbers)
    for arch in dict.fromkeys(arch for arch, _ in found):
        current: Instance | None = None
        for line in _run(cuobjdump, "--dump-sass", "--gpu-architecture", arch, library).splitlines():
            if header := re.search(r"Function : (\S+)", line):
                current = found.get((arch, header[1]))
            elif current is not None and re.search(r"\bLDG\.[\w.]*(128|256)\b", line):
                current.wide_loads += 1
            elif current is not None and re.search(r"\bSTG\.[\w.]*(128|256)\b", line):
                current.wide_stores += 1
    names = _demangle([instance.name for instance in found.values()])
    for instance in found.values():
        instance.name = names[instance.name]
        instance.check()
        yield instance


def table(instances: list[Instance]) -> str:
    """One line per instance: the range over the architectures, and what is wrong."""
    by_name: dict[str, list[Instance]] = {}
    for instance in instances:
        by_name.setdefault(instance.name, []).append(instance)
    archs = list(dict.fromkeys(instance.arch for instance in instances))
    rows = [["kernel", *(arch.removeprefix("sm_") for arch in archs), "shared", "stack", "LDG.128", "STG.128", ""]]
    for name, members in sorted(by_name.items()):
        registers = {m.arch: str(m.registers) for m in members}
        verdict = "; ".join(f"{m.arch}: {v}" for m in members for v in m.violations) or "ok"
        counts = [
            str(max(getattr(m, what) for m in members)) for what in ("shared", "stack", "wide_loads", "wide_stores")
        ]
        rows.append([name, *(registers.get(arch, "-") for arch in archs), *counts, verdict])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = []
    for name, *numbers, verdict in rows:
        cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)), verdict]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compile_gate_cuda", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", help="only this architecture in the table, e.g. 90")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--library", type=Path, help="check this library instead of compiling one")
    options = parser.parse_args(arguments)
    build = _build_module()
    toolkit = None
    try:
        library = options.library
        if library is None:
            toolkit = build.find_toolkit()
            target = build.Target("cuda", "compile gate", toolkit, build.choose_architectures(toolkit))
            work = ROOT / "build" / "resnet_fused-cuda"  # setup.py's: what is up to date is not compiled again
            library = work / "_C.so"
            build.compile_library(target, library, work)
        instances = list(inspect(library, _tool("cuobjdump", toolkit.home if toolkit else None)))
    except (build.Unusable, FileNotFoundError) as problem:
        print(f"compile gate: {problem}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as problem:
        print(f"compile gate: failed with exit code {problem.returncode}: {problem.cmd[0]}\n{problem.stderr or ''}")
        return 1
    missing = sorted(set(LIMITS) - {instance.family for instance in instances})
    shown = [
        i
        for i in instances
        if (not options.arch or i.arch == f"sm_{options.arch}") and (not options.kernel or options.kernel in i.name)
    ]
    if not shown:
        print(f"compile gate: nothing matches; architectures: {', '.join(sorted({i.arch for i in instances}))}")
        return 2
    print(table(shown))
    violations = [f"{i.name} on {i.arch}: {v}" for i in instances for v in i.violations]
    violations += [f"{name}: recorded, but not in the library" for name in missing]
    archs = len({i.arch for i in instances})
    print(f"{len(instances)} kernel instances on {archs} architectures, {len(violations)} violations")
    for violation in violations:
        print(f"violation: {violation}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
