"""What goes wrong in an evaluation stays where it went wrong."""

import pytest
import torch
from networks import small_resnet
from PIL import Image

from resnet_fused.cli import evaluate as command
from resnet_fused.evaluate.run import Settings, evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


class _Pictures:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Image.new("RGB", (40, 40)), index % 3


class _Fails(torch.nn.Module):
    def __init__(self, after):
        super().__init__()
        self.model, self.after, self.calls = small_resnet(classes=3).cpu().eval(), after, 0

    def forward(self, x):
        self.calls += 1
        if self.calls > self.after:
            raise RuntimeError("out of memory\nin a layer")
        return self.model(x)


def evaluated(*networks, protocols=("single", "ten-crop"), **settings):
    named = [(f"net{index}", one) for index, one in enumerate(networks)]
    how = Settings(shorter_side=32, crop=32, batch=2, **settings)
    return evaluate(named, _Pictures(), protocols, how)


def test_a_model_that_fails_in_an_evaluation_leaves_the_others_theirs():
    good = small_resnet(classes=3).cpu().eval()
    rows = {(row.model, row.protocol): row for row in evaluated(good, _Fails(3)).rows}
    assert rows["net1", "single"].problem is None and rows["net1", "ten-crop"].problem == "out of memory in a layer"
    assert rows["ensemble of 2", "single"].errors and not rows["ensemble of 2", "ten-crop"].errors
    assert rows["ensemble of 2", "ten-crop"].problem == "net1: out of memory in a layer"
    assert all(rows["net0", protocol].errors[1].total == 4 for protocol in ("single", "ten-crop"))
    few = small_resnet(classes=2).cpu().eval()
    rows = {row.model: row for row in evaluated(good, few, protocols=["single"]).rows}
    assert rows["net0"].errors and "net1 has 2 classes" in rows["net1"].problem
    with pytest.raises(ValueError, match="out of memory in a layer"):
        evaluated(_Fails(0), _Fails(0))


def test_the_window_of_one_model_is_not_the_others():
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.Flatten())  # has no pool to make dense
    rows = {r.model: r for r in evaluated(small_resnet(classes=3).cpu().eval(), plain, protocols=["multi-scale"]).rows}
    assert rows["net0"].errors and rows["net1"].problem


def test_ctrl_c_in_an_evaluation_shows_what_is_done():
    class Stops(_Fails):
        def forward(self, x):
            if x.shape[0] > 2:
                raise KeyboardInterrupt
            return self.model(x)

    found = evaluated(Stops(0))
    assert found.interrupted and [row.protocol for row in found.rows] == ["single"]
    with pytest.raises(KeyboardInterrupt):
        evaluated(Stops(0), protocols=["ten-crop"])


def test_pictures_that_would_not_fit_are_refused_before_anything_is_evaluated():
    settings = Settings(shorter_side=100_000, crop=32, batch=2)
    with pytest.raises(ValueError, match="--shorter-side 100000.*one batch needs about 120.0 GB"):
        command._check_memory(settings, ("single",))
    command._check_memory(Settings(), ("single", "ten-crop", "multi-scale"))
