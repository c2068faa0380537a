"""The problems of a network: which ops it runs on which shapes, and operands for each to verify and time it with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused import plan
from resnet_fused.measure.network import Block, Layer, Network
from resnet_fused.ops import reference
from resnet_fused.plan import formulation
from resnet_fused.plan.choice import ALONE, BLOCK
from resnet_fused.plan.conv import BlockShape, ConvShape
from resnet_fused.plan.conv_chain import chain_flags, join_flags
from resnet_fused.plan.table import Problem

GUARD = 512  # elements before and after every operand: NaN, or 255
CHAIN_CHANNELS = 128
FAMILIES = {
    # Ops that one choice decides about, and that are verified and timed as one.
    "bn_apply": ("bn_stats", "bn_finalize", "bn_apply", "bn_backward_reduce", "bn_backward_apply"),
    "bn_act_max_pool": (
        "bn_act_max_pool",
        "bn_act_max_pool_backward_reduce",
        "bn_act_max_pool_backward_apply",
    ),
    "add_act": ("add_act", "add_act_backward"),
}


@dataclass(frozen=True)
class Job:
    """A problem and what the network adds to it, which decides about optional operands.

    Attributes:
        problem: see `plan.Problem`.
        residual: the op also adds a residual (fprop, bn_apply) or the gradient on the shortcut (dgrad).
        epilogue: dgrad masks with the ReLU before it and forms the two sums.
        following: channels of conv_chain's (outputs, next convolution), or of conv_join's (shortcut, its stride).
        weight: how often it is in the network; 0 of what only another formulation would run.
    """

    problem: Problem
    residual: bool = False
    epilogue: bool = False
    following: tuple[int, int] = (0, 0)
    weight: int = 1


def jobs(
    network: Network,
    modes: Iterable[str],
    batch: int,
    dtype: torch.dtype,
    arch: int,
    tf32: bool,
    alternatives: bool = False,
) -> list[Job]:
    """The problems of a network in these modes (`"infer"`, `"train"`), each once, with its number of occurrences.

    Args:
        network: what to run.
        modes: of it.
        batch: images.
        dtype: of the activations.
        arch: compute capability times ten.
        tf32: whether fp32 products may be rounded to TF32.
        alternatives: also those that training would have if it were formulated otherwise, with a weight of 0.
    """
    found: dict[Problem, Job] = {}
    for mode in modes:
        every = _inference(network) if mode == "infer" else _training(network, dtype, arch, alternatives)
        for job in every:
            problem = dataclasses.replace(job.problem.with_batch(batch), dtype=dtype, tf32=tf32 and _convolves(job))
            found[problem] = _together(found.get(problem), dataclasses.replace(job, problem=problem))
    return list(found.values())


def blocks(network: Network, batch: int, dtype: torch.dtype, tf32: bool) -> list[Job]:
    """The residual blocks of a network in training, each once, with its number of occurrences."""
    found: dict[Problem, Job] = {}
    for block in network.blocks:
        shortcut = None if block.shortcut is None else block.shortcut.shape
        shape = BlockShape(tuple(layer.shape for layer in block.branch), shortcut, shortcut is None)
        problem = Problem(BLOCK, shape.with_batch(batch), dtype, tf32)
        found[problem] = _together(found.get(problem), Job(problem))
    return list(found.values())


def elements(problem: Problem) -> int:
    """Of the activations that a problem reads and writes, about."""
    s = problem.shape
    if isinstance(s, BlockShape):
        return sum(conv.n * (conv.c * conv.h * conv.w + conv.k * conv.p * conv.q) for conv in s.branch)
    if isinstance(s, ConvShape):
        return s.n * (s.c * s.h * s.w + s.k * s.p * s.q)
    return 4 * math.prod(s)


def check_images(problem: Problem, least: int) -> int:
    """The fewest images, and at least so many, that launch the same kernel as the problem's own number: Triton compiles
    another one where the number of pixels is no multiple of a tile, or of 16.
    """
    shape = problem.shape
    assert not isinstance(shape, BlockShape)
    sizes = (shape[2:],) if isinstance(shape, tuple) else ((shape.h, shape.w), (shape.p, shape.q))
    images = least
    while images < problem.batch and any(images * h * w % 128 for h, w in sizes):
        images *= 2
    return min(images, problem.batch)


def parts(network: Network, mode: str, batch: int, dtype: torch.dtype, arch: int, tf32: bool) -> list[Job]:
    """What the times of a network add up from: in inference its problems, in training the stem and the blocks."""
    if mode == "infer":
        return jobs(network, [mode], batch, dtype, arch, tf32)
    found = []
    for job in _stem(network):
        problem = dataclasses.replace(job.problem.with_batch(batch), dtype=dtype, tf32=tf32 and _convolves(job))
        found.append(dataclasses.replace(job, problem=problem))
    return found + blocks(network, batch, dtype, tf32)


def _together(before: Job | None, job: Job) -> Job:
    """One job for a problem that occurs again: with all the operands that it has somewhere."""
    if before is None:
        return job
    epilogue = before.epilogue or job.epilogue
    residual = (before.residual or job.residual) and not epilogue  # a dgrad has one or the other
    return dataclasses.replace(before, residual=residual, epilogue=epilogue, weight=before.weight + job.weight)


def _convolves(job: Job) -> bool:
    return not isinstance(job.problem.shape, tuple)


def _job(op: str, shape: ConvShape | BlockShape | tuple[int, ...], flags: Iterable[str] = (), **rest: Any) -> Job:
    return Job(Problem(op, shape, torch.float32, False, tuple(sorted(flags))), **rest)


def _inference(network: Network) -> Iterator[Job]:
    yield _job("conv_fprop", network.stem.shape)
    for block, after in zip(network.blocks, (*network.blocks[1:], None), strict=True):
        for layer in block.layers:
            last = layer is block.branch[-1]
            yield _job("conv_fprop", layer.shape, residual=last and block.shortcut is None)
        yield from _tails(block, after)


def _tails(block: Block, after: Block | None) -> Iterator[Job]:
    """What of a bottleneck may run as one kernel."""
    last, shortcut = block.branch[-1].shape, block.shortcut
    if len(block.branch) != 3 or any(layer.shape.groups > 1 for layer in block.layers):
        return
    if shortcut is not None:
        following = (shortcut.shape.c, shortcut.shape.stride[0])
        yield _job("conv_join", last, join_flags(*following), following=following)
    elif block.branch[1].shape.k <= CHAIN_CHANNELS:
        head = after.branch[0].shape if after else None
        wanted = head is not None and (head.r, head.stride) == (1, (1, 1)) and head.k <= CHAIN_CHANNELS
        following = (last.k, head.k if wanted and head else 0)
        yield _job("conv_chain", block.branch[1].shape, chain_flags(*following), following=following)


def _training(network: Network, dtype: torch.dtype, arch: int, alternatives: bool) -> Iterator[Job]:
    yield from _stem(network)
    for block in network.blocks:
        for layer in block.layers:
            first = layer not in block.branch[1:]
            identity = layer is block.branch[0] and block.shortcut is None
            fusion = formulation.by_rule(layer.shape, dtype, arch, first)
            asked = formulation.problems(layer.shape, dtype, False, fusion, first, identity)
            for problem in asked:
                residual, epilogue = "residual" in problem.flags, "epilogue" in problem.flags
                yield _job(problem.op, layer.shape, problem.flags, residual=residual, epilogue=epilogue)
            # The map in front of a 3x3 would be applied nine times: not worth the time to measure it.
            if alternatives and not first:
                if (layer.shape.r, layer.shape.s) == (1, 1):
                    other = dataclasses.replace(fusion, prologue=not fusion.prologue)
                    for problem in formulation.problems(layer.shape, dtype, False, other, first, identity):
                        if problem.op != "conv_dgrad":
                            yield _job(problem.op, layer.shape, problem.flags, weight=0)
                alone = formulation.normalisation(layer.shape, dtype)
                yield _job(alone.op, alone.shape, alone.flags, weight=0)
        for layer in block.branch[:-1]:
            yield _job("bn_apply", _output(layer))
        yield _job("bn_apply", _output(block.branch[-1]), ["residual"])


def _stem(network: Network) -> Iterator[Job]:
    stem = network.stem
    yield _job("conv_fprop_stats", stem.shape)
    yield _job("conv_wgrad", stem.shape)
    yield _job("bn_act_max_pool" if network.pooled is not None else "bn_apply", _output(stem))


def _output(layer: Layer) -> tuple[int, ...]:
    s = layer.shape
    return (s.n, s.k, s.p, s.q)


class Operands:
    """Random operands, each (unless `guarded` is false) between guards of NaN, so that what reads or writes beside
    them shows.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, guarded: bool = True, seed: int = 0) -> None:
        self.device, self.dtype, self.guarded = device, dtype, guarded
        self.generator = torch.Generator(device).manual_seed(seed)
        self._made: list[tuple[Tensor, Tensor]] = []  # (storage with guards, a copy of what it held)

    def activation(self, *shape: int) -> Tensor:
        n, c, h, w = shape
        value = torch.randn((n, h, w, c), generator=self.generator, device=self.device).to(self.dtype)
        return self._guard(value).permute(0, 3, 1, 2)

    def weight(self, k: int, c: int, r: int, s: int) -> Tensor:
        value = torch.randn((k, r, s, c), generator=self.generator, device=self.device) * math.sqrt(2 / (c * r * s))
        return self._guard(value.to(self.dtype)).permute(0, 3, 1, 2)

    def vector(self, channels: int, positive: bool = False) -> Tensor:
        value = torch.rand(channels, generator=self.generator, device=self.device)
        return self._guard(value + 0.5 if positive else value - 0.5)

    def affine(self, channels: int) -> tuple[Tensor, Tensor]:
        """Scale and shift."""
        return self.vector(channels, positive=True), self.vector(channels)

    def bits(self, elements: int) -> Tensor:
        shape = ((elements + 7) // 8,)
        value = torch.randint(0, 256, shape, generator=self.generator, device=self.device, dtype=torch.uint8)
        return self._guard(value)

    def damage(self) -> str | None:
        """What an op did to operands and guards it must not touch, or None."""
        for storage, before in self._made:
            size = before.numel()
            guards = torch.cat([storage[:GUARD], storage[GUARD + size :]])
            untouched = guards.isnan() if guards.is_floating_point() else guards == 255
            if not bool(untouched.all()):
                return "it wrote beside an operand"
            if not torch.equal(storage[GUARD : GUARD + size], before.flatten()):
                return "it changed an operand"
        return None

    def _guard(self, value: Tensor) -> Tensor:
        if not self.guarded:
            return value
        filler = float("nan") if value.is_floating_point() else 255
        storage = torch.full((value.numel() + 2 * GUARD,), filler, dtype=value.dtype, device=self.device)
        inner = storage[GUARD : GUARD + value.numel()]
        inner.copy_(value.flatten())
        self._made.append((storage, value))
        return inner.view(value.shape)


class Shapes(Operands):
    """Operands without values, in NHWC order."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device("meta"), dtype

    def activation(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta", memory_format=torch.channels_last)

    def weight(self, k: int, c: int, r: int, s: int) -> Tensor:
        return self.activation(k, c, r, s)

    def vector(self, channels: int, positive: bool = False) -> Tensor:
        return torch.empty(channels, device="meta")

    def bits(self, elements: int) -> Tensor:
        return torch.empty((elements + 7) // 8, dtype=torch.uint8, device="meta")


def arguments(job: Job, make: Operands) -> tuple[Any, ...]:
    """The arguments of a convolution op, in its order."""
    s = job.problem.shape
    assert isinstance(s, ConvShape)
    flags = job.problem.flags
    stride, padding, dilation = list(s.stride), list(s.padding), list(s.dilation)
    geometry = (stride, padding, dilation, s.groups)
    image, out = (s.n, s.c, s.h, s.w), (s.n, s.k, s.p, s.q)
    filters = (s.k, s.c // s.groups, s.r, s.s)
    op = job.problem.op
    none: tuple[None, None] = (None, None)
    if op == "conv_fprop":
        added = make.activation(*out) if job.residual else None
        return make.activation(*image), make.weight(*filters), None, make.vector(s.k), added, *geometry, True
    if op == "conv_fprop_stats":
        affine = make.affine(s.c) if "prologue" in flags else none
        rows = plan.partial_rows(s.n * s.p * s.q, s.k)
        return make.activation(*image), make.weight(*filters), *affine, *geometry, rows
    if op == "conv_dgrad":
        behind = (make.activation(*out), _coefficients(make, s.k)) if "prologue" in flags else none
        residual = (make.activation(*image), make.bits(math.prod(image))) if job.residual else none
        before: tuple[Any, ...] = (None,) * 5
        if job.epilogue:
            before = (make.activation(*image), *make.affine(s.c), *_moments(make, s.c))
        return make.activation(*out), make.weight(*filters), *behind, *residual, *before, [s.h, s.w], *geometry
    if op == "conv_wgrad":
        behind = (make.activation(*out), _coefficients(make, s.k)) if "dy_prologue" in flags else none
        affine = make.affine(s.c) if "x_prologue" in flags else none
        return make.activation(*out), make.activation(*image), *behind, *affine, [s.r, s.s], *geometry
    first, second = job.following
    if op == "conv_join":
        shortcut = make.activation(s.n, first, s.p * second, s.q * second)
        weights = make.weight(*filters), make.weight(s.k, first, 1, 1)
        return make.activation(*image), weights[0], shortcut, weights[1], make.vector(s.k), [second] * 2, True
    if op == "conv_chain":
        middle = (make.weight(*filters), None, make.vector(s.k))
        last = (make.weight(first, s.k, 1, 1), None, make.vector(first), make.activation(s.n, first, s.p, s.q))
        head = (make.weight(second, first, 1, 1), None, make.vector(second)) if second else (None,) * 3
        return make.activation(*image), *middle, *last, *head, stride, padding, dilation
    raise ValueError(f"{op} is no convolution")


def also(job: Job) -> tuple[str, ...]:
    """The ops that run a job's problem beside its own: a block's first dgrad forms the sums of the block before it."""
    return ("conv_dgrad_join",) if job.problem.op == "conv_dgrad" and not job.epilogue else ()


def join_arguments(dgrad: Sequence[Any], make: Operands) -> tuple[Any, ...]:
    """The arguments of `conv_dgrad_join`, behind a block that ends in a projection, from those of `conv_dgrad`."""
    dy, weight, size, groups = dgrad[0], dgrad[1], dgrad[11], dgrad[-1]
    c = weight.shape[1] * groups
    image = (dy.shape[0], c, *size)
    first, second = ((make.activation(*image), *_moments(make, c)) for _ in range(2))
    return (*dgrad[:6], first[0], make.bits(math.prod(image)), *first[1:], *second, *dgrad[11:])


def _moments(make: Operands, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation."""
    return make.vector(channels), make.vector(channels, positive=True)


def _coefficients(make: Operands, channels: int) -> Tensor:
    return torch.stack([make.vector(channels, positive=True), make.vector(channels), make.vector(channels)])


def memory_arguments(op: str, problem: Problem, make: Operands) -> tuple[Any, ...]:
    """The arguments of an op of a family, in its order; its activations have the problem's shape."""
    shape = problem.shape
    assert isinstance(shape, tuple)
    n, c, h, w = shape
    count = n * h * w
    rows = plan.partial_rows(count, c)
    if op == "bn_stats":
        return make.activation(*shape), rows
    if op == "bn_finalize":
        statistics = (make.vector(rows * c).double().view(rows, c), make.vector(rows * c, positive=True).view(rows, c))
        parts = torch.full((rows,), float(count // rows), device=make.device)
        return *statistics, parts, make.vector(c), make.vector(c), None, None, 0.1, 1e-5
    if op == "add_act":
        return make.activation(*shape), make.activation(*shape), True
    if op == "add_act_backward":
        return make.activation(*shape), make.activation(*shape)
    if op == "bn_apply" and ALONE in problem.flags:
        return make.activation(*shape), *make.affine(c), None, None, None, True, False
    if op == "bn_apply":
        residual = (make.activation(*shape), *make.affine(c)) if "residual" in problem.flags else (None, None, None)
        return make.activation(*shape), *make.affine(c), *residual, True, bool(problem.flags)
    if op == "bn_act_max_pool":
        return make.activation(*shape), *make.affine(c)
    sums = (make.vector(c), make.vector(c))
    if op.startswith("bn_act_max_pool_backward"):
        x, affine = make.activation(*shape), make.affine(c)
        pooled, index = reference.bn_act_max_pool(x, *affine)
        winners = (make.activation(*pooled.shape), index, x, *affine, *_moments(make, c))
        return (*winners, rows) if op.endswith("reduce") else (*winners, *sums, float(count))
    mask = make.bits(math.prod(shape)) if problem.flags else None
    operands = (make.activation(*shape), make.activation(*shape), mask, *make.affine(c), *_moments(make, c))
    if op == "bn_backward_reduce":
        return *operands, True, rows
    if op == "bn_backward_apply":
        return *operands, *sums, float(count), True, bool(problem.flags)
    raise ValueError(f"{op} is in no family; choose one of {', '.join(op for ops in FAMILIES.values() for op in ops)}")
