"""Compile every Triton kernel configuration for every supported architecture, without a GPU, and check what came out.

    python -m tools.compile_gate.triton_gate [--quick|--model NAME] [--arch 80,90] [--kernel conv] [--json FILE]

The launchers run on meta tensors and are recorded instead of launched, so what is compiled is what would be launched.
Checked: it compiles, fits the architecture's shared memory, does not spill, uses the matrix instruction (and the
asynchronous copies that feed it) of the architecture without waiting for each, divides no integers in the main loop,
specialises its warps where it should, and moves activations 128 bits at a time where their layout allows. Reported
beside it: the instructions of the main loop and behind it, and issue/MMA, the loop's issue cycles over the cycles its
matrix instructions take at peak; below 1 the loop is not bound by issuing instructions. Exit code 1 on any violation.
"""

from __future__ import annotations

import argparse
import contextlib
import copyreg
import io
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from resnet_fused.tuning.launches import SHARED_MEMORY_KB, recording
from tools.compile_gate.bn_cases import batch_norm_cases
from tools.compile_gate.conv_cases import candidate_cases, conv_cases, int8_cases
from tools.compile_gate.expect import TYPES, Expect
from tools.compile_gate.experimental_cases import experimental_cases
from tools.compile_gate.machine_code import MachineCode, read
from tools.compile_gate.network_cases import network_cases
from tools.compile_gate.wgrad_cases import chain_cases, wgrad_cases

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
MATRIX_INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
# Launched beside the kernel of a case, on what is small: partial sums, weights. Cases of their own say what is wanted.
HELPERS = ("_reduce_rows_kernel", "_merge_statistics_kernel", "_pack_weight_kernel")
OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of a launch, beside the kernel's own arguments


def matrix_instruction(arch: int, eight: bool) -> str:
    """What multiplies tiles there; of 8 bits, Triton before 3.8 has no tcgen05."""
    import triton

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    return "mma.sync" if eight and old and arch == 100 else MATRIX_INSTRUCTION[arch]


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
    shared: int = 0
    code: MachineCode = field(default_factory=MachineCode)
    problems: list[str] = field(default_factory=list)


def job(
    label: str, expect: Expect, arch: int, kernel: Any, name: str, args: tuple[Any, ...], options: dict[str, Any]
) -> Job:
    """A recorded launch as triton's JIT would specialise it: None and 1 are constants, multiples of 16 and tensors are
    known to be aligned.
    """
    from triton.runtime.jit import mangle_type

    launch = {"num_warps": 4} | {key: options[key] for key in options if key in OPTIONS and options[key] is not None}
    bound = dict(zip(kernel.arg_names, args, strict=False)) | {
        key: value for key, value in options.items() if key not in OPTIONS
    }
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature, constants, aligned = [], [], []
    for i, parameter in enumerate(kernel.arg_names):
        value = bound[parameter]
        kind = "fp32"
        if parameter in constexprs or value is None or (isinstance(value, int) and value == 1):
            kind = "constexpr"
            constants.append((i, value))
        elif hasattr(value, "block_shape"):  # a host tensor descriptor
            kind = mangle_type(value)
        elif isinstance(value, Tensor):
            kind = "*" + TYPES[value.dtype]
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


def jobs(architectures: tuple[int, ...], quick: bool, only: str, model: str | None = None) -> list[Job]:
    """Every distinct launch of every case, for every architecture; with a model only what the plan launches for it."""
    found: dict[Any, Job] = {}
    for arch in architectures:
        families = (
            *(conv_cases, int8_cases, candidate_cases, wgrad_cases, chain_cases),
            *(batch_norm_cases, experimental_cases),
        )
        every = itertools.chain(*(family(arch, quick) for family in families))
        for label, expect, run in every if model is None else network_cases(model, arch):
            with recording() as launches:
                run()
            for kernel, name, args, options in launches:
                wanted = Expect() if name in HELPERS and len(launches) > 1 else expect
                one = job(label, wanted, arch, kernel, name, args, options)
                if only in name:
                    found.setdefault((name, arch, one.signature, str(one.constants), one.aligned, one.options), one)
    return list(found.values())


def jitted(module: str, name: str) -> Any:
    """A `@triton.jit` function."""
    return getattr(import_module(module), name)


def _by_name(function: Any) -> tuple[Any, ...]:
    """How an epilogue function, a constant of a kernel, is told to another process."""
    return jitted, (function.fn.__module__, function.fn.__name__)


# ---- compiling and checking ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ptxas_log() -> Iterator[io.StringIO]:
    """What ptxas says of the kernels compiled meanwhile, which do not come out of triton's cache."""
    from triton import knobs

    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        yield log


def compile_job(job: Job) -> Report:
    """Compile one kernel to machine code, read it back and compare it with what the job expects."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    warnings.simplefilter("ignore")
    report = Report(job)
    start = time.monotonic()
    kernel = jitted(job.module, job.kernel)
    source_type = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source_type = GluonASTSource
    source = source_type(
        fn=kernel,
        signature=dict(job.signature),
        constexprs={(i,): value for i, value in job.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in job.aligned},
    )
    pipelined = job.expect.matrix and MATRIX_INSTRUCTION[job.arch] == "wgmma"
    try:
        with ptxas_log() if pipelined else contextlib.nullcontext(io.StringIO()) as log:
            compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=dict(job.options))
    except Exception as error:  # whatever the compiler raises is the finding
        report.problems.append(f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
        return report
    code = report.code = read(compiled.asm, job.arch, dict(job.options)["num_warps"])
    report.shared = compiled.metadata.shared
    report.seconds = time.monotonic() - start

    expect, limit = job.expect, SHARED_MEMORY_KB[job.arch] * 1024
    instruction = matrix_instruction(job.arch, expect.eight)
    checks = (
        (code.spills > 0, f"spills ({code.spills})"),
        (report.shared > limit, f"{report.shared} bytes of shared memory, sm_{job.arch} has {limit}"),
        (expect.matrix and code.matrix != instruction, f"{code.matrix}, not {instruction}"),
        (expect.eight and not code.eight, f"{code.matrix} not of 8 bits"),
        (not expect.matrix and code.matrix != "-", f"{code.matrix} where exact fp32 was asked for"),
        ("wgmma.mma_async instructions are serialized" in log.getvalue(), "serialised wgmma"),
        # warps of their own may divide beside those that multiply
        (code.divisions > 0 and not code.specialized, f"divides in its main loop ({code.divisions})"),
        (expect.copies and code.copies == 0, "no asynchronous copies"),
        (expect.tma and code.tma == 0, "no copies by the tensor memory accelerator"),
        (expect.specialized and not code.specialized, "warps not specialised"),
        (expect.wide_loads and code.wide_loads == 0, "no 128-bit loads"),
        (expect.wide_stores and code.wide_stores == 0, "no 128-bit stores"),
        (expect.index64 and not code.index64, "32-bit offsets"),
    )
    report.problems += [problem for violated, problem in checks if violated]
    return report


def row(report: Report) -> dict[str, Any]:
    """A report as the table and the JSON file have it."""
    job, code = report.job, report.code
    return {
        "kernel": job.kernel.strip("_").removesuffix("_kernel"),
        "case": job.label,
        "arch": job.arch,
        "num_warps": dict(job.options)["num_warps"],
        "registers": code.registers,
        "spills": code.spills,
        "shared": report.shared,
        "matrix": code.matrix + " int8" * code.eight,
        "loop": code.loop,
        "behind": code.behind,
        "shuffles": code.shuffles,
        "issue/MMA": code.issue_per_mma and round(code.issue_per_mma, 2),
        "cp.async": code.copies,
        "tma": code.tma,
        "specialized": code.specialized,
        "wide_loads": [code.wide_loads, code.loads],
        "wide_stores": [code.wide_stores, code.stores],
        "seconds": round(report.seconds, 1),
        "problems": report.problems,
    }


def _table(rows: list[dict[str, Any]]) -> None:
    columns = (
        *("kernel", "case", "sm", "regs", "spills", "shared", "matrix", "loop", "issue/MMA"),
        *("cp.async", "TMA", "128-bit ld", "st", ""),
    )
    lines = [
        (
            row["kernel"],
            row["case"],
            str(row["arch"]),
            str(row["registers"]),
            str(row["spills"]),
            f"{row['shared'] / 1024:.0f}K",
            row["matrix"] + " ws" * row["specialized"],
            str(row["loop"] or "-"),
            str(row["issue/MMA"] or "-"),
            str(row["cp.async"]),
            str(row["tma"]),
            "/".join(map(str, row["wide_loads"])),
            "/".join(map(str, row["wide_stores"])),
            "; ".join(row["problems"]) or "ok",
        )
        for row in rows
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
        prog="python -m tools.compile_gate.triton_gate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one configuration of every kernel for every architecture")
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)), help="comma-separated, of %(default)s")
    parser.add_argument("--model", help="only what the plan launches for this network, e.g. resnet50, in bf16")
    parser.add_argument(
        "--step", type=int, metavar="IMAGES", help="with --model and one --arch: what a training step would take"
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row there")
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
            [sys.executable, "-m", "tools.compile_gate.triton_gate", *arguments], env=environment
        ).returncode
    import triton

    from resnet_fused.kernels import experimental

    copyreg.pickle(triton.JITFunction, _by_name)
    if options.step:
        from tools.compile_gate import static_model

        if options.model is None or len(architectures) > 1 or architectures[0] not in static_model.RATES:
            choices = " or ".join(map(str, static_model.RATES))
            parser.error(f"--step {options.step}: needs --model and --arch {choices}")
        predicted = list(static_model.step(options.model, options.step, architectures[0], options.jobs))
        print(static_model.table(predicted, options.step))
        return 0
    todo = jobs(architectures, options.quick, options.kernel, options.model)
    if not todo:
        parser.error(f"--kernel {options.kernel}: no kernel has that in its name")
    start = time.monotonic()
    reports = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for done, future in enumerate(as_completed([pool.submit(compile_job, job) for job in todo]), 1):
            reports.append(future.result())
            if sys.stderr.isatty():
                print(f"\r{done}/{len(todo)} compiled", end="", file=sys.stderr)
    rows = sorted(map(row, reports), key=lambda row: (row["kernel"], row["case"], row["arch"]))
    bad = [row for row in rows if row["problems"]]
    _table(bad if options.failures else rows)
    if options.json:
        options.json.write_text(
            json.dumps({"triton": triton.__version__, "quick": options.quick, "rows": rows}, indent=1)
        )
    for reason in filter(None, map(experimental.available, experimental.KERNELS)):
        print(f"not compiled: {reason}")
    print(f"{len(rows)} kernels compiled in {time.monotonic() - start:.0f} s, {len(bad)} in violation")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
