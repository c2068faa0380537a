"""cuDNN's graphs before the real package: planned for an H100 that is described, and run on a GPU."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from contract import assert_no_worse, assert_within_contract
from cudnn_double import CPULibrary, model_of

from resnet_fused.bench.contestants import BASELINE, CONTESTANTS
from resnet_fused.bench.runner import Runner, reference
from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.measure.cases import DTYPES, Case
from resnet_fused.measure.network import networks
from resnet_fused.ops import cudnn_graphs
from resnet_fused.ops.cudnn_graphs import Graph, Spec, nhwc_strides

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
def _layers_of_resnet50() -> frozenset[tuple[ConvShape, bool, bool]]:
    """(shape, ReLU, residual) of its distinct convolutions at batch 8."""
    (network,) = networks("resnet50", 224)
    found = {(network.stem.shape, True, False)}
    for block in network.blocks:
        *inner, last = block.branch
        found |= {(layer.shape, True, False) for layer in inner} | {(last.shape, True, True)}
        found |= {(block.shortcut.shape, False, False)} if block.shortcut else set()
    assert len(found) == 24
    return frozenset((dataclasses.replace(shape, n=8), relu, residual) for shape, relu, residual in found)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_the_real_library_has_engines_for_every_graph_of_resnet50(dtype, tf32):
    """For an H100; those that are compiled at run time need a driver, so these are the precompiled ones."""
    real = DescribedH100()
    for shape, relu, residual in _layers_of_resnet50():
        _all_but_launched(Graph(real, Spec(shape, dtype, relu, residual, tf32)))


def _all_but_launched(made: Graph) -> None:
    """Validated, planned, the first plan that needs no compiler built, its operands bound."""
    made.plan()
    for name, size in made.sizes.items():
        tensor = made.tensors[name]
        assert list(tensor.get_dim()) == list(size) and list(tensor.get_stride()) == nhwc_strides(size)
    index = next(k for k in range(made.graph.get_execution_plan_count()) if _builds(made.graph, k))
    workspace = torch.empty(max(1, made.graph.get_workspace_size_plan_at_index(index)), dtype=torch.uint8)
    pack = {tensor: torch.zeros(1, dtype=made.spec.dtype).expand(made.sizes[n]) for n, tensor in made.tensors.items()}
    with pytest.raises(RuntimeError, match="handle (is NULL|== __null)"):
        made.graph.execute_plan_at_index(pack, workspace, index, handle=None)


def _builds(graph, index: int) -> bool:
    """Whether the plan is one of those that PyTorch's flags allow, and needs no compiler."""
    try:
        graph.build_plan_at_index(index)
    except Exception:
        return False
    return True


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_a_convolution_on_a_gpu(dtype, residual):
    pytest.importorskip("cudnn")
    x, weight = torch.randn(4, 64, 28, 28).cuda().to(dtype), torch.randn(128, 64, 3, 3).cuda().to(dtype) / 24
    bias, other = torch.randn(128).cuda().to(dtype), torch.randn(4, 128, 14, 14).cuda().to(dtype)
    geometry = {"stride": (2, 2), "padding": (1, 1)}

    def plain(x, weight, bias, other):
        y = F.conv2d(x, weight, bias, **geometry)
        return (y + other if residual else y).relu()

    added = other if residual else None
    y = cudnn_graphs.conv_fprop(x, weight, None, bias, added, *geometry.values(), (1, 1), 1, "relu")
    assert_no_worse(y, plain, (x, weight, bias, other), addends=weight[0].numel())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_contestant_on_a_gpu(dtype):
    pytest.importorskip("cudnn")
    model, case = model_of("resnet50"), Case("resnet50", "infer", 4, dtype, "cuda", 64)
    images, labels = torch.randn(4, 3, 64, 64), torch.zeros(4, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every layer has an engine, and the network is captured
        runner = Runner(CONTESTANTS["cudnn-graphs"], model, case, images, labels)
    plain = Runner(CONTESTANTS[BASELINE], model, case, images, labels)
    truth = reference(model, case, images, labels)
    assert_within_contract(runner.evaluate().logits.cpu(), plain.evaluate().logits.cpu(), truth.logits)
