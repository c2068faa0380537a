"""The plan's answer for one problem: the measured table, else the heuristic of a verified backend, else PyTorch's own.

The functions that take tables are pure. `choose` and `conv_config` hand them the tables of this machine's GPU, and keep
each answer: nothing is ever measured here.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterable

import torch

from resnet_fused.plan import table as tables
from resnet_fused.plan.conv import ConvConfig, ConvShape, conv_dgrad_heuristic, conv_fprop_heuristic
from resnet_fused.plan.conv_wgrad import conv_wgrad_heuristic
from resnet_fused.plan.table import Choice, Entry, Problem, Table

ATEN = Choice("aten")
# Where several backends were verified, and none was timed on this problem.
_PREFERRED = ("triton", "cuda")
# An entry of a table also speaks for batches up to this factor larger or smaller.
NEAR = 2
CONVOLUTIONS: dict[str, Callable[..., ConvConfig]] = {
    "conv_fprop": conv_fprop_heuristic,
    "conv_fprop_stats": conv_fprop_heuristic,
    "conv_dgrad": conv_dgrad_heuristic,
    "conv_wgrad": conv_wgrad_heuristic,
}


def heuristic(problem: Problem, arch: int) -> ConvConfig | None:
    """The launch configuration of the Triton kernel for a convolution; None for an op that takes none."""
    if problem.op not in CONVOLUTIONS or not isinstance(problem.shape, ConvShape):
        return None
    flags = dict.fromkeys(problem.flags, True)
    if problem.op == "conv_fprop_stats":
        flags["statistics"] = True
    return CONVOLUTIONS[problem.op](problem.shape, problem.dtype, arch, problem.tf32, **flags)


def measured(problem: Problem, table: Table | None, backend: str | None = None) -> Choice | None:
    """The fastest choice of a table, of one backend or of all, for this problem or for the nearest batch of it."""
    if table is None:
        return None
    entry = table.entries.get(problem) or _nearest(problem, table)
    if entry is None:
        return None
    if backend is None:
        return entry.winner
    best = entry.best(backend)
    return best and best[0]


def _nearest(problem: Problem, table: Table) -> Entry | None:
    batch = problem.batch
    near = {
        max(batch, other.batch) / min(batch, other.batch): entry
        for other, entry in table.entries.items()
        if other.op == problem.op and other.with_batch(batch) == problem
    }
    return near[min(near)] if near and min(near) <= NEAR else None


def plan(problem: Problem, arch: int, known: Iterable[Table] = (), gpu: str | None = None) -> Choice:
    """The backend and configuration of a problem: a pure function.

    Args:
        problem: what is to run.
        arch: compute capability times ten of where.
        known: tables. The measured times of `gpu`'s count; what was verified on any GPU of this architecture does.
        gpu: the GPU's name, or None.
    """
    known = list(known)
    found = measured(problem, tables.of_gpu(known, gpu) if gpu else None)
    if found is not None:
        return found
    verified = {pair for table in known if table.arch == arch for pair in table.verified}
    backend = next((backend for backend in _PREFERRED if (problem.op, backend) in verified), None)
    if backend is None:
        return ATEN
    return Choice(backend, heuristic(problem, arch) if backend == "triton" else None)


def default(op: str, arch: int, known: Iterable[Table] = (), gpu: str | None = None) -> str:
    """The backend of an op where its shape is not known yet: the one that takes least time over all the problems of it
    that were measured on the GPU; a pure function of the same arguments as `plan`.
    """
    known = list(known)
    table = tables.of_gpu(known, gpu) if gpu else None
    entries = [entry for problem, entry in table.entries.items() if problem.op == op] if table else []
    totals: dict[str, float] = {}
    for backend in {choice.backend for entry in entries for choice, _ in entry.measured}:
        best = [entry.best(backend) for entry in entries]
        if all(best):  # one that cannot run all of them is chosen problem by problem, or not at all
            totals[backend] = sum(ms for _, ms in filter(None, best))
    if totals:
        return min(totals, key=totals.__getitem__)
    verified = {pair for table in known if table.arch == arch for pair in table.verified}
    return next((backend for backend in _PREFERRED if (op, backend) in verified), "aten")


@functools.cache
def gpu_name(arch: int) -> str | None:
    """The first GPU of this process of that architecture."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        if 10 * major + minor == arch:
            return torch.cuda.get_device_name(index)
    return None


@functools.lru_cache(maxsize=8192)
def choose(problem: Problem, arch: int) -> Choice:
    """`plan` with the tables of this machine. The first answer takes a millisecond, the same one again microseconds."""
    return plan(problem, arch, tables.known_tables(), gpu_name(arch))


@functools.lru_cache(maxsize=8192)
def conv_config(
    op: str, shape: ConvShape, dtype: torch.dtype, arch: int, tf32: bool = False, flags: tuple[str, ...] = ()
) -> ConvConfig:
    """The launch configuration of a Triton convolution: the fastest that was measured, else the heuristic's.

    Args:
        op: `"conv_fprop"`, `"conv_fprop_stats"`, `"conv_dgrad"` or `"conv_wgrad"`.
        shape: the problem, as of the forward.
        dtype: of the activations.
        arch: compute capability times ten.
        tf32: whether fp32 operands may be rounded to TF32.
        flags: the op's variants in use, sorted: `"prologue"`; of wgrad `"dy_prologue"`, `"x_prologue"`.
    """
    problem = Problem(op, shape, dtype, tf32, flags)
    table = tables.of_gpu(tables.known_tables(), gpu_name(arch) or "")
    found = measured(problem, table, "triton")
    if table is not None and found is not None and found.config is not None:
        # Another Triton may lack an experimental formulation, or compile it into something else.
        if found.config.kernel == "pointer" or table.provenance.get("triton") == _triton():
            return found.config
    config = heuristic(problem, arch)
    if config is None:
        raise ValueError(f"{op} takes no launch configuration; choose one of {', '.join(CONVOLUTIONS)}")
    return config


@functools.cache
def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def default_on(arch: int, op: str) -> str:
    return default(op, arch, tables.known_tables(), gpu_name(arch))


def forget() -> None:
    """Read the tables again at the next question: a new one has been written."""
    for cached in (tables.known_tables, gpu_name, choose, conv_config, default_on):
        cached.cache_clear()
