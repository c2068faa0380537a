"""The Gluon kernels in `gluon_simulator`: right for every schedule tried, and the simulator notices what it should."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import gluon_simulator as simulator
from box_statistics import assert_statistics_of_boxes

from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.kernels import experimental
from resnet_fused.kernels.experimental import _gluon, tcgen05, wgmma
from resnet_fused.ops import conv_fprop_stats as stats

KERNELS = {"wgmma_conv": (wgmma, "_wgmma_conv_kernel"), "tcgen05_conv": (tcgen05, "_tcgen05_conv_kernel")}
SHAPES = {
    "3x3, boxes overhang, K too": ConvShape(2, 32, 5, 7, 40, 3, 3, padding=(1, 1)),
    "3x3 stride 2": ConvShape(3, 32, 6, 10, 24, 3, 3, (2, 2), (1, 1)),
    "3x3 dilated, unpadded": ConvShape(2, 16, 8, 7, 16, 3, 3, dilation=(2, 1)),
    "1x1": ConvShape(2, 32, 5, 7, 48, 1, 1),
    "1x1, one step a tile": ConvShape(2, 16, 5, 7, 16, 1, 1),
    "1x1 stride 2": ConvShape(2, 32, 7, 9, 16, 1, 1, (2, 2)),
    "fewer tiles than programs": ConvShape(1, 16, 2, 2, 8, 3, 3, padding=(1, 1)),
}


def _integers(*size):
    """Small enough that every sum is exact."""
    return torch.randint(-2, 3, size).float().contiguous(memory_format=torch.channels_last)


def _simulate(monkeypatch, module, name, seed):
    """Launches go to the simulator, three programs each."""

    def launch(kernel, x, tiles, *arguments, num_warps, **constants):
        simulator.run([_gluon, module], name, min(3, tiles), arguments, constants, seed)

    monkeypatch.setattr(_gluon, "launch", launch)
    monkeypatch.setattr(_gluon, "descriptor", simulator.descriptor)


def _run(monkeypatch, module, name, shape, seed=0, residual=True, relu=True, slots=3, poke=None):
    x = _integers(shape.n, shape.c, shape.h, shape.w)
    weight = _integers(shape.k, shape.c, shape.r, shape.s)
    addend = _integers(shape.n, shape.k, shape.p, shape.q) if residual else None
    scale, shift = torch.randint(-2, 3, (2, shape.k)).float()
    if poke is not None:
        x[0, 0, 0, 0] = poke

    _simulate(monkeypatch, module, name, seed)
    config = ConvConfig(16, 8, 16, 4, slots, kernel="wgmma_conv")
    y = torch.full_like(addend, 99.0) if residual else _integers(shape.n, shape.k, shape.p, shape.q) + 99
    _gluon.run_conv(None, x, weight, scale, shift, addend, y, (None, None, None), shape, relu, config)
    truth = F.conv2d(x, weight, None, shape.stride, shape.padding, shape.dilation)
    truth = truth * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1) + (0 if addend is None else addend)
    return y, (truth.relu() if relu else truth)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_schedule_tried_gives_the_convolution(kernel, name, residual, monkeypatch):
    for seed in range(5):
        y, truth = _run(monkeypatch, *KERNELS[kernel], SHAPES[name], seed, residual, relu=seed % 2 == 0)
        assert torch.equal(y, truth), f"schedule {seed}"


@pytest.mark.parametrize("slots", [2, 4, 7])
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_number_of_slots(kernel, slots, monkeypatch):
    y, truth = _run(monkeypatch, *KERNELS[kernel], SHAPES["3x3 stride 2"], slots=slots)
    assert torch.equal(y, truth)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_passes_relu(kernel, monkeypatch):
    y, truth = _run(monkeypatch, *KERNELS[kernel], SHAPES["3x3 stride 2"], poke=float("nan"))
    assert 0 < truth.isnan().sum() < truth.numel()
    assert torch.equal(y.nan_to_num(99.0), truth.nan_to_num(99.0))


@pytest.mark.parametrize("name", ["3x3, boxes overhang, K too", "3x3 stride 2", "1x1"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_statistics_are_those_of_every_box(kernel, name, monkeypatch):
    module, kernel_name = KERNELS[kernel]
    shape, config = SHAPES[name], ConvConfig(16, 8, 16, 4, 3, kernel=kernel)
    x = _integers(shape.n, shape.c, shape.h, shape.w)
    weight = _integers(shape.k, shape.c, shape.r, shape.s)
    for seed in range(3):
        _simulate(monkeypatch, module, kernel_name, seed)
        found = experimental.conv_fprop_stats(stats.Args(x, weight, None, None, *shape.geometry, rows=1), config)
        assert torch.equal(found[0], F.conv2d(x, weight, None, shape.stride, shape.padding, shape.dilation))
        assert_statistics_of_boxes(shape, config, *found)


# What is broken, and the text that is replaced: the simulator must not let it pass.
MUTATIONS = {
    "the store buffer is overwritten": (
        "wgmma_conv",
        r"\n +tma.store_wait\(pendings=0\)\n +mbarrier",
        r"\n            mbarrier",
    ),
    "an early release": ("wgmma_conv", r"num_outstanding=1", "num_outstanding=2"),
    "products not awaited": ("wgmma_conv", r"num_outstanding=0", "num_outstanding=1"),
    "one release too many": ("wgmma_conv", r"pred=step > 0", "pred=True"),
    "no last release": ("wgmma_conv", r"\n +mbarrier.arrive\(empty.index\(previous\), count=1\)\n", "\n"),
    "no fence before the store": ("wgmma_conv", r"\n +fence_async_shared\(\)  # what.*\n", "\n"),
    "the residual is not awaited": ("wgmma_conv", r"\n +mbarrier.wait\(arrived, residual_phase\)\n", "\n"),
    "the residual's phase stands still": ("wgmma_conv", r"residual_phase \^ 1", "residual_phase"),
    "operands not awaited": ("wgmma_conv", r"\n +mbarrier.wait\(full.*\n", "\n"),
    "a ring too short": ("wgmma_conv", r"advance\(slot, phase, SLOTS\)", "advance(slot, phase, SLOTS - 1)"),
    "the accumulator is not cleared": ("tcgen05_conv", r"use_acc=step > 0", "use_acc=True"),
    "the accumulator is not free": ("tcgen05_conv", r"\n +mbarrier.wait\(free.*\n", "\n"),
    "the accumulator is not done": ("tcgen05_conv", r"\n +mbarrier.wait\(done.*\n", "\n"),
    "accumulators never wait at first": ("tcgen05_conv", r"free_phase = 1", "free_phase = 0"),
    "the accumulator is not given back": ("tcgen05_conv", r"\n +mbarrier.arrive\(free.*\n", "\n"),
    "slots are not given back": ("tcgen05_conv", r"mbarriers=\[empty.index\(slot\)\]", "mbarriers=[]"),
    "the store is not awaited": ("tcgen05_conv", r"\n +tma.store_wait\(pendings=0\)\n +if", r"\n        if"),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_the_simulator_notices(what, monkeypatch, tmp_path):
    kernel, pattern, replacement = MUTATIONS[what]
    module, name = KERNELS[kernel]
    broken = simulator.broken(module, pattern, replacement, tmp_path)
    names = ["3x3, boxes overhang, K too", "1x1, one step a tile"]
    for seed in range(40):
        try:
            y, truth = _run(monkeypatch, broken, name, SHAPES[names[seed % 2]], seed)
        except AssertionError:
            return
        if not torch.equal(y, truth):
            return
    pytest.fail("no schedule showed it")
