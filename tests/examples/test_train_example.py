"""The training example on a generated folder of tiny pictures."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiers import larger

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train.py"
CLASSES = {"dark": 40, "light": 215}

# A script, and the threads it leaves behind: those of a process group crash the interpreter's end, now and then.
WATCHED = r"""
import atexit, os, pathlib, runpy, sys

def threads():
    names = [task.joinpath("comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir()]
    sys.stdout.flush()
    os.write(1, f"threads at the end: {sorted(names)}\n".encode())  # in one piece: two processes write here

atexit.register(threads)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("train_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_example"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes that brightness tells apart: 12 pictures each to train on, 3 to validate."""
    root, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 3)):
        for name, level in CLASSES.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(noise.normal(level, 30, (36, 44, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def arguments(data, out, *more):
    tiny = ("--model", "resnet18", "--size", "32", "--batch", "8", "--epochs", "3", "--warmup", "1", "--lr", "0.02")
    return [str(data), "--out", str(out), "--workers", "0", "--quiet", *tiny, *map(str, more)]


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def flat(value, path=""):
    """All leaves of nested dicts and lists, by their path."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, child in items for k, v in flat(child, f"{path}/{key}").items()}
    return {path: value}


@pytest.mark.parametrize(
    "options",
    [
        ("--fuse", "--ema", 0.5),
        ("--no-fuse", "--schedule", "step", "--step", 1, "--workers", 1),
        ("--fuse", "--amp", "bf16", "--smoothing", 0.1, "--ema", 0.9),
    ],
    ids=["fused, ema", "plain, step, a worker", "fused, bf16, ema"],
)
def test_a_resumed_run_is_the_uninterrupted_one(train, data, tmp_path, options):
    whole, parts, options = tmp_path / "whole", tmp_path / "parts", (*options, "--model", "timm:test_resnet")
    assert train.main(arguments(data, whole, *options)) == 0
    assert train.main(arguments(data, parts, *options, "--until", 1)) == 0
    assert checkpoint(parts)["epoch"] == 1
    assert train.main(arguments(data, parts, *options, "--resume")) == 0
    expected, actual = flat(checkpoint(whole)), flat(checkpoint(parts))
    assert list(expected) == list(actual) and expected["/epoch"] == 3
    for name, value in expected.items():
        same = torch.equal(value, actual[name]) if isinstance(value, torch.Tensor) else value == actual[name]
        assert same, name


def test_it_learns_and_fused_is_plain(train, data, tmp_path, capsys):
    losses = {}
    for option in ("--fuse", "--no-fuse"):
        assert train.main(arguments(data, tmp_path / option, option, "--epochs", 4, "--lr", 0.01)) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
        losses[option] = [float(line.split("loss ")[1].split()[0]) for line in lines]
        assert "epoch 4/4" in lines[-1] and "pictures/s" in lines[-1]
    assert losses["--fuse"][-1] < losses["--fuse"][0]
    # the first epoch; rounding grows from there
    assert losses["--fuse"][0] == pytest.approx(losses["--no-fuse"][0], rel=1e-3)
    plain = train.build("resnet18", 2)
    plain.load_state_dict(checkpoint(tmp_path / "--fuse")["model"])  # strict: plain PyTorch reads it


def test_the_schedules(train):
    options = train.parse(["data", "--epochs", "10", "--warmup", "2"])
    factor = train.learning_rate(options, 4)
    assert [factor(step) for step in (0, 3, 7, 8)] == [1 / 8, 0.5, 1.0, 1.0]
    assert factor(24) == pytest.approx(0.5) and factor(40) == pytest.approx(0)
    factor = train.learning_rate(train.parse(["data", "--schedule", "step", "--step", "3", "--warmup", "0"]), 4)
    assert [factor(step) for step in (0, 11, 12, 24)] == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize(
    "more,message",
    [
        (["--model", "resnet81"], "--model resnet81: unknown; did you mean resnet18"),
        (["--model", "jax:resnet18"], "unknown library 'jax'; choose torchvision or timm"),
        (["--batch", "25"], "24 pictures, fewer than a batch of 25 for each of 1 processes"),
        (["--resume"], "there is no"),
    ],
)
def test_mistakes_are_named(train, data, tmp_path, capsys, more, message):
    assert train.main(arguments(data, tmp_path / "out", *more)) == 1
    assert message in capsys.readouterr().err


def test_a_folder_that_is_none_is_named(train, data, tmp_path, capsys):
    assert train.main(arguments(tmp_path / "nowhere", tmp_path / "out")) == 1
    assert "expected" in capsys.readouterr().err
    (tmp_path / "other" / "train").mkdir(parents=True)
    (tmp_path / "other" / "val").mkdir()
    assert train.main(arguments(tmp_path / "other", tmp_path / "out")) == 1
    assert "find any class folder" in capsys.readouterr().err
    for name in CLASSES:
        (tmp_path / "other" / "train" / name).symlink_to(data / "train" / name)
    (tmp_path / "other" / "val" / "dark").symlink_to(data / "val" / "dark")
    assert train.main(arguments(tmp_path / "other", tmp_path / "out")) == 1
    assert "different classes; 1 are in one only, such as 'light'" in capsys.readouterr().err


def test_a_checkpoint_is_neither_overwritten_nor_taken_for_another_runs(train, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main(arguments(data, out, "--until", 1)) == 0
    assert train.main(arguments(data, out)) == 1
    assert "exists; --resume goes on with it" in capsys.readouterr().err
    assert train.main(arguments(data, out, "--resume", "--lr", 0.5)) == 1
    assert "was made with lr 0.02, not 0.5" in capsys.readouterr().err
    assert train.main(arguments(data, out, "--resume", "--no-fuse", "--until", 2)) == 0


@pytest.mark.parametrize("option,value", [("--epochs", "0"), ("--batch", "0"), ("--ema", "1")])
def test_impossible_numbers_are_refused(train, option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["data", option, value])
    assert stop.value.code == 2 and f"{option} {value}" in capsys.readouterr().err


def test_sync_bn_on_a_cpu_is_refused(train, data, tmp_path):
    options = train.parse(arguments(data, tmp_path, "--sync-bn"))
    with pytest.raises(train.Problem, match="--sync-bn needs GPUs"):
        train.Trainer(options, train.Place(0, 2, torch.device("cpu")))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo")
@pytest.mark.parametrize("begun_by", [larger("one process"), larger("torchrun")])
def test_two_processes_of_torchrun(train, data, tmp_path, begun_by):
    def torchrun(*more):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        watched = tmp_path / "watched.py"
        watched.write_text(WATCHED)
        command = [*launcher, str(watched), str(SCRIPT)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        done = subprocess.run([*command, *run, *more], capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("threads at the end: ['python'") == 2 and "gloo" not in done.stdout, done.stdout
        return done.stdout

    run = arguments(data, tmp_path, "--epochs", "2", "--ema", "0.5")
    if begun_by == "torchrun":
        torchrun("--until", "1")
    else:
        assert train.main([*run, "--until", "1"]) == 0
        alone = checkpoint(tmp_path)
        torch.save(alone | {"options": alone["options"] | {"world": 2}}, tmp_path / "checkpoint.pt")
    begun = checkpoint(tmp_path)
    assert torchrun("--resume").count("epoch 2/2") == 1, "one process speaks"
    ended = checkpoint(tmp_path)
    assert list(flat(ended)) == list(flat(begun)) and (ended["epoch"], ended["options"]["world"]) == (2, 2)
