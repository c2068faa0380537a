"""What the Triton compile gate compiles: the launches of every kernel, and what their machine code must show."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from resnet_fused.ops import OPS, bn_finalize, pack_weight, reduce_rows
from resnet_fused.ops.operands import Operands
from tools.compile_gate.conv_cases import conv_cases
from tools.compile_gate.expect import TYPES, Case, Expect, activation, op, vector

META = torch.device("meta")

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
        vectors, every = size not in ("ragged", "ones"), size == "even" and not quick
        yield from _family(Operands(META, dtype, nhwc), *sizes[size], label, vectors=vectors, every=every)
    rows = vector(256, 256)
    finalize = bn_finalize.Args(rows.double(), rows, vector(256), *(vector(256),) * 4, 0.1, 1e-5)
    yield "rows 256", Expect(wide_loads=True), functools.partial(op, "bn_finalize", finalize)
    yield "rows 256", Expect(wide_loads=True), functools.partial(op, "reduce_rows", reduce_rows.Args(rows))
    weight = activation((256, 256, 3, 3), torch.bfloat16, True)
    for flip in (False,) if quick else (False, True):
        yield (
            f"bf16 flip={flip}",
            Expect(wide_stores=True),
            functools.partial(op, "pack_weight", pack_weight.Args(weight, flip)),
        )


def _family(
    make: Operands, block: tuple[int, ...], stem: tuple[int, ...], label: str, *, vectors: bool, every: bool
) -> Iterator[Case]:
    """Every op of activations that is no convolution, in every variant of its sample arguments or in that which asks
    most of a kernel.
    """
    for record in OPS.values():
        if record.flops is not None or record.args._fields[0] not in ("x", "dy"):
            continue
        pools = "max_pool" in record.name
        rows = {"rows": 256} if "rows" in record.args._fields else {}
        variants = list(record.variants())
        for variant in variants if every else variants[-1:]:
            args = record.case(make, stem if pools else block, **variant, **rows)
            tensors = [t for t in args if isinstance(t, Tensor)]
            elementwise = not rows and all(t.dim() == 4 for t in tensors)
            # The pool strides through x, so in NCHW order it has no vectors to read.
            wide = tensors[0].numel() > 1 if elementwise else vectors and (make.nhwc or not pools)
            stores = any(t.dim() == 4 for t in record.written(args))
            large = math.prod(block) > 2**31
            expect = Expect(wide_loads=wide, wide_stores=wide and stores, index64=large)
            what = " ".join([label, *(f"{name}={value}" for name, value in variant.items() if value != "")])
            yield what, expect, functools.partial(op, record.name, args)
