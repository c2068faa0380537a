"""The training recipes and the degradation study at small scale: what they measure is what they say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import resnet_fused
from resnet_fused import cli, models

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def example():
    """Imports an example by name, as running it would."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def study(example):
    degradation = example("degradation")
    return degradation.Study(degradation.digits(), epochs=1, seed=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`train/` and `val/` of three colours."""
    root, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split in ("train", "val"):
        for target in range(3):
            (root / split / f"c{target}").mkdir(parents=True)
            for i in range(8):
                pixels = noise.integers(0, 60, (36 + i, 40, 3))
                pixels[..., target] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / f"c{target}" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def recorded(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    assert example("degradation").main(["--depths", "8,26", "--epochs", "3", "--device", "cpu", "--out", str(out)]) == 0
    return out, json.loads((out / "degradation.json").read_text())


@pytest.mark.larger
def test_a_deeper_plain_net_is_worse_and_a_deeper_residual_net_is_not(recorded):
    curves = {(c["family"], c["depth"]): c for c in recorded[1]["curves"]}
    assert curves["plain", 26]["train_error"][-1] > curves["plain", 8]["train_error"][-1] + 20
    assert curves["residual", 26]["train_error"][-1] < curves["plain", 26]["train_error"][-1] - 20
    assert curves["residual", 26]["train_error"][-1] < curves["residual", 8]["train_error"][-1] + 10


@pytest.mark.larger
def test_fused_and_plain_modules_give_the_same_curves(recorded):
    for one in recorded[1]["drift"]:
        plain, nchw, fused, reference = (np.array(run["steps"]) for run in one["runs"].values())
        assert len(plain) == 12
        assert np.array_equal(fused, plain)  # native PyTorch operators either way, on a CPU
        apart, yardstick = np.abs(reference - plain), np.abs(nchw - plain)
        assert 0 < apart.max() and apart[0] < 1e-5  # other sums, before any step has amplified their rounding
        assert apart.max() < 10 * yardstick.max()  # and no further apart later than a plain net from itself
    residual = recorded[1]["drift"][1]
    assert residual["family"] == "residual" and apart[:4].max() < 1e-4


@pytest.mark.larger
def test_the_charts_are_drawn_and_redrawn(example, recorded, tmp_path):
    out, data = recorded
    degradation = example("degradation")
    assert data["command"].startswith("python examples/degradation.py --depths 8,26")
    assert degradation.main(["--redraw", str(out / "degradation.json"), "--out", str(tmp_path)]) == 0
    for part in degradation.PARTS:
        pictures = [np.asarray(Image.open(at / f"degradation_{part}.png").convert("RGB")) for at in (out, tmp_path)]
        assert pictures[0].shape == pictures[1].shape and (pictures[0] < 250).any(axis=2).mean() > 0.01


def test_gradient_norms_are_those_of_the_loss(example, study):
    """Against the definition: the loss's change along the gradient, by central differences in float64."""
    degradation = example("degradation")
    model = study.network("residual", 8)
    norms = degradation.gradient_norms(study, model)
    assert len(norms) == 7
    model = study.network("residual", 8).double()
    pictures, targets = (v.double() if v.is_floating_point() else v for v in study.batch())
    weight = model.layer2[0].conv1.weight

    def loss():
        return torch.nn.functional.cross_entropy(model.train()(pictures), targets)

    loss().backward()
    direction, step = weight.grad / weight.grad.norm(), 1e-5
    with torch.no_grad():
        weight += step * direction
        above = loss()
        weight -= 2 * step * direction
        below = loss()
    assert norms[3] == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-3)


def test_responses_are_batch_norms_outputs(example, study):
    """Fresh batch norms in training mode give responses of deviation 1; trained scales give those of their gammas."""
    model = study.network("residual", 8)
    norms = [norm for _, norm in example("degradation").layers(model)]
    study.fit(model, 1)
    for norm in norms:
        torch.nn.init.constant_(norm.weight, 2.0)
        torch.nn.init.zeros_(norm.bias)
    torch.optim.swa_utils.update_bn([study.batch()[0]] * 4, model)
    found = example("degradation").response_deviations(study, model)
    assert len(found) == len(norms) - 1 == 6
    # running variances are the batch's own but for Bessel's correction, of few pixels in the last stage
    assert found == pytest.approx([2.0] * 6, rel=0.05)


@pytest.mark.larger
def test_zero_initialised_branches_are_measured_as_the_identity(recorded):
    found = recorded[1]["zero_init"]
    assert found["distance_from_identity"] == 0
    # the second convolutions are behind a zero: no gradient reaches them, nor the first ones, in the first step
    assert found["gradients"][0] > 0 and max(found["gradients"][1:]) == 0


def test_plain_modules_are_called_one_by_one(example, study):
    plain = example("degradation").Study(study.data, 1, 0, study.device, plain_modules=True)
    model, fused = plain.network("residual", 8), study.network("residual", 8)
    with resnet_fused.use_backend("reference"):  # which the hooks keep out of the plain one
        apart = plain.fit(model, 1)["steps"], study.fit(fused, 1)["steps"]
    assert apart[0] == study.fit(study.network("residual", 8), 1)["steps"] != apart[1]


def test_one_seed_one_batch_order_and_weights(study):
    first, second = (study.network("plain", 8).state_dict() for _ in range(2))
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    (a, _), (b, _) = study.batch(3), study.batch(3)
    assert torch.equal(a, b) and not torch.equal(a, study.batch(4)[0])


@pytest.mark.parametrize("recipe,depths", [("cifar", "8"), pytest.param("imagenet", "18", marks=pytest.mark.larger)])
def test_the_study_on_folders(example, recipe, depths, folder, tmp_path):
    options = ["--depths", depths, "--epochs", "1", "--parts", "curves,gradients,zero_init", "--workers", "0"]
    options += ["--device", "cpu", "--recipe", recipe, "--crop", "32", "--out", str(tmp_path)]
    assert example("degradation").main(["--data", str(folder), *options]) == 0
    data = json.loads((tmp_path / "degradation.json").read_text())
    assert {c["family"] for c in data["curves"]} == {"plain", "residual"} and len(data["gradients"]) == 2
    assert data["zero_init"]["distance_from_identity"] == 0
    assert not (tmp_path / "degradation_drift.png").exists()


@pytest.mark.parametrize(
    "recipe,model,extra", [("cifar", "cifar_resnet8", []), ("imagenet", "resnet18", ["--crop", "32"])]
)
def test_a_recipe_trains_a_checkpoint_that_can_be_evaluated(example, recipe, model, extra, folder, tmp_path, capsys):
    out = tmp_path / "trained.pth"
    options = ["--iterations", "6", "--batch", "8", "--workers", "0", "--device", "cpu", "--shortcut", "B", *extra]
    line = ["--recipe", recipe, "--model", model, "--data", str(folder), "--out", str(out), *options]
    assert example("train_paper").main(line) == 0
    said = capsys.readouterr().out
    assert "6/6" in said and "averaged statistics" in said
    saved = torch.load(out, weights_only=True)
    report = tmp_path / "o.json"
    line = ["evaluate", "--model", f"{model}={out}", "--data", str(folder / "val"), "--json", str(report), *extra]
    assert cli.main([*line, "--device", "cpu"]) == 0
    found = json.loads(report.read_text())["results"][0]["errors"]["top1"]["rate"]
    assert found == pytest.approx(saved["error"], abs=1e-9)


def test_the_schedules_are_the_papers(example):
    """CIFAR: a tenth at a half and three quarters, 0.01 first for 110 layers. ImageNet: when the error stands still."""
    train_paper = example("train_paper")

    class Still(train_paper.Trainer):
        """Learns nothing."""

        def __init__(self, warm_up, wrong):
            super().__init__(torch.nn.Conv2d(1, 1, 1), torch.device("cpu"), torch.float32, warm_up)
            self.wrong, self.rates = wrong, []

        def step(self, *_):
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            return 1.0, self.wrong

        def error(self, _):
            return 0.5

    batches = [(None, None)] * 4

    def rates(recipe, iterations, warm_up=False, error=0.5):
        trainer = Still(warm_up, error)
        list(train_paper.train(trainer, train_paper.RECIPES[recipe], iterations, batches, None))
        return trainer.rates

    assert rates("cifar", 16) == pytest.approx([0.1] * 8 + [0.01] * 4 + [0.001] * 4)
    assert rates("cifar", 16, warm_up=True) == pytest.approx([0.01] * 4 + [0.1] * 4 + [0.01] * 4 + [0.001] * 4)
    assert rates("cifar", 8, warm_up=True, error=0.9)[:4] == pytest.approx([0.01] * 4)
    still = rates("imagenet", 60)
    assert still[0] == 0.1 and still[-1] < 0.02 and len(set(np.round(still, 9))) >= 2
    group = train_paper.sgd(torch.nn.Linear(1, 1)).param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)


def test_an_interrupted_training_goes_on(example, folder, tmp_path, monkeypatch, capsys):
    train_paper, out = example("train_paper"), tmp_path / "trained.pth"
    options = ["--batch", "8", "--workers", "0", "--device", "cpu", "--data", str(folder), "--out", str(out)]
    line = ["--recipe", "cifar", "--model", "cifar_resnet8", "--iterations", "9", *options]
    step = train_paper.Trainer.step

    def interrupted(self, *batch):
        if self.iteration == 7:
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(train_paper.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_paper.main(line)
    assert not out.exists()
    left = torch.load(f"{out}.partial", weights_only=True)
    assert left["iteration"] == 6 and left["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.01)
    monkeypatch.setattr(train_paper.Trainer, "step", step)
    capsys.readouterr()
    assert train_paper.main([*line, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "9/9" in said and "3/9" not in said and "6/9" not in said
    assert out.exists() and [path.name for path in tmp_path.iterdir()] == ["trained.pth"]


def test_final_statistics_are_means_over_training_batches(example):
    train_paper = example("train_paper")
    trainer = train_paper.Trainer(models.cifar_resnet(8), torch.device("cpu"), torch.float32)
    pictures = torch.randn(24, 3, 32, 32)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pictures, torch.zeros(24)), 8)
    trainer.average_statistics(batches)
    with torch.no_grad():
        means = [trainer.model.conv1(chunk).mean((0, 2, 3)) for chunk in pictures.split(8)]
    torch.testing.assert_close(trainer.model.bn1.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)


def test_augmentations_are_the_papers(example):
    train_paper = example("train_paper")
    torch.manual_seed(0)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3)).astype(np.uint8))
    imagenet = train_paper.transforms("imagenet", 224, True)
    assert imagenet(picture).shape == (3, 224, 224)
    sides = imagenet.transforms[0].min_size
    assert (min(sides), max(sides)) == (256, 480)
    assert train_paper.transforms("imagenet", 224, False)(picture).shape == (3, 224, 224)
    white = torch.ones(3, 4, 4)
    steps = torch.stack([train_paper.Lighting()(white)[:, 0, 0] - 1 for _ in range(4000)])
    vectors, values = torch.tensor(train_paper.Lighting.VECTORS), torch.tensor(train_paper.Lighting.VALUES)
    expected = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    torch.testing.assert_close(steps.T.cov(), expected, rtol=0.15, atol=2e-6)
    small = picture.resize((32, 32))
    shifted = torch.stack([train_paper.transforms("cifar", 32, True)(small) for _ in range(40)])
    assert shifted.shape == (40, 3, 32, 32) and len({s.sum().item() for s in shifted}) > 20


@pytest.mark.parametrize(
    "script,arguments,hint",
    [
        ("degradation", ["--depths", "21"], "21 is not 6n + 2"),
        ("degradation", ["--epochs", "0"], "--epochs 0"),
        ("degradation", ["--parts", "curve"], "curves"),
        ("degradation", ["--data", "absent"], "absent"),
        ("train_paper", ["--recipe", "cifar", "--model", "cifar_resnet8", "--data", "absent", "--out", "x"], "absent"),
        ("train_paper", ["--recipe", "caffe", "--model", "resnet18", "--data", "a", "--out", "x"], "cifar"),
    ],
)
def test_bad_arguments_are_one_clear_error(example, script, arguments, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        example(script).main(arguments)
    assert stop.value.code == 2 and hint in capsys.readouterr().err
