"""The public differentiable functions: convolution, batch norm, residual add, ReLU and the stem's max pool, fused.

Every function gives what the same sequence of `torch.nn.functional` calls gives. Where a fused kernel cannot run - on
these shapes, under a function transform, in forward-mode AD - that sequence is what runs. `resnet_fused.use_backend`
chooses kernels by hand.

Shapes: activations `[N, C, H, W]` in NCHW or channels_last order, which the result keeps; per-channel tensors `[C]`.
"""

from resnet_fused.functional.conv import conv_affine_act, conv_bn_act
from resnet_fused.functional.norm import add_act, batch_norm_act
from resnet_fused.functional.pool import batch_norm_act_max_pool

__all__ = ["add_act", "batch_norm_act", "batch_norm_act_max_pool", "conv_affine_act", "conv_bn_act"]
