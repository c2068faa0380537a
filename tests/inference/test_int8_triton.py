"""`freeze(quantize=...)` on the Triton kernels: against float64 of the same scales, and beside a CPU's int8 network."""

from __future__ import annotations

import copy

import pytest
import test_int8 as on_cpu
import torch
import torch.nn.functional as F
from conv_cases import runs_kernels
from networks import DEVICE, randomised
from small_net import Net
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from resnet_fused import Int8, freeze, ops, use_backend
from resnet_fused.dispatch import choice
from resnet_fused.inference.conv import FoldedConv
from resnet_fused.inference.int8 import Quantised, on_grid, quantise
from resnet_fused.inference.int8_triton import Int8Join, TritonInt8Conv
from resnet_fused.inference.pool import FrozenMaxPool2d
from resnet_fused.inference.quantize import poisoned
from resnet_fused.nn import BasicBlock
from resnet_fused.ops import onednn
from resnet_fused.ops.onednn import Grid

pytestmark = runs_kernels
NHWC = torch.channels_last


def _basic():
    projection = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 32, 2, projection), BasicBlock(32, 32))


NETWORKS = on_cpu.NETWORKS | {"basic": (_basic, 16)}
every_network = pytest.mark.parametrize("name", NETWORKS)


def _x(**how):
    return on_cpu._x(**how).to(DEVICE)


def _model(name, dtype=torch.float32):
    torch.manual_seed(0)
    make, channels = NETWORKS[name]
    x, more = (_x(channels=channels, size=12, seed=seed).to(dtype) for seed in (0, 1))
    return randomised(make()).eval().to(DEVICE, dtype), x, more


def _freeze(model, x, *more, **options):
    with use_backend("triton"):
        return freeze(model, x, quantize=Int8([*more, x], **options))


def _pair(name, dtype=torch.float32, **options):
    model, x, more = _model(name, dtype)
    return model, _freeze(model, x, more, **options), x


def _seen(frozen, x, kind):
    """(module, tensors that it reads, result) of each call of such modules; tensors as (int8, grid)."""
    calls = []

    def look(module, args, named, y):
        join = kind is Int8Join
        grids = (module.conv3.grids.x, module.projection.grids.x) if join else (module.grids.x, module.grids.residual)
        tensors = zip((*args, named.get("residual")), grids, strict=False)
        read = [on_grid(t, grid, signed=True) for t, grid in tensors if t is not None]
        calls.append((module, read, on_grid(y, None)))

    handles = [m.register_forward_hook(look, with_kwargs=True) for m in frozen.modules() if isinstance(m, kind)]
    with torch.no_grad():
        frozen.network(x)
    for handle in handles:
        handle.remove()
    return calls


def _steps(truth, grid):
    return (truth / grid.scale + grid.zero_point).clamp(-128, 127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_network
def test_every_convolution_against_float64_of_the_same_scales(name, dtype):
    model, frozen, x = _pair(name, dtype)
    calls = _seen(frozen, x, TritonInt8Conv)
    joined = [part for m in frozen.modules() if isinstance(m, Int8Join) for part in (m.conv3, m.projection)]
    assert len(calls) + len(joined) == len(frozen.plan.layers) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    for conv, read, (q, grid) in calls:
        truth = on_cpu._simulated(model, conv, *read, *([None] * (2 - len(read))))
        assert q.dtype == torch.int8 and grid == conv.grids.y
        assert (q.double() - _steps(truth, grid)).abs().max() <= 0.5 + 1e-3, conv.layer
        assert q.amax() > -64 and (conv.act != "relu" or grid.zero_point == -128), conv.layer  # the 8 bits are used


@pytest.mark.parametrize("name", ["resnet", "bottleneck", "grouped"])
def test_a_join_against_float64_and_beside_its_two_convolutions(name):
    model, frozen, x = _pair(name)
    ((join, (a, b), (q, grid)),) = _seen(frozen, x, Int8Join)
    truth = on_cpu._simulated(model, _without_act(join.conv3), a, None)
    truth = (truth + on_cpu._simulated(model, join.projection, b, None)).relu()
    assert (q.double() - _steps(truth, grid)).abs().max() <= 0.5 + 1e-3
    inputs = [Quantised(t, on, torch.float32, nchw=False) for t, on in (a, b)]
    apart, _ = on_grid(join.conv3(inputs[0], join.projection(inputs[1])), None)
    rounded = join.projection.grids.y.scale / grid.scale  # half a step of it more, rounded once more
    assert (q.int() - apart.int()).abs().max() <= 1 + rounded / 2


def _without_act(conv):
    """The convolution without its activation, for a sum behind it."""
    twin = copy.copy(conv)
    twin.act = None
    return twin


@pytest.mark.skipif(onednn.int8_refusal() is not None, reason=str(onednn.int8_refusal()))
@every_network
def test_beside_the_cpus_network_of_the_same_grids(name):
    """Signed or not, the grids are the same; without a join, which rounds less, so are the results."""
    model, ours, x = _pair(name)
    _, _, more = _model(name)
    theirs = freeze(model.cpu(), x.cpu(), quantize=[more.cpu(), x.cpu()])
    here, there = ({m.layer: m.grids for m in frozen.modules() if hasattr(m, "grids")} for frozen in (ours, theirs))
    assert here.keys() == there.keys() == {row.layer for row in ours.plan.layers}
    for layer, grids in here.items():
        for one, other in zip(grids, there[layer], strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.zero_point == other.zero_point - 128
                assert one.scale == pytest.approx(other.scale, rel=1e-5)
    joins = any(isinstance(m, Int8Join) for m in ours.modules())
    with torch.no_grad():
        y, expected = ours(x).cpu().double(), theirs(x.cpu()).double()
    assert float((y - expected).norm() / expected.norm()) < (0.02 if joins else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_network
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
def test_a_network_is_near_the_float64_network(name, dtype, memory_format):
    model, frozen, x = _pair(name, dtype)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        plain = model(x)
    given = x.contiguous(memory_format=memory_format)
    y = frozen(given)
    assert type(y) is torch.Tensor and y.dtype == dtype and y.shape == truth.shape
    assert on_cpu._loss(y, truth) < 0.05
    assert torch.equal(y, frozen(given)) and torch.equal(copy.deepcopy(frozen)(given), y)
    assert frozen(x).stride() == plain.stride()


def test_the_plan_says_what_runs_and_what_stays_in_float():
    _, frozen, x = _pair("resnet", keep=("layer2.1",))
    rows = {row.layer: row for row in frozen.plan.layers}
    for layer, row in rows.items():
        if layer.startswith("layer2.1"):
            assert (row.backend, row.op, row.reason) == ("aten", "conv_fprop", "kept in float by name")
        else:
            joined = layer in ("layer2.0.conv3", "layer2.0.downsample.0")
            assert (row.backend, row.op) == ("triton", "conv_join_int8" if joined else "conv_fprop_int8")
            assert 1e-4 < row.error < 0.05 and "requantisation" in row.fused
    kept = [m for m in frozen.modules() if isinstance(m, FoldedConv)]
    assert len(kept) == 3
    text = str(frozen.plan)
    assert "2 in conv_join_int8 on triton" in text.replace("\n  ", " ") and max(map(len, text.splitlines())) <= 120
    assert "conv_join_int8: " in text and "conv_fprop_int8: " in text
    frozen(x)


def test_a_basic_block_has_no_join_and_says_why():
    _, frozen, _ = _pair("basic")
    row = next(row for row in frozen.plan.layers if row.layer == "1.conv2")
    assert row.op == "conv_fprop_int8" and row.reason == "conv_join_int8: 1.conv2 is 3x3, not 1x1"


def test_a_join_needs_both_in_int8():
    model, frozen, x = _pair("bottleneck", keep=("layer.0.downsample",))
    assert not any(isinstance(m, Int8Join) for m in frozen.modules())
    with torch.no_grad():
        assert on_cpu._loss(frozen(x), model(x).double()) < 0.05


def test_silu_is_in_the_epilogue_behind_a_sum_too():
    torch.manual_seed(0)
    model, x = randomised(on_cpu._Gated()).eval().to(DEVICE), _x()
    frozen = _freeze(model, x)
    assert [row.op for row in frozen.plan.layers] == ["conv_fprop_int8"] * 2
    with torch.no_grad():
        assert on_cpu._loss(frozen(x), model(x).double()) < 0.03


def test_activations_stay_in_8_bits_from_the_stem_to_the_head():
    _, frozen, x = _pair("resnet")
    floats = []
    for conv in frozen.modules():
        if isinstance(conv, TritonInt8Conv):
            conv.register_forward_pre_hook(
                lambda conv, args: floats.extend([conv.layer] * (not all(isinstance(t, Quantised) for t in args)))
            )
    frozen.network(x)
    assert floats == ["conv1"]


def test_other_sizes_and_an_empty_batch():
    model, frozen, _ = _pair("resnet")
    for x in (_x(size=33), _x(n=3, size=17), _x()[:, :, ::2, 1:], _x().transpose(2, 3), _x(n=0)):
        with torch.no_grad():
            expected = model(x)
        y = frozen(x)
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected, rtol=0, atol=0.08 * float(expected.abs().max()) if len(x) else 0.0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
def test_what_is_not_fused_reads_floats_in_the_models_order(memory_format):
    torch.manual_seed(0)
    model, x = randomised(on_cpu._Between()).eval().to(DEVICE), _x()
    if memory_format == NHWC:
        with pytest.raises(RuntimeError, match="view"):
            _freeze(model.to(memory_format=NHWC), x.contiguous(memory_format=NHWC))
        return
    frozen = _freeze(model, x)
    with torch.no_grad():
        expected = model(x)
    for ours, plain in zip(frozen(x), expected, strict=True):
        assert type(ours) is torch.Tensor and ours.stride() == plain.stride()
        assert on_cpu._loss(ours, plain.double()) < 0.03


def test_a_residual_of_another_shape_is_added_apart_in_float():
    model, frozen, _ = _pair("resnet")
    conv = next(m for m in frozen.modules() if isinstance(m, TritonInt8Conv) and m.layer == "layer1.conv2")
    y = torch.rand(2, 8, 6, 6, device=DEVICE) * 255 * conv.grids.x.scale  # what was calibrated
    residual = _x(n=1, channels=8, size=1, seed=2)
    with torch.no_grad():
        expected = F.relu(model.layer1.bn2(model.layer1.conv2(y)) + residual)
        ours = conv(y, residual)
    assert type(ours) is torch.Tensor and on_cpu._loss(ours, expected.double()) < 0.05


def test_a_tensor_in_signed_8_bits_is_a_float_tensor_to_everyone_else():
    q = torch.arange(-128, 128).to(torch.int8).view(2, 8, 4, 4).contiguous(memory_format=NHWC)
    grid = Grid(0.25, -7)
    t = Quantised(q, grid, torch.float32, nchw=True)
    expected = (q.float() + 7) * 0.25
    assert t.eight() is q and torch.equal(t + 0, expected)
    assert torch.equal(t.eight(), q)  # rounded anew
    t.mul_(0.5)
    assert torch.equal(t.eight(), quantise(expected * 0.5, grid, signed=True)) and t.eight().dtype == torch.int8


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_a_max_pool_of_signed_8_bits_is_exact(ceil_mode):
    q = torch.randint(-128, 128, (2, 5, 9, 10), device=DEVICE).to(torch.int8).contiguous(memory_format=NHWC)
    y = FrozenMaxPool2d(3, 2, 1, ceil_mode=ceil_mode)(Quantised(q, Grid(0.5, 3), torch.float32, nchw=False))
    assert isinstance(y, Quantised) and y.grid == Grid(0.5, 3) and y.eight().dtype == torch.int8
    assert torch.equal(y.eight().float(), F.max_pool2d(q.float(), 3, 2, 1, ceil_mode=ceil_mode))


class _Waits(TorchDispatchMode):
    """Raises where a value is read back, which on a GPU waits for it, and which a CUDA graph cannot hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


def test_a_call_waits_for_no_value_and_a_nan_comes_out_of_it_as_one():
    _, frozen, x = _pair("resnet")
    inner = frozen.network.network
    with torch.no_grad(), _Waits():
        y = inner(x)
        assert torch.equal(torch.ops.aten.isnan(poisoned(x, (y, 3))[0]).sum(), torch.zeros((), dtype=torch.int64))
        x[0, 0, 0, 0] = float("nan")
        result, number = poisoned(x, (y, 3))
    assert result.isnan().all() and number == 3
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="the input holds a NaN or an infinity"):
            frozen(x)
    else:
        assert frozen(x).isnan().all()


def test_a_gpu_needs_to_be_asked(monkeypatch):
    model, x, _ = _model("bottleneck")
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = torch.empty(2, 3, 16, 16, device="cuda")
    advice = r"on cuda:0; on a GPU .*use_backend\('triton'\) around freeze, or where `resnet-fused tune --dtype int8`"
    monkeypatch.setattr(choice, "default_on", lambda arch, op: "aten")
    with pytest.raises(RuntimeError, match=advice):
        freeze(model, on_gpu, quantize=[x])
    with use_backend("cuda"), pytest.raises(RuntimeError, match=advice):
        freeze(model, on_gpu, quantize=[x])


def test_a_table_that_speaks_for_it_is_enough(monkeypatch):
    from resnet_fused.inference import quantize

    model, x, more = _model("bottleneck")
    monkeypatch.setattr(quantize.dispatch, "default_backend", lambda op, device: "triton")
    frozen = freeze(model, x, quantize=[more, x])
    assert {row.backend for row in frozen.plan.layers} == {"triton"}


def test_bad_input_is_one_clear_error(monkeypatch):
    model, x, _ = _model("bottleneck")
    with pytest.raises(RuntimeError, match="int8 takes float32, float16 and bfloat16 networks, not torch.float64"):
        _freeze(copy.deepcopy(model).double(), x.double())
    with pytest.raises(RuntimeError, match="no convolution can run in int8: kept in float by name"):
        _freeze(model, x, keep=("conv1", "layer"))
    frozen = _freeze(model, x)
    for given, message in (
        (x.half(), "a model frozen in torch.float32 got an input of torch.float16"),
        (x[:, :2], "expected input.* to have 3 channels, but got 2"),
        (x.to("meta"), "frozen for a 4-D torch.float32 input on .*, got a .* on meta"),
    ):
        with pytest.raises(RuntimeError, match=message):
            frozen(given)
    monkeypatch.setattr(ops, "unavailable", lambda backend, device: f"no {backend}")
    with pytest.raises(RuntimeError, match="freeze: quantize cannot run here: no triton"):
        _freeze(model, x)


def test_a_layer_that_is_silent_in_calibration_stays_in_float():
    torch.manual_seed(0)
    model, x = randomised(Net()).eval().to(DEVICE), _x()
    with torch.no_grad():
        model.layer[0].bn1.weight.zero_()
        model.layer[0].bn1.bias.fill_(-1.0)
    frozen = _freeze(model, x)
    rows = {row.layer: row for row in frozen.plan.layers}
    assert rows["layer.0.conv1"].reason == "its result was 0 everywhere on the calibration inputs"
    assert rows["layer.0.conv3"].op == "conv_join_int8"
    with torch.no_grad():
        assert on_cpu._loss(frozen(x), model(x).double()) < 0.05


def test_frozen_under_autocast():
    model, x, _ = _model("bottleneck")
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        frozen, expected = _freeze(model, x), model(x)
    y = frozen(x)
    assert y.dtype == expected.dtype and all(row.error is not None for row in frozen.plan.layers)
    assert on_cpu._loss(y, expected.double()) < 0.05
