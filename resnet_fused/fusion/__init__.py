"""Swap fused forwards into an existing model and back: `fuse`, `unfuse`, `report`.

A module is recognised by what its forward computes, never by its class name. Residual blocks become one plan of fused
units; elsewhere each chain conv-bn(-add)(-relu(-pool)) or bn-relu becomes one unit. Everything else is left alone, and
`report` says why.
"""

from resnet_fused.fusion.model import fuse, plan_of, report, unfuse
from resnet_fused.fusion.plans import BlockPlan, Forward, SequencePlan, Unit
from resnet_fused.fusion.report import FusionReport

__all__ = [
    "BlockPlan",
    "Forward",
    "FusionReport",
    "SequencePlan",
    "Unit",
    "fuse",
    "plan_of",
    "report",
    "unfuse",
]
