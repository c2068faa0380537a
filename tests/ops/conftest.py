"""Convolutions in fp32 are exact here; a test of TF32 asks for it. The kernels for CPUs are not asked for what they
have not."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """They run NHWC in fp32 and bf16; what they say of the rest, `test_cpu_norm.py` looks at."""

    def has_kernel(item):
        case = item.callspec.params if hasattr(item, "callspec") else {}
        return case.get("backend") != "cpu" or (
            case.get("layout") is not torch.contiguous_format and case.get("dtype") is not torch.float16
        )

    items[:] = filter(has_kernel, items)


@pytest.fixture(autouse=True)
def _exact_fp32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before
