"""One op against float64 at real shapes: values, guards around operands, unwritten results, and run against run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused.measure import memory
from resnet_fused.measure.timing import first_line
from resnet_fused.ops import arithmetic, aten, reference
from resnet_fused.ops.backends import implementation
from resnet_fused.plan.conv import ConvShape
from resnet_fused.plan.table import Choice, Problem
from resnet_fused.tuning.problems import (
    FAMILIES,
    Job,
    Operands,
    also,
    arguments,
    elements,
    join_arguments,
    memory_arguments,
)

FACTOR = 2.0
FLOOR_ULPS = 4
REFUSED = "refused: "  # how a reason begins that is no error of the kernel
CHECK_BYTES = 32  # an element: an operand, its guarded copy, float64's and the results
VERIFIED_IMAGES = 16  # float64 of more would take longer than all the rest


@dataclass(frozen=True)
class Comparison:
    """A result of ours beside plain PyTorch's in the same dtype and float64's.

    Attributes:
        name: of the result.
        actual: ours.
        plain: plain PyTorch's; None where bits must agree with `truth`.
        truth: float64's.
        terms: of a sum, what the magnitudes of its summands add up to; its floor is measured by that.
    """

    name: str
    actual: Tensor
    plain: Tensor | None
    truth: Tensor
    terms: Tensor | None = None

    def breach(self) -> str | None:
        """How this breaks the numerics contract, or None."""
        if self.actual.shape != self.truth.shape:
            return f"{self.name} is {list(self.actual.shape)}, expected {list(self.truth.shape)}"
        if self.plain is None:
            wrong = int((self.actual != self.truth).sum())
            return f"{self.name} differs in {wrong} of {self.truth.numel()} places" if wrong else None
        truth = self.truth.double()
        unwritten = int(self.actual.isnan().sum())
        if unwritten:
            return f"{self.name} has {unwritten} NaN"
        error, plain = (float((value.double() - truth).abs().max()) for value in (self.actual, self.plain))
        size = self.terms if self.terms is not None else truth
        epsilon = torch.finfo(torch.float32 if self.terms is not None else self.actual.dtype).eps
        allowed = FACTOR * plain + FLOOR_ULPS * epsilon * float(size.abs().max())
        return None if error <= allowed else f"{self.name} errs by {error:.2e} > {allowed:.2e} (plain: {plain:.2e})"


def check(problem: Problem, op: str, job: Job | None, choice: Choice, device: torch.device) -> str | None:
    """Run one op once against float64, and once more against itself; why it is not right, or None.

    Args:
        problem: the shape and dtype to run, as large as is wanted.
        op: the problem's op, or one of its family.
        job: of a convolution.
        choice: the backend, and the configuration if it takes one.
        device: where.
    """
    try:
        if device.type == "cpu":
            memory.require(CHECK_BYTES * elements(problem))
        make = Operands(device, problem.dtype)
        operands = memory_arguments(op, problem, make) if job is None else arguments(job, make)
        if op == "conv_dgrad_join":
            operands = join_arguments(operands, make)
        reason = _refusal(op, choice, operands, problem.shape)
        if reason is not None:
            return f"{REFUSED}{reason}"
        call = caller(op, choice)
        with poisoned():
            first = _tensors(call(*operands))
            again = _tensors(call(*operands))
        damage = make.damage()
        if damage is not None:
            return damage
        for a, b in zip(first, again, strict=True):
            if not torch.equal(_bits(a), _bits(b)):
                return "two runs differ"
        tf32 = problem.tf32 and device.type == "cuda"
        problems = (comparison.breach() for comparison in comparisons(op, operands, first, tf32))
        return next(filter(None, problems), None)
    except Exception as error:  # whatever a kernel raises is its result
        return first_line(error)


def _refusal(op: str, choice: Choice, operands: Sequence[Any], shape: Any) -> str | None:
    if choice.backend != "triton":
        return None
    reason: str | None = importlib.import_module("resnet_fused.kernels").refuse(op, *operands)
    if reason is None and choice.config is not None and choice.config.kernel != "pointer":
        experimental = importlib.import_module("resnet_fused.kernels.experimental")
        krsc = operands[1].contiguous(memory_format=torch.channels_last)
        residual = operands[4] if op == "conv_fprop" else None
        reason = experimental.refuse(operands[0], krsc, residual, shape, choice.config)
    return reason


def caller(op: str, choice: Choice) -> Callable[..., Any]:
    """The function that runs an op as chosen; its arguments are the op's without `backend`."""
    if choice.backend == "triton":
        launcher = getattr(importlib.import_module("resnet_fused.kernels"), op)
        return launcher if choice.config is None else lambda *args: launcher(*args, config=choice.config)
    return implementation(choice.backend, op)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """NaN in whatever `torch.empty` returns, so that an element nobody wrote shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


def comparisons(op: str, operands: Sequence[Any], results: Sequence[Tensor], tf32: bool = False) -> list[Comparison]:
    """What to compare of the results of an op.

    Args:
        op: its name.
        operands: what it was called with.
        results: what came of it.
        tf32: products may round their operands to TF32. Whether cuDNN's do depends on the algorithm it picks, so the
            yardstick is not its error but that of operands cut off as the matrix units cut them off.
    """
    plain_op = getattr(reference, op) if tf32 else getattr(aten, op, None) or getattr(reference, op)
    plain = _tensors(plain_op(*map(_cut_off, operands) if tf32 else operands))
    truth = _tensors(getattr(reference, op)(*map(_double, operands)))
    if op == "conv_fprop_stats":
        y, rounded = results[0], results[0].double()
        merged = _merge(*results[1:])
        variance, mean = torch.var_mean(rounded, (0, 2, 3), correction=0)
        plain_variance, plain_mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
        return [
            Comparison("y", y, plain[0], truth[0]),
            Comparison("mean", merged[0], plain_mean, mean, rounded.abs().mean((0, 2, 3))),
            Comparison("variance", merged[1], plain_variance, variance, rounded.square().mean((0, 2, 3))),
        ]
    if op == "bn_stats":
        merged, right, plains = _merge(*results), _merge(*truth), _merge(*plain)
        x = _double(operands[0])
        return [
            Comparison("mean", merged[0], plains[0], right[0], x.abs().mean((0, 2, 3))),
            Comparison("variance", merged[1], plains[1], right[1], x.square().mean((0, 2, 3))),
        ]
    exact: list[Any] = [_double(operand) for operand in operands]
    if op == "conv_dgrad" and results[1].numel():
        x, _, _, mean, invstd = exact[6:11]
        dx = Comparison("dx", results[0], plain[0], truth[0])
        return [dx, *_sums(results[0].double(), x, mean, invstd, results[1:], (None, None))]
    if op == "conv_dgrad_join":
        x, _, mean, invstd, z, z_mean, z_invstd = exact[6:13]
        dz = torch.where(arithmetic.unpack_bits(operands[7], x), results[0].double(), 0)
        both = _sums(dz, x, mean, invstd, results[1:3], (None, None))
        projected = _sums(dz, z, z_mean, z_invstd, results[1:4:2], (None, None))[1:]
        return [Comparison("dx", results[0], plain[0], truth[0]), *both, *projected]
    if op == "bn_backward_reduce":
        dy, x, mask, scale, shift, mean, invstd, *_ = exact
        constant = (None, None, 1.0, True, True)  # as if the statistics were constants
        dz = reference.bn_backward_apply(dy, x, mask, scale, shift, mean, invstd, *constant)[1]
        return _sums(dz, exact[1], exact[5], exact[6], results, plain)
    if op == "bn_act_max_pool_backward_reduce":
        # The backward with a scale of its own is scale * dz.
        behind: Any = (*exact[:7], None, None, 1.0)
        scaled = reference.bn_act_max_pool_backward_apply(*behind)
        dz = scaled / exact[3].view(-1, 1, 1)
        return _sums(dz, exact[2], exact[5], exact[6], results, plain)
    if op == "conv_wgrad":
        terms = _tensors(reference.conv_wgrad(*map(_magnitude, operands)))[0]
        return [Comparison("dweight", results[0], plain[0], truth[0], terms)]
    found = []
    for index, (actual, other, expected) in enumerate(zip(results, plain, truth, strict=True)):
        if not actual.numel() and not expected.numel():
            continue
        name = f"result {index}" if len(results) > 1 else "the result"
        if op == "bn_apply" and index == 1:  # the bits tell of the result beside them
            passes = ~(arithmetic.in_memory_order(results[0]) <= 0)
            found.append(Comparison(name, actual, None, arithmetic.pack_bits(passes)))
        elif actual.dtype == torch.uint8:  # mask bits, and the winners of a max pool, which ties decide as rounded
            found.append(Comparison(name, actual, None, other))
        else:
            found.append(Comparison(name, actual, other, expected))
    return found


def _sums(
    dz: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, results: Sequence[Tensor], plain: Sequence[Tensor | None]
) -> list[Comparison]:
    """sum(dz) and sum(dz * xhat), per channel."""
    found = []
    terms = (dz, dz * (x - mean.view(-1, 1, 1)) * invstd.view(-1, 1, 1))
    for name, actual, other, term in zip(("sum", "sum of dz*xhat"), results, plain, terms, strict=True):
        truth = term.sum((0, 2, 3))
        found.append(Comparison(name, actual, truth if other is None else other, truth, term.abs().sum((0, 2, 3))))
    return found


def _merge(mean: Tensor, m2: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of partial rows, in float64."""
    n = count.double()[:, None]
    total = n.sum()
    merged = (mean.double() * n).sum(0) / total
    return merged, (m2.double() + n * (mean.double() - merged).square()).sum(0) / total


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _cut_off(value: Any) -> Any:
    """In float64, activations and weights without the 13 bits of their fraction that TF32 has no place for."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if value.dim() == 4 and value.dtype == torch.float32:
        value = (value.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return value.double()


def _magnitude(value: Any) -> Any:
    return value.double().abs() if isinstance(value, Tensor) and value.is_floating_point() else value


def _bits(value: Tensor) -> Tensor:
    """Comparable bit by bit, NaN and all."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return value.view(width) if value.numel() else value


def crashed(reason: str) -> bool:
    """Whether the kernel has left the process's CUDA context unusable: nothing it says after that counts."""
    return any(
        sign in reason for sign in ("CUDA error", "illegal memory access", "launch failure", "misaligned address")
    )


def unusable(results: dict[str, str | None]) -> bool:
    """Whether one of the results of `check_all` says that its process is of no more use."""
    return any(why is not None and crashed(why) for why in results.values())


def check_all(job: Job, choice: Choice, device: torch.device, images: int = VERIFIED_IMAGES) -> dict[str, str | None]:
    """`check` of the job's op, or of every op of its family, by op, for at most so many images."""
    problem = job.problem.with_batch(min(job.problem.batch, images))
    if isinstance(problem.shape, ConvShape):
        job = dataclasses.replace(job, problem=problem)
        return {op: check(problem, op, job, choice, device) for op in (problem.op, *also(job))}
    return {op: check(problem, op, None, choice, device) for op in FAMILIES[problem.op]}
