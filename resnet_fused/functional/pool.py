"""The stem behind its convolution - batch norm, ReLU, max pool - as one autograd function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import dispatch
from resnet_fused.functional import native
from resnet_fused.functional.common import choose_batch_norm, dense, in_layout_of, pixels, raises_as_pytorch
from resnet_fused.functional.statistics import affine_of

_op = torch.ops.resnet_fused


@raises_as_pytorch
def batch_norm_act_max_pool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The ResNet stem behind its convolution: `y = max_pool(relu(bn(x)), kernel 3, stride 2, padding 1)`.

    The fused kernels never store the normalised activation, the largest of the network; backward finds the winners by
    a byte an output instead of an int64.

    Args:
        x, running_mean, running_var, weight, bias, training, momentum, eps: as in `batch_norm_act`.

    Returns:
        `[N, C, (H - 1) // 2 + 1, (W - 1) // 2 + 1]` in the dtype and memory format of `x`.

    Mutates:
        `running_mean` and `running_var` in training.

    Raises:
        What `batch_norm_act` raises.

    Source:
        He et al., Deep Residual Learning for Image Recognition, 2015, table 1 (conv1 and the pool of conv2_x).
    """
    vectors = (running_mean, running_var, weight, bias)
    backend = choose_batch_norm("bn_act_max_pool", "batch_norm_act_max_pool", x, (), vectors, training, eps)
    if backend == "aten":
        return F.max_pool2d(F.batch_norm(x, *vectors, training, momentum, eps).relu(), 3, 2, 1)  # type: ignore[arg-type]
    x = dense(x)
    affine = affine_of(x, *vectors, training, momentum, eps, backend)
    return _BatchNormActMaxPool.apply(x, weight, bias, *affine, eps if training else None, backend)


class _BatchNormActMaxPool(torch.autograd.Function):
    """`bn_act_max_pool` and its two backward passes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        mean: Tensor,
        invstd: Tensor,
        eps: float | None,
        backend: str,
    ) -> Tensor:
        y, index = _op.bn_act_max_pool(x, scale, shift, backend=backend)
        ctx.save_for_backward(x, index, scale, shift, mean, invstd, weight)
        ctx.eps, ctx.backend = eps, backend
        ctx.vector_dtypes = (weight.dtype if weight is not None else None, bias.dtype if bias is not None else None)
        return y

    @staticmethod
    @native.differentiable(native.batch_norm_act_max_pool)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, index, scale, shift, mean, invstd, _ = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dy = in_layout_of(dy, index)
        dx = sum_dy = sum_dy_xhat = None
        batch_statistics = ctx.eps is not None
        if needs_weight or needs_bias or batch_statistics:
            rows = dispatch.partial_rows(pixels(x), x.shape[1])
            sum_dy, sum_dy_xhat = _op.bn_act_max_pool_backward_reduce(
                dy, index, x, scale, shift, mean, invstd, rows, backend=ctx.backend
            )
        if needs_x:
            sums = (sum_dy, sum_dy_xhat) if batch_statistics else (None, None)
            dx = _op.bn_act_max_pool_backward_apply(
                dy, index, x, scale, shift, mean, invstd, *sums, float(pixels(x)), backend=ctx.backend
            )
        weight_dtype, bias_dtype = ctx.vector_dtypes
        dweight = sum_dy_xhat.to(weight_dtype) if needs_weight and sum_dy_xhat is not None else None
        dbias = sum_dy.to(bias_dtype) if needs_bias and sum_dy is not None else None
        return dx, dweight, dbias, *(None,) * 6
