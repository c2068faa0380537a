"""A small network with everything of a ResNet in it, one step of it, and the backends that tests of it run on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fused import ops, use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AVAILABLE = [name for name in ("auto", "reference", "cuda", "triton") if name == "auto" or ops.available(name, DEVICE)]
# Triton's interpreter takes seconds for what the others do in milliseconds: tests that include it say so.
QUICK = [name for name in AVAILABLE if name != "triton" or DEVICE == "cuda"]
quick_backends = pytest.mark.parametrize("backend", QUICK)


class SmallResNet(nn.Module):
    """Stem with its pool, a basic block, a strided bottleneck with a projection, a bottleneck, a classifier."""

    def __init__(self, channels: int = 8, classes: int = 5) -> None:
        super().__init__()
        wide = 2 * channels
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        projection = nn.Sequential(nn.Conv2d(channels, wide, 1, 2, bias=False), nn.BatchNorm2d(wide))
        self.layer1 = BasicBlock(channels, channels)
        self.layer2 = nn.Sequential(Bottleneck(channels, wide // 4, 2, projection), Bottleneck(wide, wide // 4))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


def small_resnet(**options: Any) -> SmallResNet:
    """One whose batch norms are not those of a fresh network."""
    return randomised(SmallResNet(**options)).to(DEVICE)


def randomised(model: nn.Module) -> nn.Module:
    """The model with batch norms that do something: in a fresh one scale is 1 and shift 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def pictures(n: int = 2, size: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, size, size, device=DEVICE).to(dtype)


def step(module: nn.Module, x: Tensor, backend: str = "auto") -> dict[str, Tensor | None]:
    """Output, gradients of the input and of every parameter, and the buffers behind one forward and backward."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    with use_backend(backend):
        y = module(x)
    weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=y.device)).view(y.shape)
    y.backward(weights.to(y.dtype))
    results = {"y": y.detach(), "dx": x.grad} | {f"d{name}": p.grad for name, p in module.named_parameters()}
    return results | {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same_step(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Equal up to `tolerance` of each tensor's largest magnitude (at least 1); None and integers exactly."""
    assert list(actual) == list(expected)
    for what, reference in expected.items():
        if reference is None or not reference.is_floating_point():
            same = actual[what] is None if reference is None else torch.equal(actual[what], reference)
            assert same, what
            continue
        assert actual[what].dtype == reference.dtype, what
        scale = max(1.0, float(reference.abs().max())) if reference.numel() else 1.0
        torch.testing.assert_close(actual[what], reference, rtol=0, atol=tolerance * scale, msg=what)
