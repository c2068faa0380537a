"""Contestants that a machine may lack, and the CUDA graph of a training step as far as one without a GPU goes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
from types import SimpleNamespace

import pytest
import torch
import torchvision
from rich.console import Console

from resnet_fused.bench import correctness, schema, table
from resnet_fused.bench.contestants import BASELINE, CONTESTANTS, other_runtimes
from resnet_fused.bench.results import CaseReport, Report, Result
from resnet_fused.bench.runner import Runner, device_captures
from resnet_fused.measure import provenance
from resnet_fused.measure.cases import Case, Unavailable
from resnet_fused.measure.roof import Roof
from resnet_fused.measure.timing import Timing
from resnet_fused.ops import onednn

INFER = Case("resnet18", "infer", 2, "fp32", "cpu", 32)
TRAIN = Case("resnet18", "train", 2, "fp32", "cpu", 32)


def _runner(name: str, case: Case) -> Runner:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    return Runner(CONTESTANTS[name], model, case, torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch-tensorrt"])
def test_a_runtime_that_is_not_installed_says_what_it_needs(name, monkeypatch):
    def missing(package, *args):
        raise ModuleNotFoundError(f"No module named {package!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(Unavailable, match=f"^not installed, needs {name.replace('-', '_')}"):
        _runner(name, INFER)


def test_a_runtime_without_a_provider_for_the_device_says_so(monkeypatch):
    class Runtime:
        @staticmethod
        def get_available_providers():
            return ["TensorrtExecutionProvider"]

    monkeypatch.setattr(other_runtimes, "_imported", lambda name: Runtime)
    with pytest.raises(Unavailable, match="no CPUExecutionProvider, only TensorrtExecutionProvider"):
        _runner("onnxruntime", INFER)


@pytest.mark.parametrize("name, reason", [("onnxruntime", "onnx"), ("openvino", "not installed, needs openvino")])
def test_a_runtime_where_it_is_installed(name, reason):
    try:
        runner = _runner(name, INFER)
    except Unavailable as unavailable:
        assert reason in str(unavailable)
        return
    plain = _runner("eager", INFER)
    torch.testing.assert_close(runner.evaluate().logits, plain.evaluate().logits, rtol=1e-4, atol=1e-4)


def test_openvino_without_the_dtype_on_this_cpu_says_so(monkeypatch):
    class Core:
        def get_property(self, device, name):
            return ["FP32", "INT8"]

    monkeypatch.setattr(other_runtimes, "_imported", lambda name: SimpleNamespace(Core=Core))
    with pytest.raises(Unavailable, match="no bf16 on this CPU, only FP32, INT8"):
        _runner("openvino", dataclasses.replace(INFER, dtype="bf16"))


def test_int8_is_near_the_plain_model_and_says_where_it_does_not_run(monkeypatch):
    for case in (dataclasses.replace(INFER, dtype="fp16"), dataclasses.replace(INFER, device="meta")):
        with pytest.raises(Unavailable, match="on a CPU only, in fp32 and bf16 networks"):
            _runner("frozen-int8", case)
    if (problem := onednn.int8_refusal()) is None:
        runner = _runner("frozen-int8", INFER)
        ours, plain = runner.evaluate().logits, _runner("eager", INFER).evaluate().logits
        assert 1e-5 < correctness.norm_error(ours, plain) < 0.05
        monkeypatch.setattr(onednn, "int8_refusal", lambda: "no VNNI")
        problem = "no VNNI"
    with pytest.raises(Unavailable, match=problem):
        _runner("frozen-int8", INFER)


def test_int8_is_in_no_mean_and_the_table_says_what_it_is():
    timing = Timing((2.0, 2.0))
    float32 = [Result(name, "ok", errors=correctness.Errors(1e-7), timing=timing) for name in (BASELINE, "frozen")]
    int8 = Result("frozen-int8", "ok", errors=correctness.Errors(2e-2), timing=Timing((1.0, 1.0)), agreement=0.5)
    case = CaseReport(INFER, 1000, 2, (*float32, int8), Roof(1e9, 1e9))
    report = Report("resnet18", BASELINE, provenance.collect(torch.device("cpu"), ""), (case,))
    assert set(report.geometric_means("infer")) == {BASELINE, "frozen"}
    said = next(line for line in table.notes(report) if line.startswith("frozen-int8"))
    assert "50% in infer, batch 2, fp32" in said and "it is in no mean" in said
    console = Console(width=200, file=io.StringIO())
    table.render(report, console)
    row = next(line for line in console.file.getvalue().splitlines() if line.startswith("frozen-int8 "))
    assert "2.00x" in row and "2.0e-02" in row and "%" not in row  # the roof is that of float
    assert schema.parse(json.loads(json.dumps(report.to_json())), "here") == report


def test_max_autotune_is_for_gpus():
    for case in (INFER, TRAIN):
        with pytest.raises(Unavailable, match="on a GPU only"):
            _runner("compile-max-autotune", case)


def test_training_on_a_cpu_is_not_captured():
    runner = _runner(BASELINE, TRAIN)
    runner.step()
    assert runner.graphed is False


def test_which_training_steps_can_be_captured():
    assert device_captures(Case("resnet18", "train", 2, "bf16", "cuda", 32))
    assert not device_captures(Case("resnet18", "train", 2, "fp16", "cuda", 32))
    assert not device_captures(TRAIN)


@pytest.mark.parametrize("capture_fails", [False, True])
def test_a_captured_step_is_replayed_and_a_failed_capture_is_not(monkeypatch, capture_fails):
    """The bookkeeping of the capture, with CUDA's part played by a fake."""
    log = []

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def graph(g, pool=None):
        log.append("capture")
        if capture_fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield

    fakes = {"Stream": Stream, "CUDAGraph": Graph, "graph": graph, "stream": lambda s: contextlib.nullcontext()}
    for name, fake in (fakes | {"current_stream": Stream}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr("resnet_fused.bench.runner.device_captures", lambda case: True)
    runner = _runner(BASELINE, TRAIN)
    monkeypatch.setattr(runner, "_train", lambda: log.append("train"))
    if capture_fails:
        with pytest.warns(UserWarning, match="no CUDA graph of this training step: operation not permitted"):
            runner.step()
    else:
        runner.step()
    runner.step()
    assert log == ["train"] * 3 + (
        ["capture", "train", "train"] if capture_fails else ["capture", "train", "replay", "replay"]
    )
    assert runner.graphed is not capture_fails
