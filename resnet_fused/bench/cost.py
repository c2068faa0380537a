"""The cost model: bytes through memory and floating-point operations of every op of a step, by how far it is fused.

An op reads each of its operands once and writes each of its results once; weights count once a step and use. Not
counted: per-channel vectors, casts of weights, the optimiser. `docs/cost_model.md` explains the schemes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from resnet_fused import dispatch
from resnet_fused.dispatch import Fusion, formulation
from resnet_fused.measure.network import Block, Layer, Network

MASK = 1 / 16  # a bit an element, in elements of 16 bit; scaled for other widths
_, DGRAD, WGRAD = formulation.OPS
INDEX_BYTES = 8  # of PyTorch's max pool
SHORT_INDEX_BYTES = 1  # of ours


@dataclass(frozen=True)
class Cost:
    """One op of one step: the block and the convolution it belongs to, bytes read and written, floating-point
    operations (a multiply-add is two).
    """

    where: str
    layer: str
    op: str
    bytes: float
    flops: int = 0


@dataclass(frozen=True)
class Inference:
    """How far an inference step is fused.

    Attributes:
        pointwise: batch norm, add and ReLU are one pass instead of one each; the join normalises the projection too.
        layer: they are the convolution's epilogue.
        block: a residual block is one kernel; so are the stem and its max pool, and the last block and the average
            pool.
        join: the projection shares the accumulator of the block's last convolution.
        chain: up to this many channels wide, a block's 3x3, its last 1x1 and the first 1x1 of the next are one kernel.
    """

    pointwise: bool = False
    layer: bool = False
    block: bool = False
    join: bool = False
    chain: int = 0


@dataclass(frozen=True)
class Training:
    """How far a training step is fused.

    Attributes:
        pointwise: batch norm, add and ReLU are one pass each way (statistics and reductions are passes before it).
        fusion: what is fused around every convolution; None is nothing.
        arch: ask `dispatch.training` for that instead, for this architecture.
        join_epilogue: the dgrad that makes the gradient of a block's output also adds what reaches it on the shortcut,
            masks it and forms the sums of the batch norms behind it. With `arch`, where the plan says so, it forms the
            sums and does not mask: between two autograd functions the gradient is what it is.
        join_prologue: the first convolution of a block computes the output of the block before, and writes it.
        stem: the stem's batch norm, ReLU and max pool are one pass each way.
    """

    pointwise: bool = False
    fusion: Fusion | None = None
    arch: int | None = None
    join_epilogue: bool = False
    join_prologue: bool = False
    stem: bool = False

    @property
    def convolutions(self) -> bool:
        """Whether something is fused around convolutions."""
        return self.fusion is not None or self.arch is not None

    def around(self, layer: Layer, dtype: torch.dtype) -> Fusion:
        if self.arch is not None:
            return dispatch.training(layer.shape, dtype, self.arch)
        return self.fusion or Fusion(prologue=False, statistics=False, dgrad_epilogue=False)


_SEPARATE = Fusion(prologue=True)
_ALL = Fusion(prologue=True, dgrad_prologue=True)
INFERENCE = {
    "eager": Inference(),
    "pointwise": Inference(pointwise=True),
    "layer": Inference(layer=True),
    "planned": Inference(layer=True, join=True, chain=128),
    "ideal": Inference(block=True),
}
TRAINING = {
    "eager": Training(),
    "pointwise": Training(pointwise=True),
    "statistics": Training(pointwise=True, fusion=_SEPARATE, join_epilogue=True),
    "join": Training(pointwise=True, fusion=_ALL, join_epilogue=True, join_prologue=True),
    "planned": Training(pointwise=True, arch=90, stem=True),
    "ideal": Training(pointwise=True, fusion=_ALL, join_epilogue=True, join_prologue=True, stem=True),
}


class _Ledger:
    """Collects costs, given in elements of an image; `weights` are those of the whole step."""

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        self.batch, self.dtype, self.width = batch, dtype, dtype.itemsize
        self.mask = MASK * 2 / self.width
        self.costs: list[Cost] = []

    def add(
        self, where: str, layer: Layer | None, op: str, elements: float, weights: float = 0, flops: int = 0
    ) -> None:
        moved = (elements * self.batch + weights) * self.width
        self.costs.append(Cost(where, layer.name if layer else where, op, moved, flops * self.batch))

    def convolve(self, where: str, op: str, layers: Sequence[Layer], elements: float) -> None:
        """An op that runs these convolutions (one way), listed under the first of them, and moves so many elements."""
        self.add(where, layers[0], op, elements, sum(x.weights for x in layers), sum(x.flops for x in layers))


def inference(network: Network, scheme: Inference, batch: int, dtype: torch.dtype) -> list[Cost]:
    """Every op of one inference step."""
    ledger = _Ledger(batch, dtype)
    stem = network.stem
    if scheme.block and network.pooled is not None:
        ledger.convolve("stem", "stem", [stem], stem.inputs + network.pooled)
    else:
        ledger.convolve("stem", "conv_fprop", [stem], stem.inputs + stem.outputs)
        if network.pooled is None or not scheme.pointwise:  # else the max pool normalises what it reads
            _inference_pointwise(ledger, "stem", stem, scheme)
        if network.pooled is not None:
            ledger.add("stem", stem, "max_pool", stem.outputs + network.pooled)
    blocks = network.blocks
    for before, block, after in zip((None, *blocks), blocks, (*blocks[1:], None), strict=False):
        if scheme.block:
            written = block.branch[-1].outputs if after else 0
            ledger.convolve(block.name, "block", block.layers, block.branch[0].size + written)
        else:
            _inference_block(ledger, block, before, after, scheme)
    _head(ledger, network, pooled=scheme.block)
    return ledger.costs


def _inference_pointwise(ledger: _Ledger, where: str, layer: Layer, scheme: Inference) -> None:
    if scheme.pointwise:
        ledger.add(where, layer, "bn_act", 2 * layer.outputs)
    elif not scheme.layer:
        ledger.add(where, layer, "batch_norm", 2 * layer.outputs)
        ledger.add(where, layer, "relu", 2 * layer.outputs)


def _chains(block: Block | None, width: int) -> bool:
    """Whether the chain kernel takes the tail of `block`: a bottleneck with an identity shortcut, not too wide."""
    return block is not None and len(block.branch) == 3 and block.shortcut is None and block.branch[1].shape.k <= width


def _started(block: Block | None, before: Block | None, width: int) -> bool:
    """Whether the chain kernel of the block before also computes the first convolution of `block`."""
    if block is None or not _chains(before, width):
        return False
    shape = block.branch[0].shape
    return (shape.r, shape.s, shape.stride, shape.groups) == (1, 1, (1, 1), 1) and shape.k <= width


def _inference_block(
    ledger: _Ledger, block: Block, before: Block | None, after: Block | None, scheme: Inference
) -> None:
    name, last, projection = block.name, block.branch[-1], block.shortcut
    separate = [] if projection is None or scheme.join else [projection]
    inner = list(block.branch[:-1])
    if _started(block, before, scheme.chain):
        inner = inner[1:]
    chained = _chains(block, scheme.chain)
    for layer in inner[:-1] if chained else inner:
        ledger.convolve(name, "conv_fprop", [layer], layer.inputs + layer.outputs)
        _inference_pointwise(ledger, name, layer, scheme)
    for layer in separate:
        ledger.convolve(name, "conv_fprop", [layer], layer.inputs + layer.outputs)
        if not (scheme.layer or scheme.pointwise):
            ledger.add(name, layer, "batch_norm", 2 * layer.outputs)
    if chained:
        merged = [*block.branch[1:], *(after.branch[:1] if after and _started(after, block, scheme.chain) else ())]
        written = last.outputs + sum(layer.outputs for layer in merged[2:])
        ledger.convolve(name, "conv_chain", merged, merged[0].inputs + last.outputs + written)
    elif projection is not None and scheme.join:
        ledger.convolve(name, "conv_join", [last, projection], last.inputs + projection.inputs + last.outputs)
    else:
        residual = last.outputs if scheme.layer else 0
        ledger.convolve(name, "conv_fprop", [last], last.inputs + last.outputs + residual)
    if scheme.pointwise:
        ledger.add(name, last, "bn_add_act", 3 * last.outputs)
    elif not scheme.layer:
        for op, passes in (("batch_norm", 2), ("add", 3), ("relu", 2)):
            ledger.add(name, last, op, passes * last.outputs)


def _head(ledger: _Ledger, network: Network, pooled: bool = False, training: bool = False) -> None:
    last = network.blocks[-1].branch[-1].outputs
    weights, flops = network.features * network.classes, 2 * network.features * network.classes
    if not pooled:
        ledger.add("head", None, "average_pool", last + network.features)
    ledger.add("head", None, "linear", network.features + network.classes, weights, flops)
    if training:
        ledger.add("head", None, "linear_backward", 2 * (network.features + network.classes), 2 * weights, 2 * flops)
        ledger.add("head", None, "average_pool_backward", last + network.features)


def training(network: Network, scheme: Training, batch: int, dtype: torch.dtype) -> list[Cost]:
    """Every op of the forward and the backward of one training step."""
    ledger = _Ledger(batch, dtype)
    _training_stem(ledger, network, scheme)
    blocks = network.blocks
    for before, block, after in zip((None, *blocks), blocks, (*blocks[1:], None), strict=False):
        _Step(ledger, block, before, after, scheme).forward_and_backward()
    _head(ledger, network, training=True)
    return ledger.costs


def _training_stem(ledger: _Ledger, network: Network, scheme: Training) -> None:
    stem, z = network.stem, network.stem.outputs
    statistics = scheme.around(stem, ledger.dtype).statistics
    ledger.convolve("stem", "conv_fprop", [stem], stem.inputs + z)
    if not statistics:
        ledger.add("stem", stem, "bn_stats", z)
    if scheme.stem and network.pooled is not None:
        pooled = network.pooled * (1 + SHORT_INDEX_BYTES / ledger.width)
        ledger.add("stem", stem, "bn_act_max_pool", z + pooled)
        ledger.add("stem", stem, "bn_act_max_pool_backward_reduce", z + pooled)
        ledger.add("stem", stem, "bn_act_max_pool_backward_apply", 2 * z + pooled)
    else:
        ledger.add("stem", stem, "bn_apply", 2 * z)
        if not scheme.pointwise:
            ledger.add("stem", stem, "relu", 2 * z)
            ledger.add("stem", stem, "relu_backward", 3 * z)
        ledger.add("stem", stem, "bn_backward_reduce", 2 * z)
        ledger.add("stem", stem, "bn_backward_apply", 3 * z)
        if network.pooled is not None:
            pooled = network.pooled * (1 + INDEX_BYTES / ledger.width)
            ledger.add("stem", stem, "max_pool", z + pooled)
            ledger.add("stem", stem, "max_pool_backward", z + pooled)
    ledger.convolve("stem", WGRAD, [stem], stem.inputs + z)


class _Step:
    """The costs of one block in a training step."""

    def __init__(
        self, ledger: _Ledger, block: Block, before: Block | None, after: Block | None, scheme: Training
    ) -> None:
        self.ledger, self.block, self.before, self.after, self.scheme = ledger, block, before, after, scheme
        self.fusions = {layer.name: scheme.around(layer, ledger.dtype) for layer in block.layers}
        self.sum = block.branch[-1].outputs  # elements of the block's output
        self.bits = self.sum * ledger.mask

    def add(self, layer: Layer, op: str, elements: float) -> None:
        self.ledger.add(self.block.name, layer, op, elements)

    def convolve(self, op: str, layer: Layer, elements: float) -> None:
        self.ledger.convolve(self.block.name, op, [layer], elements)

    def forward_and_backward(self) -> None:
        self._forward()
        self._backward_of_the_join()
        for i in reversed(range(len(self.block.branch))):
            self._backward(i)
        if self.block.shortcut is not None:
            self._backward_of_a_convolution(self.block.shortcut, 0)

    def _forward(self) -> None:
        scheme, branch = self.scheme, self.block.branch
        for layer in self.block.layers:
            # The join's prologue reads what the pass would have read, and writes what it would have written.
            written = scheme.join_prologue and self.before is not None and layer is branch[0]
            self.convolve("conv_fprop", layer, (0 if written else layer.inputs) + layer.outputs)
            if not self.fusions[layer.name].statistics:
                self.add(layer, "bn_stats", layer.outputs)
        for layer, consumer in zip(branch, branch[1:], strict=False):
            if not self.fusions[consumer.name].prologue:
                self.add(layer, "bn_apply", 2 * layer.outputs)
            if not scheme.pointwise:
                self.add(layer, "relu", 2 * layer.outputs)
        if self.block.shortcut is not None and not scheme.convolutions:
            self.add(self.block.shortcut, "bn_apply", 2 * self.sum)
        if scheme.pointwise:
            # Beside its own raw output the join reads the projection's, or the block's input.
            self.add(branch[-1], "bn_apply", 3 * self.sum + self.bits)
        else:
            for op, passes in (("bn_apply", 2), ("add", 3), ("relu", 2)):
                self.add(branch[-1], op, passes * self.sum)

    def _backward_of_the_join(self) -> None:
        scheme, last, shortcut = self.scheme, self.block.branch[-1], self.block.shortcut
        behind = [last] if shortcut is None else [last, shortcut]
        if not scheme.convolutions:
            for layer in behind:
                bits = self.bits if scheme.pointwise and layer is last else 0
                self.add(layer, "bn_backward_reduce", 2 * self.sum + bits)
                self.add(layer, "bn_backward_apply", 3 * self.sum + bits)
            # Masked for the shortcut, which the first batch norm's pass may write.
            self.add(last, "relu_backward", (1 if scheme.pointwise else 3) * self.sum)
            self.add(self.block.branch[0], "add", 3 * self.block.branch[0].size)
            return
        # With the epilogue the dgrad behind this block has formed the sums and masked the gradient; see `_epilogue`.
        formed = self.after is not None and self._forms_the_sums(self.after)
        bits = 0.0 if formed and scheme.join_epilogue else self.bits
        for layer in behind:
            if not formed:
                self.add(layer, "bn_backward_reduce", 2 * self.sum + bits)
            if not self.fusions[layer.name].dgrad_prologue:
                # Where their sums came with the gradient, both batch norms are one pass over it.
                again = not (formed and scheme.arch is not None and layer is shortcut)
                self.add(layer, "bn_backward_apply", 2 * self.sum + again * (self.sum + bits))

    def _backward(self, i: int) -> None:
        layer, scheme = self.block.branch[i], self.scheme
        self._backward_of_a_convolution(layer, self._epilogue(i))
        if i == 0:
            return
        before = self.block.branch[i - 1]
        z = before.outputs
        if not scheme.pointwise:
            self.add(before, "relu_backward", 3 * z)
        if not self.fusions[layer.name].dgrad_epilogue:
            self.add(before, "bn_backward_reduce", 2 * z)
        if not self.fusions[before.name].dgrad_prologue:
            self.add(before, "bn_backward_apply", 3 * z)

    def _forms_the_sums(self, block: Block) -> bool:
        """Whether the dgrad of a block's first convolution forms the sums at the join of the block before."""
        if self.scheme.arch is None:
            return self.scheme.join_epilogue
        return self.scheme.around(block.branch[0], self.ledger.dtype).dgrad_epilogue

    def _epilogue(self, i: int) -> float:
        """What the epilogue of a convolution's dgrad reads."""
        if i > 0:
            return self.block.branch[i - 1].outputs if self.fusions[self.block.branch[i].name].dgrad_epilogue else 0
        if not self.scheme.convolutions:
            return 0
        x = self.block.branch[0].size
        # What arrives on the shortcut: the sum's gradient and its mask, or what the projection's dgrad has written.
        addend = x * (1 + (self.ledger.mask if self.block.shortcut is None else 0))
        if self.before is None or not self._forms_the_sums(self.block):
            return addend
        # The mask and the raw outputs of the block before; with `join_epilogue` the addend has arrived masked.
        raw = 1 if self.before.shortcut is None else 2
        return (x if self.scheme.join_epilogue else addend) + x * (raw + self.ledger.mask)

    def _backward_of_a_convolution(self, layer: Layer, epilogue: float) -> None:
        fusion = self.fusions[layer.name]
        gradient = layer.outputs * (2 if fusion.dgrad_prologue else 1)
        # Nobody has kept the activation: the dgrad that reads its raw values writes it, or a pass.
        activates = self.scheme.arch is not None and layer in self.block.branch[1:] and not fusion.prologue
        beside = activates and fusion.dgrad_epilogue
        self.convolve(DGRAD, layer, gradient + (2 if beside else 1) * layer.size + epilogue)
        if activates and not beside:
            self.add(layer, "bn_apply", 2 * layer.size)
        self.convolve(WGRAD, layer, gradient + layer.inputs)


def total(costs: Iterable[Cost]) -> tuple[float, int]:
    """Bytes and floating-point operations together."""
    costs = list(costs)
    return sum(cost.bytes for cost in costs), sum(cost.flops for cost in costs)


def seconds(costs: Iterable[Cost], bandwidth: float, flops_per_s: float) -> float:
    """The least time for these ops one after the other, each bound by bandwidth (bytes/s) or arithmetic."""
    return sum(max(cost.bytes / bandwidth, cost.flops / flops_per_s) for cost in costs)
