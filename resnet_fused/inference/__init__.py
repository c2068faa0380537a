"""`freeze`: a whole network planned once for inference.

model: `freeze` and what it returns; network: each fused module replaced by a frozen one; block, tail, conv: what those
are made of, down to one op each; plan: what was decided, as a table; graph: CUDA graphs.
"""

from resnet_fused.inference.block import FrozenBlock, FrozenSequence, FrozenStage
from resnet_fused.inference.conv import EpilogueConv, FoldedConv, FrozenConv
from resnet_fused.inference.model import Frozen, freeze
from resnet_fused.inference.plan import FreezePlan, PlannedConv

__all__ = [
    "EpilogueConv",
    "FoldedConv",
    "FreezePlan",
    "Frozen",
    "FrozenBlock",
    "FrozenConv",
    "FrozenSequence",
    "FrozenStage",
    "PlannedConv",
    "freeze",
]
