"""The paper's evaluation against its definition written out, and the command from folders and checkpoints to tables."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import resnet_fused
from resnet_fused import cli, evaluate, models
from resnet_fused.evaluate import ErrorRate, classify_windows, ensemble, multi_scale, ranks, ten_crop, top_k_error
from resnet_fused.evaluate.pictures import spread

CLASSES = ("blue", "green", "red")


def timm_resnet():
    return pytest.importorskip("timm").create_model("resnet18", num_classes=5)


class Flattened(nn.Module):
    """A classifier that tells the positions in its window apart, as VGG's does."""

    def __init__(self):
        super().__init__()
        self.conv, self.avgpool = nn.Conv2d(3, 4, 3, 32, 1), nn.AdaptiveAvgPool2d((2, 2))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.conv(x).relu()), 1))


NETWORKS = {
    "ours": lambda: models.resnet18(5),
    "ours, fused": lambda: resnet_fused.fuse(models.resnet18(5)),
    "torchvision": lambda: torchvision.models.resnet18(num_classes=5),
    "timm": timm_resnet,
    "positions": Flattened,
}


@pytest.fixture(params=NETWORKS)
def network(request):
    return NETWORKS[request.param]().eval()


def by_hand(model, x, window):
    """Every square of the last activations pooled and classified by itself."""
    pool = next(m for name, m in model.named_modules() if name in ("avgpool", "global_pool"))
    kept = []
    handle = pool.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach().clone()))
    with torch.no_grad():
        model(x)
        handle.remove()
        (features,) = kept
        rows = []
        for i in range(features.shape[2] - window + 1):
            row = []
            for j in range(features.shape[3] - window + 1):
                square = features[:, :, i : i + window, j : j + window]
                handle = pool.register_forward_pre_hook(lambda _, inputs, square=square: (square,))
                row.append(model(x))
                handle.remove()
            rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


@torch.no_grad()
def test_the_classifier_is_applied_at_every_position(network):
    x = torch.randn(2, 3, 97, 128)  # activations of 4 x 4
    logits = classify_windows(network, x, window=2)
    assert logits.shape == (2, 3, 3, 5)
    torch.testing.assert_close(logits, by_hand(network, x, 2), rtol=1e-4, atol=1e-5)
    # where the window is all there is, this is the model itself; on a larger picture it is not its adaptive pool
    small = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        classify_windows(network, small, window=2)[:, 0, 0], network(small), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(logits.mean((1, 2)), network(x), rtol=1e-3, atol=1e-4)
    assert not any(m._forward_hooks for m in network.modules())


@torch.no_grad()
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_multi_scale_averages_positions_then_scales(average, flip):
    model, x = models.resnet18(5).eval(), torch.rand(2, 3, 70, 80)
    expected = []
    for scale in (64, 96):
        resized = v2.functional.resize(x, [scale], antialias=True)
        both = [resized, resized.flip(-1)] if flip else [resized]
        scores = [classify_windows(model, one, 2) for one in both]
        if average == "softmax":
            scores = [one.softmax(-1) for one in scores]
        expected.append(sum(one.mean((1, 2)) for one in scores) / len(scores))
    mean = (expected[0] + expected[1]) / 2
    mean = mean.softmax(-1) if average == "logits" else mean
    found = multi_scale(model, x, (64, 96), window=2, average=average, flip=flip)
    torch.testing.assert_close(found, mean)
    torch.testing.assert_close(found.sum(1), torch.ones(2))


@torch.no_grad()
def test_ten_crops_are_corners_centre_and_mirror_images():
    model, x = models.cifar_resnet(8).eval(), torch.randn(2, 3, 41, 36)
    tops, lefts = (0, 0, 9, 9, 4), (0, 4, 0, 4, 2)  # the centre is rounded as torchvision and Caffe do
    crops = [x[..., t : t + 32, left : left + 32] for t, left in zip(tops, lefts, strict=True)]
    expected = torch.stack([model(c).softmax(1) for crop in crops for c in (crop, crop.flip(-1))]).mean(0)
    torch.testing.assert_close(ten_crop(model, x, 32), expected)
    centre = evaluate.single_crop(model, x, 32)
    torch.testing.assert_close(centre, model(crops[-1]).softmax(1))


def test_ensemble_is_the_mean():
    a, b = torch.rand(2, 4, 3)
    torch.testing.assert_close(ensemble([a, b]), (a + b) / 2)


def test_ranks_and_top_k_agree_with_topk():
    scores, targets = torch.randn(200, 10), torch.randint(10, (200,))
    for k, error in top_k_error(scores, targets, (1, 3, 5, 10)).items():
        hit = (scores.topk(k).indices == targets[:, None]).any(1)
        assert error == ErrorRate(int((~hit).sum()), 200)


def test_ties_and_nan():
    nan = float("nan")
    scores = torch.tensor([[1.0, 1, 1], [1, 1, 1], [0, nan, 1], [nan, 2, 1], [nan, nan, nan]])
    assert ranks(scores, torch.tensor([0, 2, 2, 1, 0])).tolist() == [0, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "wrong,total,low,high",
    [(10, 100, 0.0552, 0.1744), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (11000, 50000, 0.2164, 0.2237)],
)
def test_wilson_interval(wrong, total, low, high):
    # to four digits what R's prop.test(correct = FALSE) prints
    assert ErrorRate(wrong, total).interval() == pytest.approx((low, high), abs=1e-4)
    assert ErrorRate(wrong, total).rate == wrong / total


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: multi_scale(models.resnet18(5).eval(), torch.rand(1, 3, 64, 64), (64,)), "2 x 2, smaller than.*7 x 7"),
        (lambda: multi_scale(models.resnet18(5), torch.rand(1, 3, 64, 64), ()), "scales \\(\\)"),
        (lambda: multi_scale(models.resnet18(5), torch.rand(1, 3, 64, 64), average="max"), "'softmax' or 'logits'"),
        (lambda: classify_windows(nn.Conv2d(3, 3, 1), torch.rand(1, 3, 8, 8)), "its adaptive pools are: none"),
        (lambda: classify_windows(models.resnet18(5), torch.rand(1, 3, 8, 8), pool="pool"), "no module 'pool'"),
        (lambda: ten_crop(nn.Identity(), torch.rand(1, 3, 200, 300)), "H, W >= the crop of 224"),
        (lambda: ensemble([]), "no model"),
        (lambda: ensemble([torch.rand(2, 3), torch.rand(2, 4)]), "\\(2, 3\\), \\(2, 4\\)"),
        (lambda: top_k_error(torch.rand(2, 3), torch.tensor([0, 1]), (5,)), "k = 5, but there are 3 classes"),
        (lambda: ranks(torch.rand(2, 3), torch.tensor([0, 3])), "targets from 0 to 3, but 3 classes"),
        (lambda: ranks(torch.rand(2, 3), torch.tensor([0])), "\\[N, K\\] and integers \\[N\\]"),
        (lambda: top_k_error(torch.tensor(1.0), torch.tensor(0)), "\\[N, K\\] and integers \\[N\\]"),
        (lambda: top_k_error(torch.rand(2, 3), torch.tensor([0.0, 1.0]), (1,)), "torch.float32 must be"),
        (lambda: ten_crop(nn.Identity(), torch.rand(1, 3, 8, 8), 0), "the crop of 0 >= 1"),
        (lambda: classify_windows(nn.Identity(), torch.rand(1, 3, 8, 8), 0), "a window of 0 x 0"),
        (lambda: ErrorRate(0, 0), "0 wrong of 0"),
    ],
)
def test_bad_arguments_are_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve noisy pictures of three colours, of several sizes."""
    root, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for target, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(4):
            pixels = noise.integers(0, 60, (36 + i, 40, 3))
            pixels[..., 2 - target] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(folder):
    """A small network that tells the colours apart."""
    torch.manual_seed(0)
    model = models.cifar_resnet(8, 3, shortcut="B")
    pictures, targets = map(torch.stack, zip(*((p, torch.tensor(t)) for p, t in _normalised(folder)), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(pictures), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.optim.swa_utils.update_bn([pictures], model)
    return model


def _normalised(folder):
    steps = [v2.PILToTensor(), v2.Resize(32), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True)]
    normalise = v2.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    return torchvision.datasets.ImageFolder(folder, v2.Compose([*steps, normalise]))


def run(*arguments):
    return cli.main(["evaluate", "--device", "cpu", *map(str, arguments)])


@pytest.fixture
def checkpoint(trained, tmp_path):
    path = tmp_path / "ours.pth"
    torch.save({"state_dict": trained.state_dict(), "options": {"shortcut": "B"}}, path)
    return path


def test_the_command_reads_the_colours(folder, checkpoint, tmp_path, capsys):
    name, out = f"cifar_resnet8={checkpoint}", tmp_path / "new" / "out.json"
    protocols = ("single", "ten-crop", "multi-scale")
    assert (
        run("--model", name, "--model", name, "--data", folder, "--protocol", ",".join(protocols), "--json", out) == 0
    )
    said = capsys.readouterr()
    assert "ensemble of 2" in said.out and f"wrote {out}" in said.out and "multi-scale: 12/12" in said.err
    data = json.loads(out.read_text())
    assert [(r["model"], r["protocol"]) for r in data["results"]] == [
        (m, p) for p in protocols for m in ("cifar_resnet8", "cifar_resnet8", "ensemble of 2")
    ]
    assert all(r["errors"]["top1"]["wrong"] == 0 and r["errors"]["top1"]["total"] == 12 for r in data["results"])
    assert data["command"].startswith("resnet-fused evaluate") and data["pictures"] == 12 and not data["unreadable"]
    assert len(data["models"][0]["sha256"]) == 64


@pytest.mark.parametrize("options", [["--dtype", "bf16"], ["--plain"], ["--backend", "reference"]], ids=" ".join)
def test_every_way_to_run_reads_the_colours(options, folder, checkpoint, tmp_path):
    out = tmp_path / "out.json"
    how = ["--protocol", "single,multi-scale", "--average", "logits", "--flip", "--scales", "32,40", "--batch", 5]
    assert run("--model", f"cifar_resnet8={checkpoint}", "--data", folder, "--json", out, *how, *options) == 0
    data = json.loads(out.read_text())
    assert [r["errors"]["top1"]["wrong"] for r in data["results"]] == [0, 0] and data["settings"]["scales"] == [32, 40]


def test_errors_are_those_of_the_model(folder, tmp_path):
    """An untrained network errs; the command must say exactly how often."""
    torch.manual_seed(1)
    model, out = models.cifar_resnet(8, 3), tmp_path / "out.json"
    torch.save(model.state_dict(), tmp_path / "a.pth")
    model.eval()
    wrong = sum(int(model(p[None]).argmax()) != t for p, t in _normalised(folder))
    assert 0 < wrong <= 12
    assert run("--model", f"cifar_resnet8={tmp_path / 'a.pth'}", "--data", folder, "--json", out, "--workers", 1) == 0
    assert json.loads(out.read_text())["results"][0]["errors"]["top1"]["wrong"] == wrong
    assert run("--model", f"cifar_resnet8={tmp_path / 'a.pth'}", "--data", folder, "--json", out, "--limit", 3) == 0
    assert json.loads(out.read_text())["pictures"] == 3


def test_a_limit_takes_pictures_of_every_class():
    assert spread(12, 3) == [0, 4, 8] and spread(7, 4) == [0, 1, 3, 5]
    assert spread(5, None) == spread(5, 9) == [0, 1, 2, 3, 4]


def test_unreadable_pictures_are_counted_and_named(folder, checkpoint, tmp_path, capsys):
    import shutil

    root = shutil.copytree(folder, tmp_path / "copy")
    (root / "red" / "broken.png").write_bytes(b"no picture")
    whole = (root / "red" / "1.png").read_bytes()
    (root / "blue" / "cut.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out.json"
    assert run("--model", f"cifar_resnet8={checkpoint}", "--data", root, "--json", out) == 0
    assert "2 pictures could not be read and were left out" in capsys.readouterr().out
    data = json.loads(out.read_text())
    assert sorted(one["name"].rpartition("/")[2] for one in data["unreadable"]) == ["broken.png", "cut.png"]
    assert data["pictures"] == 12 and data["results"][0]["errors"]["top1"]["wrong"] == 0
    for picture in root.glob("*/*.png"):
        picture.write_bytes(b"")
    assert run("--model", f"cifar_resnet8={checkpoint}", "--data", root) == 2
    assert "none of the 14 pictures can be read" in capsys.readouterr().err
    for picture in root.glob("red/*.png"):
        picture.unlink()
    assert run("--model", f"cifar_resnet8={checkpoint}", "--data", root) == 2
    assert "the classes red; give every class a subfolder with its pictures\n" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["ours", "torchvision", "timm"])
@pytest.mark.parametrize("form", ["bare", "wrapped", "recipe", "safetensors"])
def test_checkpoints_of_every_kind(library, form, folder, tmp_path, capsys):
    if library == "timm":
        model = pytest.importorskip("timm").create_model("resnet18", num_classes=3)
    else:
        model = torchvision.models.resnet18(num_classes=3)  # the keys are ours, too
    state, path = model.state_dict(), tmp_path / "a.pth"
    if form == "safetensors":
        path = tmp_path / "a.safetensors"
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif form == "wrapped":
        torch.save({f"module._orig_mod.{key}": value for key, value in state.items()}, path)
    else:
        torch.save(state if form == "bare" else {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1)}, path)
    name = {"ours": "resnet18", "torchvision": "torchvision:resnet18", "timm": "timm:resnet18"}[library]
    assert run("--model", f"{name}={path}", "--data", folder, "--crop", 64, "--limit", 2, "--json", tmp_path / "o") == 0
    assert "error on 2 pictures" in capsys.readouterr().out


def test_pretrained_weights_are_asked_of_the_library(folder, monkeypatch):
    asked = []

    def get_model(name, weights):
        asked.append((name, weights))
        return torchvision.models.resnet18(num_classes=3)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    assert run("--model", "torchvision:resnet18=pretrained", "--data", folder, "--limit", 1, "--crop", 64) == 0
    assert asked == [("resnet18", "DEFAULT")]


def test_a_torchvision_dataset(checkpoint, tmp_path, capsys, monkeypatch):
    class Fake(torchvision.datasets.FakeData):
        def __init__(self):
            super().__init__(6, (3, 40, 36), 3)

    monkeypatch.setattr(torchvision.datasets, "FakeData", Fake)
    assert run("--model", f"cifar_resnet8={checkpoint}", "--data", "torchvision:FakeData") == 0
    assert "error on 6 pictures" in capsys.readouterr().out


BAD = {
    "no checkpoint": (["--model", "resnet18"], "resnet18=FILE"),
    "absent checkpoint": (["--model", "resnet18=absent.pth"], "absent.pth"),
    "unknown model": (["--model", "resnet19={c}"], "resnet18"),
    "unknown library": (["--model", "keras:resnet18={c}"], "torchvision or timm"),
    "unknown torchvision model": (["--model", "torchvision:resnet19={c}"], "did you mean resnet"),
    "unknown timm model": (["--model", "timm:resnet19={c}"], "did you mean"),
    "ours pretrained": (["--model", "resnet18=pretrained"], "name a file"),
    "another network": (["--model", "cifar_resnet14={c}"], "of another network"),
    "folder": (["--data", "absent"], "absent: not a folder"),
    "empty folder": (["--data", "{empty}"], "empty: no folder of pictures in it; it takes a folder with a subfolder"),
    "dataset": (["--data", "torchvision:CIFAR11"], "CIFAR10"),
    "dataset in small letters": (["--data", "torchvision:cifar:data"], "did you mean CIFAR10, CIFAR100?"),
    "no checkpoint in it": (["--model", f"resnet18={__file__}"], "is no checkpoint: it takes a file of torch.save"),
    "dataset not there": (["--data", "torchvision:CIFAR10:absent"], "not found"),
    "protocol": (["--protocol", "twelve-crop"], "ten-crop, multi-scale"),
    "scales": (["--scales", "64,big"], "64,big"),
    "shorter side": (["--shorter-side", "16"], "smaller than the crop of 32"),
    "batch": (["--batch", "0"], "--batch 0"),
    "device": (["--device", "tpu"], "cpu"),
    "backend": (["--backend", "cutlass"], "aten"),
    "json in a file": (["--json", "{c}/out.json"], "Not a directory"),
    "json": (["--json", "{empty}"], "folder"),
    "average": (["--average", "max"], "softmax"),
    "window too large": (["--protocol", "multi-scale", "--window", "64"], "smaller than the window"),
}


@pytest.mark.parametrize("arguments,hint", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(arguments, hint, folder, checkpoint, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = [a.format(c=checkpoint, empty=empty) for a in arguments]
    defaults = {"--model": f"cifar_resnet8={checkpoint}", "--data": str(folder), "--device": "cpu"}
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    line = [item for pair in {**defaults, **given}.items() for item in pair]
    try:
        status = cli.main(["evaluate", *line])
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and hint in error[-1] and len(error) <= 1 + ("multi-scale" in line), error


def test_a_backend_that_cannot_run_here_stops_the_run_before_anything_is_read(capsys, monkeypatch):
    monkeypatch.setattr("resnet_fused.ops.unavailable", lambda backend, device: f"no {backend} on {device}")
    assert run("--model", "resnet18=absent.pth", "--data", "absent", "--backend", "cuda") == 2
    assert capsys.readouterr().err == "resnet-fused: error: --backend cuda: no cuda on cpu\n"


def test_a_full_disk_is_one_line_after_the_table(folder, checkpoint, tmp_path, capsys, monkeypatch):
    def full(value, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("resnet_fused._command.write_json", full)
    assert run("--model", f"cifar_resnet8={checkpoint}", "--data", folder, "--json", tmp_path / "a.json") == 2
    said = capsys.readouterr()
    assert "error on 12 pictures" in said.out and "wrote" not in said.out
    assert said.err.splitlines()[-1].endswith("a.json: No space left on device; not written")


def test_fewer_folders_than_outputs_are_told(folder, checkpoint, tmp_path, capsys):
    torch.save(models.cifar_resnet(8, 5).state_dict(), tmp_path / "five.pth")
    assert run("--model", f"cifar_resnet8={tmp_path / 'five.pth'}", "--data", folder) == 0
    order = "3 class folders, 5 outputs: the k-th folder in alphabetical order is taken as class k\n"
    assert capsys.readouterr().err.startswith(order)
    assert run("--model", f"cifar_resnet8={checkpoint}", "--data", folder) == 0
    assert "class folders" not in capsys.readouterr().err


def test_a_class_that_the_model_lacks_is_refused(folder, tmp_path, capsys):
    torch.save(models.cifar_resnet(8, 2).state_dict(), tmp_path / "two.pth")
    assert run("--model", f"cifar_resnet8={tmp_path / 'two.pth'}", "--data", folder) == 2
    assert "has 2 classes, but a picture is of class 2" in capsys.readouterr().err
