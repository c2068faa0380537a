"""A small network with blocks and chains, and the same one fused."""

import copy

import pytest
import torch
from small_net import Net

from resnet_fused import fuse


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def fused(plain):
    return fuse(copy.deepcopy(plain))
