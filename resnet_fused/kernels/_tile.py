"""Device functions that several kernels share, and the host-side views of an activation that go with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._launch import INTERPRETED
from resnet_fused.ops.arithmetic import is_nhwc

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def is_nan(value):
    return value != value  # noqa: PLR0124


@triton.jit
def round_to(value, DTYPE: tl.constexpr):
    """fp32 rounded to the nearest value of DTYPE, ties to even; int8's ends are of what lies beyond them. Triton's
    interpreter truncates to bf16, so there the bits are rounded here.
    """
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(is_nan(value), 0x7FC0, rounded)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif DTYPE == tl.int8:  # 1.5 * 2^23 leaves no bits for a fraction, and the integer in the lowest ones
        clipped = tl.minimum(tl.maximum(value, -128.0), 127.0)
        return (clipped + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return value.to(DTYPE)


@triton.jit
def to_fp32(value):
    """The same value in fp32. Triton's interpreter loses bf16's subnormals, so there the bits are moved here."""
    if _INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def sum_lanes(value, AXIS: tl.constexpr = 0):
    """The sum over a dimension. The GPU adds in a tree; numpy, under the interpreter, one after the other, which fp64
    makes up for.
    """
    if _INTERPRETED:
        return tl.sum(value.to(tl.float64), axis=AXIS).to(tl.float32)
    else:
        return tl.sum(value, axis=AXIS)


@triton.jit
def relu(value):
    """max(value, 0); a NaN stays."""
    return tl.where(value <= 0.0, 0.0, value)


@triton.jit
def identity(value):
    return value


@triton.jit
def silu(value):
    """value * sigmoid(value)."""
    return value / (1.0 + tl.exp(-value))


@triton.jit
def hardswish(value):
    """value * min(max(value + 3, 0), 6) / 6; a NaN stays."""
    clipped = relu(value + 3.0)
    return value * (tl.where(clipped >= 6.0, 6.0, clipped) / 6.0)


# The epilogue functions of an activation by its name in `ops.activations`.
ACTIVATIONS = {None: identity, "relu": relu, "silu": silu, "hardswish": hardswish}


@triton.jit
def affine(x, scale, shift):
    """x * scale + shift in fp32, in one fma wherever it is computed, so that a recomputed ReLU mask is the mask of the
    forward.
    """
    return tl.fma(to_fp32(x), scale, shift)


@triton.jit
def passes_relu(x, scale, shift):
    """The ReLU mask recomputed: not (round(x * scale + shift) <= 0), which a NaN passes."""
    rounded = round_to(affine(x, scale, shift), x.dtype)
    return (to_fp32(rounded) <= 0.0) == 0


@triton.jit
def passes_bit(mask, offset, valid):
    """The ReLU mask as `bn_apply` has stored it, one bit an element; nothing passes where not `valid`."""
    bits = tl.load(mask + offset // 8, mask=valid, other=0).to(tl.int32)
    return ((bits >> (offset % 8).to(tl.int32)) & 1) != 0


@triton.jit
def input_gradient(dz, x, scale, mean, invstd, mean_dy, mean_dy_xhat):
    """scale * (dz - mean(dz) - xhat * mean(dz * xhat)), the gradient of a batch norm that normalises by the batch's own
    statistics.
    """
    xhat = (to_fp32(x) - mean) * invstd
    return scale * tl.fma(-xhat, mean_dy_xhat, dz - mean_dy)


@dataclass(frozen=True)
class Octets:
    """An activation's memory as [rows, octets, 8], so that eight neighbours - 16 bytes of fp16, one byte of a bit mask
    - belong to one thread.

    channel: where an element's channel comes from: "column" (NHWC, C a multiple of 8: its place in the row), "row"
        (NCHW, H*W a multiple of
    8: its row), or "element" (anything else: its index; one octet a row, the last row may be short).
    """

    numel: int
    rows: int
    octets: int
    channels: int
    inner: int  # elements between two channels
    channel: str
    block_rows: int
    block_octets: int

    @property
    def grid(self) -> int:
        return triton.cdiv(self.rows, self.block_rows) * triton.cdiv(self.octets, self.block_octets)


TILE = 4096  # elements of an elementwise tile: 32 a thread, four 16-byte loads of fp16 in flight for each operand


def octets_of(x: Tensor) -> Octets:
    """The [rows, octets, 8] view of a dense NCHW or NHWC tensor, tiled."""
    n, c, h, w = x.shape
    nhwc = is_nhwc(x)
    if nhwc and c % 8 == 0:
        rows, columns, channel = n * h * w, c, "column"
    elif not nhwc and (h * w) % 8 == 0:
        rows, columns, channel = n * c, h * w, "row"
    else:
        rows, columns, channel = triton.cdiv(x.numel(), 8), 8, "element"
    octets = columns // 8
    block_octets = min(64, triton.next_power_of_2(max(octets, 1)))
    block_rows = min(TILE // (8 * block_octets), triton.next_power_of_2(max(rows, 1)))
    return Octets(x.numel(), rows, octets, c, 1 if nhwc else h * w, channel, block_rows, block_octets)


@triton.jit
def octet_tile(
    numel,
    rows,
    octets,
    C,
    inner,
    CHANNEL: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OCTETS: tl.constexpr,
):
    """The program's tile of an `Octets` view: element offsets, which exist, their channels (both [rows, octets, 8] or
    broadcastable to it).
    """
    tiles = tl.cdiv(octets, BLOCK_OCTETS)
    pid = tl.program_id(0)
    row = (pid // tiles).to(INDEX) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    octet = (pid % tiles) * BLOCK_OCTETS + tl.arange(0, BLOCK_OCTETS)
    lane = tl.arange(0, 8)
    offset = (row[:, None, None] * octets + octet[None, :, None]) * 8 + lane[None, None, :]
    if CHANNEL == "element":
        valid = offset < numel
        channel = (offset // inner) % C
    else:
        valid = (row < rows)[:, None, None] & (octet < octets)[None, :, None]
        if CHANNEL == "row":
            channel = (row % C)[:, None, None]
        else:
            channel = tl.minimum(octet, octets - 1)[None, :, None] * 8 + lane[None, None, :]
    return offset, valid, channel


@triton.jit
def mask_tile(rows, octets, INDEX: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OCTETS: tl.constexpr):
    """The same tile's bytes of the bit mask: offsets and which exist, [rows, octets]."""
    tiles = tl.cdiv(octets, BLOCK_OCTETS)
    pid = tl.program_id(0)
    row = (pid // tiles).to(INDEX) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    octet = (pid % tiles) * BLOCK_OCTETS + tl.arange(0, BLOCK_OCTETS)
    return row[:, None] * octets + octet[None, :], (row < rows)[:, None] & (octet < octets)[None, :]


def channel_unit(*channels: int, most: int = 8) -> int:
    """The largest of 8 and 1, up to `most`, that divides all. Kernels get numbers of channels in this unit, since
    triton by itself sees only whether an argument is a multiple of 16, and 16 bytes of fp16 need no more than a
    multiple of 8.
    """
    return next(unit for unit in (16, 8, 1) if unit <= most and all(c % unit == 0 for c in channels))


@dataclass(frozen=True)
class Reduction:
    """A per-channel reduction over the pixels of an activation, split into `rows` equal ranges: one program per range
    and tile of channels.
    """

    channels: int
    inner: int  # H * W
    pixels: int
    rows: int
    span: int  # pixels a range
    nhwc: bool
    block_pixels: int
    block_channels: int

    @property
    def unit(self) -> int:
        return channel_unit(self.channels)

    @property
    def grid(self) -> int:
        return self.rows * triton.cdiv(self.channels, self.block_channels)


REDUCTION_TILE = 2048  # elements of a reduction's tile: 16 a thread, so that the partial sums stay in registers


def reduction_of(x: Tensor, rows: int, tile: int = REDUCTION_TILE, nhwc: bool | None = None) -> Reduction:
    """How to reduce a dense NCHW or NHWC tensor: tiles of `tile` elements lie along the contiguous dimension. One that
    is both is read as `nhwc` says.
    """
    n, c, h, w = x.shape
    pixels = n * h * w
    nhwc = is_nhwc(x) if nhwc is None else nhwc
    span = triton.cdiv(pixels, rows)
    channels, longest = triton.next_power_of_2(max(c, 1)), triton.next_power_of_2(max(span, 1))
    if nhwc:
        block_channels = min(64, channels)
        block_pixels = min(tile // block_channels, longest)
    else:
        block_pixels = min(tile, longest)
        block_channels = min(tile // block_pixels, channels)
    return Reduction(c, h * w, pixels, rows, span, nhwc, block_pixels, block_channels)


@triton.jit
def reduction_tile(C, inner, pixels, span, NHWC: tl.constexpr, INDEX: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """The program's range of pixels and tile of channels: range number, first pixel, end, channels, and the channels'
    offsets.
    """
    tiles = tl.cdiv(C, BLOCK_CHANNELS)
    pid = tl.program_id(0)
    row = pid // tiles
    channel = (pid - row * tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    first = tl.minimum(row.to(INDEX) * span, pixels)
    end = tl.minimum(first + span, pixels)
    if NHWC:
        return row, first, end, channel, channel
    else:
        return row, first, end, channel, channel.to(INDEX) * inner


@triton.jit
def pixel_offset(pixel, C, inner, NHWC: tl.constexpr):
    """Offset of a pixel's channel 0."""
    if NHWC:
        return pixel * C
    else:
        image = pixel // inner
        return image * (C * inner) + (pixel - image * inner)


def partials_like(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    shape = (rows, x.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=x.device), torch.empty(
        shape, dtype=torch.float32, device=x.device
    )
