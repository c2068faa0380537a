"""The recipes run and do what they say; every one is on the page that lists them."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torchvision

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "examples").exists(), reason="no checkout around these tests")


def recipe(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.larger
def test_finetune(tmp_path, capsys):
    pytest.importorskip("sklearn")
    file = tmp_path / "new" / "weights.pt"
    accuracy = recipe("finetune").main(["--epochs", "3", "--pictures", "400", "--out", str(file)])
    assert accuracy > 0.5  # of ten classes
    plain = torchvision.models.resnet18(num_classes=10)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert "9 modules fused, 0 left alone" in capsys.readouterr().out


def test_serve(capsys):
    worst = recipe("serve").main(["--model", "resnet18", "--side", "64", "--requests", "4"])
    assert worst < 1e-4 and "4 requests of 3 shapes" in capsys.readouterr().out


@pytest.mark.larger
def test_backbones():
    for name, (plain, ours) in recipe("backbones").main(["--side", "96"]).items():
        assert len(plain), name
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


def test_every_example_is_on_the_page():
    page = (ROOT / "docs" / "recipes.md").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        if path.stem not in ("degradation_charts",):  # a part of degradation.py
            assert f"(../examples/{path.name})" in page
