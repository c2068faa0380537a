"""The numerics contract: against float64, at most twice plain PyTorch's own error in the same dtype, plus a floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from resnet_fused.bench.runner import Outcome

CHECKED_IMAGES = 32  # of a larger batch, this many are compared with float64, whose model needs eight times the memory
FACTOR = 2.0
# One ReLU whose input lies within a rounding error of zero may open or close: that moves gradients by a jump that no
# precision of the arithmetic prevents, so their floors are wider.
FLOORS = {
    "fp32": {"logits": 1e-5, "loss": 1e-5, "gradients": 1e-2, "worst_gradient": 5e-2, "statistics": 1e-5},
    "bf16": {"logits": 1e-2, "loss": 1e-2, "gradients": 5e-2, "worst_gradient": 2e-1, "statistics": 1e-2},
    "fp16": {"logits": 2e-3, "loss": 2e-3, "gradients": 5e-2, "worst_gradient": 2e-1, "statistics": 2e-3},
}


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors against float64.

    logits, statistics: max |value - reference| / max |reference|; of the statistics the worst one.
    loss: |value - reference| / |reference|.
    gradients: || value - reference ||_2 / || reference ||_2 over all parameters together.
    worst_gradient: the same for the worst single parameter.
    """

    logits: float
    loss: float | None = None
    gradients: float | None = None
    worst_gradient: float | None = None
    statistics: float | None = None


def max_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """max |value - reference| / max |reference|; inf where the shapes or the places of the NaNs differ."""
    return _relative(value, reference, float("inf"))


def norm_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|| value - reference ||_2 / || reference ||_2; inf where the shapes or the places of the NaNs differ."""
    return _relative(value, reference, 2.0)


def _relative(value: torch.Tensor, reference: torch.Tensor, order: float) -> float:
    reference = reference.double()
    value = value.to(reference.device).double()
    if value.shape != reference.shape or not torch.equal(value.isnan(), reference.isnan()):
        return float("inf")
    difference = torch.linalg.vector_norm((value - reference).nan_to_num(nan=0.0), order)
    size = torch.linalg.vector_norm(reference.nan_to_num(nan=0.0), order)
    return float(difference / size) if size > 0 else float(difference)


def errors_of(outcome: Outcome, reference: Outcome) -> Errors:
    """The errors of one contestant's numbers against the float64 model's; training's are None in inference."""
    logits = max_error(outcome.logits, reference.logits)
    if reference.loss is None:
        return Errors(logits)
    assert outcome.loss is not None
    if outcome.gradients.keys() != reference.gradients.keys():
        both = worst = float("inf")
    else:
        value, judge = outcome.gradients, reference.gradients
        both = norm_error(*(torch.cat([g[name].double().flatten() for name in judge]) for g in (value, judge)))
        worst = max(norm_error(value[name], judge[name]) for name in judge)
    statistics = [max_error(outcome.statistics[name], value) for name, value in reference.statistics.items()]
    return Errors(logits, max_error(outcome.loss, reference.loss), both, worst, max(statistics, default=0.0))


def top1_agreement(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The share of images, 0 to 1, whose largest logit is the same."""
    return float((logits.argmax(1).cpu() == reference.argmax(1).cpu()).double().mean())


def breach(errors: Errors, plain: Iterable[Errors], dtype: str) -> str | None:
    """How `errors` break the contract, given those of the plain contestants; None when they keep it.

    Args:
        errors: a contestant's.
        plain: those of plain PyTorch in the same dtype, in one layout or several; the largest is the yardstick.
        dtype: `fp32`, `bf16` or `fp16`.
    """
    plain = list(plain)
    for name, error in dataclasses.asdict(errors).items():
        if error is None:
            continue
        yardstick = max((getattr(other, name) for other in plain), default=0.0)
        limit = FACTOR * yardstick + FLOORS[dtype][name]
        if not error <= limit:
            what = name.replace("_", " ")
            beside = f"plain PyTorch: {yardstick:.1e}" if plain else "plain PyTorch did not run"
            return f"error of {what} {error:.1e} > {limit:.1e} ({beside})"
    return None
