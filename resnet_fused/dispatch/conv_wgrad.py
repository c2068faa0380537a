"""The launch configurations of the weight gradient: pure functions of shape, dtype and architecture."""

from __future__ import annotations

from dataclasses import replace

import torch

from resnet_fused.dispatch.conv import MULTIPROCESSORS, ConvConfig, ConvShape, cdiv

# With fewer input channels a group, one filter tap cannot fill the 64 rows that wgmma and tcgen05 want: the tile runs
# over (r, s, c) together.
MIN_CHANNELS_PER_TAP = 64
# Two programs for every multiprocessor: one loads while the other multiplies.
PROGRAMS_PER_MULTIPROCESSOR = 2
# A range of pixels has at least this many tiles, so that the pipeline's start and the reduction stay small beside it.
MIN_TILES_PER_SPLIT = 8
# Of fp32 partial sums: what is written and read again.
MAX_PARTIAL_BYTES = 64 * 2**20

Tile = tuple[int, int, int]  # input channels (or rows of (r, s, c)), output channels, warps


def _tiles(dtype: torch.dtype, tf32: bool, aligned: bool, prologue: bool) -> list[Tile]:
    """From the most efficient to the narrowest."""
    if dtype == torch.float32 and not tf32:
        return [(64, 64, 8), (64, 32, 8), (64, 16, 8)]
    small = [(64, 64, 4), (64, 32, 4), (64, 16, 4)]
    warps = 8 if prologue else 4  # a prologue keeps its tile in registers
    return [(128, 128, 8), (128, 64, warps), (64, 128, warps), *small] if aligned else small


def _configure(
    tile: Tile, flat: bool, aligned: bool, dtype: torch.dtype, arch: int, tf32: bool, dy_prologue: bool
) -> ConvConfig:
    block_m, block_n, num_warps = tile
    tensor_cores = dtype != torch.float32 or tf32
    # Without vectors every element has an address of its own, and half the pixels keep them in registers.
    block_k = (64 if aligned else 32) * 2 // dtype.itemsize if tensor_cores else 16
    stage = (block_m + (2 if dy_prologue else 1) * block_n) * block_k * dtype.itemsize
    # Half of the shared memory, for two programs a multiprocessor; but where there is much, no fewer than three stages.
    budget, fewest = (112 * 1024, 3) if arch in (80, 90, 100) else (80 * 1024, 2)
    num_stages = max(fewest, min(4 if arch != 80 else 3, budget // stage)) if tensor_cores else 2
    return ConvConfig(block_m, block_n, block_k, num_warps, num_stages, flat)


def conv_wgrad_heuristic(
    shape: ConvShape,
    dtype: torch.dtype,
    arch: int,
    tf32: bool = False,
    *,
    x_prologue: bool = False,
    dy_prologue: bool = False,
) -> ConvConfig:
    """The tile that pads the problem least, and as many ranges of pixels as fill the GPU with it.

    Args:
        shape: the problem, as of the forward.
        dtype: of dy and x.
        arch: compute capability times ten, 80 for sm_80.
        tf32: whether fp32 operands may be rounded to TF32.
        x_prologue: x is a raw convolution output behind an affine map and ReLU.
        dy_prologue: dy is behind the backward of a batch norm.
    """
    inputs, outputs = shape.c // shape.groups, shape.k // shape.groups
    aligned = inputs % 8 == 0 and outputs % 8 == 0
    flat = inputs < MIN_CHANNELS_PER_TAP
    rows, taps = (shape.r * shape.s * inputs, 1) if flat else (inputs, shape.r * shape.s)

    def padded(tile: Tile) -> int:
        return cdiv(rows, tile[0]) * tile[0] * cdiv(outputs, tile[1]) * tile[1]

    tiles = _tiles(dtype, tf32, aligned, x_prologue or dy_prologue)
    tile = min(tiles, key=padded)  # of those that pad alike the first, which is the largest
    config = _configure(tile, flat, aligned, dtype, arch, tf32, dy_prologue)
    programs = cdiv(rows, tile[0]) * taps * cdiv(outputs, tile[1]) * shape.groups
    wanted = cdiv(PROGRAMS_PER_MULTIPROCESSOR * MULTIPROCESSORS.get(arch, 128), programs)
    longest = shape.n * shape.p * shape.q // (MIN_TILES_PER_SPLIT * config.block_k)
    weight_bytes = 4 * shape.k * inputs * shape.r * shape.s
    return replace(config, splits=max(1, min(wanted, longest, MAX_PARTIAL_BYTES // weight_bytes)))


def conv_wgrad_configurations(
    dtype: torch.dtype,
    arch: int,
    tf32: bool = False,
    *,
    x_prologue: bool = False,
    dy_prologue: bool = False,
    aligned: bool | None = None,
) -> list[ConvConfig]:
    """Every configuration that `conv_wgrad_heuristic` can return, but for the number of splits: no kernel depends on
    it.

    Args:
        aligned: only those for channels that are multiples of 8, or only those for others; None: both.
    """
    found = [
        _configure(tile, flat, vectors, dtype, arch, tf32, dy_prologue)
        for vectors in ((True, False) if aligned is None else (aligned,))
        for tile in _tiles(dtype, tf32, vectors, x_prologue or dy_prologue)
        for flat in (False, True)
    ]
    return list(dict.fromkeys(found))


def conv_wgrad_candidates(shape: ConvShape, dtype: torch.dtype, arch: int, tf32: bool = False) -> list[ConvConfig]:
    """Configurations that no heuristic returns and `tune` tries, but for the number of splits: larger tiles of 16-bit
    data where there is the shared memory for them. None of these spills on sm_90 (Triton 3.6 and 3.9).
    """
    inputs, outputs = shape.c // shape.groups, shape.k // shape.groups
    if dtype == torch.float32 or arch not in (80, 90, 100) or inputs % 8 or outputs % 8:
        return []
    tiles = [(128, 128, 4, 4), (128, 256, 8, 3), (256, 128, 8, 3), (64, 256, 8, 3), (256, 64, 8, 3), (128, 64, 4, 4)]
    taps = shape.r * shape.s
    return [
        ConvConfig(m, n, 64, warps, stages, flat=m > inputs)
        for m, n, warps, stages in tiles
        if n <= outputs and m <= (inputs if inputs >= 128 else taps * inputs)
    ]
