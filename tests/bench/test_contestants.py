"""Contestants that a machine may lack, and the CUDA graph of a training step as far as one without a GPU goes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
from types import SimpleNamespace

import pytest
import recorded
import torch
import torchvision
from rich.console import Console

from resnet_fused.bench import correctness, schema, table
from resnet_fused.bench.contestants import BASELINE, CONTESTANTS, other_runtimes
from resnet_fused.bench.runner import Runner
from resnet_fused.measure.cases import Case, Unavailable
from resnet_fused.ops import onednn
from resnet_fused.training import cuda_graph

INFER = Case("resnet18", "infer", 2, "fp32", "cpu", 32)
TRAIN = Case("resnet18", "train", 2, "fp32", "cpu", 32)


def _runner(name: str, case: Case, memory: object = None) -> Runner:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    return Runner(CONTESTANTS[name], model, case, torch.randn(2, 3, 32, 32), torch.tensor([1, 2]), memory)


class _Runtimes:
    """ONNX Runtime without a provider for a CPU, OpenVINO without bf16."""

    @staticmethod
    def get_available_providers():
        return ["TensorrtExecutionProvider"]

    class Core:
        def get_property(self, device, name):
            return ["FP32", "INT8"]


FP16, BF16, META = (
    dataclasses.replace(INFER, **one) for one in ({"dtype": "fp16"}, {"dtype": "bf16"}, {"device": "meta"})
)
ON_A_GPU, INT8 = "on a GPU only", "on a CPU only, in fp32 and bf16 networks"
CANNOT = [
    ("onnxruntime", INFER, "no CPUExecutionProvider, only TensorrtExecutionProvider"),
    ("openvino", BF16, "no bf16 on this CPU, only FP32, INT8"),
    ("compile-max-autotune", INFER, ON_A_GPU),
    ("compile-max-autotune", TRAIN, ON_A_GPU),
    ("eager-plain-loop", TRAIN, ON_A_GPU),
    ("fused-plain-loop", TRAIN, ON_A_GPU),
    ("frozen-int8", FP16, INT8),
    ("frozen-int8", META, INT8),
    ("openvino-int8", META, INT8),
    ("frozen-int8", INFER, "no VNNI"),
]


@pytest.mark.parametrize("name,case,reason", CANNOT, ids=lambda value: getattr(value, "label", value))
def test_who_cannot_run_here_says_why(name, case, reason, monkeypatch):
    monkeypatch.setattr(other_runtimes, "_imported", lambda package: _Runtimes)
    monkeypatch.setattr(onednn, "int8_refusal", lambda: "no VNNI")
    with pytest.raises(Unavailable, match=reason):
        _runner(name, case)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch-tensorrt"])
def test_a_runtime_that_is_not_installed_says_what_it_needs(name, monkeypatch):
    def missing(package, *args):
        raise ModuleNotFoundError(f"No module named {package!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(Unavailable, match=f"^not installed, needs {name.replace('-', '_')}") as error:
        _runner(name, INFER)
    package = "torch_tensorrt" if name == "torch-tensorrt" else "'resnet_fused[rivals]'"
    assert str(error.value).endswith(f": pip install {package}")


@pytest.mark.parametrize("name, reason", [("onnxruntime", "onnx"), ("openvino", "not installed, needs openvino")])
def test_a_runtime_where_it_is_installed(name, reason):
    try:
        runner = _runner(name, INFER)
    except Unavailable as unavailable:
        assert reason in str(unavailable)
        return
    plain = _runner("eager", INFER)
    torch.testing.assert_close(runner.evaluate().logits, plain.evaluate().logits, rtol=1e-4, atol=1e-4)


@pytest.mark.larger
@pytest.mark.parametrize("name, needs", [("onnxruntime-int8", "onnxruntime"), ("openvino-int8", "openvino")])
def test_another_runtime_in_int8_is_near_the_plain_model_too(name, needs):
    try:
        runner = _runner(name, INFER)
    except Unavailable as unavailable:
        assert str(unavailable).startswith("not installed") and needs in str(unavailable)
        return
    found, plain = runner.evaluate().logits, _runner("eager", INFER).evaluate().logits
    assert 1e-5 < correctness.norm_error(found, plain) < 0.1


def test_int8_is_near_the_plain_model():
    if (problem := onednn.int8_refusal()) is not None:
        pytest.skip(problem)
    ours, plain = _runner("frozen-int8", INFER).evaluate().logits, _runner("eager", INFER).evaluate().logits
    assert 1e-5 < correctness.norm_error(ours, plain) < 0.05


def test_int8_is_in_no_mean_and_the_table_says_what_it_is():
    float32 = [recorded.result(name, 2.0, 2.0) for name in (BASELINE, "frozen")]
    int8 = recorded.result("frozen-int8", 1.0, 1.0, errors=correctness.Errors(2e-2), agreement=0.5)
    other = recorded.result("openvino-int8", 1.0, 1.0, errors=correctness.Errors(2e-2), agreement=1.0)
    report = recorded.report(recorded.case(*float32, int8, other, batch=2))
    assert set(report.geometric_means("infer")) == {BASELINE, "frozen"}
    (said,) = (line for line in table.notes(report) if "8-bit" in line)
    assert "contestants (frozen-int8, openvino-int8)" in said and "in no mean" in said
    assert "frozen-int8 on 1 of 2 images, openvino-int8 on 2 of 2 images" in said
    console = Console(width=200, file=io.StringIO())
    table.render(report, console)
    row = next(line for line in console.file.getvalue().splitlines() if line.startswith("frozen-int8 "))
    assert "2.00x" in row and "2.0e-02" in row and "%" not in row  # the roof is that of float
    assert schema.parse(json.loads(json.dumps(report.to_json())), "here") == report


def _recorded(monkeypatch):
    """`graphed` as on a GPU, with a stand-in for the graph: what was recorded, in which pool, and how often it ran."""
    found = SimpleNamespace(pools=[], replays=0)

    def record(call, stream, pool):
        found.pools.append(pool)
        loss = call()

        def replay():
            found.replays += 1

        return replay, loss

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_graph, "record", record)
    monkeypatch.setattr(cuda_graph, "_on_gpu", lambda t: True)
    monkeypatch.setattr(cuda_graph._Graphed, "_side_stream", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    return found


def test_a_training_step_is_graphed_in_the_memory_that_all_share(monkeypatch):
    found = _recorded(monkeypatch)
    runner = _runner(BASELINE, TRAIN, SimpleNamespace(pool=(0, 7)))
    runner.warm_up()
    assert (found.pools, found.replays) == ([(0, 7)], 1)
    runner.step()
    assert (found.pools, found.replays) == ([(0, 7)], 2)
    runner.step_by_step()
    assert found.replays == 2


def test_a_plain_loop_is_not_graphed(monkeypatch):
    for name in ("eager-plain-loop", "fused-plain-loop"):
        monkeypatch.setitem(CONTESTANTS, name, dataclasses.replace(CONTESTANTS[name], prepare=lambda model, *_: model))
    found = _recorded(monkeypatch)
    for name in ("eager-plain-loop", "fused-plain-loop"):
        runner = _runner(name, TRAIN)
        for _ in range(6):
            runner.step()
    assert not found.pools


def test_on_a_cpu_no_graph_is_waited_for(monkeypatch):
    runner, steps = _runner(BASELINE, TRAIN), []
    monkeypatch.setattr(runner, "step", lambda: steps.append(1))
    runner.warm_up()
    assert len(steps) == 1
