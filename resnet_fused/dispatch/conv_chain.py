"""Where the inference chain and the join run, and with which launch configurations: pure functions."""

from __future__ import annotations

from dataclasses import replace

import torch

from resnet_fused.dispatch.conv import (
    MULTIPROCESSORS,
    ConvConfig,
    ConvShape,
    conv_fprop_configurations,
    conv_fprop_heuristic,
    conv_refusal,
    next_power_of_2,
)

# The activation between conv2 and conv3, and the accumulator of the next conv1, stay in registers whole.
MAX_CHAIN_CHANNELS = 128
# (block_m, block_n, block_k, warps, stages)
CHAIN_TILES = (
    (128, 32, 32, 8, 3),
    (128, 64, 64, 8, 3),
    (128, 32, 64, 8, 2),
    (64, 64, 64, 4, 3),
    (64, 32, 64, 4, 3),
    (64, 32, 64, 8, 3),
    (128, 128, 32, 8, 3),
)
TAILS = ("conv_chain", "conv_join", "conv_join_int8")  # the ops that compete with several convolutions
_DTYPES = (torch.float16, torch.bfloat16)
_MIN_CHANNELS_PER_TAP = 32


def chain_refusal(shape: ConvShape, outputs: int, next_channels: int | None, dtype: torch.dtype) -> str | None:
    """Why the Triton `conv_chain` cannot run, or None.

    Args:
        shape: of the first convolution, the 3x3; its k channels stay on the multiprocessor.
        outputs: of the second convolution.
        next_channels: outputs of the last convolution, None without one.
        dtype: of the activations.
    """
    if dtype not in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the chain keeps an activation in the registers of 16-bit tensor cores, got {name}"
    if shape.groups != 1:
        return f"the chain takes one group, got {shape.groups}"
    for what, channels in (("inner", shape.k), ("next", next_channels)):
        if channels is not None and not 1 <= channels <= MAX_CHAIN_CHANNELS:
            return f"the chain's {what} channels must fit one tile of {MAX_CHAIN_CHANNELS}, got {channels}"
    all_channels = [c for c in (shape.c, shape.k, outputs, next_channels) if c is not None]
    if any(c % 8 for c in all_channels):
        return f"the chain reads 16-byte vectors: channels must be multiples of 8, got {all_channels}"
    return conv_refusal(shape)


def chain_tile(channels: int) -> int:
    """The width of the tile that holds all of these channels."""
    return max(16, next_power_of_2(channels))


def _chain(block_m: int, inner: int, following: int, dtype: torch.dtype, arch: int) -> ConvConfig:
    block_n = 64 if inner <= 64 else 32
    stages = 3 if arch in (80, 90, 100) else 2
    return ConvConfig(block_m, block_n, 32, 8 if block_m == 128 else 4, stages)


def conv_chain_heuristic(shape: ConvShape, next_channels: int | None, dtype: torch.dtype, arch: int) -> ConvConfig:
    """block_m pixels; block_n of conv3's outputs at a time, block_k of conv2's inputs.

    Args:
        shape: of the first convolution.
        next_channels: outputs of the last convolution, None without one.
        dtype: of the activations.
        arch: compute capability times ten.
    """
    pixels = shape.n * shape.p * shape.q
    block_m = 128 if pixels >= 128 * MULTIPROCESSORS.get(arch, 128) else 64
    return _chain(block_m, chain_tile(shape.k), chain_tile(next_channels or 1), dtype, arch)


def conv_chain_configurations(inner: int, next_channels: int | None, dtype: torch.dtype, arch: int) -> list[ConvConfig]:
    """Every configuration that `conv_chain_heuristic` can return for these numbers of channels."""
    return [_chain(m, chain_tile(inner), chain_tile(next_channels or 1), dtype, arch) for m in (128, 64)]


def conv_chain_candidates(inner: int, next_channels: int | None, dtype: torch.dtype, arch: int) -> list[ConvConfig]:
    """What `tune` tries beside the heuristic: none of these spills on sm_80 (Triton 3.6) or sm_90 (3.6 and 3.9)."""
    found = conv_chain_configurations(inner, next_channels, dtype, arch)
    for m, n, k, warps, stages in CHAIN_TILES:
        if n <= 64 or max(chain_tile(inner), chain_tile(next_channels or 1)) <= 64:
            found.append(ConvConfig(m, n, k, warps, stages if arch in (80, 90, 100) else 2))
    return list(dict.fromkeys(found))


def chain_flags(outputs: int, next_channels: int | None) -> tuple[str, ...]:
    """What a table must know of a chain beside its first convolution: the channels of the other two."""
    return (f"next {next_channels or 0}", f"outputs {outputs}")


def join_flags(shortcut_channels: int, stride: int) -> tuple[str, ...]:
    """What a table must know of a join beside its first convolution: what the shortcut's reads."""
    return (f"shortcut {shortcut_channels}", f"stride {stride}")


def numbers(flags: tuple[str, ...]) -> dict[str, int]:
    """The flags that say a number: {"next": 64} of "next 64"."""
    return {name: int(number) for name, _, number in (flag.partition(" ") for flag in flags) if number}


def chain_heuristic(shape: ConvShape, dtype: torch.dtype, arch: int, tf32: bool, flags: tuple[str, ...]) -> ConvConfig:
    """`conv_chain_heuristic` by the flags of a problem."""
    return conv_chain_heuristic(shape, numbers(flags)["next"] or None, dtype, arch)


def join_heuristic(shape: ConvShape, dtype: torch.dtype, arch: int, tf32: bool, flags: tuple[str, ...]) -> ConvConfig:
    """`conv_join_heuristic` by the flags of a problem."""
    return conv_join_heuristic(shape, numbers(flags)["shortcut"], dtype, arch, tf32)


def conv_join_heuristic(
    shape: ConvShape, shortcut_channels: int, dtype: torch.dtype, arch: int, tf32: bool = False
) -> ConvConfig:
    """The configuration of the forward convolution that is as deep as the shallower of the two products.

    Args:
        shape: of the convolution that is not the shortcut's.
        shortcut_channels: inputs of the shortcut's convolution.
        dtype: of the activations.
        arch: compute capability times ten.
        tf32: whether fp32 operands may be rounded to TF32.
    """
    channels = max(_MIN_CHANNELS_PER_TAP, min(shape.c, shortcut_channels))
    return conv_fprop_heuristic(replace(shape, c=channels), dtype, arch, tf32, join=True)


def conv_join_configurations(dtype: torch.dtype, arch: int, tf32: bool = False) -> list[ConvConfig]:
    """Every configuration that `conv_join_heuristic` can return."""
    return [config for config in conv_fprop_configurations(dtype, arch, tf32, join=True) if not config.flat]
