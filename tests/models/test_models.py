"""The paper's networks: multiply-adds, parameters, torchvision's keys and first weights, shortcuts, fused, frozen."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from contract import assert_no_worse
from tiers import larger
from torch import nn

import resnet_fused
from resnet_fused import models, ops, use_backend
from resnet_fused.models import ZeroPadShortcut
from resnet_fused.nn import BasicBlock, Bottleneck

BACKENDS = [b for b in ("reference", "aten", "triton", "cuda") if ops.available(b, "cpu")]

# He et al. 2015, table 1 and figure 3, to the digit that the authors' definition gives (convolutions and fc).
MULTIPLY_ADDS = {
    "plain18": 1.795e9,
    "plain34": 3.644e9,
    "resnet18": 1.814e9,
    "resnet34": 3.664e9,
    "resnet50_v1": 3.858e9,
    "resnet101_v1": 7.570e9,
    "resnet152_v1": 11.282e9,
    "resnet50": 4.089e9,
    "resnet101": 7.801e9,
    "resnet152": 11.514e9,
    "vgg19": 19.632e9,
}
CIFAR_MILLION_PARAMETERS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}  # table 6


def on_meta(name, **options):
    return models.create(name, device="meta", **options)


def randomise(model):
    """Batch norms as after training: fresh ones hide mistakes."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.2, 0.6)
            nn.init.normal_(m.bias, 0, 0.1)
    return model


def module_by_module(model):
    """A copy that calls every module by itself: nothing of it may be fused while each has a hook."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
    return model


def small(**options):
    return {"widths": (4, 8, 8), **options}


SMALL = {
    "option A": lambda: models.cifar_resnet(8, **small()),
    "option B": lambda: models.cifar_resnet(8, **small(shortcut="B")),
    "option C": lambda: models.cifar_resnet(8, **small(shortcut="C")),
    "plain": lambda: models.cifar_plain(8, **small()),
    "zero-initialised": lambda: models.cifar_resnet(8, **small(zero_init_residual=True)),
    "imagenet stem, v1": lambda: models.ResNet(Bottleneck, (1, 1), (4, 8), 10, stride_in_1x1=True),
    "imagenet stem, v1.5": lambda: models.ResNet(Bottleneck, (1, 1), (4, 8), 10, shortcut="C"),
    "plain, imagenet stem": lambda: models.ResNet(models.PlainBlock, (1, 1), (8, 8), 10),
}


@pytest.mark.parametrize("name", [larger(n) if k % 2 else n for k, n in enumerate(MULTIPLY_ADDS)])
def test_multiply_adds_are_the_papers(name):
    assert models.multiply_adds(on_meta(name)) == pytest.approx(MULTIPLY_ADDS[name], abs=0.5e6)


def test_multiply_adds_leave_the_model_alone():
    model = models.cifar_resnet(8)
    assert models.multiply_adds(model, 32) == models.multiply_adds(model.eval(), (32, 32)) > 0
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("family", ["cifar_resnet", "cifar_plain"])
@pytest.mark.parametrize("depth", CIFAR_MILLION_PARAMETERS)
def test_cifar_nets_have_the_papers_parameters_and_depth(family, depth):
    model = on_meta(f"{family}{depth}")
    found = sum(p.numel() for p in model.parameters()) / 1e6
    assert found == pytest.approx(CIFAR_MILLION_PARAMETERS[depth], rel=0.02)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth  # option A adds none


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vgg19", "vgg19_bn"])
def test_keys_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None).state_dict()
    ours = on_meta(name).state_dict()
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [(k, v.shape, v.dtype) for k, v in theirs.items()]


@pytest.mark.parametrize("zero", [False, True])
def test_one_seed_gives_torchvisions_weights_and_results(zero):
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=10, zero_init_residual=zero)
    torch.manual_seed(3)
    ours = models.resnet18(10, zero_init_residual=zero)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert_no_worse(ours.eval()(x), lambda model, x: model(x), (theirs.eval(), x))


def test_vgg_computes_torchvisions_vgg():
    ours = randomise(models.vgg19(2, batch_norm=True, device="meta").to_empty(device="cpu")).eval()
    for p in ours.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5)
    for m in ours.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.zeros_(m.bias)
    with torch.device("meta"):
        theirs = torchvision.models.vgg19_bn(num_classes=2).eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version,strides", [("v1", ((2, 2), (1, 1))), ("v1.5", ((1, 1), (2, 2)))])
def test_where_the_stride_is(version, strides):
    model = models.resnet50(version=version, device="meta")
    block = model.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == strides
    assert model.layer2[1].conv1.stride == model.layer2[1].conv2.stride == (1, 1)


@pytest.mark.parametrize("option,projections,padded", [("A", 0, 3), ("B", 3, 0), ("C", 16, 0)])
def test_shortcut_options(option, projections, padded):
    model = models.resnet34(shortcut=option, device="meta")
    shortcuts = [m.downsample for m in model.modules() if isinstance(m, BasicBlock)]
    assert sum(isinstance(s, nn.Sequential) for s in shortcuts) == projections
    assert sum(isinstance(s, ZeroPadShortcut) for s in shortcuts) == padded
    assert sum(s is None for s in shortcuts) == 16 - projections - padded


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_option_a_puts_its_zeros_behind_the_identity(layout):
    x = torch.randn(2, 3, 5, 4).contiguous(memory_format=layout)
    y = ZeroPadShortcut(3, 7, stride=2)(x)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2]) and not y[:, 3:].any() and y.shape == (2, 7, 3, 2)
    assert y.is_contiguous(memory_format=layout)


def test_a_plain_net_is_its_resnet_without_shortcuts():
    keys = list(on_meta("resnet34").state_dict())
    assert list(on_meta("plain34").state_dict()) == [key for key in keys if "downsample" not in key]


def test_zero_initialised_branches_make_every_identity_block_the_identity():
    model = models.cifar_resnet(20, widths=(4, 8, 8), zero_init_residual=True)
    x = torch.randn(2, 4, 8, 8).relu()
    for training in (True, False):
        assert torch.equal(model.train(training).layer1(x), x)
        y = model.layer2(x)  # one shortcut of option A, then identities
        assert torch.equal(y[:, :4], x[:, :, ::2, ::2]) and not y[:, 4:].any()


def step(model, x, backend="auto"):
    """Logits, the gradients of all parameters and all buffers behind one step of training."""
    model, y = copy.deepcopy(model), torch.arange(len(x)) % 10
    with use_backend(backend):
        logits = model(x)
    nn.functional.cross_entropy(logits, y).backward()
    state = {f"d{name}": p.grad for name, p in model.named_parameters()}
    return {"logits": logits, **state, **dict(model.named_buffers())}


# The blocks' own tests run every backend; here the slow ones, in their interpreters, run the shapes that are new.
RUNS = [(kind, backend) for kind in SMALL for backend in BACKENDS if backend in ("reference", "aten")]
RUNS += [(kind, backend) for kind in ("option A", "plain") for backend in BACKENDS if backend in ("triton", "cuda")]


@pytest.mark.parametrize("kind,backend", RUNS)
def test_training_is_that_of_the_modules_one_by_one(kind, backend):
    model = randomise(SMALL[kind]()).train()
    side = 32 if "imagenet" in kind else 8
    x = torch.randn(4, 3, side, side)
    plain = module_by_module(model)
    assert_no_worse(step(model, x, backend), step, (plain, x))


@pytest.mark.parametrize("kind", SMALL)
def test_models_fuse_unfuse_and_freeze(kind):
    model = randomise(SMALL[kind]()).eval()
    x = torch.randn(2, 3, 33, 33)
    plain = copy.deepcopy(model)
    frozen = resnet_fused.freeze(model, x)
    assert_no_worse(frozen(x), lambda model, x: model(x), (plain, x), "frozen")
    # A block with a shortcut of option A runs as a fused block in training, and stays as it is when frozen.
    whole = [m for m in frozen.modules() if isinstance(m, BasicBlock)]
    assert all(isinstance(block.downsample, ZeroPadShortcut) for block in whole)
    left = {norm for block in whole for norm in block.modules() if isinstance(norm, nn.BatchNorm2d)}
    assert {m for m in frozen.modules() if isinstance(m, nn.BatchNorm2d)} == left, "a batch norm was not folded"
    keys = list(model.state_dict())
    assert_no_worse(resnet_fused.fuse(model)(x), lambda model, x: model(x), (plain, x), "fused")
    assert resnet_fused.report(model).skipped == []
    resnet_fused.unfuse(model)
    assert list(model.state_dict()) == keys and type(model) is models.ResNet


def test_every_name_builds_and_others_are_refused_with_close_ones():
    names = models.list_models()
    assert len(names) == len(set(names)) and "cifar_resnet110" in names
    for name in names:
        if "1202" not in name:
            assert on_meta(name, num_classes=7).state_dict().popitem()[1].shape == (7,)
    assert on_meta("cifar_plain14").stages == ("layer1", "layer2", "layer3")
    with pytest.raises(ValueError, match="'resnet51'.*resnet50"):
        models.create("resnet51")


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: models.cifar_resnet(21), "depth 21 is not 6n \\+ 2"),
        (lambda: models.cifar_plain(2), "depth 2 is not 6n \\+ 2"),
        (lambda: models.resnet18(shortcut="D"), "shortcut 'D'; choose one of 'A', 'B', 'C'"),
        (lambda: models.resnet18(stem="tiny"), "stem 'tiny'; choose one of 'imagenet', 'small'"),
        (lambda: models.resnet50(version="v2"), "version 'v2'.*'v1' or 'v1.5'"),
        (lambda: models.plain18(zero_init_residual=True), "no residual branches"),
        (lambda: models.resnet18(stride_in_1x1=True), "needs Bottleneck blocks, not BasicBlock"),
        (lambda: models.ResNet(BasicBlock, (2, 2), (8,)), "depths \\(2, 2\\) and widths \\(8,\\)"),
        (lambda: ZeroPadShortcut(8, 4), "out_channels 4 must be at least in_channels 8"),
    ],
)
def test_bad_options_are_one_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
