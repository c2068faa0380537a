"""Loader to loss: pictures from a folder through the pipeline into training, beside the resident batch."""

import json
import time

import pytest
import torch
from networks import small_resnet
from torch import nn

from resnet_fused import cli
from resnet_fused._command import UsageError
from resnet_fused.bench import loader
from resnet_fused.bench.contestants import CONTESTANTS
from resnet_fused.bench.runner import Runner
from resnet_fused.measure import models
from resnet_fused.measure.cases import Case

CASE = Case("small", "train", 4, "fp32", "cpu", 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("pictures")
    loader.generate(home, 8)
    return home


def test_generated_pictures_are_photographs_for_the_pipeline(folder):
    files = sorted(folder.glob("*/*.jpg"))
    assert len(files) == 8 and len({file.parent for file in files}) == loader.CLASSES
    assert all(5_000 < file.stat().st_size < 200_000 for file in files)
    stream = loader.batches(folder, CASE, 0)
    for _ in range(4):  # more than one epoch
        images, labels = next(stream)
        assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32 and labels.shape == (4,)
        assert 0 <= labels.min() and labels.max() < loader.CLASSES and 0.1 < images.std() < 3


def test_the_step_trains_on_what_it_is_fed():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    first, second = torch.randn(2, 4, 3, 32, 32)
    labels = torch.tensor([0, 1, 2, 3])
    plain = CONTESTANTS["eager-channels-last"]
    fed, before = Runner(plain, model, CASE, first, labels), first.clone()
    fed.feed(second, labels.flip(0))
    assert torch.equal(first, before) and labels.tolist() == [0, 1, 2, 3]  # the caller's own
    expected = Runner(plain, model, CASE, second, labels.flip(0))
    assert torch.equal(fed.step(), expected.step())


def test_three_rates_a_contestant(folder):
    def runner(name):
        return lambda: Runner(
            CONTESTANTS[name], small_resnet().cpu(), CASE, torch.randn(4, 3, 32, 32), torch.zeros(4).long()
        )

    names = ("eager-channels-last", "fused")
    rows = loader.measure(CASE, {name: runner(name) for name in names}, folder, 0, rounds=2, steps=2)
    assert [row["contestant"] for row in rows] == list(names)
    for row in rows:
        rates = [row[name]["images_per_s"] for name in ("resident", "loader", "loader_to_loss")]
        assert all(rate > 0 for rate in rates)
        assert all(len(row[name]["samples"]) == 2 for name in ("resident", "loader", "loader_to_loss"))
    assert rows[0]["loader"] == rows[1]["loader"]  # one pipeline for all


class _Sleeps:
    """A runner whose step takes 20 ms."""

    fed = 0

    def step(self):
        time.sleep(0.02)

    warm_up = step

    def feed(self, images, labels):
        self.fed += 1


def test_the_rates_are_those_of_their_parts(monkeypatch):
    def slow(*_):
        while True:
            time.sleep(0.03)
            yield torch.zeros(1), torch.zeros(1)

    monkeypatch.setattr(loader, "batches", slow)
    runner = _Sleeps()
    (row,) = loader.measure(CASE, {"fused": lambda: runner}, None, 0, rounds=3, steps=4)
    for name, milliseconds in (("resident", 20), ("loader", 30), ("loader_to_loss", 50)):
        best = max(row[name]["samples"])  # others use this machine: it may be slower, never faster
        assert 0.4 * CASE.batch / milliseconds * 1e3 < best <= CASE.batch / milliseconds * 1e3
    assert runner.fed == 3 * (4 + 1)
    (line,) = loader.lines([row])
    assert "the input pipeline bounds it" in line and "0 worker processes" in line


def test_processes_by_default():
    assert loader.Source().processes(torch.device("cpu")) == 0
    assert 1 <= loader.Source().processes(torch.device("cuda")) <= loader.MAX_WORKERS
    assert loader.Source(workers=3).processes(torch.device("cpu")) == 3


def test_worker_processes_load_too(folder):
    stream = loader.batches(folder, CASE, 1)
    assert next(stream)[0].shape == (4, 3, 32, 32)
    stream.close()


TINY = ["bench", "--model", "resnet18", "--image-size", "32", "--batch", "2", "--device", "cpu", "--rounds", "1"]


def test_the_table_and_the_json_carry_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "create", lambda name, seed: small_resnet(classes=1000).cpu().eval())
    monkeypatch.setattr("resnet_fused.bench.images.load_samples", lambda: None)
    command = [*TINY, "--mode", "train", "--contestants", "fused", "--loader", str(folder), "--json", "b.json"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert out.count("loader to loss, train, batch 2, fp32, ") == 2 and "bounds it" in out
    rows = json.loads((tmp_path / "b.json").read_text())["loader"]
    assert [row["contestant"] for row in rows] == ["eager-channels-last", "fused"]
    from resnet_fused.bench import schema

    assert list(schema.load(tmp_path / "b.json").loader) == rows


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--mode", "train", "--loader", "absent"], "absent"),
        (
            ["--mode", "train", "--loader", "."],
            "--loader .: no folder of pictures in it",
        ),
        (["--mode", "infer", "--loader"], "--mode train"),
        (["--mode", "train", "--loader", "--workers", "0"], "--workers"),
        (["--mode", "train", "--workers", "2"], "--loader"),
        (["--mode", "train", "--loader", "--profile"], "--profile"),
    ],
)
def test_bad_input_is_one_line(arguments, hint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*TINY, *arguments]) == 2
    captured = capsys.readouterr()
    assert hint in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""
    with pytest.raises(UsageError):
        loader.check(tmp_path)
