"""The convolution problem and its launch configurations: pure functions of shape, dtype and architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

# Streaming multiprocessors by compute capability, for "does this grid fill the GPU". An upper bound within a family is
# good enough.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}
# Below this many channels a group, one tap of the filter cannot fill a tile of the reduction: the tile runs over
# (r, s, c) together.
MIN_CHANNELS_PER_TAP = 32
MAX_WGRAD_PIXELS = 2**31 - 2**20
# A pixel's mask of taps keeps filter rows in bits 0-14 and filter columns in bits 16-30 of an int32.
MAX_FILTER = 15
# As many as there are: without being told, ptxas spills a few to let one more block onto the multiprocessor.
MAX_REGISTERS = 255
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ConvShape:
    """The problem: x [n, c, h, w], weight [k, c/groups, r, s]; the same for fprop, dgrad and wgrad."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(
        cls,
        image: Sequence[int],
        filter: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int = 1,
    ) -> ConvShape:
        """The problem of an image [N, C, H, W] under a filter [K, C/groups, R, S]."""
        n, c, h, w = image
        k, _, r, s = filter
        pairs = ((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]))
        return cls(n, c, h, w, k, r, s, *pairs, groups)

    @property
    def image(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def output(self) -> tuple[int, int, int, int]:
        return self.n, self.k, self.p, self.q

    @property
    def filter(self) -> tuple[int, int, int, int]:
        return self.k, self.c // self.groups, self.r, self.s

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def p(self) -> int:
        """Rows of the output."""
        return (self.h + 2 * self.padding[0] - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1

    @property
    def q(self) -> int:
        """Columns of the output."""
        return (self.w + 2 * self.padding[1] - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1


@dataclass(frozen=True)
class BlockShape:
    """A chain of convolutions, each behind the batch norm and ReLU of the one before, and what is added at its end.

    Attributes:
        branch: in order.
        shortcut: the projection of the input that is added, or None.
        identity: the input itself is added.
    """

    branch: tuple[ConvShape, ...]
    shortcut: ConvShape | None = None
    identity: bool = False

    @property
    def n(self) -> int:
        return self.branch[0].n

    def with_batch(self, n: int) -> BlockShape:
        shortcut = None if self.shortcut is None else replace(self.shortcut, n=n)
        return replace(self, branch=tuple(replace(conv, n=n) for conv in self.branch), shortcut=shortcut)


@dataclass(frozen=True)
class ConvConfig:
    """A launch configuration of the implicit matrix product [block_m, block_k] x [block_k, block_n].

    fprop: output pixels x output channels, reduced over (r, s, c). dgrad: input pixels x input channels, reduced over
    (r, s, k). wgrad: input channels x output channels of one filter tap, reduced over output pixels.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    flat: bool = False  # fprop, wgrad: the tiles of the (r, s, c) dimension run over all of it, not tap by tap
    splits: int = 1  # wgrad: into how many ranges the pixels are split, summed in a fixed order
    kernel: str = "pointer"  # which formulation: "pointer", or one of `kernels/experimental.py`
    max_registers: int = MAX_REGISTERS  # a thread, of "pointer" but for wgrad and the chain


def conv_refusal(shape: ConvShape) -> str | None:
    """Why the Triton convolutions cannot run a geometry, forward or backward, or None."""
    if shape.k == 0 or shape.c == 0:
        return f"a convolution without channels: {shape.c} in, {shape.k} out"
    if max(shape.r, shape.s) > MAX_FILTER:
        return f"filters are at most {MAX_FILTER}x{MAX_FILTER}, got {shape.r}x{shape.s}"
    if shape.p < 1 or shape.q < 1:
        image = f"{shape.h}x{shape.w} + 2 * {shape.padding}"
        return f"the filter {shape.r}x{shape.s} with dilation {shape.dilation} is larger than the padded image {image}"
    return None


def dgrad_refusal(shape: ConvShape) -> str | None:
    """Why `conv_dgrad` cannot run a geometry, or None: its parity classes assume that a strided filter is dense."""
    reason = conv_refusal(shape)
    if reason is None and any(s > 1 and d > 1 for s, d in zip(shape.stride, shape.dilation, strict=True)):
        return (
            "the data gradient takes dilation at stride 1 and stride at dilation 1, "
            f"got stride {shape.stride} with dilation {shape.dilation}"
        )
    return reason


def wgrad_refusal(shape: ConvShape) -> str | None:
    """Why the Triton `conv_wgrad` cannot run a geometry, or None. It counts pixels in 32 bits, offsets in 64."""
    reason = conv_refusal(shape)
    if reason is None and shape.n * shape.p * shape.q > MAX_WGRAD_PIXELS:
        return f"the output has at most {MAX_WGRAD_PIXELS} pixels, got {shape.n * shape.p * shape.q}"
    return reason


TRAINING_OPS = ("conv_fprop_stats", "conv_dgrad", "conv_wgrad")  # of a layer


def training_refusal(shape: ConvShape, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels of `TRAINING_OPS` cannot run a geometry, or None."""
    if dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        return f"the kernels take {names}, got {str(dtype).removeprefix('torch.')}"
    return dgrad_refusal(shape) or wgrad_refusal(shape)


def tf32_allowed() -> bool:
    """PyTorch's switch for convolutions; `torch.backends.cudnn.allow_tf32` sets it too."""
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"


def uses_tf32(dtype: torch.dtype) -> bool:
    """Whether operands of this dtype are rounded to TF32 where they are multiplied."""
    return dtype == torch.float32 and tf32_allowed()


def next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


Tile = tuple[int, int, int]  # block_m, block_n, num_warps


def _tiles(
    dtype: torch.dtype, arch: int, tf32: bool, prologue: bool = False, flat: bool = False, join: bool = False
) -> list[Tile]:
    """From the most efficient to the one that makes the most programs. A prologue holds a tile of activations in
    registers too, a flat reduction the places of all its taps: more warps to share them.
    """
    if dtype == torch.float32 and not tf32:
        # No tensor cores, hence smaller tiles. 64x64 on 4 warps is left out: ptxas spills to reach another occupancy.
        return [(64 if prologue or flat else 128, 64, 8), (64, 32, 4), (32, 32, 4)]
    # of a larger tile the epilogue spills for sm_100 (Triton 3.8), and the products are serialised for sm_90 (3.6)
    if dtype == torch.float32 and arch in (90, 100):
        return [(128, 64, 8), (64, 64, 4), (64, 32, 4), (64, 16, 4)]
    tiles = [(128, 128, 8), (128, 64, 8 if prologue else 4), (64, 64, 4), (64, 32, 4), (64, 16, 4)]
    if dtype == torch.int8 and (join or arch == 100):  # spills: a join has two sums, for sm_100 the epilogue is long
        tiles[:2] = [(128, 64, 8)]
    return tiles


def _choose(tiles: list[Tile], pixels: int, outputs: int, groups: int, arch: int) -> Tile:
    """The largest tile, no wider than the output, that still gives every multiprocessor a program."""
    narrow = [tile for tile in tiles if tile[1] <= next_power_of_2(outputs)] or tiles[-1:]
    multiprocessors = MULTIPROCESSORS.get(arch, 128)
    fill = (tile for tile in narrow if cdiv(pixels, tile[0]) * cdiv(outputs, tile[1]) * groups >= multiprocessors)
    return next(fill, narrow[-1])


def _configure(
    tile: Tile, channels: int, dtype: torch.dtype, arch: int, tf32: bool, flat: bool = False, operands: int = 1
) -> ConvConfig:
    """A tile with the depth of its reduction and of its pipeline; `operands` activations are read for one weight."""
    block_m, block_n, num_warps = tile
    tensor_cores, eight = dtype != torch.float32 or tf32, dtype == torch.int8
    widest = 128 // dtype.itemsize if tensor_cores else 16
    least, longest_flat = (32, 64) if eight else (16, 32)  # a product of 8 bits takes 32 at a time
    block_k = min(widest, longest_flat) if flat else min(widest, max(least, next_power_of_2(channels)))
    stage = (operands * block_m + block_n) * block_k * dtype.itemsize
    budget = (160 if arch in (80, 90, 100) else 96) * 1024
    num_stages = max(2, min(4 if arch != 80 else 3, budget // stage)) if tensor_cores else 2
    return ConvConfig(block_m, block_n, block_k, num_warps, num_stages, flat)


def _fprop(tile: Tile, channels: int, dtype: torch.dtype, arch: int, tf32: bool) -> ConvConfig:
    return _configure(tile, channels, dtype, arch, tf32, flat=channels < MIN_CHANNELS_PER_TAP)


def conv_fprop_heuristic(
    shape: ConvShape,
    dtype: torch.dtype,
    arch: int,
    tf32: bool = False,
    *,
    prologue: bool = False,
    statistics: bool = False,
    join: bool = False,
) -> ConvConfig:
    """The configuration for a problem: the largest tile, no wider than the output, that still gives every
    multiprocessor a program.

    Args:
        shape: the problem.
        dtype: of x and weight.
        arch: compute capability times ten, 80 for sm_80.
        tf32: whether fp32 operands may be rounded to TF32.
        prologue: x is a raw convolution output behind an affine map and ReLU.
        statistics: of the output, in the epilogue.
        join: a second product is added, of int8 in sums of its own.
    """
    channels = shape.c // shape.groups
    tiles = _tiles(dtype, arch, tf32, prologue, channels < MIN_CHANNELS_PER_TAP, join)
    tile = _choose(tiles, shape.n * shape.p * shape.q, shape.k // shape.groups, shape.groups, arch)
    return _fprop(tile, channels, dtype, arch, tf32)


def conv_fprop_configurations(
    dtype: torch.dtype,
    arch: int,
    tf32: bool = False,
    *,
    prologue: bool = False,
    statistics: bool = False,
    join: bool = False,
) -> list[ConvConfig]:
    """Every configuration that `conv_fprop_heuristic` can return."""
    found = [
        _fprop(tile, channels, dtype, arch, tf32)
        for channels in (3, 32, 64, 128)
        for tile in _tiles(dtype, arch, tf32, prologue, channels < MIN_CHANNELS_PER_TAP, join)
    ]
    return list(dict.fromkeys(found))


def _dgrad(tile: Tile, channels: int, dtype: torch.dtype, arch: int, tf32: bool, prologue: bool) -> ConvConfig:
    return _configure(tile, channels, dtype, arch, tf32, operands=2 if prologue else 1)


def conv_dgrad_heuristic(
    shape: ConvShape, dtype: torch.dtype, arch: int, tf32: bool = False, *, prologue: bool = False
) -> ConvConfig:
    """As `conv_fprop_heuristic`: the output is the image, the reduction runs over the output channels.

    Args:
        shape: the problem, as of the forward.
        dtype: of dy and weight.
        arch: compute capability times ten.
        tf32: whether fp32 operands may be rounded to TF32.
        prologue: dy is behind the backward of a batch norm.
    """
    tile = _choose(
        _tiles(dtype, arch, tf32, prologue), shape.n * shape.h * shape.w, shape.c // shape.groups, shape.groups, arch
    )
    return _dgrad(tile, shape.k // shape.groups, dtype, arch, tf32, prologue)


def conv_dgrad_configurations(
    dtype: torch.dtype, arch: int, tf32: bool = False, *, prologue: bool = False
) -> list[ConvConfig]:
    """Every configuration that `conv_dgrad_heuristic` can return."""
    tiles = _tiles(dtype, arch, tf32, prologue)
    found = [_dgrad(tile, channels, dtype, arch, tf32, prologue) for tile in tiles for channels in (16, 32, 64)]
    return list(dict.fromkeys(found))


def is_gradient(op: str) -> bool:
    """Whether it is the data gradient, which writes an image."""
    return op == "conv_dgrad"


def channels_of(op: str, shape: ConvShape) -> tuple[int, int]:
    """Of a group, those that an op reduces over and those that it writes."""
    channels, outputs = shape.c // shape.groups, shape.k // shape.groups
    return (outputs, channels) if is_gradient(op) else (channels, outputs)


def conv_candidates(
    op: str, shape: ConvShape, dtype: torch.dtype, arch: int, tf32: bool = False, *, prologue: bool = False
) -> list[ConvConfig]:
    """Configurations of `conv_fprop`, `conv_fprop_stats` and `conv_dgrad` that no heuristic returns and `tune` tries:
    larger and narrower tiles of 16-bit data where there is the shared memory for them, with statistics the largest of
    which two fit onto a multiprocessor, and where one tap has few channels tiles over (r, s, c) together. The compile
    gate has them all.
    """
    channels, outputs = channels_of(op, shape)
    taps = shape.r * shape.s
    if dtype in (torch.float32, torch.int8) or arch not in (80, 90, 100):
        return []
    tiles = [(256, 64, 8), (64, 128, 4), (64, 256, 8)]
    if not is_gradient(op):  # whose epilogue needs the registers
        tiles += [(256, 128, 8)]
    if op == "conv_fprop_stats":  # without a residual
        tiles += [(128, 128, 4), (128, 256, 8)]
    narrow = [tile for tile in tiles if tile[1] <= next_power_of_2(outputs)]
    found = [_configure(tile, channels, dtype, arch, tf32) for tile in narrow]
    found += [replace(config, num_stages=config.num_stages - 1) for config in found[:2] if config.num_stages > 2]
    if op == "conv_fprop_stats" and arch != 80 and outputs >= 128:  # where it would spill
        wide = _configure((128, 128, 8), channels, dtype, arch, tf32)
        found.append(replace(wide, num_stages=2, max_registers=128))
    if not is_gradient(op) and taps > 1 and MIN_CHANNELS_PER_TAP <= channels <= 64:
        found += [
            _configure(tile, channels, dtype, arch, tf32, flat=True) for tile in _tiles(dtype, arch, tf32, prologue)[:2]
        ]
    return found


# By op; the statistics of `conv_fprop_stats` change nothing.
HEURISTICS: dict[str, Callable[..., ConvConfig]] = {
    "conv_fprop": conv_fprop_heuristic,
    "conv_fprop_int8": conv_fprop_heuristic,
    "conv_fprop_stats": conv_fprop_heuristic,
    "conv_dgrad": conv_dgrad_heuristic,
}
CONFIGURATIONS: dict[str, Callable[..., list[ConvConfig]]] = {
    "conv_fprop": conv_fprop_configurations,
    "conv_fprop_int8": conv_fprop_configurations,
    "conv_fprop_stats": conv_fprop_configurations,
    "conv_dgrad": conv_dgrad_configurations,
}
