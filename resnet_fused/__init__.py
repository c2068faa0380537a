"""Fused convolution, batch norm, ReLU and residual add for ResNets, in training and inference."""

from resnet_fused import evaluate, functional, models, nn
from resnet_fused.fusion import FusionReport, freeze, fuse, report, unfuse
from resnet_fused.info import info
from resnet_fused.plan import use_backend

__version__ = "0.1.0"
__all__ = [
    "FusionReport",
    "evaluate",
    "freeze",
    "functional",
    "fuse",
    "info",
    "models",
    "nn",
    "report",
    "unfuse",
    "use_backend",
]
