"""fuse on the models of torchvision and timm: all is fused or explained, and agrees with the plain model."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from agreement import assert_same
from tiers import larger
from torch import nn

from resnet_fused.fusion import BlockPlan, SequencePlan, fuse, plan_of, report, unfuse

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


pytestmark = pytest.mark.usefixtures("one_thread")


# (blocks, of these with a convolution in the shortcut): each network also has its stem fused
TORCHVISION_RESNETS = {
    "resnet18": (8, 3),
    "resnet34": (16, 3),
    "resnet50": (16, 4),
    "resnet101": (33, 4),
    "resnet152": (50, 4),
    "resnext50_32x4d": (16, 4),
    "resnext101_32x8d": (33, 4),
    "resnext101_64x4d": (33, 4),
    "wide_resnet50_2": (16, 4),
    "wide_resnet101_2": (33, 4),
}


def on_meta(make):
    with torch.device("meta"):
        return make()


def plans(model):
    return [plan for plan in map(plan_of, model.modules()) if plan is not None]


def small(model):
    """Float64, and running statistics that are not those of a fresh model."""
    torch.manual_seed(0)
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


@pytest.mark.parametrize("name", [larger(n) if k % 2 else n for k, n in enumerate(TORCHVISION_RESNETS)])
def test_torchvision_resnets_are_fused_wholly(name):
    model = on_meta(lambda: torchvision.models.get_model(name))
    keys, names = list(model.state_dict()), [n for n, _ in model.named_modules()]
    classes = [type(m) for m in model.modules()]
    result = report(fuse(model))
    blocks, shortcuts = TORCHVISION_RESNETS[name]
    found = [plan for plan in plans(model) if isinstance(plan, BlockPlan)]
    assert (len(found), sum(plan.shortcut is not None for plan in found)) == (blocks, shortcuts)
    assert {plan.kind for plan in found} == {"BasicBlock" if name in ("resnet18", "resnet34") else "Bottleneck"}
    assert result.skipped == [] and result.fused[0] == ("", "conv1-bn1-relu-maxpool")
    units = sum(len(plan.all_units) for plan in plans(model))
    assert units == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert list(model.state_dict()) == keys and [n for n, _ in model.named_modules()] == names
    assert [type(m) for m in unfuse(model).modules()] == classes


@pytest.mark.parametrize("name", [larger("resnet18"), "resnet50"])
def test_torchvision_resnets_agree(name):
    plain = small(torchvision.models.get_model(name, num_classes=10))
    assert_same(plain, fuse(copy.deepcopy(plain)), torch.randn(2, 3, 32, 32, dtype=torch.float64), steps=1)


def test_wide_grouped_and_dilated_resnet_agrees():
    plain = small(torchvision.models.resnet.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=10, groups=4, width_per_group=24,
        replace_stride_with_dilation=[False, True, True],
    ))  # fmt: skip
    fused = fuse(copy.deepcopy(plain))
    assert report(fused).skipped == []
    assert_same(plain, fused, torch.randn(2, 3, 32, 32, dtype=torch.float64), steps=1)


def narrow_vgg11_bn():
    vgg = torchvision.models.vgg
    return vgg.make_layers([v if v == "M" else v // 8 for v in vgg.cfgs["A"]], batch_norm=True)


# (constructor, fused modules, units, modules left alone, size of the picture)
OTHERS = {
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=10), 5, 11, 0, 32),
    "vgg11_bn": (narrow_vgg11_bn, 1, 8, 0, 32),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.25), 31, 52, 0, 32),
    "mnasnet": (lambda: torchvision.models.mnasnet0_5(num_classes=10), 17, 52, 0, 32),
    "googlenet": (
        lambda: torchvision.models.googlenet(num_classes=10, init_weights=False, transform_input=True),
        59,
        59,
        0,
        64,
    ),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10), 21, 56, 0, 32),
    "regnet_x": (lambda: torchvision.models.regnet_x_400mf(num_classes=10), 23, 71, 0, 32),
    "regnet_y": (lambda: torchvision.models.regnet_y_400mf(num_classes=10), 17, 53, 16, 32),
}


@pytest.mark.parametrize("name", [larger(name) if name == "regnet_x" else name for name in OTHERS])
def test_chains_of_other_torchvision_models(name):
    make, modules, units, skipped, size = OTHERS[name]
    plain = small(make())
    fused = fuse(copy.deepcopy(plain))
    result = report(fused)
    assert (len(result.fused), sum(len(p.all_units) for p in plans(fused)), len(result.skipped)) == (
        modules,
        units,
        skipped,
    )
    assert_same(plain, fused, torch.randn(2, 3, size, size, dtype=torch.float64), steps=1)


def test_segmentation_model_with_a_resnet_inside():
    model = on_meta(lambda: torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None))
    result = report(fuse(model))
    assert sum(isinstance(p, BlockPlan) for p in plans(model)) == 16
    assert dict(result.fused)["classifier"] == "0-1-relu"
    assert dict(result.fused)["backbone"] == "conv1-bn1-relu-maxpool"
    assert result.skipped == []


# Why a block of a timm resnet is fused unit by unit. Everything else that stands in the way would be a surprise.
KNOWN_REASONS = (
    "(AvgPool2d) between",  # anti-aliasing
    "(BlurPool2d) between",
    "(SEModule) between",
    "which is not fused",  # group norm
    "none of its modules runs an nn.BatchNorm2d itself",  # but norms of timm's own
    "no convolution belongs to it alone, and no ReLU follows it",  # in a classifier
    "no relu follows the sum",  # pre-activation
)


@functools.cache
def surveyed(name: str):
    """(blocks, chains, modules left alone with their reasons) of a timm resnet."""
    model = on_meta(lambda: timm.create_model(name))
    keys = list(model.state_dict())
    result = report(fuse(model))
    kinds = [type(plan) for plan in plans(model)]
    assert len(result.fused) == len(kinds) and list(model.state_dict()) == keys, name
    return kinds.count(BlockPlan), kinds.count(SequencePlan), result.skipped


@pytest.mark.larger
def test_every_timm_resnet_is_fused_or_explained(capsys):
    survey = {name: surveyed(name) for name in timm.list_models("resnet*")}
    for name, (blocks, chains, skipped) in survey.items():
        assert blocks + chains + len(skipped) > 0, name
        assert all(any(known in reason for known in KNOWN_REASONS) for _, reason in skipped), name
    whole = [name for name, (blocks, chains, skipped) in survey.items() if blocks + chains and not skipped]
    partly = [name for name, (blocks, chains, skipped) in survey.items() if blocks + chains and skipped]
    with capsys.disabled():
        alone = len(survey) - len(whole) - len(partly)
        print(
            f"\ntimm resnet*: {len(survey)} models, {len(whole)} fused wholly, {len(partly)} partly, {alone} explained"
        )
    assert {
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnet200",
        "resnet50c",
        "resnet101s",
        "resnet18d",
        "resnet200d",
    } <= set(whole)


@pytest.mark.parametrize(
    ("name", "blocks", "chains", "reason"),
    [
        ("resnet50", 16, 1, None),
        ("resnet50c", 16, 1, None),
        ("resnet50d", 16, 1, None),
        ("resnet33ts", 0, 38, None),
        ("resnetaa50", 13, 4, "`aa` (AvgPool2d) between `act2` and `conv3`"),
        ("resnetblur18", 5, 4, "`aa` (BlurPool2d) between `act1` and `conv2`"),
        ("resnetrs50", 0, 18, "`se` (SEModule) between `bn3` and the sum"),
        ("resnetv2_50", 0, 17, "no relu follows the sum"),
        ("resnet50_gn", 0, 0, "its norm is GroupNorm, which is not fused"),
    ],
)
def test_what_is_fused_in_timm_resnets(name, blocks, chains, reason):
    assert surveyed(name)[:2] == (blocks, chains)
    prefix = "unit by unit, not as one block: " if chains else ""
    assert {r for _, r in surveyed(name)[2]} == ({prefix + reason} if reason else set())


@pytest.mark.parametrize("name", ["resnet10t", larger("resnetaa50"), "seresnet18", "resnetv2_18", "skresnet18"])
def test_timm_resnets_agree(name):
    plain = small(timm.create_model(name, num_classes=10))
    fused = fuse(copy.deepcopy(plain))
    assert report(fused).fused
    assert_same(plain, fused, torch.randn(2, 3, 32, 32, dtype=torch.float64), steps=1)


def change_drop_rate(model):
    model.drop_rate = 0.3


def change_classifier(model):
    model.reset_classifier(7)


def change_drop_path(model):
    model.layer1[0].drop_path = timm.layers.DropPath(0.5)


@pytest.mark.parametrize(
    "change", [change_drop_rate, change_classifier, change_drop_path, timm.models.ResNet.set_grad_checkpointing]
)
def test_timm_switches_after_fuse_are_honoured(change):
    plain = small(timm.create_model("resnet18", num_classes=10, channels=(64, 32, 32, 32)))
    fused = fuse(copy.deepcopy(plain))
    for model in (plain, fused):
        torch.manual_seed(1)
        change(model)
        model.double()
    assert_same(plain, fused, torch.randn(2, 3, 32, 32, dtype=torch.float64), steps=1)
    reasons = dict(report(fused).skipped)
    if change is change_drop_path:
        prefix = "unit by unit, not as one block: "
        assert reasons == {"layer1.0": prefix + "`drop_path` (DropPath) between `bn2` and the sum"}
    elif change is timm.models.ResNet.set_grad_checkpointing:
        assert list(reasons) == [""]
    else:
        assert reasons == {}


def test_timm_features_and_blocks_with_drop_path():
    features = fuse(on_meta(lambda: timm.create_model("resnet18", features_only=True)))
    assert sum(isinstance(plan, BlockPlan) for plan in plans(features)) == 8
    model = fuse(on_meta(lambda: timm.create_model("resnet18", drop_path_rate=0.1, drop_block_rate=0.1)))
    reasons = set(dict(report(model).skipped).values())
    assert any("`drop_path` (DropPath)" in reason for reason in reasons)
    assert any("`drop_block` (DropBlock2d)" in reason for reason in reasons)
