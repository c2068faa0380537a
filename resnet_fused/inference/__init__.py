"""`freeze`: a whole network planned once for inference.

model: `freeze` and what it returns; network: each fused module replaced by a frozen one; block, tail, conv: what those
are made of, down to one op each; quantize: ranges and the choice of what runs in int8; int8: what does; plan: what was
decided, as a table; graph: CUDA graphs.
"""

from resnet_fused.inference.block import FrozenBlock, FrozenSequence, FrozenStage
from resnet_fused.inference.conv import EpilogueConv, FoldedConv, FrozenConv
from resnet_fused.inference.int8 import Int8Conv
from resnet_fused.inference.model import Frozen, freeze
from resnet_fused.inference.plan import FreezePlan, PlannedConv
from resnet_fused.inference.quantize import Int8

__all__ = [
    "EpilogueConv",
    "FoldedConv",
    "FreezePlan",
    "Frozen",
    "FrozenBlock",
    "FrozenConv",
    "FrozenSequence",
    "FrozenStage",
    "Int8",
    "Int8Conv",
    "PlannedConv",
    "freeze",
]
