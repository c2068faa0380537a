"""One op against float64 at real shapes: values, guards around operands, unwritten results, and run against run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused._command import one_line
from resnet_fused.dispatch.table import Choice
from resnet_fused.measure import memory
from resnet_fused.ops import OPS
from resnet_fused.ops.backends import implementation, implements
from resnet_fused.ops.comparison import Comparison, double, map_tensors
from resnet_fused.ops.operands import Operands
from resnet_fused.tuning.problems import Job, also, arguments, elements

REFUSED = "refused: "  # how a reason begins that is no error of the kernel
CHECK_BYTES = 32  # an element: an operand, its guarded copy, float64's and the results
VERIFIED_IMAGES = 16  # float64 of more would take longer than all the rest


def check(job: Job, op: str, choice: Choice, device: torch.device) -> str | None:
    """Run one op once against float64, and once more against itself; why it is not right, or None.

    Args:
        job: the problem to run, as large as is wanted.
        op: the problem's op, or another that runs its problem.
        choice: the backend, and the configuration if it takes one.
        device: where.
    """
    problem = job.problem
    try:
        if device.type == "cpu":
            memory.require(CHECK_BYTES * elements(problem))
        make = Operands(device, problem.dtype)
        operands = arguments(job, make, op)
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
        return one_line(error, kind=True)


def _refusal(op: str, choice: Choice, operands: Any, shape: Any) -> str | None:
    if choice.backend != "triton":
        return None
    reason: str | None = importlib.import_module("resnet_fused.kernels").refuse(op, operands)
    if reason is None and choice.config is not None and choice.config.kernel != "pointer":
        reason = importlib.import_module("resnet_fused.kernels.experimental").refuse(operands, choice.config)
    return reason


def caller(op: str, choice: Choice) -> Callable[..., Any]:
    """The function that runs an op as chosen; its arguments are the op's without `backend`."""
    if choice.backend == "triton":
        run, record = importlib.import_module("resnet_fused.kernels").run, OPS[op]
        return lambda *args: run(op, record.args(*args), choice.config)
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


def comparisons(op: str, operands: Any, results: Sequence[Tensor], tf32: bool = False) -> list[Comparison]:
    """What to compare of the results of an op.

    Args:
        op: its name.
        operands: what it was called with, as its record has them.
        results: what came of it.
        tf32: products may round their operands to TF32. Whether cuDNN's do depends on the algorithm it picks, so the
            yardstick is not its error but that of operands cut off as the matrix units cut them off.
    """
    record = OPS[op]
    if tf32:
        plain = record.reference(map_tensors(operands, _cut_off))
    else:
        plain = (record.native or record.reference)(operands)
    actual = results[0] if record.out is Tensor else record.out(*results)
    return record.compare(operands, actual, plain, record.reference(double(operands)))


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _cut_off(value: Tensor) -> Tensor:
    """In float64, activations and weights without the 13 bits of their fraction that TF32 has no place for."""
    if not value.is_floating_point():
        return value
    if value.dim() == 4 and value.dtype == torch.float32:
        value = (value.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return value.double()


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
    job = dataclasses.replace(job, problem=problem)
    beside = (op for op in also(job) if implements(choice.backend, op))
    return {op: check(job, op, choice, device) for op in (*OPS[problem.op].family, *beside)}
