"""The graphs of `cudnn-graphs` before the real package: planned for an H100 that is described, and run on a GPU."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from contract import assert_no_worse, assert_within_contract
from cudnn_double import CPULibrary, model_of

from resnet_fused.bench.contestants import BASELINE, CONTESTANTS, cudnn_graphs, cudnn_graphs_network
from resnet_fused.bench.contestants.cudnn_graphs import Recording, Spec, nhwc_strides
from resnet_fused.bench.contestants.cudnn_graphs_network import build
from resnet_fused.bench.runner import Runner, reference
from resnet_fused.measure.cases import DTYPES, Case

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
    with pytest.raises(RuntimeError, match="handle (is NULL|== __null)"):
        graph.execute_plan_at_index(pack, workspace, index, handle=None)


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
    convolution = cudnn_graphs.conv_bias_act(x.shape, weight, bias, residual=residual, **geometry)

    def plain(x, weight, bias, other):
        y = F.conv2d(x, weight, bias, **geometry)
        return (y + other if residual else y).relu()

    y = convolution(x, other if residual else None)
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
