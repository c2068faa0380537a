"""Fused convolution, batch norm, ReLU and residual add for ResNets, in training and inference."""

__version__ = "0.1.0"
