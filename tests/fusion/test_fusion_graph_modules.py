"""`torch.fx.GraphModule`s are fused as any module is, and follow their graphs; fused models can be traced."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_freezes, assert_one_graph, assert_same, through_pickle, through_torch_save
from small_net import Bottleneck, Net, picture
from tiers import larger
from torch import fx, nn

from resnet_fused import freeze
from resnet_fused.fusion import BlockPlan, SequencePlan, fuse, plan_of, report, swap, unfuse

torchvision = pytest.importorskip("torchvision")

from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

UNITS = [
    "conv1-bn1-relu",
    "layer.0.conv1-layer.0.bn1-relu",
    "layer.0.conv2-layer.0.bn2-relu",
    "layer.0.conv3-layer.0.bn3-add-relu",
    "layer.0.downsample.0-layer.0.downsample.1",
    "layer.1.conv1-layer.1.bn1-relu",
    "layer.1.conv2-layer.1.bn2-relu",
    "layer.1.conv3-layer.1.bn3-add-relu",
]


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return fx.symbolic_trace(Net().double())


def extractor(model):
    return create_feature_extractor(model, {"layer.0": "early", "layer.1": "late"})


def units(model):
    return [str(unit) for unit in plan_of(model).all_units]


def test_a_whole_network_is_units_with_its_sums(plain):
    fused = fuse(copy.deepcopy(plain))
    assert isinstance(plan_of(fused), SequencePlan) and units(fused) == UNITS
    assert [name for name, _ in report(fused).fused] == [""] and report(fused).skipped == []
    assert fused.code == plain.code and str(fused.graph) == str(plain.graph) and fused.code in str(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_same(plain, fused, picture())


def test_a_traced_block_is_a_block():
    plain = fx.symbolic_trace(Bottleneck(16, 4).double())
    fused = fuse(copy.deepcopy(plain))
    assert isinstance(plan_of(fused), BlockPlan)
    assert_same(plain, fused, torch.randn(2, 16, 6, 6, dtype=torch.float64))


def test_unfuse_gives_the_class_back(plain):
    cls = type(plain)
    assert type(unfuse(fuse(plain))) is cls
    assert type(fuse(fuse(plain)))._original is cls


def test_nobody_keeps_the_class_of_a_graph_module_alive():
    def fused_class():
        return weakref.ref(type(fuse(fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))))))

    ref = fused_class()
    gc.collect()
    assert ref() is None


def gelu_for_relu(model):
    for node in list(model.graph.nodes):
        if node.op == "call_module" and node.target == "relu":
            with model.graph.inserting_after(node):
                other = model.graph.call_function(F.gelu, node.args)
            node.replace_all_uses_with(other)
            model.graph.erase_node(node)


@pytest.mark.parametrize("recompile", [lambda m: m.recompile(), lambda m: setattr(m, "graph", m.graph)])
def test_a_changed_graph_is_recognised_anew(plain, recompile):
    fused = fuse(copy.deepcopy(plain))
    x = picture()
    fused.eval()(x), plain.eval()(x)
    for model in (plain, fused):
        gelu_for_relu(model)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-9)  # not recompiled: what runs is what ran
    for model in (plain, fused):
        recompile(model)
    assert units(fused)[0] == "conv1-bn1" and "gelu" in fused.code
    assert_same(plain, fused, x)


def test_a_replaced_child_is_recognised_anew(plain):
    fused = fuse(copy.deepcopy(plain))
    for model in (plain, fused):
        model.layer.get_submodule("0").bn1 = nn.Identity()
    assert units(fused) == [unit for unit in UNITS if "0.bn1" not in unit]
    assert_same(plain, fused, picture())


COPIES = [copy.deepcopy, copy.copy, through_pickle, through_torch_save]


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "copy", "pickle", "torch.save"])
@pytest.mark.parametrize("ran", [True, False])
def test_copies_are_fused(plain, duplicate, ran):
    fused = fuse(copy.deepcopy(plain))
    if ran:
        fused.eval()(picture())
    twin = duplicate(fused)
    assert units(twin) == UNITS and units(fused) == UNITS
    assert "_fusion" not in vars(duplicate(fused)) and "_fusion" not in vars(duplicate(unfuse(copy.deepcopy(fused))))
    assert type(twin)._original is not type(fused)._original
    assert_same(duplicate(plain), duplicate(fused), picture())


@pytest.mark.parametrize("training", [True, larger(False)])
def test_compiles_in_one_graph(plain, training):
    fused = fuse(copy.deepcopy(plain)).train(training)
    x = picture()
    assert_one_graph(plain.train(training), fused, x)
    inside = nn.Sequential(fused)
    assert_same(nn.Sequential(plain), copy.deepcopy(inside), x, steps=1)


def test_freeze_folds_it(plain):
    frozen = assert_freezes(plain, picture(), ["conv_fprop"] * 8)
    assert {name for name, _ in frozen.network.named_parameters()} == {"fc.weight", "fc.bias"}


def test_freeze_looks_for_training_where_it_matters():
    model, x = fx.symbolic_trace(Net().double().eval()), picture()  # what only holds modules is left in training mode
    assert model.layer.training and not model.conv1.training
    with torch.no_grad():
        torch.testing.assert_close(freeze(model, x)(x), model(x), rtol=1e-10, atol=1e-10)
    model.bn1.train()
    with pytest.raises(RuntimeError, match="training mode"):
        freeze(model, x)


@pytest.mark.parametrize("first", [lambda m: m, fuse], ids=["plain", "fused"])
def test_feature_extractors_switch_graphs_with_the_mode(first):
    torch.manual_seed(0)
    plain = extractor(Net().double())
    fused = fuse(extractor(first(copy.deepcopy(unfuse(Net().double())))))
    fused.load_state_dict(plain.state_dict())
    assert units(fused) == UNITS and report(fused).skipped == []
    assert_same(plain, fused, picture())
    assert_same(plain, copy.deepcopy(fused), picture(), steps=1)
    assert "layer_1" in fused.code


class Switches(Net):
    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.layer(x) if self.training else self.layer(x).mean((2, 3))


def test_a_feature_extractor_of_other_graphs():
    plain = create_feature_extractor(
        Switches().double(), train_return_nodes={"layer.1": "y"}, eval_return_nodes={"mean": "y"}
    )
    fused = fuse(copy.deepcopy(plain))
    assert_same(plain, fused, picture())
    assert fused.eval()(picture())["y"].dim() == 2 and fused.train()(picture())["y"].dim() == 4


def test_a_frozen_feature_extractor():
    assert_freezes(extractor(Net().double()), picture(), ["conv_fprop"] * 8)


class Concatenates(nn.Module):
    """Takes a list, as the layers of a DenseNet do."""

    def __init__(self):
        super().__init__()
        self.norm, self.relu, self.conv = nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1)

    def forward(self, xs):
        return self.conv(self.relu(self.norm(torch.cat(xs, 1))))


class AsksForList(Concatenates):
    def forward(self, xs):
        return super().forward([xs] if isinstance(xs, torch.Tensor) else xs)


class Dense(nn.Module):
    def __init__(self, layer, wrap):
        super().__init__()
        self.layer, self.wrap = layer(), wrap

    def forward(self, x):
        return self.layer(self.wrap(x))


@pytest.mark.parametrize("layer", [Concatenates, AsksForList])
@pytest.mark.parametrize("wrap", [lambda x: [x, x + 1], lambda x: (x, x + 1)])
def test_a_tracer_sees_the_plain_forward_of_what_takes_lists(layer, wrap):
    plain = Dense(layer, wrap).double()
    fused = fuse(copy.deepcopy(plain))
    assert swap.is_fused(fused.layer)
    assert_same(plain, fused, picture(), steps=1)
    graphs = [str(fx.symbolic_trace(model).graph) for model in (fused, plain)]
    assert graphs[0] == graphs[1]


class NestedLists(Concatenates):
    def forward(self, xs):
        return super().forward([*xs[0], xs[1]])


def test_a_tracer_sees_the_plain_forward_of_nested_lists():
    plain = Dense(NestedLists, lambda x: [[x], x + 1]).double()
    fused = fuse(copy.deepcopy(plain))
    assert_same(plain, fused, picture(), steps=1)
    assert str(fx.symbolic_trace(fused).graph) == str(fx.symbolic_trace(plain).graph)


def test_a_fused_densenet_of_timm_is_traced():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.models.densenet.DenseNet(4, (2, 2), num_classes=5).double()
    traced = fx.symbolic_trace(fuse(copy.deepcopy(plain)))
    assert not any(map(swap.is_fused, traced.modules()))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(traced(x), plain(x), rtol=1e-9, atol=1e-9)
    function = "its forward calls batch norm as a function, which is not fused"  # torch.fx looks into timm's norms
    assert report(fuse(traced)).skipped == [("", function)]
    leaf = {"leaf_modules": [timm.layers.BatchNormAct2d]}
    traced = create_feature_extractor(fuse(copy.deepcopy(plain)), ["classifier"], tracer_kwargs=leaf)
    assert len(plan_of(fuse(traced)).all_units) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    torch.testing.assert_close(traced(x)["classifier"], plain(x), rtol=1e-9, atol=1e-9)


def test_tracing_a_fused_graph_module_after_its_inputs_changed(plain):
    fused = fuse(copy.deepcopy(plain))
    for model in (plain, fused):
        first = next(iter(model.graph.nodes))
        with model.graph.inserting_after(first):
            model.graph.placeholder("unused")
        model.recompile()
    assert str(fx.symbolic_trace(fused).graph) == str(fx.symbolic_trace(plain).graph)
    x = picture()
    torch.testing.assert_close(fused(x, None), plain(x, None), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_what_is_prepared_for_quantisation_keeps_working():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qat_qconfig_mapping

    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    plain = quantize_fx.prepare_qat_fx(Net().train(), get_default_qat_qconfig_mapping("x86"), (x,))
    fused = fuse(copy.deepcopy(plain))
    result = report(fused)
    assert result.fused == [] and result.skipped
    for _ in range(2):
        torch.testing.assert_close(fused(x), plain(x))
    converted = [quantize_fx.convert_fx(model.eval()) for model in (plain, fused)]
    torch.testing.assert_close(converted[1](x), converted[0](x))
