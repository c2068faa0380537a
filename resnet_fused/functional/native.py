"""Derivatives of derivatives: where a graph of the gradients is wanted, native PyTorch operations compute them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from resnet_fused.ops.arithmetic import behind_relu, compute_dtype, winners

Backward = Callable[..., tuple[Tensor | None, ...]]
Recomputed = tuple[Tensor, Sequence[Tensor | None]]  # the result of a forward, and the inputs it was computed from
Moments = Callable[..., tuple[Tensor, Tensor]]


def differentiable(native: Callable[[Any, Tensor], Recomputed]) -> Callable[[Backward], Backward]:
    """Decorates the backward of an `autograd.Function` that runs kernels, which nothing can be differentiated through.

    Under `create_graph=True` the gradients are those of `native` instead: the forward once more, of what was saved, in
    native operations. They are right to any order.

    Args:
        native: `native(ctx, dy)` returns the result and, in the order of `apply`'s arguments, the tensors it was
            computed from: an `alias` of each input, or a `stand_in` for one whose value does not matter. None is for
            an argument that never has a gradient.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def run(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # which differentiates once
                return backward(ctx, dy)
            needs = ctx.needs_input_grad
            with torch.autocast(dy.device.type, enabled=False):
                y, inputs = native(ctx, dy)
                wanted = [t for t, needed in zip(inputs, needs, strict=False) if needed]
                gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))  # type: ignore[arg-type]
            return tuple(next(gradients) if needed else None for needed in needs)

        return run

    return decorate


@overload
def alias(t: Tensor) -> Tensor: ...
@overload
def alias(t: None) -> None: ...
def alias(t: Tensor | None) -> Tensor | None:
    """`t` as an input of one call: two inputs may be one tensor, and still have a gradient each."""
    return None if t is None else t.view_as(t)


def stand_in(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In the place of an input on whose value no gradient depends, so that it need not be saved."""
    zero = torch.zeros((), dtype=dtype or like.dtype, device=like.device)
    return zero.expand(like.shape).requires_grad_()


def moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(mean, invstd)`, `[C]` each, of the batch `x`."""
    var, mean = torch.var_mean(x.to(compute_dtype(x.dtype)), (0, 2, 3), correction=0)
    return mean, (var + eps).rsqrt()


def normalised(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`(x - mean) * invstd * weight + bias` in the compute dtype of `x`."""
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    value = (x.to(scale.dtype) - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
    return value if bias is None else value + bias.to(scale.dtype).view(-1, 1, 1)


def batch_norm_act(ctx: Any, dy: Tensor, moments: Moments = moments) -> Recomputed:
    """Of `(x, residual, weight, bias)`, behind the mask that forward found.

    Args:
        ctx: has saved x, mask, scale, shift, mean, invstd, weight, and what `moments` takes; its `eps` is None where
            the statistics are constants.
        dy: the gradient.
        moments: `moments(x, eps, ...)`, where they are not.
    """
    saved, mask, scale, shift, *_ = tensors = ctx.saved_tensors
    x, residual = alias(saved), stand_in(saved)
    value, parameters = _normalised(ctx, x, *tensors[4:], moments=moments)
    value = behind_relu(value + residual, saved.detach(), mask, scale, shift, ctx.relu)
    return value.to(saved.dtype), (x, residual, *parameters)


def batch_norm_act_max_pool(ctx: Any, dy: Tensor, moments: Moments = moments) -> Recomputed:
    """Of `(x, weight, bias)`, at the winners that forward found; `ctx` has saved their places instead of a mask."""
    saved, index, scale, shift, *_ = tensors = ctx.saved_tensors
    x = alias(saved)
    value, parameters = _normalised(ctx, x, *tensors[4:], moments=moments)
    value = behind_relu(value, saved.detach(), None, scale, shift, True).flatten(2)
    return value.gather(2, winners(index, saved)).view(index.shape).to(saved.dtype), (x, *parameters)


def _normalised(
    ctx: Any, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, *rest: Any, moments: Moments
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """x normalised, and the parameters. Of the bias the value does not matter: it decides the mask, which is known."""
    bias_dtype = ctx.vector_dtypes[1]
    parameters = alias(weight), None if bias_dtype is None else stand_in(mean, bias_dtype)
    if ctx.eps is not None and x.requires_grad:
        mean, invstd = moments(x, ctx.eps, *rest)
    return normalised(x, mean, invstd, *parameters), parameters
