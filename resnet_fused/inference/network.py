"""Every fused module of a network replaced by a frozen one, and the network planned as a whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from resnet_fused import dispatch
from resnet_fused.fusion.model import fuse, report
from resnet_fused.fusion.plans import BlockPlan, SequencePlan
from resnet_fused.fusion.recognise import is_native, recognise
from resnet_fused.fusion.swap import Binding, current, is_fused, swap_in
from resnet_fused.inference.block import FrozenBlock, FrozenSequence, FrozenStage
from resnet_fused.inference.conv import EpilogueConv, Example, FrozenConv, Source, freeze_conv
from resnet_fused.inference.linear import freeze_linears
from resnet_fused.inference.plan import FreezePlan, PlannedConv
from resnet_fused.inference.pool import freeze_pools
from resnet_fused.inference.tail import Join
from resnet_fused.nn import call
from resnet_fused.nn.eligibility import untouched
from resnet_fused.nn.norms import module_of

Seen = dict[tuple[nn.Module, int], Example | str]  # a str: why the unit is to be left to the model


def prepare(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """A fused copy in which the modules of `resnet_fused.nn` have plans too; why other modules have none, by name."""
    network = fuse(copy.deepcopy(model).eval())  # a copy of a torchvision feature extractor starts in training mode
    reasons = dict(report(network).skipped)
    for name, module in list(network.named_modules()):
        recognition = recognise(module, into_native=True) if is_native(module) else None
        if recognition is None:
            continue
        reasons.update({".".join(filter(None, (name, path))): why for path, why in recognition.skipped})
        if recognition.plan is not None:
            swap_in(module, recognition)
        elif recognition.reason is not None:
            reasons[name] = recognition.reason
    return network, reasons


def observe(network: nn.Module, example: Tensor) -> Seen:
    """Run the example; what the units that ran read and wrote, as (fused module, number)."""
    seen: Seen = {}
    fused = [module for module in network.modules() if is_fused(module)]

    def observed(module: Any) -> Callable[..., Tensor]:
        def run_unit(k: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
            result: Tensor = type(module)._run_unit(module, k, x, residual)
            example = Example.of(x, result, residual)
            seen[module, k] = example.problem(seen.get((module, k))) or example
            return result

        return run_unit

    for module in fused:
        module.__dict__["_run_unit"] = observed(module)
    try:
        with dispatch.use_backend("auto"):  # a forced backend may refuse; what is planned then is another
            network(example)
    finally:
        for module in fused:
            del module.__dict__["_run_unit"]
    return seen


def freeze_network(
    network: nn.Module, reasons: dict[str, str], seen: Seen
) -> tuple[nn.Module, FreezePlan, dict[str, Source]]:
    """The network with a frozen module in place of each fused one whose plan ran, how each convolution runs, and what
    each frozen one was made from, by name.
    """
    names: dict[nn.Module, str] = {
        module: name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)
    }
    freezer = _Freezer(names, seen, reasons)
    network = freezer.replace(network)
    freezer.plan_tails(network)
    freeze_pools(network)
    freeze_linears(network)
    planned: dict[str, PlannedConv] = {}
    for module in network.modules():
        if isinstance(module, FrozenConv):
            planned[module.layer] = module.planned
        elif isinstance(module, Join):
            planned.update((row.layer, row) for row in module.planned)
    layers = [planned.get(name) or PlannedConv(name, "-", "-", "", freezer.why(name)) for name in names.values()]
    return network, FreezePlan(tuple(layers)), freezer.sources


class _Freezer:
    """Makes the frozen modules.

    Attributes:
        names: of the convolutions.
        seen: the example's run.
        reasons: why a convolution, or a module with convolutions, is left alone, by name.
        sources: what each frozen convolution is made from, by name.
    """

    def __init__(self, names: dict[nn.Module, str], seen: Seen, reasons: dict[str, str]) -> None:
        self.names, self.seen, self.reasons = names, seen, reasons
        self.sources: dict[str, Source] = {}

    def replace(self, network: nn.Module) -> nn.Module:
        made: dict[nn.Module, nn.Module] = {}
        # Children before parents: a frozen parent adopts frozen children.
        for name, module in reversed(list(network.named_modules(remove_duplicate=False))):
            if not is_fused(module):
                continue
            if module not in made:
                made[module] = self.version(module)
            parent, _, child = name.rpartition(".")
            if name:
                setattr(network.get_submodule(parent), child, made[module])
            else:
                network = made[module]
        return network

    def version(self, module: nn.Module) -> nn.Module:
        """The frozen version of a fused module; itself where nothing of it can be frozen."""
        binding = current(module)
        if binding is None or binding.plan is None:
            return module
        if False in binding.full:
            self.reasons.update(
                {
                    self.names[module_of(conv)]: "its module treats empty inputs in a way of its own"
                    for conv, *_ in binding.units
                    if conv is not None
                }
            )
            return module
        units_seen = [(module, k) in self.seen for k in range(len(binding.units))]
        hooked = _hooked(module) or not binding.unobserved()
        problems = [
            "it is in a module with hooks" if hooked else self.problem(module, k, binding)
            for k in range(len(binding.units))
        ]
        if isinstance(binding.plan, BlockPlan) and any(problems):
            culprit = next(filter(None, problems))
            problems = [problem or f"its block stays whole: {culprit}" for problem in problems]
        frozen: dict[int, FrozenConv] = {}
        for k, ((conv, bn, _, activation), problem) in enumerate(zip(binding.units, problems, strict=True)):
            if problem is None:
                add = binding.plan.all_units[k].add
                unit = (self.names[module_of(conv)], conv, bn, activation, add, self.seen[module, k])  # type: ignore[arg-type]
                source = self.sources[unit[0]] = Source(*unit)  # type: ignore[arg-type]
                frozen[k] = freeze_conv(source)
            elif conv is not None:
                self.reasons[self.names[module_of(conv)]] = problem
        if hooked or not any(units_seen):
            return module
        if isinstance(binding.plan, SequencePlan):
            return FrozenSequence(module, binding.plan, frozen, binding.units)
        if not frozen:
            return module
        convs = list(frozen.values())
        branch = len(binding.plan.units)
        shortcut = convs[branch] if binding.plan.shortcut is not None else None
        return FrozenBlock(convs[:branch], shortcut, binding.shortcut_pools)

    def problem(self, module: nn.Module, k: int, binding: Binding) -> str | None:
        """Why a unit cannot be frozen, or None."""
        conv, bn, act, activation = binding.units[k]
        example = self.seen.get((module, k), "the example did not run it as a unit")
        reason = example if isinstance(example, str) else call.plain(conv, bn, act, activation)
        if reason is not None:
            return reason
        if conv is None:
            return "no convolution"
        if bn.running_mean is None:
            return "its batch norm has no running statistics"
        return None

    def why(self, name: str) -> str:
        """Why a convolution was left alone: what was said of it, or of the nearest module around it."""
        around = name
        while around not in self.reasons and around:
            around = around.rpartition(".")[0]
        return self.reasons.get(around, "it is not followed by a batch norm that could be recognised")

    def plan_tails(self, network: nn.Module) -> None:
        """Let the blocks of each plain Sequential hand on memory and activations, and plan every block's tail."""
        following: dict[nn.Module, FrozenBlock] = {}
        for module in network.modules():
            frozen = any(isinstance(child, FrozenBlock) for child in module.children())
            if type(module) is nn.Sequential and frozen and untouched(module, nn.Sequential):
                module.__class__ = FrozenStage
                following.update((a, b) for a, b in pairwise(module) if isinstance(b, FrozenBlock))
        for module in list(network.modules()):
            if isinstance(module, FrozenBlock):
                module.plan_tail(following.get(module), self.remake)

    def remake(self, conv: FrozenConv, backend: str) -> EpilogueConv:
        """The convolution on a backend, which need not run it alone."""
        if isinstance(conv, EpilogueConv) and conv.backend == backend:
            return conv
        return EpilogueConv(self.sources[conv.layer], backend)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
