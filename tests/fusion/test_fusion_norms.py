"""What computes a batch norm is fused whatever its class; what only looks like one is left alone, with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from agreement import (
    assert_freezes,
    assert_hook_sees_the_same,
    assert_one_graph,
    assert_same,
    assert_same_under_autocast,
    through_pickle,
    through_torch_save,
)
from torch import nn

from resnet_fused import use_backend
from resnet_fused.fusion import BlockPlan, fuse, plan_of, report, swap, unfuse
from resnet_fused.fusion.norms import NormForm, norm_form
from resnet_fused.nn.norms import RecognisedNorm

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

from timm.layers.norm_act import (  # noqa: E402
    BatchNormAct2d,
    FrozenBatchNormAct2d,
    SyncBatchNormAct,
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
)

FrozenBatchNorm2d = torchvision.ops.FrozenBatchNorm2d


class Renamed(nn.BatchNorm2d):
    """A batch norm that only has another constructor."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-3, momentum=0.03)


class WithReLU(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class SwappedRoles(nn.Module):
    """A fixed affine map in arithmetic of its own."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 1.5), ("bias", 0.25), ("running_mean", 0.5), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        std = (self.running_var + self.eps).sqrt()[:, None, None]
        return (x - self.running_mean[:, None, None]) / std * self.weight[:, None, None] + self.bias[:, None, None]


class Centred(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1e-3


class Switched(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.enabled = True

    def forward(self, x):
        return super().forward(x) if self.enabled else x


class SwitchedByClass(nn.BatchNorm2d):
    enabled = True

    def forward(self, x):
        return super().forward(x) if self.enabled else x


class OtherInTraining(nn.BatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if self.training else y


class Frozen(nn.BatchNorm2d):
    """Normalises by the running statistics in training, too, as many frozen backbones do."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


FORMS = [
    (lambda: nn.BatchNorm2d(4), NormForm()),
    (lambda: nn.SyncBatchNorm(4), NormForm()),
    (lambda: Renamed(4), NormForm()),
    (lambda: WithReLU(4), NormForm(tail=(None,))),
    (lambda: Frozen(4), NormForm(constant=True)),
    (lambda: SwappedRoles(4), NormForm(constant=True)),
    (lambda: FrozenBatchNorm2d(4), NormForm(constant=True)),
    (lambda: BatchNormAct2d(4), NormForm(tail=("drop", "act"))),
    (lambda: BatchNormAct2d(4, affine=False), NormForm(tail=("drop", "act"))),
    (lambda: convert_sync_batchnorm(BatchNormAct2d(4)), NormForm(tail=("drop", "act"))),
    (lambda: FrozenBatchNormAct2d(4), NormForm(constant=True, tail=("drop", "act"))),
    (lambda: Centred(4), "Centred computes something else than a batch norm"),
    (lambda: OtherInTraining(4), "OtherInTraining computes something else than a batch norm"),
    (lambda: Switched(4), "its forward reads the attribute `enabled`"),
    (lambda: SwitchedByClass(4), "its forward reads the attribute `enabled`"),
    (lambda: SyncBatchNormAct(4), "its forward reads the attribute `act`"),
    (lambda: nn.InstanceNorm2d(4, track_running_stats=True), None),
    (lambda: nn.BatchNorm3d(4), None),
    (lambda: nn.GroupNorm(2, 4), None),
]


@pytest.mark.parametrize(("make", "expected"), FORMS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_a_norm_is_is_seen_in_its_forward(make, expected):
    module = make()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    form = norm_form(module)
    assert expected in form if isinstance(expected, str) else form == expected, form
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


class Block(nn.Module):
    """A basic block with norms of any class; `act` where they have no ReLU of their own."""

    def __init__(self, norm, act=True, last=None):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = norm(4), (last or norm)(4)
        self.act1, self.act2 = nn.ReLU() if act else nn.Identity(), nn.ReLU()
        for name, value in self.state_dict().items():
            if "running_var" in name or "bn" in name and "weight" in name:
                nn.init.uniform_(value, 0.5, 1.5)
            elif value.is_floating_point() and "bn" in name:
                nn.init.normal_(value, std=0.3)

    def forward(self, x):
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + x)


def without_act(channels):
    return BatchNormAct2d(channels, apply_act=False)


def sync_act(channels, **options):
    return convert_sync_batchnorm(BatchNormAct2d(channels, **options))


BLOCKS = {
    "subclass": lambda: Block(Renamed),
    "relu inside": lambda: Block(WithReLU, act=False, last=Renamed),
    "torchvision frozen": lambda: Block(FrozenBatchNorm2d),
    "frozen subclass": lambda: Block(Frozen),
    "frozen arithmetic": lambda: Block(SwappedRoles),
    "timm": lambda: Block(BatchNormAct2d, act=False, last=without_act),
    "timm sync": lambda: Block(sync_act, act=False, last=lambda c: sync_act(c, apply_act=False)),
    "timm frozen": lambda: freeze_batch_norm_2d(Block(BatchNormAct2d, act=False, last=without_act)),
}


def picture(dtype=torch.float64):
    return torch.randn(2, 4, 6, 6, dtype=dtype)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_with_any_norm_are_blocks_and_agree(name, backend):
    torch.manual_seed(0)
    plain = BLOCKS[name]().double()
    fused = fuse(copy.deepcopy(plain))
    assert isinstance(plan_of(fused), BlockPlan) and report(fused).skipped == []
    with use_backend(backend):
        assert_same(plain, fused, picture())
    assert list(fused.state_dict()) == list(plain.state_dict())
    classes = [type(module) for module in plain.modules()]
    assert [type(module) for module in unfuse(fused).modules()] == classes


@pytest.mark.parametrize("name", BLOCKS)
def test_they_are_folded_by_freeze(name):
    torch.manual_seed(0)
    assert_freezes(BLOCKS[name]().double(), picture(), ["conv_fprop"] * 2)


@pytest.mark.parametrize("name", ["torchvision frozen", "timm", "timm frozen"])
@pytest.mark.parametrize("training", [True, False])
def test_results_under_autocast_have_the_dtype_of_the_plain_model(name, training):
    plain = BLOCKS[name]().train(training)
    assert_same_under_autocast(plain, fuse(copy.deepcopy(plain)), picture(torch.float32))


def test_a_frozen_norm_of_another_dtype_takes_the_plain_path():
    plain = Block(FrozenBatchNorm2d)
    for conv in (plain.conv1, plain.conv2):
        conv.to(torch.bfloat16)
    plain.conv2.to(torch.float32)
    fused = fuse(copy.deepcopy(plain))
    x = picture(torch.bfloat16)
    expected, actual = plain(x), fused(x)
    assert actual.dtype == expected.dtype == torch.float32 and torch.equal(actual, expected)


@pytest.mark.parametrize("activation", [nn.GELU, nn.LeakyReLU])
def test_another_activation_inside_follows_the_unit(activation):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=activation)).double()
    fused = fuse(copy.deepcopy(model))
    assert report(fused).fused == [("", "0-1")] and report(fused).skipped == []
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert_same(model, fused, x)
    assert_freezes(model, x, ["conv_fprop"])


def test_dropout_inside_follows_the_unit():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, drop_layer=lambda: nn.Dropout(0.5))).double()
    fused = fuse(copy.deepcopy(model))
    assert report(fused).fused == [("", "0-1")]
    assert_same(model, fused, torch.randn(2, 3, 6, 6, dtype=torch.float64))


def test_a_frozen_norm_without_a_convolution_is_left_alone():
    model = nn.Sequential(FrozenBatchNorm2d(3), nn.ReLU())
    assert report(fuse(model)).skipped == [("0", "FrozenBatchNorm2d does not follow a convolution")]


def replace_activation(block):
    block.bn1.act = nn.SiLU()


def drop(block):
    block.bn1.drop = nn.Dropout(0.5)


def cumulative(block):
    block.bn1.momentum = None


def momentum(block):
    block.bn1.momentum = 0.7


def untracked(block):
    block.bn1.running_mean = block.bn1.running_var = block.bn1.num_batches_tracked = None
    block.bn1.track_running_stats = False


@pytest.mark.parametrize(
    ("change", "block"),
    [(replace_activation, False), (drop, False), (cumulative, False), (momentum, True), (untracked, True)],
)
@pytest.mark.parametrize("before", ["fresh", "after a call"])
def test_changes_of_a_recognised_norm_are_noticed(change, block, before):
    torch.manual_seed(0)
    plain = BLOCKS["timm"]().double()
    fused = fuse(copy.deepcopy(plain))
    for model in (plain, fused):
        if before == "after a call":
            model(torch.ones(2, 4, 6, 6, dtype=torch.float64))
        change(model)
    assert_same(plain, fused, picture())
    assert isinstance(plan_of(fused), BlockPlan) is block


@pytest.mark.parametrize("path", ["bn1", "bn1.act", "bn1.drop", "bn2", "conv1", "act2"])
def test_hooks_around_and_inside_a_recognised_norm_fire(path):
    torch.manual_seed(0)
    plain = BLOCKS["timm"]().double()
    assert_hook_sees_the_same(plain, fuse(copy.deepcopy(plain)), path, picture())


class TimmBlock(Block):
    """One that a pickle can name."""

    def __init__(self):
        super().__init__(BatchNormAct2d, act=False, last=without_act)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_and_pickles_are_recognised(duplicate):
    plain = TimmBlock().double()
    twin = duplicate(fuse(copy.deepcopy(plain)))
    assert_same(plain, twin, picture())
    assert isinstance(plan_of(fuse(twin)), BlockPlan)
    assert type(unfuse(twin)) is TimmBlock


@pytest.mark.parametrize("name", ["timm", "torchvision frozen", "subclass"])
@pytest.mark.parametrize("training", [True, False])
def test_they_compile_in_one_graph(name, training):
    plain = BLOCKS[name]().double().train(training)
    assert_one_graph(plain, fuse(copy.deepcopy(plain)), picture())


def test_conversion_to_sync_batch_norm_keeps_the_activation_that_timm_keeps():
    plain = BLOCKS["timm"]().double()
    fused = fuse(copy.deepcopy(plain))
    converted = convert_sync_batchnorm(fused)
    assert isinstance(plan_of(converted), BlockPlan)
    norm = swap.current(converted).units[0][1]
    assert isinstance(norm, RecognisedNorm) and type(norm.module) is SyncBatchNormAct
    assert_same(convert_sync_batchnorm(plain), converted, picture())
