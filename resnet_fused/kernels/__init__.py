"""The Triton kernels, one file per family: tensors in, tensors out; no autograd, no policy.

A launcher takes the arguments of its op's record and, of a convolution, launch configurations. `run` launches an op as
planned; `refuse` says beforehand why it cannot run. Importing this package imports triton, so import it only where a
kernel is about to run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from resnet_fused.dispatch import conv_config, forget_with_plan
from resnet_fused.dispatch.choice import heuristic
from resnet_fused.dispatch.conv import ConvConfig, uses_tf32
from resnet_fused.dispatch.device import arch
from resnet_fused.dispatch.table import Problem
from resnet_fused.kernels import experimental
from resnet_fused.kernels._launch import refuse_device
from resnet_fused.kernels._replay import Replay, never_replay, watch
from resnet_fused.ops.registry import OPS

LAUNCHERS: dict[str, Callable[..., Any]] = {
    op.name: getattr(importlib.import_module(f"{__name__}.{op.triton}"), op.name) for op in OPS.values() if op.triton
}


def refuse(op: str, a: Any) -> str | None:
    """Why the launcher of `op` cannot run on these arguments, as its record has them, or None if it can."""
    if op not in LAUNCHERS:
        raise ValueError(f"no Triton kernel {op!r}; choose one of {', '.join(LAUNCHERS)}")
    return refuse_device(next(t.device for t in a if isinstance(t, Tensor))) or OPS[op].refuse(a)


def run(op: str, a: Any, config: ConvConfig | None = None) -> Any:
    """Launch an op.

    Args:
        op: its name.
        a: its arguments, as its record has them.
        config: the launch configuration of its first convolution; None for the planned one. All others are planned.
    """
    first, *others = OPS[op].problems(a) or (None,)
    if first is None:
        return LAUNCHERS[op](a)
    return LAUNCHERS[op](a, config or _planned(first, a), *(_planned(problem, a) for problem in others))


def _planned(problem: Problem, a: Any) -> ConvConfig:
    """The plan's configuration; the heuristic's where these arguments do not suit the formulation that was measured."""
    capability = arch(a[0].device)
    config = conv_config(problem, capability)
    if config.kernel == "pointer":
        return config
    never_replay()  # of what depends on addresses
    suits = experimental.refuse(a, config) is None
    return config if suits else heuristic(problem, capability)  # type: ignore[return-value]


_replays: dict[Any, Replay | None] = {}
_MOST_REPLAYS = 10_000
forget_with_plan(_replays.clear)  # whose configurations they hold


def _described(argument: Any) -> Any:
    """All of an argument that a refusal, or a launch, may depend on."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    return tuple(argument) if isinstance(argument, list) else argument


def checked(op: str) -> Callable[..., Any]:
    """What runs `op` on arguments in its order, behind the question whether it can. That, and the plan, are asked once
    of every combination of shapes, strides, dtypes and devices; what the launcher did is then replayed.

    Raises:
        RuntimeError: it cannot, with the reason; it never misreads.
    """
    record = OPS[op]

    def checked_op(*args: Any) -> Any:
        described = (op, uses_tf32(args[0].dtype), *map(_described, args))
        replay = _replays.get(described)
        if replay is not None:
            return replay(args)
        a = record.args(*args)
        if described in _replays:  # which cannot be replayed
            return run(op, a)
        reason = refuse(op, a)
        if reason is not None:
            raise RuntimeError(f"{op}: the Triton kernel cannot run on these arguments: {reason}")
        if len(_replays) >= _MOST_REPLAYS:
            _replays.clear()
        returned, _replays[described] = watch(lambda: run(op, a), a)
        return returned

    return checked_op
