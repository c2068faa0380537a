"""Measure ResNets side by side: harness, contestants, correctness, roofs, tables, charts: `resnet-fused bench`."""
