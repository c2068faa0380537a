"""What the experimental kernels' statistics must be, box by box of output pixels."""

from __future__ import annotations

import itertools

import torch

from resnet_fused.dispatch.experimental import tiling


def assert_statistics_of_boxes(shape, config, y, mean, m2, count):
    """Row i: mean, sum of squared deviations and number of the pixels of the i-th box of `y`, against float64."""
    tiles = tiling(shape, config)
    pixels = y.permute(0, 2, 3, 1).reshape(*tiles.grid, shape.k).double()
    starts = list(itertools.product(*(range(0, n, b) for n, b in zip(tiles.grid, tiles.box, strict=True))))
    assert len(starts) == len(count) == len(mean) == len(m2)
    assert count.sum() == pixels[..., 0].numel()
    for i, start in enumerate(starts):
        box = pixels[tuple(slice(a, a + b) for a, b in zip(start, tiles.box, strict=True))].reshape(-1, shape.k)
        assert count[i] == len(box)
        assert mean.dtype == torch.float64
        torch.testing.assert_close(mean[i], box.mean(0), rtol=1e-7, atol=1e-7)
        expected = (box - box.mean(0)).square().sum(0)
        torch.testing.assert_close(m2[i].double(), expected, rtol=1e-5, atol=1e-5)
