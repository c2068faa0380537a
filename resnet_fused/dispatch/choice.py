"""What runs one problem: the measured table's answer, else what won over all problems of the op, else native PyTorch.

The functions that take tables are pure. `choose`, `conv_config`, `layer` and `block` hand them the tables of this
machine's GPU, and keep each answer: nothing is ever measured here.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from resnet_fused.dispatch import device, formulation
from resnet_fused.dispatch import table as tables
from resnet_fused.dispatch.conv import HEURISTICS, BlockShape, ConvConfig, ConvShape
from resnet_fused.dispatch.conv_chain import TAILS, chain_heuristic, join_heuristic
from resnet_fused.dispatch.conv_wgrad import conv_wgrad_heuristic
from resnet_fused.dispatch.formulation import LayerPlan
from resnet_fused.dispatch.lookup import measured
from resnet_fused.dispatch.table import Choice, Problem, Table

log = logging.getLogger("resnet_fused")
ATEN = Choice("aten")
BLOCK = "residual_block"  # the op of entries about whole blocks
ALONE = "alone"  # the flag of a single op of a family: it says nothing about the family
CONVOLUTIONS: dict[str, Callable[..., ConvConfig]] = {
    **HEURISTICS,
    "conv_wgrad": conv_wgrad_heuristic,
    "conv_chain": chain_heuristic,
    "conv_join": join_heuristic,
    "conv_join_int8": join_heuristic,
}
# Flags that tell what else an op does, and that the heuristics need not know.
_UNSEEN = ("epilogue", "residual")


def heuristic(problem: Problem, arch: int) -> ConvConfig | None:
    """The launch configuration of the Triton kernel for a convolution; None for an op that takes none."""
    if problem.op not in CONVOLUTIONS or not isinstance(problem.shape, ConvShape):
        return None
    arguments = (problem.shape, problem.dtype, arch, problem.tf32)
    if problem.op in TAILS:
        return CONVOLUTIONS[problem.op](*arguments, problem.flags)
    flags = dict.fromkeys((flag for flag in problem.flags if flag not in _UNSEEN), True)
    return CONVOLUTIONS[problem.op](*arguments, **flags)


def plan(problem: Problem, arch: int, known: Iterable[Table] = (), gpu: str | None = None) -> Choice:
    """The backend and configuration of a problem: a pure function.

    Args:
        problem: what is to run.
        arch: compute capability times ten of where.
        known: tables. `gpu`'s own counts; where it has none, that of another GPU of its architecture, with a margin.
        gpu: the GPU's name, or None.
    """
    known = list(known)
    table, margin = tables.select_table(known, gpu, arch)
    found = measured(problem, table, margin=margin)
    if found is not None:
        return found
    backend = default(problem.op, arch, known, gpu, problem.dtype)
    return Choice(backend, heuristic(problem, arch)) if backend == "triton" else Choice(backend)


def default(
    op: str, arch: int, known: Iterable[Table] = (), gpu: str | None = None, dtype: torch.dtype | None = None
) -> str:
    """The backend of an op where its shape is not known, or was not measured: the one that takes least time over all
    the problems of it that were measured; a pure function of the same arguments as `plan`.

    Args:
        op: its name; that of a family's member counts as the family's, `"residual_block"` is the chain's.
        arch, known, gpu: as for `plan`.
        dtype: only of problems in this one.
    """
    table, margin = tables.select_table(list(known), gpu, arch)
    if table is None:
        return "aten"
    entries = [
        entry
        for problem, entry in table.entries.items()
        if problem.op == op and ALONE not in problem.flags and dtype in (None, problem.dtype)
    ]
    if op == BLOCK:  # each block decides for itself: is there any that a chain may run?
        chosen = {measured(entry.problem, table, margin=margin) or ATEN for entry in entries}
        backends = sorted(choice.backend for choice in chosen if choice != ATEN)
        return backends[-1] if backends else "aten" if entries else default("bn_apply", arch, [table], gpu, dtype)
    totals: dict[str, float] = {}
    for backend in {choice.backend for entry in entries for choice, _ in entry.measured}:
        best = [entry.best(backend) for entry in entries]
        if all(best):  # one that cannot run all of them is chosen problem by problem, or not at all
            totals[backend] = sum(ms for _, ms in filter(None, best)) * (1.0 if backend == "aten" else margin)
    return min(totals, key=lambda backend: (totals[backend], backend)) if totals else "aten"


def plan_layer(
    shape: ConvShape,
    dtype: torch.dtype,
    arch: int,
    tf32: bool,
    first: bool,
    residual: bool,
    known: Iterable[Table] = (),
    gpu: str | None = None,
) -> LayerPlan:
    """`formulation.layer`, and where it was not measured the rule of `heuristics.training`, each op on the backend that
    `plan` has for it: a pure function of the arguments of both.
    """
    known = list(known)
    table, margin = tables.select_table(known, gpu, arch)
    found = formulation.layer(shape, dtype, arch, tf32, first, residual, table, margin)
    if found is not None:
        return found
    fusion = formulation.by_rule(shape, dtype, arch, first)
    asked = formulation.problems(shape, dtype, tf32, fusion, first, residual)
    fprop, dgrad, wgrad = (plan(problem, arch, known, gpu).backend for problem in asked)
    return LayerPlan(fprop, dgrad, wgrad, fusion)


# ---- of this machine -------------------------------------------------------------------------------------------------

_assumed: tuple[Table, ...] | None = None
_assumed_gpu: str | None = None


@contextmanager
def assuming(table: Table) -> Iterator[None]:
    """Plan by this table alone, as if on its GPU: for `tune`, which measures what a table would lead to."""
    global _assumed, _assumed_gpu
    before = _assumed, _assumed_gpu
    _assumed, _assumed_gpu = (table,), table.gpu
    forget()
    try:
        yield
    finally:
        _assumed, _assumed_gpu = before
        forget()


def _known() -> tuple[Table, ...]:
    return tables.known_tables() if _assumed is None else _assumed


def _name(arch: int) -> str | None:
    return gpu_name(arch) if _assumed_gpu is None else _assumed_gpu


@functools.cache
def gpu_name(arch: int) -> str | None:
    """The first GPU of this process of that architecture."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if device.arch(torch.device("cuda", index)) == arch:
            return torch.cuda.get_device_name(index)
    return None


def advice(arch: int) -> str | None:
    """What to do where no table speaks for the GPU of this architecture here; None where one does, or there is none."""
    gpu = gpu_name(arch) if _assumed is None else None
    if gpu is None or tables.select_table(_known(), gpu, arch)[0] is not None:
        return None
    return (
        f"nothing was measured on {gpu} yet, so fused models run native PyTorch there (frozen ones cuDNN's fused "
        "convolutions); `resnet-fused tune` finds out what is faster and writes a table that is used from then on"
    )


@functools.cache
def _advise(arch: int) -> None:
    """Say it once in a process."""
    text = advice(arch)
    if text is not None:
        log.warning(text)


@functools.lru_cache(maxsize=8192)
def choose(problem: Problem, arch: int) -> Choice:
    """`plan` with the tables of this machine. The first answer takes a millisecond, the same one again microseconds."""
    _advise(arch)
    return plan(problem, arch, _known(), _name(arch))


@functools.lru_cache(maxsize=8192)
def conv_config(problem: Problem, arch: int) -> ConvConfig:
    """The launch configuration of a Triton convolution: the fastest that was measured, else the heuristic's.

    Args:
        problem: of one of `CONVOLUTIONS`, with the op's variants in use as flags: `"prologue"`; of wgrad
            `"dy_prologue"`, `"x_prologue"`; of the chain and the join those of `conv_chain.chain_flags`,
            `conv_chain.join_flags`.
        arch: compute capability times ten.
    """
    table, _ = tables.select_table(_known(), _name(arch), arch)
    found = measured(problem, table, "triton")
    if found is None:  # a launcher may say less of what its op does than the table distinguishes
        variants = (replace(problem, flags=tuple(sorted((*problem.flags, more)))) for more in _UNSEEN)
        found = next(filter(None, (measured(variant, table, "triton") for variant in variants)), None)
    if table is not None and found is not None and found.config is not None:
        # Another Triton may lack an experimental formulation, or compile it into something else.
        if found.config.kernel == "pointer" or table.provenance.get("triton") == _triton():
            return found.config
    config = heuristic(problem, arch)
    if config is None:
        raise ValueError(f"{problem.op} takes no launch configuration; choose one of {', '.join(CONVOLUTIONS)}")
    return config


@functools.lru_cache(maxsize=8192)
def layer(shape: ConvShape, dtype: torch.dtype, arch: int, tf32: bool, first: bool, residual: bool) -> LayerPlan:
    """`plan_layer` with the tables of this machine."""
    return plan_layer(shape, dtype, arch, tf32, first, residual, _known(), _name(arch))


@functools.lru_cache(maxsize=8192)
def block(shape: BlockShape, dtype: torch.dtype, arch: int, tf32: bool) -> str | None:
    """The backend of a chain's passes, `"aten"` for native PyTorch layer by layer; None where no such chain was
    measured, and the plan of its ops decides.
    """
    table, margin = tables.select_table(_known(), _name(arch), arch)
    found = measured(Problem(BLOCK, shape, dtype, tf32), table, margin=margin)
    return None if found is None else found.backend


@functools.cache
def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def default_on(arch: int, op: str) -> str:
    _advise(arch)
    return default(op, arch, _known(), _name(arch))


_dependent: list[Callable[[], None]] = []


def forget_with_plan(clear: Callable[[], None]) -> None:
    """Call `clear` whenever the tables are to be read again: for what keeps answers, or what was made of them."""
    _dependent.append(clear)


def forget() -> None:
    """Read the tables again at the next question: a new one has been written."""
    for cached in (tables.known_tables, gpu_name, choose, conv_config, layer, block, default_on):
        cached.cache_clear()
    for clear in _dependent:
        clear()
