"""The ops' schemas and fake kernels. Their meaning is written once, in `docs/design.md`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops import backends

# A fragment, and what is defined stays: the modules may be imported again, while compiled graphs hold on to the ops.
_LIBRARY = torch.library.Library("resnet_fused", "FRAGMENT")


def _op(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register `schema` (without `backend`), once in a process, with the decorated function as its fake kernel.

    That one gives the memory order of `reference` and `aten`; what Triton's convolutions return is NHWC.
    """
    name = schema.partition("(")[0]
    arguments, _, results = schema.partition(" -> ")

    def run(*args: Any, backend: str) -> Any:
        newest = sys.modules.get(backends.__name__, backends)
        return newest.implementation(backend, name)(*args)

    def run_fake(fake: Callable[..., Any], *args: Any, backend: str) -> Any:
        returned = fake(*args)
        if backend != "triton" or not name.startswith("conv_"):
            return returned
        return tuple(map(_nhwc, returned)) if isinstance(returned, tuple) else _nhwc(returned)

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        if hasattr(torch.ops.resnet_fused, name):
            return fake
        _LIBRARY.define(f"{arguments[:-1]}, *, str backend) -> {results}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"resnet_fused::{name}", functools.partial(run_fake, fake), lib=_LIBRARY)
        return fake

    return register


def _nhwc(t: Tensor) -> Tensor:
    """Of an activation one like it in NHWC order; anything else as it is."""
    return torch.empty_like(t, memory_format=torch.channels_last) if t.dim() == 4 else t


def _vector(x: Tensor, *shape: int) -> Tensor:
    """An fp32 tensor (fp64 for fp64 data) on the device of `x`."""
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _statistics(x: Tensor, rows: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((rows, channels), dtype=torch.float64), _vector(x, rows, channels), _vector(x, rows)


@_op(
    "conv_fprop(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool relu) -> Tensor"
)
def _(x, weight, scale, shift, residual, stride, padding, dilation, groups, relu):  # type: ignore[no-untyped-def]
    # PyTorch's own rule decides the strides: channels_last if either operand is.
    return torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)


@_op(
    "conv_fprop_stats(Tensor x, Tensor weight, Tensor? x_scale, Tensor? x_shift, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] dilation, SymInt groups, SymInt rows) -> (Tensor y, Tensor mean, Tensor m2, Tensor count)"
)
def _(x, weight, x_scale, x_shift, stride, padding, dilation, groups, rows):  # type: ignore[no-untyped-def]
    y = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)
    return (y, *_statistics(x, rows, weight.shape[0]))


@_op(
    "conv_dgrad(Tensor dy, Tensor weight, Tensor? dy_x, Tensor? dy_coefficients, Tensor? residual, "
    "Tensor? residual_mask, Tensor? x, Tensor? scale, Tensor? shift, Tensor? mean, Tensor? invstd, SymInt[2] size, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) "
    "-> (Tensor dx, Tensor sum_dx, Tensor sum_dx_xhat)"
)
def _(dy, weight, dy_x, coefficients, residual, mask, x, scale, shift, mean, invstd, size, *geometry):  # type: ignore[no-untyped-def]
    channels = weight.shape[1] * geometry[3]
    dx = torch.empty((dy.shape[0], channels, *size), dtype=dy.dtype, device=dy.device, memory_format=_memory_format(dy))
    sums = channels if x is not None else 0
    return dx, _vector(dy, sums), _vector(dy, sums)


@_op(
    "conv_dgrad_join(Tensor dy, Tensor weight, Tensor? dy_x, Tensor? dy_coefficients, Tensor? residual, "
    "Tensor? residual_mask, Tensor x, Tensor mask, Tensor mean, Tensor invstd, Tensor? shortcut, "
    "Tensor? shortcut_mean, Tensor? shortcut_invstd, SymInt[2] size, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] dilation, SymInt groups) -> (Tensor dx, Tensor sum_dz, Tensor sum_dz_xhat, Tensor sum_dz_shortcut)"
)
def _(dy, weight, dy_x, coefficients, residual, bits, x, mask, mean, invstd, shortcut, *rest):  # type: ignore[no-untyped-def]
    _, _, size, *geometry = rest
    channels = weight.shape[1] * geometry[3]
    dx = torch.empty((dy.shape[0], channels, *size), dtype=dy.dtype, device=dy.device, memory_format=_memory_format(dy))
    return dx, _vector(dy, channels), _vector(dy, channels), _vector(dy, 0 if shortcut is None else channels)


@_op(
    "conv_wgrad(Tensor dy, Tensor x, Tensor? dy_x, Tensor? dy_coefficients, Tensor? x_scale, Tensor? x_shift, "
    "SymInt[2] filter, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor dweight"
)
def _(dy, x, dy_x, coefficients, x_scale, x_shift, filter, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    shape = (dy.shape[1], x.shape[1] // groups, *filter)
    return _vector(x, *shape).contiguous(memory_format=torch.channels_last)


@_op(
    "bn_backward_finalize(Tensor sum_dy, Tensor sum_dy_xhat, Tensor scale, Tensor mean, Tensor invstd, float count) "
    "-> Tensor coefficients"
)
def _(sum_dy, sum_dy_xhat, scale, mean, invstd, count):  # type: ignore[no-untyped-def]
    return _vector(scale, 3, scale.shape[0])


@_op(
    "conv_chain(Tensor x, Tensor weight2, Tensor? scale2, Tensor shift2, Tensor weight3, Tensor? scale3, "
    "Tensor shift3, Tensor residual, Tensor? weight1, Tensor? scale1, Tensor? shift1, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation) -> (Tensor y, Tensor next)"
)
def _(x, weight2, scale2, shift2, weight3, scale3, shift3, residual, weight1, scale1, shift1, *geometry):  # type: ignore[no-untyped-def]
    a = torch.nn.functional.conv2d(x, weight2, None, *geometry)
    y = torch.nn.functional.conv2d(a, weight3)
    return y, x.new_empty(0) if weight1 is None else torch.nn.functional.conv2d(y, weight1)


@_op(
    "conv_join(Tensor x, Tensor weight, Tensor shortcut, Tensor shortcut_weight, Tensor shift, "
    "SymInt[2] shortcut_stride, bool relu) -> Tensor"
)
def _(x, weight, shortcut, shortcut_weight, shift, shortcut_stride, relu):  # type: ignore[no-untyped-def]
    return torch.nn.functional.conv2d(x, weight)


@_op("bn_stats(Tensor x, SymInt rows) -> (Tensor mean, Tensor m2, Tensor count)")
def _(x, rows):  # type: ignore[no-untyped-def]
    return _statistics(x, rows, x.shape[1])


@_op(
    "bn_finalize(Tensor mean, Tensor m2, Tensor count, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps) "
    "-> (Tensor scale, Tensor shift, Tensor save_mean, Tensor save_invstd)"
)
def _(mean, m2, count, weight, bias, running_mean, running_var, momentum, eps):  # type: ignore[no-untyped-def]
    return tuple(_vector(m2, mean.shape[1]) for _ in range(4))


@_op(
    "bn_apply(Tensor x, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale, Tensor? residual_shift, "
    "bool relu, bool with_mask) -> (Tensor y, Tensor mask)"
)
def _(x, scale, shift, residual, residual_scale, residual_shift, relu, with_mask):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty((x.numel() + 7) // 8 if with_mask else 0, dtype=torch.uint8)


@_op(
    "bn_backward_reduce(Tensor dy, Tensor x, Tensor? mask, Tensor scale, Tensor shift, Tensor mean, Tensor invstd, "
    "bool relu, SymInt rows) -> (Tensor sum_dy, Tensor sum_dy_xhat)"
)
def _(dy, x, mask, scale, shift, mean, invstd, relu, rows):  # type: ignore[no-untyped-def]
    return _vector(x, x.shape[1]), _vector(x, x.shape[1])


@_op(
    "bn_backward_apply(Tensor dy, Tensor x, Tensor? mask, Tensor scale, Tensor shift, Tensor mean, Tensor invstd, "
    "Tensor? sum_dy, Tensor? sum_dy_xhat, float count, bool relu, bool with_dresidual) -> (Tensor dx, Tensor dresidual)"
)
def _(dy, x, mask, scale, shift, mean, invstd, sum_dy, sum_dy_xhat, count, relu, with_dresidual):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(x) if with_dresidual else x.new_empty(0)


@_op("add_act(Tensor x, Tensor other, bool relu) -> Tensor")
def _(x, other, relu):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@_op("add_act_backward(Tensor dy, Tensor y) -> Tensor")
def _(dy, y):  # type: ignore[no-untyped-def]
    return torch.empty_like(y)


def _memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where `x` is in that order and in no other."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _pooled(x: Tensor, dtype: torch.dtype) -> Tensor:
    n, c, h, w = x.shape
    return torch.empty(
        (n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1), dtype=dtype, device=x.device, memory_format=_memory_format(x)
    )


@_op("bn_act_max_pool(Tensor x, Tensor scale, Tensor shift) -> (Tensor y, Tensor index)")
def _(x, scale, shift):  # type: ignore[no-untyped-def]
    return _pooled(x, x.dtype), _pooled(x, torch.uint8)


@_op(
    "bn_act_max_pool_backward_reduce(Tensor dy, Tensor index, Tensor x, Tensor scale, Tensor shift, Tensor mean, "
    "Tensor invstd, SymInt rows) -> (Tensor sum_dy, Tensor sum_dy_xhat)"
)
def _(dy, index, x, scale, shift, mean, invstd, rows):  # type: ignore[no-untyped-def]
    return _vector(x, x.shape[1]), _vector(x, x.shape[1])


@_op(
    "bn_act_max_pool_backward_apply(Tensor dy, Tensor index, Tensor x, Tensor scale, Tensor shift, Tensor mean, "
    "Tensor invstd, Tensor? sum_dy, Tensor? sum_dy_xhat, float count) -> Tensor"
)
def _(dy, index, x, scale, shift, mean, invstd, sum_dy, sum_dy_xhat, count):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@_op("reduce_rows(Tensor partials) -> Tensor")
def _(partials):  # type: ignore[no-untyped-def]
    return partials.new_empty(partials.shape[1:])


@_op("pack_weight(Tensor weight, bool flip) -> Tensor")
def _(weight, flip):  # type: ignore[no-untyped-def]
    k, c, r, s = weight.shape
    return weight.new_empty((c, r, s, k) if flip else (k, r, s, c))
