"""Chains of blocks, plain and fused, and their gradients: what the tests of the border between two share."""

from __future__ import annotations

import copy

import pytest
import torch
from op_cases import DEVICE
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fused import fuse, use_backend
from resnet_fused.functional.residual import handover


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def three_blocks() -> list[nn.Module]:
    """An identity behind a projection behind an identity."""
    return [
        Bottleneck(16, 4),
        Bottleneck(16, 8, 2, projection(16, 32, 2)),
        BasicBlock(32, 32),
    ]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every backward of a chain, whether it had its sums from the chain behind."""
    found: list[bool] = []
    original = handover.claim

    def claim(ctx, gradient):
        sums = original(ctx, gradient)
        found.append(sums is not None)
        return sums

    monkeypatch.setattr(handover, "claim", claim)
    return found


def made(blocks: list[nn.Module] | None = None, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    module = nn.Sequential(*(blocks or three_blocks())).to(DEVICE, dtype, memory_format=torch.channels_last)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.1)
            nn.init.normal_(m.running_mean, 0, 0.1)
    x = torch.randn(2, 16, 6, 5, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return module, x


def loss_of(y: torch.Tensor) -> torch.Tensor:
    weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=y.device)).view(y.shape)
    return (y * weights.to(y.dtype)).sum()


def gradients(module: nn.Module, x: torch.Tensor, run=None, backend: str = "auto") -> dict[str, torch.Tensor]:
    """Of every parameter and the input, after `run(module, x)`, which ends with a backward."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with use_backend(backend):
        (run or (lambda m, x: loss_of(m(x)).backward()))(module, x)
    return {"x": x.grad} | {name: p.grad for name, p in module.named_parameters()}


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-9) -> None:
    assert any(g is not None for g in expected.values())
    for name, exact in expected.items():
        if exact is None:
            assert actual[name] is None, name
            continue
        error = (actual[name] - exact).norm().item()
        assert error <= tolerance * exact.norm().item() + 1e-12, f"{name}: {error}"


def check(run=None, module=None, x=None) -> None:
    """`run` on plain and on fused blocks in float64: the same gradients."""
    if module is None:
        module, x = made()
    expected = gradients(copy.deepcopy(module), x, run)
    assert_same(gradients(fuse(copy.deepcopy(module)), x, run, "reference"), expected)
