"""Whether calling a module is running the forward of a PyTorch class on plain tensors, and nothing more."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules import padding, pooling

from resnet_fused.ops.activations import ACTIVATIONS

POOLS: tuple[type[nn.Module], ...] = tuple(
    value
    for module in (pooling, padding)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
)
_ACTIVATIONS = tuple(act.module for act in ACTIVATIONS.values())
_HEADS = (nn.Linear, nn.Dropout, nn.Flatten)
_CLASSES = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, *_ACTIVATIONS, nn.Identity, nn.Sequential, *POOLS, *_HEADS)
_METHODS = ("__call__", "forward", "_conv_forward")
_ACCESS = ("__getattr__", "__getattribute__")


def home(function: object) -> str:
    """The name of the module in which a function was written, whatever it wraps."""
    name: str = getattr(function, "__globals__", {}).get("__name__", "")
    return name


def _as_written(cls: type[nn.Module]) -> tuple[tuple[str, Any], ...]:
    """The methods that make up a call, None for one that was replaced before it could be seen."""
    methods = ((name, getattr(cls, name)) for name in _METHODS if hasattr(cls, name))
    return tuple((name, method if home(method).startswith("torch.nn.modules.") else None) for name, method in methods)


# What the kernels stand in for is what PyTorch wrote. Whoever replaces a method of a class wants that to be run.
_WRITTEN = {cls: _as_written(cls) for cls in _CLASSES}
_WRITTEN_CALL = dict(_WRITTEN[nn.Identity])["__call__"]


def keeps_methods(own: type[nn.Module], cls: type[nn.Module]) -> bool:
    """Whether calling a module of class `own` still runs what PyTorch wrote for `cls`: itself, or a base of it."""
    for name, method in _WRITTEN[cls]:
        if getattr(own, name, None) is not method:
            return False
    return own is cls or (issubclass(own, cls) and _keeps_attributes(own))


def calls_forward(cls: type[nn.Module]) -> bool:
    """Whether calling a module of this class is running its hooks and its forward, and nothing more."""
    return cls.__call__ is _WRITTEN_CALL


def _keeps_attributes(own: type[nn.Module]) -> bool:
    """Whether the modules of a class have their attributes where PyTorch puts them; parametrizations do not."""
    if any(getattr(own, name) is not getattr(nn.Module, name) for name in _ACCESS):
        return False
    return not any(isinstance(getattr(own, name, None), property) for name in ("weight", "bias"))


def computes_as(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether the module's class is `cls`, or a subclass of it that leaves its computation alone."""
    return keeps_methods(type(module), cls)


def not_plain(module: nn.Module, cls: type[nn.Module]) -> str | None:
    """Why the module does not compute as `cls`, or None if it does."""
    own = type(module)
    if keeps_methods(own, cls):
        return None
    if own is cls:
        return f"a method of nn.{cls.__name__} was replaced"
    return f"{own.__name__} is not a plain {cls.__name__}"


def overridden(module: nn.Module) -> bool:
    """Whether the module has a forward of its own, which its class has not."""
    attributes = module.__dict__
    return "forward" in attributes or "_conv_forward" in attributes


def hooked(module: nn.Module) -> bool:
    """Whether anybody watches the module's calls."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def untouched(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether nobody could tell a call of the module from `cls` as PyTorch wrote it."""
    return computes_as(module, cls) and not overridden(module) and not hooked(module)


def watched(module: nn.Module, name: str, in_forward: bool = True) -> str | None:
    """Why calling a module (a `name`, in the message) is more than its class's forward on plain tensors, or None.

    Args:
        in_forward: it is about to run. Before that, FSDP may still have to gather its parameters.
    """
    if overridden(module):
        return f"the forward of a {name} was replaced"
    if hooked(module):
        return f"a {name} has hooks"
    gathers = not in_forward and getattr(module, "_is_fsdp_managed_module", False)
    for parameter in () if gathers else module._parameters.values():
        if parameter is not None and type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
            return f"the parameters of a {name} are not plain tensors"
    return None
