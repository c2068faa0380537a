"""Batch norm over the batches of all processes, with residual add and ReLU or with the stem's ReLU and max pool."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import dispatch, ops
from resnet_fused.functional.common import Act, add_relu, check_act, choose, common_reason, dense, pixels
from resnet_fused.functional.norm import BatchNormAct
from resnet_fused.functional.pool import BatchNormActMaxPool
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
    shared = _affine(x, (running_mean, running_var, weight, bias), momentum, eps, process_group, backend)
    if shared is None:
        return add_relu(F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps), residual, relu)
    joins = residual is not None and ops.refusal(backend, "bn_apply", x, residual) is None
    *affine, total = shared
    static = (relu and (residual is None or joins), eps, backend, total, process_group)
    y: Tensor = BatchNormAct.apply(x, residual if joins else None, weight, bias, *affine, *static)
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
    shared = _affine(x, (running_mean, running_var, weight, bias), momentum, eps, process_group, backend)
    if shared is None:
        return F.max_pool2d(F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps), 3, 2, 1)
    *affine, total = shared
    y: Tensor = BatchNormActMaxPool.apply(x, weight, bias, *affine, eps, backend, total, process_group)
    return y


Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _affine(
    x: Tensor, vectors: Vectors, momentum: float, eps: float, group: dist.ProcessGroup, backend: str
) -> tuple[Tensor, ...] | None:
    """`(scale, shift, mean, invstd)` of the batches of all ranks and their pixels; None where all batches are empty.

    Args:
        vectors: running mean, running variance, weight, bias.

    Mutates:
        The first two of them.
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
        layer = (*vectors, momentum, eps, backend)
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
