"""Operations of a step, counted without running it."""

import pytest

from resnet_fused.measure import network, roof
from resnet_fused.measure.cases import Case


@pytest.mark.parametrize("name,products", [("resnet50", 4.089e9), ("resnext50_32x4d", 4.230e9)])
def test_flops_are_the_known_ones(name, products):
    model = network.build(name)
    forward = roof.flops(model, Case(name, "infer", 2, "fp32", "cpu"))
    assert forward == pytest.approx(2 * 2 * products, rel=1e-3)
    both = roof.flops(model, Case(name, "train", 1, "fp32", "cpu"))
    assert 2.8 < both / (forward / 2) < 3.0  # dgrad and wgrad, but no dgrad for the images
