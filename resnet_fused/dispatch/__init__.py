"""Which backend and which launch configuration serve an op: pure functions, and the one switch a user can force."""

from resnet_fused.dispatch.backend import BACKENDS, default_backend, forced_backend, use_backend
from resnet_fused.dispatch.choice import block, choose, conv_config, forget_with_plan, layer
from resnet_fused.dispatch.conv import BlockShape
from resnet_fused.dispatch.formulation import LayerPlan
from resnet_fused.dispatch.heuristics import Fusion, folding_pays, partial_rows, statistics_rows, training
from resnet_fused.dispatch.table import Choice, Problem, Table

__all__ = [
    "BACKENDS",
    "BlockShape",
    "Choice",
    "Fusion",
    "LayerPlan",
    "Problem",
    "Table",
    "block",
    "choose",
    "conv_config",
    "default_backend",
    "folding_pays",
    "forced_backend",
    "forget_with_plan",
    "layer",
    "partial_rows",
    "statistics_rows",
    "training",
    "use_backend",
]
