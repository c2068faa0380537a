"""Both gradients of a convolution between two batch norms."""

from __future__ import annotations

from torch import Tensor

from resnet_fused.dispatch.conv import ConvConfig
from resnet_fused.kernels._launch import empty_nhwc
from resnet_fused.kernels.conv_dgrad import run as data_gradient
from resnet_fused.kernels.conv_wgrad import run as weight_gradient
from resnet_fused.kernels.reduce_rows import reduce_alike


def conv_backward(
    dy: Tensor,
    weight: Tensor,
    dy_x: Tensor | None,
    dy_coefficients: Tensor | None,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    x_prologue: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    config: ConvConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`conv_dgrad` behind the ReLU of the batch norm in front, and `conv_wgrad` of the activation a = round(relu(x *
    scale + shift)); what both leave in parts is added in one launch.

    Args:
        dy: as in `conv_dgrad`; so are weight, dy_x, dy_coefficients, x, scale, shift, mean and invstd.
        weight: see dy.
        dy_x: see dy.
        dy_coefficients: see dy.
        x: see dy.
        scale: see dy.
        shift: see dy.
        mean: see dy.
        invstd: see dy.
        x_prologue: the weight gradient normalises x on its way in; else the data gradient, which reads x too, writes a
            for it.
        stride: of the filter, (h, w); so are padding (zeros) and dilation, which a strided filter may not have.
        padding: see stride.
        dilation: see stride.
        groups: of channels that see each other.
        config: the launch configuration of the data gradient; None takes the plan's.

    Returns:
        dx, sum_dx, sum_dx_xhat: as `conv_dgrad` gives them.
        dweight: as `conv_wgrad` gives it.
    """
    geometry = (stride, padding, dilation, groups)
    activation = None if x_prologue else empty_nhwc(x, *x.shape)
    operands = (dy_x, dy_coefficients, None, None, x, scale, shift, mean, invstd, *(None,) * 4)
    dx, *partials = data_gradient(dy, weight, operands, [*x.shape[2:]], *geometry, config, activation)
    affine: tuple[Tensor | None, Tensor | None] = (scale, shift) if activation is None else (None, None)
    a = x if activation is None else activation
    before = (dy_x, dy_coefficients, *affine)
    ranges = weight_gradient(dy, a, *before, [*weight.shape[2:]], *geometry, None)
    alone = ranges.shape[0] == 1
    sum_dx, sum_dx_xhat, *dweight = reduce_alike(*partials, other=None if alone else ranges)
    return dx, sum_dx, sum_dx_xhat, (ranges[0] if alone else dweight[0]).permute(0, 3, 1, 2)
