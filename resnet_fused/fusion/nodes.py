"""What one node of a traced graph, or one module, is in the terms of a ResNet: activation, sum, identity, pool."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from resnet_fused.fusion.questions import is_number
from resnet_fused.fusion.trace import original_class
from resnet_fused.nn.eligibility import POOLS, keeps_methods, overridden
from resnet_fused.ops.activations import ACTIVATIONS

ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
ADD_METHODS = ("add", "add_", "__add__", "__radd__", "__iadd__")
IN_PLACE_ADDS = (operator.iadd, Tensor.add_, Tensor.__iadd__)
MUL_FUNCTIONS = (operator.mul, operator.imul, torch.mul)
MUL_METHODS = ("mul", "mul_", "__mul__", "__rmul__", "__imul__")


def called_activation(node: fx.Node) -> str | None:
    """The name of the activation that the node is as a function or a method, or None."""
    if len(node.all_input_nodes) != 1:
        return None
    for name, act in ACTIVATIONS.items():
        if node.op == "call_function" and node.target in (act.function, *act.functions):
            return name
        if node.op == "call_method" and node.target in act.methods:
            return name
    return None


def activation(node: fx.Node, owner: nn.Module) -> str | None:
    """The name of the activation that the node is of its only argument, or None."""
    if node.op != "call_module":
        return called_activation(node)
    if len(node.args) != 1 or node.kwargs:
        return None
    return module_activation(owner.get_submodule(str(node.target)))


def module_activation(module: nn.Module) -> str | None:
    """The name of the activation that a module is, or None."""
    cls = original_class(module)
    return next((name for name, act in ACTIVATIONS.items() if keeps_methods(cls, act.module)), None)


def is_sum(node: fx.Node) -> bool:
    """Whether the node is the sum of two activations, and nothing more."""
    if node.op == "call_function":
        known = node.target in ADD_FUNCTIONS
    else:
        known = node.op == "call_method" and node.target in ADD_METHODS
    return known and not node.kwargs and len(node.args) == 2 and all(map(is_activation, node.args))


def sum_function(node: fx.Node) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of two arguments that a sum calls."""
    function: Callable[[Tensor, Tensor], Tensor]
    function = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target  # type: ignore[assignment]
    return function


def factor(node: fx.Node) -> Any:
    """The number that the node multiplies by, or None."""
    if (node.op == "call_function" and node.target in MUL_FUNCTIONS) or (
        node.op == "call_method" and node.target in MUL_METHODS
    ):
        return next((a for a in node.args if isinstance(a, (int, float))), None)
    return None


def is_activation(node: object) -> bool:
    """Whether a value may be an activation: no number, no parameter."""
    return isinstance(node, fx.Node) and node.op != "get_attr" and not is_number(node)


def function_name(node: fx.Node) -> str:
    """How a sentence refers to a node that calls no module."""
    if node.op == "call_method":
        return f"`.{node.target}()`"
    return f"`{getattr(node.target, '__name__', node.target)}`"


def is_identity(module: nn.Module) -> bool:
    return original_class(module) is nn.Identity and _runs(module, nn.Identity)


def is_sequential(module: nn.Module) -> bool:
    """Whether calling the module is calling its children one after the other."""
    return _runs(module, nn.Sequential)


def is_holder(module: nn.Module) -> bool:
    """Whether the module only holds others, which somebody else calls, as those of a `torch.fx.GraphModule` do."""
    return type(module) is nn.Module


def is_pool(module: nn.Module) -> bool:
    """Whether the module is one of PyTorch's pools or paddings: it draws no numbers and leaves its input as it is."""
    cls = original_class(module)
    return cls in POOLS and _runs(module, cls)


def _runs(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling the module, fused or not, runs what PyTorch wrote for `cls`."""
    return keeps_methods(original_class(module), cls) and not overridden(module)
