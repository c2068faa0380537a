"""`freeze`: the frozen copy computes what the model computes, and nothing it did can be seen in the model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from contract import assert_no_worse
from torch import nn

from resnet_fused import freeze, fuse
from resnet_fused.inference import FoldedConv, FrozenStage
from resnet_fused.nn import BasicBlock, Bottleneck, ConvBNAct2d, Stem


def _model(name="resnet18", **options):
    model = getattr(torchvision.models, name)(num_classes=10, **options).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "vgg11_bn", "densenet121"])
def test_frozen_models_compute_the_same(name):
    model = _model(name)
    if name == "vgg11_bn":
        model.classifier = nn.Linear(512 * 7 * 7, 10).eval()  # its own has a hundred million weights
    x = torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    frozen = freeze(model, x)
    with torch.no_grad():
        assert_no_worse(frozen(x), nn.Module.__call__, (model, x))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert any(isinstance(m, FoldedConv) for m in frozen.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_layouts(dtype, memory_format):
    model = _model().to(dtype).to(memory_format=memory_format)
    x = torch.randn(2, 3, 64, 64).to(dtype).to(memory_format=memory_format)
    with torch.no_grad():
        assert_no_worse(freeze(model, x)(x), nn.Module.__call__, (model, x))


def test_our_own_modules_are_folded():
    model = nn.Sequential(Stem(3, 16), ConvBNAct2d(16, 32, 3), Bottleneck(32, 8), BasicBlock(32, 32)).eval()
    x = torch.randn(2, 3, 64, 64)
    frozen = freeze(model, x)
    assert sum(isinstance(m, FoldedConv) for m in frozen.modules()) == 1 + 1 + 3 + 2
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_plain_tensor_attribute_reaches_the_frozen_forward():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.factor = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.tensor(3.0)

        def forward(self, x):
            return self.bn(self.conv(x)).relu() * self.factor

    model, x = Scaled().eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(freeze(model, x)(x), model(x))


def test_a_forward_that_needs_its_activations_in_nchw_order_gets_them():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.conv, self.bn = BasicBlock(3, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.block(x).view(-1, 3, 8, 8)
            return self.bn(self.conv(y)).relu().view(x.shape[0], -1)

    model, x = Viewing().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(freeze(model, x)(x), model(x))


def test_float64_is_float64():
    model, x = _model().double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(freeze(model, x)(x), model(x), rtol=1e-12, atol=1e-12)


def test_other_sizes_and_repeated_calls_give_the_same_bits_and_leave_the_input():
    model, x = _model(), torch.randn(2, 3, 64, 64)
    frozen = freeze(model, x)
    kept = x.clone()
    assert torch.equal(frozen(x), frozen(x))
    assert torch.equal(x, kept)
    other = torch.randn(3, 3, 96, 80)
    with torch.no_grad():
        assert_no_worse(frozen(other), nn.Module.__call__, (model, other))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_nan_inf_and_overflow_come_out_where_the_model_has_them(value):
    model, x = _model(), torch.randn(2, 3, 64, 64)
    frozen = freeze(model, x)
    x[1, 0, 5, 5] = value
    with torch.no_grad():
        expected = model(x)
    actual = frozen(x)
    assert torch.equal(actual.isnan(), expected.isnan())
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)


def test_a_forward_that_collects_what_blocks_return_is_not_overwritten():
    class Collecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = _model().layer1

        def forward(self, x):
            seen = [x]
            for block in self.blocks:
                seen.append(block(seen[-1]))
            return torch.stack(seen[1:])

    model, x = Collecting().eval(), torch.randn(2, 64, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(freeze(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


def test_stages_overwrite_only_their_own_intermediates():
    stage, x = _model("resnet50").layer1, torch.randn(2, 64, 8, 8)
    frozen = freeze(stage, x)
    assert isinstance(frozen.network, FrozenStage)
    kept = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), stage(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(x, kept)


def test_hooked_modules_are_kept_and_their_hooks_run():
    model, x = _model(), torch.randn(1, 3, 64, 64)
    seen = []
    model.layer2[0].bn1.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    frozen = freeze(model, x)
    seen.clear()
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(seen) == 2


def test_a_change_of_the_model_does_not_reach_its_frozen_copy():
    model, x = _model(), torch.randn(1, 3, 64, 64)
    frozen = freeze(fuse(model), x)
    before = frozen(x)
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert torch.equal(frozen(x), before)


def test_copies_share_the_constants():
    frozen = freeze(_model(), x := torch.randn(1, 3, 64, 64))
    assert torch.equal(copy.deepcopy(frozen)(x), frozen(x))


def test_bad_input():
    model, x = _model(), torch.randn(1, 3, 64, 64)
    with pytest.raises(RuntimeError, match="training mode"):
        freeze(model.train(), x)
    model.eval().layer1[0].bn1.train()
    with pytest.raises(RuntimeError, match=r"training mode \(layer1.0.bn1\)"):
        freeze(model, x)
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got int"):
        freeze(3, x)
    with pytest.raises(TypeError, match="must be a torch.Tensor, got list"):
        freeze(model.eval(), [x])
    with pytest.raises(RuntimeError, match="expected input.*to have 3 channels"):
        freeze(model, torch.randn(1, 4, 64, 64))
    frozen = freeze(model, x)
    with pytest.raises(RuntimeError, match="no training mode"):
        frozen.train()
    assert frozen.eval() is frozen
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(frozen)


def test_no_gradient_is_kept():
    frozen = freeze(_model(), x := torch.randn(1, 3, 64, 64))
    assert not frozen(x.requires_grad_()).requires_grad
