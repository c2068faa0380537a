"""The cost model: bytes through memory and floating-point operations of every op of a step, traced and not measured.

A step runs on tensors without memory. Every op that PyTorch dispatches, its own or ours, reads each of its operands
once and writes each of its results once. `docs/cost_model.md` says what follows from that.
"""

from __future__ import annotations

import copy
import importlib.util
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from resnet_fused import fuse, use_backend
from resnet_fused.dispatch import choice
from resnet_fused.dispatch.device import assume_gpu
from resnet_fused.inference.conv import FrozenConv
from resnet_fused.inference.network import freeze_network, observe, prepare
from resnet_fused.inference.tail import Join
from resnet_fused.measure.cases import Case
from resnet_fused.measure.network import Network

STEM, HEAD = "stem", "head"
ARCH = 90  # the GPU whose rules say what is fused
# Of a mode, the degrees of fusion by the backend that runs what is fused; None is nothing. "cuda" has no convolutions.
SCHEMES: dict[str, dict[str, str | None]] = {
    "infer": {"eager": None, "planned": "triton"},
    "train": {"eager": None, "pointwise": "cuda", "planned": "triton"},
}
# Leading operands that no kernel reads only once: a sum over all of them comes before the first result.
READ_TWICE = {"native_batch_norm": 1, "native_batch_norm_backward": 2}
_TRAINING = 5  # the argument of `native_batch_norm`


@dataclass(frozen=True)
class Cost:
    """One op of one step.

    Attributes:
        where: the residual block it belongs to, "stem" or "head".
        layer: of an op that runs a convolution, or several, the first of them.
        op: its name.
        bytes: read and written.
        flops: floating-point operations (a multiply-add is two).
    """

    where: str
    layer: str | None
    op: str
    bytes: int
    flops: int = 0


def costs(model: nn.Module, network: Network, case: Case) -> dict[str, list[Cost]]:
    """Every op of a step of the model, by scheme, in the order in which they run.

    Args:
        model: plain, on any device; it is left as it is.
        network: its description.
        case: the batch, dtype and image size, and the mode: forward, or forward and backward.

    Returns:
        Of every scheme; without Triton, whose kernels are what is planned, of eager PyTorch alone.
    """
    traced = SCHEMES[case.mode] if importlib.util.find_spec("triton") else {"eager": None}
    return {scheme: _step(model, network, case, backend) for scheme, backend in traced.items()}


def total(costs: Iterable[Cost]) -> tuple[int, int]:
    """Bytes and floating-point operations together."""
    costs = list(costs)
    return sum(cost.bytes for cost in costs), sum(cost.flops for cost in costs)


def seconds(costs: Iterable[Cost], bandwidth: float, flops_per_s: float) -> float:
    """The least time for these ops one after the other, each bound by bandwidth (bytes/s) or arithmetic."""
    return sum(max(cost.bytes / bandwidth, cost.flops / flops_per_s) for cost in costs)


def _step(model: nn.Module, network: Network, case: Case, backend: str | None) -> list[Cost]:
    training = case.mode == "train"
    module = copy.deepcopy(model).train(training).to("meta", case.torch_dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.empty(case.batch, 3, case.image_size, case.image_size, dtype=case.torch_dtype, device="meta")
    x = x.contiguous(memory_format=torch.channels_last)
    with _as_on_gpu(backend), torch.set_grad_enabled(training):
        if backend is not None:
            module = fuse(module) if training else _frozen(module, x)
        with _Trace(module, network, case.batch) as trace:
            y = module(x)
            if training:
                y.backward(torch.empty_like(y))
    return trace.costs()


@contextmanager
def _as_on_gpu(backend: str | None) -> Iterator[None]:
    """What runs on tensors without memory is what this backend would run on a GPU of `ARCH`, if nothing was tuned."""
    if backend is None:
        yield
        return
    choice.forget()
    try:
        with assume_gpu(ARCH), use_backend(backend):
            yield
    finally:
        choice.forget()


def _frozen(module: nn.Module, x: Tensor) -> nn.Module:
    """What `freeze` makes of it, which asks for values."""
    with _NoValues():
        network, reasons = prepare(module)
        network, *_ = freeze_network(network, reasons, observe(network, x))
    return network


class _NoValues(TorchDispatchMode):
    """A question about values, as whether all are finite, is answered with yes: there are none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        return func(*args, **(kwargs or {}))


class _Trace(TorchDispatchMode):
    """Notes what every op costs. An op of the backward belongs to the place whose forward made its autograd node."""

    def __init__(self, module: nn.Module, network: Network, batch: int) -> None:
        super().__init__()
        self.found: list[Cost] = []
        self.wgrads: list[tuple[int, torch.Size]] = []  # (position, shape) of weights' gradients made alone
        self.place_of = {layer.name: block.name for block in network.blocks for layer in block.layers}
        self.place_of[network.stem.name] = STEM
        self.layers, self.batch = {layer.name: layer for layer in network.layers}, batch
        self.weights = dict(_weights(module))
        self.layer_of = {_storage(weight): layer for layer, weight in self.weights.items()}
        self.begun = [(-1, STEM)]  # (number of the first autograd node, place)
        for place, inner in _places(module, network):
            inner.register_forward_pre_hook(lambda *_, place=place: self._begin(place))

    def _begin(self, place: str) -> None:
        self.begun.append((torch._C._autograd._get_sequence_nr(), place))

    def _place(self, layer: str | None) -> str:
        node = torch._C._current_autograd_node()
        if node is not None:
            return self.begun[bisect(self.begun, node._sequence_nr(), key=itemgetter(0)) - 1][1]
        if layer is not None and (place := self.place_of[layer]) != self.begun[-1][1]:
            self._begin(place)  # a frozen network does not call its blocks as modules
        return self.begun[-1][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        namespace, _, op = func._schema.name.partition("::")
        if namespace not in ("aten", "resnet_fused") or func.is_view or op.startswith("empty"):
            return returned
        if op == "convolution":  # without memory it returns NCHW, whatever it reads
            returned = returned.contiguous(memory_format=torch.channels_last)
        read, written = ([t for t in tree_leaves(some) if isinstance(t, Tensor)] for some in ([args, kwargs], returned))
        twice = read[: READ_TWICE.get(op, 0)] if op != "native_batch_norm" or args[_TRAINING] else []
        layers = [self.layer_of[key] for key in map(_storage, read) if key in self.layer_of]
        layer = layers[0] if layers and op.startswith("conv") else None
        if op == "conv_wgrad":
            self.wgrads.append((len(self.found), written[0].shape))
        moved = sum(t.nbytes for t in (*read, *twice, *written))
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else int(count(*args, **kwargs, out_val=returned))
        self.found.append(Cost(self._place(layer), layer, op, moved, flops))
        return returned

    def costs(self) -> list[Cost]:
        """All that was noted. `conv_wgrad` reads no weight to be known by, so it goes to the layer that lacks it."""
        noted, flops = list(self.found), Counter[str | None]()
        for cost in noted:
            flops[cost.layer] += cost.flops
        for i, shape in self.wgrads:
            where = noted[i].where
            alike = [name for name, t in self.weights.items() if t.shape == shape and self.place_of[name] == where]
            layer = min(alike, key=lambda name: flops[name])
            flops[layer] += noted[i].flops
            noted[i] = replace(noted[i], layer=layer)
        return [replace(cost, flops=self._with_groups(cost)) for cost in noted]

    def _with_groups(self, cost: Cost) -> int:
        """PyTorch counts the gradient of a grouped weight as if there were no groups."""
        if cost.layer is None:
            return cost.flops
        layer = self.layers[cost.layer]
        product = layer.flops * self.batch
        gradients, others = divmod(cost.flops, layer.shape.groups * product)
        return gradients * product + others


def _places(module: nn.Module, network: Network) -> Iterator[tuple[str, nn.Module]]:
    """Every block, and the first module behind the last one, with which the head begins."""
    names = [name for name, _ in module.named_modules()]
    blocks = [block.name for block in network.blocks]
    for name in blocks:
        yield name, module.get_submodule(name)
    behind = names[names.index(blocks[-1]) :]
    head = next((name for name in behind if not f"{name}.".startswith(f"{blocks[-1]}.")), None)
    if head is not None:
        yield HEAD, module.get_submodule(head)


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The name of every convolution in the model, and its weight in the network: plain, fused or frozen."""
    for name, inner in module.named_modules():
        if isinstance(inner, nn.Conv2d):
            yield name, inner.weight
        elif isinstance(inner, FrozenConv):
            yield inner.layer, inner.weight
        elif isinstance(inner, Join):
            yield inner.planned[0].layer, inner.weight


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata
