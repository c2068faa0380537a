"""What the Triton compile gate compiles of the experimental formulations: every configuration the plan lists."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from resnet_fused.bench.compile_gate_triton_cases import TYPES, Case, Expect
from resnet_fused.plan.conv import ConvConfig, ConvShape
from resnet_fused.plan.experimental import DTYPES, configurations


def experimental_cases(arch: int, quick: bool) -> Iterator[Case]:
    """With every epilogue and kind of filter that compiles to different code; the whole epilogue needs the most
    registers.
    """
    for config in configurations(arch):
        size = 2 * config.block_k
        shapes = {"1x1": ConvShape(64, size, 56, 56, 256, 1, 1)}
        if not config.kernel.startswith("tma_gemm"):
            shapes["3x3"] = ConvShape(64, size, 56, 56, 256, 3, 3, padding=(1, 1))
            shapes["3x3 /2"] = ConvShape(64, size, 56, 56, 256, 3, 3, (2, 2), (1, 1))
        for (what, shape), dtype, epilogue in (
            (shape, dtype, epilogue) for shape in shapes.items() for dtype in DTYPES for epilogue in (True, False)
        ):
            if not quick or (dtype == torch.bfloat16 and epilogue and what == list(shapes)[min(1, len(shapes) - 1)]):
                yield _conv(config, dtype, shape, what, epilogue)


def _conv(config: ConvConfig, dtype: torch.dtype, shape: ConvShape, what: str, epilogue: bool) -> Case:
    def tensor(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)

    def run() -> object:
        from resnet_fused.kernels import experimental

        x, weight = tensor(shape.n, shape.c, shape.h, shape.w), tensor(shape.k, shape.c, shape.r, shape.s)
        vector = torch.empty(shape.k, device="meta")
        residual = tensor(shape.n, shape.k, shape.p, shape.q) if epilogue else None
        affine = vector if epilogue else None
        return experimental.conv_fprop(x, weight, affine, affine, residual, shape, epilogue, config)

    tile = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"
    specialized = not config.kernel.startswith("tma") or config.kernel.endswith("_ws")
    label = f"{TYPES[dtype]} {config.kernel} {tile} {what}{' epilogue' if epilogue else ''}"
    return label, Expect(matrix=True, tma=True, specialized=specialized), run
