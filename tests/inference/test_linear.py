"""Linear layers of a frozen network on our kernel for CPUs: what they compute, and where they stay PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import assert_no_worse
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from resnet_fused import freeze, use_backend
from resnet_fused.inference import linear
from resnet_fused.inference.linear import FrozenLinear
from resnet_fused.ops import cpu

SUPPORTED = cpu.supported()
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="no AVX2, or the kernels for CPUs are not built")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif("bfloat16" not in SUPPORTED, reason=""))]


class _Net(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.AdaptiveAvgPool2d(1)
        self.head = head

    def forward(self, x):
        return self.head(torch.flatten(self.pool(self.bn(self.conv(x))), 1))


def _net(head, dtype=torch.float32):
    torch.manual_seed(0)
    return _Net(head).eval().to(dtype), torch.randn(3, 3, 8, 8).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1, 10, 1000])
def test_a_classifier_is_no_worse_than_native_pytorch_and_counts_the_same(outputs, bias, dtype):
    model, x = _net(nn.Linear(48, outputs, bias), dtype)
    frozen = freeze(model, x)
    assert isinstance(frozen.network.head, FrozenLinear)
    for given in (x, x[:1], x[:0]):
        y = frozen(given)
        assert y.shape == (len(given), outputs) and y.dtype == dtype and y.is_contiguous()
        with torch.no_grad():
            assert_no_worse(y, nn.Module.__call__, (model, given))
    assert torch.equal(copy.deepcopy(frozen)(x), frozen(x))
    counts = []
    for network in (model, frozen):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.skipif("bfloat16" not in SUPPORTED, reason="this CPU has no bfloat16")
def test_under_autocast_it_is_packed_in_autocasts_dtype():
    model, x = _net(nn.Linear(48, 10))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        frozen, expected = freeze(model, x), model(x)
    assert frozen.network.head.dtype == torch.bfloat16
    y = frozen(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_a_nan_and_an_infinity_stay_what_they_are():
    model, x = _net(nn.Linear(48, 10))
    frozen = freeze(model, x)
    x[0, 0, 3, 3], x[1, 1, 3, 3] = torch.nan, torch.inf
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), equal_nan=True)


class _Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).flatten(2).transpose(1, 2))


def test_rows_in_more_dimensions_and_errors_are_native_pytorchs():
    model, x = _Tokens().eval(), torch.randn(2, 3, 4, 4)
    frozen = freeze(model, x)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x))
    head, plain = frozen.network.head, model.head
    assert isinstance(head, FrozenLinear)
    for wrong in (torch.randn(2, 9), torch.randn(2, 8).double(), torch.ones(2, 8, dtype=torch.long)):
        with pytest.raises(RuntimeError) as expected:
            plain(wrong)
        with pytest.raises(RuntimeError) as found:
            head(wrong)
        assert str(found.value) == str(expected.value)


class _Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("kind", ["subclass", "hook", "parametrization", "large", "half", "forced"])
def test_what_is_not_plain_stays_as_it_is(kind, monkeypatch):
    head = _Own(48, 10) if kind == "subclass" else nn.Linear(48, 10)
    if kind == "parametrization":
        parametrizations.weight_norm(head)
    model, x = _net(head, torch.float16 if kind == "half" else torch.float32)
    if kind == "hook":
        head.register_forward_hook(lambda *_: None)
    if kind == "large":
        monkeypatch.setattr(linear, "LARGEST", 479)
    with use_backend("aten" if kind == "forced" else "auto"):
        frozen = freeze(model, x)
    assert not any(isinstance(module, FrozenLinear) for module in frozen.modules())
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-3, atol=1e-3)


def test_the_parameters_are_still_there():
    model, x = _net(nn.Linear(48, 10))
    frozen = freeze(model, x)
    with pytest.warns(UserWarning, match="frozen"):
        state = frozen.state_dict()
    assert torch.equal(state["network.head.weight"], model.head.weight)
    assert not [name for name in state if "packed" in name]
