"""Fused convolution, batch norm, ReLU and residual add for ResNets, in training and inference."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from resnet_fused import evaluate, functional, models, nn
from resnet_fused.dispatch import use_backend
from resnet_fused.fusion import FusionReport, fuse, report, unfuse
from resnet_fused.inference import Int8, freeze
from resnet_fused.info import info
from resnet_fused.training import graphed

if TYPE_CHECKING:
    from resnet_fused.tuning.tune import tune
    from resnet_fused.tuning.verify import verify

__version__ = "0.1.0"
__all__ = [
    "FusionReport",
    "Int8",
    "evaluate",
    "freeze",
    "functional",
    "fuse",
    "graphed",
    "info",
    "models",
    "nn",
    "report",
    "tune",
    "unfuse",
    "use_backend",
    "verify",
]


def __getattr__(name: str) -> Any:
    """`tune` and `verify` need the packages of `resnet_fused[bench]`."""
    if name not in ("tune", "verify"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"resnet_fused.tuning.{name}"), name)
