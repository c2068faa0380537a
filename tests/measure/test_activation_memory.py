"""What autograd saves, counted."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import resnet_fused
from resnet_fused.measure.activation_memory import saved_bytes


def test_each_storage_counts_once_and_parameters_do_not():
    x = torch.randn(4, 8, requires_grad=True)
    linear = nn.Linear(8, 16)

    def forward():
        y = linear(x)  # saves x, and the weight
        return (y * y.sigmoid()).view(-1), y.t().exp()  # saves y, its sigmoid (twice), the exponential

    assert saved_bytes(forward, linear.parameters()) == 4 * (4 * 8 + 3 * 4 * 16)
    assert saved_bytes(forward) == 4 * (4 * 8 + 3 * 4 * 16 + 16 * 8)


def test_a_view_counts_as_the_storage_it_keeps_alive():
    x = torch.randn(10, 10, requires_grad=True)
    assert saved_bytes(lambda: (x.exp()[0] ** 3).sum()) == 4 * 100


def test_nothing_is_saved_without_gradients():
    with torch.no_grad():
        assert saved_bytes(lambda: F.conv2d(torch.randn(1, 2, 4, 4), torch.randn(3, 2, 1, 1))) == 0


@pytest.mark.parametrize("name,limit", [("resnet18", 0.85), ("resnet50", 0.81)])
def test_fused_training_saves_less_than_eager(name, limit):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).to(memory_format=torch.channels_last).train()
    x = torch.randn(4, 3, 96, 96).to(memory_format=torch.channels_last)
    own = [*model.parameters(), *model.buffers()]
    plain = saved_bytes(lambda: model(x), own)
    resnet_fused.fuse(model)
    with resnet_fused.use_backend("reference"):
        fused = saved_bytes(lambda: model(x), own)
    assert 0 < fused <= limit * plain, f"{fused / plain:.3f}"
