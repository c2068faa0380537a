"""Copies, pickles, compilers, tracers and threads get along with a fused model."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import small_net
import torch
from agreement import assert_one_graph, assert_same, through_pickle, through_torch_save
from small_net import ALL_FUSED, Bottleneck, Net, picture
from tiers import larger
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused
from resnet_fused import use_backend
from resnet_fused.fusion import BlockPlan, SequencePlan, fuse, plan_of, report, swap, unfuse

pytestmark = pytest.mark.usefixtures("one_thread")


PICKLES = [*(functools.partial(through_pickle, protocol=k) for k in range(6)), through_torch_save]


@pytest.mark.parametrize("duplicate", PICKLES, ids=[*(f"protocol {k}" for k in range(6)), "torch.save"])
def test_a_pickle_holds_the_original(plain, fused, duplicate):
    """In the middle of its life: it has run, and has been given hooks and attributes."""
    fused(picture())
    fused.layer[1].tag = "a name"
    twin = duplicate(fused)
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    assert all("_fusion" not in vars(m) for m in twin.modules()) and twin.layer[1].tag == "a name"
    assert_same(twin, fuse(copy.deepcopy(twin)), picture())


SEARCH = """
import sys, torch
sys.path[:0] = sys.argv[2:]
sys.modules["resnet_fused"] = None  # importing it raises
model = torch.load(sys.argv[1], weights_only=False)
print(type(model).__qualname__, model(torch.ones(2, 3, 16, 16, dtype=torch.float64)).sum().item())
"""


def test_a_saved_model_loads_without_this_package(fused, tmp_path):
    torch.save(fused.eval(), tmp_path / "model.pt")
    here = str(Path(small_net.__file__).parent)
    command = [sys.executable, "-c", SEARCH, str(tmp_path / "model.pt"), here]
    name, value = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    expected = fused(torch.ones(2, 3, 16, 16, dtype=torch.float64)).sum().item()
    assert name == "Net" and float(value) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy])
def test_copies_are_fused_and_recognised_when_they_run(plain, fused, duplicate, monkeypatch):
    twin = duplicate(fused)
    assert type(twin) is type(fused) and isinstance(twin, Net)
    assert "_fusion" not in vars(twin) and "fused=to be seen when it runs" in repr(twin)
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
    assert isinstance(plan_of(shallow), SequencePlan) and isinstance(plan_of(fused.layer[1]), BlockPlan)


# --- compilers and threads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, larger(False)])
def test_compiles_in_one_graph(plain, training):
    fused = fuse(plain).train(training)
    reference, x = unfuse(copy.deepcopy(fused)), picture()
    compiled = assert_one_graph(reference, fused, x)
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


# --- names, TorchScript, replicas -------------------------------------------------------------------------------------


def test_a_fused_module_goes_by_its_own_name(fused):
    block = fused.layer[0]
    assert type(block) is not Bottleneck and type(block).__name__ == "Bottleneck"
    assert (type(block).__module__, type(block).__qualname__) == (Bottleneck.__module__, Bottleneck.__qualname__)
    with FlopCounterMode(display=False) as counter:
        fused(picture())
    assert {"Net", "Net.layer.0", "Net.layer.1"} <= set(counter.get_flop_counts())
    with pytest.raises(RuntimeError, match="Error.* in loading state_dict for Net:"):
        fused.load_state_dict({})


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_torchscript_traces_the_plain_graph(plain, fused, gradients, backend):
    """With the tracer's own check, which traces once more without gradients."""
    x = picture()
    fused = copy.deepcopy(fused) if gradients else fused  # one that has yet to be recognised
    with torch.set_grad_enabled(gradients), use_backend(backend):
        traced = torch.jit.trace(fused.eval(), x)
    expected = torch.jit.trace(plain.eval(), x)
    assert [n.kind() for n in traced.inlined_graph.nodes()] == [n.kind() for n in expected.inlined_graph.nodes()]
    y = picture()
    torch.testing.assert_close(traced(y), plain(y), rtol=0, atol=0)


OURS = {
    "BasicBlock": lambda: resnet_fused.nn.BasicBlock(3, 3),
    "Stem": lambda: resnet_fused.nn.Stem(3, 4),
    "ConvBNAct2d": lambda: resnet_fused.nn.ConvBNAct2d(3, 4, 3),
    "BatchNormAct2d": lambda: resnet_fused.nn.BatchNormAct2d(3),
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_torchscript_traces_our_own_modules(name):
    module, x = OURS[name]().eval(), torch.randn(2, 3, 8, 8)
    expected = module(x)
    torch.testing.assert_close(torch.jit.trace(module, x)(x), expected, rtol=1e-5, atol=1e-6)


def test_torchscript_traces_our_own_functions():
    x, weight, vector = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3), torch.ones(4)

    def function(x):
        return resnet_fused.functional.conv_bn_act(x, weight, 0 * vector, vector, vector, vector)

    torch.testing.assert_close(torch.jit.trace(function, x)(x), function(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated")
def test_scripting_names_the_way_out(fused):
    for model in (fused, nn.Sequential(nn.ReLU(), fused)):
        with pytest.raises(RuntimeError, match=r"cannot compile a Net .*call resnet_fused.unfuse\(model\) first"):
            torch.jit.script(model)
        assert any(map(swap.is_fused, model.modules()))
    torch.jit.script(unfuse(fused.layer[1]))
    for name, make in OURS.items():
        with pytest.raises(RuntimeError, match=f"cannot compile a {name} .*torch.jit.trace and torch.export take it"):
            torch.jit.script(nn.Sequential(make()))


def replicas(model):
    """What `nn.parallel.replicate` makes, on one device."""
    modules = list(model.modules())
    made = {id(m): m._replicate_for_data_parallel() for m in modules}
    for module in modules:
        replica = made[id(module)]
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else made[id(child)])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else (1 * parameter))
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer)
    return made[id(model)]


def test_replicas_run_their_own_parameters_and_are_not_recognised_anew(plain, fused, monkeypatch):
    """A replica of nn.DataParallel has the attributes of its original, and other children."""
    monkeypatch.setattr(swap, "recognise", lambda module: pytest.fail("recognised again"))
    x = picture()
    outputs, used = [], []
    for model in (plain, fused):
        replica = replicas(model)
        replica.layer[1].conv2.weight = nn.Parameter(2 * replica.layer[1].conv2.weight.detach())
        outputs.append(replica(x))
        used.append(replica)
        outputs[-1].sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused.conv1.weight.grad, plain.conv1.weight.grad, rtol=1e-9, atol=1e-9)
    assert isinstance(plan_of(used[1].layer[0]), BlockPlan)
    assert vars(used[1].layer[0])["_fusion"].units[0][0] is used[1].layer[0].conv1


def test_replicas_of_a_changed_model_are_recognised_anew(plain, fused):
    for model in (plain, fused):
        model.layer[1].scale = 0.5
    x = picture()
    torch.testing.assert_close(replicas(fused)(x), replicas(plain)(x), rtol=1e-9, atol=1e-9)
