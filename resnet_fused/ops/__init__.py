"""The ops: one record each (`ops/<op>.py`), one implementation per backend.

`import resnet_fused.ops` registers `torch.ops.resnet_fused.<name>(..., *, backend)` for every record. The
implementation is looked up by the `backend` argument; `refusal` says beforehand whether it can run, and in the same
words why not.

Activations are 4-D `[N, C, H, W]` in fp32, fp16 or bf16, dense in NCHW or NHWC (channels_last) order; every activation
of one call has the same dtype and order, and results take the order of the first. Per-channel vectors that ops exchange
are fp32, contiguous `[C]`; `weight`, `bias`, `running_mean` and `running_var` are fp32 or of the data's dtype. A pixel
is one (n, h, w); M = N*H*W; round(v) is v rounded to the data's dtype.
"""

import importlib
import pkgutil

from resnet_fused.ops.backends import (
    available,
    called,
    conv_refusal,
    implementation,
    implements,
    refusal,
    subclassed,
    unavailable,
)
from resnet_fused.ops.flops import register_when_imported
from resnet_fused.ops.registry import OPS, Op, define

for _module in pkgutil.iter_modules(__path__):  # those that are records register their ops
    importlib.import_module(f"{__name__}.{_module.name}")
for _op in OPS.values():
    define(_op)
register_when_imported()

__all__ = [
    "OPS",
    "Op",
    "available",
    "called",
    "conv_refusal",
    "implementation",
    "implements",
    "refusal",
    "subclassed",
    "unavailable",
]
