"""Compile every Triton kernel configuration for every supported architecture, without a GPU, and check what came out.

    python -m resnet_fused.bench.compile_gate_triton [--quick] [--arch 80,90] [--kernel conv] [--jobs 2]

The launchers run on meta tensors and are recorded instead of launched, so what is compiled is what would be launched. Checked: it compiles, fits
the architecture's shared memory, does not spill, uses the matrix instruction (and the asynchronous copies that feed it) of the architecture, and
moves activations 128 bits at a time where their layout allows. Exit code 1 on any violation.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHARED_MEMORY_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
MATRIX_INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}


@dataclass(frozen=True)
class Expect:
    """What the machine code must show beyond fitting and not spilling."""

    matrix: bool = False  # the architecture's matrix instruction
    copies: bool = False  # cp.async
    wide_loads: bool = False  # LDG.128
    wide_stores: bool = False  # STG.128


@dataclass(frozen=True)
class Job:
    label: str
    module: str
    kernel: str
    arch: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]
    expect: Expect


@dataclass
class Report:
    job: Job
    seconds: float = 0.0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    matrix: str = "-"
    copies: int = 0
    wide_loads: str = "-"
    wide_stores: str = "-"
    problems: list[str] = field(default_factory=list)


# ---- what to compile ------------------------------------------------------------------------------------------------------------------------


def _activation(shape: tuple[int, ...], dtype: torch.dtype, nhwc: bool) -> Tensor:
    order = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=order)


def _vector(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


Case = tuple[str, Expect, Callable[[], object]]


def conv_cases(arch: int, quick: bool) -> Iterator[Case]:
    """Every configuration of the heuristic, with the filters and epilogues that compile to different code."""
    from resnet_fused.kernels import conv_fprop as launcher

    conv = import_module("resnet_fused.kernels.conv_fprop")
    for dtype, tf32 in ((torch.float16, False), (torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
        name = "tf32" if tf32 else _TYPES[dtype]
        configs = conv.configurations(dtype, arch, tf32)
        if quick:  # the widest reduction, tap by tap, and for the stem the flat one
            configs = [max((config for config in configs if not config.flat), key=lambda config: config.block_k)]
            configs += conv.configurations(dtype, arch, tf32)[:1] if dtype == torch.bfloat16 else []
        for config in configs:
            variants = [(3, 2, True)] if quick else [(3, 1, True), (3, 2, False), (1, 1, True), (1, 1, False)]
            for filter_size, stride, even in variants:
                # A reduction that the tiles divide, and one that they do not.
                channels = (8 if even else 3) if config.flat else config.block_k * 2 if even else config.block_k * 2 - 8
                if config.flat and quick:
                    channels, filter_size = 3, 7
                for epilogue in (True,) if quick or filter_size == 1 else (True, False):
                    tile = (
                        f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"
                    )
                    label = f"{name} {tile} c{channels} {filter_size}x{filter_size}{' scale shift residual relu' if epilogue else ''}"
                    expect = Expect(
                        matrix=dtype != torch.float32 or tf32,
                        copies=not config.flat and (dtype != torch.float32 or tf32),
                        wide_loads=epilogue,
                        wide_stores=True,
                    )
                    x = _activation((64, channels, 28, 28), dtype, True)
                    weight = _activation((256, channels, filter_size, filter_size), dtype, True)
                    out = (28 + 2 * (filter_size // 2) - filter_size) // stride + 1
                    residual = _activation((64, 256, out, out), dtype, True)
                    affine = (_vector(256), _vector(256), residual) if epilogue else (None, None, None)
                    pad = [filter_size // 2] * 2
                    args = (x, weight, *affine, [stride] * 2, pad, [1, 1], 1, epilogue)

                    def run(args: Any = args, config: Any = config, tf32: bool = tf32) -> None:
                        with _tf32(tf32):
                            launcher(*args, config=config)

                    yield label, expect, run


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]


def batch_norm_cases(quick: bool) -> Iterator[Case]:
    """Every op of the family by dtype, layout, size class and option. Sizes: even (vectors), ragged (no vectors), wide (64-bit offsets)."""
    sizes = {"even": ((256, 256, 56, 56), (256, 64, 112, 112)), "ragged": ((64, 35, 7, 7), (64, 35, 17, 17))}
    if not quick:
        sizes["narrow"] = ((256, 16, 56, 56), (256, 8, 112, 112))
        sizes["wide"] = ((4096, 256, 56, 56), (4096, 64, 112, 112))
    for size, nhwc, dtype in itertools.product(sizes, (True,) if quick else (True, False), _TYPES):
        if dtype == torch.uint8 or (quick and (dtype != torch.bfloat16 or size == "ragged")):
            continue
        yield from _family(
            dtype, nhwc, *sizes[size], f"{_TYPES[dtype]} {'NHWC' if nhwc else 'NCHW'} {size}", size != "ragged", quick
        )
    yield (
        "rows 256",
        Expect(wide_loads=True),
        lambda: _op("bn_finalize", *(_vector(256, 256),) * 2, _vector(256), *(_vector(256),) * 4, 0.1, 1e-5),
    )
    yield "rows 256", Expect(wide_loads=True), lambda: _op("reduce_rows", _vector(256, 256))
    weight = _activation((256, 256, 3, 3), torch.bfloat16, True)
    for flip in (False,) if quick else (False, True):
        yield f"bf16 flip={flip}", Expect(wide_stores=True), functools.partial(_op, "pack_weight", weight, flip)


def _op(name: str, *args: Any) -> object:
    from resnet_fused.kernels import OPS

    return OPS[name](*args)


def _family(
    dtype: torch.dtype,
    nhwc: bool,
    block: tuple[int, ...],
    stem: tuple[int, ...],
    label: str,
    vectors: bool,
    quick: bool,
) -> Iterator[Case]:
    both, loads = Expect(wide_loads=vectors, wide_stores=vectors), Expect(wide_loads=vectors)
    x, c = _activation(block, dtype, nhwc), _vector(block[1])
    mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device="meta")
    rows = 256

    def case(expect: Expect, what: str, op: str, *args: Any) -> Case:
        return f"{label} {what}".strip(), expect, functools.partial(_op, op, *args)

    yield case(loads, "", "bn_stats", x, rows)
    residuals = {"": (None, None, None), "+ residual": (x, None, None), "+ affine residual": (x, c, c)}
    for (what, residual), (relu, with_mask) in itertools.product(
        residuals.items(), ((False, False), (True, False), (True, True))
    ):
        if not quick or (residual[1] is not None and with_mask):
            yield case(both, f"{what} relu={relu} mask={with_mask}", "bn_apply", x, c, c, *residual, relu, with_mask)
    for what, bits, relu in (("", None, False), ("recomputed mask", None, True), ("mask", mask, True)):
        if quick and bits is None:
            continue
        yield case(loads, what, "bn_backward_reduce", x, x, bits, c, c, c, c, relu, rows)
        for sums, dresidual in itertools.product(((c, c), (None, None)), (True, False)):
            if not quick or (sums[0] is not None and dresidual):
                more = f"{what} sums={sums[0] is not None} dresidual={dresidual}"
                yield case(both, more, "bn_backward_apply", x, x, bits, c, c, c, c, *sums, 2.0, relu, dresidual)
    flat = Expect(wide_loads=True, wide_stores=True)
    yield case(flat, "", "add_act", x, x, True)
    yield case(flat, "", "add_act_backward", x, x)
    # The pool strides through x, so in NCHW order it has no vectors to read.
    pooled = Expect(wide_loads=vectors and nhwc, wide_stores=vectors and nhwc)
    x, c = _activation(stem, dtype, nhwc), _vector(stem[1])
    half = (*stem[:2], (stem[2] - 1) // 2 + 1, (stem[3] - 1) // 2 + 1)
    dy, index = _activation(half, dtype, nhwc), _activation(half, torch.uint8, nhwc)
    yield case(pooled, "", "bn_act_max_pool", x, c, c)
    yield case(
        Expect(wide_loads=pooled.wide_loads), "", "bn_act_max_pool_backward_reduce", dy, index, x, c, c, c, c, rows
    )
    yield case(pooled, "", "bn_act_max_pool_backward_apply", dy, index, x, c, c, c, c, c, c, 2.0)


# ---- recording launches ---------------------------------------------------------------------------------------------------------------------


class _Recorder:
    """Stands in for a kernel: `kernel[grid](*args, **options)` is noted instead of launched."""

    def __init__(
        self, kernel: Any, name: str, launches: list[tuple[Any, str, tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, self.name, args, options))


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Any, str, tuple[Any, ...], dict[str, Any]]]]:
    """Replace every kernel of `resnet_fused.kernels` by a recorder while the block runs."""
    import resnet_fused.kernels  # noqa: F401

    launches: list[tuple[Any, str, tuple[Any, ...], dict[str, Any]]] = []
    replaced = []
    for name, module in list(sys.modules.items()):
        if name.startswith("resnet_fused.kernels."):
            for attribute, kernel in list(vars(module).items()):
                if attribute.endswith("_kernel"):
                    replaced.append((module, attribute, kernel))
                    setattr(module, attribute, _Recorder(kernel, attribute, launches))
    try:
        yield launches
    finally:
        for module, attribute, kernel in replaced:
            setattr(module, attribute, kernel)


def _job(
    label: str, expect: Expect, arch: int, kernel: Any, name: str, args: tuple[Any, ...], options: dict[str, Any]
) -> Job:
    """A recorded launch as triton's JIT would specialise it: None and 1 are constants, multiples of 16 and tensors are known to be aligned."""
    launch = {key: options[key] for key in options if key in ("num_warps", "num_stages")}
    bound = dict(zip(kernel.arg_names, args, strict=False)) | {
        key: value for key, value in options.items() if key not in launch
    }
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature, constants, aligned = [], [], []
    for i, parameter in enumerate(kernel.arg_names):
        value = bound[parameter]
        kind = "fp32"
        if parameter in constexprs or value is None or (isinstance(value, int) and value == 1):
            kind = "constexpr"
            constants.append((i, value))
        elif isinstance(value, Tensor):
            kind = "*" + _TYPES[value.dtype]
            aligned.append(i)
        elif isinstance(value, int):
            kind = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(i)
        signature.append((parameter, kind))
    return Job(
        label,
        kernel.fn.__module__,
        name,
        arch,
        tuple(signature),
        tuple(constants),
        tuple(aligned),
        tuple(launch.items()),
        expect,
    )


def jobs(architectures: tuple[int, ...], quick: bool, only: str) -> list[Job]:
    """Every distinct launch of every case, for every architecture."""
    found: dict[Any, Job] = {}
    for arch in architectures:
        for label, expect, run in itertools.chain(conv_cases(arch, quick), batch_norm_cases(quick)):
            with recording() as launches:
                run()
            for kernel, name, args, options in launches:
                job = _job(label, expect, arch, kernel, name, args, options)
                if only in name:
                    found.setdefault((name, arch, job.signature, str(job.constants), job.aligned, job.options), job)
    return list(found.values())


# ---- compiling and checking -----------------------------------------------------------------------------------------------------------------


def _tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def compile_job(job: Job) -> Report:
    """Compile one kernel to machine code, read it back and compare it with what the job expects."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    warnings.simplefilter("ignore")
    report = Report(job)
    start = time.monotonic()
    kernel = getattr(import_module(job.module), job.kernel)
    source = ASTSource(
        fn=kernel,
        signature=dict(job.signature),
        constexprs={(i,): value for i, value in job.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in job.aligned},
    )
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=dict(job.options))
    except Exception as error:  # whatever the compiler raises is the finding
        report.problems.append(f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
        return report
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    ptx = compiled.asm["ptx"]

    def count(pattern: str, text: str = sass) -> int:
        return len(re.findall(pattern, text))

    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    report.registers, stack = int(found[1]), int(found[2])
    report.spills = count(r"\b(?:STL|LDL)\b") + stack // 4
    report.shared = compiled.metadata.shared
    kinds = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma.sync": r"mma\.sync"}
    report.matrix = next((kind for kind, pattern in kinds.items() if count(pattern, ptx)), "-")
    report.copies = count(r"cp\.async\.c[ag]", ptx)
    loads, stores = count(r"LDG\.E\S*\.128"), count(r"STG\.E\S*\.128")
    report.wide_loads = f"{loads}/{count('LDG')}"
    report.wide_stores = f"{stores}/{count('STG')}"
    report.seconds = time.monotonic() - start

    limit = SHARED_MEMORY_KB[job.arch] * 1024
    checks = (
        (report.spills > 0, f"spills ({report.spills})"),
        (report.shared > limit, f"{report.shared} bytes of shared memory, sm_{job.arch} has {limit}"),
        (
            job.expect.matrix and report.matrix != MATRIX_INSTRUCTION[job.arch],
            f"{report.matrix}, not {MATRIX_INSTRUCTION[job.arch]}",
        ),
        (not job.expect.matrix and report.matrix != "-", f"{report.matrix} where exact fp32 was asked for"),
        (job.expect.copies and report.copies == 0, "no asynchronous copies"),
        (job.expect.wide_loads and loads == 0, "no 128-bit loads"),
        (job.expect.wide_stores and stores == 0, "no 128-bit stores"),
    )
    report.problems += [problem for violated, problem in checks if violated]
    return report


def _table(reports: list[Report]) -> None:
    columns = ("kernel", "case", "sm", "regs", "spills", "shared", "matrix", "cp.async", "128-bit ld", "st", "")
    lines = [
        (
            report.job.kernel.strip("_").removesuffix("_kernel"),
            report.job.label,
            str(report.job.arch),
            str(report.registers),
            str(report.spills),
            f"{report.shared / 1024:.0f}K",
            report.matrix,
            str(report.copies),
            report.wide_loads,
            report.wide_stores,
            "; ".join(report.problems) or "ok",
        )
        for report in sorted(reports, key=lambda report: (report.job.kernel, report.job.label, report.job.arch))
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
        for line in (columns, *lines):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(*columns, box=None, pad_edge=False)
    for line in lines:
        table.add_row(*line, style="red" if line[-1] != "ok" else None)
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def main(argv: list[str] | None = None) -> int:
    """Compile, print the table, return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m resnet_fused.bench.compile_gate_triton", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one configuration of every kernel for every architecture")
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)), help="comma-separated, of %(default)s")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (%(default)s)")
    parser.add_argument("--failures", action="store_true", help="print only what is wrong")
    options = parser.parse_args(argv)
    try:
        architectures = tuple(int(arch) for arch in options.arch.split(","))
    except ValueError:
        architectures = ()
    if not architectures or not set(architectures) <= set(ARCHITECTURES):
        parser.error(f"--arch {options.arch}: choose from {', '.join(map(str, ARCHITECTURES))}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        # Triton decided at import that there is nothing to compile: start again without that.
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        arguments = sys.argv[1:] if argv is None else argv
        return subprocess.run(
            [sys.executable, "-m", "resnet_fused.bench.compile_gate_triton", *arguments], env=environment
        ).returncode
    todo = jobs(architectures, options.quick, options.kernel)
    if not todo:
        parser.error(f"--kernel {options.kernel}: no kernel has that in its name")
    start = time.monotonic()
    reports = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for done, future in enumerate(as_completed([pool.submit(compile_job, job) for job in todo]), 1):
            reports.append(future.result())
            if sys.stderr.isatty():
                print(f"\r{done}/{len(todo)} compiled", end="", file=sys.stderr)
    bad = [report for report in reports if report.problems]
    _table(bad if options.failures else reports)
    print(f"{len(reports)} kernels compiled in {time.monotonic() - start:.0f} s, {len(bad)} in violation")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
