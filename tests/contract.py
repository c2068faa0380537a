"""The numerics contract: against float64, at most twice plain PyTorch's error in the same dtype, plus a floor."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR_ULPS = 4


def assert_within_contract(actual: Tensor, plain: Tensor, truth: Tensor, what: str = "result") -> None:
    """`actual` errs no more than the contract allows.

    Args:
        actual: ours.
        plain: what plain PyTorch gives in the same dtype.
        truth: what plain PyTorch gives in float64.
        what: names the tensor in the message.

    The floor is 4 units in the last place of the dtype at the largest finite magnitude of `truth`. NaN and inf must
    stand where plain PyTorch has them.
    """
    assert actual.shape == plain.shape == truth.shape, (
        f"{what}: shape {list(actual.shape)}, expected {list(plain.shape)}"
    )
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype}, expected {plain.dtype}"
    a, p, t = (v.detach().double() for v in (actual, plain, truth))
    assert torch.equal(a.isnan(), p.isnan()), (
        f"{what}: {int(a.isnan().sum())} NaN, plain PyTorch has {int(p.isnan().sum())}"
    )
    assert torch.equal(a.isinf(), p.isinf()), (
        f"{what}: {int(a.isinf().sum())} inf, plain PyTorch has {int(p.isinf().sum())}"
    )
    assert torch.equal(a[p.isinf()], p[p.isinf()]), f"{what}: an inf of the other sign than plain PyTorch's"
    finite = p.isfinite() & t.isfinite()
    if not finite.any():
        return
    error = (a - t)[finite].abs().max().item()
    allowed = 2 * (p - t)[finite].abs().max().item()
    allowed += FLOOR_ULPS * torch.finfo(actual.dtype).eps * t[finite].abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g} exceeds {allowed:.3g} (twice plain PyTorch's plus the floor)"
