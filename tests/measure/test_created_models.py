"""Models by name, with batch norms that look trained."""

import pytest
import torch
import torchvision
from torch import nn

from resnet_fused._command import UsageError
from resnet_fused.measure import models


def test_create_is_seeded_and_its_batch_norms_look_trained():
    first, again, other = models.create("resnet18", 0), models.create("resnet18", 0), models.create("resnet18", 1)
    state = torch.random.get_rng_state()
    assert torch.equal(state, torch.random.get_rng_state()) and not first.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    for norm in (module for module in first.modules() if isinstance(module, nn.BatchNorm2d)):
        assert norm.momentum == 0.1 and norm.weight.std() > 0 and norm.bias.std() > 0
        assert norm.running_mean.abs().max() > 0 and norm.running_var.std() > 0


def test_create_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    models.create("resnet18")
    assert torch.equal(torch.rand(4), expected)


def test_timm_models_by_name():
    pytest.importorskip("timm")
    assert models.create("timm:resnet10t")(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_a_model_for_other_pictures_is_refused_in_one_line(monkeypatch):
    def forward(self, x):
        raise AssertionError("Input height (128)\n  doesn't match model (224).")

    monkeypatch.setattr(torchvision.models.ResNet, "forward", forward)
    with pytest.raises(UsageError, match="'resnet18' is none for pictures of 128 x 128: Input height .128. doesn't"):
        models.create("resnet18")
