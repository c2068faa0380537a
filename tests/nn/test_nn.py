"""The modules and blocks against their plain counterparts: outputs, gradients, statistics, state_dict, errors."""

from __future__ import annotations

import copy
import inspect
import re

import pytest
import torch
import torchvision
from contract import assert_no_worse
from torch import nn

from resnet_fused import ops, use_backend
from resnet_fused.nn import BasicBlock, BatchNormAct2d, Bottleneck, ConvBNAct2d, Stem, SyncBatchNormAct2d, call

BACKENDS = [b for b in ("reference", "aten", "triton", "cuda") if ops.available(b, "cpu")]


def _randomise(module):
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.1)
    return module


def _step(module, x, backend="auto"):
    """Output, gradients of the input and of every parameter, and the state behind one forward and backward."""
    module = copy.deepcopy(module)
    x = x.detach().clone().requires_grad_()
    with use_backend(backend):
        y = module(x)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype))
    results = {"y": y, "dx": x.grad}
    results |= {f"d{name}": p.grad for name, p in module.named_parameters()}
    return results | {name: b for name, b in module.named_buffers()}


def _assert_same_step(ours, plain, x, backend):
    assert_no_worse(_step(ours, x, backend), _step, (plain, x))


def _blocks():
    resnet = torchvision.models.resnet
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    wide_down = nn.Sequential(nn.Conv2d(8, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    return [
        pytest.param(BasicBlock(8, 8), resnet.BasicBlock(8, 8), id="basic"),
        pytest.param(
            BasicBlock(8, 16, 2, copy.deepcopy(down)), resnet.BasicBlock(8, 16, 2, down), id="basic with a projection"
        ),
        pytest.param(Bottleneck(16, 4), resnet.Bottleneck(16, 4), id="bottleneck"),
        pytest.param(
            Bottleneck(8, 8, 2, copy.deepcopy(wide_down)),
            resnet.Bottleneck(8, 8, 2, wide_down),
            id="bottleneck with a projection",
        ),
        pytest.param(
            Bottleneck(16, 4, dilation=2, base_width=128),
            resnet.Bottleneck(16, 4, dilation=2, base_width=128),
            id="wide, dilated",
        ),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ours,plain", _blocks())
def test_blocks_are_torchvisions(backend, training, ours, plain):
    ours, plain = copy.deepcopy(ours), _randomise(copy.deepcopy(plain))
    ours.load_state_dict(plain.state_dict())
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, plain.conv1.in_channels, 7, 7)
    _assert_same_step(ours.train(training), plain.train(training), x, backend)


def test_the_papers_bottleneck_has_its_stride_in_the_first_1x1():
    block = Bottleneck(8, 2, stride=2, stride_in_1x1=True)
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_stem(backend, training):
    ours = _randomise(Stem(3, 8)).train(training)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = copy.deepcopy(ours.conv1), copy.deepcopy(ours.bn1)

        def forward(self, x):
            return nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)

    _assert_same_step(ours, Plain().train(training), torch.randn(2, 3, 21, 18), backend)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}]
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norm_act_keeps_batch_norms_state(backend, training, options):
    ours, plain = BatchNormAct2d(5, act=None, **options), nn.BatchNorm2d(5, **options)
    if options.get("track_running_stats", True):
        _randomise(plain)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(4, 5, 3, 3)
    for _ in range(3):
        with use_backend(backend):
            y = ours.train(training)(x)
        torch.testing.assert_close(y, plain.train(training)(x))
        x = x * 1.5 + 0.5
    for (name, a), (_, b) in zip(ours.state_dict().items(), plain.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_batch_norm_act_adds_and_rectifies():
    module, x, residual = BatchNormAct2d(3).eval(), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(module(x, residual), (nn.BatchNorm2d(3).eval()(x) + residual).relu())
    assert repr(module).endswith("act=relu)")


def test_conv_bn_act():
    module = ConvBNAct2d(3, 4, 3, stride=2).eval()
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(module(x), module.bn(module.conv(x)).relu())
    assert next(iter(module.state_dict())) == "conv.weight"


@pytest.mark.parametrize("bad", [torch.randn(3, 4), torch.randn(3, 4, 5), torch.randn(1, 2, 3, 4, 5)])
def test_an_input_of_the_wrong_rank_raises_what_batch_norm_raises(bad):
    with pytest.raises(ValueError) as expected:
        nn.BatchNorm2d(4)(bad)
    with pytest.raises(ValueError) as actual:
        BatchNormAct2d(4)(bad)
    assert str(actual.value) == str(expected.value)


def test_a_wrong_channel_count_raises_what_conv_raises():
    with pytest.raises(RuntimeError) as expected:
        nn.Conv2d(3, 4, 3, padding=1)(torch.randn(1, 5, 8, 8))
    for training in (True, False):
        with pytest.raises(RuntimeError) as actual, torch.no_grad():
            module = ConvBNAct2d(3, 4, 3, bias=True).train(training)
            module(torch.randn(1, 5, 8, 8))
        assert str(actual.value) == str(expected.value)


def test_modules_with_hooks_are_called_one_by_one():
    block = BasicBlock(4, 4).eval()
    x = torch.randn(1, 4, 5, 5)
    expected = block(x)
    seen = []
    for module in (block.conv1, block.bn2, block.relu):
        module.register_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    assert call.plain(block.conv1, block.bn1, block.relu) == "a Conv2d has hooks"
    torch.testing.assert_close(block(x), expected)
    assert seen == ["Conv2d", "ReLU", "BatchNorm2d", "ReLU"]


def test_subclasses_and_parametrizations_are_called_one_by_one():
    class Doubling(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    conv, bn = Doubling(3, 4, 1), nn.BatchNorm2d(4).eval()
    assert "Doubling is not a plain Conv2d" in call.plain(conv, bn, None)
    x = torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(call.conv_bn_act(x, conv, bn, None), bn(conv(x)).relu())
    weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    assert "not a plain Conv2d" in call.plain(weighted, bn, None)
    assert "reflect" in call.plain(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), bn, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_converted_to_half_precision(backend, dtype):
    ours = _randomise(BatchNormAct2d(6)).to(dtype)
    x = torch.randn(3, 6, 4, 4).to(dtype)
    plain = nn.BatchNorm2d(6).to(dtype)
    plain.load_state_dict(ours.state_dict())
    with use_backend(backend):
        y = ours(x)
    assert_no_worse(y, lambda bn, x: bn(x).relu(), (plain, x))
    plain(x)
    assert ours.running_var.dtype == dtype
    torch.testing.assert_close(ours.running_var, plain.running_var)


SAME_AS = [(BatchNormAct2d, nn.BatchNorm2d), (SyncBatchNormAct2d, nn.SyncBatchNorm)]
TAKES_BIAS = "bias" in inspect.signature(nn.BatchNorm2d).parameters  # since torch 2.14


@pytest.mark.parametrize(("ours", "plain"), SAME_AS)
def test_batch_norm_act_takes_what_the_installed_torch_takes(ours, plain):
    expected = inspect.signature(plain).parameters
    parameters = dict(inspect.signature(ours).parameters)
    act = parameters.pop("act")
    assert (act.kind, act.default) == (inspect.Parameter.KEYWORD_ONLY, "relu")
    assert list(parameters.items()) == list(expected.items())
    by_position = [4, 1e-3, 0.2, True, False, *([None] if plain is nn.SyncBatchNorm else []), "cpu", torch.float64]
    assert (
        str(ours(*by_position)) == str(plain(*by_position)).replace(plain.__name__, ours.__name__)[:-1] + ", act=relu)"
    )
    assert ours(*by_position, act=None).weight.dtype == torch.float64
    for arguments, options in (((), {}), ((4, "eps", 3, 4, 5, 6, 7, 8, 9), {}), ((4,), {"stranger": 1})):
        with pytest.raises(TypeError) as error:
            plain(*arguments, **options)
        with pytest.raises(TypeError, match=re.escape(str(error.value))):
            ours(*arguments, **options)


@pytest.mark.skipif(not TAKES_BIAS, reason="this torch's batch norms have no bias argument")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norm_act_without_a_bias(backend, training):
    ours, plain = BatchNormAct2d(3, bias=False, act=None), nn.BatchNorm2d(3, bias=False)
    nn.init.uniform_(plain.weight, 0.5, 1.5)
    ours.load_state_dict(plain.state_dict())
    assert ours.bias is None and list(ours.state_dict()) == list(plain.state_dict())
    _assert_same_step(ours.train(training), plain.train(training), torch.randn(2, 3, 4, 4), backend)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(converted) is SyncBatchNormAct2d and converted.bias is None and converted.act is None
