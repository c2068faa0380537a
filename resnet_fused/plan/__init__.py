"""Which backend and which launch configuration serve an op: pure functions, and the one switch a user can force."""

from resnet_fused.plan.backend import BACKENDS, default_backend, forced_backend, use_backend
from resnet_fused.plan.heuristics import folding_pays, partial_rows

__all__ = ["BACKENDS", "default_backend", "folding_pays", "forced_backend", "partial_rows", "use_backend"]
