"""Our convolution for frozen networks on a CPU with AVX2 or AVX-512 (csrc/cpu): fp32, bf16, int8, on AMX where it is.

Its sums run over the filter's rows, columns and channels in this order, whatever the number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import _library, dispatch
from resnet_fused._compiling import constant
from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.ops.onednn import Grid

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
_MOST_COLUMNS = 32  # of a block of packed weights


class Packing(NamedTuple):
    """How this CPU's kernel for a dtype takes weights.

    Attributes:
        columns: output channels of a block.
        dtype: the packed weight's: float32 where bf16 is multiplied in it.
    """

    columns: int
    dtype: torch.dtype

    @property
    def word(self) -> int:
        """Input channels that the kernel reads together: of 4 bytes."""
        return 4 // self.dtype.itemsize


def unavailable() -> str | None:
    """Why none of our kernels for CPUs can run here, or None."""
    return _library.unavailable_cpu()


@constant
def supported() -> frozenset[str]:
    """What this CPU and this build can multiply, of float32, bfloat16 and int8, and "amx"; nothing if `unavailable`."""
    return frozenset(_supported())


@functools.cache
def _supported() -> dict[str, list[int]]:
    """Of each name its columns and the bytes of its packed weights."""
    if unavailable() is not None:
        return {}
    _register()
    names = (name.split("/") for name in torch.ops.resnet_fused_cpu.supported().split())
    return {name: [int(number) for number in numbers] for name, *numbers in names}


def wide() -> bool:
    """Whether fp32 is multiplied by AVX-512, not AVX2."""
    return "float32" in supported() and packing(torch.float32).columns == _MOST_COLUMNS


def packing(dtype: torch.dtype) -> Packing:
    """Of weights in a dtype that is `supported`."""
    columns, width = _supported()[_NAMES[dtype]]
    return Packing(columns, dtype if width == dtype.itemsize else torch.float32)


def _register() -> None:
    """What torch.compile and FakeTensorMode need to know of the ops."""

    def refuse_device(x: Tensor, weight: Tensor) -> None:
        if x.device != weight.device:
            raise RuntimeError(f"conv: x is on {x.device}, the weight on {weight.device}")

    def conv(x: Tensor, weight: Tensor, scale: object, bias: object, residual: object, channels: int, *rest: Any,
             to_float32: bool = False, **named: object) -> Tensor:  # fmt: skip
        refuse_device(x, weight)
        filter, stride, padding, groups = rest[:4]
        shape = ConvShape.of(x.shape, (channels, 0, *filter), stride, padding, (1, 1), groups)
        return _nhwc(x.new_empty(shape.output, dtype=torch.float32 if to_float32 else x.dtype))

    def conv_add_(residual: Tensor, x: Tensor, weight: Tensor, *rest: object, **named: object) -> None:
        refuse_device(x, weight)

    def steps(x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int], *rest: Any, **named: Any) -> Tensor:
        for tensor in tensors:
            refuse_device(x, x if tensor is None else tensor)
        *_, (step, problem) = step_problems(x.shape, numbers)
        return _nhwc(x.new_empty(problem.output, dtype=_DTYPES[step.dtype]))

    def mean(x: Tensor, scale: float = 1.0, zero_point: int = 0, to_bfloat16: bool = False) -> Tensor:
        return _nhwc(x.new_empty(*x.shape[:2], 1, 1, dtype=torch.bfloat16 if to_bfloat16 else torch.float32))

    def max_pool(x: Tensor, filter: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
        return _nhwc(F.max_pool2d(x, list(filter), list(stride), list(padding)))

    if not torch._C._dispatch_has_kernel_for_dispatch_key("resnet_fused_cpu::conv", "Meta"):
        torch.library.register_fake("resnet_fused_cpu::conv", conv)
        torch.library.register_fake("resnet_fused_cpu::conv_add_", conv_add_)
        torch.library.register_fake("resnet_fused_cpu::steps", steps)
        torch.library.register_fake("resnet_fused_cpu::mean", mean)
        torch.library.register_fake("resnet_fused_cpu::max_pool", max_pool)
        torch.library.register_fake(
            "resnet_fused_cpu::quantise", lambda x, *grid: torch.empty_like(x, dtype=torch.uint8)
        )


def refusal(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
) -> str | None:
    """Why our convolution does not run one with this weight, [K, C/groups, R, S], or None if it does.

    Empty where nobody asks for it: on another device, and under a forced backend.

    Args:
        weight: an int8 one is multiplied with uint8 activations.
    """
    if weight.device.type != "cpu" or dispatch.forced_backend() is not None:
        return ""
    if unavailable() is not None:
        return "our CPU kernels cannot run here: see resnet-fused info"
    dtype, names = str(weight.dtype).removeprefix("torch."), sorted(supported() & set(_NAMES.values()))
    channels, per_group = weight.shape[:2]
    limit = None
    if dtype not in names:
        limit = f"{', '.join(names)}, not {dtype}"
    elif groups != 1 and not _takes_groups(per_group, channels // groups):
        limit = "groups of 16, 32, ... outputs, or of as many inputs as outputs by which 16 is divisible, "
        limit += f"not of {per_group} inputs and {channels // groups} outputs"
    elif tuple(dilation) != (1, 1):
        limit = "no dilation"
    elif act not in (None, "relu"):
        limit = f"no {act}"
    elif per_group % (word := packing(weight.dtype).word) != 0 and (groups != 1 or padding[1] == 0):
        limit = f"multiples of {word} input channels in {dtype}, not {per_group}, where nothing is padded or grouped"
    return None if limit is None else f"our CPU kernel takes {limit}"


def _takes_groups(inputs: int, outputs: int) -> bool:
    """Sixteen outputs are of one group, or of several groups of as many inputs."""
    return outputs % 16 == 0 or (16 % outputs == 0 and inputs == outputs)


def pools(x: Tensor, filter: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether our max pooling takes these operands, which are in NHWC order alone; under a forced backend, none."""
    if not _pools_dtype(x) or dispatch.forced_backend() is not None:
        return False
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return False  # PyTorch's result would be in another order
    fits = all(2 * pad <= size <= n + 2 * pad for n, size, pad in zip(x.shape[2:], filter, padding, strict=True))
    return fits and x.shape[1] % 16 == 0


def _pools_dtype(x: Tensor) -> bool:
    pooled = x.device.type == "cpu" and x.dim() == 4 and x.dtype in (torch.float32, torch.bfloat16, torch.uint8)
    return pooled and bool(supported())


def max_pool(x: Tensor, filter: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """`F.max_pool2d` in NHWC order without indices, which PyTorch makes on a CPU even where nobody asks for them.

    Args:
        x: float32, bfloat16 or uint8, in NHWC order.
    """
    result: Tensor = torch.ops.resnet_fused_cpu.max_pool(x, filter, stride, padding)
    return result


def quantises(x: Tensor) -> bool:
    """Whether `quantise` takes it."""
    return _pools_dtype(x) and x.dtype != torch.uint8


def quantise(x: Tensor, grid: Grid) -> Tensor:
    """The nearest points of the grid, uint8 in NHWC order; what lies beyond its ends becomes them.

    Args:
        x: float32 or bfloat16, finite; in any other order than NHWC it is copied.
    """
    result: Tensor = torch.ops.resnet_fused_cpu.quantise(_nhwc(x), *grid)
    return result


def averages(x: Tensor) -> bool:
    """Whether `mean` takes it: in NHWC order, with pixels whose sum 32 bits hold."""
    pixels = x.shape[2:].numel()
    return _pools_dtype(x) and 0 < pixels <= 1 << 23 and x.is_contiguous(memory_format=torch.channels_last)


def mean(x: Tensor, grid: Grid | None, dtype: torch.dtype) -> Tensor:
    """The means [N, C, 1, 1] over all pixels.

    Args:
        x: float32 or bfloat16, or uint8 on `grid`; in NHWC order.
        dtype: of the result, float32 or bfloat16; that of `x` where it is no uint8.
    """
    result: Tensor = torch.ops.resnet_fused_cpu.mean(x, *(grid or Grid(1.0, 0)), dtype == torch.bfloat16)
    return result


class _LargePages:
    """Memory for the weights of a network, many to a page where the system has large ones: fewer are looked up then.

    A tensor keeps its slab alive.
    """

    SLAB, LINE = 16 << 20, 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, t: Tensor) -> Tensor:
        """A contiguous copy in this memory."""
        # Whoever calls first decides nothing: a slab made in inference mode could not be written to outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            size = -(-t.nbytes // self.LINE) * self.LINE
            if size > len(self._free):
                self._free = self._slab(max(size, self.SLAB))
            place, self._free = self._free[: t.nbytes], self._free[size:]
            return place.view(t.dtype).view(t.shape).copy_(t)

    @staticmethod
    def _slab(size: int) -> Tensor:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)


_LARGE_PAGES = _LargePages()


def winograd(weight: Tensor, stride: Sequence[int], result: Sequence[int]) -> bool:
    """Whether Winograd's F(2x2, 3x3) makes a result of this shape, [N, K, OH, OW], with fewer products to speak of.

    Sums of 16 products make 2x2 pixels where 36 would, and err less, being of a ninth of the terms.
    """
    N, _, OH, OW = result
    tiles = N * -(-OH // 2) * -(-OW // 2)
    pays = tiles >= 4 and 16 * tiles <= 0.75 * 9 * N * OH * OW
    floats = packing(weight.dtype).dtype == torch.float32
    three = floats and weight.shape[2:] == (3, 3) and tuple(stride) == (1, 1)
    return pays and three and weight.shape[1] % 16 == 0 and bool(weight.isfinite().all())


def pack_winograd(weight: Tensor) -> Tensor:
    """G w G' of a weight [K, C, 3, 3], as `pack` packs it: [K / columns, 16, C, columns, 1]."""
    G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    elements = G @ weight.double() @ G.T
    return _pack(elements.flatten(2).unsqueeze(-1), packing(weight.dtype))


def pack(weight: Tensor) -> Tensor:
    """A weight [K, C, R, S] as [K / columns, R, S * C / g, columns, g], g values to a word; with zeros where one ends.

    C are the channels of a group, and `packing` has the other numbers.
    """
    return _pack(weight, packing(weight.dtype))


def _pack(weight: Tensor, to: Packing) -> Tensor:
    K, C, R, S = weight.shape
    rows = weight.permute(0, 2, 3, 1).reshape(K, R, S * C).to(to.dtype)
    rows = F.pad(rows, (0, -S * C % to.word, 0, 0, 0, -K % to.columns))
    blocks = rows.reshape(-1, to.columns, R, rows.shape[-1] // to.word, to.word)
    return _LARGE_PAGES.copy(blocks.permute(0, 2, 3, 1, 4))


def pack_channels(values: Tensor) -> Tensor:
    """A value for each output channel, fp32, with zeros up to a whole block."""
    return F.pad(values.float(), (0, -len(values) % _MOST_COLUMNS))


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    channels: int,
    filter: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    act: str | None,
    overwrite_residual: bool = False,
    amx: bool = True,
    groups: int = 1,
) -> Tensor:
    """act(conv(x, weight) + bias + residual) with sums and epilogue in fp32; a NaN stays a NaN.

    Args:
        x: of the weight's dtype; in any other order than NHWC it is copied.
        weight: of `pack` or `pack_winograd`; `bias` of `pack_channels`.
        residual: of the result's shape and dtype; overwritten with `overwrite_residual` if it is in NHWC order.
        channels: K, of the result.
        amx: whether AMX may be used where there is some.
    """
    x, ops = _nhwc(x), torch.ops.resnet_fused_cpu
    geometry = (channels, filter, stride, padding, groups, act == "relu")
    if residual is not None:
        residual = _nhwc(residual)
        if overwrite_residual:
            ops.conv_add_(residual, x, weight, None, bias, *geometry, amx=amx)
            return residual
    return ops.conv(x, weight, None, bias, residual, *geometry, amx=amx)


def int8_conv(
    x: Tensor,
    x_grid: Grid,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    residual_grid: Grid | None,
    channels: int,
    filter: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    act: str | None,
    result: Grid | None,
    overwrite_residual: bool = False,
    amx: bool = True,
    groups: int = 1,
) -> Tensor:
    """act(scale * conv(x - x_grid.zero_point, weight) + bias + residual): int32 sums, an fp32 epilogue, one rounding.

    Args:
        x: uint8, NHWC, on `x_grid`.
        weight: int8, of `pack`.
        scale, bias: of `int8_epilogue`.
        residual: uint8, NHWC, on `residual_grid`; or None.
        result: the grid of a uint8 result, or None for a float32 one, which no residual is added to.
    """
    ops, none = torch.ops.resnet_fused_cpu, Grid(1.0, 0)
    grids = (x_grid.zero_point, *(residual_grid or none), *(result or none))
    geometry = (channels, filter, stride, padding, groups, act == "relu", *grids)
    if residual is not None and overwrite_residual:
        ops.conv_add_(residual, x, weight, scale, bias, *geometry, amx=amx)
        return residual
    return ops.conv(x, weight, scale, bias, residual, *geometry, to_float32=result is None, amx=amx)


CONV, MAX_POOL, MEAN, QUANTISE = range(4)  # the ops of `steps`, as csrc/cpu/ops.cpp counts them
_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)  # likewise


class Step(NamedTuple):
    """The numbers of one op of `steps`, as csrc/cpu/ops.cpp reads them."""

    op: int
    dtype: int  # of the result
    x: int  # 0 is the input of the whole, i the result of step i - 1
    residual: int = -1  # likewise, or -1
    channels: int = 0
    filter_h: int = 1
    filter_w: int = 1
    stride_h: int = 1
    stride_w: int = 1
    pad_h: int = 0
    pad_w: int = 0
    groups: int = 1
    relu: int = 0
    x_zero_point: int = 0
    residual_zero_point: int = 0
    y_zero_point: int = 0


class Steps:
    """Ops that read each other's results, as one call: what `conv`, `max_pool`, `mean` and `quantise` give in turn.

    Each method adds one and returns the number of its result; 0 is that of the input. A residual that nobody reads
    later is overwritten.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor | None] = []
        self._numbers: list[int] = []
        self._scales: list[float] = []

    def __len__(self) -> int:
        return len(self._numbers) // len(Step._fields)

    def __iter__(self) -> Iterator[Step]:
        return _split(self._numbers)

    def conv(
        self,
        x: int,
        residual: int | None,
        tensors: tuple[Tensor, Tensor | None, Tensor],
        channels: int,
        filter: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        groups: int,
        act: str | None,
        dtype: torch.dtype,
        grids: tuple[Grid | None, Grid | None, Grid | None] = (None, None, None),
    ) -> int:
        """`conv` or `int8_conv`.

        Args:
            x, residual: the numbers of results.
            tensors: weight, scale (None but in int8), bias.
            dtype: of the result, torch.uint8 in int8.
            grids: of x, residual and result, in int8.
        """
        added, geometry = -1 if residual is None else residual, (*filter, *stride, *padding, groups)
        numbers = (CONV, _DTYPES.index(dtype), x, added, channels, *geometry, int(act == "relu"), *_zero_points(grids))
        return self._add(Step._make(numbers), grids, tensors)

    def max_pool(
        self, x: int, filter: Sequence[int], stride: Sequence[int], padding: Sequence[int], dtype: torch.dtype
    ) -> int:
        """`max_pool` of values of `dtype`."""
        return self._add(Step(MAX_POOL, _DTYPES.index(dtype), x, -1, 0, *filter, *stride, *padding))

    def mean(self, x: int, grid: Grid | None, dtype: torch.dtype) -> int:
        """`mean`, to `dtype`."""
        grids = (grid, None, None)
        return self._add(Step(MEAN, _DTYPES.index(dtype), x, x_zero_point=_zero_points(grids)[0]), grids)

    def quantise(self, x: int, grid: Grid) -> int:
        """`quantise`; a NaN or an infinity raises a RuntimeError."""
        return self._add(
            Step(QUANTISE, _DTYPES.index(torch.uint8), x, y_zero_point=grid.zero_point), (None, None, grid)
        )

    def _add(
        self,
        step: Step,
        grids: tuple[Grid | None, Grid | None, Grid | None] = (None, None, None),
        tensors: tuple[Tensor | None, ...] = (None, None, None),
    ) -> int:
        self._tensors += tensors
        self._numbers += step
        self._scales += [1.0 if grid is None else grid.scale for grid in grids]
        return len(self)

    def __call__(self, x: Tensor) -> Tensor:
        """The last result, of an input that is copied where it is not in NHWC order."""
        result: Tensor = torch.ops.resnet_fused_cpu.steps(_nhwc(x), self._tensors, self._numbers, self._scales)
        return result


def _zero_points(grids: Sequence[Grid | None]) -> list[int]:
    return [0 if grid is None else grid.zero_point for grid in grids]


def _split(numbers: Sequence[int]) -> Iterator[Step]:
    size = len(Step._fields)
    return (Step._make(numbers[i : i + size]) for i in range(0, len(numbers), size))


def step_problems(x: Sequence[int], numbers: Sequence[int]) -> list[tuple[Step, ConvShape]]:
    """The steps that `steps` runs in turn, of an input of this shape, each with the problem of its convolution, or of
    the one that makes as large a result.
    """
    values, found = [tuple(x)], []
    for step in _split(numbers):
        image = values[step.x]
        channels = step.channels if step.op == CONV else image[1]
        filter = image[2:] if step.op == MEAN else (step.filter_h, step.filter_w)
        geometry = ((step.stride_h, step.stride_w), (step.pad_h, step.pad_w), (1, 1), step.groups)
        problem = ConvShape.of(image, (channels, 0, *filter), *geometry)
        found.append((step, problem))
        values.append(problem.output)
    return found


def int8_epilogue(sums: Tensor, weight_scale: Tensor, bias: Tensor, x_grid: Grid) -> tuple[Tensor, Tensor]:
    """(scale, bias) of `int8_conv` for an int8 weight on a symmetric grid for each output channel.

    The bias takes up what the zero point of x adds to each sum; padding is zero points, too.

    Args:
        sums: of each output channel's weights, float64.
    """
    scale = x_grid.scale * weight_scale
    return pack_channels(scale), pack_channels(bias.double() - scale.double() * x_grid.zero_point * sums)


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
