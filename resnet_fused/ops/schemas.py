"""The ops' schemas and fake kernels. Their meaning is written once, in `docs/design.md`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops.backends import implementation

_LIBRARY = torch.library.Library("resnet_fused", "DEF")


def _op(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register `schema` (without `backend`) with the decorated function as its fake kernel."""
    name = schema.partition("(")[0]
    arguments, _, results = schema.partition(" -> ")

    def run(*args: Any, backend: str) -> Any:
        return implementation(backend, name)(*args)

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(f"{arguments[:-1]}, *, str backend) -> {results}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"resnet_fused::{name}", lambda *args, backend: fake(*args), lib=_LIBRARY)
        return fake

    return register


def _vector(x: Tensor, *shape: int) -> Tensor:
    """An fp32 tensor (fp64 for fp64 data) on the device of `x`."""
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@_op(
    "conv_fprop(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool relu) -> Tensor"
)
def _(x, weight, scale, shift, residual, stride, padding, dilation, groups, relu):  # type: ignore[no-untyped-def]
    # PyTorch's own rule decides the strides: channels_last if either operand is.
    return torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)


@_op("bn_stats(Tensor x, SymInt rows) -> (Tensor mean, Tensor m2, Tensor count)")
def _(x, rows):  # type: ignore[no-untyped-def]
    return _vector(x, rows, x.shape[1]), _vector(x, rows, x.shape[1]), _vector(x, rows)


@_op(
    "bn_finalize(Tensor mean, Tensor m2, Tensor count, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps) "
    "-> (Tensor scale, Tensor shift, Tensor save_mean, Tensor save_invstd)"
)
def _(mean, m2, count, weight, bias, running_mean, running_var, momentum, eps):  # type: ignore[no-untyped-def]
    return tuple(_vector(mean, mean.shape[1]) for _ in range(4))


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


def _pooled(x: Tensor, dtype: torch.dtype) -> Tensor:
    n, c, h, w = x.shape
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1), dtype=dtype, device=x.device, memory_format=memory_format
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
