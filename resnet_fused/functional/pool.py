"""The stem behind its convolution - batch norm, ReLU, max pool - as one autograd function."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import dispatch
from resnet_fused.functional import native
from resnet_fused.functional.common import choose_batch_norm, dense, in_layout_of, pixels, raises_as_pytorch
from resnet_fused.functional.norm import Sums, divided, vector_gradients
from resnet_fused.functional.ranks import moments_over
from resnet_fused.functional.statistics import affine_of
from resnet_fused.ops import called

_pool, _pool_backward_reduce, _pool_backward_apply = map(
    called, ("bn_act_max_pool", "bn_act_max_pool_backward_reduce", "bn_act_max_pool_backward_apply")
)


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
        return F.max_pool2d(F.batch_norm(x, *vectors, training, momentum, eps).relu_(), 3, 2, 1)  # type: ignore[arg-type]
    x = dense(x)
    affine = affine_of(x, *vectors, training, momentum, eps, backend)
    return BatchNormActMaxPool.apply(x, weight, bias, *affine, eps if training else None, backend)


def _native(ctx: Any, dy: Tensor) -> native.Recomputed:
    return native.batch_norm_act_max_pool(ctx, dy, moments_over(ctx.group))


class BatchNormActMaxPool(torch.autograd.Function):
    """`bn_act_max_pool` and its two backward passes; `eps`, `total` and `group` as in `BatchNormAct`."""

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
        total: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        if group is not None and x.numel() == 0:
            y = F.max_pool2d(x, 3, 2, 1)
            index = torch.empty_like(y, dtype=torch.uint8)
        else:
            y, index = _pool(x, scale, shift, backend=backend)
        ctx.save_for_backward(x, index, scale, shift, mean, invstd, weight, *(() if total is None else (total,)))
        ctx.eps, ctx.group, ctx.backend = eps, group, backend
        ctx.vector_dtypes = (weight.dtype if weight is not None else None, bias.dtype if bias is not None else None)
        return y

    @staticmethod
    @native.differentiable(_native)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, index, scale, shift, mean, invstd, _, *total = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        operands = (in_layout_of(dy, index), index, x, scale, shift, mean, invstd)
        empty = ctx.group is not None and x.numel() == 0
        own: Sums = (torch.zeros_like(mean), torch.zeros_like(mean)) if empty else (None, None)
        if not empty and (needs_weight or needs_bias or ctx.eps is not None):
            rows = dispatch.partial_rows(pixels(x), x.shape[1])
            own = _pool_backward_reduce(*operands, rows, backend=ctx.backend)
        sums, count = divided(ctx, own, pixels(x), total) if needs_x else ((None, None), 1.0)
        dx = None
        if needs_x and empty:
            dx = torch.zeros_like(x)
        elif needs_x:
            dx = _pool_backward_apply(*operands, *sums, count, backend=ctx.backend)
        return dx, *vector_gradients(ctx, own, needs_weight, needs_bias), *(None,) * 8
