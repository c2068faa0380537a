"""Launch parameters as pure functions of the shape."""

from __future__ import annotations


def partial_rows(pixels: int, channels: int) -> int:
    """How many partial rows a per-channel reduction over `pixels` is split into.

    At least 256 pixels a row, so that the second stage stays negligible; at most 65,536 partial values a statistic, which with 64 channels
    gives 1,024 rows (some eight blocks for every multiprocessor of a large GPU) and with 2,048 channels 32.
    """
    return max(1, min(pixels // 256, max(16, 65536 // max(channels, 1))))
