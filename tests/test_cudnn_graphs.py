"""cuDNN's own graphs as a contestant: recorded and executed by a double of its package, and judged by the real one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import json
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from contract import assert_within_contract
from cudnn_double import CPULibrary, package
from torch import nn

from resnet_fused.bench import cudnn_graphs, cudnn_graphs_network, models
from resnet_fused.bench import cudnn_graphs_training as training
from resnet_fused.bench.cases import DTYPES, Case, Unavailable
from resnet_fused.bench.contestants import BASELINE, CONTESTANTS
from resnet_fused.bench.correctness import breach, errors_of
from resnet_fused.bench.cudnn_graphs import Convolution, Recording, Spec, graph_of, nhwc_strides
from resnet_fused.bench.cudnn_graphs_network import build
from resnet_fused.bench.runner import Runner, reference

INFER = Case("resnet18", "infer", 2, "fp32", "cpu", 32)


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    timm = name.startswith("timm:")
    make = pytest.importorskip("timm").create_model if timm else torchvision.models.get_model
    model = make(name.removeprefix("timm:"), num_classes=10)
    models.randomise_batch_norms(model)
    models.calibrate(model, [torch.randn(4, 3, 32, 32)])
    return model.eval()


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

    def expected(dtype):
        y = F.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), groups=groups, **geometry)
        y = y + other.to(dtype) if residual else y
        return y.relu() if relu else y

    other = torch.randn(convolution.spec.y, dtype=dtype)
    y = convolution(x, other if residual else None)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_within_contract(y, expected(dtype), expected(torch.float64))
    # The order of the nodes is the pattern of cuDNN's precompiled engines.
    assert _nodes(library) == [["conv_fprop", *["add"] * residual, "bias", *["relu"] * relu]]


def _spec(**changes) -> Spec:
    return Spec(
        **{
            "x": (2, 8, 6, 6),
            "weight": (8, 8, 3, 3),
            "stride": (1, 1),
            "padding": (1, 1),
            "dilation": (1, 1),
            "dtype": torch.float32,
            "relu": True,
            **changes,
        }
    )


def _convolution(library, **changes) -> Convolution:
    spec = _spec(**changes)
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
    graph_of(library, _spec(dtype=dtype))
    names = {note.name for note in library.cudnn.pygraph.made[0].deselected}
    tensor_cores = {"TENSOR_CORE", "DOWN_CONVERT_INPUTS"} if dtype == torch.float32 and not allowed else set()
    assert names == tensor_cores | ({"NONDETERMINISTIC"} if deterministic else set())


def test_what_has_no_engine_says_so():
    library = CPULibrary()
    library.cudnn.pygraph.refuses = staticmethod(lambda graph: True)
    with pytest.raises(Unavailable, match=r"no engine for a float32 convolution of \[2, 8, 6, 6\] by .*: no engine$"):
        graph_of(library, _spec())
    library = CPULibrary()
    library.cudnn.pygraph.plans = (False, False)
    with pytest.raises(Unavailable, match=r"no engine that runs a float32 .*: Deselecting execution plan"):
        graph_of(library, _spec())
    with pytest.raises(Unavailable, match="fp32, fp16 and bf16, not torch.float64"):
        graph_of(CPULibrary(), _spec(dtype=torch.float64))


# name, convolutions with an add, with a ReLU, all. In seresnet18 the projection takes the sum, and the gates have two.
NETWORKS = [
    ("resnet18", 8, 17, 20),
    ("resnet50", 16, 49, 53),
    ("timm:resnet26d", 8, 27, 31),
    ("timm:seresnet18", 3, 20, 36),
]


@pytest.mark.parametrize("name, adds, relus, convolutions", NETWORKS, ids=[case[0] for case in NETWORKS])
def test_a_network_computes_what_the_plain_one_does(name, adds, relus, convolutions):
    model, library = _model(name), CPULibrary()
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        network = build(model, x, library)
        result, plain = network(x), model(x)
        truth = copy.deepcopy(model).double()(x.double())
    assert_within_contract(result, plain, truth)
    layers = [m.convolution for m in network.modules() if isinstance(m, cudnn_graphs_network._Layer)]
    assert len(layers) == convolutions
    assert sum(layer.spec.residual for layer in layers) == adds
    assert sum(layer.spec.relu for layer in layers) == relus
    assert not [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert len({layer.workspace.data_ptr() for layer in layers}) == 1
    assert len(library.cudnn.pygraph.made) == len({layer.spec for layer in layers})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_network_in_half_precision(dtype):
    model = _model("resnet18")
    x = torch.randn(2, 3, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        half = copy.deepcopy(model).to(dtype)
        result = build(half, x, CPULibrary())(x)
        assert_within_contract(result, half(x), copy.deepcopy(model).double()(x.double()))


def test_layers_without_an_engine_are_counted_and_run_through_pytorch():
    model, library = _model("resnet18"), CPULibrary()
    library.cudnn.pygraph.refuses = staticmethod(lambda graph: graph.inputs[1].dim[2] == 1)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="3 of 20 convolutions run through PyTorch: cuDNN has no engine for"):
            network = build(model, x, library)
        truth = copy.deepcopy(model).double()(x.double())
        assert_within_contract(network(x), model(x), truth)
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
        truth = copy.deepcopy(model).double()(x.double())
        assert_within_contract(network(x), model(x), truth)
    layers = [m.convolution.spec for m in network.modules() if isinstance(m, cudnn_graphs_network._Layer)]
    assert [(spec.residual, spec.relu) for spec in layers] == [
        (False, False),  # a has two users
        (False, False),  # b's sum broadcasts
        (False, False),  # c's input is written before the sum
        (True, True),
        (False, False),  # e is added to what others may still read
    ]


TRAIN = dataclasses.replace(INFER, mode="train", dtype="fp16", batch=4)


def _as_an_h100(graph) -> bool:
    """Convolutions with statistics that an H100 has no engine for."""
    weights = [attributes["weight"] for name, attributes in graph.nodes if name == "conv_fprop"]
    return any(w[1] == 3 or w[2] == 7 for w in weights) and any(name == "genstats" for name, _ in graph.nodes)


def _trained(name: str, monkeypatch, model: nn.Module | None = None, library: CPULibrary | None = None):
    """What a step of the contestant, of plain PyTorch and of float64 gives."""
    library = library or CPULibrary()
    library.cudnn.pygraph.refuses = staticmethod(_as_an_h100)
    monkeypatch.setattr(cudnn_graphs_network, "library", lambda device: library)
    model = model or _model(name)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    runners = [Runner(CONTESTANTS[who], model, TRAIN, images, labels) for who in ("cudnn-graphs", BASELINE)]
    outcomes = [runner.evaluate() for runner in runners]
    return runners, *outcomes, reference(model, TRAIN, images, labels)


# name, convolutions, activations that are written: one a block, and one before the pool of resnet26d
TRAINED = [("resnet18", 19, 8), ("timm:resnet26d", 30, 9)]


@pytest.mark.parametrize("name, convolutions, written", TRAINED, ids=[case[0] for case in TRAINED])
def test_a_network_trains_as_the_plain_one_does(name, convolutions, written, monkeypatch):
    with warnings.catch_warnings(record=True):
        runners, ours, plain, truth = _trained(name, monkeypatch)
    layers = [type(m).__name__ for m in runners[0].forward.modules()]
    assert (layers.count("ConvolutionBatchNorm"), layers.count("Normalise")) == (convolutions, written)
    assert set(ours.gradients) == set(plain.gradients) and set(ours.statistics) == set(plain.statistics)
    assert breach(errors_of(ours, truth), [errors_of(plain, truth)], "fp16") is None
    counts = [[int(b) for name, b in r.module.named_buffers() if name.endswith("tracked")] for r in runners]
    assert counts[0] == counts[1] == [2] * len(counts[0])  # the first was calibration's
    assert torch.isfinite(runners[0].step())


class _OddTraining(nn.Module):
    """Values with several readers, a batch norm without a ReLU, a sum without one, and a convolution with a bias."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(6))
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        self.relu = nn.ReLU(inplace=True)

    def unit(self, k, x):
        return self.bns[k](self.convs[k](x))

    def forward(self, x):
        x = self.stem(x).relu()
        a = self.relu(self.unit(0, x))  # read by a convolution and by a sum: written
        b = self.relu(self.unit(1, a)) + a
        c = self.unit(2, b)  # without a ReLU, read twice
        d = self.unit(3, c) + c  # a sum without a ReLU
        e = torch.relu(self.unit(4, d) + self.unit(5, d))  # of two batch norms
        return e.mean((2, 3))


def test_odd_networks_train_as_the_plain_ones_do(monkeypatch):
    with pytest.warns(UserWarning, match="1 of 7 convolutions run through PyTorch: stem has no batch norm of its own"):
        runners, ours, plain, truth = _trained("", monkeypatch, _OddTraining())
    assert breach(errors_of(ours, truth), [errors_of(plain, truth)], "fp16") is None
    layers = [type(m).__name__ for m in runners[0].forward.modules()]
    assert (layers.count("ConvolutionBatchNorm"), layers.count("Normalise")) == (6, 5)


def test_a_step_that_trains_is_fp16(monkeypatch):
    monkeypatch.setattr(cudnn_graphs_network, "library", lambda device: CPULibrary())
    for dtype in ("fp32", "bf16"):
        with pytest.raises(Unavailable, match=f"training graphs are fp16 only, not {dtype}"):
            _runner(dataclasses.replace(INFER, mode="train", dtype=dtype))
    library = CPULibrary()
    monkeypatch.setattr(library.cudnn.pygraph, "refuses", staticmethod(lambda graph: True))
    with pytest.raises(Unavailable, match="cuDNN has no engine for convolution of a float16 convolution of"):
        cudnn_graphs_network.build_training(_model("resnet18").train(), torch.randn(2, 3, 32, 32), library)


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


# An H100, in the words of cuDNN's CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION: with it a machine without one can validate
# graphs and ask the heuristics, from cuDNN 9.8 on.
H100 = {
    "version": 1,
    "deviceVer": 900,
    "driverVer": 13000,
    "cudaDeviceId": 0,
    "maxGridSize": [2147483647, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64],
    "regsPerBlock": 65536,
    "multiProcessorCount": 132,
    "warpSize": 32,
    "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448,
    "reservedSharedMemoryPerBlock": 1024,
    "maxRegistersPerSM": 65536,
    "maxCtasPerSM": 32,
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048,
    "pciDeviceId": 0,
    "isTccDriver": 0,
    "supportCoopLaunch": 1,
    "totalGlobalMem": 85017493504,
    "smClockRateKHz": 1980000,
    "memClockRateKHz": 2619000,
    "l2CacheSize": 52428800,
    "deviceName": "NVIDIA H100 80GB HBM3",
}


class DescribedH100(CPULibrary):
    """The real package, for a GPU that is not there."""

    def __init__(self):
        super().__init__()
        try:
            self.cudnn = importlib.import_module("cudnn")
            self._properties = self.cudnn.create_device_properties(json.dumps(H100))
        except Exception as error:
            pytest.skip(f"nvidia-cudnn-frontend with cuDNN 9.8 or newer is not installed: {error}")

    def context(self):
        return {"device_property": self._properties, "sm_version": 90}


@functools.cache
def _specs_of_resnet50() -> frozenset[Spec]:
    """With images of 224 pixels: every size is seven times that with 32."""
    x = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        network = build(torchvision.models.resnet50(weights=None).eval(), x, CPULibrary())
    layers = {m.convolution.spec for m in network.modules() if isinstance(m, cudnn_graphs_network._Layer)}
    n, c, h, w = zip(*(spec.x for spec in layers), strict=True)
    assert len(layers) == 24 and set(n) == {8} and max(c) == 2048 and max(h) == 32 and h == w
    scaled = ((spec, (*spec.x[:2], 7 * spec.x[2], 7 * spec.x[3])) for spec in layers)
    return frozenset(dataclasses.replace(spec, x=x) for spec, x in scaled)


def _resnet50(dtype: torch.dtype) -> list[Spec]:
    return [dataclasses.replace(spec, dtype=dtype) for spec in _specs_of_resnet50()]


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_the_real_library_has_engines_for_every_graph_of_resnet50(dtype, tf32, monkeypatch):
    """For an H100; those that are compiled at run time need a driver, so these are the precompiled ones."""
    real = DescribedH100()
    monkeypatch.setattr(cudnn_graphs, "uses_tf32", lambda dtype: tf32)
    for spec in _resnet50(dtype):
        _all_but_launched(real, cudnn_graphs.record(real, spec))


def _all_but_launched(real: DescribedH100, recording: Recording) -> None:
    """Validated, planned, the first plan that needs no compiler built, its operands bound."""
    graph = recording.graph
    cudnn_graphs.offer(real, graph, recording.dtype)
    for name, (shape, _) in recording.operands.items():
        tensor = recording.tensors[name]
        assert list(tensor.get_dim()) == list(shape) and list(tensor.get_stride()) == nhwc_strides(shape)
    index = next(k for k in range(graph.get_execution_plan_count()) if _builds(graph, k))
    workspace = torch.empty(max(1, graph.get_workspace_size_plan_at_index(index)), dtype=torch.uint8)
    operands = {name: torch.zeros(1, dtype=dtype).expand(shape) for name, (shape, dtype) in recording.operands.items()}
    pack = {tensor: operands[name] for name, tensor in recording.tensors.items()}
    with pytest.raises(RuntimeError, match="handle is NULL"):
        graph.execute_plan_at_index(pack, workspace, index, handle=None)


def test_the_real_library_has_engines_for_training_resnet50():
    real, recordings = DescribedH100(), []

    def recorded(record, *args):
        recordings.append(Recording(real, torch.float16))
        record(recordings[-1], *args)

    specs = {dataclasses.replace(spec, relu=False, residual=False) for spec in _resnet50(torch.float16)}
    for spec in specs - {spec for spec in specs if spec.x[1] == 3}:
        for record in (training.convolution, training.weight_gradient):
            for prologue in (False, True):
                recorded(record, spec, prologue)
        recorded(training.data_gradient, spec)
    for recording in recordings:
        _all_but_launched(real, recording)
    # What is compiled at run time cannot be planned without a driver.
    recordings.clear()
    for shape in {spec.y for spec in specs}:
        for residual in ("nothing", "tensor", "batch norm"):
            for relu in (False, True):
                recorded(training.normalise, shape, residual, relu)
        for relu in ("none", "recomputed", "mask"):
            recorded(training.batch_norm_gradient, shape, relu)
    for recording in recordings:
        recording.graph.validate()
        recording.graph.build_operation_graph()
        for name, (shape, _) in recording.operands.items():
            assert list(recording.tensors[name].get_dim()) == list(shape)


def _builds(graph, index: int) -> bool:
    """Whether the plan is one of those that PyTorch's flags allow, and needs no compiler."""
    try:
        graph.build_plan_at_index(index)
    except Exception:
        return False
    return True


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_a_convolution_on_a_gpu(dtype, residual):
    pytest.importorskip("cudnn")
    x, weight = torch.randn(4, 64, 28, 28).cuda().to(dtype), torch.randn(128, 64, 3, 3).cuda().to(dtype) / 24
    bias, other = torch.randn(128).cuda().to(dtype), torch.randn(4, 128, 14, 14).cuda().to(dtype)
    geometry = {"stride": (2, 2), "padding": (1, 1)}
    convolution = cudnn_graphs.conv_bias_act(x.shape, weight, bias, residual=residual, **geometry)

    def expected(dtype):
        y = F.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), **geometry)
        return (y + other.to(dtype) if residual else y).relu()

    y = convolution(x, other if residual else None)
    assert_within_contract(y, expected(dtype), expected(torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_contestant_on_a_gpu(dtype):
    pytest.importorskip("cudnn")
    model, case = _model("resnet50"), Case("resnet50", "infer", 4, dtype, "cuda", 64)
    images, labels = torch.randn(4, 3, 64, 64), torch.zeros(4, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every layer has an engine, and the network is captured
        runner = Runner(CONTESTANTS["cudnn-graphs"], model, case, images, labels)
    plain = Runner(CONTESTANTS[BASELINE], model, case, images, labels)
    truth = reference(model, case, images, labels)
    assert_within_contract(runner.evaluate().logits.cpu(), plain.evaluate().logits.cpu(), truth.logits)


@pytest.mark.gpu
def test_training_on_a_gpu():
    pytest.importorskip("cudnn")
    model, case = _model("resnet50"), Case("resnet50", "train", 8, "fp16", "cuda", 64)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    with pytest.warns(UserWarning, match="1 of 53 convolutions run through PyTorch"):  # the stem
        runner = Runner(CONTESTANTS["cudnn-graphs"], model, case, images, labels)
    plain = Runner(CONTESTANTS[BASELINE], model, case, images, labels)
    truth = reference(model, case, images, labels)
    assert breach(errors_of(runner.evaluate(), truth), [errors_of(plain.evaluate(), truth)], "fp16") is None
