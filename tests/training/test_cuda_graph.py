"""`graphed`: the same training, step by step. On a CPU a stand-in for a CUDA graph runs the step again to replay it."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused
from resnet_fused.models import cifar_resnet
from resnet_fused.training import cuda_graph as module

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


class Recorder:
    """What a CUDA graph does, on the CPU: recording computes nothing, a replay writes where the recording wrote."""

    def __init__(self):
        self.recorded = self.replayed = 0
        self.problem = None

    def record(self, call, stream, pool):
        self.pool = pool
        if self.problem is not None:
            raise self.problem
        self.recorded += 1
        model = self.model
        before = copy.deepcopy(model.state_dict())
        random = torch.get_rng_state()
        outputs = call()
        torch.set_rng_state(random)
        static = [p.grad for p in model.parameters()]
        model.load_state_dict(before)

        def replay():
            self.replayed += 1
            kept = [p.grad for p in model.parameters()]
            for p in model.parameters():
                p.grad = None
            outputs.data.copy_(call().detach())
            for p, memory, grad in zip(model.parameters(), static, kept, strict=True):
                if memory is not None:
                    memory.copy_(p.grad)
                p.grad = grad

        return replay, outputs


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    if not ON_GPU:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(module, "record", made.record)
        monkeypatch.setattr(module, "_on_gpu", lambda t: t.device.type == "cpu")
        monkeypatch.setattr(module._Graphed, "_side_stream", lambda self: contextlib.nullcontext())
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    return made


def network(fused):
    torch.manual_seed(0)
    model = cifar_resnet(8).to(DEVICE)
    return resnet_fused.fuse(model) if fused else model


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 3, 8, 8, generator=generator).to(DEVICE),
            torch.randint(10, (n,), generator=generator).to(DEVICE),
        )
        for n in sizes
    ]


def train(model, wrap, data, *, zero="none", every=1, scaler=None, change=None):
    """The losses of an epoch; the optimizer steps behind every `every` batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(images, labels):
        loss = F.cross_entropy(model(images), labels)
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    step = wrap(step, model)
    losses = []
    for i, (images, labels) in enumerate(data):
        if change is not None:
            change(i, model)
        losses.append(step(images, labels).detach())
        if (i + 1) % every == 0:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=zero == "none")
    return torch.stack(losses)


def assert_same(one, other, losses, expected):
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def same_training(recorder, data, *, fused=True, **options):
    plain, ours = network(fused), network(fused)
    recorder.model = ours
    expected = train(plain, lambda step, model: step, data, **copy.deepcopy(options))
    assert_same(ours, plain, train(ours, resnet_fused.graphed, data, **options), expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("zero", ["none", "zeros"])
@pytest.mark.parametrize("every", [1, 2])
def test_the_same_training(recorder, fused, zero, every):
    same_training(recorder, batches(*[4] * 8), fused=fused, zero=zero, every=every)
    assert ON_GPU or (recorder.recorded, recorder.replayed) == (1, 8 - module.WARM_UP)


def test_a_gradient_scaler(recorder):
    same_training(recorder, batches(*[4] * 6), scaler=torch.amp.GradScaler(DEVICE, init_scale=8.0, growth_interval=2))
    assert ON_GPU or (recorder.recorded, recorder.replayed) == (1, 6 - module.WARM_UP)


def test_a_last_batch_runs_as_it_is_written(recorder):
    same_training(recorder, batches(4, 4, 4, 4, 4, 3, 4, 4, 3))
    assert ON_GPU or (recorder.recorded, recorder.replayed) == (1, 4)


def test_what_a_step_depends_on_makes_another_graph(recorder):
    def change(i, model):
        if i == 5:
            model.conv1.weight.requires_grad_(False)
            model.conv1.weight.grad = None
        if i == 10:
            model.bn1.eval()

    same_training(recorder, batches(*[4] * 15), change=change)
    assert ON_GPU or recorder.recorded == 3


def test_no_more_graphs_than_there_is_memory_for(recorder, monkeypatch):
    monkeypatch.setattr(module, "MAX_GRAPHS", 1)
    same_training(recorder, batches(*[4] * 5, *[3] * 5))
    assert ON_GPU or recorder.recorded == 1


@pytest.mark.skipif(ON_GPU, reason="the stand-in fails to order")
def test_what_cannot_be_captured_is_said_once_and_runs(recorder):
    recorder.problem = RuntimeError("operation not permitted when stream is capturing\nlong story")
    with pytest.warns(UserWarning, match="graphed: no CUDA graph, .*: operation not permitted") as said:
        same_training(recorder, batches(*[4] * 8))
    assert len([w for w in said if "graphed" in str(w.message)]) == 1 and "long story" not in str(said[0].message)


def test_an_input_that_requires_a_gradient_gets_it(recorder):
    model = network(True)
    recorder.model = model
    step = resnet_fused.graphed(lambda x: model(x).sum().backward(), model)
    with pytest.warns(UserWarning, match="an input requires a gradient"):
        for _ in range(6):
            x = torch.randn(2, 3, 8, 8, device=DEVICE, requires_grad=True)
            step(x)
            assert x.grad is not None


def test_results_are_copies(recorder):
    model = network(True)
    recorder.model = model
    wrapped = functools.partial(resnet_fused.graphed, model=model)

    @wrapped
    def step(x):
        y = model(x).mean()
        y.backward()
        return y

    results = [step(x) for x, _ in batches(*[4] * 7)]
    values = [float(r) for r in results]
    assert len(set(values)) == 7 and values == [float(r) for r in results] and not results[-1].requires_grad


@pytest.mark.skipif(ON_GPU, reason="about machines without")
def test_without_a_gpu_it_is_the_step_itself():
    step = print
    assert resnet_fused.graphed(step, nn.Linear(1, 1)) is step


@pytest.mark.parametrize(
    "step, model, text",
    [
        (3, nn.Linear(1, 1), "step must be callable, got int"),
        (print, print, "model must be a torch.nn.Module, got builtin"),
    ],
)
def test_bad_input(step, model, text):
    with pytest.raises(TypeError, match=text):
        resnet_fused.graphed(step, model)
