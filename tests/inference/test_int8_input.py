"""What `freeze(quantize=...)` and its result refuse, each in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from agreement import assert_same_words
from networks import randomised
from small_net import Net
from torch import nn
from torch._subclasses import FakeTensorMode

from resnet_fused import Int8, freeze, use_backend
from resnet_fused.inference import quantize
from resnet_fused.ops import onednn

needs_vnni = pytest.mark.skipif(onednn.int8_refusal() is not None, reason=str(onednn.int8_refusal()))


def _model():
    torch.manual_seed(0)
    return randomised(Net()).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def _with(x, value):
    x = x.clone()
    x[1, 2, 3, 4] = value
    return x


CALIBRATIONS = {
    "none": (lambda x: [], ValueError, "no calibration inputs: the iterable is empty"),
    "empty generator": (lambda x: (t for t in ()), ValueError, "no calibration inputs: the iterable is empty"),
    "constant": (lambda x: [torch.ones_like(x)], ValueError, "every calibration input is one constant"),
    "constants": (lambda x: [x * 0, x * 0 + 1], ValueError, "every calibration input is one constant"),
    "nan": (lambda x: [x, _with(x, float("nan"))], ValueError, "calibration input 1 holds a NaN or an infinity"),
    "inf": (lambda x: iter([_with(x, float("inf"))]), ValueError, "calibration input 0 holds a NaN or an infinity"),
    "channels": (
        lambda x: [x[:, :2]],
        ValueError,
        r"input 0 is .* with 2 channels; the example input is .* 3 channels",
    ),
    "3-D": (lambda x: [x[0]], ValueError, "input 0 is a 3-D torch.float32 on cpu; the example input is a 4-D"),
    "dtype": (
        lambda x: [x.double()],
        ValueError,
        "input 0 is a 4-D torch.float64 .*; the example input is a 4-D torch",
    ),
    "empty batch": (lambda x: [x, x[:0]], ValueError, r"input 1 is empty: its shape is \(0, 3, 16, 16\)"),
    "pairs": (
        lambda x: [(x, torch.zeros(2))],
        TypeError,
        "input 0 is a tuple, not a tensor; of pairs .* the inputs alone",
    ),
    "one tensor": (lambda x: x, TypeError, r"quantize is one tensor; it takes an iterable of inputs, such as \[x\]"),
    "a word": (lambda x: "int8", TypeError, "takes an iterable of inputs or resnet_fused.Int8.*, got str"),
    "a number": (lambda x: 8, TypeError, "takes an iterable of inputs or resnet_fused.Int8.*, got int"),
    "keep, one word": (lambda x: Int8([x], "conv1"), TypeError, "keep takes a sequence of names, got 'conv1'"),
    "keep, unknown": (
        lambda x: Int8([x], ["layer.0.conv4"]),
        ValueError,
        "keep names 'layer.0.conv4', which holds no convolution; choose of conv1, layer.0.conv1,",
    ),
    "keep, everything": (lambda x: Int8([x], ["conv1", "layer"]), RuntimeError, "in int8: kept in float by name"),
}


@needs_vnni
@pytest.mark.parametrize("kind", CALIBRATIONS)
def test_a_calibration_that_is_none(kind, x):
    make, error, message = CALIBRATIONS[kind]
    with pytest.raises(error, match=message):
        freeze(_model(), x, quantize=make(x))


@needs_vnni
def test_one_constant_picture_among_others_is_a_picture(x):
    frozen = freeze(_model(), x, quantize=[torch.zeros_like(x), x])
    assert all(row.error is not None for row in frozen.plan.layers)


@needs_vnni
def test_a_model_that_cannot_be(x):
    with pytest.raises(RuntimeError, match="the model is in training mode"):
        freeze(_model().train(), x, quantize=[x])
    with pytest.raises(RuntimeError, match="no convolution can run in int8: int8 takes float32 and bfloat16 networks"):
        freeze(_model().double(), x.double(), quantize=[x.double()])
    with pytest.raises(RuntimeError, match="no convolution can run in int8: none was frozen"):
        freeze(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), x, quantize=[x])
    with use_backend("reference"), pytest.raises(RuntimeError, match="not run on the forced backend 'reference'"):
        freeze(_model(), x, quantize=[x])


def test_a_gpu_needs_to_be_asked(x):
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = torch.empty(2, 3, 16, 16, device="cuda")
    with pytest.raises(RuntimeError, match="quantize runs on a CPU, and example_input is on cuda:0; on a GPU its"):
        freeze(_model(), on_gpu, quantize=[x])


def test_without_onednn(x, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="quantize cannot run here: this PyTorch has no oneDNN"):
        freeze(_model(), x, quantize=[x])


def test_a_cpu_without_vnni_is_refused_by_what_it_computes():
    program = "from resnet_fused.ops import onednn; print(onednn.int8_refusal())"
    settings = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    said = subprocess.run([sys.executable, "-c", program], env=settings, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("its int8 products saturate on this CPU: it has no VNNI")


def test_what_refuses_it_is_said(x, monkeypatch):
    monkeypatch.setattr(quantize.onednn, "int8_refusal", lambda: "its int8 products saturate")
    with pytest.raises(RuntimeError, match="freeze: quantize cannot run here: its int8 products saturate"):
        freeze(_model(), x, quantize=[x])


WRONG = {
    "sparse": lambda x: x.to_sparse(),
    "2-D": lambda x: x[0, 0],
    "3-D": lambda x: x[0],
    "5-D": lambda x: x[None],
    "channels": lambda x: x[:, :2],
    "no pixels": lambda x: x[:, :, :0, :0],
}


@pytest.fixture(scope="module")
def pair():
    """A model, and one frozen in int8."""
    model = _model()
    x = torch.randn(2, 3, 16, 16)
    return model, freeze(model, x, quantize=[x])


@needs_vnni
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_tensor_gets_the_words_of_the_plain_model(pair, kind, x):
    model, frozen = pair
    assert_same_words(model, frozen, WRONG[kind](x))


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.complex64, torch.float16, torch.float64], ids=str)
def test_a_wrong_dtype_is_named(pair, dtype, x):
    with pytest.raises(RuntimeError, match=f"^a model frozen in torch.float32 got an input of {dtype}; convert it"):
        pair[1](x.to(dtype))


@needs_vnni
def test_a_tensor_without_values_reaches_no_kernel(pair, x):
    with pytest.raises(RuntimeError, match="frozen for a 4-D torch.float32 input on cpu, got a .* on meta"):
        pair[1](x.to("meta"))


@needs_vnni
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_not_finite_is_refused(pair, value, x):
    _, frozen = pair
    with pytest.raises(ValueError, match="the input holds a NaN or an infinity, which int8 has no value for"):
        frozen(_with(x, value))
    assert frozen(_with(x, 1e38)).isfinite().all()  # large is large: it is rounded to the end of the range
    assert frozen(torch.full_like(x, 3e38)).isfinite().all()  # and its sum may overflow


@needs_vnni
def test_a_conversion_and_a_pickle_are_refused(pair, x):
    _, frozen = pair
    for convert in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")):
        with pytest.raises(RuntimeError, match="cannot be converted from"):
            convert(frozen)
    with pytest.raises(TypeError, match="cannot be pickled"):
        frozen.__reduce__()
    with pytest.raises(RuntimeError, match="a frozen model cannot be exported"):
        torch.export.export(frozen, (x,))
