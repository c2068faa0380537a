"""The contestants by name: what each does to the same model before it is timed.

`prepare(model, example, case)` receives its own copy of the model, already on the device, in the dtype, memory format
and mode of the case, and returns the callable that runs it; training keeps using the model's own parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

import resnet_fused

from .cases import MODES, Case

Forward = Callable[[torch.Tensor], torch.Tensor]
Prepare = Callable[[nn.Module, torch.Tensor, Case], Forward]

BASELINE = "eager-channels-last"


class Unavailable(RuntimeError):
    """The contestant cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    name: str
    summary: str
    prepare: Prepare
    memory_format: torch.memory_format = torch.channels_last
    modes: tuple[str, ...] = MODES
    plain: bool = False  # plain PyTorch: its error is the yardstick of the contract, not subject to it


def _as_it_is(model: nn.Module, example: torch.Tensor, case: Case) -> Forward:
    return model


def _compile(model: nn.Module, example: torch.Tensor, case: Case) -> Forward:
    """torch.compile; for inference with frozen weights, and on a GPU in a CUDA graph, as `frozen` is."""
    try:
        from torch._inductor import config
    except ImportError as error:
        raise Unavailable(f"TorchInductor cannot be imported: {error}") from None
    if case.mode == "train":
        return torch.compile(model, dynamic=False)
    on_gpu = example.device.type == "cuda"
    compiled = torch.compile(model, dynamic=False, mode="reduce-overhead" if on_gpu else "default")
    with config.patch(freezing=True), torch.inference_mode():
        compiled(example)  # compilation happens in the first call; freezing must be on then, and only then
    return compiled


def _fused(model: nn.Module, example: torch.Tensor, case: Case) -> Forward:
    return resnet_fused.fuse(model)


def _frozen(model: nn.Module, example: torch.Tensor, case: Case) -> Forward:
    return resnet_fused.freeze(model, example)


CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Contestant("eager", "plain PyTorch, NCHW", _as_it_is, memory_format=torch.contiguous_format, plain=True),
        Contestant(BASELINE, "plain PyTorch, channels_last: the baseline", _as_it_is, plain=True),
        Contestant("compile", "torch.compile; for inference with freezing", _compile),
        Contestant("fused", "resnet_fused.fuse(model)", _fused),
        Contestant("frozen", "resnet_fused.freeze(model, example)", _frozen, modes=("infer",)),
    )
}
