"""Shapes and strides at the edges: ambiguous, not dense, empty, one pixel, smaller than the kernel, odd, very many."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import AVAILABLE, DEVICE, assert_same_step, quick_backends, step
from op_cases import same_memory_order
from torch import Tensor, nn

from resnet_fused import functional, fuse, use_backend
from resnet_fused.nn import Stem

backends = pytest.mark.parametrize("backend", AVAILABLE)
NHWC = torch.channels_last


def _unit(channels: int = 4, out: int = 6, kernel: int = 3, stride: int = 1, **options: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, options.pop("padding", kernel // 2), bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()).to(DEVICE)


def assert_agreement(plain: nn.Module, x: Tensor, backend: str, tolerance: float = 1e-4) -> None:
    """In training and in evaluation: the same results in the same memory order, or the same error, and state."""
    for training in (True, False):
        models = [copy.deepcopy(plain).train(training), fuse(copy.deepcopy(plain)).train(training)]
        try:
            expected = step(models[0], x)
        except (RuntimeError, ValueError) as error:
            with pytest.raises(type(error)) as raised:
                step(models[1], x, backend)
            assert str(raised.value) == str(error)
            assert_same_step(dict(models[1].named_buffers()), dict(models[0].named_buffers()), 0.0)
            continue
        actual = step(models[1], x, backend)
        assert_same_step(actual, expected, tolerance)
        for what in ("y", "dx"):
            assert same_memory_order(actual[what], expected[what]), what
        with torch.no_grad(), use_backend(backend):
            y = models[1].eval()(x)
        assert_same_step({"y": y}, {"y": models[0].eval()(x).detach()}, tolerance)


AMBIGUOUS = {
    "one channel": lambda: torch.randn(3, 1, 5, 4),
    "one channel, nhwc": lambda: torch.randn(3, 1, 5, 4).contiguous(memory_format=NHWC),
    "one pixel": lambda: torch.randn(6, 4, 1, 1),
    "one pixel, nhwc": lambda: torch.randn(6, 4, 1, 1).contiguous(memory_format=NHWC),
    "one channel, nhwc by its strides": lambda: torch.randn(3, 1, 5, 4).to(memory_format=NHWC),
    "one pixel, nhwc by its strides": lambda: torch.randn(6, 4, 1, 1).to(memory_format=NHWC),
    "one row": lambda: torch.randn(3, 4, 1, 5),
    "odd strides of a dimension of one": lambda: torch.randn(3, 4, 1, 5).as_strided((3, 4, 1, 5), (20, 5, 77, 1)),
    "one image of one channel": lambda: torch.randn(1, 1, 4, 4).as_strided((1, 1, 4, 4), (3, 1, 4, 1)),
}


@backends
@pytest.mark.parametrize("name", AMBIGUOUS)
def test_strides_that_are_two_layouts_at_once(backend, name):
    x = AMBIGUOUS[name]().to(DEVICE)
    assert_agreement(_unit(x.shape[1]), x, backend)
    assert_agreement(_unit(x.shape[1], kernel=1), x, backend)
    assert_agreement(_unit(x.shape[1], kernel=1).to(memory_format=NHWC), x, backend)  # a weight that is both, too


NOT_DENSE = {
    "a slice of channels": lambda: torch.randn(2, 9, 6, 5)[:, 2:6],
    "a slice of channels, nhwc": lambda: torch.randn(2, 9, 6, 5).contiguous(memory_format=NHWC)[:, 2:6],
    "every other column": lambda: torch.randn(2, 4, 6, 10)[..., ::2],
    "a crop": lambda: torch.randn(2, 4, 9, 9)[:, :, 2:7, 3:8],
    "transposed": lambda: torch.randn(2, 4, 5, 6).transpose(2, 3),
    "channels first of all": lambda: torch.randn(4, 2, 5, 6).transpose(0, 1),
    "expanded": lambda: torch.randn(1, 4, 5, 1).expand(3, 4, 5, 6),
    "overlapping": lambda: torch.randn(200).as_strided((2, 4, 5, 6), (7, 11, 3, 1)),
    "flipped": lambda: torch.randn(2, 4, 5, 6).flip(3),
}


@quick_backends
@pytest.mark.parametrize("name", NOT_DENSE)
def test_inputs_that_are_not_dense(backend, name):
    x = NOT_DENSE[name]().to(DEVICE)
    assert_agreement(_unit(), x, backend)
    for function in (functional.batch_norm_act, functional.batch_norm_act_max_pool):
        results = []
        for chosen in ("auto", backend):
            leaf = x.detach().requires_grad_()  # no clone, which would be dense
            with use_backend(chosen):
                y = function(leaf, None, None, training=True)
            y.backward(torch.ones(1, device=DEVICE).expand(y.shape))  # a gradient that is not dense either
            results.append({"y": y.detach(), "dx": leaf.grad})
        assert_same_step(results[1], results[0])
        assert same_memory_order(results[1]["y"], results[0]["y"])


@quick_backends
@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 0, 5, 5), (2, 4, 0, 5), (2, 4, 5, 0), (0, 4, 0, 0)], ids=str)
def test_dimensions_of_size_zero(backend, shape):
    x = torch.randn(shape, device=DEVICE)
    if shape[1]:
        assert_agreement(_unit(), x, backend)
        assert_agreement(_unit(kernel=1), x, backend)
    for function, plain in (
        (functional.batch_norm_act, lambda x: F.batch_norm(x, None, None, training=True).relu()),
        (lambda x, *_, **__: functional.add_act(x, x), lambda x: (x + x).relu()),
    ):
        outcomes = []
        for call in (plain, lambda x, f=function: f(x, None, None, training=True)):
            try:
                with use_backend(backend if call is not plain else "auto"):
                    outcomes.append(call(x).shape)
            except (RuntimeError, ValueError) as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]


@backends
@pytest.mark.parametrize(("size", "kernel", "padding"), [(1, 3, 1), (1, 7, 3), (2, 5, 2), (2, 3, 0), (1, 1, 0)])
def test_images_of_one_pixel_and_smaller_than_the_kernel(backend, size, kernel, padding):
    x = torch.randn(5, 4, size, size, device=DEVICE)
    assert_agreement(_unit(kernel=kernel, padding=padding), x, backend, 1e-3)
    if backend != "triton" and kernel == 7:
        assert_agreement(Stem(4, 6).to(DEVICE), x, backend, 1e-3)


@backends
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_odd_sizes_at_every_stride(backend, stride, kernel):
    sizes = [(7, 9), (8, 5), (5, 6)] if backend != "triton" else [(7, 5)]
    for height, width in sizes:
        x = torch.randn(2, 3, height, width, device=DEVICE)
        assert_agreement(_unit(3, 5, kernel, stride), x, backend)
        if backend != "triton":
            x = x.contiguous(memory_format=NHWC)
            assert_agreement(_unit(3, 5, kernel, stride).to(memory_format=NHWC), x, backend)


@quick_backends
def test_more_than_65535_images(backend):
    """The grid's second and third dimensions end there."""
    n = 65_543
    x = torch.randn(n, 2, 1, 2, device=DEVICE)
    assert_agreement(_unit(2, 3, 1), x, backend, 1e-3)
    assert_agreement(_unit(2, 3, 3), x.contiguous(memory_format=NHWC), backend, 1e-3)
    y, other = torch.randn(2, n, 1, 3, device=DEVICE, requires_grad=True), torch.randn(2, n, 1, 3, device=DEVICE)
    with use_backend(backend):  # and as many channels
        actual = functional.batch_norm_act(y, None, None, residual=other, training=True)
    torch.testing.assert_close(actual, (F.batch_norm(y, None, None, training=True) + other).relu())


@quick_backends
def test_rectangular_geometry(backend):
    for options in (
        {"kernel_size": (1, 5), "padding": (0, 2), "stride": (2, 1)},
        {"kernel_size": (3, 2), "dilation": (1, 3)},
        {"kernel_size": 3, "groups": 2, "padding": (1, 0), "stride": (1, 3)},
        {"kernel_size": 3, "groups": 4, "padding": 4, "dilation": 2},
    ):
        plain = nn.Sequential(nn.Conv2d(4, 8, **options), nn.BatchNorm2d(8), nn.ReLU()).to(DEVICE)
        for bias in (True, False):
            if not bias:
                plain[0].bias = None
            assert_agreement(plain, torch.randn(2, 4, 9, 11, device=DEVICE), backend)
