"""Train small ResNets on scikit-learn's handwritten digits, freeze each in float and in int8, and compare.

    python examples/int8.py [--epochs 12] [--seed 0] [--plan]

The network of `digits.py` and the paper's CIFAR nets. Calibrated on training pictures, judged on held-out ones: top-1,
how many pictures get another answer, the error of the logits, and the convolution that loses most. About a minute on
two CPU cores.
"""

from __future__ import annotations

import argparse

import digits
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models

CALIBRATION = 256  # training pictures


def networks() -> dict[str, nn.Module]:
    """The networks to be trained, on pictures [N, 1, 8, 8]."""
    options = {"in_channels": 1, "num_classes": 10, "widths": (8, 16, 32)}
    cifar = {f"cifar_resnet({depth})": models.cifar_resnet(depth, **options) for depth in (20, 56)}
    return {"small_resnet": digits.small_resnet(), **cifar}


def top1(model: nn.Module, pictures: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Top-1 accuracy, and the logits."""
    with torch.inference_mode():
        logits = model(pictures)
    return (logits.argmax(1) == labels).double().mean().item(), logits


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train small ResNets on digits; freeze them in float and in int8.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan", action="store_true", help="print each network's plan, with each layer's error")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error(f"--epochs {arguments.epochs}: must be at least 1")

    pictures, _, held_out, labels = digits.load()
    calibration = pictures[:CALIBRATION].split(digits.BATCH)
    console = Console()
    table = Table(title=f"top-1 on held-out digits, {arguments.epochs} epochs", title_justify="left")
    table.add_column("network", no_wrap=True)
    for heading in ("float", "int8", "differ", "error", "layer that loses most"):
        table.add_column(heading, justify="right", no_wrap=True)
    torch.manual_seed(arguments.seed)
    for name, model in networks().items():
        digits.train(model, arguments.epochs, arguments.seed)
        frozen = resnet_fused.freeze(model, held_out)
        quantised = resnet_fused.freeze(model, held_out, quantize=calibration)
        accuracy, logits = top1(frozen, held_out, labels)
        ours, rounded = top1(quantised, held_out, labels)
        others = int((logits.argmax(1) != rounded.argmax(1)).sum())
        error = float((rounded - logits).norm() / logits.norm())
        rows = [row for row in quantised.plan.layers if row.error is not None]
        worst = max(rows, key=lambda row: row.error or 0.0)
        cells = (f"{accuracy:.2%}", f"{ours:.2%}", f"{others} of {len(labels)}", f"{error:.1e}")
        table.add_row(name, *cells, f"{worst.layer} {worst.error:.1e}")
        if arguments.plan:
            console.print(name, quantised.plan, sep="\n", highlight=False, soft_wrap=True)
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
