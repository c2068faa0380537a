"""A whole network whose convolutions are cuDNN's fused graphs: the contestant `cudnn-graphs`.

Traced by torch.fx, its batch norms folded by PyTorch's own pass, in fp32; then every convolution takes the bias, the
add and the ReLU behind it into one graph. What is left - pooling, the classifier, a convolution for which cuDNN has no
engine - is PyTorch's. On a GPU all of it is one CUDA graph, captured as `freeze` captures its networks.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse as fold_batch_norms
from torch.fx.passes.shape_prop import ShapeProp

from resnet_fused.fusion.frozen.graph import capture

from .cases import Case, Unavailable
from .cudnn_graphs import Convolution, Graph, Library, Spec, graph_of, library

_ADDS = (operator.add, torch.add, "add")
_RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode


def cudnn_graphs(model: nn.Module, example: Tensor, case: Case) -> Callable[[Tensor], Tensor]:
    """The contestant; inference only.

    Raises:
        Unavailable: the package or a GPU is missing, the model cannot be traced, or cuDNN has no engine for any layer.
    """
    found = library(example.device)
    with torch.inference_mode():
        network = build(model, example, found)
        try:
            run = capture(network, example)
        except RuntimeError as error:
            warnings.warn(f"cudnn-graphs: no CUDA graph, the network runs kernel by kernel: {error}", stacklevel=2)
            run = network

    def checked(x: Tensor) -> Tensor:
        if x.shape != example.shape:
            raise ValueError(f"built for inputs of {tuple(example.shape)}, got {tuple(x.shape)}")
        result: Tensor = run(x)
        return result

    return checked


def build(model: nn.Module, example: Tensor, library: Library) -> fx.GraphModule:
    """The network, for inputs like `example`; where cuDNN has no engine it runs PyTorch's convolution, and says so.

    Raises:
        Unavailable: the model cannot be traced, or not one of its convolutions has an engine.
    """
    try:
        network = fx.symbolic_trace(copy.deepcopy(model).eval().float())
    except Exception as error:  # control flow on values, say
        raise Unavailable(f"torch.fx cannot trace this model: {str(error).splitlines()[0]}") from None
    _drop_identities(network)
    network = cast(fx.GraphModule, fold_batch_norms(network, inplace=True, no_trace=True))
    network.to(example.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ShapeProp(network).propagate(example)
    builder = _Builder(network, library)
    for node in list(network.graph.nodes):
        if builder.is_conv(node):
            builder.replace(node)
    if not builder.convolutions:
        raise Unavailable(next(iter(builder.problems), "the model has no convolution that it could run"))
    if builder.problems:
        total = len(builder.convolutions) + len(builder.problems)
        warnings.warn(
            f"cudnn-graphs: {len(builder.problems)} of {total} convolutions run through PyTorch: {builder.problems[0]}",
            stacklevel=2,
        )
    shared = max((convolution.workspace for convolution in builder.convolutions), key=Tensor.numel)
    for convolution in builder.convolutions:  # one runs after the other
        convolution.workspace = shared
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _drop_identities(network: fx.GraphModule) -> None:
    """What networks leave where they could have regularised; it would stand between the links of a chain."""
    for node in list(network.graph.nodes):
        if node.op == "call_module" and node.args and isinstance(network.get_submodule(str(node.target)), _NOTHING):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
    network.recompile()


class _Layer(nn.Module):
    """A convolution where torch.fx can call it; its weights are constants, of no state_dict."""

    def __init__(self, convolution: Convolution) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.convolution(x, residual)


class _Builder:
    """Puts graphs of cuDNN's in place of chains conv(-add)(-relu).

    Attributes:
        convolutions: those in place.
        problems: why others are left to PyTorch, one each.
    """

    def __init__(self, network: fx.GraphModule, library: Library) -> None:
        self.network, self.library = network, library
        self.convolutions: list[Convolution] = []
        self.problems: list[str] = []
        self._graphs: dict[Spec, Graph | Unavailable] = {}  # equal layers share the timing
        self._order = {node: position for position, node in enumerate(network.graph.nodes)}

    def is_conv(self, node: fx.Node) -> bool:
        return node.op == "call_module" and type(self.module(node)) is nn.Conv2d

    def module(self, node: fx.Node) -> nn.Module:
        return self.network.get_submodule(str(node.target))

    def replace(self, node: fx.Node) -> None:
        conv = self.module(node)
        assert isinstance(conv, nn.Conv2d)
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            self.problems.append(f"{node.target} pads by {conv.padding!r}, {conv.padding_mode}")
            return
        chain, residual, relu = self.chain(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        shapes = (tuple(source.meta["tensor_meta"].shape), tuple(conv.weight.shape))
        geometry = (conv.stride, conv.padding, conv.dilation, conv.weight.dtype)
        spec = Spec(*shapes, *geometry, relu, residual is not None)  # type: ignore[arg-type]
        graph = self.graph(spec)
        if isinstance(graph, Unavailable):
            self.problems.append(str(graph))
            return
        self.convolutions.append(Convolution(graph, spec, conv.weight, conv.bias))
        name = f"cudnn_{len(self.convolutions)}"
        self.network.add_submodule(name, _Layer(self.convolutions[-1]))
        first = node if residual is None else chain[1]  # where all it reads is there
        with self.network.graph.inserting_before(first):
            call = self.network.graph.call_module(name, (source,) if residual is None else (source, residual))
        call.meta = dict(chain[-1].meta)
        self._order[call] = self._order[first]
        chain[-1].replace_all_uses_with(call)
        for fused in reversed(chain):
            self.network.graph.erase_node(fused)

    def graph(self, spec: Spec) -> Graph | Unavailable:
        if spec not in self._graphs:
            try:
                self._graphs[spec] = graph_of(self.library, spec)
            except Unavailable as reason:
                self._graphs[spec] = reason
        return self._graphs[spec]

    def chain(self, conv: fx.Node) -> tuple[list[fx.Node], fx.Node | None, bool]:
        """(nodes, residual, whether it ends in a ReLU) of the longest chain behind a convolution."""
        nodes = [conv]
        add = _only_user(conv)
        residual = self.added(add, conv) if add is not None else None
        if add is not None and residual is not None:
            nodes.append(add)
        relu = _only_user(nodes[-1])
        if relu is None or not self.is_relu(relu):
            return nodes, residual, False
        return [*nodes, relu], residual, True

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
        span = range(self._order[since] + 1, self._order[until])
        return any(self._order[user] in span and self.in_place(user) for user in value.users)

    def in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        name = str(getattr(node.target, "__name__", node.target))
        operators = getattr(node.target, "__module__", None) == "_operator" and name.startswith(
            "i"
        )  # iadd and its like
        return operators or name.endswith("_") or bool(node.kwargs.get("inplace"))

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.module(node)) is nn.ReLU
        return node.op in ("call_function", "call_method") and node.target in _RELUS


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
