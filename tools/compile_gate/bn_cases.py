"""What the Triton compile gate compiles: the launches of every kernel, and what their machine code must show."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tools.compile_gate.conv_cases import conv_cases
from tools.compile_gate.expect import TYPES, Case, Expect, activation, op, vector

__all__ = ["TYPES", "Case", "Expect", "batch_norm_cases", "conv_cases"]


def batch_norm_cases(arch: int, quick: bool) -> Iterator[Case]:
    """Every op of the family by dtype, memory order and size: even (vectors), ragged (none), narrow (few channels),
    wide (64-bit offsets), ones (arguments that triton turns into constants); every option at the even size, elsewhere
    the one that needs the most registers.
    """
    sizes = {"even": ((256, 256, 56, 56), (256, 64, 112, 112))}
    if not quick:
        sizes["ragged"] = ((64, 35, 7, 7), (64, 35, 17, 17))
        sizes["narrow"] = ((256, 16, 56, 56), (256, 8, 112, 112))
        sizes["wide"] = ((4096, 256, 56, 56), (4096, 64, 112, 112))
    if not quick or arch == 80:  # what a 1 does to a kernel does not depend on the architecture
        sizes["ones"] = ((1, 1, 1, 1), (1, 1, 1, 1))
    dtypes = (torch.bfloat16,) if quick else (torch.float32, torch.float16, torch.bfloat16)
    for size, nhwc, dtype in itertools.product(sizes, (True,) if quick else (True, False), dtypes):
        label = f"{TYPES[dtype]} {'NHWC' if nhwc else 'NCHW'} {size}"
        all_options = size == "even" and not quick
        yield from _family(
            dtype, nhwc, *sizes[size], label, vectors=size not in ("ragged", "ones"), all_options=all_options
        )
    yield (
        "rows 256",
        Expect(wide_loads=True),
        lambda: op(
            "bn_finalize", vector(256, 256).double(), vector(256, 256), vector(256), *(vector(256),) * 4, 0.1, 1e-5
        ),
    )
    yield "rows 256", Expect(wide_loads=True), lambda: op("reduce_rows", vector(256, 256))
    weight = activation((256, 256, 3, 3), torch.bfloat16, True)
    for flip in (False,) if quick else (False, True):
        yield f"bf16 flip={flip}", Expect(wide_stores=True), functools.partial(op, "pack_weight", weight, flip)


def _family(
    dtype: torch.dtype,
    nhwc: bool,
    block: tuple[int, ...],
    stem: tuple[int, ...],
    label: str,
    *,
    vectors: bool,
    all_options: bool,
) -> Iterator[Case]:
    wide = math.prod(block) > 2**31
    both = Expect(wide_loads=vectors, wide_stores=vectors, index64=wide)
    loads = replace(both, wide_stores=False)
    x, c = activation(block, dtype, nhwc), vector(block[1])
    mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device="meta")
    rows = 256

    def case(expect: Expect, what: str, name: str, *args: Any) -> Case:
        return f"{label} {what}".strip(), expect, functools.partial(op, name, *args)

    yield case(loads, "", "bn_stats", x, rows)
    residuals = {"": (None, None, None), "+ residual": (x, None, None), "+ affine residual": (x, c, c)}
    for (what, residual), (relu, with_mask) in itertools.product(
        residuals.items(), ((False, False), (True, False), (True, True))
    ):
        if all_options or (residual[1] is not None and with_mask):
            yield case(both, f"{what} relu={relu} mask={with_mask}", "bn_apply", x, c, c, *residual, relu, with_mask)
    for what, bits, relu in (("", None, False), ("recomputed mask", None, True), ("mask", mask, True)):
        if not all_options and bits is None:
            continue
        yield case(loads, what, "bn_backward_reduce", x, x, bits, c, c, c, c, relu, rows)
        for sums, dresidual in itertools.product(((c, c), (None, None)), (True, False)):
            if all_options or (sums[0] is not None and dresidual):
                more = f"{what} sums={sums[0] is not None} dresidual={dresidual}"
                yield case(both, more, "bn_backward_apply", x, x, bits, c, c, c, c, *sums, 2.0, relu, dresidual)
    large = x.numel() > 1
    flat = replace(both, wide_loads=large, wide_stores=large)
    yield case(flat, "", "add_act", x, x, True)
    yield case(flat, "", "add_act_backward", x, x)
    # The pool strides through x, so in NCHW order it has no vectors to read.
    pooled = replace(both, wide_loads=vectors and nhwc, wide_stores=vectors and nhwc)
    x, c = activation(stem, dtype, nhwc), vector(stem[1])
    half = (*stem[:2], (stem[2] - 1) // 2 + 1, (stem[3] - 1) // 2 + 1)
    dy, index = activation(half, dtype, nhwc), activation(half, torch.uint8, nhwc)
    yield case(pooled, "", "bn_act_max_pool", x, c, c)
    yield case(
        replace(pooled, wide_stores=False), "", "bn_act_max_pool_backward_reduce", dy, index, x, c, c, c, c, rows
    )
    yield case(pooled, "", "bn_act_max_pool_backward_apply", dy, index, x, c, c, c, c, c, c, 2.0)
