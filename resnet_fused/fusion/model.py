"""`fuse`, `unfuse` and `report`: what is done to, and known of, a whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from resnet_fused.fusion import swap
from resnet_fused.fusion.norms import other_norm
from resnet_fused.fusion.plans import BlockPlan, Plan
from resnet_fused.fusion.recognise import Recognition, own, recognise
from resnet_fused.fusion.report import FusionReport
from resnet_fused.fusion.trace import original_class

M = TypeVar("M", bound=nn.Module)


def fuse(model: M) -> M:
    """Run conv + batch norm (+ residual) (+ ReLU) of a model as fused operations: `y = relu(bn(conv(x)) + residual)`.

    In place and idempotent. Parameters, buffers, names, state_dict and hooks stay as they are; the model trains and
    evaluates as before. What cannot be fused keeps its own forward (see `report`). A change of a fused module - an
    attribute set, a child replaced, another method put into its class or into PyTorch's - is noticed, and what it
    computes is recognised anew on its next call.

    A fused module has a subclass of its original class, under the same name. `isinstance` holds; code that compares
    exact classes (`type(m) is BasicBlock`, as `fuse_model(is_qat=True)` of torchvision's quantizable models does)
    passes it over: run it before `fuse`, or after `unfuse`. Copies are fused; pickles, and so `torch.save(model)`, hold
    the plain model.

    A `torch.fx.GraphModule` is fused, too. What is traced from a fused model, such as torchvision's feature extractors,
    is a plain one, to be fused by itself.

    Args:
        model: any module, with or without fused parts.

    Returns:
        The same object.

    Mutates:
        The classes of modules in `model`; `unfuse` restores them.

    Raises:
        TypeError: if `model` is not an `nn.Module`.
    """
    _check_module("fuse", model)
    for _, module, recognition in _survey(model):
        if recognition is not None and recognition.plan is not None:
            with contextlib.suppress(TypeError):  # a class that cannot be subclassed or exchanged; `report` says so
                swap.swap_in(module, recognition)
        elif swap.is_fused(module):
            with contextlib.suppress(RuntimeError):  # its class is not ours any more; its forward is the plain one
                swap.swap_out(module)
    return model


def unfuse(model: M) -> M:
    """Give every fused module in `model` exactly its original class back, in place, for export or scripting.

    Args:
        model: any module, with or without fused parts.

    Returns:
        The same object.

    Raises:
        TypeError: if `model` is not an `nn.Module`.
        RuntimeError: if something else (FSDP, a parametrization) changed the class of a fused module afterwards.
    """
    _check_module("unfuse", model)
    for module in model.modules():
        if swap.is_fused(module):
            swap.swap_out(module)
    return model


def report(model: nn.Module) -> FusionReport:
    """What of `model` is fused, what is not, and why.

    Args:
        model: any module; of one that is not fused, it says what `fuse` would do.

    Raises:
        TypeError: if `model` is not an `nn.Module`.
    """
    _check_module("report", model)
    result, told = FusionReport(), set[nn.Module]()
    for name, module, recognition in _survey(model):
        if swap.is_fused(module):
            swap.bind(module, recognition)  # so that what is said here is what the next forward does
        result.skipped.extend(_not_fused(name, module, told))
        if recognition is None:
            continue
        result.skipped.extend((".".join(filter(None, (name, path))), why) for path, why in recognition.skipped)
        if recognition.native is not None:
            result.fused.append((name, f"resnet_fused.nn.{recognition.native}"))
        elif recognition.reason is not None:
            result.skipped.append((name, recognition.reason))
        elif recognition.plan is not None and swap.is_fused(module):
            result.fused.append((name, str(recognition.plan)))
        elif recognition.plan is not None:
            result.skipped.append((name, _why_not_fused(module, recognition)))
    if not result.fused and not result.skipped:
        result.skipped.append(("", "none of its modules runs an nn.BatchNorm2d itself"))
    return result


def _not_fused(name: str, module: nn.Module, told: set[nn.Module]) -> Iterator[tuple[str, str]]:
    """What is not looked into, or not fused whatever stands around it, and was not `told` of before."""
    if isinstance(module, torch.jit.ScriptModule) and module not in told:
        told.update(module.modules())
        yield name, "its forward is TorchScript's, which is not looked into"
    below = list(own(module))
    if isinstance(module, _ConvNd) or any(isinstance(child, _ConvNd) for _, child in below):
        for path, child in below:
            kind = other_norm(child)
            if kind is not None and child not in told:
                told.add(child)
                yield ".".join(filter(None, (name, path))), f"its norm is {kind}, which is not fused"


def plan_of(module: nn.Module) -> Plan | None:
    """The plan that a fused module's next forward runs; None where it runs its original forward."""
    if not swap.is_fused(module):
        return None
    binding = swap.current(module)
    return binding.plan if binding is not None else None


def _survey(model: nn.Module) -> Iterator[tuple[str, nn.Module, Recognition | None]]:
    """Every module that is not part of a block, with what is recognised in it."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        recognition = recognise(module)
        if recognition is not None and recognition.native is not None:
            inside.update(map(id, module.modules()))
        elif recognition is not None and recognition.plan is not None:
            for child in map(module.get_submodule, recognition.plan.bypassed):
                inside.update(map(id, child.modules() if isinstance(recognition.plan, BlockPlan) else [child]))
            for unit in recognition.plan.all_units:
                if unit.conv and unit.bn.startswith(f"{unit.conv}."):  # its own forward calls the norm
                    inside.add(id(module.get_submodule(unit.conv)))
        yield name, module, recognition


def _why_not_fused(module: nn.Module, recognition: Recognition) -> str:
    try:  # what `fuse` does, on an empty module
        object.__new__(original_class(module)).__class__ = swap.fused_class(original_class(module))  # type: ignore
    except TypeError as error:
        return f"its class cannot be exchanged: {error}"
    return f"not fused; fuse(model) would run {recognition.plan}"


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}(): argument 'model' (position 1) must be torch.nn.Module, not {type(model).__name__}"
        )
