"""Convolution with batch norm, or with a given affine epilogue, residual add and ReLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from resnet_fused.dispatch import forced_backend
from resnet_fused.dispatch.conv import ConvShape, training_refusal
from resnet_fused.functional import native
from resnet_fused.functional.common import (
    Act,
    Geometry,
    Padding,
    Pair,
    add_relu,
    autocast,
    channels_last,
    check_act,
    choose_conv,
    conv_operands,
    convolves_to_nchw,
    geometry_of,
    raises_as_pytorch,
    refused,
    refuses_batch_norm,
    runs_apart,
    runs_plain,
    wants_gradient,
)
from resnet_fused.functional.norm import batch_norm_act
from resnet_fused.functional.residual import ConvBN, choose_chain, run_chain
from resnet_fused.functional.statistics import constant_affine
from resnet_fused.ops.arithmetic import compute_dtype

_op = torch.ops.resnet_fused


@raises_as_pytorch
def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: Act = "relu",
) -> Tensor:
    """Convolution, batch norm, residual add and ReLU: `y = act(bn(conv(x, weight) + bias) + residual)`.

    In inference (no batch statistics, no gradient wanted) it is one convolution with batch norm as its epilogue. In
    training it is a chain of one (`residual_block`): the convolution forms the statistics that batch norm needs.

    Args:
        x: `[N, C, H, W]`.
        weight: `[K, C / groups, R, S]`.
        running_mean, running_var, bn_weight, bn_bias: `[K]`, as `batch_norm_act` takes them.
        residual: of the result's shape, or None.
        bias: the convolution's own, `[K]`, or None.
        stride, padding, dilation: an int or `(vertical, horizontal)`, in pixels; padding `"same"` or `"valid"` is
            native PyTorch's and not fused.
        groups: as in `torch.nn.functional.conv2d`.
        training, momentum, eps, act: as in `batch_norm_act`.

    Returns:
        `[N, K, P, Q]` in the dtype of `x`, channels_last if `x` or `weight` is.

    Mutates:
        `running_mean` and `running_var` in training.

    Raises:
        What `torch.nn.functional.conv2d` and `batch_norm_act` raise.

    Source:
        The folding of a constant batch norm into a convolution: Jacob et al., Quantization and Training of Neural
            Networks, 2018, section 3.2.
    """
    relu = check_act(act, "conv_bn_act")
    geometry = geometry_of(stride, padding, dilation, groups)
    vectors = (running_mean, running_var, bn_weight, bn_bias)
    if (bias is not None and bias.dtype != weight.dtype) or refuses_batch_norm(x, vectors, training, eps):
        geometry = None  # PyTorch's to raise
    if (
        training
        or running_mean is None
        or running_var is None
        or wants_gradient(x, weight, bias, bn_weight, bn_bias, residual)
    ):
        if bias is None and geometry is not None and not runs_apart(x.device.type):
            layer = ConvBN(weight, *vectors, geometry, training, momentum, eps)
            chain = choose_chain("conv_bn_act", x, [layer], residual=residual, relu=relu)
            if chain is not None:
                return run_chain(chain, x, [layer], residual=residual)
        z = _conv(x, weight, bias, stride, padding, dilation, groups)
        return batch_norm_act(
            z,
            running_mean,
            running_var,
            bn_weight,
            bn_bias,
            residual,
            training=training,
            momentum=momentum,
            eps=eps,
            act=act,
        )
    x, weight = autocast(x, weight)
    backend = None
    if geometry is not None:
        backend = choose_conv("conv_bn_act", x, weight, residual, geometry, (*vectors, bias))
    if geometry is None or backend is None:
        z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return add_relu(F.batch_norm(z, *vectors, False, momentum, eps), residual, relu)
    scale, shift, _, _ = constant_affine(running_mean, running_var, bn_weight, bn_bias, eps, x.dtype)
    if bias is not None:
        shift = shift + bias.to(shift.dtype) * scale
    return _fprop(x, weight, scale, shift, residual, geometry, relu, backend)


@raises_as_pytorch
def conv_affine_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    act: Act = "relu",
) -> Tensor:
    """A convolution with a per-channel affine epilogue: `y = act(scale * conv(x, weight) + shift + residual)`.

    One kernel when no gradient is wanted; differentiable in all tensors otherwise, as the sequence of its parts.

    Args:
        x: `[N, C, H, W]`.
        weight: `[K, C / groups, R, S]`.
        scale, shift: `[K]`, or None for 1 and 0.
        residual: of the result's shape, or None.
        stride, padding, dilation: an int or `(vertical, horizontal)`, in pixels; padding `"same"` or `"valid"` is
            native PyTorch's and not fused.
        groups: as in `torch.nn.functional.conv2d`.
        act: `"relu"` or None.

    Returns:
        `[N, K, P, Q]` in the dtype of `x`.

    Raises:
        ValueError: `act` is neither.
        RuntimeError: sizes that do not match, as `torch.nn.functional.conv2d` raises; a forced backend that cannot run.
    """
    relu = check_act(act, "conv_affine_act")
    x, weight = autocast(x, weight)
    geometry = geometry_of(stride, padding, dilation, groups)
    backend = None
    if geometry is not None and not wants_gradient(x, weight, scale, shift, residual):
        backend = choose_conv("conv_affine_act", x, weight, residual, geometry, (scale, shift))
    if geometry is None or backend is None:
        y = _conv(x, weight, None, stride, padding, dilation, groups)
        if scale is not None:
            y = y * scale.to(y.dtype).view(-1, 1, 1)
        if shift is not None:
            y = y + shift.to(y.dtype).view(-1, 1, 1)
        return add_relu(y, residual, relu)
    upcast = compute_dtype(x.dtype)
    scale, shift = (None if v is None else v.to(upcast) for v in (scale, shift))
    return _fprop(x, weight, scale, shift, residual, geometry, relu, backend)


def _fprop(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    relu: bool,
    backend: str,
) -> Tensor:
    """`conv_fprop` with operands and result in the memory format PyTorch's convolution would give."""
    nchw = backend == "triton" and convolves_to_nchw(x, weight)
    operands = conv_operands(backend, x, weight, residual)
    act = "relu" if relu else None
    y: Tensor = _op.conv_fprop(operands[0], operands[1], scale, shift, operands[2], *geometry, act, backend=backend)
    return y.contiguous() if nchw else y


def _native(ctx: Any, dy: Tensor) -> native.Recomputed:
    """Of `(x, weight)`."""
    x, weight = inputs = tuple(native.alias(t) for t in ctx.saved_tensors)
    return F.conv2d(x, weight, None, *ctx.geometry), inputs


class _Conv(torch.autograd.Function):
    """A raw convolution of operands as the kernels read them: `conv_fprop`, `conv_dgrad`, `conv_wgrad`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.backend = (stride, padding, dilation, groups), backend
        y: Tensor = _op.conv_fprop(x, weight, None, None, None, *ctx.geometry, None, backend=backend)
        return y

    @staticmethod
    @native.differentiable(_native)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = conv_operands(ctx.backend, dy, weight, None)[0]
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx, _, _ = _op.conv_dgrad(dy, weight, *(None,) * 9, x.shape[2:], *ctx.geometry, backend=ctx.backend)
            dx = dx.contiguous(memory_format=suggest_memory_format(x))
        if ctx.needs_input_grad[1]:
            dweight = _op.conv_wgrad(dy, x, *(None,) * 4, weight.shape[2:], *ctx.geometry, backend=ctx.backend)
            dweight = dweight.to(weight.dtype).contiguous(memory_format=suggest_memory_format(weight))
        return dx, dweight, None, None, None, None, None


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Padding, dilation: Pair, groups: int
) -> Tensor:
    """A raw convolution, on the chosen backend, differentiable."""
    geometry = geometry_of(stride, padding, dilation, groups)
    if geometry is None or runs_plain("conv_fprop", x.device.type):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    cast_x, cast_weight = autocast(x, weight)
    backend = choose_conv("conv", cast_x, cast_weight, None, geometry, ())
    if backend == "triton":
        problem = ConvShape(*cast_x.shape, weight.shape[0], *weight.shape[2:], *geometry)  # type: ignore[call-arg, arg-type]
        reason = training_refusal(problem, cast_x.dtype)
        if reason is not None:
            backend = refused(forced_backend(), "conv", reason)
    if backend is None or backend == "aten":
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    operands = (channels_last(cast_x), channels_last(cast_weight)) if backend == "triton" else (cast_x, cast_weight)
    z = _Conv.apply(*operands, *geometry, backend)
    if torch.channels_last not in map(suggest_memory_format, (cast_x, cast_weight)):
        z = z.contiguous()
    return z if bias is None else z + bias.to(z.dtype).view(-1, 1, 1)
