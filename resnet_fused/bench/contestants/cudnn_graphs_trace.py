"""What `cudnn-graphs` sees of a model: its torch.fx graph, and which nodes of it belong to one convolution."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fused._command import one_line
from resnet_fused.measure.cases import Unavailable

_ADDS = (operator.add, torch.add, "add")
_RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)


def trace(model: nn.Module) -> fx.GraphModule:
    """The model's graph, without what does nothing and would stand between the links of a chain.

    Raises:
        Unavailable: torch.fx cannot trace it.
    """
    try:
        network = fx.symbolic_trace(model)
    except Exception as error:  # control flow on values, say
        raise Unavailable(f"torch.fx cannot trace this model: {one_line(error, kind=True)}") from None
    for node in list(network.graph.nodes):
        if node.op == "call_module" and node.args:
            module = network.get_submodule(str(node.target))
            if isinstance(module, _NOTHING) and (isinstance(module, nn.Identity) or not module.training):
                node.replace_all_uses_with(node.args[0])
                network.graph.erase_node(node)
    network.recompile()
    return network


class Chains:
    """Questions about a traced network whose nodes know their shapes (`ShapeProp`)."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.order = {node: position for position, node in enumerate(network.graph.nodes)}

    def module(self, node: fx.Node) -> nn.Module:
        return self.network.get_submodule(str(node.target))

    def is_conv(self, node: fx.Node) -> bool:
        return node.op == "call_module" and type(self.module(node)) is nn.Conv2d

    def refusal(self, node: fx.Node) -> str | None:
        """Why a convolution has no graph of cuDNN's, whatever its shape."""
        conv = self.module(node)
        assert isinstance(conv, nn.Conv2d)
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            return f"{node.target} pads by {conv.padding!r}, {conv.padding_mode}"
        return None

    def added(self, add: fx.Node, conv: fx.Node) -> fx.Node | None:
        """The other summand, where `add` is a sum of the convolution and a tensor like it that can wait until then."""
        if add.op not in ("call_function", "call_method") or add.target not in _ADDS or add.kwargs:
            return None
        first, second = add.args
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
            return None
        other = second if first is conv else first
        metas = [node.meta.get("tensor_meta") for node in (conv, other)]
        if not all(hasattr(meta, "shape") for meta in metas) or metas[0].shape != metas[1].shape:  # type: ignore[union-attr]
            return None
        if metas[0].dtype != metas[1].dtype or self.written(conv.args[0], conv, add):  # type: ignore[union-attr]
            return None
        return other

    def written(self, value: Any, since: fx.Node, until: fx.Node) -> bool:
        """Whether a node between those two writes into `value`: the convolution could not wait."""
        span = range(self.order[since] + 1, self.order[until])
        return any(self.order[user] in span and self.in_place(user) for user in value.users)

    def in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        name = str(getattr(node.target, "__name__", node.target))
        if getattr(node.target, "__module__", None) == "_operator" and name.startswith("i"):
            return True  # iadd and its like
        return name.endswith("_") or bool(node.kwargs.get("inplace"))

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.module(node)) is nn.ReLU
        return node.op in ("call_function", "call_method") and node.target in _RELUS


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def own_up(done: int, problems: list[str]) -> None:
    """Warn of convolutions that were left to PyTorch.

    Raises:
        Unavailable: all were.
    """
    if not done:
        raise Unavailable(next(iter(problems), "the model has no convolution that it could run"))
    if problems:
        counted = f"{len(problems)} of {done + len(problems)} convolutions run through PyTorch"
        warnings.warn(f"cudnn-graphs: {counted}: {problems[0]}", stacklevel=4)
