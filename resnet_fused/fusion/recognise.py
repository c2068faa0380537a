"""Find out what a module's forward computes, and plan its fusion."""

from __future__ import annotations

import linecache
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fused.fusion.block import Mismatch, NoReluAfterSum, joins, match_block
from resnet_fused.fusion.flow import Flow, flow_of
from resnet_fused.fusion.isolation import Untraceable
from resnet_fused.fusion.nodes import is_holder
from resnet_fused.fusion.norms import looks_like_norm
from resnet_fused.fusion.plans import BlockPlan, Forward, Plan, SequencePlan
from resnet_fused.fusion.sequence import Rewritten, rewrite
from resnet_fused.fusion.trace import AsksForInputType, Inputs, Traced, original_class, trace
from resnet_fused.nn.eligibility import home

# Their forwards are generated, or act on processes, devices and compilers; what they wrap is looked at by itself.
_FOREIGN = ("torch.nn.parallel.", "torch.distributed.", "torch._dynamo.", "torch.jit.")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Recognition:
    """What is known of a module's own forward.

    Attributes:
        plan: how it runs fused.
        reason: why it has no plan.
        native: the name of its class where that is one of `resnet_fused.nn`, which is fused by itself.
        skipped: (path, reason) of chains that the plan leaves alone.
        reads: the attributes that the forward looks up; None where it could not be traced.
        contents: what the lists and dicts among them hold.
        full: the modes in which all that holds for inputs with elements only.
    """

    plan: Plan | None = None
    reason: str | None = None
    native: str | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    reads: frozenset[str] | None = None
    contents: dict[str, Any] = field(default_factory=dict)
    full: frozenset[bool] = frozenset()


def recognise(module: nn.Module, into_native: bool = False) -> Recognition | None:
    """The plan for a module's own forward; None where nothing is known about it.

    The forward must compute the same units in training and in evaluation.

    Args:
        module: left untouched.
        into_native: plan the modules of `resnet_fused.nn` too, which are fused by themselves, but not folded.
    """
    cls = original_class(module)
    if is_native(module) and not into_native:
        return Recognition(native=cls.__name__)
    if getattr(cls, "forward", None) is nn.Module.forward or not any(
        looks_like_norm(child) for _, child in own(module)
    ):
        return None
    try:
        # FSDP2 makes a class of its own for each module, which inherits the module's forward.
        author = next(base for base in cls.__mro__ if "forward" in base.__dict__).__module__
        if f"{author}.".startswith(_FOREIGN):
            raise Untraceable(f"its forward is that of {author}, which is not looked into")
        return _recognise(module)
    except Untraceable as error:
        direct = any(looks_like_norm(child) for _, child in own(module, (nn.ModuleList, nn.ModuleDict)))
        return Recognition(reason=str(error)) if direct else None


def is_native(module: nn.Module) -> bool:
    """Whether the module is one of `resnet_fused.nn`, with its own forward."""
    cls = original_class(module)
    return all(name.startswith("resnet_fused.nn.") for name in (cls.__module__, home(getattr(cls, "forward", None))))


def own(
    module: nn.Module, containers: tuple[type[nn.Module], ...] = (*_CONTAINERS, nn.Conv2d), prefix: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """What a module may call itself, by path: its children, and those of what holds modules or calls one by one."""
    for name, child in module.named_children():
        yield f"{prefix}{name}", child
        if isinstance(child, containers) or is_holder(child):
            yield from own(child, containers, f"{prefix}{name}.")


def _recognise(module: nn.Module) -> Recognition:
    inputs: Inputs = "any"
    try:
        traces = _traces(module, inputs)
    except AsksForInputType:
        inputs = "list"  # as torchvision's DenseNet does; other inputs take the plain forward
        traces = _traces(module, inputs)
    recognition = _match(module, traces, inputs) or Recognition()
    contents = traces[0].contents | traces[1].contents
    full = frozenset(mode for mode, traced in zip((True, False), traces, strict=True) if traced.full)
    return replace(recognition, reads=traces[0].reads | traces[1].reads, contents=contents, full=full)


def _match(module: nn.Module, traces: list[Traced], inputs: Inputs) -> Recognition | None:
    flows = [flow_of(traced.graph, module) for traced in traces]
    reason, linear = None, False
    if any(joins(flow, direct=False) for flow in flows) and inputs == "any":
        training, evaluation = map(_match_block, flows)
        if isinstance(training, BlockPlan) and training == evaluation:
            return Recognition(training)
        reason = _why_no_block(training, evaluation)
        linear = isinstance(training, NoReluAfterSum) and isinstance(evaluation, NoReluAfterSum)
    rewritten = [rewrite(traced.graph, module) for traced in (traces if traces[0] is not traces[1] else traces[:1])]
    recognition = _sequence(module, traces[0].arity, inputs, rewritten[0], rewritten[-1])
    if recognition is None and any(map(_calls_norm, flows)):
        return Recognition(reason="its forward calls batch norm as a function, which is not fused")
    if recognition is None or recognition.plan is None:
        return Recognition(reason=reason) if reason and any(joins(flow, direct=True) for flow in flows) else recognition
    # Only where something of a block is left over is it worth a word that it is none; a network of many is none anyway.
    sums = max(sum(op.kind == "add" for op in flow.ops) for flow in flows)
    done = all(r.complete or (r.sums == 0 and (linear or sums > 1)) for r in rewritten)
    if reason is None or not sums or done:
        return recognition
    return replace(recognition, skipped=(("", f"unit by unit, not as one block: {reason}"), *recognition.skipped))


def _match_block(flow: Flow) -> BlockPlan | Mismatch:
    try:
        return match_block(flow)
    except Mismatch as error:
        return error


def _why_no_block(training: BlockPlan | Mismatch, evaluation: BlockPlan | Mismatch) -> str:
    if isinstance(training, BlockPlan) and isinstance(evaluation, BlockPlan):
        return "training and evaluation compute different blocks"
    if str(training) == str(evaluation):
        return str(training)
    found = {"in training": training, "in evaluation": evaluation}
    return ", ".join(f"{mode} {error}" for mode, error in found.items() if isinstance(error, Mismatch))


def _calls_norm(flow: Flow) -> bool:
    return any(op.kind == "other" and op.function in (F.batch_norm, torch.batch_norm) for op in flow.ops)


def _traces(module: nn.Module, inputs: Inputs) -> list[Traced]:
    """The forward in training and in evaluation, one and the same where it does not ask."""
    training = trace(module, True, inputs)
    return [training, trace(module, False, inputs) if "training" in training.reads else training]


def _sequence(
    module: nn.Module, arity: int, inputs: Inputs, training: Rewritten, evaluation: Rewritten
) -> Recognition | None:
    if training.units != evaluation.units:
        return Recognition(reason="training and evaluation run different convolutions, batch norms or sums")
    skipped = tuple(dict.fromkeys([*training.skipped, *evaluation.skipped]))
    if not training.units:
        return Recognition(skipped=skipped) if skipped else None
    forwards = []
    for mode, rewritten in ((True, training), (False, evaluation)):
        forwards.append(Forward(mode, inputs, arity, *generate(rewritten.graph, type(module).__name__)))
    if forwards[0].source == forwards[1].source:
        forwards = [replace(forwards[0], training=None)]
    bypassed = tuple(dict.fromkeys([*training.bypassed, *evaluation.bypassed]))
    return Recognition(SequencePlan(tuple(training.units), tuple(forwards), bypassed), skipped=skipped)


def generate(graph: fx.Graph, name: str) -> tuple[str, Callable[..., Any]]:
    """The graph's source, and that source as a function of (owner, *inputs)."""
    code = graph.python_code("self")
    filename = f"<resnet_fused {name} {zlib.crc32(code.src.encode()):08x}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)  # for tracebacks
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)  # noqa: S102 - how torch.fx runs a graph, too
    return code.src.strip(), namespace["forward"]
