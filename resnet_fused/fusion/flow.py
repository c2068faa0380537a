"""The dataflow of a traced forward in the terms of a ResNet: convolutions, batch norms, ReLUs, sums.

`nn.Identity` vanishes, `nn.Sequential` is opened, and `F.relu`, `torch.relu`, `Tensor.relu_` and `nn.ReLU` are one
operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx, nn

from resnet_fused.fusion.convs import ConvForm, conv_form
from resnet_fused.fusion.nodes import (
    activation,
    factor,
    function_name,
    is_identity,
    is_pool,
    is_sequential,
    is_sum,
    module_activation,
    sum_function,
)
from resnet_fused.fusion.norms import NormForm, norm_form
from resnet_fused.fusion.questions import is_number
from resnet_fused.fusion.trace import original_class

Kind = Literal["input", "conv", "bn", "relu", "add", "pool", "other"]


@dataclass(eq=False)
class Op:
    """One operation: what it is, the activations that it reads, the module that it calls (if any)."""

    kind: Kind
    inputs: list[Op]
    label: str
    path: str | None = None
    module: nn.Module | None = None
    direct: bool = True  # called by the traced forward itself, not by an nn.Sequential in it
    function: Any = None  # that is called, where it is no module
    constant: Any = None  # the factor of a multiplication with a number
    users: list[Op] = field(default_factory=list)

    @property
    def name(self) -> str:
        """How a sentence refers to it."""
        if self.kind == "input":
            return "the input"
        if self.kind == "add":
            return "the sum"
        return f"`{self.path}`" if self.path is not None else self.label


@dataclass
class Flow:
    """All operations of a forward in order, what it returns, and the modules that were seen through."""

    ops: list[Op]
    output: Op | None  # None where the forward returns anything but one activation
    bypassed: tuple[str, ...]

    def calls(self) -> Counter[int]:
        """How often each module is called."""
        return Counter(id(op.module) for op in self.ops if op.module is not None)


def flow_of(graph: fx.Graph, owner: nn.Module) -> Flow:
    """The dataflow of a graph traced from `owner`."""
    return _Builder(owner).build(graph)


class _Builder:
    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.ops: list[Op] = []
        self.bypassed: list[str] = []
        self.value: dict[fx.Node, Op | None] = {}  # None: not an activation (a parameter, a size, ...)

    def build(self, graph: fx.Graph) -> Flow:
        output: Op | None = None
        for node in graph.nodes:
            if node.op == "output":
                result = node.args[0]
                output = self.value[result] if isinstance(result, fx.Node) else None
                if output is None:  # a tuple, a dict, ...: all of it is used
                    self.add("other", "the output", self.activations(node))
            elif (
                node.op == "call_module"
                and len(node.args) == 1
                and not node.kwargs
                and isinstance(node.args[0], fx.Node)
            ):
                module = self.owner.get_submodule(node.target)
                self.value[node] = self.call(str(node.target), module, self.value[node.args[0]], direct=True)
            else:
                self.value[node] = self.plain(node)
        return Flow(self.ops, output, tuple(dict.fromkeys(self.bypassed)))

    def add(self, kind: Kind, label: str, inputs: list[Op], **more: Any) -> Op:
        op = Op(kind, inputs, label, **more)
        for x in inputs:
            x.users.append(op)
        self.ops.append(op)
        return op

    def activations(self, node: fx.Node) -> list[Op]:
        return self.activations_in(node.all_input_nodes)

    def activations_in(self, values: Iterable[Any]) -> list[Op]:
        return [op for op in map(self.value.get, values) if op is not None]

    def call(self, path: str, module: nn.Module, x: Op | None, direct: bool) -> Op:
        if x is None:
            return self.add("other", f"`{path}`", [], path=path, module=module, direct=direct)
        if is_identity(module) or is_sequential(module):
            self.bypassed.append(path)
            for name, child in module._modules.items():
                if child is not None:
                    x = self.call(f"{path}.{name}", child, x, direct=False)
            return x
        kind: Kind = "other"
        form = conv_form(module) or norm_form(module)
        if isinstance(module, nn.Conv2d):
            kind = "conv"
        elif form is not None:
            kind = "bn"
        elif module_activation(module) == "relu":
            kind = "relu"
        elif is_pool(module):
            kind = "pool"
        label = f"`{path}` ({original_class(module).__name__})"
        op = self.add(kind, label, [x], path=path, module=module, direct=direct)
        for called in form.tail if isinstance(form, (ConvForm, NormForm)) else ():
            if called is None:
                op = self.add("relu", "relu", [op], direct=direct)
            else:
                op = self.call(f"{path}.{called}", module.get_submodule(called), op, direct)
        return op

    def plain(self, node: fx.Node) -> Op | None:
        """Anything but the call of a module with one argument."""
        if node.op == "placeholder":
            return self.add("input", f"the input `{node.name}`", [])
        if node.op == "get_attr" or is_number(node):
            return None
        inputs = self.activations(node)
        label = f"`{node.target}`" if node.op == "call_module" else function_name(node)
        if activation(node, self.owner) == "relu":
            return self.add("relu", "relu", inputs)
        if is_sum(node):
            return self.add("add", "the sum", self.activations_in(node.args), function=sum_function(node))
        constant = factor(node) if len(inputs) == 1 else None
        module = self.owner.get_submodule(str(node.target)) if node.op == "call_module" else None
        function = node.target if node.op == "call_function" else None
        return self.add("other", label, inputs, module=module, function=function, constant=constant)


def ancestors(ops: list[Op]) -> Iterator[Op]:
    """All operations that `ops` depend on, themselves included, each once."""
    seen: set[int] = set()
    stack = list(ops)
    while stack:
        op = stack.pop()
        if id(op) not in seen:
            seen.add(id(op))
            yield op
            stack.extend(op.inputs)
