"""The command line: a whole tiny bench, and bad input that ends in one line and exit code 2."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import larger

import resnet_fused
from resnet_fused import cli
from resnet_fused.bench.contestants import CONTESTANTS
from resnet_fused.measure import models

SMALL = ["bench", "--model", "resnet18", "--image-size", "32", "--batch", "1", "--device", "cpu"]
TINY = [*SMALL, "--rounds", "2"]


def run(*arguments, cwd, **environment):
    root = Path(cli.__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "resnet_fused.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.mark.parametrize("more", [(), larger(("compile",))], ids=["ours", "compile"])
def test_a_tiny_bench_end_to_end(more, tmp_path):
    files = ["--json", "out/b.json", "--chart", "out/b.png"]
    done = run(*TINY, "--contestants", ",".join(["eager", *more, "fused", "frozen"]), *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote out/b.json" in done.stdout and "wrote out/b.png" in done.stdout
    assert "infer, batch 1, fp32" in done.stdout and "speed-up over eager" in done.stdout
    assert "against float64" in done.stderr  # it says what it is doing
    data = json.loads((tmp_path / "out" / "b.json").read_text())
    assert data["provenance"]["command"].startswith("resnet-fused bench --model resnet18")
    (case,) = data["cases"]
    names = ("eager", "eager-channels-last", *more, "fused", "frozen")
    assert {result["contestant"]: result["status"] for result in case["results"]} == dict.fromkeys(names, "ok")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.json", "b.png"]


COMMANDS = ("info", "bench", "evaluate", "tune", "verify")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_needs_no_extra_package_and_names_all_choices(command, monkeypatch, capsys):
    for package in ("rich", "matplotlib", "torchvision"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and f"resnet-fused {command}" in text
    if command == "bench":
        assert "the first case always runs" in text and "a number alone is seconds" in text
        assert f"comma list of {', '.join(CONTESTANTS)} (default" in text.replace("- ", "-")  # lines end at hyphens


BAD = {
    "model": (["--model", "resnet51"], "resnet50"),
    "timm model": (["--model", "timm:resnet51"], "resnet50"),
    "device": (["--device", "tpu"], "cpu"),
    "missing gpu": (["--device", "cuda:7"], "cpu"),
    "dtype": (["--dtype", "fp8"], "fp32, bf16, fp16"),
    "mode": (["--mode", "predict"], "infer, train"),
    "contestant": (["--contestants", "quick"], "frozen"),
    "backend": (["--backend", "cutlass"], "aten"),
    "batch": (["--batch", "none"], "1,8"),
    "rounds": (["--rounds", "0"], "> 0"),
    "two sizes": (["--image-size", "32,64"], "an integer > 0"),
    "budget": (["--budget", "-1"], "> 0"),
    "no number": (["--budget", "soon"], "90s or 5m"),
    "folder": (["--images", "absent"], "absent"),
    "json is a folder": (["--json", "."], "folder"),
    "json nowhere": (["--json", "/proc/nowhere/x.json"], "/proc"),
    "option": (["--speed", "max"], "--speed"),
    "seed": (["--seed", str(2**80)], "an integer of 64 bits"),
    "chart is a folder": (["--chart", "."], "--chart .: this is a folder"),
    "chart needs a package": (["--chart", "c.png"], "--chart needs matplotlib"),
    "loader needs a package": (["--mode", "train", "--loader", "absent"], "--loader needs PIL"),
}
RACE = ("rounds", "budget", "no number", "folder", "loader needs a package")  # what the race alone reads
CASES = [
    pytest.param(*bad, kind, marks=[pytest.mark.larger] * bool(kind), id=" ".join([name, *kind]))
    for name, bad in BAD.items()
    for kind in ((), ("--profile",))
    if not kind or name not in RACE
]


@pytest.mark.parametrize(("arguments", "hint", "kind"), CASES)
def test_bad_input_is_one_line_and_exit_code_2(arguments, hint, kind, tmp_path, capsys, monkeypatch):
    """Before anything is built or written."""
    if arguments == ["--model", "timm:resnet51"]:
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "create", lambda *_: pytest.fail("built"))
    if "needs" in hint:
        package, real = hint.split()[-1], importlib.util.find_spec
        hidden = lambda name, *rest: None if name == package else real(name, *rest)  # noqa: E731
        monkeypatch.setattr("importlib.util.find_spec", hidden)
    files = [] if "--json" in arguments else ["--json", "out/b.json", "--chart", "out/b.png"]
    try:
        code = cli.main([*(SMALL if kind else TINY), *kind, *files, *arguments])
    except SystemExit as stop:  # argparse's own errors
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    lines = [line for line in captured.err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("resnet-fused") and "error: " in lines[0], captured.err
    assert hint in lines[0] and ("needs" in hint or arguments[1].removeprefix("timm:") in lines[0])
    assert captured.out == "" and list(tmp_path.iterdir()) == []


IGNORED = {
    "compare": (["--compare", "a", "b"], "--model resnet18 --seed 3 --json c.json", "--model, --seed, --json"),
    "roofline": (
        ["--roofline"],
        "--model resnet18 --device cpu --rounds 2 --chart c.png",
        "--device, --rounds, --chart",
    ),
    "profile": (["--profile"], "--images . --rounds 2 --budget 5 --loader", "--rounds, --budget, --images, --loader"),
    "check": (["--check"], "--model resnet18 --batch 2 --images . --json c.json", "--model, --batch, --images, --json"),
    "rehearse": (["--rehearse"], "--device cpu --image-size 32", "--image-size, --device"),
}


@pytest.mark.parametrize(("mode", "more", "named"), IGNORED.values(), ids=IGNORED.keys())
def test_what_a_mode_does_not_read_is_refused_by_name(mode, more, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *mode, *more.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"resnet-fused: error: {mode[0]} does not read {named}; it reads ")
    assert len(captured.err.splitlines()) == 1 and captured.out == "" and list(tmp_path.iterdir()) == []


def test_bad_pictures_stop_the_run_before_anything_is_built(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for content in (None, b"no picture"):
        if content:
            (tmp_path / "pictures" / "a.jpg").write_bytes(content)
        assert cli.main([*TINY, "--images", "pictures", "--json", "b.json"]) == 2
        captured = capsys.readouterr()
        assert len(captured.err.splitlines()) == 1 and "pictures" in captured.err and captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_no_traceback_from_the_real_command(tmp_path):
    done = run(*TINY, "--model", "alexnet", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "alexnet" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_a_forced_backend_that_cannot_run(tmp_path):
    options = ["--contestants", "fused", "--backend", "triton", "--json", "b.json"]
    done = run(*TINY, *options, cwd=tmp_path, TRITON_INTERPRET="0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("resnet-fused: error: --backend triton: ") and "TRITON_INTERPRET" in last
    assert list(tmp_path.iterdir()) == []


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"resnet-fused {resnet_fused.__version__}\n"


def test_a_full_disk_and_a_reader_that_has_gone_are_no_tracebacks(tmp_path, capsys, monkeypatch):
    def full():
        raise OSError(28, "No space left on device", "a.json")

    monkeypatch.setattr(resnet_fused, "info", full)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "resnet-fused: error: a.json: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    root = Path(cli.__file__).resolve().parents[2]
    command, environment = [sys.executable, "-m", "resnet_fused", "info"], {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, env=environment, check=False)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == b""


def test_pictures_of_ones_own(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for index, size in enumerate(((64, 300), (500, 280), (33, 33))):
        Image.effect_noise(size, 60 + 60 * index).save(tmp_path / "pictures" / f"{index}.png")
    assert cli.main([*TINY, "--contestants", "fused,frozen", "--images", "pictures", "--json", "b.json"]) == 0
    assert "pictures: 3 from pictures" in capsys.readouterr().out
    pictures = json.loads((tmp_path / "b.json").read_text())["pictures"]
    assert pictures["count"] == 3 and [row["contestant"] for row in pictures["comparisons"]] == ["fused", "frozen"]
    assert all(row["top1_agreement"] == 1.0 and row["relative_difference"] < 1e-4 for row in pictures["comparisons"])


def test_info_names_every_backend(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "triton", "compiled kernels", "reference on cpu", "aten on cpu", "cuda on cpu"):
        assert word in out


@pytest.mark.parametrize("arguments", [[], ["fly"]])
def test_no_or_unknown_command(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and "error: " in err
