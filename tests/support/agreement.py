"""Whether a fused model is the plain model: outputs, gradients, running statistics, state_dict."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from resnet_fused import freeze
from resnet_fused.fusion import swap


def assert_same(plain: nn.Module, fused: nn.Module, *inputs: Any, tolerance: float = 1e-9, steps: int = 2) -> None:
    """Train both for some steps from the same state and evaluate them; in float64 the difference is rounding.

    Args:
        plain: the model as its author wrote it.
        fused: a fused copy.
        inputs: tensors, or lists of tensors.
        tolerance: of the largest difference, relative to the largest magnitude of the tensor compared (at least 1).
    """
    assert list(plain.state_dict()) == list(fused.state_dict())
    for _ in range(steps):
        results = []
        for model in (plain, fused):
            model.train()
            model.zero_grad()
            own = copy.deepcopy(inputs)
            leaves = [x.requires_grad_() for x in tensors(own)]
            torch.manual_seed(0)  # dropout, if any
            outputs = tensors(model(*(_fresh(x) for x in own)))
            sum(_weigh(y) for y in outputs).backward()
            results.append([*outputs, *(x.grad for x in leaves)])
        _close(*results, tolerance, "output or input gradient")
        gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (plain, fused)]
        for name, expected in gradients[0].items():
            _close([expected], [gradients[1][name]], tolerance, f"gradient of {name}")
        with torch.no_grad():
            for model in (plain, fused):
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 1e-3 * p.grad / (1 + p.grad.abs().max())
    for name, expected in plain.state_dict().items():
        _close([expected], [fused.state_dict()[name]], tolerance, name)
    with torch.no_grad():
        _close(
            *(tensors(model.eval()(*copy.deepcopy(inputs))) for model in (plain, fused)),
            tolerance,
            "output in evaluation",
        )


def assert_freezes(model: nn.Module, x: Tensor, ops: list[str] | None = None) -> nn.Module:
    """The frozen model computes in float64 what the model does in evaluation, by these ops; returns it."""
    model.eval()
    frozen = freeze(model, x)
    with torch.no_grad():
        for expected, actual in zip(tensors(model(x)), tensors(frozen(x)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert ops is None or [row.op for row in frozen.plan.layers] == ops
    return frozen


def assert_one_graph(plain: nn.Module, fused: nn.Module, x: Tensor) -> nn.Module:
    """Compiled, the fused model is one graph that runs more than once and agrees; returns it."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(fused, backend=counter, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1
    return compiled


def assert_same_under_autocast(plain: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Results in bf16 where those of the plain model are, and as large."""
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = plain(x), fused(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def through_pickle(model: nn.Module, protocol: int = pickle.DEFAULT_PROTOCOL) -> nn.Module:
    return pickle.loads(pickle.dumps(model, protocol))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_same_words(plain: nn.Module, ours: nn.Module, wrong: Tensor) -> None:
    """Both refuse an input, with one exception of one message."""
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)) as expected:
        plain(wrong)
    with pytest.raises(expected.type) as actual:
        ours(wrong)
    assert str(actual.value) == str(expected.value)


def tensors(value: Any) -> list[Tensor]:
    """All tensors of nested lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def count_units(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The batch norms of the units that fused modules run from now on, one entry per run."""
    counted: list[nn.Module] = []
    original = swap.conv_bn_act

    def counting(x: Tensor, conv: Any, bn: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        counted.append(bn)
        return original(x, conv, bn, *args, **kwargs)

    monkeypatch.setattr(swap, "conv_bn_act", counting)
    return counted


def _fresh(x: Any) -> Any:
    """The same values as non-leaves, so that a forward may change them in place."""
    return [_fresh(v) for v in x] if isinstance(x, list) else x * 1


def _weigh(y: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return (y * weights).sum()


def _close(expected: list[Tensor | None], actual: list[Tensor | None], tolerance: float, what: str) -> None:
    assert len(expected) == len(actual), what
    for e, a in zip(expected, actual, strict=True):
        assert (e is None) == (a is None), what
        if e is None or a is None:
            continue
        assert e.shape == a.shape and e.dtype == a.dtype, what
        if e.numel() == 0:
            continue
        scale = max(1.0, float(e.detach().abs().nan_to_num().max()))
        torch.testing.assert_close(
            a,
            e,
            rtol=0,
            atol=tolerance * scale,
            equal_nan=True,
            msg=f"{what} differs by {float((a - e).detach().abs().max())}",
        )


def assert_hook_sees_the_same(plain: nn.Module, fused: nn.Module, path: str, *inputs: Any) -> None:
    """`assert_same`, and a forward hook on the submodule `path` sees the same in each of the three calls."""
    logs = []
    for model in (plain, fused):
        log: list[Tensor] = []
        model.get_submodule(path).register_forward_hook(lambda m, args, y, log=log: log.append(y.detach().clone()))
        logs.append(log)
    assert_same(plain, fused, *inputs)
    assert len(logs[0]) == len(logs[1]) == 3
    for expected, actual in zip(*logs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
