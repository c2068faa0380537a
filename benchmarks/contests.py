"""Which kernel of ours stands against what of PyTorch's at which shape: the questions of `benchmarks.questions`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import ops
from resnet_fused.bench.candidates import backends, operands_of, timed
from resnet_fused.bench.checks import caller
from resnet_fused.bench.network import Network, networks
from resnet_fused.bench.problems import Job, Operands, arguments, jobs, memory_arguments
from resnet_fused.plan import choice as plans
from resnet_fused.plan import experimental
from resnet_fused.plan.conv import ConvShape
from resnet_fused.plan.table import Choice, Problem

CONFIGURATIONS = 3  # of a formulation and shape
MEMORY_OPS = ("bn_stats", "bn_apply", "bn_backward_reduce", "bn_backward_apply")
Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Contest:
    """One row: the candidates of one formulation of ours, and PyTorch's ways to the same result.

    Attributes:
        question, shape, kernel: the row's name.
        job: what the candidates are checked on; of a memory-bound op its problem alone counts.
        op: the op that is checked.
        candidates: ours.
        calls: given fresh operands' maker, (ours by candidate, PyTorch's by name, bytes, floating-point operations).
    """

    question: str
    shape: str
    kernel: str
    job: Job
    op: str
    candidates: tuple[Choice, ...]
    calls: Callable[[Operands, tuple[Choice, ...]], tuple[dict[str, Call], dict[str, Call], int, int]]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.question, self.shape, self.kernel


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where the questions are asked, and of which network."""

    device: torch.device
    arch: int
    dtype: torch.dtype
    batch: int
    network: Network

    @classmethod
    def here(cls, rehearse: bool) -> Setting:
        (network,) = networks("resnet50", 32 if rehearse else 224)
        if rehearse:
            return cls(torch.device("cpu"), 90, torch.bfloat16, 2, network)
        device = torch.device("cuda", torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability(device)
        return cls(device, 10 * major + minor, torch.bfloat16, 256, network)

    def formulations(self, problem: Problem) -> Iterator[tuple[str, tuple[Choice, ...]]]:
        """Those of Triton's convolutions that are for this problem and architecture, experimental ones first."""
        shape = problem.shape
        if "triton" not in backends(self.device) or not isinstance(shape, ConvShape):
            return
        found: dict[str, list[Choice]] = {}
        for config in experimental.configurations(self.arch) if "prologue" not in problem.flags else ():
            fits = experimental.refuse_shape(shape, problem.dtype, self.arch, config) is None
            boxes_of_rows = config.kernel.startswith("tma_conv") and (shape.r, shape.stride) == (1, (1, 1))
            if fits and not boxes_of_rows and config.block_n <= max(64, shape.k):  # that is tma_gemm's
                found.setdefault(config.kernel, []).append(Choice("triton", config))
        first = sorted(found, key=lambda kernel: kernel.startswith("tma"))  # warp-specialised before what compilers do
        for kernel in first:
            yield kernel, tuple(found[kernel][:CONFIGURATIONS])
        yield "pointer", (Choice("triton", plans.heuristic(problem, self.arch)),)


def contests(setting: Setting) -> Iterator[Contest]:
    """All questions, the most valuable first."""
    layers = {layer.shape: layer for layer in setting.network.layers[1:]}
    shapes = [dataclasses.replace(shape, n=setting.batch) for shape in layers]
    stem = dataclasses.replace(setting.network.stem.shape, n=setting.batch)
    wide = [s for s in shapes if s.r > 1 or s.stride != (1, 1)]
    narrow = [s for s in shapes if s.r == 1 and s.stride == (1, 1)]
    found = jobs(setting.network, ("infer", "train"), setting.batch, setting.dtype, setting.arch, False)
    yield from _bare(setting, "3x3 and strided, convolution alone", wide)
    yield from _bare(setting, "1x1, convolution alone", narrow)
    yield from _fused(setting, "1x1 with shift, residual, ReLU", [j for j in found if _joins(j)])
    yield from _fused(setting, "chain 3x3, 1x1, next 1x1", [j for j in found if j.problem.op == "conv_chain"])
    statistics = [j for j in found if j.problem.op == "conv_fprop_stats" and j.problem.shape != stem]
    plain, prologue = (
        [j for j in statistics if ("prologue" in j.problem.flags) == with_it] for with_it in (False, True)
    )
    yield from _fused(setting, "statistics in the epilogue", plain)
    yield from _fused(setting, "prologue, and statistics in the epilogue", prologue)
    norms = [j for j in found if j.problem.op == "bn_apply"]
    yield from _memory(setting, "batch norm against a copy", [j for j in norms if "residual" in j.problem.flags])
    yield from _families(setting, "batch norm forward and backward", norms)


def _joins(job: Job) -> bool:
    return job.problem.op == "conv_fprop" and job.residual


def _bare(setting: Setting, question: str, shapes: Sequence[ConvShape]) -> Iterator[Contest]:
    """The convolution with nothing around it, against cuDNN, and where it is one cuBLAS's matrix product."""

    def calls(make: Operands, candidates: tuple[Choice, ...], s: ConvShape) -> Any:
        x, weight = make.activation(s.n, s.c, s.h, s.w), make.weight(s.k, s.c // s.groups, s.r, s.s)
        geometry = (list(s.stride), list(s.padding), list(s.dilation), s.groups)
        ours = {
            str(c): functools.partial(caller("conv_fprop", c), x, weight, None, None, None, *geometry, False)
            for c in candidates
        }
        plain: dict[str, Call] = {"conv2d": functools.partial(F.conv2d, x, weight, None, *geometry)}
        if (s.r, s.s, s.stride, s.groups) == (1, 1, (1, 1), 1):
            rows, columns = x.permute(0, 2, 3, 1).reshape(-1, s.c), weight.reshape(s.k, s.c).t()

            def product() -> Tensor:
                return (rows @ columns).view(s.n, s.h, s.w, s.k).permute(0, 3, 1, 2)

            plain["matmul"] = product
        return ours, plain, _bytes(x, weight) + s.n * s.k * s.p * s.q * x.element_size(), _flops(s)

    for shape in shapes:
        problem = Problem("conv_fprop", shape, setting.dtype)
        for kernel, candidates in setting.formulations(problem):
            run = functools.partial(calls, s=shape)
            yield Contest(question, _text(problem), kernel, Job(problem), "conv_fprop", candidates, run)


def _fused(setting: Setting, question: str, found: Sequence[Job]) -> Iterator[Contest]:
    """A fused convolution, against what the network runs where that is PyTorch's: its convolutions, passes of ours."""

    def calls(make: Operands, candidates: tuple[Choice, ...], job: Job) -> Any:
        operands = arguments(job, make)
        ours = {str(choice): timed(job, choice, operands) for choice in candidates}
        plain = {"separate": timed(job, plans.ATEN, operands)}
        shape = job.problem.shape
        assert isinstance(shape, ConvShape)
        flops, moved = _flops(shape), _bytes(*operands)
        if job.problem.op == "conv_chain":
            outputs, following = job.following
            flops += 2 * shape.n * shape.p * shape.q * outputs * (shape.k + following)
            moved += shape.n * shape.p * shape.q * (outputs + following) * setting.dtype.itemsize
        else:
            moved += shape.n * shape.p * shape.q * shape.k * setting.dtype.itemsize
        return ours, plain, moved, flops

    for job in found:
        listed = setting.formulations(job.problem)
        if job.problem.op == "conv_chain":
            listed = iter([("pointer", (Choice("triton"),))] if "triton" in backends(setting.device) else [])
        for kernel, candidates in listed:
            run = functools.partial(calls, job=job)
            yield Contest(question, _text(job.problem), kernel, job, job.problem.op, candidates, run)


def _families(setting: Setting, question: str, found: Sequence[Job]) -> Iterator[Contest]:
    """All ops of a batch norm with its ReLU, and residual, in a training step, against PyTorch's."""

    def calls(make: Operands, candidates: tuple[Choice, ...], job: Job) -> Any:
        operands = operands_of(job, make)
        x, _, residual, *_ = operands
        passes = 8 if residual is None else 10  # x 2, y; dy 2, x 2, dx: a residual once each way
        ours = {choice.backend: timed(job, choice, operands) for choice in candidates}
        return ours, {"batch_norm, relu": timed(job, plans.ATEN, operands)}, passes * _bytes(x), 0

    for job in found:
        for backend in backends(setting.device):
            run = functools.partial(calls, job=job)
            yield Contest(question, _text(job.problem), backend, job, "bn_apply", (Choice(backend),), run)


def _memory(setting: Setting, question: str, found: Sequence[Job]) -> Iterator[Contest]:
    """Each op of it by itself: only the roof, the measured bandwidth of a copy, stands beside it."""

    def calls(make: Operands, candidates: tuple[Choice, ...], op: str, problem: Problem) -> Any:
        operands = memory_arguments(op, problem, make)
        ours = {choice.backend: functools.partial(caller(op, choice), *operands) for choice in candidates}
        written = next(iter(ours.values()))()
        return ours, {}, _bytes(*operands, *(written if isinstance(written, tuple | list) else [written])), 0

    for job in found:
        for op in MEMORY_OPS:
            for backend in backends(setting.device):
                if ops.implements(backend, op):
                    shape = f"{op} {_text(job.problem)}"
                    run = functools.partial(calls, op=op, problem=job.problem)
                    yield Contest(question, shape, backend, job, op, (Choice(backend),), run)


def _text(problem: Problem) -> str:
    return str(problem).removeprefix(f"{problem.op} ")


def _bytes(*values: Any) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def _flops(s: ConvShape) -> int:
    return 2 * s.n * s.p * s.q * s.k * (s.c // s.groups) * s.r * s.s
