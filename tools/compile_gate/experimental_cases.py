"""What the Triton compile gate compiles of the experimental formulations: every configuration the plan lists."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from resnet_fused.dispatch import formulation
from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.experimental import DTYPES, configurations, refuse_shape
from resnet_fused.ops import conv_backward
from resnet_fused.ops import conv_fprop as plain
from resnet_fused.ops import conv_fprop_stats as stats
from tools.compile_gate.expect import TYPES, Case, Expect, activation, sample

_, DGRAD, _ = formulation.OPS


def experimental_cases(arch: int, quick: bool) -> Iterator[Case]:
    """With every epilogue and kind of filter that compiles to different code; quick: bf16, the whole epilogue, which
    needs the most registers, one configuration with statistics for every formulation, and data gradients with the most
    that they are asked to hold.
    """
    from resnet_fused.kernels.experimental import available

    seen = set()
    for config in configurations(arch):
        if available(config.kernel) is not None:  # the gate says so
            continue
        shapes = _shapes(config)
        if quick:
            what = max(shapes, key=lambda what: what == "3x3")
            yield _conv(config, torch.bfloat16, shapes[what], what, "epilogue")
            if config.kernel not in seen:
                yield _conv(config, torch.bfloat16, shapes[what], what, "statistics")
            seen.add(config.kernel)
            continue
        for (what, shape), dtype, epilogue in itertools.product(shapes.items(), DTYPES, ("epilogue", "statistics", "")):
            yield _conv(config, dtype, shape, what, epilogue)
    for config in configurations(arch, DGRAD):
        if available(config.kernel) is not None:
            continue
        for (what, shape), dtype, epilogue in itertools.product(_shapes(config).items(), DTYPES, _GRADIENTS):
            asked = (what, dtype) == ("3x3", torch.bfloat16) and epilogue in _LARGEST
            if refuse_shape(shape, dtype, arch, config, DGRAD) is None and (asked or not quick):
                yield _dgrad(config, dtype, shape, what, epilogue)


# What is done behind the products of a data gradient: the op and its options. The largest ask most of registers and of
# shared memory.
_GRADIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "": (DGRAD, {}),
    "residual": (DGRAD, {"epilogue": "residual"}),
    "masked residual": (DGRAD, {"epilogue": "masked residual"}),
    "batch norm": (DGRAD, {"epilogue": "batch norm"}),
    "batch norm, activation": ("conv_backward", {}),
    "join": ("conv_dgrad_join", {"epilogue": "masked residual", "projection": False}),
    "join behind a projection": ("conv_dgrad_join", {"epilogue": "masked residual"}),
}
_LARGEST = ("batch norm, activation", "join behind a projection")


def _shapes(config: ConvConfig) -> dict[str, ConvShape]:
    channels = 2 * config.block_k
    shapes = {"1x1": ConvShape(64, channels, 56, 56, 256, 1, 1)}
    if not config.kernel.startswith("tma_gemm"):
        shapes["3x3"] = ConvShape(64, channels, 56, 56, 256, 3, 3, padding=(1, 1))
        shapes["3x3 /2"] = ConvShape(64, channels, 56, 56, 256, 3, 3, (2, 2), (1, 1))
    return shapes


def _conv(config: ConvConfig, dtype: torch.dtype, shape: ConvShape, what: str, epilogue: str) -> Case:
    def tensor(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)

    def run() -> object:
        from resnet_fused.kernels import experimental

        x, weight = tensor(shape.n, shape.c, shape.h, shape.w), tensor(shape.k, shape.c, shape.r, shape.s)
        if epilogue == "statistics":
            return experimental.conv_fprop_stats(stats.Args(x, weight, None, None, *shape.geometry, rows=1), config)
        residual = tensor(shape.n, shape.k, shape.p, shape.q) if epilogue else None
        vector = torch.empty(shape.k, device="meta") if epilogue else None
        a = plain.Args(x, weight, vector, vector, residual, *shape.geometry, act="relu" if epilogue else None)
        return experimental.conv_fprop(a, config)

    return _case(config, dtype, what, epilogue, run)


def _dgrad(config: ConvConfig, dtype: torch.dtype, shape: ConvShape, what: str, epilogue: str) -> Case:
    def run() -> object:
        from resnet_fused.kernels import conv_dgrad

        name, options = _GRADIENTS[epilogue]
        a = sample(name, dtype, shape, **options)
        if name != "conv_backward":
            return conv_dgrad.run(a, shape, config)
        return conv_dgrad.run(conv_backward.dgrad_args(a), shape, config, activation(shape.image, dtype, True))

    return _case(config, dtype, what, f"gradient {epilogue}".rstrip(), run)


def _case(config: ConvConfig, dtype: torch.dtype, what: str, epilogue: str, run: Callable[[], object]) -> Case:
    tile = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"
    specialized = not config.kernel.startswith("tma") or config.kernel.endswith("_ws")
    label = f"{TYPES[dtype]} {config.kernel} {tile} {what} {epilogue}".rstrip()
    return label, Expect(matrix=True, tma=True, specialized=specialized), run
