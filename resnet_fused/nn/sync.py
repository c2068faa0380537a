"""Batch norm and ReLU over the batches of several processes, and how a `BatchNormAct2d` becomes that."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fused.functional.common import Act, check_act
from resnet_fused.nn import call
from resnet_fused.nn.scripting import NotScriptable


class KeepsActivation(NotScriptable):
    """A batch norm with an activation of its own, which `nn.SyncBatchNorm.convert_sync_batchnorm` must not drop.

    PyTorch offers no hook there: a subclass of `nn.BatchNorm2d` is replaced by a new `nn.SyncBatchNorm` with its
    parameters, whatever else the subclass does. But every such converter - PyTorch's, timm's - ends by moving the
    children of the replaced module over to `module_output`, the new one, and so asks the replaced one for them. That is
    where the activation moves too. Where it cannot, conversion raises, since the result would be wrong in silence.
    """

    act: Act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(bn(x) + residual); `x` and `residual` are `[N, C, H, W]`."""
        return call.batch_norm_act(x, self, residual, self.act)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"  # type: ignore[misc]

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As in `nn.Module`."""
        _hand_over(self, sys._getframe(1))  # type: ignore[arg-type]
        return super().named_children()  # type: ignore[misc, no-any-return]


def init_with_act(base: type[nn.Module]) -> Callable[..., None]:
    """An `__init__` with the arguments that `base` has in the installed PyTorch, and the keyword `act`."""

    def __init__(self: Any, *args: Any, act: Act = "relu", **kwargs: Any) -> None:
        check_act(act, type(self).__name__)
        base.__init__(self, *args, **kwargs)
        self.act = act

    signature = inspect.signature(base.__init__)
    parameter = inspect.Parameter("act", inspect.Parameter.KEYWORD_ONLY, default="relu", annotation=Act)
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), parameter])  # type: ignore
    return __init__


def _hand_over(module: nn.Module, caller: FrameType) -> None:
    """Give the batch norm that replaces `module` its activation, if it is a converter that asks."""
    replacement = caller.f_locals.get("module_output")
    if caller.f_code is nn.SyncBatchNorm.convert_sync_batchnorm.__code__ and replacement is None:
        raise RuntimeError(
            f"this version of PyTorch converts batch norm in a way that would lose the activation of "
            f"{type(module).__name__}; make it a {SyncBatchNormAct2d.__name__} by hand"
        )
    if replacement is module or not isinstance(replacement, _BatchNorm) or isinstance(replacement, KeepsActivation):
        return
    if type(replacement) is not nn.SyncBatchNorm:
        raise TypeError(
            f"a {type(replacement).__name__} cannot replace a {type(module).__name__}, whose activation "
            f"({module.act!r}) it would lose; nn.SyncBatchNorm.convert_sync_batchnorm keeps it"
        )
    replacement.__class__ = SyncBatchNormAct2d
    replacement.act = module.act


class SyncBatchNormAct2d(KeepsActivation, nn.SyncBatchNorm):
    """`BatchNormAct2d` over the batches of all processes: `y = act(bn(x) + residual)`.

    What `nn.SyncBatchNorm.convert_sync_batchnorm` makes of a `BatchNormAct2d`. Unlike `nn.SyncBatchNorm` it runs on a
    CPU too.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype: as in
            `nn.SyncBatchNorm`, and so is what else the installed PyTorch has, such as `bias` since 2.14.
        act: `"relu"` or None; by name.
    """

    __init__ = init_with_act(nn.SyncBatchNorm)
    _plain_batch_norm = KeepsActivation.forward
