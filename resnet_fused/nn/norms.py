"""The batch norms that a fused call may stand in for, and what their forwards do beside normalising."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.nn.convs import CONVS, RecognisedConv
from resnet_fused.nn.eligibility import calls_forward, not_plain, watched

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True, eq=False)
class RecognisedNorm:
    """A batch norm by what its forward computes, not by its class; `fusion.norms` looked into it.

    Attributes:
        module: has the parameters and buffers of a batch norm, under their usual names.
        constant: its statistics are constants in training, too: `y = scale * x + shift`, in whatever dtype that gives.
        opened: its forward calls more behind the normalisation, such as an activation, which is run apart.
    """

    module: nn.Module
    constant: bool = False
    opened: bool = False

    @property
    def training(self) -> bool:
        return self.module.training and not self.constant

    @property
    def weight(self) -> Tensor | None:
        return getattr(self.module, "weight", None)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def running_mean(self) -> Tensor | None:
        return self.module.running_mean  # type: ignore[return-value]

    @property
    def running_var(self) -> Tensor | None:
        return self.module.running_var  # type: ignore[return-value]

    @property
    def eps(self) -> float:
        return self.module.eps  # type: ignore[return-value]

    def __call__(self, x: Tensor) -> Tensor:
        """The normalisation alone."""
        if not self.opened or (x.dim() != 4 and not self.constant):  # the latter is the module's to refuse
            y: Tensor = self.module(x)
            return y
        training, momentum = begin_batch_norm(self)
        vectors = (*running_statistics(self), self.weight, self.bias)
        return F.batch_norm(x if x.dim() == 4 else x[None], *vectors, training, momentum, self.eps)


BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm | RecognisedNorm
Norm = nn.Module | RecognisedNorm


def says_plain(cls: type[nn.Module]) -> bool:
    """Whether a class says of its forward that it is that of a plain batch norm, as our own do."""
    own_forward = cls.__dict__.get("_plain_batch_norm")
    return own_forward is not None and own_forward is cls.forward and calls_forward(cls)


def module_of(layer: Norm | RecognisedConv) -> nn.Module:
    return layer.module if isinstance(layer, (RecognisedNorm, RecognisedConv)) else layer


def plain_norm(bn: Norm, conv: nn.Module | RecognisedConv | None, *, in_forward: bool = True) -> str | None:
    """Why a batch norm cannot be run fused, or None if it can.

    Args:
        bn: the batch norm.
        conv: the convolution before it, or None.
        in_forward: it is about to run.
    """
    module = module_of(bn)
    if not isinstance(bn, RecognisedNorm):
        own = type(bn)
        problem = not_plain(bn, own) if own in BATCH_NORMS else None
        if problem is not None:
            return problem
        if own not in BATCH_NORMS and not says_plain(own):
            return f"{own.__name__} is not a plain BatchNorm2d"
        if getattr(bn, "act", None) is not None:
            return f"{type(bn).__name__} has an activation of its own"
    reason = watched(module, "BatchNorm2d", in_forward)
    if reason is None and bn.eps <= 0:  # type: ignore[operator]
        reason = f"the batch norm's eps is {bn.eps}"
    if reason is None and isinstance(bn, RecognisedNorm) and bn.constant:
        reason = _other_dtype(bn, conv, in_forward)
    return reason


def _other_dtype(bn: RecognisedNorm, conv: nn.Module | RecognisedConv | None, in_forward: bool) -> str | None:
    """Why an affine map written as arithmetic gives another dtype than a batch norm."""
    if not isinstance(conv, CONVS):
        return f"{type(bn.module).__name__} does not follow a convolution"
    device, dtype = conv.weight.device.type, conv.weight.dtype
    if in_forward and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return f"under autocast {type(bn.module).__name__} computes in the dtype of its buffers"
    for name, vector in (("weight", bn.weight), ("running_mean", bn.running_mean)):
        if in_forward and vector is not None and vector.dtype != dtype:
            return f"its {name} is {vector.dtype}, the convolution {dtype}"
    return None


def begin_batch_norm(bn: BatchNorm) -> tuple[bool, float]:
    """What `nn.BatchNorm2d.forward` does before it normalises.

    Returns:
        Whether to normalise by the batch, and the batch's weight in the running statistics.

    Mutates:
        `num_batches_tracked` in training.
    """
    if isinstance(bn, RecognisedNorm):
        if bn.constant:
            return False, 0.0
        bn = bn.module  # type: ignore[assignment]
    assert isinstance(bn, BATCH_NORMS)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    return bn.training or (bn.running_mean is None and bn.running_var is None), momentum


def running_statistics(bn: BatchNorm) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics where this forward reads or updates them."""
    if bn.training and not module_of(bn).track_running_stats:  # type: ignore[arg-type]
        return None, None
    return bn.running_mean, bn.running_var


def sync_group(bn: Norm) -> dist.ProcessGroup | None:
    """The processes whose batches a batch norm's next forward normalises together; None where it is this one alone."""
    module = module_of(bn)
    if not (isinstance(module, nn.SyncBatchNorm) and module.training):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group: dist.ProcessGroup | None = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
