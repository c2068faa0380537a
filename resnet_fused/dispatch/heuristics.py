"""Launch parameters and fusions as pure functions of the shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resnet_fused.dispatch.conv import ConvConfig, ConvShape, cdiv


@dataclass(frozen=True)
class Fusion:
    """What the training of a block fuses around one of its convolutions.

    Attributes:
        prologue: the convolution reads the raw output of the one before it and normalises it on the way in (fprop
            and wgrad); else `bn_apply` writes the activation first.
        statistics: its forward forms the batch statistics of its output; else `bn_stats` reads the output again.
        dgrad_epilogue: its dgrad masks with the ReLU of its input and forms the two sums of the batch norm before it
            (the first of a block: those of the batch norms that end the block before, without masking what it
            writes); else `bn_backward_reduce` reads the gradient again.
        dgrad_prologue: its dgrad and wgrad apply the backward of the batch norm behind it on the way in; else
            `bn_backward_apply` writes that gradient first.
    """

    prologue: bool
    statistics: bool = True
    dgrad_epilogue: bool = True
    dgrad_prologue: bool = False


def training(shape: ConvShape, dtype: torch.dtype, arch: int) -> Fusion:
    """The fusions around a convolution of a block that trains on the Triton kernels.

    A prologue transforms each element once for every filter tap and every tile of output channels: free beside the
    loads of a 1x1 up to sm_90, nine times the work in a 3x3. From sm_100 on the matrix units outrun every prologue.
    The backward of batch norm as a prologue reads two activations for one, in dgrad and again in wgrad, which pays
    only where both kernels stay bound by memory: not by default.

    Args:
        shape: the convolution.
        dtype: of the activations; no rule depends on it yet.
        arch: compute capability times ten.
    """
    return Fusion(prologue=(shape.r, shape.s) == (1, 1) and arch < 100)


def partial_rows(pixels: int, channels: int) -> int:
    """How many partial rows a per-channel reduction over `pixels` is split into.

    At least 256 pixels a row, so that the second stage stays negligible; at most 65,536 partial values a statistic,
    which with 64 channels gives 1,024 rows (some eight blocks for every multiprocessor of a large GPU) and with 2,048
    channels 32.
    """
    return max(1, min(pixels // 256, max(16, 65536 // max(channels, 1))))


# A batch norm's second stage reads this many rows in a few steps, which take less than a launch that merges them.
MAX_TILE_ROWS = 512


def statistics_rows(shape: ConvShape, config: ConvConfig) -> int:
    """How many rows of statistics a convolution leaves: one a tile where they are few, so that none are merged.

    Args:
        shape: the convolution.
        config: of `conv_fprop_stats` on it.
    """
    pixels = shape.n * shape.p * shape.q
    tiles = cdiv(pixels, config.block_m)
    return tiles if config.kernel == "pointer" and tiles <= MAX_TILE_ROWS else partial_rows(pixels, shape.k)


def folding_pays(device_type: str, output_elements: int, weight_elements: int) -> bool:
    """Whether to fold batch norm into a convolution's weight in every call, rather than run it as a pass of its own.

    On a CPU folding reads and writes the weight once, and saves reading and writing the result once; twice the
    elements leaves a margin. On a GPU the half a dozen small launches that it takes have not been measured against
    that pass, so there only `freeze` folds, once and for all.
    """
    return device_type == "cpu" and output_elements >= 2 * weight_elements
