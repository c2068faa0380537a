"""The call that is timed for a candidate: what a network runs if that is the choice, with what it runs around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import dispatch, ops
from resnet_fused.dispatch.choice import ALONE
from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.dispatch.table import Choice
from resnet_fused.ops import OPS, conv_fprop, conv_fprop_int8
from resnet_fused.ops.backends import implementation
from resnet_fused.ops.operands import Operands
from resnet_fused.tuning.checks import caller
from resnet_fused.tuning.problems import Job, arguments

KERNEL_BACKENDS = ("triton", "cuda")
EPS, MOMENTUM = 1e-5, 0.1
Backends = Callable[[ConvShape], str]


class Layer(NamedTuple):
    """A batch norm with what stands before and after it, forward and backward."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor

    @property
    def rows(self) -> int:
        return _rows(self.x)

    @property
    def pixels(self) -> float:
        return float(self.x.numel() // self.x.shape[1])


def backends(device: torch.device) -> list[str]:
    """The kernel backends that can run here."""
    return [name for name in KERNEL_BACKENDS if ops.available(name, device.type)]


def operands_of(job: Job, make: Operands) -> Any:
    """What all calls of a job share: its op's arguments, or of a family a `Layer`."""
    problem = job.problem
    if isinstance(problem.shape, ConvShape) or ALONE in problem.flags:
        return arguments(job, make)
    assert isinstance(problem.shape, tuple)
    n, c, h, w = problem.shape
    pooled = (n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1)
    return Layer(
        make.activation(*problem.shape),
        make.activation(*(pooled if problem.op == "bn_act_max_pool" else problem.shape)),
        make.activation(*problem.shape) if problem.flags else None,
        *(make.vector(c, positive=True) for _ in range(4)),
    )


def make_benchmark_fn(
    job: Job, choice: Choice, operands: Any, fprop: Backends = lambda shape: "aten"
) -> Callable[[], object]:
    """The call to time: what the network would run if this were the choice.

    Args:
        job: the problem.
        choice: what is to be timed.
        operands: of `operands_of`; no call changes them.
        fprop: the backends of the convolutions that a network runs instead of `conv_chain` and `conv_join`.
    """
    op = job.problem.op
    if isinstance(operands, Layer):
        return _LAYERS[op](choice.backend, operands)
    record = OPS[op]
    if choice.backend == "aten" and record.unfused is not None:
        passes = next(iter(backends(operands[0].device)), "reference")
        return record.unfused(operands, functools.partial(_run, passes))
    if choice.backend == "aten" and record.sequence is not None:
        return functools.partial(record.sequence, operands, functools.partial(_conv, fprop))
    return functools.partial(caller(op, choice), *operands)


def _run(backend: str, op: str, **arguments: Any) -> Any:
    return implementation(backend, op)(*OPS[op].args(**arguments))


def _rows(x: Tensor) -> int:
    n, c, h, w = x.shape
    return dispatch.partial_rows(n * h * w, c)


def _conv(fprop: Backends, a: conv_fprop.Args | conv_fprop_int8.Args) -> Tensor:
    """`conv_fprop`, or that of int8, on the backend that a network runs it on."""
    if isinstance(a, conv_fprop.Args):
        value: Tensor = implementation(fprop(conv_fprop.conv_shape(a)), "conv_fprop")(*a)
    else:
        value = implementation(fprop(conv_fprop_int8.conv_shape(a)), "conv_fprop_int8")(*a)
    return value


def _bn(backend: str, a: Layer) -> Callable[[], object]:
    """Batch norm, residual, ReLU, forward and backward."""
    if backend == "aten":
        x, weight, bias = leaves = [t.detach().requires_grad_() for t in (a.x, a.weight, a.bias)]
        residual = None if a.residual is None else a.residual.detach().requires_grad_()
        leaves += [] if residual is None else [residual]

        def plain() -> object:
            y = F.batch_norm(x, a.mean, a.var, weight, bias, True)
            y = F.relu(y if residual is None else y + residual, inplace=True)
            return torch.autograd.grad(y, leaves, a.dy)

        return plain
    joined = a.residual is not None

    def ours() -> object:
        vectors = _statistics(backend, a)
        apply = {"residual": a.residual, "residual_scale": None, "residual_shift": None}
        scale, shift = vectors["scale"], vectors["shift"]
        _, mask = _run(backend, "bn_apply", x=a.x, scale=scale, shift=shift, **apply, relu=True, with_mask=joined)
        given = {"dy": a.dy, "x": a.x, "mask": mask if joined else None, **vectors, "relu": True}
        sums = _run(backend, "bn_backward_reduce", **given, rows=a.rows)
        given |= {"sum_dy": sums[0], "sum_dy_xhat": sums[1], "count": a.pixels}
        return _run(backend, "bn_backward_apply", **given, with_dresidual=joined)

    return ours


def _pool(backend: str, a: Layer) -> Callable[[], object]:
    """Batch norm, ReLU, max pool, forward and backward."""
    if backend == "aten":
        x, weight, bias = leaves = tuple(t.detach().requires_grad_() for t in (a.x, a.weight, a.bias))

        def plain() -> object:
            y = F.relu(F.batch_norm(x, a.mean, a.var, weight, bias, True), inplace=True)
            return torch.autograd.grad(F.max_pool2d(y, 3, 2, 1), leaves, a.dy)

        return plain

    def ours() -> object:
        vectors = _statistics(backend, a)
        _, index = _run(backend, "bn_act_max_pool", x=a.x, scale=vectors["scale"], shift=vectors["shift"])
        given = {"dy": a.dy, "index": index, "x": a.x, **vectors}
        sums = _run(backend, "bn_act_max_pool_backward_reduce", **given, rows=a.rows)
        given |= {"sum_dy": sums[0], "sum_dy_xhat": sums[1], "count": a.pixels}
        return _run(backend, "bn_act_max_pool_backward_apply", **given)

    return ours


def _statistics(backend: str, a: Layer) -> dict[str, Tensor]:
    """The vectors of a batch norm in training, by name."""
    mean, m2, count = _run(backend, "bn_stats", x=a.x, rows=a.rows)
    given = {"weight": a.weight, "bias": a.bias, "running_mean": a.mean, "running_var": a.var}
    vectors = _run(backend, "bn_finalize", mean=mean, m2=m2, count=count, **given, momentum=MOMENTUM, eps=EPS)
    return dict(zip(("scale", "shift", "mean", "invstd"), vectors, strict=True))


_LAYERS: dict[str, Callable[[str, Layer], Callable[[], object]]] = {
    "bn_apply": _bn,
    "bn_act_max_pool": _pool,
}
