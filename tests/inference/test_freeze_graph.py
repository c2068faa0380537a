"""The bookkeeping of CUDA graphs, with a stand-in for the capture; and that a frozen network can be captured at all."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import warnings

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import freeze, use_backend
from resnet_fused.inference import graph
from resnet_fused.inference.graph import MAX_GRAPHS, Graphs


class _Recorder:
    """A network that counts its runs, and a capture that records what it was given."""

    def __init__(self, problem=None):
        self.runs, self.captured, self.replayed, self.problem = 0, [], 0, problem

    def network(self, x):
        self.runs += 1
        return x + 1

    def capture(self, network, example):
        assert network == self.network
        if self.problem is not None:
            raise RuntimeError(self.problem)
        self.captured.append(example.shape)

        def replay(x):
            assert x.shape == example.shape and x.stride() == example.stride() and x.dtype == example.dtype
            self.replayed += 1
            return x + 1

        return replay


def test_one_graph_for_each_shape_layout_and_dtype():
    recorder = _Recorder()
    graphs = Graphs(recorder.network, recorder.capture)
    inputs = [torch.randn(2, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.randn(2, 3, 4, 4, dtype=torch.float64)]
    inputs.append(inputs[0].contiguous(memory_format=torch.channels_last))
    for _ in range(3):
        for x in inputs:
            assert torch.equal(graphs(x), x + 1)
    assert len(recorder.captured) == 4 and recorder.replayed == 12 and recorder.runs == 0


class _Cuda:
    """As much of `torch.cuda` as a capture asks for; replaying changes nothing."""

    def __init__(self):
        self.streams = []
        self.device = self.stream = lambda value: contextlib.nullcontext()
        self.CUDAGraph = lambda: types.SimpleNamespace(replay=lambda: None)
        self.current_stream = self.Stream

    def Stream(self):
        return types.SimpleNamespace(wait_stream=lambda other: None)

    def graph(self, graph, stream=None):
        self.streams.append(stream)
        return contextlib.nullcontext()


def test_a_graph_captured_in_inference_mode_replays_outside_of_it(monkeypatch):
    cuda = _Cuda()
    monkeypatch.setattr(graph.torch, "cuda", cuda)
    x = torch.zeros(2)
    with torch.inference_mode():
        replay = graph.capture(lambda given: given + 1, torch.zeros(2))
        assert torch.equal(replay(x), x + 1)
    assert torch.equal(replay(x), x + 1) and not replay(x).is_inference()
    assert cuda.streams[0] is not None  # of the input's device


def test_shapes_beyond_the_limit_run_op_by_op():
    recorder = _Recorder()
    graphs = Graphs(recorder.network, recorder.capture)
    for size in range(1, MAX_GRAPHS + 3):
        graphs(torch.randn(size))
    assert len(recorder.captured) == MAX_GRAPHS and recorder.runs == 2
    graphs(torch.randn(1))
    assert len(recorder.captured) == MAX_GRAPHS and recorder.runs == 2


def test_a_capture_that_fails_warns_once_and_the_network_runs_op_by_op():
    recorder = _Recorder("operation not permitted when stream is capturing")
    graphs = Graphs(recorder.network, recorder.capture)
    x = torch.randn(3)
    with pytest.warns(UserWarning, match="no CUDA graph.*not permitted"):
        assert torch.equal(graphs(x), x + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(graphs(x), x + 1)
    assert recorder.runs == 2


def test_an_input_that_the_network_refuses_raises_and_takes_no_place():
    class Refusing(_Recorder):
        def network(self, x):
            raise ValueError("expected 4D input")

    recorder = Refusing("something about a capture")
    graphs = Graphs(recorder.network, recorder.capture)
    for size in range(1, MAX_GRAPHS + 3):
        with warnings.catch_warnings(), pytest.raises(ValueError, match="expected 4D input"):
            warnings.simplefilter("error")
            graphs(torch.randn(size))


@dataclasses.dataclass
class _Output:
    logits: torch.Tensor


@pytest.mark.parametrize("result", [_Output, lambda y: [{"logits": _Output(y)}], lambda y: types.SimpleNamespace(y=y)])
def test_a_result_that_could_not_be_copied_is_not_replayed(monkeypatch, result):
    """The next replay would change what the last one returned."""
    monkeypatch.setattr(graph.torch, "cuda", _Cuda())
    with pytest.raises(RuntimeError, match="the result holds a (_Output|SimpleNamespace)"):
        graph.capture(result, torch.zeros(2))


def test_a_copy_of_the_result_is_returned(monkeypatch):
    monkeypatch.setattr(graph.torch, "cuda", _Cuda())
    kept = torch.zeros(2)
    replay = graph.capture(lambda x: {"logits": (kept, None, 3, "name")}, torch.zeros(2))
    y = replay(torch.ones(2))["logits"]
    assert y[0] is not kept and torch.equal(y[0], kept) and y[1:] == (None, 3, "name")


class _Watch(TorchDispatchMode):
    """Collects the ops that a network calls."""

    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.add(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_a_frozen_network_never_asks_for_a_value(backend):
    """Reading a value back waits for the GPU, which a capture does not allow."""
    model = torchvision.models.resnet50(num_classes=10, width_per_group=8).eval()
    x = torch.randn(1, 3, 64, 64)
    with use_backend(backend):
        frozen = freeze(model, x)
    with torch.no_grad(), _Watch() as watch:
        frozen.network(x)
    assert ("conv_chain" in watch.ops) is (backend == "reference")
    assert not watch.ops & {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item"}
