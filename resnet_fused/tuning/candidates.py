"""What competes for a problem: native PyTorch, and every backend and launch configuration that could serve it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from resnet_fused import ops
from resnet_fused.dispatch import choice as plans
from resnet_fused.dispatch import conv, conv_chain, conv_wgrad, experimental
from resnet_fused.dispatch.choice import ALONE, BLOCK
from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.table import Choice, Problem
from resnet_fused.ops.backends import CUDNN
from resnet_fused.tuning.calls import backends
from resnet_fused.tuning.problems import Job, family


def candidates(job: Job, device: torch.device, arch: int, quick: bool = False) -> list[Choice]:
    """Every choice for a job that can run here; the heuristic's configuration is the first of Triton's.

    Args:
        job: the problem.
        device: where.
        arch: compute capability times ten.
        quick: of the configurations only the heuristic's.
    """
    problem = job.problem
    found = [] if ALONE in problem.flags else [Choice("aten")]
    if problem.op == BLOCK:
        return found + [Choice(backend) for backend in backends(device)]
    for backend in backends(device):
        if not all(ops.implements(backend, op) for op in family(problem)):
            continue
        if backend == "triton" and problem.op in plans.CONVOLUTIONS:
            listed = configurations(problem, arch, quick, job.residual)
            found += [Choice(backend, config) for config in listed]
        else:
            found.append(Choice(backend))
    if problem.op in CUDNN and ops.available("cudnn", device.type):
        found.append(Choice("cudnn"))
    return found


def configurations(problem: Problem, arch: int, quick: bool = False, residual: bool = False) -> list[ConvConfig]:
    """The launch configurations of a Triton convolution, the heuristic's first.

    Args:
        problem: the convolution.
        arch: compute capability times ten.
        quick: only the heuristic's.
        residual: it also adds a residual, which takes registers.
    """
    shape = problem.shape
    first = plans.heuristic(problem, arch)
    assert first is not None and isinstance(shape, ConvShape)
    if quick:
        return [first]
    flags: dict[str, Any] = dict.fromkeys((flag for flag in problem.flags if "prologue" in flag), True)
    arguments = (problem.dtype, arch, problem.tf32)
    if problem.op == "conv_chain":
        told = conv_chain.numbers(problem.flags)
        every = conv_chain.conv_chain_candidates(shape.k, told["next"] or None, problem.dtype, arch)
        return list(dict.fromkeys([first, *every]))
    if problem.op == "conv_wgrad":
        tiles = conv_wgrad.conv_wgrad_configurations(*arguments, **flags)
        tiles = [tile for tile in tiles if (tile.flat, tile.block_k) == (first.flat, first.block_k)]
        every = [
            dataclasses.replace(tile, splits=splits)
            for tile in (*tiles, *conv_wgrad.conv_wgrad_candidates(shape, *arguments))
            for splits in _splits(tile, first)
        ]
        return list(dict.fromkeys([first, *(config for config in every if _promises(config, first))]))
    if problem.op in ("conv_join", "conv_join_int8"):
        every = conv_chain.conv_join_configurations(*arguments)
    else:
        every = conv.CONFIGURATIONS[problem.op](*arguments, **flags)
    every = [config for config in every if (config.flat, config.block_k) == (first.flat, first.block_k)]
    more = [] if first.flat else conv.conv_candidates(problem.op, shape, *arguments, **flags)
    every += [config for config in more if config.block_m * config.block_n < 128 * 256 or not residual]
    _, outputs = conv.channels_of(problem.op, shape)
    every = [c for c in every if _promises(c, first) and c.block_n <= max(16, conv.next_power_of_2(outputs))]
    if problem.op in conv.CONFIGURATIONS and not flags:
        listed = experimental.configurations(arch, problem.op)
        product = (shape.r, shape.s, shape.stride) == (1, 1, (1, 1))  # which boxes of pixels would only cut up
        listed = [c for c in listed if not (product and c.kernel.startswith("tma_conv"))]
        listed = [c for c in listed if c.block_n <= max(64, outputs)]
        every += [c for c in listed if experimental.refuse_shape(shape, problem.dtype, arch, c, problem.op) is None]
    return list(dict.fromkeys([first, *every]))


def _splits(tile: ConvConfig, first: ConvConfig) -> list[int]:
    """Ranges of pixels that make about as many programs as the heuristic's; of its own tile also half and twice."""
    same = first.splits * tile.block_m * tile.block_n / (first.block_m * first.block_n)
    own = (tile.block_m, tile.block_n) == (first.block_m, first.block_n)
    return sorted({max(1, round(same * factor)) for factor in ((0.5, 1.0, 2.0) if own else (1.0,))})


def _promises(config: ConvConfig, first: ConvConfig) -> bool:
    """Whether a tile can come near the heuristic's: it loads at most twice as much for a product, and is at most four
    times as large, as the heuristic's is the largest that fills the GPU.
    """
    loads, usual = (1 / one.block_m + 1 / one.block_n for one in (config, first))
    return loads <= 2 * usual and config.block_m * config.block_n <= 4 * first.block_m * first.block_n
