"""Batch norm over the batches of all processes, with residual add and ReLU or with the stem's ReLU and max pool."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import dispatch, ops
from resnet_fused.functional import native
from resnet_fused.functional.common import Act, add_relu, check_act, choose, common_reason, dense, in_layout_of, pixels
from resnet_fused.functional.statistics import finalize
from resnet_fused.ops.arithmetic import compute_dtype

_op = torch.ops.resnet_fused


def choose_sync(op: str, x: Tensor, vectors: tuple[Tensor | None, ...]) -> str | None:
    """The backend of a function below; None where native PyTorch is to run: `nn.SyncBatchNorm` has one for a GPU.

    All ranks must choose alike, so nothing here may depend on the size of the batch.

    Args:
        op: `"bn_apply"` or `"bn_act_max_pool"`.
        x, vectors: the activation and the per-channel tensors.

    Raises:
        Refused: a forced backend has the kernels, and cannot run them on these tensors.
    """
    backend = choose(op, "synchronised batch norm", x, (), vectors)
    if backend != "aten":
        return backend
    fits = x.dim() == 4 and all(v is None or v.shape == x.shape[1:2] for v in vectors)
    if op != "bn_apply" or x.device.type != "cpu" or not fits or common_reason(x, vectors):
        return None
    return "reference" if ops.refusal("reference", op, x) is None else None


def sync_batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    process_group: dist.ProcessGroup,
    backend: str,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: Act = "relu",
) -> Tensor:
    """`batch_norm_act` in training, with the statistics of the batches of all ranks of `process_group` together.

    Each rank sends one row - pixels, mean, sum of squared deviations - and merges the rows of all in the order of the
    ranks, so that all get the same bits. Batches may differ in size, and some may be empty.

    Args:
        x, running_mean, running_var, weight, bias, residual, momentum, eps, act: as in `batch_norm_act`.
        process_group: every rank of it must call, in forward and in backward.
        backend: from `choose_sync`.

    Returns:
        `[N, C, H, W]` in the dtype and memory format of `x`. The gradients of `weight` and `bias` are this rank's own,
        as `DistributedDataParallel` expects them.

    Mutates:
        `running_mean` and `running_var`.

    Raises:
        ValueError: fewer than two values per channel in all batches together; on every rank.

    Source:
        The merging of the rows: Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm, 1979.
    """
    relu = check_act(act, "sync_batch_norm_act")
    x = dense(x)
    shared = _affine(x, running_mean, running_var, weight, bias, momentum, eps, process_group, backend)
    if shared is None:
        return add_relu(F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps), residual, relu)
    joins = residual is not None and ops.refusal(backend, "bn_apply", x, residual) is None
    static = (relu and (residual is None or joins), eps, process_group, backend)
    y: Tensor = _SyncBatchNormAct.apply(x, residual if joins else None, weight, bias, *shared, *static)
    return y if residual is None or joins else add_relu(y, residual, relu)


def sync_batch_norm_act_max_pool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    process_group: dist.ProcessGroup,
    backend: str,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`batch_norm_act_max_pool` in training, with statistics, arguments and errors as in `sync_batch_norm_act`."""
    x = dense(x)
    shared = _affine(x, running_mean, running_var, weight, bias, momentum, eps, process_group, backend)
    if shared is None:
        return F.max_pool2d(F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps), 3, 2, 1)
    y: Tensor = _SyncBatchNormActMaxPool.apply(x, weight, bias, *shared, eps, process_group, backend)
    return y


def _affine(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup,
    backend: str,
) -> tuple[Tensor, ...] | None:
    """`(scale, shift, mean, invstd)` of the batches of all ranks and their pixels; None where all batches are empty.

    Mutates:
        `running_mean` and `running_var`.
    """
    with torch.no_grad():
        rows = _gather(_statistics(x, backend), group)
        count, mean, m2 = (part.contiguous() for part in rows.split((1, x.shape[1], x.shape[1]), dim=1))
        total = count.sum()
        if pixels(x) < 2:  # only then may all batches together be too small, and is it worth waiting for the device
            if int(total) == 0:
                return None
            if int(total) == 1:
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        layer = (running_mean, running_var, weight, bias, momentum, eps, backend)
        up = compute_dtype(x.dtype)
        return *finalize((mean, m2.to(up), count.squeeze(1).to(up)), *layer), total.to(up)


def _statistics(x: Tensor, backend: str) -> Tensor:
    """`[1 + 2C]`: pixels, mean and sum of squared deviations of this rank's batch; zeros where it is empty. In float64,
    as a mean far from zero would lose the digits that its deviations are made of.
    """
    if x.numel() == 0:
        return x.new_zeros(1 + 2 * x.shape[1], dtype=torch.float64)
    mean, m2, count = _op.bn_stats(x, dispatch.partial_rows(pixels(x), x.shape[1]), backend=backend)
    n = count.double().unsqueeze(1)
    merged = (mean * n).sum(0) / n.sum()
    deviations = (m2 + n * (mean - merged).square()).sum(0)
    return torch.cat([n.sum(0), merged, deviations])


def _gather(row: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, `[ranks, len(row)]`, in the order of the ranks."""
    rows = row.new_empty(dist.get_world_size(group), len(row))
    dist.all_gather_into_tensor(rows, row.unsqueeze(0), group=group)
    return rows


def _mean_over_ranks(sums: list[Tensor], total: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The sums of all ranks over the pixels of all: divided here, on the device, as the ops take a count from the host,
    which does not know it."""
    shared = torch.stack(sums)
    dist.all_reduce(shared, group=group)
    first, second = shared / total
    return first, second


class _SumOverRanks(torch.autograd.Function):
    """An all-reduce; the gradient of a sum that every rank gets is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = own.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(dy, ctx.group), None


def _moments(x: Tensor, eps: float, total: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """`(mean, invstd)` of the batches of all ranks, differentiable; every rank must call."""
    x = x.to(total.dtype)
    mean = _SumOverRanks.apply(x.sum((0, 2, 3)), group) / total
    deviations = (x - mean.view(-1, 1, 1)).square().sum((0, 2, 3))
    return mean, (_SumOverRanks.apply(deviations, group) / total + eps).rsqrt()


def _native(ctx: Any, dy: Tensor) -> native.Recomputed:
    return native.batch_norm_act(ctx, dy, functools.partial(_moments, group=ctx.group))


def _native_max_pool(ctx: Any, dy: Tensor) -> native.Recomputed:
    return native.batch_norm_act_max_pool(ctx, dy, functools.partial(_moments, group=ctx.group))


class _SyncBatchNormAct(torch.autograd.Function):
    """`bn_apply` forward; backward is `bn_backward_reduce`, a sum over all ranks, `bn_backward_apply`."""

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
        total: Tensor,
        relu: bool,
        eps: float,
        group: dist.ProcessGroup,
        backend: str,
    ) -> Tensor:
        with_mask = relu and residual is not None and any(ctx.needs_input_grad)
        addend = None if residual is None else in_layout_of(residual, x)
        if x.numel() == 0:
            y, mask = torch.empty_like(x), None
        else:
            y, mask = _op.bn_apply(x, scale, shift, addend, None, None, relu, with_mask, backend=backend)
        ctx.save_for_backward(x, mask if with_mask else None, scale, shift, mean, invstd, weight, total)
        ctx.relu, ctx.eps, ctx.group, ctx.backend = relu, eps, group, backend
        ctx.vector_dtypes = (weight.dtype if weight is not None else None, bias.dtype if bias is not None else None)
        return y

    @staticmethod
    @native.differentiable(_native)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, scale, shift, mean, invstd, _, total = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        dy = in_layout_of(dy, x)
        operands = (dy, x, mask, scale, shift, mean, invstd)
        empty = x.numel() == 0
        own = [torch.zeros_like(mean), torch.zeros_like(mean)]
        if (needs_weight or needs_bias or needs_x) and not empty:
            rows = dispatch.partial_rows(pixels(x), x.shape[1])
            own = list(_op.bn_backward_reduce(*operands, ctx.relu, rows, backend=ctx.backend))
        dresidual = dy if needs_residual else None
        dx = None
        sums: tuple[Tensor | None, Tensor | None] = (None, None)
        if needs_x:
            sums = _mean_over_ranks(own, total, ctx.group)
        if empty:
            dx = torch.zeros_like(x) if needs_x else None
        elif needs_x or (needs_residual and ctx.relu):
            with_residual = needs_residual and ctx.relu
            dx, dz = _op.bn_backward_apply(*operands, *sums, 1.0, ctx.relu, with_residual, backend=ctx.backend)
            dresidual = dz if with_residual else dresidual
        weight_dtype, bias_dtype = ctx.vector_dtypes
        dweight = own[1].to(weight_dtype) if needs_weight else None
        dbias = own[0].to(bias_dtype) if needs_bias else None
        return dx if needs_x else None, dresidual, dweight, dbias, *(None,) * 9


class _SyncBatchNormActMaxPool(torch.autograd.Function):
    """`bn_act_max_pool` and its two backward passes, with a sum over all ranks between them."""

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
        total: Tensor,
        eps: float,
        group: dist.ProcessGroup,
        backend: str,
    ) -> Tensor:
        if x.numel() == 0:
            y = F.max_pool2d(x, 3, 2, 1)
            index = torch.empty_like(y, dtype=torch.uint8)
        else:
            y, index = _op.bn_act_max_pool(x, scale, shift, backend=backend)
        ctx.save_for_backward(x, index, scale, shift, mean, invstd, weight, total)
        ctx.eps, ctx.group, ctx.backend = eps, group, backend
        ctx.vector_dtypes = (weight.dtype if weight is not None else None, bias.dtype if bias is not None else None)
        return y

    @staticmethod
    @native.differentiable(
        lambda ctx, dy: native.batch_norm_act_max_pool(ctx, dy, functools.partial(_moments, group=ctx.group))
    )
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, index, scale, shift, mean, invstd, _, total = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        operands = (in_layout_of(dy, index), index, x, scale, shift, mean, invstd)
        empty = x.numel() == 0
        own = [torch.zeros_like(mean), torch.zeros_like(mean)]
        if not empty:
            rows = dispatch.partial_rows(pixels(x), x.shape[1])
            own = list(_op.bn_act_max_pool_backward_reduce(*operands, rows, backend=ctx.backend))
        dx = None
        if needs_x:
            sums = _mean_over_ranks(own, total, ctx.group)
            if empty:
                dx = torch.zeros_like(x)
            else:
                dx = _op.bn_act_max_pool_backward_apply(*operands, *sums, 1.0, backend=ctx.backend)
        weight_dtype, bias_dtype = ctx.vector_dtypes
        dweight = own[1].to(weight_dtype) if needs_weight else None
        dbias = own[0].to(bias_dtype) if needs_bias else None
        return dx, dweight, dbias, *(None,) * 8
