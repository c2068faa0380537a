"""The examples do what they promise."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("digits", ROOT / "examples" / "digits.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["digits"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def assert_they_learn_alike(digits, outcomes):
    assert all(run.accuracy >= 0.97 for run in outcomes.values())
    assert all(run.losses[-1] < 0.1 < 1 < run.losses[0] for run in outcomes.values())
    assert max(digits.differences(outcomes)[:10]) < 1e-4


@pytest.mark.larger
def test_both_runs_read_the_held_out_digits_and_learn_alike(digits, tmp_path, capsys, monkeypatch):
    from PIL import Image

    chart, outcomes, compare = tmp_path / "digits.png", {}, digits.compare
    monkeypatch.setattr(digits, "compare", lambda *options: outcomes.update(compare(*options)) or outcomes)
    assert digits.main(["--epochs", "8", "--seed", "1", "--chart", str(chart)]) == 0
    assert "plain" in capsys.readouterr().out
    assert_they_learn_alike(digits, outcomes)
    pixels = np.asarray(Image.open(chart).convert("RGB")).astype(int)
    for colour in ((0xF0, 0xA8, 0x40), (0x1B, 0x4F, 0x8A)):
        assert (np.abs(pixels - colour).max(axis=2) < 40).sum() > 200


@pytest.mark.larger
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_plain_and_fused_learn_alike(digits, backend):
    assert_they_learn_alike(digits, digits.compare(epochs=8, seed=0, backend=backend))


def test_the_example_really_fuses(digits):
    import resnet_fused

    model = resnet_fused.fuse(digits.small_resnet())
    assert len(resnet_fused.report(model).fused) == 7 and not resnet_fused.report(model).skipped


def test_zero_epochs_are_refused(digits, capsys):
    with pytest.raises(SystemExit) as stop:
        digits.main(["--epochs", "0"])
    assert stop.value.code == 2 and "--epochs 0" in capsys.readouterr().err
