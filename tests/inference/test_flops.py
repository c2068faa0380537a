"""PyTorch's counter of FLOPs counts in fused and frozen networks what it counts in plain ones."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from conv_cases import runs_kernels
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from resnet_fused import freeze, fuse, use_backend
from resnet_fused.ops import onednn

NETWORKS = {
    "basic": (BasicBlock, {}),
    "bottleneck": (Bottleneck, {"width_per_group": 8}),
    "groups": (Bottleneck, {"groups": 4, "width_per_group": 4}),
}


def _network(name):
    block, options = NETWORKS[name]
    return ResNet(block, [2, 1, 1, 1], num_classes=3, **options)


class _NoTracker:
    """In place of the counter's hooks on all modules, which make a fused module call its parts one by one."""

    parents = ("Global",)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def _count(run, x, hooks=False):
    """The number, and the names of the ops that had a part in it."""
    counter = FlopCounterMode(display=False)
    if not hooks:
        counter.mod_tracker = _NoTracker()
    with counter:
        run(x)
    return counter.get_total_flops(), {str(op) for op in counter.get_flop_counts()["Global"]}


def _step(model):
    return lambda x: model(x).sum().backward()


@pytest.mark.parametrize("hooks", [True, False])
@pytest.mark.parametrize("backend", ["auto", "aten", "reference", "cuda"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_counts_the_same_on_every_backend(name, backend, hooks):
    plain, x = _network(name), torch.randn(2, 3, 17, 17)
    fused = fuse(copy.deepcopy(plain))
    with use_backend(backend):
        expected, _ = _count(_step(plain), x)
        count, ops = _count(_step(fused), x, hooks)
        assert count == expected > 0
        if backend == "reference" and not hooks:
            join = {"resnet_fused.conv_dgrad_join"} if name != "basic" else set()
            assert {"resnet_fused.conv_fprop_stats", "resnet_fused.conv_dgrad", "resnet_fused.conv_wgrad"} | join <= ops
        plain.eval(), fused.eval()
        expected, _ = _count(plain, x)
        assert _count(fused, x, hooks)[0] == expected
        with torch.no_grad():
            assert _count(fused, x, hooks)[0] == expected
        count, ops = _count(freeze(plain, x), x, hooks)
        assert count == expected
        if backend == "reference" and name == "bottleneck":
            assert {"resnet_fused.conv_fprop", "resnet_fused.conv_join", "resnet_fused.conv_chain"} <= ops


@runs_kernels
def test_blocks_count_the_same_on_triton():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    downsample = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    plain = nn.Sequential(Bottleneck(16, 8, 2, downsample), Bottleneck(32, 8), Bottleneck(32, 8)).to(device).bfloat16()
    x = torch.randn(1, 16, 4, 4, device=device).bfloat16()
    fused = fuse(copy.deepcopy(plain))
    with use_backend("triton"):
        count, ops = _count(_step(fused), x)
        assert count == _count(_step(plain), x)[0]
        assert {"resnet_fused.conv_fprop_stats", "resnet_fused.conv_dgrad", "resnet_fused.conv_wgrad"} <= ops
        frozen = freeze(plain.eval(), x)
    count, ops = _count(frozen.network, x)
    assert count == _count(plain, x)[0]
    assert {"resnet_fused.conv_fprop", "resnet_fused.conv_join", "resnet_fused.conv_chain"} <= ops


@pytest.mark.skipif(onednn.int8_refusal() is not None, reason=str(onednn.int8_refusal()))
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_int8_counts_the_same(name):
    plain, x = _network(name).eval(), torch.randn(2, 3, 17, 17)
    count, ops = _count(freeze(plain, x, quantize=[x]), x)
    assert count == _count(plain, x)[0] and ops & {"onednn.qconv2d_pointwise", "resnet_fused_cpu.steps"}


@runs_kernels
def test_a_network_in_int8_on_triton_counts_the_same():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    downsample = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    plain = nn.Sequential(Bottleneck(16, 8, 2, downsample), Bottleneck(32, 8)).eval().to(device)
    x = torch.randn(1, 16, 4, 4, device=device)
    with use_backend("triton"):
        frozen = freeze(plain, x, quantize=[x])
    count, ops = _count(frozen.network, x)
    assert count == _count(plain, x)[0] and {"resnet_fused.conv_fprop_int8", "resnet_fused.conv_join_int8"} <= ops


@pytest.mark.larger
def test_the_counter_may_be_imported_before_the_package_or_after_it():
    """Without it, no triton: see `test_importing_is_silent_and_the_package_runs_as_a_module`."""
    check = "assert torch.ops.resnet_fused.conv_fprop in torch.utils.flop_counter.flop_registry"
    for order in ("resnet_fused, torch.utils.flop_counter", "torch.utils.flop_counter, resnet_fused"):
        subprocess.run([sys.executable, "-c", f"import torch, {order}; {check}"], check=True)


def test_formulas_may_be_registered_twice():
    from resnet_fused.ops import flops

    before = dict(torch.utils.flop_counter.flop_registry)
    flops.register_formulas(torch.utils.flop_counter)
    assert torch.utils.flop_counter.flop_registry == before
