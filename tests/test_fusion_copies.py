"""Copies, pickles, compilers, tracers and threads get along with a fused model."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections import OrderedDict

import pytest
import torch
import torch._dynamo.testing
from agreement import assert_same
from small_net import ALL_FUSED, Net, picture
from torch import nn

from resnet_fused.fusion import BlockPlan, SequencePlan, fuse, plan_of, report, swap, unfuse

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def fused(plain):
    return fuse(copy.deepcopy(plain))


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
    assert isinstance(plan_of(shallow), SequencePlan) and isinstance(plan_of(fused.layer[1]), BlockPlan)


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
