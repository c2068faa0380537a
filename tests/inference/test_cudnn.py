"""cuDNN's fused convolutions in frozen networks: tried before they are used. Stand-ins for them run on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import assert_no_worse
from networks import randomised
from torch import nn

from resnet_fused import freeze
from resnet_fused.inference import cudnn
from resnet_fused.models import cifar_resnet
from resnet_fused.ops import cpu


def right(x, weight, z, alpha, bias, *geometry):
    """What `torch.cudnn_convolution_add_relu` computes."""
    y = F.conv2d(x, weight, bias, *geometry)
    return F.relu(y if z is None else y + alpha * z)


def loses_nan(*args):
    return right(*args).nan_to_num(0.0)


def reads_its_result(x, weight, z, *args):
    """What cuDNN may do without a residual: 0 * uninitialised memory, which the tests fill with NaN."""
    y = right(x, weight, z, *args)
    return y if z is not None else y + 0 * torch.empty_like(y)


def wrong(*args):
    return right(*args) * 1.01


def in_nchw(*args):
    return right(*args).contiguous()


def refuses(*args):
    raise RuntimeError("GET was unable to find an engine to execute this computation\nmore")


def says_nothing(*args):
    raise RuntimeError


@pytest.fixture
def calls(monkeypatch):
    """Count the fused convolutions that run; `stand_in` decides what they do."""
    made = {"cudnn_convolution_relu": 0, "cudnn_convolution_add_relu": 0}

    def add_relu(*args):
        made["cudnn_convolution_add_relu"] += 1
        return made["stand_in"](*args)

    def relu(x, weight, bias, *geometry):
        made["cudnn_convolution_relu"] += 1
        return made["stand_in"](x, weight, None, 1.0, bias, *geometry)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr(cudnn, "runs", lambda backend, x, act: backend == "aten" and act == "relu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cpu, "refusal", lambda *args: "")
    with torch.backends.mkldnn.flags(enabled=False):
        yield made


def network(dtype=torch.float32):
    return randomised(cifar_resnet(8)).eval().to(dtype).to(memory_format=torch.channels_last)


def example(dtype=torch.float32, size=12):
    return torch.randn(2, 3, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bias_residual_and_relu_are_one_call(calls, dtype):
    calls["stand_in"] = right
    model, x = network(dtype), example(dtype)
    frozen = freeze(model, x)
    ops = [row.op for row in frozen.plan.layers if "shortcut" not in row.layer]
    assert ops == ["cudnn_convolution_relu"] + ["cudnn_convolution_relu", "cudnn_convolution_add_relu"] * 3
    assert {row.backend for row in frozen.plan.layers} == {"aten"} and not any(row.reason for row in frozen.plan.layers)
    before = dict(calls)
    assert_no_worse(frozen(x), nn.Module.__call__, (model, x))
    assert calls["cudnn_convolution_relu"] == before["cudnn_convolution_relu"] + 4
    assert calls["cudnn_convolution_add_relu"] == before["cudnn_convolution_add_relu"] + 3


@pytest.mark.parametrize(
    "stand_in, reason",
    [
        (loses_nan, "does not keep NaN"),
        (wrong, "other values"),
        (in_nchw, "another memory order"),
        (refuses, "_relu: GET was unable to find an engine to execute this computation"),
        (says_nothing, "_relu: RuntimeError"),
        (reads_its_result, "does not keep NaN"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_right_is_not_used_and_the_plan_says_why(calls, stand_in, reason):
    calls["stand_in"] = stand_in
    model, x = network(), example()
    frozen = freeze(model, x)
    refused = [row for row in frozen.plan.layers if row.op == "conv_fprop" and "shortcut" not in row.layer]
    only_without_residual = stand_in is reads_its_result
    assert len(refused) == (4 if only_without_residual else 7) and all(reason in row.reason for row in refused)
    before = dict(calls)
    assert_no_worse(frozen(x), nn.Module.__call__, (model, x))
    used = sum(calls[name] - before[name] for name in before if name != "stand_in")
    assert used == (3 if only_without_residual else 0)


def test_another_shape_is_tried_before_it_runs(calls):
    calls["stand_in"] = right
    model, x = network(), example()
    frozen = freeze(model, x)
    calls["stand_in"] = lambda x, *args: (wrong if x.shape[2] == 20 else right)(x, *args)
    larger = example(size=20)
    assert_no_worse(frozen(larger), nn.Module.__call__, (model, larger))
    assert_no_worse(frozen(x), nn.Module.__call__, (model, x))


def test_nothing_is_tried_during_a_capture(calls, monkeypatch):
    calls["stand_in"] = right
    model, x = network(), example()
    frozen = freeze(model, x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    larger, before = example(size=20), dict(calls)
    assert_no_worse(frozen(larger), nn.Module.__call__, (model, larger))
    assert calls == before


def test_deterministic_mode_and_other_devices_take_native_ops():
    assert not cudnn.runs("aten", torch.randn(1, 3, 4, 4), "relu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_on_a_gpu(dtype, memory_format):
    torch.use_deterministic_algorithms(False)
    model, x = network(dtype).cuda(), example(dtype).cuda()
    model, x = model.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
    frozen = freeze(model, x)
    print(frozen.plan)
    assert_no_worse(frozen(x), nn.Module.__call__, (model, x))
    x[0, 0, 0, 0] = torch.nan
    assert_no_worse(frozen(x), nn.Module.__call__, (model, x))
