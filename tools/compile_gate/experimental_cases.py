"""What the Triton compile gate compiles of the experimental formulations: every configuration the plan lists."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.experimental import DTYPES, configurations
from resnet_fused.ops import conv_fprop as plain
from resnet_fused.ops import conv_fprop_stats as stats
from tools.compile_gate.expect import TYPES, Case, Expect


def experimental_cases(arch: int, quick: bool) -> Iterator[Case]:
    """With every epilogue and kind of filter that compiles to different code; quick: bf16, the whole epilogue, which
    needs the most registers, and one configuration with statistics for every formulation.
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

    tile = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"
    specialized = not config.kernel.startswith("tma") or config.kernel.endswith("_ws")
    label = f"{TYPES[dtype]} {config.kernel} {tile} {what} {epilogue}".rstrip()
    return label, Expect(matrix=True, tma=True, specialized=specialized), run
