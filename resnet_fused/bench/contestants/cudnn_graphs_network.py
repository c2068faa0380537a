"""A whole network whose convolutions are cuDNN's fused graphs: the contestant `cudnn-graphs`.

Traced by torch.fx, its batch norms folded by PyTorch's own pass, in fp32; then every convolution takes the bias, the
add and the ReLU behind it into one graph. What is left - pooling, the classifier, a convolution for which cuDNN has no
engine - is PyTorch's. On a GPU all of it is one CUDA graph, captured as `freeze` captures its networks.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse as fold_batch_norms
from torch.fx.passes.shape_prop import ShapeProp

from resnet_fused.bench.contestants.cudnn_graphs import Convolution, Graph, Library, Spec, graph_of, library
from resnet_fused.bench.contestants.cudnn_graphs_trace import Chains, only_user, own_up, trace
from resnet_fused.inference.graph import capture
from resnet_fused.measure.cases import Case, Unavailable


def cudnn_graphs(model: nn.Module, example: Tensor, case: Case) -> Callable[[Tensor], Tensor]:
    """The contestant.

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
    network = trace(copy.deepcopy(model).eval().float())
    network = cast(fx.GraphModule, fold_batch_norms(network, inplace=True, no_trace=True))
    network.to(example.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ShapeProp(network).propagate(example)
    builder = _Builder(network, library)
    for node in list(network.graph.nodes):
        if builder.is_conv(node):
            builder.replace(node)
    own_up(len(builder.convolutions), builder.problems)
    shared = max((convolution.workspace for convolution in builder.convolutions), key=Tensor.numel)
    for convolution in builder.convolutions:  # one runs after the other
        convolution.workspace = shared
    network.delete_all_unused_submodules()
    network.recompile()
    return network


class _Layer(nn.Module):
    """A convolution where torch.fx can call it; its weights are constants, of no state_dict."""

    def __init__(self, convolution: Convolution) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.convolution(x, residual)


class _Builder(Chains):
    """Puts graphs of cuDNN's in place of chains conv(-add)(-relu).

    Attributes:
        convolutions: those in place.
        problems: why others are left to PyTorch, one each.
    """

    def __init__(self, network: fx.GraphModule, library: Library) -> None:
        super().__init__(network)
        self.library = library
        self.convolutions: list[Convolution] = []
        self.problems: list[str] = []
        self._graphs: dict[Spec, Graph | Unavailable] = {}  # equal layers share the timing

    def replace(self, node: fx.Node) -> None:
        conv, refusal = self.module(node), self.refusal(node)
        assert isinstance(conv, nn.Conv2d)
        if refusal is not None:
            self.problems.append(refusal)
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
        self.order[call] = self.order[first]
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
        add = only_user(conv)
        residual = self.added(add, conv) if add is not None else None
        if add is not None and residual is not None:
            nodes.append(add)
        relu = only_user(nodes[-1])
        if relu is None or not self.is_relu(relu):
            return nodes, residual, False
        return [*nodes, relu], residual, True
