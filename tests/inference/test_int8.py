"""`freeze(quantize=...)`: the int8 network against a float64 simulation of it, its plan, and what it hands around."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from networks import randomised, small_resnet
from small_net import Net
from torch import nn

from resnet_fused import Int8, freeze
from resnet_fused.functional.statistics import constant_affine
from resnet_fused.inference import Int8Conv
from resnet_fused.inference.int8 import Quantised
from resnet_fused.inference.pool import FrozenGlobalAvgPool2d, FrozenMaxPool2d, freeze_pools
from resnet_fused.nn import BasicBlock, Bottleneck
from resnet_fused.ops import cpu, onednn
from resnet_fused.ops.activations import ACTIVATIONS, activate
from resnet_fused.ops.arithmetic import fold
from resnet_fused.ops.onednn import Grid

pytestmark = pytest.mark.skipif(onednn.int8_refusal() is not None, reason=str(onednn.int8_refusal()))


def _x(n=2, channels=3, size=24, seed=0):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def _grouped():
    """A bottleneck of ResNeXt, and one with a projection."""
    projection = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(Bottleneck(16, 8, 2, projection, groups=4, base_width=64), Bottleneck(32, 8))


def _pooled():
    """A pool hands on the grid of the convolution before it, where calibration found another for the one behind."""
    names = ("conv1", "bn1", "relu1", "pool", "conv2", "bn2", "relu2", "conv3", "bn3", "relu3")
    layers = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    layers += (nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    layers += (nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(OrderedDict(zip(names, layers, strict=True)))


NETWORKS = {"resnet": (small_resnet, 3), "bottleneck": (Net, 3), "grouped": (_grouped, 16), "pooled": (_pooled, 3)}


def _pair(name, dtype=torch.float32, **options):
    torch.manual_seed(0)
    make, channels = NETWORKS[name]
    model = randomised(make()).eval().to(dtype)
    x = _x(channels=channels).to(dtype)
    return model, freeze(model, x, quantize=Int8([_x(channels=channels, seed=1).to(dtype), x], **options)), x


def _calls(frozen, x):
    """(convolution, input, residual, result) of each int8 convolution, tensors in 8 bits."""
    seen = []

    def look(conv, args, named, y):
        kept = [(t.eight().clone(), t.grid) if isinstance(t, Quantised) else t for t in (*args, y)]
        seen.append((conv, kept[0], kept[1] if len(args) > 1 else None, kept[-1]))

    def before(conv, args, named):
        return args, {**named, "overwrite_residual": False}  # for it is looked at afterwards

    handles = []
    for conv in frozen.modules():
        if isinstance(conv, Int8Conv):
            handles.append(conv.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(conv.register_forward_hook(look, with_kwargs=True))
    frozen(x)
    for handle in handles:
        handle.remove()
    return seen


def _values(t, grid):
    """What an activation of a call stands for, in float64; a float one is rounded to `grid` first."""
    if isinstance(t, torch.Tensor):
        q = torch.ops.quantized_decomposed.quantize_per_tensor(t.float(), *grid, 0, 255, torch.uint8)
    else:
        q, grid = t
    return (q.double() - grid.zero_point) * grid.scale


def _norm_of(model, layer):
    """The batch norm behind a convolution of these networks."""
    parent, _, name = layer.rpartition(".")
    follows = str(int(name) + 1) if name.isdigit() else name.replace("conv", "bn")
    return model.get_submodule(f"{parent}.{follows}" if parent else follows)


def _simulated(model, conv, x, residual):
    """The result of an int8 convolution before its last rounding, in float64: same scales, the model's own weights."""
    plain, bn = model.get_submodule(conv.layer), _norm_of(model, conv.layer)
    statistics = (bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    scale, shift, *_ = constant_affine(*statistics, plain.weight.dtype)
    folded, scales = fold(plain.weight, scale, torch.float32), conv.weight_scale
    torch.testing.assert_close(scales, folded.abs().amax((1, 2, 3)) / 127.5, rtol=1e-6, atol=0)
    per_channel = (scales, torch.zeros(len(scales), dtype=torch.int64), 0, -128, 127, torch.int8)
    weight = torch.ops.quantized_decomposed.quantize_per_channel(folded, *per_channel)
    weight = weight.double() * scales.double().view(-1, 1, 1, 1)
    y = F.conv2d(_values(x, conv.grids.x), weight, shift.double(), *conv.geometry)
    y = y if residual is None else y + _values(residual, conv.grids.residual)
    return activate(y, conv.act)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_against_float64_of_the_same_scales(name, dtype):
    model, frozen, x = _pair(name, dtype)
    calls = _calls(frozen, x)
    assert len(calls) == len(frozen.plan.layers) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    for conv, x8, residual, (q, grid) in calls:
        truth = _simulated(model, conv, x8, residual)
        exact = (truth / grid.scale + grid.zero_point).clamp(0, 255)
        assert (q.double() - exact).abs().max() <= 0.5 + 1e-4, conv.layer  # fp32 rounds a half to either side
        assert q.amax() > 100 and (q.amin() == 0 or conv.act != "relu"), conv.layer  # the 8 bits are used


def _loss(ours, truth):
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_network_in_int8_is_near_the_float64_network(name, dtype, memory_format):
    model, frozen, x = _pair(name, dtype)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
    given = x.contiguous(memory_format=memory_format)
    y = frozen(given)
    assert type(y) is torch.Tensor and y.dtype == dtype and y.shape == truth.shape
    assert _loss(y, truth) < 0.05
    assert torch.equal(y, frozen(given))
    assert torch.equal(copy.deepcopy(frozen)(given), y)


def test_the_plan_has_each_layers_error_and_why_a_layer_is_in_float():
    _, frozen, x = _pair("resnet", keep=("conv1", "layer2.0"))
    rows = {row.layer: row for row in frozen.plan.layers}
    kept = {"conv1", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.conv3", "layer2.0.downsample.0"}
    for layer, row in rows.items():
        if layer in kept:
            assert (row.op, row.reason, row.error) == ("conv_fprop", "kept in float by name", None)
        else:
            assert row.op in ("int8_conv", "qconv2d_pointwise") and 1e-4 < row.error < 0.05
            assert not row.reason or (row.op == "qconv2d_pointwise" and row.reason.startswith("our CPU kernel"))
            assert "requantisation" in row.fused
    assert "residual" in rows["layer1.conv2"].fused
    text = str(frozen.plan)
    summary = " ".join(text.replace("\n  ", " ").splitlines()[:1])
    worst = max((row for row in rows.values() if row.error is not None), key=lambda row: row.error)
    assert summary.startswith("10 convolutions: ")
    assert all(f" in {row.op} on {row.backend}" in summary for row in rows.values())
    assert f"largest: {worst.layer} {worst.error:.1%}, " in text and text.count("kept in float by name") >= 1
    assert max(map(len, text.splitlines())) <= 120
    float_plan = str(freeze(small_resnet().eval(), x).plan)
    assert "int8" not in float_plan


def test_an_error_in_the_plan_is_that_of_the_layer_alone():
    model, frozen, x = _pair("bottleneck")
    first = _x(seed=1)
    frozen = freeze(model, x, quantize=[first])
    conv = next(module for module in frozen.modules() if isinstance(module, Int8Conv) and module.layer == "conv1")
    with torch.no_grad():
        truth = F.relu(model.bn1(model.conv1(first)))
        expected = _loss(conv(first) + 0, truth)
    assert frozen.plan.layers[0].error == pytest.approx(expected, rel=1e-3)


def test_layers_kept_in_float_cost_no_accuracy_and_mix_with_the_others():
    model, everything, x = _pair("resnet")
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
    losses = []
    for keep in [
        (),
        ("layer1.conv2", "layer2.1.conv1"),
        ("layer2", "conv1"),
        ("conv1", "layer1", "layer2.0", "layer2.1.conv1"),
    ]:
        frozen = freeze(model, x, quantize=Int8([x], keep))
        losses.append(_loss(frozen(x), truth))
    assert max(losses) < 0.05 and losses[-1] < losses[0]


def test_activations_stay_in_8_bits_from_the_stem_to_the_head():
    _, frozen, x = _pair("resnet")
    calls = _calls(frozen, x)
    floats = [conv.layer for conv, x8, residual, _ in calls if any(isinstance(t, torch.Tensor) for t in (x8, residual))]
    assert floats == ["conv1"]
    assert any(isinstance(module, FrozenMaxPool2d) for module in frozen.modules())


def test_other_sizes_and_an_empty_batch():
    model, frozen, _ = _pair("resnet")
    for x in (_x(size=33), _x(n=5, size=17), _x()[:, :, ::2, 1:], _x().transpose(2, 3), _x(n=0)):
        with torch.no_grad():
            expected = model(x)
        y = frozen(x)
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected, rtol=0, atol=0.08 * float(expected.abs().max()) if len(x) else 0.0)


class _Between(nn.Module):
    """Code of all kinds between convolutions: a view, a sum that is not recognised, operations in place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        pooled = F.max_pool2d(y, 2)
        y.add_(1.0).mul_(torch.sigmoid(pooled.view(pooled.shape[0], -1).mean(1)).view(-1, 1, 1, 1))
        z = self.bn2(self.conv2(y))
        z[:, :2].zero_()
        return F.relu(self.bn3(self.conv3(z))), z, (z - y).flatten(1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_what_is_not_fused_reads_floats(memory_format):
    torch.manual_seed(0)
    model, x = randomised(_Between()).eval(), _x()
    if memory_format == torch.contiguous_format:  # `view` wants that order of the model too
        frozen = freeze(model, x, quantize=[x])
        with torch.no_grad():
            expected = model(x)
        assert all(row.error is not None for row in frozen.plan.layers)
        for ours, plain in zip(frozen(x), expected, strict=True):
            assert type(ours) is torch.Tensor and ours.is_contiguous() == plain.is_contiguous()
            assert _loss(ours, plain.double()) < 0.03
    else:
        with pytest.raises(RuntimeError, match="view"):
            freeze(model.to(memory_format=memory_format), x.contiguous(memory_format=memory_format), quantize=[x])


def test_a_tensor_in_8_bits_is_a_float_tensor_to_everyone_else():
    q = torch.arange(256, dtype=torch.uint8).view(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    grid = Grid(0.25, 7)
    t = Quantised(q, grid, torch.float32, nchw=True)
    assert (t.dtype, t.shape, t.is_contiguous(), t.device) == (torch.float32, q.shape, True, q.device)
    assert t.eight() is q
    expected = (q.float() - 7) * 0.25
    assert torch.equal(t + 0, expected) and torch.equal(t.view(2, -1), expected.reshape(2, -1))
    assert torch.equal(t.eight(), q)  # rounded anew
    t.mul_(0.5)  # reaches what the tensor stands for
    assert torch.equal(t + 0, expected * 0.5)
    assert torch.equal(t.eight(), onednn.quantise(expected * 0.5, grid))


def test_rounding_is_pytorchs():
    x = torch.cat([torch.randn(4000) * 3, torch.arange(-20, 20) * 0.05, torch.tensor([1e30, -1e30])])
    for grid in (Grid(0.1, 0), Grid(0.03, 131), Grid(0.02, 255)):
        theirs = torch.ops.quantized_decomposed.quantize_per_tensor(x, *grid, 0, 255, torch.uint8)
        assert torch.equal(onednn.quantise(x, grid), theirs)


@pytest.mark.parametrize("geometry", [(3, 2, 1), (2, 2, 0), ((3, 2), (2, 1), (1, 0))])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_a_max_pool_of_8_bits_is_exact(geometry, ceil_mode):
    q = torch.randint(0, 256, (2, 5, 9, 10)).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    pool = FrozenMaxPool2d(*geometry, ceil_mode=ceil_mode)
    t = Quantised(q, Grid(0.5, 3), torch.float32, nchw=False)
    y = pool(t)
    assert isinstance(y, Quantised) and y.grid == t.grid
    assert torch.equal(y.eight().float(), F.max_pool2d(q.float(), *geometry, ceil_mode=ceil_mode))


def test_a_layer_that_is_silent_in_calibration_stays_in_float():
    torch.manual_seed(0)
    model, x = randomised(Net()).eval(), _x()
    with torch.no_grad():
        model.layer[0].bn1.weight.zero_()
        model.layer[0].bn1.bias.fill_(-1.0)
    frozen = freeze(model, x, quantize=[x])
    rows = {row.layer: row for row in frozen.plan.layers}
    assert rows["layer.0.conv1"].reason == "its result was 0 everywhere on the calibration inputs"
    assert rows["layer.0.conv2"].reason == "its input was 0 everywhere on the calibration inputs"
    assert rows["layer.0.conv3"].error is not None
    with torch.no_grad():
        assert _loss(frozen(x), model(x).double()) < 0.05


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_frozen_and_called_in_any_mode(mode):
    torch.manual_seed(0)
    model, x = randomised(Net()).eval(), _x()
    with mode():
        frozen = freeze(model, x, quantize=[x.clone().requires_grad_()])
    expected = frozen(x)
    for call in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with call():
            y = frozen(x.clone().requires_grad_())
            assert torch.equal(y, expected) and not y.requires_grad


def test_frozen_under_autocast():
    torch.manual_seed(0)
    model, x = randomised(Net()).eval(), _x()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        frozen, expected = freeze(model, x, quantize=[x]), model(x)
    y = frozen(x)
    assert y.dtype == expected.dtype and all(row.error is not None for row in frozen.plan.layers)
    assert _loss(y, expected.double()) < 0.05


def test_the_model_is_left_as_it_is():
    torch.manual_seed(0)
    model, x = randomised(small_resnet()).eval(), _x()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    freeze(model, x, quantize=[x])
    assert kinds == [type(module) for module in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_residual_of_another_shape_is_added_apart_in_float():
    model, frozen, x = _pair("resnet")
    conv = next(m for m in frozen.modules() if isinstance(m, Int8Conv) and m.layer == "layer1.conv2")
    y = torch.rand(2, 8, 6, 6) * 255 * conv.grids.x.scale  # what was calibrated
    residual = _x(n=1, channels=8, size=1, seed=2)
    with torch.no_grad():
        expected = F.relu(model.layer1.bn2(model.layer1.conv2(y)) + residual)
        ours = conv(y, residual)
    assert type(ours) is torch.Tensor and _loss(ours, expected.double()) < 0.05


class _Features(nn.Module):
    """A stem and blocks, whose activations are all returned."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.first, self.second = BasicBlock(8, 8), BasicBlock(8, 8)

    def forward(self, x):
        x = self.stem(x)
        y = self.first(x)
        return x, y, self.second(y)


class _Gated(nn.Module):
    """SiLU behind a convolution, and behind a sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        y = F.silu(self.bn1(self.conv1(x)))
        return F.silu(self.bn2(self.conv2(y)) + y)


def test_silu_is_in_the_epilogue_but_not_behind_a_sum():
    torch.manual_seed(0)
    model, x = randomised(_Gated()).eval(), _x()
    frozen = freeze(model, x, quantize=[x])
    first, second = frozen.plan.layers
    assert first.fused == "batch norm, silu, requantisation"
    assert (second.op, second.reason) == (
        "conv_fprop",
        "oneDNN's int8 convolution adds a residual before ReLU, not before silu",
    )
    with torch.no_grad():
        assert _loss(frozen(x), model(x).double()) < 0.03


def test_an_activation_that_others_read_is_not_overwritten():
    torch.manual_seed(0)
    model, x = randomised(_Features()).eval(), _x()
    frozen = freeze(model, x, quantize=[x])
    with torch.no_grad():
        for ours, plain in zip(frozen(x), model(x), strict=True):
            assert _loss(ours, plain.double()) < 0.03


@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@pytest.mark.parametrize("result", [Grid(0.05, 0), Grid(0.05, 90), torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual_grid", [None, Grid(0.02, 0), Grid(0.03, 130)], ids=str)
@pytest.mark.parametrize("geometry", [([1, 1], [1, 1], [1, 1], 1), ([2, 1], [0, 2], [1, 2], 4)], ids=str)
def test_the_op_against_float64(geometry, residual_grid, result, act):
    if not isinstance(result, Grid) or act not in (None, "relu"):
        residual_grid = None  # a float result has none, and no other activation follows one
    generator, nhwc = torch.Generator().manual_seed(0), torch.channels_last
    x_grid, groups = Grid(0.04, 77), geometry[3]
    x = torch.randint(0, 256, (2, 8, 9, 10), generator=generator).to(torch.uint8).contiguous(memory_format=nhwc)
    weight = torch.randint(-128, 128, (16, 8 // groups, 3, 3), generator=generator).to(torch.int8)
    scale, bias = torch.rand(16, generator=generator) * 4e-3, torch.randn(16, generator=generator)
    dense = weight.double() * scale.double().view(-1, 1, 1, 1)
    truth = F.conv2d((x.double() - 77) * 0.04, dense, bias.double(), *geometry)
    residual = None
    if residual_grid is not None:
        residual = torch.randint(0, 256, truth.shape, generator=generator).to(torch.uint8)
        residual = residual.contiguous(memory_format=nhwc)
        truth = truth + (residual.double() - residual_grid.zero_point) * residual_grid.scale
    packed = onednn.int8_pack(weight, scale, x_grid, *geometry, x.shape)
    y = onednn.int8_conv(x, x_grid, packed, scale, bias, residual, residual_grid, *geometry, act, result)
    truth = activate(truth, act)
    if isinstance(result, Grid):
        exact = (truth / result.scale + result.zero_point).clamp(0, 255)
        assert y.dtype == torch.uint8 and (y.double() - exact).abs().max() <= 0.5 + 1e-4
    else:
        floor = torch.finfo(result).eps * 2 * truth.abs().max()
        assert y.dtype == result and (y.double() - truth).abs().max() <= floor


@pytest.mark.skipif(not cpu.supported(), reason="no AVX2, or the kernels for CPUs are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 64, 7, 7), (1, 47, 3, 5), (3, 16, 1, 1), (0, 16, 4, 4)])
def test_a_global_average_sums_8_bits_and_rounds_once(shape, dtype):
    eight = torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    grid, pools = Grid(0.37, 100), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((1, 2)))
    freeze_pools(pools)
    assert [type(pool) for pool in pools] == [FrozenGlobalAvgPool2d, nn.AdaptiveAvgPool2d]
    y = pools[0](Quantised(eight, grid, dtype, nchw=False))
    truth = ((eight.double() - grid.zero_point) * grid.scale).mean((2, 3), keepdim=True)
    assert type(y) is torch.Tensor and y.shape == (*shape[:2], 1, 1) and y.dtype == dtype
    torch.testing.assert_close(y, truth.to(dtype), rtol=0 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)
    floats = torch.randn(2, 8, 3, 3)
    assert torch.equal(pools[0](floats), nn.functional.adaptive_avg_pool2d(floats, 1))
