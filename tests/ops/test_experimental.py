"""The formulations on experimental Triton APIs: those that Triton's interpreter runs against float64, the tile and box
arithmetic of the others as plain loops.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from box_statistics import assert_statistics_of_boxes
from contract import assert_no_worse
from conv_cases import DEVICE

pytest.importorskip("triton")

from resnet_fused import kernels
from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.experimental import (
    ARCHITECTURES,
    DTYPES,
    KERNELS,
    configurations,
    pixel_box,
    refuse_shape,
    tiling,
)
from resnet_fused.kernels import experimental
from resnet_fused.kernels._launch import INTERPRETED
from resnet_fused.kernels.experimental import _grid
from resnet_fused.ops import conv_fprop as plain
from resnet_fused.ops import conv_fprop_stats as stats

NHWC = torch.channels_last
interpreted = pytest.mark.skipif(not INTERPRETED, reason="triton was imported without TRITON_INTERPRET=1")

BOXES = {
    "3x3": ConvShape(2, 32, 5, 7, 40, 3, 3, padding=(1, 1)),
    "3x3 one image": ConvShape(1, 16, 9, 9, 8, 3, 3, padding=(1, 1)),
    "3x3 many small images": ConvShape(9, 16, 2, 1, 24, 3, 3, padding=(1, 1)),
    "3x3 unpadded, dilated": ConvShape(2, 16, 8, 7, 16, 3, 3, dilation=(2, 1)),
    "3x3 stride 2": ConvShape(3, 32, 6, 10, 24, 3, 3, (2, 2), (1, 1)),
    "5x3 stride 2": ConvShape(1, 16, 8, 6, 8, 5, 3, (2, 2), (2, 1)),
    "7x7": ConvShape(1, 16, 8, 8, 16, 7, 7, (2, 2), (3, 3)),
    "1x1": ConvShape(2, 32, 5, 7, 48, 1, 1),
    "1x1 stride 2, odd image": ConvShape(2, 32, 7, 9, 40, 1, 1, (2, 2)),
    "1x1 stride 3 and 1": ConvShape(2, 16, 7, 5, 8, 1, 1, (3, 1)),
}
PRODUCTS = {
    "1x1": BOXES["1x1"],
    "1x1, channels divide no tile": ConvShape(3, 40, 5, 5, 24, 1, 1),
    "1x1 image": ConvShape(2, 8, 1, 1, 8, 1, 1),
}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Three programs, so that each has several tiles."""
    monkeypatch.setattr(_grid, "MULTIPROCESSORS", {80: 3})


def _tensors(shape, dtype):
    fan_in = shape.c * shape.r * shape.s
    x = torch.randn(shape.n, shape.c, shape.h, shape.w)
    weight = torch.randn(shape.k, shape.c, shape.r, shape.s) / fan_in**0.5
    residual = torch.randn(shape.n, shape.k, shape.p, shape.q)
    scale, shift = torch.rand(shape.k) + 0.5, torch.randn(shape.k)
    scale[::3] *= -1
    data = (t.to(dtype).contiguous(memory_format=NHWC) for t in (x, weight, residual))
    return (*data, scale, shift)


def _plain(shape, x, weight, scale, shift, residual, relu):
    y = F.conv2d(x, weight, None, shape.stride, shape.padding, shape.dilation)
    for vector, operation in ((scale, torch.mul), (shift, torch.add)):
        if vector is not None:
            y = operation(y, vector.to(x.dtype).view(1, -1, 1, 1))
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def _args(shape, x, weight, scale=None, shift=None, residual=None, relu=False):
    return plain.Args(x, weight, scale, shift, residual, *shape.geometry, "relu" if relu else None)


def _check(shape, config, x, weight, scale=None, shift=None, residual=None, relu=False):
    a = _args(shape, x, weight, scale, shift, residual, relu)
    assert experimental.refuse(a, config) is None
    y = experimental.conv_fprop(a, config)
    operands = (shape, x, weight, scale, shift, residual, relu)
    assert y.is_contiguous(memory_format=NHWC)
    assert_no_worse(y, _plain, operands, "y", addends=weight[:1].numel())
    return y


def _config(kernel, block_m=32, block_n=16, block_k=16):
    return ConvConfig(block_m, block_n, block_k, 4, 2, kernel=kernel)


CASES = [("tma_gemm", name, shape) for name, shape in PRODUCTS.items()]
CASES += [("tma_conv", name, shape) for name, shape in BOXES.items()]


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel, name, shape", CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_shape(kernel, name, shape, dtype):
    x, weight, residual, scale, shift = _tensors(shape, dtype)
    _check(shape, _config(kernel), x, weight, scale, shift, residual, relu=True)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["tma_gemm", "tma_conv"])
@pytest.mark.parametrize("scale, shift, residual, relu", list(itertools.product([False, True], repeat=4)))
def test_every_epilogue(kernel, scale, shift, residual, relu, dtype):
    shape = BOXES["1x1"]
    x, weight, *others = _tensors(shape, dtype)
    wanted = (None if not use else t for use, t in zip((residual, scale, shift), others, strict=True))
    r, a, b = wanted
    _check(shape, _config(kernel, 64), x, weight, a, b, r, relu)


@interpreted
@pytest.mark.parametrize("kernel", ["tma_gemm", "tma_conv"])
def test_vectors_of_the_datas_dtype_and_the_input_as_residual(kernel):
    shape = replace(BOXES["1x1"], k=32)
    x, weight, _, scale, shift = _tensors(shape, torch.bfloat16)
    _check(shape, _config(kernel), x, weight, scale.bfloat16(), shift.bfloat16(), residual=x, relu=True)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kernel, name", [("tma_gemm", "1x1"), ("tma_conv", "3x3"), ("tma_conv", "3x3 stride 2")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_reach_exactly_the_pixels_that_see_them(kernel, name, value, relu):
    """Neither what boxes read outside the image, nor ReLU adds or swallows one. fp16, exactly representable sums."""
    shape = BOXES[name]
    x, weight, residual, *_ = (t.sign() for t in _tensors(shape, torch.float16))
    x[0, shape.c - 1, 0, 0] = value
    residual[0, 0, -1, -1] = value
    y = experimental.conv_fprop(_args(shape, x, weight, residual=residual, relu=relu), _config(kernel))
    truth = _plain(shape, x.double(), weight.double(), None, None, residual.double(), relu)
    assert torch.equal(y.double().nan_to_num(7.0, 8.0, 9.0), truth.nan_to_num(7.0, 8.0, 9.0))
    assert not y.isfinite().all() or (relu and value == -float("inf"))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel, name, shape", CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_statistics_are_those_of_every_box_as_it_was_rounded(kernel, name, shape, dtype):
    x, weight, *_ = _tensors(shape, dtype)
    config = _config(kernel)
    y, *statistics = experimental.conv_fprop_stats(stats.Args(x, weight, None, None, *shape.geometry, rows=1), config)
    assert torch.equal(y, experimental.conv_fprop(_args(shape, x, weight), config))
    assert_statistics_of_boxes(shape, config, y, *statistics)


@interpreted
def test_it_repeats_bit_for_bit():
    shape = BOXES["3x3"]
    x, weight, *_ = _tensors(shape, torch.float16)
    first, second = (_check(shape, _config("tma_conv"), x, weight, relu=True) for _ in range(2))
    assert torch.equal(first, second)


# ---- the arithmetic that all kernels share ---------------------------------------------------------------------------


def _copy(array, view, start):
    """What a TMA copy of `view`'s box at `start` brings: zero outside."""
    whole = np.lib.stride_tricks.as_strided(array, view.shape, [s * array.itemsize for s in view.strides])
    box = np.zeros(view.box)
    inside = [
        (max(0, -a), max(0, min(size, extent - a))) for a, size, extent in zip(start, view.box, view.shape, strict=True)
    ]
    if all(low < high for low, high in inside):
        source = tuple(slice(a + low, a + high) for a, (low, high) in zip(start, inside, strict=True))
        box[tuple(slice(*bounds) for bounds in inside)] = whole[source]
    return box


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("name", BOXES)
def test_the_boxes_of_a_tiling_make_the_convolution(name, block_m):
    """The loops of the kernels, in numpy: every tile, tap and channel, copied by box."""
    shape = BOXES[name]
    config = _config("wgmma_conv", block_m)
    tiles = tiling(shape, config)
    x, weight, *_ = (t.double() for t in _tensors(shape, torch.float32))
    x, weight = x.contiguous(memory_format=NHWC), weight.contiguous(memory_format=NHWC)
    x_memory, w_memory = x.permute(0, 2, 3, 1).numpy().ravel(), weight.permute(0, 2, 3, 1).numpy().ravel()
    y = np.zeros(tiles.y.shape)
    boxes = itertools.product(*(range(0, size, step) for size, step in zip(tiles.grid, tiles.box, strict=True)))
    count, written = 0, 0
    for n0, p0, q0 in boxes:
        count += 1
        for k0 in range(0, shape.k, config.block_n):
            acc = np.zeros((block_m, config.block_n))
            for r, s, c in itertools.product(range(shape.r), range(shape.s), range(0, shape.c, config.block_k)):
                h, w = r * shape.dilation[0] - shape.padding[0], s * shape.dilation[1] - shape.padding[1]
                at = [n0, p0 + h, q0 + w, c]
                if tiles.stride2:
                    at = [n0, p0 + (h >> 1), h & 1, q0 + (w >> 1), (w & 1) * shape.c + c]
                a = _copy(x_memory, tiles.x, at).reshape(block_m, -1)
                b = _copy(w_memory, tiles.weight, [k0, (r * shape.s + s) * shape.c + c])
                acc += a @ b.T
            tile = acc.reshape(tiles.y.box)
            place = tuple(slice(a, a + size) for a, size in zip((n0, p0, q0, k0), tiles.y.box, strict=True))
            target = y[place]
            target += tile[tuple(slice(0, size) for size in target.shape)]
            written += target.size
    assert count == tiles.tiles and written == y.size
    truth = F.conv2d(x, weight, None, shape.stride, shape.padding, shape.dilation).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(y.ravel(), truth.ravel(), atol=1e-12)


@pytest.mark.parametrize("size, exact", [(56, (2, 8, 8)), (28, (8, 4, 4)), (14, (32, 2, 2)), (7, (128, 1, 1))])
def test_pixel_boxes_cover_resnet_exactly(size, exact):
    assert pixel_box(256, size, size, 128) == exact


@pytest.mark.parametrize("n, p, q", [(1, 7, 7), (1, 56, 56), (3, 5, 200), (1, 1, 6272), (1, 1, 1)])
def test_a_pixel_box_has_the_asked_size_and_no_other_covers_with_fewer(n, p, q):
    for block_m in (64, 128, 256):
        box = pixel_box(n, p, q, block_m)
        assert np.prod(box) == block_m
        tiles = int(np.prod([-(-size // step) for size, step in zip((n, p, q), box, strict=True)]))
        sizes = [1 << i for i in range(block_m.bit_length())]
        for b, h in itertools.product(sizes, sizes):
            if b * h <= block_m:
                assert tiles <= -(-n // b) * -(-p // h) * -(-q // (block_m // (b * h)))


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_listed_configurations_suit_their_architecture(arch):
    shape = ConvShape(256, 64, 56, 56, 64, 1, 1)
    for config in configurations(arch):
        assert arch in ARCHITECTURES[config.kernel]
        assert refuse_shape(shape, torch.bfloat16, arch, config) is None
    listed = {config.kernel for config in configurations(arch)}
    assert listed == {kernel for kernel in KERNELS if arch in ARCHITECTURES[kernel]}


# ---- availability and refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_formulation_loads_with_the_supported_tritons(kernel):
    assert experimental.available(kernel) is None


def test_a_triton_without_the_api_is_a_reason_not_an_error():
    script = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)  # the interpreter itself needs the descriptors
sys.modules["triton.experimental.gluon"] = None
sys.modules["triton.tools.tensor_descriptor"] = None
from resnet_fused import kernels
from resnet_fused.kernels import experimental
for kernel in experimental.KERNELS:
    print(experimental.available(kernel))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(KERNELS)
    for kernel, line in zip(KERNELS, lines, strict=True):
        assert line.startswith(f"{kernel} does not load with Triton")


GOOD = ConvShape(2, 32, 8, 8, 32, 3, 3, padding=(1, 1))


@pytest.mark.parametrize(
    "kernel, arch, dtype, changes, message",
    [
        ("pointer", 90, torch.float16, {}, "'pointer'"),
        ("wgmma_conv", 100, torch.float16, {}, "sm_100"),
        ("tcgen05_conv", 90, torch.float16, {}, "sm_90"),
        ("tma_conv", 80, torch.float16, {}, "sm_80"),
        ("tma_conv", 90, torch.float32, {}, "float32"),
        ("tma_conv", 90, torch.float16, {"groups": 2}, "groups"),
        ("tma_conv", 90, torch.float16, {"c": 20}, "20"),
        ("tma_conv", 90, torch.float16, {"k": 20}, "20"),
        ("tma_conv", 90, torch.float16, {"c": 24}, "does not divide 24"),
        ("tma_conv", 90, torch.float16, {"n": 0}, "nothing"),
        ("tma_conv", 90, torch.float16, {"stride": (2, 1)}, "stride"),
        ("tma_conv", 90, torch.float16, {"stride": (2, 2), "h": 7}, "7x8"),
        ("tma_conv", 90, torch.float16, {"stride": (2, 2), "dilation": (2, 2)}, "dilation"),
        ("tma_conv", 90, torch.float16, {"r": 1, "s": 1}, "padding"),
        ("tma_gemm", 90, torch.float16, {}, "1x1"),
        ("tma_gemm", 90, torch.float16, {"r": 1, "s": 1, "padding": (0, 0), "stride": (2, 2)}, "stride 1"),
    ],
)
def test_refusals_name_the_value(kernel, arch, dtype, changes, message):
    assert message in refuse_shape(replace(GOOD, **changes), dtype, arch, _config(kernel))


@interpreted
def test_what_cannot_run_here_or_is_not_aligned_is_refused():
    shape = BOXES["1x1"]
    x, weight, residual, *_ = _tensors(shape, torch.float16)
    assert "Gluon" in experimental.refuse(_args(shape, x, weight), _config("wgmma_conv"))
    assert "choose one of" in experimental.refuse(_args(shape, x, weight), _config("magic"))
    odd = torch.cat([residual.flatten()[:1], residual.permute(0, 2, 3, 1).flatten()])[1:]
    odd = odd.view(2, 5, 7, 48).permute(0, 3, 1, 2)
    assert "residual starts at" in experimental.refuse(_args(shape, x, weight, residual=odd), _config("tma_conv"))


def test_a_planned_formulation_that_these_operands_refuse_falls_back(monkeypatch):
    """A measured winner of the plan, and an x that starts off a multiple of 16 bytes: the pointer kernel runs."""
    config = next(c for c in configurations(90) if c.kernel == "tma_gemm")
    monkeypatch.setattr(kernels, "conv_config", lambda *args: config)
    ran = []
    monkeypatch.setattr(experimental, "conv_fprop", lambda *args: ran.append("experimental"))
    storage = torch.randn(2 * 4 * 4 * 64 + 1).half().to(DEVICE)
    x = storage[1:].view(2, 4, 4, 64).permute(0, 3, 1, 2)
    weight = torch.randn(64, 64, 1, 1).half().to(DEVICE)
    y = kernels.run("conv_fprop", plain.Args(x, weight, None, None, None, [1, 1], [0, 0], [1, 1], 1, None))
    torch.testing.assert_close(y.float(), F.conv2d(x.float(), weight.float()), rtol=1e-2, atol=1e-1)
    assert ran == []
