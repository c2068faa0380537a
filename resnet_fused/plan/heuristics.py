"""Launch parameters as pure functions of the shape."""

from __future__ import annotations


def partial_rows(pixels: int, channels: int) -> int:
    """How many partial rows a per-channel reduction over `pixels` is split into.

    At least 256 pixels a row, so that the second stage stays negligible; at most 65,536 partial values a statistic,
    which with 64 channels gives 1,024 rows (some eight blocks for every multiprocessor of a large GPU) and with 2,048
    channels 32.
    """
    return max(1, min(pixels // 256, max(16, 65536 // max(channels, 1))))


def folding_pays(device_type: str, output_elements: int, weight_elements: int) -> bool:
    """Whether to fold batch norm into a convolution's weight in every call, rather than run it as a pass of its own.

    On a CPU folding reads and writes the weight once, and saves reading and writing the result once; twice the
    elements leaves a margin. On a GPU the half a dozen small launches that it takes have not been measured against
    that pass, so there only `freeze` folds, once and for all.
    """
    return device_type == "cpu" and output_elements >= 2 * weight_elements
