"""Verify every kernel, and measure what serves each op best: `resnet-fused verify` and `resnet-fused tune`."""
