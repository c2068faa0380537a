"""cuDNN's graphs, executed by a double of its package: one convolution, frozen networks, the contestant."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from contract import assert_no_worse
from cudnn_double import CPULibrary, model_of, package, spec_of
from networks import randomised
from torch import nn

from resnet_fused import dispatch, freeze, fuse, ops, use_backend
from resnet_fused.bench.contestants import CONTESTANTS
from resnet_fused.bench.runner import Runner
from resnet_fused.dispatch.table import Choice
from resnet_fused.inference import conv, cudnn, tail
from resnet_fused.measure.cases import DTYPES, Case, Unavailable
from resnet_fused.measure.network import networks
from resnet_fused.models import cifar_resnet
from resnet_fused.ops import cpu, cudnn_graphs
from resnet_fused.ops.backends import implementation
from resnet_fused.ops.cudnn_graphs import FastestPlan, NoEngine
from resnet_fused.tuning.candidates import candidates
from resnet_fused.tuning.problems import jobs

INFER = Case("cifar-resnet8", "infer", 2, "fp32", "cpu", 32)


@pytest.fixture
def library(monkeypatch):
    """The double, as the library of the CPU."""
    double = CPULibrary()
    monkeypatch.setattr(cudnn_graphs, "library", lambda device: double)
    monkeypatch.setattr(cudnn, "runs", lambda backend, x, act: backend == "cudnn" and act in cudnn_graphs.ACTS)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cpu, "refusal", lambda *args: "")
    with torch.backends.mkldnn.flags(enabled=False):
        yield double


def _nodes(library) -> list[list[str]]:
    return [[name for name, _ in graph.nodes] for graph in library.cudnn.pygraph.made]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("act", [None, "relu"])
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
def test_a_convolution_is_what_the_op_says(x_shape, weight_shape, geometry, residual, act, dtype, library):
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in (x_shape, weight_shape, weight_shape[:1]))
    geometry = {
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "groups": x_shape[1] // weight_shape[1],
    } | geometry

    def plain(x, weight, bias, other):
        y = F.conv2d(x, weight, bias, **geometry)
        y = y + other if residual else y
        return y.relu() if act else y

    other = torch.randn_like(F.conv2d(x, weight, None, **geometry))
    run = implementation("cudnn", "conv_fprop")
    y = run(x, weight, None, bias, other if residual else None, *geometry.values(), act)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_no_worse(y, plain, (x, weight, bias, other), addends=weight[0].numel())
    # The order of the nodes is the pattern of cuDNN's precompiled engines.
    assert _nodes(library) == [["conv_fprop", *["add"] * residual, "bias", *[act] * bool(act)]]


def test_the_scale_of_a_batch_norm_goes_into_the_weight(library):
    x, weight, scale = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.rand(6) + 0.5
    y = cudnn_graphs.conv_fprop(x, weight, scale, None, None, (1, 1), (1, 1), (1, 1), 1, None)

    def plain(x, weight, scale):
        return F.conv2d(x, weight, padding=1) * scale.view(-1, 1, 1)

    assert_no_worse(y, plain, (x, weight, scale), addends=weight[0].numel())


def test_the_fastest_plan_that_runs_is_kept(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for costs, index, size in (([1.0, 2.0], 0, 16), ([2.0, 1.0], 2, 64)):  # the second cannot be built
        library = CPULibrary(costs=costs)
        plan = FastestPlan(library, spec_of())
        assert (plan.index, plan.workspace_bytes) == (index, size)
        (graph,) = library.cudnn.pygraph.made
        assert graph.executed == [0, 2]


def test_as_many_plans_are_timed_as_pytorch_times(monkeypatch):
    for benchmark, limit, timed in ((False, 10, [0]), (True, 1, [0]), (True, 0, [0, 2])):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark_limit", limit)
        library = CPULibrary(costs=[2.0, 1.0])
        FastestPlan(library, spec_of())
        assert library.cudnn.pygraph.made[0].executed == timed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_pytorch_flags_choose_the_engines(dtype, allowed, deterministic, library, monkeypatch):
    monkeypatch.setattr(cudnn_graphs, "uses_tf32", lambda dtype: allowed)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    x, weight = torch.randn(1, 4, 3, 3, dtype=dtype), torch.randn(4, 4, 1, 1, dtype=dtype)
    cudnn_graphs.conv_fprop(x, weight, None, None, None, (1, 1), (0, 0), (1, 1), 1, None)
    names = {note.name for note in library.cudnn.pygraph.made[0].deselected}
    tensor_cores = {"TENSOR_CORE", "DOWN_CONVERT_INPUTS"} if dtype == torch.float32 and not allowed else set()
    assert names == tensor_cores | ({"NONDETERMINISTIC"} if deterministic else set())


def test_what_has_no_engine_says_so(library):
    library.cudnn.pygraph.refuses = staticmethod(lambda graph: True)
    with pytest.raises(NoEngine, match=r"of \[2, 8, 6, 6\] by .*: no engine$"):
        FastestPlan(library, spec_of())
    library = CPULibrary()
    library.cudnn.pygraph.plans = (False, False)
    with pytest.raises(NoEngine, match=r"no engine that runs a float32 .*: Deselecting execution plan"):
        FastestPlan(library, spec_of())
    with pytest.raises(NoEngine, match="fp32, fp16 and bf16, not torch.float64"):
        FastestPlan(CPULibrary(), spec_of(dtype=torch.float64))
    with pytest.raises(NoEngine, match="ReLU or nothing, not silu"):
        operands = torch.randn(1, 2, 3, 3), torch.randn(2, 2, 1, 1), None, None, None
        cudnn_graphs.conv_fprop(*operands, (1, 1), (0, 0), (1, 1), 1, "silu")


def _frozen(model, x):
    with use_backend("cudnn"):
        return freeze(model, x)


def _small() -> nn.Module:
    return randomised(cifar_resnet(8)).eval().to(memory_format=torch.channels_last)


def _example(dtype=torch.float32):
    return torch.randn(2, 3, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)


# name, convolutions with an add, with a ReLU, all.
NETWORKS = [("cifar", 3, 7, 7), ("resnet18", 8, 17, 20), ("resnet50", 16, 49, 53), ("timm:resnet26d", 8, 27, 31)]
NETWORKS = [pytest.param(*case, id=case[0], marks=[pytest.mark.larger] * (case[0] != "cifar")) for case in NETWORKS]


@pytest.mark.parametrize("name, adds, relus, convolutions", NETWORKS)
def test_a_network_computes_what_the_plain_one_does(name, adds, relus, convolutions, library):
    model, x = _small() if name == "cifar" else model_of(name).to(memory_format=torch.channels_last), _example()
    frozen = _frozen(model, x)
    assert_no_worse(frozen(x), nn.Module.__call__, (model, x))
    rows = [row for row in frozen.plan.layers if row.backend == "cudnn"]
    assert len(rows) == len(frozen.plan.layers) == convolutions
    assert sum("residual" in row.fused for row in rows) == adds
    assert sum("relu" in row.fused for row in rows) == relus
    assert f"{convolutions} in conv_fprop on cudnn" in str(frozen.plan)
    tried = {graph.stage for graph in library.cudnn.pygraph.made}
    before = [len(graph.executed) for graph in library.cudnn.pygraph.made]
    frozen(x)
    after = [len(graph.executed) for graph in library.cudnn.pygraph.made]
    assert len(tried) == 1 and sum(after) - sum(before) == convolutions  # and no graph is made anew


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_network_in_half_precision(dtype, library):
    model, x = _small(), _example(dtype)
    half = copy.deepcopy(model).to(dtype)
    frozen = _frozen(half, x)
    assert_no_worse(frozen(x), nn.Module.__call__, (half, x))
    assert {row.backend for row in frozen.plan.layers} == {"cudnn"}


def test_layers_without_an_engine_run_native_and_the_plan_says_why(library):
    model, x = _small(), _example()
    library.cudnn.pygraph.refuses = staticmethod(lambda graph: graph.inputs[0].dim[1] == 3)
    frozen = _frozen(model, x)
    assert_no_worse(frozen(x), nn.Module.__call__, (model, x))
    others = [row for row in frozen.plan.layers if row.backend != "cudnn"]
    assert [(row.backend, row.op) for row in others] == [("aten", "conv_fprop")]
    assert all("conv_fprop: cuDNN has no engine for a float32 convolution" in row.reason for row in others)


def test_an_image_of_another_size_gets_graphs_of_its_own_but_not_in_a_capture(library, monkeypatch):
    model = _small()
    frozen, larger = _frozen(model, _example()), F.pad(_example(), (4, 4, 4, 4))
    made = len(library.cudnn.pygraph.made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert_no_worse(frozen(larger), nn.Module.__call__, (model, larger))
    assert len(library.cudnn.pygraph.made) == made
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert_no_worse(frozen(larger), nn.Module.__call__, (model, larger))
    assert len(library.cudnn.pygraph.made) > made


def test_where_there_is_no_gpu_the_plan_says_so():
    frozen = _frozen(cifar_resnet(8).eval(), torch.randn(1, 3, 8, 8))
    assert {row.backend for row in frozen.plan.layers} == {"aten"}
    assert all(row.reason == "cuDNN runs on an NVIDIA GPU" for row in frozen.plan.layers)


def _runner(case: Case = INFER) -> Runner:
    return Runner(CONTESTANTS["cudnn-graphs"], _small(), case, torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    "changes, reason",
    [
        (None, "cudnn cannot be imported (No module named 'cudnn'); it needs nvidia-cudnn-frontend"),
        ({"pygraph": None}, "has no pygraph; it needs nvidia-cudnn-frontend"),
        ({"backend_version": lambda: 8907}, "cuDNN 8907 is too old; it needs 90000"),
        ({}, None),
    ],
    ids=["missing", "another package", "old", "usable"],
)
def test_a_package_that_cannot_be_used_is_a_reason(changes, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None if changes is None else package(**changes))
    if changes is None:
        monkeypatch.setattr(importlib, "import_module", _missing)
    found = cudnn_graphs.unavailable("cuda")
    assert found is None if reason is None else reason in found
    assert cudnn_graphs.unavailable("cpu") == "cuDNN runs on an NVIDIA GPU"


def _missing(name):
    raise ModuleNotFoundError(f"No module named {name!r}")


def test_the_contestant_without_a_gpu():
    with pytest.raises(Unavailable, match="cuDNN runs on an NVIDIA GPU"):
        _runner()


def test_the_contestant_runs_and_counts_what_it_leaves_to_pytorch(library, monkeypatch):
    monkeypatch.setattr(ops, "unavailable", lambda backend, device_type: None)
    runner = _runner()
    plain = Runner(CONTESTANTS["eager"], runner.module, INFER, runner._images, torch.tensor([1, 2]))
    torch.testing.assert_close(runner.evaluate().logits, plain.evaluate().logits, rtol=1e-4, atol=1e-4)
    library.cudnn.pygraph.refuses = staticmethod(lambda graph: graph.inputs[0].dim[1] == 3)
    cudnn_graphs.fastest_plan.cache_clear()
    with pytest.warns(UserWarning, match="cudnn-graphs: 1 of 7 convolutions run through PyTorch: conv1: conv_fprop: "):
        _runner()
    library.cudnn.pygraph.refuses = staticmethod(lambda graph: True)
    cudnn_graphs.fastest_plan.cache_clear()
    with pytest.raises(Unavailable, match="cuDNN has no engine for a float32 convolution"):
        _runner()


def test_what_tune_found_is_what_freeze_runs(library, monkeypatch):
    """And nothing else: no other op has such a kernel, and a training network keeps native convolutions."""
    monkeypatch.setattr(ops, "available", lambda backend, device_type: backend == "cudnn")
    found = jobs(*networks("resnet18", 32), ["infer", "train"], 2, torch.bfloat16, 90, False)
    offered = {job.problem.op for job in found if Choice("cudnn") in candidates(job, torch.device("cuda"), 90)}
    assert offered == {"conv_fprop"}
    monkeypatch.setattr(conv, "planned_backend", lambda op, *shape, **flags: "cudnn")
    monkeypatch.setattr(tail, "planned_backend", lambda op, *shape, **flags: "cudnn")
    model, x = _small(), _example()[:, :, :8, :8]
    assert {row.backend for row in freeze(model, x).plan.layers} == {"cudnn"}
    monkeypatch.setattr(dispatch, "default_backend", lambda op, device_type: "cudnn")
    before = len(library.cudnn.pygraph.made)
    fused, plain = fuse(copy.deepcopy(model).train()), model.train()
    assert_no_worse(fused(x), nn.Module.__call__, (plain, x))
    assert len(library.cudnn.pygraph.made) == before
