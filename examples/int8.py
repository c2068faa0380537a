"""Train small ResNets on scikit-learn's handwritten digits, freeze each in float and in int8, and compare.

    python examples/int8.py [--epochs 12] [--seed 0] [--plan]

The network of `digits.py` and the paper's CIFAR nets. Calibrated on training pictures, judged on held-out ones: top-1,
how many pictures get another answer, the error of the logits, and the convolution that loses most. About a minute on
two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses

import digits
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import resnet_fused
from resnet_fused import models
from resnet_fused.inference import FreezePlan

CALIBRATION = 256  # training pictures


def networks() -> dict[str, nn.Module]:
    """The networks to be trained, on pictures [N, 1, 8, 8]."""
    options = {"in_channels": 1, "num_classes": 10, "widths": (8, 16, 32)}
    cifar = {f"cifar_resnet({depth})": models.cifar_resnet(depth, **options) for depth in (20, 56)}
    return {"small_resnet": digits.small_resnet(), **cifar}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one network, frozen in float and in int8, on the held-out pictures.

    Attributes:
        accuracy, accuracy_int8: top-1, 0 to 1.
        differ: how many pictures get another answer.
        error: || int8 - float || / || float || of the logits.
        plan: of the int8 network.
    """

    accuracy: float
    accuracy_int8: float
    differ: int
    error: float
    plan: FreezePlan


def compare(model: nn.Module) -> Outcome:
    """A trained model in float and in int8, calibrated on training pictures."""
    pictures, _, held_out, labels = digits.load()
    frozen = resnet_fused.freeze(model, held_out)
    quantised = resnet_fused.freeze(model, held_out, quantize=pictures[:CALIBRATION].split(digits.BATCH))
    logits, ours = frozen(held_out), quantised(held_out)
    answers, answers_int8 = logits.argmax(1), ours.argmax(1)
    accuracy, accuracy_int8 = ((found == labels).double().mean().item() for found in (answers, answers_int8))
    error = float((ours - logits).norm() / logits.norm())
    return Outcome(accuracy, accuracy_int8, int((answers != answers_int8).sum()), error, quantised.plan)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train small ResNets on digits; freeze them in float and in int8.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan", action="store_true", help="print each network's plan, with each layer's error")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error(f"--epochs {arguments.epochs}: must be at least 1")

    console = Console()
    narrow = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}  # 80 columns
    table = Table(title=f"top-1 on held-out digits, {arguments.epochs} epochs", title_justify="left", **narrow)
    table.add_column("network", no_wrap=True)
    for heading in ("float", "int8", "differ", "error", "loses most"):
        table.add_column(heading, justify="right", no_wrap=True)
    torch.manual_seed(arguments.seed)
    for name, model in networks().items():
        digits.train(model, arguments.epochs, arguments.seed)
        found = compare(model)
        worst = max((row for row in found.plan.layers if row.error is not None), key=lambda row: row.error)
        cells = (f"{found.accuracy:.2%}", f"{found.accuracy_int8:.2%}", str(found.differ), f"{found.error:.1e}")
        table.add_row(name, *cells, f"{worst.layer} {worst.error:.1e}")
        if arguments.plan:
            console.print(name, str(found.plan), sep="\n", highlight=False, soft_wrap=True)
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
