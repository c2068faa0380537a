"""Measure ResNets side by side: harness, contestants, correctness, roofs, tables and charts behind `resnet-fused bench`."""
