"""The Triton kernels, one file per family: tensors in, tensors out; no autograd, no policy.

The launcher of every op is a function of its name here, with the arguments of its record in their order; `refuse(op,
*args)` says beforehand why it cannot run. Importing this package imports triton, so import it only where a kernel is
about to run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from resnet_fused.dispatch import forget_with_plan
from resnet_fused.dispatch.conv import uses_tf32
from resnet_fused.kernels._launch import refuse_device
from resnet_fused.kernels._replay import Replay, watch
from resnet_fused.ops.registry import OPS

LAUNCHERS: dict[str, Callable[..., Any]] = {
    op.name: getattr(importlib.import_module(f"{__name__}.{op.triton}"), op.name) for op in OPS.values() if op.triton
}
globals().update(LAUNCHERS)  # over the modules of the same names


def refuse(op: str, *args: Any) -> str | None:
    """Why the launcher of `op` cannot run on these arguments (the op's own, in its order), or None if it can."""
    if op not in LAUNCHERS:
        raise ValueError(f"no Triton kernel {op!r}; choose one of {', '.join(LAUNCHERS)}")
    record = OPS[op]
    given = record.args(*args)
    return refuse_device(next(a.device for a in given if isinstance(a, Tensor))) or record.refuse(given)


_replays: dict[Any, Replay | None] = {}
_MOST_REPLAYS = 10_000
forget_with_plan(_replays.clear)  # whose configurations they hold


def _described(argument: Any) -> Any:
    """All of an argument that a refusal, or a launch, may depend on."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    return tuple(argument) if isinstance(argument, list) else argument


def checked(op: str) -> Callable[..., Any]:
    """The launcher of `op`, behind the question whether it can run on its arguments. Both are asked once of every
    combination of shapes, strides, dtypes and devices; what the launcher did is then replayed.

    Raises:
        RuntimeError: it cannot, with the reason; it never misreads.
    """
    launcher = LAUNCHERS[op]

    def run(*args: Any) -> Any:
        described = (op, uses_tf32(args[0].dtype), *map(_described, args))
        replay = _replays.get(described)
        if replay is not None:
            return replay(args)
        if described in _replays:  # which cannot be replayed
            return launcher(*args)
        reason = refuse(op, *args)
        if reason is not None:
            raise RuntimeError(f"{op}: the Triton kernel cannot run on these arguments: {reason}")
        if len(_replays) >= _MOST_REPLAYS:
            _replays.clear()
        returned, _replays[described] = watch(launcher, args)
        return returned

    return run
