"""The Triton kernels, one file per family: tensors in, tensors out; no autograd, no policy.

Every op of `docs/design.md` is a function of its name here, with its arguments and order; `refuse(op, *args)` says
beforehand why it cannot run. Importing this package imports triton, so import it only where a kernel is about to run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from resnet_fused.kernels.add_act import add_act, add_act_backward
from resnet_fused.kernels.bn_act_max_pool import bn_act_max_pool
from resnet_fused.kernels.bn_act_max_pool_backward import (
    bn_act_max_pool_backward_apply,
    bn_act_max_pool_backward_reduce,
)
from resnet_fused.kernels.bn_apply import bn_apply
from resnet_fused.kernels.bn_backward_apply import bn_backward_apply
from resnet_fused.kernels.bn_backward_finalize import bn_backward_finalize
from resnet_fused.kernels.bn_backward_reduce import bn_backward_reduce
from resnet_fused.kernels.bn_finalize import bn_finalize
from resnet_fused.kernels.bn_stats import bn_stats
from resnet_fused.kernels.conv_chain import conv_chain
from resnet_fused.kernels.conv_dgrad import conv_dgrad
from resnet_fused.kernels.conv_dgrad_join import conv_dgrad_join
from resnet_fused.kernels.conv_fprop import conv_fprop, conv_fprop_stats
from resnet_fused.kernels.conv_join import conv_join
from resnet_fused.kernels.conv_wgrad import conv_wgrad
from resnet_fused.kernels.pack_weight import pack_weight
from resnet_fused.kernels.reduce_rows import reduce_rows

OPS = {
    launcher.__name__: launcher
    for launcher in (
        conv_fprop,
        conv_fprop_stats,
        conv_dgrad,
        conv_dgrad_join,
        conv_wgrad,
        conv_chain,
        conv_join,
        bn_stats,
        bn_finalize,
        bn_apply,
        bn_backward_reduce,
        bn_backward_apply,
        bn_backward_finalize,
        add_act,
        add_act_backward,
        bn_act_max_pool,
        bn_act_max_pool_backward_reduce,
        bn_act_max_pool_backward_apply,
        reduce_rows,
        pack_weight,
    )
}


def refuse(op: str, *args: Any) -> str | None:
    """Why the launcher of `op` cannot run on these arguments (the op's own, in its order), or None if it can."""
    if op not in OPS:
        raise ValueError(f"no Triton kernel {op!r}; choose one of {', '.join(OPS)}")
    module = sys.modules[OPS[op].__module__]
    refusal = getattr(module, f"refuse_{op}", None) or module.refuse  # a module of two ops may have one for each
    return refusal(*args)


_accepted: set[Any] = set()


def _described(argument: Any) -> Any:
    """All of an argument that a refusal may depend on."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    return tuple(argument) if isinstance(argument, list) else argument


def checked(op: str) -> Callable[..., Any]:
    """The launcher of `op`, behind the question whether it can run on its arguments: asked once of every combination of
    shapes, strides, dtypes and devices.

    Raises:
        RuntimeError: it cannot, with the reason; it never misreads.
    """
    launcher = OPS[op]

    def run(*args: Any) -> Any:
        asked = (op, *map(_described, args))
        if asked not in _accepted:
            reason = refuse(op, *args)
            if reason is not None:
                raise RuntimeError(f"{op}: the Triton kernel cannot run on these arguments: {reason}")
            if len(_accepted) >= 10_000:
                _accepted.clear()
            _accepted.add(asked)
        return launcher(*args)

    return run


__all__ = [
    "OPS",
    "add_act",
    "add_act_backward",
    "bn_act_max_pool",
    "bn_act_max_pool_backward_apply",
    "bn_act_max_pool_backward_reduce",
    "bn_apply",
    "bn_backward_apply",
    "bn_backward_finalize",
    "bn_backward_reduce",
    "bn_finalize",
    "bn_stats",
    "checked",
    "conv_chain",
    "conv_dgrad",
    "conv_dgrad_join",
    "conv_fprop",
    "conv_fprop_stats",
    "conv_join",
    "conv_wgrad",
    "pack_weight",
    "reduce_rows",
    "refuse",
]
