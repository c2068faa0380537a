"""The race of ResNets: contestants, correctness, results, tables, charts, profiles: `resnet-fused bench`."""
