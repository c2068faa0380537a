"""`freeze`: a whole network planned once for inference.

model: `freeze` and what it returns; network: each fused module replaced by a frozen one; block, tail, conv: what those
are made of, down to one op each; plan: what was decided, as a table; graph: CUDA graphs.
"""

from .block import FrozenBlock, FrozenSequence, FrozenStage
from .conv import EpilogueConv, FoldedConv, FrozenConv
from .model import Frozen, freeze
from .plan import FreezePlan, PlannedConv

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
