"""fuse and unfuse change classes and nothing else; every change is noticed; copies, hooks and compilers work."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections import OrderedDict

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from agreement import assert_same
from torch import nn

from resnet_fused import nn as fused_nn
from resnet_fused.fusion import BlockPlan, SequencePlan, fuse, plan_of, report, swap, unfuse


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Bottleneck(nn.Module):
    """A bottleneck in torchvision's terms, with timm's places for more."""

    def __init__(self, inplanes=8, planes=4, stride=1):
        super().__init__()
        out = 4 * planes
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        self.drop_path = None
        self.scale = 1.0
        if stride != 1 or inplanes != out:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.drop_path is not None:
            out = self.drop_path(out)
        if self.scale != 1.0:
            out = out * self.scale
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.layer = nn.Sequential(Bottleneck(8, 4, 2), Bottleneck(16, 4))
        self.fc = nn.Linear(16, 5)
        self.grad_checkpointing = False

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        if self.grad_checkpointing:
            x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)
        else:
            x = self.layer(x)
        return self.fc(x.mean((2, 3)))


def picture():
    return torch.randn(2, 3, 16, 16, dtype=torch.float64)


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def fused(plain):
    return fuse(copy.deepcopy(plain))


ALL_FUSED = [
    ("", "conv1-bn1-relu"),
    (
        "layer.0",
        "Bottleneck: conv1-bn1-relu, conv2-bn2-relu, conv3-bn3-relu; shortcut downsample.0-downsample.1",
    ),
    ("layer.1", "Bottleneck: conv1-bn1-relu, conv2-bn2-relu, conv3-bn3-relu"),
]


# --- the swap ---------------------------------------------------------------------------------------------------------


def test_only_classes_change(plain):
    reference = copy.deepcopy(plain)
    objects = {name: (id(module), id(vars(module)["_parameters"])) for name, module in plain.named_modules()}
    parameters = {name: id(p) for name, p in plain.named_parameters()}
    buffers = {name: id(b) for name, b in plain.named_buffers()}
    state = plain.state_dict()
    classes = [type(module) for module in plain.modules()]
    attributes = [set(vars(module)) for module in plain.modules()]

    model = fuse(plain)

    assert model is plain
    assert {name: (id(module), id(vars(module)["_parameters"])) for name, module in model.named_modules()} == objects
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: id(b) for name, b in model.named_buffers()} == buffers
    assert list(model.state_dict()) == list(state) and model.state_dict()._metadata == state._metadata
    assert isinstance(model, Net) and isinstance(model.layer[0], Bottleneck)
    assert type(model).__name__ == "FusedNet" and type(model.layer[0]).__name__ == "FusedBottleneck"
    assert type(model.layer[0]) is type(model.layer[1])
    assert type(model.layer) is nn.Sequential and type(model.layer[0].downsample) is nn.Sequential
    assert report(model).fused == ALL_FUSED and report(model).skipped == []
    assert_same(reference, model, picture())

    assert unfuse(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert_same(reference, model, picture())


def test_fuse_and_unfuse_are_idempotent(fused):
    classes = [type(module) for module in fused.modules()]
    plan = plan_of(fused.layer[0])
    assert [type(module) for module in fuse(fused).modules()] == classes
    assert plan_of(fused.layer[0]) == plan
    unfuse(unfuse(fused))
    assert not any(swap.is_fused(module) for module in fused.modules())


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_kept(training):
    model = Net().train(training)
    model.bn1.train(not training)
    fuse(model)
    assert model.training is training and model.bn1.training is not training


def test_frozen_batch_norm_inside_a_training_block(plain, fused):
    for model in (plain, fused):
        model.train()
        model.layer[0].bn2.eval()
    x = picture()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(fused.layer[0].bn2.running_mean, plain.layer[0].bn2.running_mean)


@pytest.mark.parametrize("function", [fuse, unfuse, report])
@pytest.mark.parametrize("value", ["resnet50", None, torch.ones(1), nn.Module])
def test_what_is_not_a_module_is_a_type_error(function, value):
    with pytest.raises(
        TypeError,
        match=rf"{function.__name__}\(\): argument 'model'.*must be torch.nn.Module, not {type(value).__name__}",
    ):
        function(value)


def test_repr_and_report_read_well(fused):
    text = repr(fused.layer[1])
    assert text.startswith(
        "FusedBottleneck(\n  fused=Bottleneck: conv1-bn1-relu, conv2-bn2-relu, conv3-bn3-relu\n  (conv1): Conv2d("
    )
    fused.layer[1].scale = 0.5
    lines = str(report(fused)).splitlines()
    assert lines[0].split() == ["module", "what,", "or", "why", "not"]
    assert lines[2] == "(model)  fused       conv1-bn1-relu"
    assert lines[-2] == "layer.1  left alone  a multiplication by 0.5 between `bn3` and the sum"
    assert lines[-1] == "2 fused, 1 left alone"


def test_report_of_a_model_that_was_not_fused(plain):
    result = report(plain)
    assert result.fused == []
    assert result.skipped[0] == ("", "not fused; fuse(model) would run conv1-bn1-relu")
    assert report(nn.Linear(2, 2)).skipped == [("", "none of its modules runs an nn.BatchNorm2d itself")]


def test_own_blocks_are_fused_already():
    model = nn.Sequential(fused_nn.BasicBlock(4, 4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    classes = [type(module) for module in model[0].modules()]
    result = report(fuse(model))
    assert result.fused == [("0", "resnet_fused.nn.BasicBlock"), ("1", "0-1")]
    assert [type(module) for module in model[0].modules()] == classes


def test_generated_forwards_are_left_alone():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    assert report(fuse(traced)).skipped == [
        ("", "its forward is that of torch.fx.graph_module, which is not looked into")
    ]
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    assert report(fuse(scripted)).fused == []


class Registry(nn.Module):
    """A base class that keeps a register of its subclasses."""

    names: list[str] = []

    def __init_subclass__(cls, *, tag, **kwargs):
        super().__init_subclass__(**kwargs)
        Registry.names.append(cls.__name__)


class Registered(Registry, tag="x"):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


def test_registries_of_subclasses_see_nothing():
    assert report(fuse(Registered())).fused == [("", "conv-bn")]
    assert Registry.names == ["Registered"]


# --- changes after fuse -----------------------------------------------------------------------------------------------


def set_scale(model):
    model.layer[1].scale = 0.25


def set_drop_path(model):
    model.layer[0].drop_path = nn.Sequential(nn.SiLU())


def delete_and_set(model):
    del model.layer[0].drop_path
    model.layer[0].drop_path = nn.SiLU()


def remove_downsample(model):
    model.layer[0].downsample = nn.AvgPool2d(2)
    model.layer[0].conv3 = nn.Conv2d(4, 8, 1).double()
    model.layer[0].bn3 = nn.BatchNorm2d(8).double()
    model.layer[1] = nn.Conv2d(8, 16, 1).double()


def replace_inside_downsample(model):
    model.layer[0].downsample[1] = nn.Sequential(nn.BatchNorm2d(16), nn.Tanh()).double()


def append_to_downsample(model):
    model.layer[0].downsample.append(nn.Tanh())


def replace_batch_norm(model):
    model.layer[1]._modules["bn2"] = nn.BatchNorm2d(4, eps=0.5).double()


def replace_relu(model):
    model.layer[1].relu = nn.SiLU()


def replace_head(model):
    model.fc = nn.Linear(16, 3).double()


def override_forward(model):
    model.layer[1].forward = lambda x: x * 2


def override_forward_of_downsample(model):
    model.layer[0].downsample.forward = lambda x: F.conv2d(x, torch.ones(16, 8, 1, 1, dtype=x.dtype), stride=2)


def checkpointing(model):
    model.grad_checkpointing = True


def register_scale(model):
    del model.layer[1].scale
    model.layer[1].register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))


def set_attributes_of_children(model):
    model.layer[0].bn1.momentum = 0.9
    model.layer[0].bn2.eps = 0.3
    model.layer[1].conv2.padding, model.layer[1].conv2.dilation = (2, 2), (2, 2)


CHANGES = [
    (set_scale, "layer.1", "a multiplication by 0.25 between `bn3` and the sum"),
    (set_drop_path, "layer.0", "`drop_path.0` (SiLU) between `bn3` and the sum"),
    (delete_and_set, "layer.0", "`drop_path` (SiLU) between `bn3` and the sum"),
    (remove_downsample, "layer.0", "`downsample` (AvgPool2d) between the input and the sum"),
    (replace_inside_downsample, "layer.0", "`downsample.1.1` (Tanh) between `downsample.1.0` and the sum"),
    (append_to_downsample, "layer.0", "`downsample.2` (Tanh) between `downsample.1` and the sum"),
    (replace_batch_norm, None, None),
    (replace_relu, "layer.1", "`relu` (SiLU) follows the sum"),
    (replace_head, None, None),
    (override_forward, "layer.1", "its forward is overridden on the instance"),
    (override_forward_of_downsample, "layer.0", "`downsample` (Sequential) between the input and the sum"),
    (checkpointing, "", "its forward"),
    (register_scale, "layer.1", "its forward cannot be traced"),
    (set_attributes_of_children, None, None),
]


@pytest.mark.parametrize(("change", "name", "reason"), CHANGES, ids=[change.__name__ for change, _, _ in CHANGES])
@pytest.mark.parametrize("before", ["fresh", "after a call"])
def test_changes_are_noticed(plain, fused, change, name, reason, before):
    if before == "after a call":
        for model in (plain, fused):
            model(torch.ones(2, 3, 16, 16, dtype=torch.float64))
    for model in (plain, fused):
        torch.manual_seed(1)
        change(model)
    assert_same(plain, fused, picture())
    skipped = dict(report(fused).skipped)
    if name is None:
        assert skipped == {}
    else:
        assert reason in skipped[name]
        assert plan_of(fused.get_submodule(name)) is None
        fuse(fused)
        assert not swap.is_fused(fused.get_submodule(name))
        assert_same(plain, fused, picture())


def test_a_change_that_is_taken_back_is_fused_again(plain, fused):
    fused.layer[1].scale = 2.0
    assert plan_of(fused.layer[1]) is None
    fused.layer[1].scale = 1.0
    assert isinstance(plan_of(fused.layer[1]), BlockPlan)
    assert_same(plain, fused, picture())


def test_sync_batch_norm_conversion_is_noticed(plain, fused):
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert isinstance(plan_of(converted.layer[1]), BlockPlan)
    assert type(swap.current(converted.layer[1]).units[0][1]) is nn.SyncBatchNorm
    assert_same(plain, converted, picture())  # in one process a SyncBatchNorm is a batch norm


def test_what_the_forward_does_not_read_asks_for_no_new_recognition(fused, monkeypatch):
    monkeypatch.setattr(swap, "recognise", lambda module: pytest.fail("recognised again"))
    fused.tag = fused.layer[0].tag = "a name"
    fused.layer[0].register_buffer("unused", torch.ones(1))
    fused.layer[1].add = nn.Identity
    fused.bn1.momentum = 0.2
    fused.train().eval().float().double().to(memory_format=torch.channels_last).requires_grad_(False)
    fused.load_state_dict(fused.state_dict())
    fused(picture())


# --- hooks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["conv1", "bn1", "layer.0", "layer.0.conv2", "layer.0.bn2", "layer.1.relu", "layer.0.downsample"]
)
def test_hooks_fire_as_in_the_plain_model(plain, fused, path):
    logs = []
    for model in (plain, fused):
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # full backward hooks refuse in-place changes, in the plain model, too
        log: list[torch.Tensor] = []
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda m, args, log=log: log.extend(a.detach().clone() for a in args))
        module.register_forward_hook(lambda m, args, y, log=log: log.append(y.detach().clone()))
        module.register_full_backward_hook(
            lambda m, dx, dy, log=log: log.extend(g.clone() for g in dy if g is not None)
        )
        logs.append(log)
    assert_same(plain, fused, picture())
    assert len(logs[0]) == len(logs[1]) > 0
    for expected, actual in zip(*logs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_global_hooks_see_every_module(plain, fused):
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m)))
    try:
        fused(picture())
        count = len(seen)
        plain(picture())
    finally:
        handle.remove()
    assert count == len(seen) - count


# --- copies -----------------------------------------------------------------------------------------------------------


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [
    copy.deepcopy,
    copy.copy,
    lambda m: pickle.loads(pickle.dumps(m)),
    lambda m: pickle.loads(pickle.dumps(m, 0)),
    through_torch_save,
]


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "copy", "pickle", "pickle0", "torch.save"])
def test_copies_are_fused_and_recognised_when_they_run(plain, fused, duplicate, monkeypatch):
    twin = duplicate(fused)
    assert type(twin) is type(fused) and isinstance(twin, Net)
    assert "_fusion" not in vars(twin)
    twin(picture().requires_grad_())
    assert isinstance(vars(twin)["_fusion"].plan, SequencePlan)
    fresh = duplicate(fuse(copy.deepcopy(plain)))
    assert report(fresh).fused == ALL_FUSED
    assert_same(plain, fresh, picture())
    assert type(unfuse(fresh)) is Net


def test_a_copy_is_independent(plain, fused):
    twin = copy.deepcopy(fused)
    twin.layer[1].scale = 0.5
    assert report(fused).skipped == [] and len(report(twin).skipped) == 1
    assert_same(plain, fused, picture())
    shallow = copy.copy(fused.layer[1])
    shallow.scale = 0.5
    assert plan_of(shallow) is None and plan_of(fused.layer[1]) is not None


def test_state_dict_goes_both_ways(plain, fused):
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    Net().load_state_dict(torch.load(file, weights_only=True))
    fused.load_state_dict(OrderedDict(plain.state_dict()), assign=True)
    x = picture()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)


# --- compilers and threads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(plain, training):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    fused = fuse(plain).train(training)
    reference = unfuse(copy.deepcopy(fused))
    compiled = torch.compile(fused, backend=counter, fullgraph=True)
    x = picture()
    for _ in range(2):
        torch.testing.assert_close(compiled(x), reference(x), rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1
    for model in (fused, reference):
        model.layer[0].downsample[1] = nn.BatchNorm2d(16, eps=0.5).double().train(training)
    torch.testing.assert_close(compiled(x), reference(x), rtol=1e-9, atol=1e-9)
    for model in (fused, reference):
        model.layer[1].scale = 0.5
    torch.testing.assert_close(compiled(x), reference(x), rtol=1e-9, atol=1e-9)


def test_compiling_in_place_keeps_the_fusion(fused, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(swap, "recognise", lambda module: pytest.fail("recognised again"))
    reference = unfuse(copy.deepcopy(fused))
    fused.compile(backend="eager", fullgraph=True)
    x = picture()
    torch.testing.assert_close(fused(x), reference(x), rtol=1e-9, atol=1e-9)


def test_a_copy_that_never_ran_compiles(plain):
    torch._dynamo.reset()
    twin = copy.deepcopy(fuse(plain))
    x = picture()
    expected = unfuse(copy.deepcopy(plain))(x)
    torch.testing.assert_close(torch.compile(twin, backend="eager", fullgraph=True)(x), expected, rtol=1e-9, atol=1e-9)


def test_symbolic_tracing_of_a_fused_model_gives_the_plain_graph(plain, fused):
    tracer = torch.fx.Tracer()
    targets = [str(node.target) for node in tracer.trace(fused).nodes]
    assert targets == [str(node.target) for node in torch.fx.Tracer().trace(plain).nodes]


def test_recognition_does_not_disturb_other_threads(fused):
    """Copies are recognised on their first call, whatever other threads run meanwhile."""
    models = [copy.deepcopy(fused).eval() for _ in range(4)]
    x = picture()
    expected = unfuse(copy.deepcopy(fused)).eval()(x)
    barrier, results, errors = threading.Barrier(len(models)), [], []

    def run(model):
        try:
            barrier.wait()
            for _ in range(5):
                model.layer[0].scale = 1.0
                results.append(model(x))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(results) == 20
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    assert all(report(model).fused == ALL_FUSED for model in models)
