"""Convolutions in fp32 are exact here; a test of TF32 asks for it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _exact_fp32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before
