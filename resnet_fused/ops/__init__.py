"""One schema per op, one implementation per backend.

`import resnet_fused.ops` registers `torch.ops.resnet_fused.<name>(..., *, backend)` for every op of `docs/design.md`.
The implementation is looked up by the `backend` argument; `refusal` says beforehand whether it can run, and in the
same words why not.
"""

from resnet_fused.ops import schemas  # noqa: F401  (registers the ops)
from resnet_fused.ops.backends import available, conv_refusal, implements, refusal, unavailable
from resnet_fused.ops.flops import register_when_imported

register_when_imported()

__all__ = ["available", "conv_refusal", "implements", "refusal", "unavailable"]
