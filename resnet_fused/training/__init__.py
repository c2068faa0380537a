"""`graphed`: a training step as a CUDA graph in the user's own loop."""

from resnet_fused.training.cuda_graph import graphed

__all__ = ["graphed"]
