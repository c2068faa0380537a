"""What a race on a GPU begins with, rehearsed on a CPU: the stages are the same."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from resnet_fused import cli
from resnet_fused._command import UsageError
from resnet_fused.bench import preparation
from resnet_fused.cli import bench
from resnet_fused.measure.cases import Case
from resnet_fused.measure.progress import Silent
from resnet_fused.tuning import tune as tuning

GPU = [Case("resnet50", mode, batch, "bf16", "cuda") for mode, batch, _ in bench.GPU_CASES]


def options(*arguments):
    parsed = cli.parser().parse_args(["bench", *arguments])
    parsed.argv = ["bench", *arguments]
    return bench.options_of(parsed)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is only asked for its name."""
    monkeypatch.setattr(bench, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(bench, "check_backend", lambda name, device: None)


def test_a_first_run_on_a_gpu_tunes_and_races_a_gpus_cases(gpu):
    found = options()
    assert [(case.mode, case.batch, case.dtype) for case in found.cases] == list(bench.GPU_CASES)
    assert (found.tune_s, found.budget_s, found.rehearse) == (180.0, 570.0, False)
    assert "compile" in found.contestants and "compile-max-autotune" not in found.contestants
    assert options("--no-tune").tune_s is None
    assert options("--contestants", "compile-max-autotune").contestants == ("compile-max-autotune",)


def test_a_plain_loop_races_on_a_gpu_only(gpu, monkeypatch):
    loops = {"eager-plain-loop", "fused-plain-loop"}
    assert loops <= set(options().contestants)
    monkeypatch.undo()
    on_cpu = set(options("--device", "cpu").contestants)
    assert "fused" in on_cpu and not loops & on_cpu


def test_what_was_asked_for_is_not_tuned_for_unless_that_was_asked_for_too(gpu):
    assert options("--batch", "8").tune_s is options("--backend", "triton").tune_s is None
    assert options("--batch", "8", "--tune").tune_s == 180.0


def test_a_cpu_has_nothing_to_tune():
    assert options("--device", "cpu").tune_s is None
    with pytest.raises(UsageError, match="--tune is for a GPU, and the device is cpu; --rehearse runs every step"):
        options("--device", "cpu", "--tune")


def test_every_case_is_tuned_for_within_one_budget(monkeypatch):
    asked, clock = [], SimpleNamespace(monotonic=lambda: 100.0 * len(asked))

    def tune(model, **named):
        asked.append((model, named["modes"], named["batch"], named["dtype"], named["budget_s"]))
        return SimpleNamespace(measured=7, known=1, left=2, dropped=["one"])

    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(preparation, "time", clock)
    cases = [*GPU, Case("resnet50", "infer", 8, "fp16", "cuda")]
    line = preparation.prepare("resnet50", cases, 180, False, "", Silent())
    assert asked[0] == ("resnet50", ("infer", "train"), {256, 32, 1}, "bf16", 180)
    assert asked[1] == ("resnet50", ("infer",), {8}, "fp16", 80)
    each = "7 problems measured, 1 known already, 1 not right and left out, 2 left for the next call"
    assert line == f"our kernels were tuned in 200 s (bf16: {each}; fp16: {each})"


def test_what_goes_wrong_costs_the_table_and_not_the_race(monkeypatch):
    def tune(model, **named):
        raise OSError("no space left\nhere")

    monkeypatch.setattr(tuning, "tune", tune)
    line = preparation.prepare("resnet50", GPU, 180, False, "", Silent())
    assert "bf16 not tuned: OSError: no space left" in line and "\n" not in line


def test_a_gpu_without_a_table_is_said(monkeypatch):
    monkeypatch.setattr(preparation, "advice", lambda arch: f"nothing on {arch}")
    monkeypatch.setattr(preparation, "arch", lambda device: 90)
    assert preparation.untuned(torch.device("cuda")) == "nothing on 90"
    assert preparation.untuned(torch.device("cpu")) is None


@pytest.mark.larger
def test_a_rehearsal_runs_every_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path))
    file = tmp_path / "bench.json"
    assert cli.main(["bench", "--rehearse", "--contestants", "fused,frozen", "--no-images", "--json", str(file)]) == 0
    said = capsys.readouterr()
    assert "a rehearsal on a CPU: no time here says anything" in " ".join(said.out.split())
    assert "checking our kernels against float64 and timing them in bf16" in said.err
    found = json.loads(file.read_text())
    assert found["kernels"].startswith("our kernels were tuned in")
    assert [(case["mode"], case["batch"]) for case in found["cases"]] == [("infer", 2), ("train", 2)]
