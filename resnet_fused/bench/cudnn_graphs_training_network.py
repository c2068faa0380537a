"""A network in training, in fp16, whose convolutions, batch norms, adds and ReLUs are cuDNN's fused graphs.

The chains conv-bn(-add)(-relu) of the traced model hand each other what was not computed yet (`Pending`): a batch norm
and ReLU that one convolution alone reads is its prologue, any other is written by one pointwise graph. Parameters and
buffers stay the model's. Chains for which cuDNN has no engine - the 7x7 stem, groups - stay PyTorch's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp

from . import cudnn_graphs_training as training
from .cases import Unavailable
from .cudnn_graphs import Library, Spec
from .cudnn_graphs_trace import Chains, only_user, own_up, trace


class TrainingNetwork:
    """The network, for inputs like `example`, to be called under autocast; trains the parameters of `model`.

    For other shapes - a smaller batch, to look at the gradients - it builds others, in which nothing is timed.

    Raises:
        Unavailable: as `build_training`.
    """

    def __init__(self, model: nn.Module, example: Tensor, library: Library) -> None:
        self.model, self.library = model, library
        self.networks = {example.shape: build_training(model, example, library)}

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape not in self.networks:
            self.networks[x.shape] = build_training(self.model, x, self.library, timed=False)
        logits: Tensor = self.networks[x.shape](x)
        return logits


def build_training(model: nn.Module, example: Tensor, library: Library, timed: bool = True) -> fx.GraphModule:
    """The network for inputs like `example` alone.

    Raises:
        Unavailable: the model cannot be traced, or not one of its convolutions has an engine.
    """
    network = trace(model)
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # the shapes alone: running statistics stay as they are
    ShapeProp(network, fake_mode=fake).propagate(example)
    builder = _TrainingBuilder(network, training.Graphs(library, timed))
    builder.find()
    own_up(len(builder.pairs), builder.problems)
    builder.rewrite()
    network.recompile()
    return network


@dataclasses.dataclass
class _Pair:
    """A convolution and its batch norm.

    Attributes:
        before: the batch norm that is in its prologue, with a ReLU.
        pending: the node of the result.
    """

    conv: fx.Node
    spec: Spec
    before: fx.Node | None
    pending: fx.Node | None = None


class _TrainingBuilder(Chains):
    """Finds the pairs that cuDNN has engines for, and rewrites the chains around them.

    Attributes:
        pairs: by batch norm.
        problems: why other convolutions are left to PyTorch.
    """

    def __init__(self, network: fx.GraphModule, graphs: training.Graphs) -> None:
        super().__init__(network)
        self.graphs = graphs
        self.pairs: dict[fx.Node, _Pair] = {}
        self.problems: list[str] = []
        self._inside: set[fx.Node] = set()  # batch norms that a prologue or another's sum takes

    def find(self) -> None:
        for conv in self.network.graph.nodes:
            if self.is_conv(conv):
                bn, reason = only_user(conv), self.refusal(conv)
                if reason is None and (bn is None or not self.is_batch_norm(bn)):
                    reason = f"{conv.target} has no batch norm of its own"
                if reason is None and bn is not None:
                    reason = self.pair(conv, bn)
                if reason is not None:
                    self.problems.append(reason)

    def is_batch_norm(self, node: fx.Node) -> bool:
        bn = self.module(node) if node.op == "call_module" else None
        return type(bn) is nn.BatchNorm2d and bn.affine and bn.track_running_stats and bn.momentum is not None

    def pair(self, conv: fx.Node, bn: fx.Node) -> str | None:
        """Take them on, or say why not."""
        module, source = self.module(conv), conv.args[0]
        assert isinstance(module, nn.Conv2d) and isinstance(source, fx.Node)
        if module.bias is not None:
            return f"{conv.target} has a bias"
        shapes = (tuple(source.meta["tensor_meta"].shape), tuple(module.weight.shape))
        geometry = (module.stride, module.padding, module.dilation, training.HALF)
        spec = Spec(*shapes, *geometry, relu=False)  # type: ignore[arg-type]
        relu = source if self.is_relu(source) and len(source.users) == 1 else None
        before = relu.args[0] if relu is not None else None
        if not isinstance(before, fx.Node) or before not in self.pairs or len(before.users) != 1:
            before = None
        try:
            for record in (training.convolution, training.weight_gradient):
                self.graphs.get(record, spec, before is not None)
            self.graphs.get(training.data_gradient, spec)
            if before is not None:
                self.graphs.get(training.batch_norm_gradient, spec.x, "recomputed")
        except Unavailable as reason:
            return str(reason)
        self.pairs[bn] = _Pair(conv, spec, before)
        if before is not None:
            self._inside.add(before)
        return None

    def rewrite(self) -> None:
        obsolete: list[fx.Node] = []
        for count, (bn, pair) in enumerate(self.pairs.items()):
            conv, norm = self.module(pair.conv), self.module(bn)
            layer = training.ConvolutionBatchNorm(self.graphs, pair.spec, conv, norm)  # type: ignore[arg-type]
            source = pair.conv.args[0] if pair.before is None else self.pairs[pair.before].pending
            pair.pending = self.insert(bn, f"cudnn_{count}", layer, (source,))
            obsolete += [pair.conv, bn]
        for count, bn in enumerate(self.pairs):
            chain, residual, relu = self.chain(bn)
            if bn in self._inside:
                obsolete += chain[1:]
                continue
            pending = self.pairs[bn].pending
            assert pending is not None
            operands: tuple[Any, ...] = (pending,)
            if residual is not None:
                pends = residual in self.pairs and residual not in self._inside and len(residual.users) == 1
                operands += (self.pairs[residual].pending if pends else residual,)
                if pends:
                    self._inside.add(residual)
            normalise = training.Normalise(self.graphs, relu)
            after = pending if chain[-1] is bn else chain[-1]
            written = self.insert(after, f"cudnn_normalise_{count}", normalise, operands)
            chain[-1].replace_all_uses_with(written)
            obsolete += chain[1:]
        gone = set(obsolete)
        for node in reversed(self.network.graph.nodes):
            if node in gone:
                self.network.graph.erase_node(node)

    def insert(self, after: fx.Node, name: str, layer: nn.Module, operands: tuple[Any, ...]) -> fx.Node:
        self.network.add_submodule(name, layer)
        with self.network.graph.inserting_after(after):
            call = self.network.graph.call_module(name, operands)
        call.meta, self.order[call] = dict(after.meta), self.order[after]
        return call

    def chain(self, bn: fx.Node) -> tuple[list[fx.Node], fx.Node | None, bool]:
        """(nodes, residual, whether it ends in a ReLU) of the longest chain behind a batch norm."""
        nodes = [bn]
        add = only_user(bn)
        residual = self.added(add, bn) if add is not None else None
        if add is not None and residual is not None:
            nodes.append(add)
        relu = only_user(nodes[-1])
        if relu is None or not self.is_relu(relu):
            return nodes, residual, False
        return [*nodes, relu], residual, True
