"""The call that is timed for a candidate: what a network runs if that is the choice, with what it runs around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import dispatch, ops
from resnet_fused.dispatch.choice import ALONE
from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.dispatch.table import Choice
from resnet_fused.ops import conv_chain, conv_dgrad, conv_fprop, conv_fprop_stats, conv_join, conv_wgrad
from resnet_fused.ops.arithmetic import unpack_bits
from resnet_fused.ops.backends import implementation
from resnet_fused.ops.operands import Operands
from resnet_fused.tuning.checks import caller
from resnet_fused.tuning.problems import Job, arguments

KERNEL_BACKENDS = ("triton", "cuda")
Backends = Callable[[ConvShape], str]


def _aten(_: ConvShape) -> str:
    return "aten"


def backends(device: torch.device) -> list[str]:
    """The kernel backends that can run here."""
    return [name for name in KERNEL_BACKENDS if ops.available(name, device.type)]


def operands_of(job: Job, make: Operands) -> Any:
    """What all calls of `timed` share: a convolution's arguments; a family's x, dy, residual (or None) and vectors."""
    problem = job.problem
    if isinstance(problem.shape, ConvShape):
        return arguments(job, make)
    assert isinstance(problem.shape, tuple)
    n, c, h, w = problem.shape
    x = make.activation(*problem.shape)
    if ALONE in problem.flags:
        return x, *make.affine(c)
    pooled = (n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1)
    dy = make.activation(*(pooled if problem.op == "bn_act_max_pool" else problem.shape))
    residual = make.activation(*problem.shape) if problem.flags or problem.op == "add_act" else None
    return x, dy, residual, *(make.vector(c, positive=True) for _ in range(4))


def timed(job: Job, choice: Choice, operands: Any, fprop: Backends = _aten) -> Callable[[], object]:
    """The call to time: what the network would run if this were the choice.

    Args:
        job: the problem.
        choice: what is to be timed.
        operands: of `operands_of`; no call changes them.
        fprop: the backends of the convolutions that a network runs instead of `conv_chain` and `conv_join`.
    """
    op = job.problem.op
    if ALONE in job.problem.flags:
        return functools.partial(_normalised, choice.backend, *operands)
    if op in _FAMILY_CALLS:
        return _FAMILY_CALLS[op](choice.backend, *operands)
    if choice.backend == "aten" and op in _UNFUSED:
        passes = next(iter(backends(operands[0].device)), "reference")
        if op == "conv_dgrad":
            operands = _dense_residual(operands)
        return functools.partial(_UNFUSED[op], fprop if op in ("conv_chain", "conv_join") else passes, operands)
    return functools.partial(caller(op, choice), *operands)


def _run(backend: str, op: str, *operands: Any) -> Any:
    return implementation(backend, op)(*operands)


def _normalised(passes: str, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None:
        return x
    value: Tensor = _run(passes, "bn_apply", x, scale, shift, None, None, None, True, False)[0]
    return value


def _fprop_stats(passes: str, a: conv_fprop_stats.Args) -> object:
    """PyTorch's convolution between passes of ours: what a block runs where the plan has PyTorch's convolution."""
    x = _normalised(passes, a.x, a.x_scale, a.x_shift)
    y = F.conv2d(x, a.weight, None, a.stride, a.padding, a.dilation, a.groups)
    return y, _run(passes, "bn_stats", y, a.rows)


def _dense_residual(a: conv_dgrad.Args) -> conv_dgrad.Args:
    """The gradient of the shortcut behind its mask: what a block hands to a convolution that knows no bits."""
    if a.residual is None or a.residual_mask is None:
        return a
    masked = torch.where(unpack_bits(a.residual_mask, a.residual), a.residual, 0)
    return a._replace(residual=masked, residual_mask=None)


def _dgrad(passes: str, a: conv_dgrad.Args) -> object:
    if a.residual is not None:  # which the pass before then writes, beside the gradient
        torch.zeros_like(a.residual)
    dx = _run("aten", "conv_dgrad", *a._replace(x=None, scale=None, shift=None, mean=None, invstd=None))[0]
    if a.x is None:
        return dx
    norm = (a.scale, a.shift, a.mean, a.invstd)
    return dx, _run(passes, "bn_backward_reduce", dx, a.x, None, *norm, True, _rows(a.x))


def _wgrad(passes: str, a: conv_wgrad.Args) -> object:
    x = _normalised(passes, a.x, a.x_scale, a.x_shift)
    return _run("aten", "conv_wgrad", *a._replace(x=x, x_scale=None, x_shift=None))


def _conv(fprop: Backends, a: conv_fprop.Args) -> Tensor:
    """`conv_fprop` on the backend that a network runs it on."""
    shape = ConvShape.of(a.x.shape, a.weight.shape, a.stride, a.padding, a.dilation, a.groups)
    value: Tensor = _run(fprop(shape), "conv_fprop", *a)
    return value


def _join(fprop: Backends, a: conv_join.Args) -> object:
    return conv_join.sequence(a, functools.partial(_conv, fprop))


def _chain(fprop: Backends, a: conv_chain.Args) -> object:
    return conv_chain.sequence(a, functools.partial(_conv, fprop))


_UNFUSED: dict[str, Callable[..., object]] = {
    "conv_fprop_stats": _fprop_stats,
    "conv_dgrad": _dgrad,
    "conv_wgrad": _wgrad,
    "conv_join": _join,
    "conv_chain": _chain,
}


def _bn(
    backend: str,
    x: Tensor,
    dy: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
) -> Callable[[], object]:
    """Batch norm, residual, ReLU, forward and backward."""
    if backend == "aten":
        x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
        leaves = [x, weight, bias]
        if residual is not None:
            residual = residual.detach().requires_grad_()
            leaves.append(residual)

        def plain() -> object:
            y = F.batch_norm(x, mean, var, weight, bias, True)
            y = F.relu(y if residual is None else y + residual, inplace=True)
            return torch.autograd.grad(y, leaves, dy)

        return plain
    rows, count = _rows(x), float(x.numel() // x.shape[1])
    joined = residual is not None

    def ours() -> object:
        statistics = _run(backend, "bn_stats", x, rows)
        vectors = _run(backend, "bn_finalize", *statistics, weight, bias, mean, var, 0.1, 1e-5)
        y, mask = _run(backend, "bn_apply", x, *vectors[:2], residual, None, None, True, joined)
        behind = (dy, x, mask if joined else None, *vectors)
        sums = _run(backend, "bn_backward_reduce", *behind, True, rows)
        return _run(backend, "bn_backward_apply", *behind, *sums, count, True, joined)

    return ours


def _pool(
    backend: str, x: Tensor, dy: Tensor, _: None, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Callable[[], object]:
    """Batch norm, ReLU, max pool, forward and backward."""
    if backend == "aten":
        x, weight, bias = leaves = tuple(t.detach().requires_grad_() for t in (x, weight, bias))

        def plain() -> object:
            y = F.relu(F.batch_norm(x, mean, var, weight, bias, True), inplace=True)
            return torch.autograd.grad(F.max_pool2d(y, 3, 2, 1), leaves, dy)

        return plain
    rows, count = _rows(x), float(x.numel() // x.shape[1])

    def ours() -> object:
        statistics = _run(backend, "bn_stats", x, rows)
        vectors = _run(backend, "bn_finalize", *statistics, weight, bias, mean, var, 0.1, 1e-5)
        _, index = _run(backend, "bn_act_max_pool", x, *vectors[:2])
        sums = _run(backend, "bn_act_max_pool_backward_reduce", dy, index, x, *vectors, rows)
        return _run(backend, "bn_act_max_pool_backward_apply", dy, index, x, *vectors, *sums, count)

    return ours


def _add(backend: str, x: Tensor, dy: Tensor, other: Tensor, *_: Tensor) -> Callable[[], object]:
    """Sum and ReLU, forward and backward."""
    if backend == "aten":
        leaves = tuple(t.detach().requires_grad_() for t in (x, other))
        return lambda: torch.autograd.grad(F.relu(leaves[0] + leaves[1], inplace=True), leaves, dy)
    return lambda: _run(backend, "add_act_backward", dy, _run(backend, "add_act", x, other, True))


def _rows(x: Tensor) -> int:
    n, c, h, w = x.shape
    return dispatch.partial_rows(n * h * w, c)


_FAMILY_CALLS: dict[str, Callable[..., Callable[[], object]]] = {
    "bn_apply": _bn,
    "bn_act_max_pool": _pool,
    "add_act": _add,
}
