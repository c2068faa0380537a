"""The problems of a network: which ops it runs on which shapes, and operands for each to verify and time it with."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from resnet_fused.dispatch import formulation
from resnet_fused.dispatch.choice import ALONE, BLOCK
from resnet_fused.dispatch.conv import MULTIPROCESSORS, BlockShape, ConvShape, cdiv, is_gradient
from resnet_fused.dispatch.conv_chain import chain_flags, join_flags
from resnet_fused.dispatch.table import Choice, Problem
from resnet_fused.measure import cases
from resnet_fused.measure.network import Block, Layer, Network
from resnet_fused.ops import OPS
from resnet_fused.ops.operands import Operands

DTYPES = cases.DTYPES | {"int8": torch.int8}  # of what `tune` and `verify` look at, by name
INT8 = {"conv_fprop": "conv_fprop_int8", "conv_join": "conv_join_int8"}  # what inference runs in int8 instead
CHAIN_CHANNELS = 128
TILES_PROVEN = 3


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
        dtype: of the activations; with int8 there is inference alone.
        arch: compute capability times ten.
        tf32: whether fp32 products may be rounded to TF32.
        alternatives: also those that training would have if it were formulated otherwise, with a weight of 0.
    """
    found: dict[Problem, Job] = {}
    for mode in modes:
        every = _inference(network) if mode == "infer" else _training(network, dtype, arch, alternatives)
        for job in every if dtype != torch.int8 else _in_int8(every):
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


def check_images(problem: Problem, least: int, choice: Choice, arch: int) -> int:
    """The fewest images, and at least so many, on which a choice is proven for the problem's own number: they launch
    the same kernel (Triton compiles another one where the number of pixels is no multiple of a tile, or of 16), and of
    a persistent kernel every program computes several tiles.
    """
    shape = problem.shape
    assert not isinstance(shape, BlockShape)
    sizes = (shape[2:],) if isinstance(shape, tuple) else ((shape.h, shape.w), (shape.p, shape.q))
    images = max(least, wrapping_images(problem, choice, arch))
    while images < problem.batch and any(images * h * w % 128 for h, w in sizes):
        images *= 2
    return min(images, problem.batch)


def wrapping_images(problem: Problem, choice: Choice, arch: int) -> int:
    """The fewest images of which every program of a persistent kernel computes TILES_PROVEN tiles: its ring of buffers
    wraps, and what it stages a result in is used again. 1 where the choice is no persistent kernel.
    """
    shape, config = problem.shape, choice.config
    if config is None or config.kernel == "pointer" or not isinstance(shape, ConvShape):
        return 1
    tiles = TILES_PROVEN * MULTIPROCESSORS[arch]
    _, *written = shape.image if is_gradient(problem.op) else shape.output
    return cdiv(tiles * config.block_m * config.block_n, math.prod(written))


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


def _in_int8(every: Iterable[Job]) -> Iterator[Job]:
    for job in every:
        if job.problem.op in INT8:
            yield dataclasses.replace(job, problem=dataclasses.replace(job.problem, op=INT8[job.problem.op]))


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


def family(problem: Problem) -> tuple[str, ...]:
    """The ops that a choice for the problem decides about."""
    return (problem.op,) if ALONE in problem.flags else OPS[problem.op].family


def also(job: Job) -> tuple[str, ...]:
    """The ops that run a job's problem beside its own."""
    op = job.problem.op
    return tuple(name for name, record in OPS.items() if record.runs_beside(op, _options(job, op)))


def arguments(job: Job, make: Operands, op: str | None = None) -> Any:
    """Sample arguments of the job's op, or of another that runs its problem, as the op's record takes them."""
    op = op or job.problem.op
    return OPS[op].case(make, job.problem.shape, **_options(job, op))


def _options(job: Job, op: str) -> dict[str, Any]:
    """What of a job decides the optional arguments of an op."""
    flags, (first, second) = job.problem.flags, job.following
    joined = bool(flags) and ALONE not in flags
    epilogue = "batch norm" if job.epilogue else "masked residual" if job.residual else ""
    affine = "affine" if "residual" in flags else ""
    facts: dict[str, Any] = {
        **{name: name in flags for name in ("prologue", "x_prologue", "dy_prologue")},
        **dict.fromkeys(("masked", "with_mask", "with_dresidual"), joined),
        "epilogue": epilogue,
        "wgrad": True,
        "residual": affine if isinstance(job.problem.shape, tuple) else job.residual,
        **{"shortcut_channels": first, "shortcut_stride": second, "outputs": first, "following": second},
    }
    taken = inspect.signature(OPS[op].case).parameters
    return {name: value for name, value in facts.items() if name in taken}
