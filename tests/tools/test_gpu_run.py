"""The one command for a GPU, rehearsed: every step runs, is recorded, and is not run twice; the results come home."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import from_checkout  # noqa: F401
import pytest
import torch

from benchmarks import targets
from resnet_fused import ops
from resnet_fused._command import UsageError, choose_many
from resnet_fused.bench import contestants, schema
from resnet_fused.dispatch import table as tables
from resnet_fused.measure.cases import DTYPES, MODES
from tools import pages as docs

gpu_run = pytest.importorskip("benchmarks.gpu_run", reason="the benchmarks are not here")
from benchmarks import gpu_collect, gpu_steps  # noqa: E402

needs_kernels = pytest.mark.skipif(
    not any(ops.available(name, "cpu") for name in ("triton", "cuda")), reason="no kernel runs on this CPU"
)
GPU = "NVIDIA Test 1"
ON_CPUS = {"openvino", "frozen-int8", "onnxruntime-int8", "openvino-int8"}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A whole rehearsal: its folder and its exit status."""
    out = tmp_path_factory.mktemp("rehearsal")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark measures nothing in such a worker
        return out, gpu_run.main(["--rehearse", "--out", str(out), "--minutes", "60"])


@pytest.mark.larger  # every step for real, minutes of them; below, the same with steps of a second
@needs_kernels
def test_a_rehearsal_runs_every_step_and_resumes(rehearsed, capsys):
    out, status = rehearsed
    assert status == 0, (out / "log.txt").read_text()
    state = json.loads((out / "state.json").read_text())
    names = [step.name for step in gpu_steps.steps()]
    assert list(state["steps"]) == names and state["gpu"] == gpu_run.REHEARSAL
    absent = {name for name, entry in state["steps"].items() if entry["status"] == "absent"}
    wanted = {"cuda": "timm", "triton": "timm", "ops": "pytest_benchmark"}
    lacking = {name for name, package in wanted.items() if importlib.util.find_spec(package) is None}
    assert absent == lacking | ({"cuda"} if not ops.available("cuda", "cpu") else set())
    assert {entry["status"] for entry in state["steps"].values()} <= {"ok", "absent"}
    lines = {name: entry["headline"] for name, entry in state["steps"].items()}
    assert "passed" in lines["check"] and "float64" in lines["verify"]
    assert "speed-up over" in lines["train"] and "problems measured" in lines["tune"]
    data = json.loads((out / "results.json").read_text())
    assert data["train"]["cases"][0]["results"][0]["saved"]["bytes"] > 0 and data["loader"]["loader"]
    assert {"verify", "profile", "ops"} - absent <= set(data)
    kept = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert len(kept) <= 8 and max(len(path.parts) for path in kept) <= 3, kept
    assert (out / "profile.png").stat().st_size > 10_000 and "not measured" in (out / "summary.txt").read_text()
    before = len((out / "log.txt").read_text())
    assert gpu_run.main(["--rehearse", "--out", str(out)]) == 0
    ran = (out / "log.txt").read_text()[before:]
    assert ran.count("=====") == 1 and "build" in ran  # what lives on the machine alone
    said = capsys.readouterr().out
    assert all(word in said for word in ("goal", "not measured", "build"))


def at_a_gpu(rehearsal: Path, out: Path) -> Path:
    """The rehearsal as if a GPU had measured it."""
    shutil.copytree(rehearsal, out)
    state, data = (json.loads((out / name).read_text()) for name in ("state.json", "results.json"))
    state["gpu"] = GPU
    for one in data.values():
        if "provenance" in one:
            one["provenance"]["gpu"] = {"name": GPU}
            one["provenance"]["commit"] = {"sha": "0123456789", "dirty": False}
    facts = data["train"]["provenance"]
    plan = json.loads((out / "plan/rehearsal/cpu.json").read_text())
    plan |= {"gpu": GPU, "arch": 90, "provenance": {key: facts[key] for key in gpu_collect.SAME}}
    (out / "plan" / tables.file_name(GPU)).write_text(json.dumps(plan))
    (out / "state.json").write_text(json.dumps(state))
    (out / "results.json").write_text(json.dumps(data))
    return out


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.larger
@needs_kernels
def test_results_come_home_whole_or_not_at_all(rehearsed, tmp_path):
    out, root = at_a_gpu(rehearsed[0], tmp_path / "out"), tmp_path / "root"
    said = "\n".join(gpu_collect.collect(out, root))
    home = root / "benchmarks/results/nvidia-test-1"
    (result,) = home.glob("*.json")
    report = schema.load(result)
    assert [case.mode for case in report.cases] == ["infer", "train"] and report.loader
    assert "gpu_run_" not in report.provenance["command"]  # a folder that is gone
    assert tables.read(root / "resnet_fused/dispatch/tables/nvidia-test-1.json").verified
    (folder,) = home.glob("gpu-run-*")
    assert {path.name for path in folder.iterdir()} == set(gpu_collect.KEPT)
    assert (
        "docs/gpu_log.md" in said
        and "against eager AMP: not measured" in said
        and "train, batch 2, fp32: measured" in said
    )
    before = files(root)
    list(gpu_collect.collect(out, root))
    assert files(root) == before  # twice is once
    (root / "README.md").write_text(f"{docs.BEGIN}\n{docs.END}\n")
    page = docs.pages(root)[docs.PAGE]
    assert "| goal |" in page and "not measured" in page

    data = json.loads((out / "results.json").read_text())
    data["infer"]["cases"][0]["results"][0]["images_per_s"] *= 2
    (out / "results.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="its samples say"):
        gpu_collect.collect(out, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.larger
@needs_kernels
def test_only_what_belongs_together_comes_home(rehearsed, tmp_path):
    with pytest.raises(UsageError, match="rehearsal"):
        gpu_collect.collect(rehearsed[0], tmp_path / "root")
    out = at_a_gpu(rehearsed[0], tmp_path / "out")
    path, data = out / "results.json", json.loads((out / "results.json").read_text())
    plan = out / "plan" / tables.file_name(GPU)

    other = json.loads(plan.read_text())
    other["provenance"]["torch"] = "2.0"
    plan.write_text(json.dumps(other))
    said = "\n".join(gpu_collect.collect(out, tmp_path / "versions"))
    assert "made with torch 2.0" in said and not (tmp_path / "versions/resnet_fused").exists()
    other |= {"verified": [], "entries": []}
    plan.write_text(json.dumps(other))
    assert "of no kernel" in "\n".join(gpu_collect.collect(out, tmp_path / "unverified"))

    data["train"]["provenance"]["commit"]["sha"] = "abcdef0123"
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match="different commit"):
        gpu_collect.collect(out, tmp_path / "root")
    data["verify"]["provenance"]["gpu"]["name"] = "another"
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match="verify: measured on"):
        gpu_collect.collect(out, tmp_path / "root")
    assert not (tmp_path / "root").exists()


def python(name, code, **rest):
    step = gpu_steps.Step(name, (sys.executable,), {"-c": code.replace("{", "{{").replace("}", "}}")}, "result", 60, 1)
    return dataclasses.replace(step, **rest)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs these steps; returns the exit status, the state of the steps, and what was printed."""

    def go(*plan, arguments=()):
        for module in (gpu_run, gpu_steps):
            monkeypatch.setattr(module, "steps", lambda: list(plan))
        status = gpu_run.main(["--rehearse", "--out", str(tmp_path / "out"), *arguments])
        return status, json.loads((tmp_path / "out/state.json").read_text())["steps"], capsys.readouterr().out

    return go


def test_failures_and_steps_out_of_time_are_recorded_and_the_latter_run_again_after_the_others(run):
    good = python("good", "print('result 1')")
    bad = python("bad", "print('no line'); raise SystemExit(1)")
    slow = python("slow", "print('begun', flush=True); import time; time.sleep(60)", limit_s=3)
    gone = python("gone", "", absent=lambda rehearse: "not on the PATH")
    late = python("late", "print('result 2')", least_s=10_000)
    status, state, out = run(slow, good, bad, gone, late)
    assert status == 1 and "left" in out and "| no line" in out
    assert {name: entry["status"] for name, entry in state.items()} == {
        "slow": "out of time",
        "good": "ok",
        "bad": "failed",
        "gone": "absent",
    }
    assert state["slow"]["tries"] == 2  # once in its turn, once more when the others had had theirs
    assert [state[name]["headline"] for name in ("good", "bad", "slow", "gone")] == [
        "result 1",
        "no line",
        "begun",
        "not on the PATH",
    ]
    status, state, _ = run(slow, good)
    assert status == 3 and state["slow"]["tries"] == 3
    status, state, _ = run(slow, good)
    assert state["slow"]["tries"] == 3  # given up
    status, state, _ = run(python("slow", "print('result 3')"), good, arguments=["--again", "slow"])
    assert status == 0 and state["slow"]["headline"] == "result 3"


def test_what_the_end_of_a_call_cuts_short_goes_on_in_its_place_and_with_what_it_has(run):
    code = (
        "import json, pathlib, sys, time; p = pathlib.Path(sys.argv[2]); "
        "n = json.loads(p.read_text()) if p.exists() else 0; "
        "p.write_text(json.dumps(n + 1)); print('result', n, flush=True); time.sleep(0 if n else 60)"
    )
    step = python("first", "", limit_s=60)
    step = dataclasses.replace(step, program=(sys.executable, "-c", code), options={"--json": "{work}/{name}.json"})
    status, state, _ = run(step, arguments=["--minutes", "0.07"])
    assert status == 3 and (state["first"]["status"], state["first"]["tries"]) == ("cut short", 0)
    status, state, _ = run(step)
    assert status == 0 and state["first"]["headline"] == "result 1"


def test_a_step_that_has_more_to_do_runs_again_last(run, tmp_path):
    count = (
        f"import pathlib; p = pathlib.Path({str(tmp_path / 'count')!r}); n = len(p.read_text()) if p.exists() else 0; "
    )
    more = python(
        "more", count + "p.write_text('x' * (n + 1)); print('result', n, '' if n else 'left for the next call')"
    )
    other = python("other", count + "print('result', n)")
    status, state, _ = run(more, other)
    assert status == 0 and state["more"]["headline"] == "result 1" and state["other"]["headline"] == "result 1"


def test_a_step_out_of_time_may_say_what_it_has(run, monkeypatch):
    monkeypatch.setattr(gpu_run, "GRACE_S", 1)
    code = "import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  print('result so far')\n"
    _, state, _ = run(python("slow", code, limit_s=4))
    assert (state["slow"]["status"], state["slow"]["headline"]) == ("out of time", "result so far")


def test_much_output_is_logged_in_part_and_another_gpus_folder_is_refused(run, tmp_path, capsys):
    status, *_ = run(python("loud", "print('begin'); print('x' * 300_000); print('result')"))
    log = (tmp_path / "out/log.txt").read_text()
    assert status == 0 and len(log) < 1.1 * gpu_run.LOGGED and "begin" in log and "[...]" in log and "result" in log
    path = tmp_path / "out/state.json"
    path.write_text(path.read_text().replace(gpu_run.REHEARSAL, GPU))
    with pytest.raises(SystemExit) as stop:
        run(python("loud", ""))
    assert stop.value.code == 2 and GPU in capsys.readouterr().err


def test_what_runs_on_a_gpu_is_options_that_the_commands_take(tmp_path):
    from resnet_fused import cli

    named = {step.name: step.command(100, tmp_path) for step in gpu_steps.steps()}
    values = {step.name: step.options for step in gpu_steps.steps()}
    checked = 0
    for name, command in named.items():
        if command[:3] == list(gpu_steps.CLI):
            arguments = cli.parser().parse_args(command[3:])
            arguments.argv = command[3:]
            if command[3] == "bench":
                options = cli.bench.options_of(arguments)
                assert {case.image_size for case in options.cases} == {224} and options.cases[0].dtype == values[name][
                    "--dtype"
                ], name
                assert arguments.json == tmp_path / f"{name.replace(' ', '-')}.json"
                checked += 1
            else:
                choose_many(values[name].get("--dtype", "bf16"), DTYPES, "dtype")
                choose_many(arguments.mode, MODES, "mode")
    assert checked == 10
    for step in gpu_steps.steps():
        for command in (named[step.name], step.command(100, tmp_path, rehearse=True)):
            if command[:4] == [*gpu_steps.CLI, "bench"]:
                cli.bench.refuse_ignored(cli.parser().parse_args(command[3:]))
    asked = {name for options in values.values() for name in str(options.get("--contestants", "")).split(",") if name}
    assert asked == set(contestants.CONTESTANTS) - ON_CPUS  # nobody is forgotten
    for target in targets.TARGETS:  # and every target's case is measured with both, or with one and the baseline
        for name in (target.ours, target.theirs):
            commands = [" ".join(command) for command in named.values()]
            assert any(f"--mode {target.mode} " in line and name in line for line in commands), (target, name)


COLLECT = """
import json, sys, pytest
for arguments in json.loads(sys.argv[1]):
    print("selection", flush=True)
    assert pytest.main(["-p", "no:cacheprovider", "--assert=plain", "--collect-only", "-q", *arguments]) == 0
"""


@pytest.mark.larger
def test_the_selections_of_tests_find_tests():
    wanted = {"check": 2000, "gpu tests": 8, "memcheck": 40, "racecheck": 10}
    steps = [step for step in gpu_steps.steps() if step.name in wanted]
    selections = [
        [word for option in step.options.items() if option[0] in ("-k", "-m") for word in option] + list(step.files)
        for step in steps
    ]
    command = [sys.executable, "-c", COLLECT, json.dumps(selections)]  # one process: each file is imported once
    done = subprocess.run(command, cwd=gpu_steps.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr
    for step, found in zip(steps, done.stdout.split("selection\n")[1:], strict=True):
        count = sum("::" in line for line in found.splitlines())
        assert count >= wanted[step.name], (step.name, count)
        if step.wrapper:
            assert count < 400, (step.name, count)  # under the sanitizer each takes long


@needs_kernels
def test_the_plan_of_a_gpu_run_is_printed_and_runs_nothing(tmp_path, capsys):
    assert gpu_run.main(["--plan", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert all(step.name in out for step in gpu_steps.steps()) and "calls of 9 minutes" in out
    rows = {line[:20].strip(): line[20:].split() for line in out.splitlines() if line.endswith("  left")}
    assert {name: int(row[1]) for name, row in rows.items()}["profile"] == 3  # what matters most, with all of its time
    assert "compute-sanitizer --tool memcheck" in out and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "arguments", [[], ["--minutes", "0", "--rehearse"], ["--rehearse", "--again", "tuen"], ["--collect", "nowhere"]]
)
def test_bad_usage_is_said(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_run.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and any(
        word in said for word in ("--rehearse ", "--minutes 0", "choices: all", "nowhere")
    )


ENTRY = {"status": "ok", "seconds": 1, "headline": "a", "commit": None, "date_utc": "2026-01-01", "tries": 1}


@pytest.mark.parametrize(
    ("state", "results", "hint"),
    [
        ({"gpu": GPU, "steps": {}}, {}, "state.json: format is missing"),
        ({"format": 2, "gpu": GPU, "steps": {}}, {}, "state.json: format is 2, not 1"),
        ({"format": 1, "gpu": None, "steps": {}}, {}, "state.json: gpu is null, not str"),
        ({"format": 1, "gpu": GPU, "steps": {}}, {}, "state.json: steps is empty"),
        (
            {"format": 1, "gpu": GPU, "steps": {"build": {**ENTRY, "tries": "2"}}},
            {},
            'steps.build.tries is "2", not int',
        ),
        ({"format": 1, "gpu": GPU, "steps": {"build": 3}}, {}, "steps.build is 3, not an object"),
        ({"format": 1, "gpu": GPU, "steps": {"build": ENTRY}}, [], "results.json: the file is"),
        ({"format": 1, "gpu": GPU, "steps": {"a": ENTRY}}, {"train": {"cases": 1, "baseline": 2}}, "schema is missing"),
    ],
)
def test_what_is_no_gpu_run_is_said_in_one_line(state, results, hint, tmp_path):
    for name, value in (("state.json", state), ("results.json", results)):
        (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(UsageError) as error:
        gpu_collect.collect(tmp_path, tmp_path / "root")
    assert hint in str(error.value) and len(str(error.value).splitlines()) == 1
