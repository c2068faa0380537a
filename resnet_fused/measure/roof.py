"""The machine's own roofs, measured: the best matrix product and convolution in a dtype, the bandwidth of a copy."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from resnet_fused.measure.cases import DTYPES, Case
from resnet_fused.measure.timing import clock_for


@dataclasses.dataclass(frozen=True)
class Roof:
    """Floating-point operations per second (a multiply-add is two)."""

    gemm: float
    conv: float

    @property
    def best(self) -> float:
        return max(self.gemm, self.conv)


LONGEST_S = 1.0  # a call that would take longer is not made: a smaller product shows the same rate then


@torch.inference_mode()
def measure(dtype: str, device: torch.device, repeats: int = 8) -> Roof:
    """Best of `repeats` of a square matrix product and of ResNet's 3x3 convolution at 28x28 in channels_last order.

    About a second. Sizes: 2048^3 and batch 8 on a CPU, 8192^3 and batch 256 on a GPU; an eighth of them where they take
    long, as in a dtype that the CPU cannot multiply. What a CPU does in fp32 it can do in a narrower dtype.
    """
    on_gpu = device.type == "cuda"
    size, batch, width = (8192, 256, 128) if on_gpu else (2048, 8, 128)
    clock = clock_for(device)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=DTYPES[dtype], device=device)

    def product(size: int) -> tuple[Callable[[], torch.Tensor], int]:
        a, b = randn(size, size), randn(size, size)
        return lambda: a @ b, 2 * size**3

    def convolution(batch: int) -> tuple[Callable[[], torch.Tensor], int]:
        x, w = randn(batch, width, 28, 28), randn(width, width, 3, 3)
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        return lambda: F.conv2d(x, w, padding=1), 2 * batch * 28 * 28 * 9 * width**2

    def best_rate(make: Callable[[int], tuple[Callable[[], torch.Tensor], int]], size: int) -> float:
        small, flops = make(size // 8)
        clock(small)  # what only the first call costs
        seconds, (large, more) = clock(small) / 1e3, make(size)
        if seconds * more / flops > LONGEST_S:
            return flops / seconds
        return more / min(clock(large) / 1e3 for _ in range(repeats))

    found = Roof(best_rate(product, size), best_rate(convolution, batch))
    if on_gpu or dtype == "fp32":
        return found
    wider = measure("fp32", device, repeats)
    return Roof(max(found.gemm, wider.gemm), max(found.conv, wider.conv))


@torch.inference_mode()
def copy_bandwidth(device: torch.device, repeats: int = 8) -> float:
    """Bytes per second, read and written, of the best of `repeats` plain copies: 256 MiB on a CPU, 1 GiB on a GPU."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = clock_for(device)
    return 2 * source.numel() / min(clock(lambda: target.copy_(source)) / 1e3 for _ in range(repeats))


def flops(model: nn.Module, case: Case) -> int:
    """Floating-point operations of convolutions and matrix products in one step, counted without running it."""
    module = copy.deepcopy(model).train(case.mode == "train").to("meta")
    x = torch.empty(case.batch, 3, case.image_size, case.image_size, device="meta")
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        y = module(x)
        if case.mode == "train":
            y.sum().backward()
    return int(counter.get_total_flops())


def _convolution_backward(dy: Sequence[int], x: Sequence[int], weight: Sequence[int], *more: Any, **_: Any) -> int:
    """Each gradient has as many products as the forward; PyTorch's formula forgets a weight's groups."""
    *_rest, wanted = more
    return sum(wanted[:2]) * conv_flop_count(list(x), list(weight), list(dy))
