"""Find out what a module's forward computes, and plan its fusion."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .block import Mismatch, joins, match_block
from .flow import flow_of
from .plans import Forward, Plan, SequencePlan
from .sequence import Rewritten, generate, rewrite
from .trace import InputType, Traced, Untraceable, original_class, trace

# Their forwards act on processes, devices and compilers; what they wrap is looked at by itself.
_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.", "torch._dynamo.", "torch.jit.", "torch.fx.")


@dataclass(frozen=True)
class Recognition:
    """A plan, or the reason why there is none; `skipped` holds (path, reason) of chains that a plan leaves alone."""

    plan: Plan | None = None
    reason: str | None = None
    skipped: tuple[tuple[str, str], ...] = ()


def is_candidate(module: nn.Module) -> bool:
    """Whether the module may run batch norms itself: as children, or as children of its lists, dicts and Sequentials."""
    name = original_class(module).__module__ + "."
    return not name.startswith(_WRAPPERS) and any(isinstance(child, _BatchNorm) for child in _own(module))


def _own(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield child
        if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            yield from _own(child)


def recognise(module: nn.Module) -> Recognition | None:
    """The plan for a module's own forward; None where there is nothing to fuse and nothing to say about it.

    The forward must compute the same units in training and in evaluation, whatever the surroundings (gradients, autocast).
    """
    if not is_candidate(module):
        return None
    try:
        return _recognise(module)
    except Untraceable as error:
        direct = any(isinstance(child, _BatchNorm) for child in module.children())
        return Recognition(reason=str(error)) if direct else None


def _recognise(module: nn.Module) -> Recognition | None:
    traces = [trace(module, training) for training in (True, False)]
    flows = [flow_of(traced.graph, module) for traced in traces]
    if any(joins(flow, direct=False) for flow in flows):
        try:
            plan, other = map(match_block, flows)
            if plan == other:
                return Recognition(plan)
            reason = "training and evaluation compute different blocks"
        except Mismatch as error:
            reason = str(error)
        if any(joins(flow, direct=True) for flow in flows):
            return Recognition(reason=reason)
    if any(op.kind == "bn" and op.direct for flow in flows for op in flow.ops):
        return _sequence(module, traces)
    return None


def _sequence(module: nn.Module, traces: list[Traced]) -> Recognition | None:
    forwards: list[Forward] = []
    rewritten: list[Rewritten] = []

    def add(inputs: InputType, traces: list[Traced]) -> None:
        done = [rewrite(traced.graph, module) for traced in traces]
        rewritten.extend(done)
        accepted: Literal["tensor", "list", "any"] = inputs if any(traced.asked for traced in traces) else "any"
        code = [generate(result.graph, type(module).__name__) for result in done]
        if code[0][0] == code[1][0]:
            forwards.append(Forward(None, accepted, traces[0].arity, *code[0]))
        else:
            forwards.extend(Forward(training, accepted, traces[0].arity, *c) for training, c in zip((True, False), code, strict=True))

    add("tensor", traces)
    if forwards[0].inputs == "tensor" and forwards[0].arity == 1:
        with contextlib.suppress(Untraceable):  # then lists take the plain forward
            add("list", [trace(module, training, "list") for training in (True, False)])
    first = rewritten[0]
    if any(result.units != first.units for result in rewritten):
        return Recognition(reason="training and evaluation run different convolutions and batch norms")
    skipped = tuple(dict.fromkeys(entry for result in rewritten for entry in result.skipped))
    if first.units:
        bypassed = tuple(dict.fromkeys(path for result in rewritten for path in result.bypassed))
        return Recognition(SequencePlan(tuple(first.units), tuple(forwards), bypassed), skipped=skipped)
    return Recognition(skipped=skipped) if skipped else None
