"""Training steps under autocast and with a GradScaler, on plain and fused networks side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from contract import assert_no_worse
from networks import DEVICE, pictures, quick_backends, small_resnet
from torch import Tensor, nn

from resnet_fused import fuse, use_backend
from resnet_fused.contract import changed


def _pair() -> tuple[nn.Module, nn.Module]:
    plain = small_resnet()
    return plain, fuse(copy.deepcopy(plain))


def _whole(results: dict[str, Tensor | None]) -> Tensor:
    return torch.cat([t.double().flatten() for t in results.values() if t is not None and t.is_floating_point()])


def _assert_no_worse(actual: dict, plain: Callable[..., dict], arguments: Sequence[Any]) -> None:
    """In half precision the contract holds for a whole step in the Euclidean norm: single elements flip their mask."""
    dtypes = {k: v if v is None else v.dtype for k, v in plain(*changed(arguments, lambda t: t)).items()}
    assert {k: v if v is None else v.dtype for k, v in actual.items()} == dtypes
    assert_no_worse(_whole(actual), lambda *arguments: _whole(plain(*arguments)), arguments, "the step", norm=True)


def _trains(model: nn.Module, backend: str, dtype: torch.dtype, steps: int, poison: int | None = None) -> dict:
    """Some steps of SGD under autocast, with a GradScaler in float16; an infinity in the pictures of one of them."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=2, enabled=dtype == torch.float16)
    scales = []
    for k in range(steps):
        x = pictures(4)
        if k == poison:
            x[0] = 6e4  # behind the first convolution that is beyond float16, within float32
        optimizer.zero_grad(set_to_none=k % 2 == 0)
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float64), use_backend(backend):
            y = model(x.to(dtype) if dtype == torch.float64 else x)
            loss = nn.functional.cross_entropy(y.float() if dtype != torch.float64 else y, torch.arange(4) % 5)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(torch.tensor(scaler.get_scale()))
    return {**model.state_dict(), "scales": torch.stack(scales), "loss": loss.detach()}


@quick_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_with_a_grad_scaler(backend, dtype):
    plain, fused = _pair()
    actual, expected = (_trains(m, b, dtype, 3) for m, b in ((fused, backend), (copy.deepcopy(plain), "auto")))
    assert torch.equal(actual.pop("scales"), expected["scales"])

    def trains(model):
        exact = model.fc.weight.dtype == torch.float64
        results = _trains(model, "auto", torch.float64 if exact else dtype, 3)
        return {name: value for name, value in results.items() if name != "scales"}

    _assert_no_worse(actual, trains, (plain,))


@quick_backends
def test_a_grad_scaler_skips_the_steps_that_plain_pytorch_skips(backend):
    plain, fused = _pair()
    for model in (plain, fused):
        model.bn1.eval()  # its statistics would swallow the picture
        model.conv1.weight.data *= 16
    actual, expected = (_trains(m, b, torch.float16, 4, poison=1) for m, b in ((fused, backend), (plain, "auto")))
    assert torch.equal(actual["scales"], expected["scales"]) and actual["scales"].diff().lt(0).any()
    for name, value in expected.items():  # what the step spoilt is spoilt alike
        assert torch.equal(actual[name].isfinite(), value.isfinite()), name


@quick_backends
def test_nested_autocast_and_its_cache(backend):
    """A part in full precision inside of autocast, a part in half precision outside of it, weights used twice."""
    plain, fused = _pair()

    def run(model, x, name="auto"):
        model.train()
        model.zero_grad()
        outputs = []
        enabled = model.fc.weight.dtype != torch.float64
        with use_backend(name), torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            for _ in range(2):
                stem = model.maxpool(model.relu(model.bn1(model.conv1(x))))
                a = model.layer1(stem)
                with torch.autocast(DEVICE, enabled=False):
                    b = model.layer1(stem.to(model.fc.weight.dtype))
                outputs += [a, b]
        assert [y.dtype for y in outputs[:2]] == ([torch.bfloat16, torch.float32] if enabled else [torch.float64] * 2)
        sum(y.double().square().mean() for y in outputs).backward()
        return {str(k): y.detach() for k, y in enumerate(outputs)} | {n: p.grad for n, p in model.named_parameters()}

    x = pictures(2, 16)
    _assert_no_worse(run(fused, x, backend), run, (plain, x))
