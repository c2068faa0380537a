"""The plan: pure functions of shape, dtype and architecture."""

import pytest
import torch

from resnet_fused import plan
from resnet_fused.plan.conv import ConvShape


@pytest.mark.parametrize("arch,expected", [(80, True), (86, True), (90, True), (100, False), (120, False)])
def test_a_1x1_takes_the_normalisation_as_a_prologue_up_to_sm_90(arch, expected):
    pointwise = ConvShape(256, 64, 56, 56, 256, 1, 1)
    fusion = plan.training(pointwise, torch.bfloat16, arch)
    assert fusion == plan.Fusion(prologue=expected, statistics=True, dgrad_epilogue=True, dgrad_prologue=False)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_a_3x3_reads_an_activation_that_was_written_normalised(arch):
    assert not plan.training(ConvShape(256, 64, 56, 56, 64, 3, 3, padding=(1, 1)), torch.bfloat16, arch).prologue
