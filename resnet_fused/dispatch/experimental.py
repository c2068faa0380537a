"""Candidates that stand on experimental Triton APIs: what they can run, with which configurations, and the arithmetic
of their boxes. Pure functions; nothing here is ever a default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from resnet_fused.dispatch.conv import ConvConfig, ConvShape, is_gradient

# Formulation -> compute capabilities, times ten, that it is for. sm_120 has TMA, but no instruction that multiplies
# from shared memory to gain by it, and the ptxas of Triton 3.6 puts calls with stack frames around its copies.
ARCHITECTURES = {
    "tma_gemm": (90, 100),  # 1x1, stride 1, as a persistent matrix product; operands by TMA
    "tma_conv": (90, 100),  # any filter as boxes of pixels, one box a tap
    "tma_gemm_ws": (100,),  # the same, warp-specialised by the compiler
    "tma_conv_ws": (100,),
    "wgmma_conv": (90,),  # Gluon: boxes by a producer warp, wgmma; forward and data gradient
    "tcgen05_conv": (100,),  # Gluon: boxes by a producer warp, tcgen05 with the accumulator in tensor memory
}
KERNELS = tuple(ARCHITECTURES)
GRADIENTS = ("wgmma_conv",)  # those that have the data gradient too
DTYPES = (torch.float16, torch.bfloat16)
ALIGNMENT = 8  # 16-bit elements in the 16 bytes to which every stride of a TMA descriptor is a multiple


@dataclass(frozen=True)
class View:
    """A tensor as a TMA descriptor sees it, in elements: shape, strides, and the box that one copy moves. What a box
    reads outside the shape is zero; what it writes there is dropped.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


@dataclass(frozen=True)
class Tiling:
    """How output pixels are cut into boxes of block_m, and the views of the operands that go with it.

    Attributes:
        grid: (n, p, q) of the output as it is tiled: a 1x1 convolution of stride 1 has one row of all its pixels.
        box: (n, p, q) of a tile, powers of two, their product block_m.
        stride2: whether x is the 5-D view [n, h/2, 2, w/2, 2*c] that splits rows and columns into even and odd ones.
    """

    grid: tuple[int, int, int]
    box: tuple[int, int, int]
    stride2: bool
    x: View
    weight: View
    y: View

    @property
    def tiles(self) -> int:
        """Boxes of pixels; each is a tile for every block_n of channels."""
        return math.prod(-(-size // step) for size, step in zip(self.grid, self.box, strict=True))


def pixel_box(n: int, p: int, q: int, block_m: int) -> tuple[int, int, int]:
    """The box (n, p, q) of block_m pixels that covers the output with the fewest tiles, then the least halo."""

    def cost(box: tuple[int, int, int]) -> tuple[int, int]:
        tiles = math.prod(-(-size // step) for size, step in zip((n, p, q), box, strict=True))
        return tiles, box[0] * (box[1] + 2) * (box[2] + 2)

    powers = [1 << i for i in range(block_m.bit_length())]
    return min(((block_m // (h * w), h, w) for h in powers for w in powers if h * w <= block_m), key=cost)


def tiling(shape: ConvShape, config: ConvConfig) -> Tiling:
    """The boxes and views of a problem that `refuse_shape` does not refuse."""
    n, c, h, w, k, p, q = shape.n, shape.c, shape.h, shape.w, shape.k, shape.p, shape.q
    taps = shape.r * shape.s
    grid, stride2 = (n, p, q), False
    image: tuple[int, ...]
    strides: tuple[int, ...]
    if taps == 1:  # the pixels that count, and no others
        sh, sw = shape.stride
        image, strides = (n, p, q, c), (h * w * c, sh * w * c, sw * c, 1)
        if shape.stride == (1, 1):
            grid, image, strides = (1, 1, n * p * q), (1, 1, n * p * q, c), (n * p * q * c, n * p * q * c, c, 1)
    elif shape.stride == (2, 2):
        stride2 = True
        image, strides = (n, h // 2, 2, w // 2, 2 * c), (h * w * c, 2 * w * c, w * c, 2 * c, 1)
    else:
        image, strides = (n, h, w, c), (h * w * c, w * c, c, 1)
    box = pixel_box(*grid, config.block_m)
    columns = (box[2], config.block_k)
    x_box = (box[0], box[1], 1, *columns) if stride2 else (box[0], box[1], *columns)
    rows = grid[1] * grid[2] * k
    return Tiling(
        grid,
        box,
        stride2,
        View(image, strides, x_box),
        View((k, taps * c), (taps * c, 1), (config.block_n, config.block_k)),
        View((*grid, k), (rows, grid[2] * k, k, 1), (*box, config.block_n)),
    )


def adjoint(shape: ConvShape) -> ConvShape:
    """The convolution of dy, under the filter turned around, that is the data gradient of one of stride 1."""
    filter = zip((shape.r, shape.s), shape.padding, shape.dilation, strict=True)
    pad_h, pad_w = (dilation * (size - 1) - pad for size, pad, dilation in filter)
    n, k, p, q = shape.output
    return ConvShape(n, k, p, q, shape.c, shape.r, shape.s, padding=(pad_h, pad_w), dilation=shape.dilation)


def gradient_tiling(shape: ConvShape, config: ConvConfig) -> Tiling:
    """`tiling` of the data gradient of a problem that `refuse_shape` does not refuse for it: x is dy, y is dx, and the
    weight is read as it lies, [K, R*S*C], so that a box is block_k rows of block_n input channels of one tap.
    """
    columns = shape.r * shape.s * shape.c
    weight = View((shape.k, columns), (columns, 1), (config.block_k, config.block_n))
    return replace(tiling(adjoint(shape), config), weight=weight)


def refuse_shape(
    shape: ConvShape, dtype: torch.dtype, arch: int, config: ConvConfig, op: str = "conv_fprop"
) -> str | None:
    """Why `config` cannot run a problem of an op on an architecture, or None."""
    if config.kernel not in ARCHITECTURES:
        return f"no experimental kernel {config.kernel!r}; choose one of {', '.join(KERNELS)}"
    if arch not in ARCHITECTURES[config.kernel]:
        needed = ", ".join(f"sm_{arch}" for arch in ARCHITECTURES[config.kernel])
        return f"{config.kernel} needs {needed}, the GPU is sm_{arch}"
    if dtype not in DTYPES:
        return f"{config.kernel} takes float16 and bfloat16, got {str(dtype).removeprefix('torch.')}"
    if shape.groups != 1:
        return f"{config.kernel} has no groups, got {shape.groups}"
    if shape.c % ALIGNMENT or shape.k % ALIGNMENT:
        return f"TMA needs channels in multiples of {ALIGNMENT}, got {shape.c} and {shape.k}"
    if min(shape.n, shape.p, shape.q) < 1:
        return f"nothing to compute: the output is {shape.n}x{shape.p}x{shape.q} pixels"
    gradient = is_gradient(op)
    if gradient and config.kernel not in GRADIENTS:
        return f"{config.kernel} has no data gradient; choose 'pointer' or one of {', '.join(GRADIENTS)}"
    if gradient and shape.stride != (1, 1):
        return f"{config.kernel} takes data gradients of stride 1, got {shape.stride}"
    unpadded_1x1 = (shape.r, shape.s, *shape.padding) == (1, 1, 0, 0)
    if config.kernel.startswith("tma_gemm"):
        if not unpadded_1x1 or shape.stride != (1, 1):
            return f"{config.kernel} is for 1x1 filters of stride 1 without padding"
        return None
    reduced = shape.k if gradient else shape.c
    if reduced % config.block_k:
        return f"{config.kernel} reduces {config.block_k} channels at a time, which does not divide {reduced}"
    if (shape.r, shape.s) == (1, 1):
        return None if unpadded_1x1 else f"{config.kernel} takes 1x1 filters only without padding, got {shape.padding}"
    if shape.stride == (1, 1):
        return None
    if shape.stride == (2, 2) and shape.dilation == (1, 1) and shape.h % 2 == 0 and shape.w % 2 == 0:
        return None
    return (
        f"{config.kernel} takes stride 1, or stride 2 with dilation 1 and an image of even height and width; got "
        f"stride {shape.stride}, dilation {shape.dilation}, {shape.h}x{shape.w}"
    )


def configurations(arch: int, op: str = "conv_fprop") -> list[ConvConfig]:
    """Every candidate configuration of an op on an architecture, forward with or without statistics: what `tune`
    measures and the compile gate compiles.
    """
    # (block_m, block_n, block_k, num_warps, num_stages)
    small = (64, 64, 64, 4, 4)
    hopper = [(128, 128, 64, 4, 4), (128, 128, 64, 8, 4), (256, 64, 64, 8, 3), (128, 64, 64, 4, 4), small]
    narrow = [(128, 64, 64, 4, 6), (64, 64, 64, 4, 8)]
    wgmma = [(128, 128, 64, 8, 4), (256, 64, 64, 8, 4), *narrow]
    gradient = [(128, 128, 64, 8, 4), (256, 64, 64, 8, 3), *narrow]  # with operands of the epilogue in shared memory
    blackwell = [(128, 128, 64, 8, 4), (128, 64, 64, 4, 4)]
    specialized = [(128, 128, 64, 8, 3), (128, 64, 64, 4, 4)]
    tiles = {
        90: {"tma_gemm": hopper, "tma_conv": hopper, "wgmma_conv": wgmma},
        100: {
            "tma_gemm": blackwell,
            "tma_conv": blackwell,
            "tma_gemm_ws": specialized,
            "tma_conv_ws": specialized,
            "tcgen05_conv": [(128, 128, 64, 8, 4), (128, 64, 64, 4, 6)],
        },
    }
    if is_gradient(op):
        tiles = {90: {"wgmma_conv": gradient}}
    return [ConvConfig(*tile, kernel=kernel) for kernel, listed in tiles.get(arch, {}).items() for tile in listed]
