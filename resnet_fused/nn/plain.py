"""Whether calling a module is running the forward of a PyTorch class on plain tensors, and nothing more."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

_METHODS = ("forward", "_conv_forward", "__call__", "__getattr__", "__getattribute__")


def computes_as(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether the module's class is `cls`, or a subclass of it that leaves its computation alone."""
    own = type(module)
    if own is cls:
        return True
    if not issubclass(own, cls) or any(getattr(own, name, None) is not getattr(cls, name, None) for name in _METHODS):
        return False
    return not any(isinstance(getattr(own, name, None), property) for name in ("weight", "bias"))  # parametrizations


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


def watched(module: nn.Module, name: str, in_forward: bool = True) -> str | None:
    """Why calling a module (a `name`, in the message) is more than its class's forward on plain tensors, or None.

    Args:
        in_forward: it is about to run. Before that, FSDP may still have to gather its parameters.
    """
    if "forward" in module.__dict__:
        return f"the forward of a {name} was replaced"
    if hooked(module):
        return f"a {name} has hooks"
    gathers = not in_forward and getattr(module, "_is_fsdp_managed_module", False)
    for parameter in () if gathers else module._parameters.values():
        if parameter is not None and type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
            return f"the parameters of a {name} are not plain tensors"
    return None
