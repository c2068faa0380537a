"""Train a small ResNet on scikit-learn's handwritten digits twice from one seed: plain, and after `resnet_fused.fuse`.

    python examples/digits.py [--epochs 12] [--seed 0] [--backend auto] [--chart out/digits.png]

Both runs start from the same weights and see the same batches, so their loss curves should lie on each other until
rounding makes them part, and both should read the held-out digits equally well. Seconds on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import resnet_fused

BATCH = 64
HELD_OUT = 360  # of 1797 digits


class BasicBlock(nn.Module):
    """Plain PyTorch, nothing of resnet_fused in it: two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


def small_resnet() -> nn.Sequential:
    """Stem, six blocks at 8x8, 4x4 and 2x2, classifier: 175 thousand parameters."""
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    widths = ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(stem, *(BasicBlock(*width) for width in widths), head)


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pictures and labels, held-out pictures and labels; pictures are [N, 1, 8, 8] in [-1, 1]."""
    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))  # the split is not the seed's
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return pictures[train], labels[train], pictures[test], labels[test]


@dataclasses.dataclass(frozen=True)
class Outcome:
    losses: list[float]  # of every step
    accuracy: float  # on the held-out digits
    seconds: float


def train(model: nn.Module, epochs: int, seed: int) -> Outcome:
    """SGD with momentum and a one-cycle learning rate; the batches depend on `seed` only."""
    pictures, labels, test_pictures, test_labels = load()
    batches = torch.Generator().manual_seed(seed)
    steps = len(labels) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=epochs * steps)
    losses = []
    start = time.perf_counter()
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(labels), generator=batches)
        for chunk in order[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(pictures[chunk]), labels[chunk])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    seconds = time.perf_counter() - start
    model.eval()
    with torch.inference_mode():
        accuracy = (model(test_pictures).argmax(1) == test_labels).double().mean().item()
    return Outcome(losses, accuracy, seconds)


def compare(epochs: int, seed: int, backend: str) -> dict[str, Outcome]:
    """Train plain and fused from one seed; only the fused model runs on `backend`."""
    outcomes = {}
    for name in ("plain", "fused"):
        torch.manual_seed(seed)
        model = small_resnet()
        if name == "fused":
            resnet_fused.fuse(model)
        with resnet_fused.use_backend(backend):
            outcomes[name] = train(model, epochs, seed)
    return outcomes


def differences(outcomes: dict[str, Outcome]) -> list[float]:
    """|plain - fused| of the loss at every step."""
    return [abs(a - b) for a, b in zip(outcomes["plain"].losses, outcomes["fused"].losses, strict=True)]


def draw(outcomes: dict[str, Outcome], path: Path) -> None:
    """The two loss curves over each other, and below, how far they are apart."""
    from matplotlib.figure import Figure

    plain, fused = outcomes["plain"], outcomes["fused"]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    above.plot(plain.losses, color="#f0a840", linewidth=4, label=f"plain, test accuracy {plain.accuracy:.1%}")
    above.plot(fused.losses, color="#1b4f8a", linewidth=1, label=f"fused, test accuracy {fused.accuracy:.1%}")
    above.set(
        ylabel="training loss", yscale="log", title="Small ResNet on handwritten digits, one seed, plain and fused"
    )
    above.legend()
    apart = differences(outcomes)
    below.plot(apart, color="#606870", linewidth=1)
    below.set(xlabel="step", ylabel="|difference|")
    if max(apart) > 0:
        below.set_yscale("log")
    else:
        below.set(ylim=(-1, 1), yticks=[0])
        below.text(0.5, 0.65, "equal bit for bit", transform=below.transAxes, ha="center", color="#606870")
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a small ResNet on digits, plain and fused, from one seed.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", choices=("auto", "reference", "aten", "triton", "cuda"))
    parser.add_argument("--chart", type=Path, default=Path("out/digits.png"))
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error(f"--epochs {arguments.epochs}: must be at least 1")

    outcomes = compare(arguments.epochs, arguments.seed, arguments.backend)
    table = Table(
        title=f"{arguments.epochs} epochs, seed {arguments.seed}, backend {arguments.backend}", title_justify="left"
    )
    for heading in ("model", "test accuracy", "first loss", "last loss", "seconds"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, run in outcomes.items():
        row = (f"{run.accuracy:.2%}", f"{run.losses[0]:.6f}", f"{run.losses[-1]:.6f}", f"{run.seconds:.1f}")
        table.add_row(name, *row)
    console = Console()
    console.print(table)
    draw(outcomes, arguments.chart)
    apart = differences(outcomes)
    console.print(
        f"losses differ by at most {max(apart):.1e}, in the first ten steps by {max(apart[:10]):.1e}", highlight=False
    )
    console.print(f"wrote {arguments.chart}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
