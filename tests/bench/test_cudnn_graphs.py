"""cuDNN's own graphs as a contestant, recorded and executed by a double of its package: inference."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from contract import assert_no_worse
from cudnn_double import CPULibrary, model_of, package, spec_of
from torch import nn

from resnet_fused.bench.contestants import CONTESTANTS, cudnn_graphs, cudnn_graphs_network
from resnet_fused.bench.contestants.cudnn_graphs import Convolution, graph_of
from resnet_fused.bench.contestants.cudnn_graphs_network import build
from resnet_fused.bench.runner import Runner
from resnet_fused.measure.cases import DTYPES, Case, Unavailable

INFER = Case("resnet18", "infer", 2, "fp32", "cpu", 32)


def _nodes(library) -> list[list[str]]:
    return [[name for name, _ in graph.nodes] for graph in library.cudnn.pygraph.made]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "x_shape, weight_shape, geometry",
    [
        ((2, 16, 9, 7), (8, 16, 3, 3), {"padding": (1, 1)}),
        ((2, 3, 12, 11), (8, 3, 7, 7), {"padding": (3, 3), "stride": (2, 2)}),
        ((1, 8, 8, 8), (16, 8, 1, 1), {"stride": (2, 2)}),
        ((2, 8, 9, 9), (8, 4, 3, 3), {"padding": (2, 2), "dilation": (2, 2)}),
        ((2, 4, 9, 8), (6, 4, 3, 1), {"padding": (1, 0), "stride": (1, 2)}),
    ],
    ids=["3x3", "stem", "1x1", "grouped and dilated", "oblong"],
)
def test_a_convolution_is_what_its_spec_says(x_shape, weight_shape, geometry, residual, relu, dtype, monkeypatch):
    library = CPULibrary()
    monkeypatch.setattr(cudnn_graphs, "library", lambda device: library)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in (x_shape, weight_shape, weight_shape[:1]))
    convolution = cudnn_graphs.conv_bias_act(x_shape, weight, bias, relu=relu, residual=residual, **geometry)
    groups = x_shape[1] // weight_shape[1]

    def plain(x, weight, bias, other):
        y = F.conv2d(x, weight, bias, groups=groups, **geometry)
        y = y + other if residual else y
        return y.relu() if relu else y

    other = torch.randn(convolution.spec.y, dtype=dtype)
    y = convolution(x, other if residual else None)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_no_worse(y, plain, (x, weight, bias, other), addends=weight[0].numel())
    # The order of the nodes is the pattern of cuDNN's precompiled engines.
    assert _nodes(library) == [["conv_fprop", *["add"] * residual, "bias", *["relu"] * relu]]


def _convolution(library, **changes) -> Convolution:
    spec = spec_of(**changes)
    return Convolution(graph_of(library, spec), spec, torch.randn(spec.weight, dtype=spec.dtype), None)


def test_operands_it_was_not_built_for_are_refused():
    convolution = _convolution(CPULibrary())
    with pytest.raises(ValueError, match=r"built for \[2, 8, 6, 6\] torch.float32, got \[2, 8, 5, 6\]"):
        convolution(torch.randn(2, 8, 5, 6))
    with pytest.raises(ValueError, match=r"got \[2, 8, 6, 6\] torch.float16"):
        convolution(torch.randn(2, 8, 6, 6).half())
    with pytest.raises(ValueError, match="built without a residual"):
        convolution(torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6))
    with pytest.raises(ValueError, match=r"the residual must be \[2, 8, 6, 6\]"):
        _convolution(CPULibrary(), residual=True)(torch.randn(2, 8, 6, 6), torch.randn(2, 8, 1, 1))


def test_the_fastest_plan_that_runs_is_kept(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for costs, index, size in (([1.0, 2.0], 0, 16), ([2.0, 1.0], 2, 64)):  # the second cannot be built
        library = CPULibrary(costs=costs)
        convolution = _convolution(library)
        assert (convolution.graph.index, convolution.graph.workspace_bytes) == (index, size)
        assert convolution.workspace.numel() == size
        (graph,) = library.cudnn.pygraph.made
        assert graph.executed == [0, 2]
        convolution(torch.randn(2, 8, 6, 6))
        assert graph.executed == [0, 2, index]


def test_as_many_plans_are_timed_as_pytorch_times(monkeypatch):
    for benchmark, limit, timed in ((False, 10, [0]), (True, 1, [0]), (True, 0, [0, 2])):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark_limit", limit)
        library = CPULibrary(costs=[2.0, 1.0])
        _convolution(library)
        assert library.cudnn.pygraph.made[0].executed == timed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_pytorch_flags_choose_the_engines(dtype, allowed, deterministic, monkeypatch):
    monkeypatch.setattr(cudnn_graphs, "uses_tf32", lambda dtype: allowed)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    library = CPULibrary()
    graph_of(library, spec_of(dtype=dtype))
    names = {note.name for note in library.cudnn.pygraph.made[0].deselected}
    tensor_cores = {"TENSOR_CORE", "DOWN_CONVERT_INPUTS"} if dtype == torch.float32 and not allowed else set()
    assert names == tensor_cores | ({"NONDETERMINISTIC"} if deterministic else set())


def test_what_has_no_engine_says_so():
    library = CPULibrary()
    library.cudnn.pygraph.refuses = staticmethod(lambda graph: True)
    with pytest.raises(Unavailable, match=r"of \[2, 8, 6, 6\] by .*: no engine$"):
        graph_of(library, spec_of())
    library = CPULibrary()
    library.cudnn.pygraph.plans = (False, False)
    with pytest.raises(Unavailable, match=r"no engine that runs a float32 .*: Deselecting execution plan"):
        graph_of(library, spec_of())
    with pytest.raises(Unavailable, match="fp32, fp16 and bf16, not torch.float64"):
        graph_of(CPULibrary(), spec_of(dtype=torch.float64))


# name, convolutions with an add, with a ReLU, all. In seresnet18 the projection takes the sum, and the gates have two.
NETWORKS = [
    ("resnet18", 8, 17, 20),
    ("resnet50", 16, 49, 53),
    ("timm:resnet26d", 8, 27, 31),
    ("timm:seresnet18", 3, 20, 36),
]


@pytest.mark.parametrize("name, adds, relus, convolutions", NETWORKS, ids=[case[0] for case in NETWORKS])
def test_a_network_computes_what_the_plain_one_does(name, adds, relus, convolutions):
    model, library = model_of(name), CPULibrary()
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        network = build(model, x, library)
        assert_no_worse(network(x), nn.Module.__call__, (model, x))
    layers = [m.convolution for m in network.modules() if isinstance(m, cudnn_graphs_network._Layer)]
    assert len(layers) == convolutions
    assert sum(layer.spec.residual for layer in layers) == adds
    assert sum(layer.spec.relu for layer in layers) == relus
    assert not [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert len({layer.workspace.data_ptr() for layer in layers}) == 1
    assert len(library.cudnn.pygraph.made) == len({layer.spec for layer in layers})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_network_in_half_precision(dtype):
    model = model_of("resnet18")
    x = torch.randn(2, 3, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        half = copy.deepcopy(model).to(dtype)
        assert_no_worse(build(half, x, CPULibrary())(x), nn.Module.__call__, (half, x))


def test_layers_without_an_engine_are_counted_and_run_through_pytorch():
    model, library = model_of("resnet18"), CPULibrary()
    library.cudnn.pygraph.refuses = staticmethod(lambda graph: graph.inputs[1].dim[2] == 1)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="3 of 20 convolutions run through PyTorch: cuDNN has no engine for"):
            network = build(model, x, library)
        assert_no_worse(network(x), nn.Module.__call__, (model, x))
    library.cudnn.pygraph.refuses = staticmethod(lambda graph: True)
    with pytest.raises(Unavailable, match="cuDNN has no engine for a float32 convolution"):
        build(model, x, library)


class _Odd(nn.Module):
    """What may not be fused: two users, another padding, a sum that broadcasts, and a write between."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.b, self.c, self.d, self.e = (nn.Conv2d(8, 8, 1) for _ in range(4))
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        a = self.a(x)
        y = self.relu(self.reflect(a.relu() + a))
        y = self.b(y) + y.mean((2, 3), keepdim=True)
        z = self.c(y)
        y.add_(1)
        z = z + y
        y = self.bn(z)
        w = self.d(y)
        y = torch.add(y, w).relu_()
        y = y.add_(self.e(y))
        return y.relu()


def test_what_may_not_be_fused_is_not():
    torch.manual_seed(0)
    model = _Odd().eval()
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="1 of 6 convolutions run through PyTorch: reflect pads by"):
            network = build(model, x, CPULibrary())
        assert_no_worse(network(x), nn.Module.__call__, (model, x))
    layers = [m.convolution.spec for m in network.modules() if isinstance(m, cudnn_graphs_network._Layer)]
    assert [(spec.residual, spec.relu) for spec in layers] == [
        (False, False),  # a has two users
        (False, False),  # b's sum broadcasts
        (False, False),  # c's input is written before the sum
        (True, True),
        (False, False),  # e is added to what others may still read
    ]


class _Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_traced_is_unavailable():
    with pytest.raises(Unavailable, match="torch.fx cannot trace this model: "):
        build(_Branching().eval(), torch.randn(2, 3, 8, 8), CPULibrary())
    with pytest.raises(Unavailable, match="no convolution"):
        build(nn.Sequential(nn.Flatten(), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8), CPULibrary())


def _runner(case: Case = INFER) -> Runner:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    return Runner(CONTESTANTS["cudnn-graphs"], model, case, torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    "changes, reason",
    [
        (None, r"cudnn cannot be imported \(No module named 'cudnn'\); it needs nvidia-cudnn-frontend"),
        ({"pygraph": None}, "has no pygraph; it needs nvidia-cudnn-frontend"),
        ({"backend_version": lambda: 8907}, "cuDNN 8907 is too old; it needs 90000"),
        ({}, "cuDNN runs on an NVIDIA GPU"),
    ],
    ids=["missing", "another package", "old", "no GPU"],
)
def test_the_contestant_says_why_it_is_unavailable(changes, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None if changes is None else package(**changes))
    if changes is None:
        monkeypatch.setattr(importlib, "import_module", _missing)
    with pytest.raises(Unavailable, match=reason):
        _runner()


def _missing(name):
    raise ModuleNotFoundError(f"No module named {name!r}")


@pytest.mark.parametrize("capture_fails", [False, True])
def test_the_contestant_runs(capture_fails, monkeypatch):
    def capture(network, example):
        if capture_fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda x: network(x)

    monkeypatch.setattr(cudnn_graphs_network, "library", CPULibrary)
    monkeypatch.setattr(cudnn_graphs_network, "capture", capture)
    if capture_fails:
        with pytest.warns(UserWarning, match="no CUDA graph, the network runs kernel by kernel: operation not"):
            runner = _runner()
    else:
        runner = _runner()
    plain = Runner(CONTESTANTS["eager"], runner.module, INFER, runner._images, torch.tensor([1, 2]))
    torch.testing.assert_close(runner.evaluate().logits, plain.evaluate().logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"built for inputs of \(2, 3, 32, 32\), got \(1, 3, 32, 32\)"):
        runner.infer(torch.randn(1, 3, 32, 32))
