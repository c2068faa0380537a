"""What `freeze` plans: the ops it picks, what it says of them, and their results against float64."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torchvision
from contract import assert_no_worse
from networks import randomised
from op_cases import reference
from torch import nn
from torch._subclasses import FakeTensorMode

from resnet_fused import dispatch, freeze, use_backend
from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.inference import EpilogueConv, FoldedConv, FreezePlan, FrozenBlock, FrozenStage, PlannedConv
from resnet_fused.inference.conv import Example, Kernel, Source
from resnet_fused.inference.plan import LAYER_BY_LAYER
from resnet_fused.nn import BasicBlock, Bottleneck
from resnet_fused.ops import cpu

NHWC = torch.channels_last
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _statistics(model):
    return randomised(model).eval()


def _projection(inputs, outputs, stride):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _bottlenecks(blocks=3, width=8, inputs=16, stride=2, **options):
    """A stage: a block with a projection, then blocks without."""
    outputs = 4 * width
    first = Bottleneck(inputs, width, stride, _projection(inputs, outputs, stride), **options)
    return _statistics(nn.Sequential(first, *(Bottleneck(outputs, width, **options) for _ in range(blocks - 1))))


def _basic_blocks():
    return _statistics(nn.Sequential(BasicBlock(12, 20, 2, _projection(12, 20, 2)), BasicBlock(20, 20)))


def _frozen(model, x, backend="reference"):
    with use_backend(backend):
        return freeze(model, x)


def _check(model, x, backend="reference"):
    frozen = _frozen(model, x, backend)
    with torch.no_grad():
        plain = model(x)
        assert_no_worse(frozen(x), nn.Module.__call__, (model, x))
    if backend == "reference":  # oneDNN's results are NHWC wherever nobody minds
        assert frozen(x).stride() == plain.stride()
    return frozen


@pytest.fixture
def ops_run(monkeypatch):
    """The ops that frozen networks run from now on."""
    run = []
    original = Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", lambda self, *args: (run.append(self.op), original(self, *args))[1])
    return run


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "aten", "cuda"])
@pytest.mark.parametrize("stage", [_bottlenecks, _basic_blocks])
def test_stages_on_every_backend(stage, backend, dtype, memory_format):
    model = stage().to(dtype).to(memory_format=memory_format)
    inputs = model[0].conv1.in_channels
    x = torch.randn(2, inputs, 9, 7).to(dtype).contiguous(memory_format=memory_format)
    frozen = _check(model, x, backend)
    assert isinstance(frozen.network, FrozenStage)
    kind = EpilogueConv if backend == "reference" else FoldedConv
    assert all(isinstance(conv, kind) for block in frozen.network for conv in block.branch)


@pytest.mark.parametrize("name, options", [("resnet18", {}), ("resnet50", {"width_per_group": 16})])
def test_torchvisions_networks_on_the_reference(name, options):
    model = _statistics(getattr(torchvision.models, name)(num_classes=10, **options))
    _check(model, torch.randn(2, 3, 64, 64))


def test_a_stage_of_bottlenecks_is_a_join_and_a_row_of_chains(ops_run):
    model, x = _bottlenecks(blocks=4), torch.randn(1, 16, 6, 6)
    frozen = _frozen(model, x)
    ops_run.clear()
    frozen(x)
    # conv1, conv2, conv3 + projection; conv1; (conv2, conv3, next conv1) twice; (conv2, conv3)
    assert ops_run == ["conv_fprop", "conv_fprop", "conv_join", "conv_fprop", "conv_chain", "conv_chain", "conv_chain"]
    assert [row.op for row in frozen.plan.layers] == (
        ["conv_fprop", "conv_fprop", "conv_join", "conv_join"] + ["conv_fprop"] + ["conv_chain"] * 8
    )


def test_the_plan_is_a_table_of_every_convolution():
    model = _statistics(torchvision.models.resnet50(num_classes=10, width_per_group=8))
    frozen = _frozen(model, torch.randn(1, 3, 33, 33))
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [row.layer for row in frozen.plan.layers] == convs
    assert {row.backend for row in frozen.plan.layers} == {"reference"}
    # 16 blocks: 4 joins of two convolutions; 12 chains of conv2, conv3 and in 8 cases the next conv1
    assert Counter(row.op for row in frozen.plan.layers) == {"conv_join": 8, "conv_chain": 32, "conv_fprop": 13}
    row = next(row for row in frozen.plan.layers if row.layer == "layer3.1.conv2")
    assert "layer3.1.conv3" in row.fused and "layer3.2.conv1" in row.fused and not row.reason
    lines = str(frozen.plan).splitlines()
    assert lines[0] == (
        "53 convolutions: 13 in conv_fprop on reference, 8 in conv_join on reference, 32 in conv_chain on reference"
    )
    assert len(lines) < 40 and max(map(len, lines)) <= 120
    listed = " ".join(line[:40].strip() for line in lines)  # the column of the names
    for name in ("conv1, layer[1-4].[0-1].conv1", "layer[1-4].0.downsample.0", "layer4.2.conv2"):
        assert name in listed
    assert any("the previous block's" in line for line in lines)


def test_equal_rows_are_one_and_the_summary_says_what_all_have_in_common():
    names = [f"layer{i}.{k}.conv{c}" for i in (1, 2) for k in range(3) for c in (1, 2)]
    why = f"conv_chain: {LAYER_BY_LAYER}"
    rows = [PlannedConv(name, "aten", "conv_fprop", "batch norm", why) for name in names]
    lines = str(FreezePlan(tuple(rows))).splitlines()
    assert lines[0] == "12 convolutions: 12 in conv_fprop on aten (native PyTorch kernels, layer by layer)"
    assert max(map(len, lines)) <= 120
    table = [line.split() for line in lines[1::2]]
    assert table == [["layer", "fused", "with"], ["layer[1-2].[0-2].conv[1-2]", "batch", "norm"]]


def test_layers_of_other_blocks_are_named_as_seen_from_each():
    names = ["layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2", "layer1.2.conv1", "layer1.2.conv2"]
    rows = [
        PlannedConv(name, "triton", "conv_chain", "", f"in front of {after}, not of fc 1.5, {before}")
        for before, name, after in zip(names, names[1:], names[2:], strict=False)
    ]
    others = [PlannedConv(name, "triton", "conv_fprop", "") for name in (names[0], names[-1])]
    text = " ".join(str(FreezePlan((others[0], *rows, others[1]))).split())
    assert "in front of conv2, not of fc 1.5, the previous block's conv2" in text
    assert "in front of the next block's conv1, not of fc 1.5, conv1" in text


def _reason(frozen, layer):
    return next(row.reason for row in frozen.plan.layers if row.layer == layer)


@pytest.mark.skipif(not cpu.supported(), reason="no AVX2, or the kernels for CPUs are not built")
def test_the_plan_says_why_our_kernels_for_cpus_do_not_run_a_convolution():
    model, x = _bottlenecks(width=24, groups=2), torch.randn(1, 16, 6, 6)
    lines = str(_frozen(model, x, "auto").plan).splitlines()
    rows = [line for line in lines if "takes groups of 16, 32, ... outputs" in line]
    assert len(rows) == 1 and rows[0].startswith("[0-2].conv2 ") and "conv_chain" not in "".join(lines)
    model, x = model.half(), x.half()
    assert {row.reason.partition(";")[0][-11:] for row in _frozen(model, x, "auto").plan.layers} == {"not float16"}
    assert not any("our CPU kernel" in row.reason for row in _frozen(model, x, "aten").plan.layers)


@pytest.mark.skipif(not cpu.supported(), reason="no AVX2, or the kernels for CPUs are not built")
def test_the_plan_names_winograds_algorithm_where_it_runs():
    in_float32 = "bfloat16" in cpu.supported() and cpu.packing(torch.bfloat16).dtype == torch.float32
    for size, bf16, runs in [(8, False, True), (1, False, False), (8, True, in_float32)]:
        model, x = _bottlenecks(width=16), torch.randn(1, 16, size, size)
        if bf16:
            model, x = model.bfloat16(), x.bfloat16()
        by = {row.layer for row in _frozen(model, x, "auto").plan.layers if "Winograd" in row.fused}
        assert by == ({"1.conv2", "2.conv2"} if runs else set())  # the first has a stride


def test_the_plan_says_why_not():
    frozen = _frozen(_bottlenecks(groups=4), torch.randn(1, 16, 6, 6))
    assert "it has 4 groups" in _reason(frozen, "1.conv2")
    assert "joined with 0.downsample.0" in _reason(frozen, "0.conv2")
    frozen = _frozen(_basic_blocks(), torch.randn(1, 12, 6, 6))
    assert "conv_join: 0.conv2 is 3x3" in _reason(frozen, "0.conv2")
    for backend in ("aten", "auto"):
        frozen = _frozen(_bottlenecks(width=16), torch.randn(1, 16, 6, 6), backend)
        assert _reason(frozen, "1.conv2").split("; ")[-1] == f"conv_chain: {LAYER_BY_LAYER}"
    frozen = _frozen(_bottlenecks(), torch.randn(1, 16, 6, 6), "cuda")
    assert _reason(frozen, "1.conv2") == "cuda has no conv_fprop kernel"
    assert str(_frozen(nn.Sequential(nn.ReLU()).eval(), torch.randn(1, 3, 6, 6)).plan) == "no convolutions"


def test_a_backend_that_cannot_run_a_convolution_leaves_it_to_pytorch():
    model, x = _bottlenecks().double(), torch.randn(1, 16, 6, 6, dtype=torch.float64)
    frozen = _frozen(model, x, "triton")
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-12, atol=1e-12)
    assert {(row.backend, row.op) for row in frozen.plan.layers} == {("aten", "conv_fprop")}
    assert all("float64" in row.reason or "triton is not installed" in row.reason for row in frozen.plan.layers)


def test_convolutions_that_are_left_alone_are_listed_with_the_reason():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.alone = nn.Conv2d(3, 16, 3)
            self.stage = _bottlenecks(blocks=2)
            self.unused = Bottleneck(32, 8)

        def forward(self, x):
            return self.stage(self.alone(x))

    model, x = Net().eval(), torch.randn(1, 3, 8, 8)
    model.stage[1].bn2.register_forward_hook(lambda *_: None)
    frozen = _frozen(model, x)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)
    assert "not followed by a batch norm" in _reason(frozen, "alone")
    assert "hooks" in _reason(frozen, "stage.1.conv2")
    neighbours = [row.op for row in frozen.plan.layers if row.layer in ("stage.1.conv1", "stage.1.conv3")]
    assert neighbours == ["conv_fprop"] * 2
    assert "did not run it" in _reason(frozen, "unused.conv1")
    assert "5 left to the model" in str(frozen.plan)


def test_a_hook_on_a_block_keeps_the_block_and_one_on_a_stage_the_stage():
    model, x, seen = _bottlenecks(), torch.randn(1, 16, 6, 6), []
    model[1].register_forward_hook(lambda m, i, o: seen.append("block"))
    frozen = _frozen(model, x)
    seen.clear()
    frozen(x)
    assert seen == ["block"]
    assert [isinstance(m, FrozenBlock) for m in frozen.network] == [True, False, True]
    assert "hooks" in _reason(frozen, "1.conv1")

    model = _bottlenecks()
    model.register_forward_hook(lambda m, i, o: seen.append("stage"))
    frozen = _frozen(model, x)
    seen.clear()
    frozen(x)
    assert seen == ["stage"] and not isinstance(frozen.network, FrozenStage)
    assert all(module.chain is None or module.chain.head is None for module in frozen.network)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"stride_in_1x1": True}, {"groups": 2}, {"base_width": 128}])
def test_every_kind_of_bottleneck(options):
    _check(_bottlenecks(**options), torch.randn(2, 16, 9, 8))


def test_a_projection_of_stride_one_and_blocks_between_other_modules(ops_run):
    stage = _bottlenecks(stride=1)
    model = nn.Sequential(nn.Identity(), stage[0], stage[1], nn.MaxPool2d(2), stage[2]).eval()
    x = torch.randn(2, 16, 8, 8)
    frozen = _check(model, x)
    assert frozen.network[2].chain.head is None  # the pool stands between
    assert "conv_join" in ops_run and "conv_chain" in ops_run


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_a_block_that_a_stage_runs_twice_and_an_input_that_stays_as_it_is(backend):
    """Between its two runs a block's result goes to itself, not to the block whose head its chain makes."""
    _, block, last = _bottlenecks()
    model, x = nn.Sequential(block, block, last).eval(), torch.randn(2, 32, 6, 6)
    kept = x.clone()
    frozen = _check(model, x, backend)
    assert torch.equal(x, kept)
    if backend == "reference":
        assert frozen.network[0].chain.head is frozen.network[2].head


def test_a_join_whose_folded_weight_would_overflow_is_none():
    model = _bottlenecks()
    model[0].bn3.weight.data.fill_(3e4)
    model[0].conv3.weight.data.mul_(30)
    model[0].bn3.running_var.fill_(0.01)
    frozen = _frozen(model.half(), torch.randn(1, 16, 6, 6).half())
    assert "not finite in torch.float16" in _reason(frozen, "0.conv3")
    assert frozen.network[0].join is None and frozen.network[0].chain is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_come_out_where_the_model_has_them(value):
    model, x = _bottlenecks(stride=1), torch.randn(2, 16, 9, 9)
    frozen = _frozen(model, x)
    x[1, 3, 0, 0] = value
    with torch.no_grad():
        expected = model(x)
    actual = frozen(x)
    assert torch.equal(actual.isnan(), expected.isnan()) and actual.isnan().any()
    assert torch.equal(actual.isinf(), expected.isinf())
    assert actual[0].isfinite().all()


def test_other_sizes_copies_and_a_later_use_backend(ops_run):
    model, x = _bottlenecks(), torch.randn(2, 16, 6, 6)
    frozen = _frozen(model, x)
    other = torch.randn(3, 16, 11, 5)
    with torch.no_grad():
        assert_no_worse(frozen(other), nn.Module.__call__, (model, other))
    expected = frozen(x)
    assert torch.equal(copy.deepcopy(frozen)(x), expected)
    assert copy.deepcopy(frozen).plan == frozen.plan
    ops_run.clear()
    with use_backend("aten"):
        assert torch.equal(frozen(x), expected)
    assert "conv_chain" in ops_run


@pytest.mark.parametrize("refused", ["conv_fprop", "conv_chain", "conv_join"])
def test_operands_that_a_backend_refuses_at_run_time_take_pytorchs_convolution(refused, monkeypatch, ops_run):
    """A limit on the size of an image shows only when such an image comes."""
    model, x = _bottlenecks(), torch.randn(2, 16, 6, 6)
    frozen = _frozen(model, x)
    original = Kernel.refusal

    def refusal(self, args):
        return "too large" if self.op == refused and args.x.shape[0] > 2 else original(self, args)

    monkeypatch.setattr(Kernel, "refusal", refusal)
    large = torch.randn(3, 16, 6, 6)
    ops_run.clear()
    with torch.no_grad():
        assert_no_worse(frozen(large), nn.Module.__call__, (model, large))
    assert ops_run and refused not in ops_run
    frozen(x)
    assert refused in ops_run


def test_bad_input_raises_what_pytorch_raises():
    frozen = _frozen(_bottlenecks(), torch.randn(2, 16, 6, 6))
    with pytest.raises(RuntimeError, match="to have 16 channels, but got 8"):
        frozen(torch.randn(2, 8, 6, 6))
    with pytest.raises(RuntimeError, match="same|type"):
        frozen(torch.randn(2, 16, 6, 6).half())


def test_scales_stay_in_fp32_where_the_op_takes_them():
    """Folded into a bf16 weight, the scale would cost a rounding."""
    conv, bn = nn.Conv2d(16, 16, 3, padding=1, bias=True), nn.BatchNorm2d(16)
    model = _statistics(nn.Sequential(nn.Sequential(conv, bn, nn.ReLU()))).bfloat16()
    x = torch.randn(1, 16, 5, 5).bfloat16()
    frozen = _frozen(model, x)
    (unit,) = (m for m in frozen.modules() if isinstance(m, EpilogueConv))
    assert unit.scale.dtype == unit.shift.dtype == torch.float32
    assert torch.equal(unit.weight, conv.weight)
    expected = reference.conv_fprop(x, conv.weight, unit.scale, unit.shift, None, [1, 1], [1, 1], [1, 1], 1, "relu")
    assert torch.equal(frozen(x), expected)


def test_each_convolution_asks_the_plan_and_the_tail_may_run_elsewhere(monkeypatch, ops_run):
    """A chain is chosen as such: its convolutions need not be fastest on its backend one by one."""
    monkeypatch.setattr(dispatch, "default_backend", lambda op, device: "reference" if op == "conv_chain" else "aten")
    monkeypatch.setattr(cpu, "refusal", lambda *args: "")
    model, x = _bottlenecks(), torch.randn(2, 16, 6, 6)
    frozen = _check(model, x, "auto")
    rows = [(row.backend, row.op) for row in frozen.plan.layers]
    assert rows == [("aten", "conv_fprop")] + [("reference", "conv_chain")] * 2 + [("aten", "conv_fprop")] + (
        [("reference", "conv_chain")] * 6
    )
    ops_run.clear()
    frozen(x)
    assert ops_run == ["conv_chain"] * 3


def test_on_a_gpu_the_measured_tables_are_asked_about_each_problem(monkeypatch):
    asked = []

    def choose(problem, arch):
        asked.append((problem, arch))
        return dispatch.Choice("triton")

    monkeypatch.setattr(dispatch, "choose", choose)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        x = torch.empty(2, 16, 9, 7, dtype=torch.bfloat16, device="cuda")
    conv, bn = nn.Conv2d(16, 24, 3, 2, 1, dilation=2, groups=4), nn.BatchNorm2d(24)
    source = Source("conv", conv, bn, True, None, Example(x, x, None, None))
    assert source.backend() == "triton"
    shape = ConvShape(2, 16, 9, 7, 24, 3, 3, (2, 2), (1, 1), (2, 2), 4)
    assert asked == [(dispatch.Problem("conv_fprop", shape, torch.bfloat16), 90)]
    with use_backend("aten"):
        assert source.backend() == "aten" and len(asked) == 1
