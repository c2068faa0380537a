"""The paper's evaluation: single crop, 10-crop, multi-scale fully convolutional, ensembles; top-k error with intervals.

Also as the command `resnet-fused evaluate`.
"""

from resnet_fused.evaluate.dense import classify_windows
from resnet_fused.evaluate.error_rate import ErrorRate, ranks, top_k_error
from resnet_fused.evaluate.protocols import SCALES, ensemble, multi_scale, single_crop, ten_crop

__all__ = [
    "SCALES",
    "ErrorRate",
    "classify_windows",
    "ensemble",
    "multi_scale",
    "ranks",
    "single_crop",
    "ten_crop",
    "top_k_error",
]
