"""Our convolution on a CPU: exact data against float64 for every element type, shape of filter and instruction set."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from resnet_fused import use_backend
from resnet_fused.ops import cpu
from resnet_fused.ops.onednn import Grid

SUPPORTED = cpu.supported()
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="no AVX2, or the kernels for CPUs are not built")

DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(name not in SUPPORTED, reason=f"this CPU has no {name}"), id=name)
    for dtype, name in cpu._NAMES.items()
]
AMX = [False, pytest.param(True, marks=pytest.mark.skipif("amx" not in SUPPORTED, reason="this CPU has no AMX"))]

# What the CPU multiplies in float32.
WINOGRAD = [
    pytest.param(
        *dtype.values,
        marks=pytest.mark.skipif(
            dtype.id not in SUPPORTED or cpu.packing(*dtype.values).dtype != torch.float32,
            reason=f"this CPU does not multiply {dtype.id} in float32",
        ),
        id=dtype.id,
    )
    for dtype in DTYPES[:2]
]

# (N, C, H, W, K, filter, stride, padding, groups): rows of every length around a run's, panels of one row and of many,
# images that end within a panel, blocks of 16 columns alone and after others.
SHAPES = [
    (1, 64, 1, 1, 16, (1, 1), (1, 1), (0, 0), 1),
    (3, 64, 5, 3, 32, (1, 1), (1, 1), (0, 0), 1),
    (2, 128, 9, 7, 48, (1, 1), (2, 2), (0, 0), 1),
    (1, 64, 40, 40, 64, (1, 1), (1, 1), (0, 0), 1),
    (2, 64, 7, 7, 64, (3, 3), (1, 1), (1, 1), 1),
    (3, 64, 8, 17, 80, (3, 3), (2, 2), (1, 1), 1),
    (1, 64, 3, 33, 16, (3, 3), (1, 1), (1, 1), 1),
    (2, 64, 2, 2, 16, (3, 3), (1, 2), (1, 1), 1),
    (1, 64, 56, 56, 32, (3, 3), (1, 1), (1, 1), 1),
    (2, 4, 21, 18, 64, (7, 7), (2, 2), (3, 3), 1),
    (2, 64, 6, 6, 16, (1, 3), (1, 1), (0, 1), 1),
    (2, 64, 6, 5, 16, (5, 1), (3, 1), (4, 0), 1),
    (1, 64, 4, 4, 16, (1, 1), (3, 3), (1, 1), 1),
    (2, 64, 6, 6, 16, (2, 2), (1, 1), (0, 0), 1),
    (5, 20, 7, 5, 48, (3, 3), (1, 1), (1, 1), 1),
    (1, 512, 6, 5, 16, (3, 3), (2, 2), (1, 1), 1),
    (1, 1024, 5, 4, 16, (3, 3), (1, 2), (1, 1), 1),
    (2, 16, 13, 10, 48, (3, 3), (1, 1), (0, 2), 1),
    (1, 1040, 4, 5, 16, (3, 3), (1, 1), (1, 1), 1),
    (3, 32, 30, 29, 64, (3, 3), (1, 1), (2, 1), 1),
    (2, 32, 7, 9, 32, (3, 3), (1, 1), (1, 1), 8),
    (1, 64, 6, 5, 64, (3, 3), (2, 2), (1, 1), 8),
    (1, 48, 6, 15, 48, (3, 3), (1, 1), (1, 1), 3),
    (2, 64, 5, 5, 96, (3, 3), (1, 2), (1, 1), 2),
    (1, 1024, 7, 8, 64, (1, 1), (1, 1), (0, 0), 4),
    (1, 32, 6, 6, 32, (5, 3), (1, 1), (2, 1), 4),
    (1, 2048, 3, 4, 2048, (3, 3), (2, 2), (1, 1), 64),
    (3, 64, 30, 30, 64, (3, 3), (1, 1), (1, 1), 4),
    (2, 3, 21, 18, 64, (7, 7), (2, 2), (3, 3), 1),
    (1, 3, 5, 40, 48, (3, 3), (1, 1), (1, 1), 1),
    (2, 5, 6, 7, 16, (1, 5), (1, 2), (0, 1), 1),
    (2, 64, 7, 5, 1, (1, 1), (1, 1), (0, 0), 1),
    (1, 32, 9, 8, 24, (3, 3), (1, 1), (1, 1), 1),
    (2, 16, 6, 15, 40, (3, 3), (2, 2), (1, 1), 1),
    (3, 2048, 1, 1, 1000, (1, 1), (1, 1), (0, 0), 1),
    (1, 20, 8, 8, 47, (3, 3), (1, 1), (1, 1), 1),
    (2, 64, 3, 4, 32, (3, 3), (1, 1), (4, 1), 1),
    (3, 256, 7, 7, 64, (3, 3), (1, 1), (1, 1), 1),
    (2, 1040, 2, 9, 32, (5, 3), (2, 1), (3, 1), 1),
    (2, 64, 3, 7, 64, (3, 3), (1, 1), (2, 1), 2),
]


def _integers(shape, low, high, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(low, high + 1, shape, generator=generator).to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _operands(shape):
    """Small integers: every sum is exact in fp32, and right values are equal bit by bit."""
    N, C, H, W, K, filter, stride, padding, groups = shape
    x, weight = _integers((N, C, H, W), -3, 3, 0), _integers((K, C // groups, *filter), -2, 2, 1)
    bias = _integers((K,), -9, 9, 2)
    y = F.conv2d(x, weight, bias, stride, padding, groups=groups)
    return x, weight, bias, _integers(y.shape, -50, 50, 3), y


@pytest.mark.parametrize("amx", AMX)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float_results_are_those_of_float64(shape, dtype, amx):
    stride, padding, groups = shape[6:]
    assert cpu.refusal(_operands(shape)[1].to(dtype), stride, padding, (1, 1), groups, "relu") is None
    _check_float_results(shape, dtype, cpu.pack, amx)


@pytest.mark.parametrize(
    "shape", [s for s in SHAPES if s[5:7] == ((3, 3), (1, 1)) and s[1] % 16 == 0 and s[8] == 1], ids=str
)
@pytest.mark.parametrize("dtype", WINOGRAD)
def test_results_by_winograd_are_those_of_float64(shape, dtype):
    _check_float_results(shape, dtype, cpu.pack_winograd)


def _check_float_results(shape, dtype, pack, amx=False):
    x, weight, bias, residual, y = _operands(shape)
    K, filter, stride, padding, groups = shape[4:]
    packed = (pack(weight.to(dtype)), cpu.pack_channels(bias))
    for added, act in [(None, None), (None, "relu"), (residual, "relu"), (residual, None)]:
        truth = y if added is None else y + added
        truth = (truth.relu() if act else truth).to(dtype)
        given = None if added is None else added.to(dtype)
        args = (K, filter, stride, padding, act)
        ours = cpu.conv(x.to(dtype), *packed, given, *args, amx=amx, groups=groups)
        assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours, truth)
        assert torch.equal(cpu.conv(x.to(dtype).contiguous(), *packed, given, *args, amx=amx, groups=groups), truth)
        if given is not None:
            assert torch.equal(given, added.to(dtype))
            over = cpu.conv(x.to(dtype), *packed, given, *args, overwrite_residual=True, amx=amx, groups=groups)
            assert over is given and torch.equal(over, truth)


@pytest.mark.parametrize("amx", AMX)
@pytest.mark.parametrize("zero_point", [0, 3])  # of 0, rows of the filter that lie on padding are left out
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.skipif("int8" not in SUPPORTED, reason="this CPU has no VNNI")
def test_int8_results_are_those_of_float64(shape, zero_point, amx):
    N, C, H, W, K, filter, stride, padding, groups = shape
    x = _integers((N, C, H, W), 0, 255, 0, torch.uint8)
    weight = _integers((K, C // groups, *filter), -128, 127, 1, torch.int8)
    x_grid, y_grid, residual_grid = (
        Grid(0.5, zero_point),
        Grid(64.0, 5),
        Grid(32.0, 9),
    )  # powers of two: nothing is rounded twice
    scale, bias = torch.full((K,), 0.25), _integers((K,), -900, 900, 2, torch.float32)
    values = (x.double() - x_grid.zero_point) * x_grid.scale
    y = F.conv2d(values, weight.double() * 0.25, bias.double(), stride, padding, groups=groups)
    residual = _integers(y.shape, 0, 255, 3, torch.uint8)
    packed = (cpu.pack(weight), *cpu.int8_epilogue(weight.double().sum((1, 2, 3)), scale, bias, x_grid))
    args = (K, filter, stride, padding)
    plain = cpu.int8_conv(x, x_grid, *packed, None, None, *args, None, None, amx=amx, groups=groups)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain.double(), y, rtol=1e-6, atol=1e-3 * float(y.abs().max()) * 1e-3)
    for added, act in [(None, "relu"), (residual, "relu"), (residual, None)]:
        truth = y if added is None else y + (added.double() - residual_grid.zero_point) * residual_grid.scale
        truth = (truth.relu() if act else truth) / y_grid.scale + y_grid.zero_point
        call = (*args, act, y_grid)
        ours = cpu.int8_conv(x, x_grid, *packed, added, residual_grid, *call, amx=amx, groups=groups)
        assert ours.dtype == torch.uint8 and ours.is_contiguous(memory_format=torch.channels_last)
        assert float((ours.double() - truth.clamp(0, 255)).abs().max()) <= 0.5 + 1e-3
        if added is not None:
            again = added.clone()
            kinds = {"overwrite_residual": True, "amx": amx, "groups": groups}
            over = cpu.int8_conv(x, x_grid, *packed, again, residual_grid, *call, **kinds)
            assert over is again and torch.equal(over, ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [1, 17, 47])
def test_nothing_is_written_behind_the_last_channel(K, dtype):
    eight = dtype == torch.int8
    memory = torch.full((6 * K + 64,), 77).to(torch.uint8 if eight else dtype)
    y = memory[: 6 * K].view(1, 2, 3, K).permute(0, 3, 1, 2)
    x, weight = torch.ones(1, 16, 2, 3).to(y.dtype), torch.ones(K, 16, 1, 1).to(dtype)
    scale = cpu.pack_channels(torch.ones(K)) if eight else None
    geometry = (K, (1, 1), (1, 1), (0, 0), 1, False)
    ops = torch.ops.resnet_fused_cpu
    ops.conv_add_(y, cpu._nhwc(x), cpu.pack(weight), scale, cpu.pack_channels(torch.ones(K)), *geometry)
    assert memory.tolist() == [77 + 16 + 1] * (6 * K) + [77] * 64


PACKED = [
    *(pytest.param(cpu.pack, *dtype.values, marks=dtype.marks, id=dtype.id) for dtype in DTYPES[:2]),
    *(
        pytest.param(cpu.pack_winograd, *dtype.values, marks=dtype.marks, id=f"winograd-{dtype.id}")
        for dtype in WINOGRAD
    ),
]


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_nan_is_not_seen_by_the_pixel_before_it(dtype):
    shape = (1, 3, 8, 12, 32, (3, 3), (2, 2), (1, 1), 1)  # nine values a row of the filter, ten in whole words
    x, weight, bias, _, _ = _operands(shape)
    x[0, :, 4, 6], x[0, 0, 7, 11] = torch.nan, -torch.inf
    truth = F.conv2d(x, weight, bias, 2, 1).to(dtype)
    packed = (cpu.pack(weight.to(dtype)), cpu.pack_channels(bias), None)
    ours = cpu.conv(x.to(dtype), *packed, 32, (3, 3), (2, 2), (1, 1), None)
    torch.testing.assert_close(ours, truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("pack", "dtype"), PACKED)
@pytest.mark.parametrize("K", [32, 48])
def test_a_nan_and_an_infinity_stay_what_they_are(pack, dtype, K):
    x, weight, bias, residual, _ = _operands((2, 64, 7, 7, K, (3, 3), (1, 1), (1, 1), 1))
    x[0, 5, 3, 3], x[1, 6, 0, 0], residual[1, 7, 6, 6] = torch.nan, torch.inf, torch.nan
    x[1, 63, 5, 6], x[1, 9, 3, 2] = -torch.inf, torch.nan
    truth = (F.conv2d(x, weight, bias, 1, 1) + residual).relu().to(dtype)
    packed = (pack(weight.to(dtype)), cpu.pack_channels(bias), residual.to(dtype))
    ours = cpu.conv(x.to(dtype), *packed, K, (3, 3), (1, 1), (1, 1), "relu")
    torch.testing.assert_close(ours, truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("pack", [cpu.pack, cpu.pack_winograd])
@pytest.mark.parametrize("C", [16, 64, 256, 512])
@pytest.mark.parametrize("mean", [0, 5])
def test_random_fp32_data_is_as_exact_as_native_pytorch(pack, C, mean):
    generator = torch.Generator().manual_seed(0)
    x, weight = mean + torch.randn(2, C, 9, 9, generator=generator), torch.randn(64, C, 3, 3, generator=generator)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    truth = F.conv2d(x.double(), weight.double(), None, 1, 1)
    ours = cpu.conv(x, pack(weight), torch.zeros(64), None, 64, (3, 3), (1, 1), (1, 1), None)
    error, plain = ((y - truth).abs().max() for y in (ours, F.conv2d(x, weight, None, 1, 1)))
    assert error <= 2 * plain


def test_winograd_takes_what_it_makes_with_fewer_products():
    weight, result = torch.randn(32, 16, 3, 3), (1, 32, 8, 8)
    taken = [(1, 32, 4, 4), (1, 32, 7, 7), (9, 32, 2, 2)]  # at least four tiles, well filled
    left = [(1, 32, 1, 1), (1, 32, 2, 2), (9, 32, 1, 1), (0, 32, 8, 8)]
    assert [cpu.winograd(weight, (1, 1), shape) for shape in taken + left] == [True] * 3 + [False] * 4
    others = [weight[:, :12], torch.randn(32, 16, 3, 1), weight / 0]
    assert not any(cpu.winograd(other, (1, 1), result) for other in others)
    if "bfloat16" in SUPPORTED:
        assert cpu.winograd(weight.bfloat16(), (1, 1), result) == (cpu.packing(torch.bfloat16).dtype == torch.float32)
    assert not cpu.winograd(weight, (2, 1), result)


@pytest.mark.parametrize(
    ("C", "stride", "scale"), [(16, (1, 2), None), (16, (1, 1), torch.ones(32)), (32, (1, 1), None)]
)
def test_a_weight_for_winograd_is_refused_elsewhere(C, stride, scale):
    x = torch.ones(1, C, 8, 8).contiguous(memory_format=torch.channels_last)
    packed = cpu.pack_winograd(torch.ones(32, 16, 3, 3))
    with pytest.raises(RuntimeError, match="conv: "):
        torch.ops.resnet_fused_cpu.conv(x, packed, scale, torch.zeros(32), None, 32, (3, 3), stride, (1, 1), 1, False)


@pytest.mark.parametrize(("pack", "dtype"), PACKED)
def test_the_number_of_threads_changes_no_bit(pack, dtype):
    x, weight = torch.randn(3, 64, 15, 13).to(dtype), torch.randn(80, 64, 3, 3).to(dtype)
    packed, before = (pack(weight), torch.zeros(96), None), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu.conv(x, *packed, 80, (3, 3), (1, 1), (1, 1), "relu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_packed_weights_keep_their_memory_for_as_long_as_they_live():
    with torch.inference_mode():  # the first to ask for memory
        kept = [cpu.pack(torch.full((32, 64, 1, 1), float(k))) for k in range(3)]
    large = cpu.pack(torch.full((1024, 4608, 1, 1), 9.0))  # of a slab of its own
    del kept[1]
    kept += [cpu.pack(torch.full((32, 64, 1, 1), float(k))) for k in range(3, 6)]
    assert [w.unique().tolist() for w in kept] == [[0], [2], [3], [4], [5]] and large.unique().tolist() == [9]
    assert all(w.data_ptr() % 64 == 0 and not w.is_inference() for w in kept)


def test_results_keep_their_memory_for_as_long_as_they_live():
    x, weight = torch.ones(4, 16, 64, 64), torch.ones(16, 16, 1, 1)
    packed = cpu.pack(weight)

    def run(k):
        return cpu.conv(x, packed, torch.full((32,), float(k)), None, 16, (1, 1), (1, 1), (0, 0), None)

    kept = [run(k) for k in range(6)]
    views = [y[:, :1] for y in kept[:3]]
    addresses = {y.data_ptr() for y in kept}
    assert len(addresses) == 6 and all(bool((y == 16 + k).all()) for k, y in enumerate(kept))
    del kept
    later = [run(100) for _ in range(6)]
    assert all(bool((view == 16 + k).all()) for k, view in enumerate(views))  # a view keeps it
    assert len({y.data_ptr() for y in later} & addresses) == 3  # and what nobody holds is used again


POOLS = [
    ((1, 16, 1, 1), 3, 2, 1),
    ((2, 64, 9, 12), 3, 2, 1),
    ((2, 16, 8, 7), 2, 2, 0),
    ((1, 32, 11, 6), (3, 5), 1, (0, 2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape, filter, stride, padding", POOLS)
def test_max_pooling_is_that_of_pytorch(shape, filter, stride, padding, dtype):
    x = _integers(shape, 0 if dtype == torch.uint8 else -200, 255, 0, torch.float32)
    if dtype != torch.uint8:
        x[0, 3, 0, 0], x[0, 4] = torch.nan, -torch.inf
    x, (filter, stride, padding) = x.to(dtype), (_pair(value) for value in (filter, stride, padding))
    assert cpu.pools(x, filter, padding) != (x.shape[2:] == (1, 1))
    truth = F.max_pool2d(x.float(), filter, stride, padding)
    ours = cpu.max_pool(x, filter, stride, padding)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.float(), truth, rtol=0, atol=0, equal_nan=True)
    assert not cpu.pools(x.contiguous(), filter, padding)
    with use_backend("aten"):
        assert not cpu.pools(x, filter, padding)
    assert not cpu.pools(x[:, :8], filter, padding) and not cpu.pools(x.double(), filter, padding)
    assert not cpu.pools(x, (40, 40), (1, 1))
    with pytest.raises(RuntimeError, match="must fit"):
        cpu.max_pool(x, (2, 2), (1, 1), (2, 2))


def test_quantise_rounds_to_the_nearest_point_of_the_grid():
    grid = Grid(0.25, 30)
    x = torch.linspace(-12.0, 70.0, 3 * 5 * 7 * 9).reshape(1, 15, 7, 9)
    x[0, 0, 0, :3] = torch.tensor([0.125, 0.375, -0.125])  # a half goes to the even step
    assert cpu.quantises(x) and not cpu.quantises(x.double()) and not cpu.quantises(x[0])
    truth = ((x.double() / grid.scale).round() + grid.zero_point).clamp(0, 255).to(torch.uint8)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        q = cpu.quantise(given, grid)
        assert q.is_contiguous(memory_format=torch.channels_last) and torch.equal(q, truth)


def _pair(value):
    return [value, value] if isinstance(value, int) else list(value)


def test_an_empty_batch_has_an_empty_result():
    packed, geometry = (cpu.pack(torch.ones(16, 16, 3, 3)), torch.zeros(32), None), ((3, 3), (2, 2), (1, 1))
    y = cpu.conv(torch.empty(0, 16, 5, 5), *packed, 16, *geometry, "relu")
    assert y.shape == (0, 16, 3, 3)


def test_the_ops_are_as_their_schemas_and_fake_kernels_say():
    x, weight, bias, residual, _ = (t.float() for t in _operands((2, 16, 6, 7, 32, (3, 3), (2, 2), (1, 1), 1)))
    packed, geometry = cpu.pack(weight), (32, [3, 3], [2, 2], [1, 1], 1, True)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.resnet_fused_cpu
    torch.library.opcheck(ops.conv.default, (x, packed, None, bias, residual, *geometry), test_utils=checks)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(ops.quantise.default, (nhwc, 0.5, 3), test_utils=checks)
    torch.library.opcheck(ops.mean.default, (cpu.quantise(nhwc, Grid(0.5, 3)), 0.5, 3), test_utils=checks)
    torch.library.opcheck(ops.mean.default, (nhwc.bfloat16(), 1.0, 0, True), test_utils=checks)
    with pytest.raises(RuntimeError, match="mean: no kernel on this CPU takes 42 pixels of Float to BFloat16"):
        ops.mean(nhwc, to_bfloat16=True)
    torch.library.opcheck(ops.max_pool.default, (x, [3, 3], [2, 2], [1, 1]), test_utils=checks)
    torch.library.opcheck(ops.conv_add_.default, (residual, x, packed, None, bias, *geometry), test_utils=checks)
    two = _two_convolutions()
    torch.library.opcheck(ops.steps.default, (nhwc, two._tensors, two._numbers, two._scales), test_utils=checks)
    pooled = cpu.Steps()
    eight = pooled.max_pool(pooled.quantise(0, Grid(0.5, 3)), (3, 3), (2, 2), (1, 1), torch.uint8)
    assert (pooled.mean(eight, Grid(0.5, 3), torch.bfloat16), len(pooled)) == (3, 3)
    torch.library.opcheck(
        ops.steps.default, (nhwc, pooled._tensors, pooled._numbers, pooled._scales), test_utils=checks
    )


def _two_convolutions():
    steps, ones = cpu.Steps(), cpu.pack(torch.ones(16, 16, 3, 3))
    geometry = ((ones, None, torch.zeros(32)), 16, (3, 3), (1, 1), (1, 1), 1)
    assert steps.conv(0, None, *geometry, "relu", torch.float32) == 1
    assert steps.conv(1, 0, *geometry, None, torch.float32) == 2
    return steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 40, 7, 7), (1, 16, 1, 1), (3, 7, 5, 31), (1, 16, 128, 96), (0, 16, 4, 4)])
def test_means_over_pixels_are_those_of_float64(size, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(size, generator=generator) + 3).to(dtype).contiguous(memory_format=torch.channels_last)
    assert cpu.averages(x)
    y, truth = cpu.mean(x, None, dtype), x.double().mean((2, 3), keepdim=True)
    assert y.dtype == dtype and y.shape == (*size[:2], 1, 1)
    half_a_step = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(y.double(), truth, rtol=half_a_step + 8 * torch.finfo(torch.float32).eps, atol=0)
    if x.numel() > 0:
        x[0, 3, 0, 0] = math.nan
        assert cpu.mean(x, None, dtype).isnan().nonzero().tolist() == [[0, 3, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_of_8_bits_is_rounded_as_pytorch_does_and_refused_within_a_call_if_not_finite(dtype):
    grid, generator = Grid(0.03125, 120), torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 5, 9, 7, generator=generator)).to(dtype).contiguous(memory_format=torch.channels_last)
    expected = torch.ops.quantized_decomposed.quantize_per_tensor(x.float(), *grid, 0, 255, torch.uint8)
    steps = cpu.Steps()
    assert steps.quantise(0, grid) == 1
    assert torch.equal(cpu.quantise(x, grid), expected) and torch.equal(steps(x), expected)
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, -1):
            spoilt = x.clone()
            spoilt[place, place, place, place] = bad
            with pytest.raises(RuntimeError, match="8 bits have no value for a NaN or an infinity"):
                steps(spoilt)


def test_convolutions_in_one_call_read_what_was_made_before_them_and_no_more():
    x = torch.ones(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    y = _two_convolutions()(x)
    assert float(y[0, 0, 0, 0]) == 1 + 16 * (64 + 96 + 96 + 144) and torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize("readers", [1, 2])
def test_a_residual_that_is_read_again_is_not_overwritten(readers):
    steps, identity = cpu.Steps(), cpu.pack(torch.eye(16).reshape(16, 16, 1, 1))
    same = ((identity, None, torch.ones(32)), 16, (1, 1), (1, 1), (0, 0), 1, None, torch.float32)
    a = steps.conv(0, None, *same)  # x + 1
    b = steps.conv(a, None, *same)  # x + 2
    c = steps.conv(b, a, *same)  # x + 3 + a
    steps.conv(c, a if readers == 2 else None, *same)
    x = torch.arange(16.0).reshape(1, 16, 1, 1)
    assert torch.equal(steps(x), 2 * x + 5 if readers == 1 else 3 * x + 6)


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("numbers", {0: 4}, "step 0 is of no known op or dtype"),
        ("numbers", {1: 3}, "step 0 is of no known op or dtype"),
        ("numbers", {2: -1}, "step 0 reads a value that no step before it made"),
        ("numbers", {3: 1}, "step 0 reads a value that no step before it made"),
        ("numbers", {18: 2}, "step 1 reads a value that no step before it made"),
        ("numbers", {-1: None}, "16 numbers each, got 31"),
        ("tensors", {0: None}, "step 0 has no weight or no bias"),
        ("tensors", {-1: None}, "a weight, a scale and a bias"),
        ("scales", {-1: None}, "a weight, a scale and a bias"),
    ],
)
def test_bad_steps_are_refused_before_anything_runs(part, value, message):
    steps = _two_convolutions()
    ((place, new),) = value.items()
    listed = getattr(steps, f"_{part}")
    if place == -1:
        listed.pop()
    else:
        listed[place] = new
    with pytest.raises(RuntimeError, match=message):
        steps(torch.ones(1, 16, 4, 4))


def test_what_a_kernel_cannot_take_is_left_to_others_or_refused():
    ones, geometry = torch.ones(32, 16, 1, 1), ((1, 1), (1, 1), (1, 1), 1)
    assert cpu.refusal(ones, *geometry, None) is None and cpu.refusal(ones, *geometry, "relu") is None
    takes = "our CPU kernel takes "
    assert cpu.refusal(ones, *geometry, "silu") == takes + "no silu"
    assert cpu.refusal(ones[:8], *geometry, None) is None
    assert cpu.refusal(ones, (1, 1), (1, 1), (2, 2), 1, None) == takes + "no dilation"
    groups = cpu.refusal(ones, *geometry[:3], 4, None)
    assert (
        groups is not None and groups.startswith(takes + "groups of 16") and groups.endswith("16 inputs and 8 outputs")
    )
    names = [name for name in ("bfloat16", "float32", "int8") if name in SUPPORTED]
    assert cpu.refusal(ones.half(), *geometry, None) == f"{takes}{', '.join(names)}, not float16"
    if "int8" in SUPPORTED:
        few = cpu.refusal(ones[:, :3].to(torch.int8), (1, 1), (0, 0), (1, 1), 1, None)
        assert few == takes + "multiples of 4 input channels in int8, not 3, where nothing is padded or grouped"
    assert cpu.refusal(ones.to("meta"), *geometry, None) == ""  # nobody asked for it
    with use_backend("aten"):
        assert cpu.refusal(ones, *geometry, None) == ""
    x, packed, bias = torch.ones(1, 16, 5, 5), cpu.pack(torch.ones(32, 16, 3, 3)), torch.zeros(32)
    args = (None, 32, (3, 3), (1, 1), (1, 1), None)
    for wrong, message in [
        ((x[:, :8], packed, bias, *args), "not packed"),
        ((x, packed, bias[:16], *args), "bias"),
        ((x[0], packed, bias, *args), "4-D|rank"),
        ((x, packed, bias, x, *args[1:]), "residual"),
        ((x, packed, bias, None, 40, *args[2:]), "not packed"),
        ((x, packed, bias, None, 0, *args[2:]), "fit"),
        ((x, packed, bias, None, 32, (3, 3), (1, 1), (-1, 1), None), "fit"),
        ((x.double(), packed, bias, *args), "no kernel"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            cpu.conv(*wrong)
