"""Frozen networks on the Triton kernels: against float64, in any memory order, with the ops that the plan names."""

from __future__ import annotations

import pytest
import torch
from contract import assert_no_worse
from conv_cases import runs_kernels
from networks import randomised
from torch import nn

pytest.importorskip("triton")

from resnet_fused import freeze, use_backend
from resnet_fused.inference import FrozenStage
from resnet_fused.nn import BasicBlock, Bottleneck

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NHWC = torch.channels_last

pytestmark = runs_kernels


def _projection(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))


def _model(*modules):
    return randomised(nn.Sequential(*modules)).eval().to(DEVICE)


def _bottlenecks(**options):
    first = Bottleneck(16, 8, 2, _projection(16, 32), **options)
    return _model(first, Bottleneck(32, 8, **options), Bottleneck(32, 8, **options))


def _frozen(model, x):
    with use_backend("triton"):
        return freeze(model, x)


def _check(model, x):
    frozen = _frozen(model, x)
    with torch.no_grad():
        plain = model(x)
        assert_no_worse(frozen(x), nn.Module.__call__, (model, x))
    assert frozen(x).stride() == plain.stride()
    return frozen


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stage_of_bottlenecks(dtype, memory_format):
    model = _bottlenecks().to(dtype).to(memory_format=memory_format)
    x = torch.randn(2, 16, 7, 5, device=DEVICE).to(dtype).contiguous(memory_format=memory_format)
    frozen = _check(model, x)
    assert isinstance(frozen.network, FrozenStage)
    ops = ["conv_fprop", "conv_fprop", "conv_join", "conv_join", "conv_fprop", *["conv_chain"] * 5]
    assert [(row.backend, row.op) for row in frozen.plan.layers] == [("triton", op) for op in ops]


def test_a_stage_of_bottlenecks_in_fp32_has_a_join_and_no_chain():
    """The chain keeps an activation in registers between two products of tensor cores, which are 16 bit."""
    frozen = _check(_bottlenecks(), torch.randn(2, 16, 5, 5, device=DEVICE))
    assert {(row.backend, row.op) for row in frozen.plan.layers} == {("triton", "conv_fprop"), ("triton", "conv_join")}
    assert "16-bit" in next(row.reason for row in frozen.plan.layers if row.layer == "1.conv2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_stage_of_basic_blocks(dtype):
    model = _model(BasicBlock(12, 20, 2, _projection(12, 20)), BasicBlock(20, 20)).to(dtype)
    frozen = _check(model, torch.randn(2, 12, 7, 6, device=DEVICE).to(dtype))
    assert {(row.backend, row.op) for row in frozen.plan.layers} == {("triton", "conv_fprop")}


def test_groups_and_a_stem_with_a_pool_between():
    stem = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    model = _model(stem, nn.MaxPool2d(3, 2, 1), *_bottlenecks(groups=2)).half()
    frozen = _check(model, torch.randn(1, 3, 21, 19, device=DEVICE).half())
    assert "2 groups" in next(row.reason for row in frozen.plan.layers if row.layer == "3.conv2")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_come_out_where_the_model_has_them(value):
    model, x = _bottlenecks().bfloat16(), torch.randn(2, 16, 7, 7, device=DEVICE).bfloat16()
    frozen = _frozen(model, x)
    x[1, 3, 0, 0] = value
    with torch.no_grad():
        expected = model(x)
    actual = frozen(x)
    assert torch.equal(actual.isnan(), expected.isnan()) and not actual.isfinite().all()
    assert torch.equal(actual.isinf(), expected.isinf())


def test_bad_input_reaches_no_kernel():
    frozen = _frozen(_bottlenecks().half(), torch.randn(2, 16, 6, 6, device=DEVICE).half())
    with pytest.raises(RuntimeError, match="to have 16 channels, but got 8"):
        frozen(torch.randn(2, 8, 6, 6, device=DEVICE).half())
    with pytest.raises(RuntimeError):
        frozen(torch.randn(2, 16, 6, 6, device=DEVICE))
    with pytest.raises(RuntimeError):
        frozen(torch.randn(16, 6, 6, device=DEVICE).half()[:8])
