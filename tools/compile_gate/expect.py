"""What the cases of the Triton compile gate are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused.dispatch.conv import ConvConfig
from resnet_fused.ops import OPS
from resnet_fused.ops.operands import Operands

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Expect:
    """What the machine code must show beyond fitting and not spilling."""

    matrix: bool = False  # the architecture's matrix instruction
    eight: bool = False  # of 8 bits, and of nothing else
    copies: bool = False  # cp.async
    tma: bool = False  # cp.async.bulk.tensor
    specialized: bool = False  # warps of different roles
    wide_loads: bool = False  # LDG.128
    wide_stores: bool = False  # STG.128
    index64: bool = False  # 64-bit offsets, for a tensor of more than 2^31 elements


def activation(shape: tuple[int, ...], dtype: torch.dtype, nhwc: bool) -> Tensor:
    order = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=order)


def vector(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


Case = tuple[str, Expect, Callable[[], object]]


@contextlib.contextmanager
def tf32_switch(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]


def sample(name: str, dtype: torch.dtype, shape: Any, **options: Any) -> Any:
    """Sample arguments of an op, without memory, in NHWC order."""
    return OPS[name].case(Operands(torch.device("meta"), dtype), shape, **options)


def op(name: str, args: Any, config: ConvConfig | None = None) -> object:
    from resnet_fused import kernels

    return kernels.run(name, args, config)
