"""The one command for a GPU, rehearsed: every step runs, is recorded, and is not run twice."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused import ops

sys.path.append(
    str(Path(__file__).resolve().parents[1])
)  # `benchmarks` is a folder of the checkout, not of the package
gpu_run = pytest.importorskip("benchmarks.gpu_run", reason="the benchmarks are not here")

needs_kernels = pytest.mark.skipif(
    not any(ops.available(name, "cpu") for name in ("triton", "cuda")), reason="no kernel runs on this CPU"
)


@needs_kernels
def test_a_rehearsal_runs_every_step_and_resumes(tmp_path, capsys):
    assert gpu_run.main(["--rehearse", "--out", str(tmp_path), "--minutes", "9"]) == 0, (
        tmp_path / "log.txt"
    ).read_text()
    out = capsys.readouterr().out
    names = ["check", "verify", "tune", "ops", "infer", "train"]
    state = json.loads((tmp_path / "state.json").read_text())
    assert list(state) == names and {entry["status"] for entry in state.values()} == {"ok"}
    assert "passed" in state["check"]["headline"] and "float64" in state["verify"]["headline"]
    assert "geometric mean" in state["train"]["headline"] and (tmp_path / "cache" / "rehearsal" / "cpu.json").exists()
    assert {"verify.json", "infer.json", "train.json", "log.txt", "summary.txt"} <= {p.name for p in tmp_path.iterdir()}
    assert json.loads((tmp_path / "train.json").read_text())["cases"][0]["results"][0]["saved"]["bytes"] > 0
    assert all(name in out for name in names)
    before = (tmp_path / "log.txt").stat().st_size
    assert gpu_run.main(["--rehearse", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "log.txt").stat().st_size == before


def python(name, code, **rest):
    return dataclasses.replace(
        gpu_run.Step(name, lambda seconds: [sys.executable, "-c", code], 60, 1, "result"), **rest
    )


def test_failures_and_steps_out_of_time_are_recorded_and_the_latter_run_again(tmp_path, monkeypatch, capsys):
    plan = [
        python("good", "print('result 1')"),
        python("bad", "print('no line'); raise SystemExit(1)"),
        python("slow", "print('begun', flush=True); import time; time.sleep(60)", limit_s=2),
        python("late", "print('result 2')", least_s=10_000),
    ]
    monkeypatch.setattr(gpu_run, "steps", lambda *_: plan)
    assert gpu_run.main(["--rehearse", "--out", str(tmp_path)]) == 1
    state = json.loads((tmp_path / "state.json").read_text())
    assert {name: entry["status"] for name, entry in state.items()} == {
        "good": "ok",
        "bad": "failed",
        "slow": "out of time",
    }
    assert [state[name]["headline"] for name in state] == ["result 1", "no line", "begun"]
    assert "left" in capsys.readouterr().out
    plan[1:] = [python("slow", "print('result 3')")]
    assert gpu_run.main(["--rehearse", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "state.json").read_text())["slow"]["headline"] == "result 3"


def test_a_stopped_step_is_called_again_at_once(tmp_path, monkeypatch):
    code = (
        f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'count')!r}); "
        "n = int(p.read_text()) if p.exists() else 0; p.write_text(str(n + 1)); "
        "print('result', n); sys.exit(0 if n == 2 else 4)"
    )
    monkeypatch.setattr(gpu_run, "steps", lambda *_: [python("tune", code)])
    assert gpu_run.main(["--rehearse", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "state.json").read_text())["tune"]["headline"] == "result 2"


def test_what_runs_on_a_gpu_names_files_that_exist_and_options_that_parse(tmp_path, monkeypatch):
    from resnet_fused.cli import parser

    named = {step.name: step.command(100) for step in gpu_run.steps(tmp_path, rehearse=False)}
    assert set(named) >= {"check", "verify", "tune", "train", "infer", "ops"}
    for command in named.values():
        if command[: len(gpu_run.CLI)] == gpu_run.CLI:
            parser().parse_args(command[len(gpu_run.CLI) :])
    files = [argument for argument in named["check"] if argument.startswith("tests/")]
    assert len(files) > 5 and all((gpu_run.ROOT / name).exists() for name in files)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [[], ["--minutes", "0", "--rehearse"]])
def test_bad_usage_is_said(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_run.main(arguments)
    assert stop.value.code == 2 and ("--rehearse" in capsys.readouterr().err or "--minutes" in arguments)
