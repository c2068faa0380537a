"""Batch norm with residual add and ReLU, and the residual join alone, as autograd functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import dispatch
from resnet_fused.functional import native
from resnet_fused.functional.common import (
    Act,
    add_relu,
    check_act,
    choose,
    choose_batch_norm,
    dense,
    in_layout_of,
    pixels,
    raises_as_pytorch,
)
from resnet_fused.functional.ranks import mean_over_ranks, moments_over
from resnet_fused.functional.statistics import affine_of
from resnet_fused.ops import called

_bn_apply, _bn_backward_reduce, _bn_backward_apply = map(
    called, ("bn_apply", "bn_backward_reduce", "bn_backward_apply")
)
_add_act, _add_act_backward = map(called, ("add_act", "add_act_backward"))
Sums = tuple[Tensor | None, Tensor | None]


@raises_as_pytorch
def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: Act = "relu",
) -> Tensor:
    """Batch norm, residual add and ReLU: `y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)`.

    In training `mean` and the biased `var` are those of the batch, over N, H and W; otherwise they are the running
    statistics. The fused kernels read `x` once for the statistics and once to normalise; backward reads `x` and the
    gradient twice and writes once. ReLU's mask is recomputed from `x`, or kept as one bit an element where a residual
    was added.

    Args:
        x: `[N, C, H, W]`, float32, float16, bfloat16 (float64 on native PyTorch).
        running_mean, running_var: `[C]`, or None in training.
        weight, bias: `[C]`, of the dtype of `x` or float32; None for 1 and 0.
        residual: of the shape of `x`, or None.
        training: normalise by the statistics of the batch.
        momentum: the weight of the batch in the running statistics.
        eps: added to the variance.
        act: `"relu"` or None.

    Returns:
        `[N, C, H, W]` in the dtype and memory format of `x`.

    Mutates:
        `running_mean` and `running_var` in training: `running = (1 - momentum) * running + momentum * batch`, the
            variance unbiased.

    Raises:
        ValueError: `act` is neither; fewer than two values per channel in training.
        RuntimeError: sizes that do not match, as `torch.nn.functional.batch_norm` raises; a forced backend that cannot
            run.

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, algorithms 1 and 2; gradients: section 3.
    """
    relu = check_act(act, "batch_norm_act")
    vectors = (running_mean, running_var, weight, bias)
    backend = choose_batch_norm("bn_apply", "batch_norm_act", x, (residual,), vectors, training, eps)
    if backend == "aten":
        return add_relu(F.batch_norm(x, *vectors, training, momentum, eps), residual, relu)  # type: ignore[arg-type]
    x = dense(x)
    affine = affine_of(x, *vectors, training, momentum, eps, backend)
    return BatchNormAct.apply(x, residual, weight, bias, *affine, relu, eps if training else None, backend)


def _native(ctx: Any, dy: Tensor) -> native.Recomputed:
    return native.batch_norm_act(ctx, dy, moments_over(ctx.group))


class BatchNormAct(torch.autograd.Function):
    """`bn_apply`, `bn_backward_reduce`, `bn_backward_apply`; `weight` and `bias` take part only by their gradients.

    `eps` is None where the statistics are constants. With a group they are those of all of its ranks, of `total` pixels
    together, and backward forms its sums over all of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        mean: Tensor,
        invstd: Tensor,
        relu: bool,
        eps: float | None,
        backend: str,
        total: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        # Without a residual the mask is a function of x, which backward reads anyway.
        with_mask = relu and residual is not None and any(ctx.needs_input_grad)
        addend = None if residual is None else in_layout_of(residual, x)
        if group is not None and x.numel() == 0:  # this rank's batch, and not all of them
            y, mask = torch.empty_like(x), None
        else:
            y, mask = _bn_apply(x, scale, shift, addend, None, None, relu, with_mask, backend=backend)
        shared = () if total is None else (total,)
        ctx.save_for_backward(x, mask if with_mask else None, scale, shift, mean, invstd, weight, *shared)
        ctx.relu, ctx.eps, ctx.group, ctx.backend = relu, eps, group, backend
        ctx.vector_dtypes = (weight.dtype if weight is not None else None, bias.dtype if bias is not None else None)
        return y

    @staticmethod
    @native.differentiable(_native)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, scale, shift, mean, invstd, _, *total = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        operands = (in_layout_of(dy, x), x, mask, scale, shift, mean, invstd)
        empty = ctx.group is not None and x.numel() == 0
        own: Sums = (torch.zeros_like(mean), torch.zeros_like(mean)) if empty else (None, None)
        if not empty and (needs_weight or needs_bias or (needs_x and ctx.eps is not None)):
            rows = dispatch.partial_rows(pixels(x), x.shape[1])
            own = _bn_backward_reduce(*operands, ctx.relu, rows, backend=ctx.backend)
        sums, count = divided(ctx, own, pixels(x), total) if needs_x else ((None, None), 1.0)
        dx, dresidual = None, operands[0] if needs_residual else None
        masks = needs_residual and ctx.relu
        if empty:
            dx = torch.zeros_like(x)
        elif needs_x or masks:
            dx, dz = _bn_backward_apply(*operands, *sums, count, ctx.relu, masks, backend=ctx.backend)
            dresidual = dz if masks else dresidual
        return dx if needs_x else None, dresidual, *vector_gradients(ctx, own, needs_weight, needs_bias), *(None,) * 9


def divided(ctx: Any, own: Sums, count: int, total: Sequence[Tensor]) -> tuple[Sums, float]:
    """The sums that a gradient of x is made of, and what it divides them by; none where the statistics are constants.

    Args:
        ctx: has `eps` and `group`.
        own: this rank's sums.
        count: of its pixels.
        total: those of all ranks, where there is a group.
    """
    if ctx.eps is None:
        return (None, None), float(count)
    if ctx.group is None:
        return own, float(count)
    assert own[0] is not None and own[1] is not None
    return mean_over_ranks((own[0], own[1]), total[0], ctx.group), 1.0


def vector_gradients(ctx: Any, own: Sums, needs_weight: bool, needs_bias: bool) -> Sums:
    """Those of weight and bias: this rank's own sums, in the dtypes of the parameters."""
    bias, weight = own
    weight_dtype, bias_dtype = ctx.vector_dtypes
    return _cast(weight, weight_dtype) if needs_weight else None, _cast(bias, bias_dtype) if needs_bias else None


def _cast(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return v if v is None or v.dtype == dtype else v.to(dtype)


@raises_as_pytorch
def add_act(x: Tensor, other: Tensor, *, act: Act = "relu") -> Tensor:
    """The residual join: `y = act(x + other)`.

    Args:
        x, other: `[N, C, H, W]`.
        act: `"relu"` or None.

    Returns:
        `[N, C, H, W]` in the dtype and memory format of `x`.

    Raises:
        ValueError: `act` is neither.
        RuntimeError: shapes that do not broadcast, as `torch.add` raises; a forced backend that cannot run.
    """
    relu = check_act(act, "add_act")
    backend = choose("add_act", "add_act", x, (other,), ())
    if backend == "aten":
        return add_relu(x + other, None, relu)
    return _AddAct.apply(dense(x), other, relu, backend)


def _joined(ctx: Any, dy: Tensor) -> native.Recomputed:
    """Of `(x, other)`; behind the mask of the result."""
    (y,) = ctx.saved_tensors
    inputs = native.stand_in(dy), native.stand_in(dy)
    value = inputs[0] + inputs[1]
    return value if y is None else torch.where(y.detach() <= 0, 0, value), inputs


class _AddAct(torch.autograd.Function):
    """`add_act` forward; backward masks by the output, which the next layer keeps alive anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor, relu: bool, backend: str) -> Tensor:
        y = _add_act(x, in_layout_of(other, x), relu, backend=backend)
        ctx.save_for_backward(y if relu else None)
        ctx.backend = backend
        return y

    @staticmethod
    @native.differentiable(_joined)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        dz = dy if y is None else _add_act_backward(in_layout_of(dy, y), y, backend=ctx.backend)
        return dz if ctx.needs_input_grad[0] else None, dz if ctx.needs_input_grad[1] else None, None, None
