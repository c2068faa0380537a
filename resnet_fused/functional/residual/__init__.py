"""A chain of convolutions with batch norm and ReLU between them - a residual block - as one differentiable call.

Between two convolutions the activation is never stored normalised: it is the pair (raw convolution output z, affine
map), and its value is relu(scale * z + shift). A convolution forms the statistics of its z as it writes it, and
normalises the z before it as it reads that, wherever the plan says that this pays; a pass of its own does it elsewhere.
Backward mirrors this. What is saved for it: raw outputs, per-channel vectors, the chain's input, and one bit an element
of its result.
"""

from resnet_fused.functional.residual.decide import Chain, ConvBN, choose_chain
from resnet_fused.functional.residual.forward import run_chain

__all__ = ["Chain", "ConvBN", "choose_chain", "run_chain"]
