"""Which backend and which launch configuration serve an op: pure functions, and the one switch a user can force."""

from resnet_fused.plan.backend import BACKENDS, default_backend, forced_backend, use_backend
from resnet_fused.plan.choice import choose, conv_config
from resnet_fused.plan.heuristics import Fusion, folding_pays, partial_rows, training
from resnet_fused.plan.table import Choice, Problem, Table

__all__ = [
    "BACKENDS",
    "Choice",
    "Fusion",
    "Problem",
    "Table",
    "choose",
    "conv_config",
    "default_backend",
    "folding_pays",
    "forced_backend",
    "partial_rows",
    "training",
    "use_backend",
]
