"""Train a network of "Deep Residual Learning" by the paper's recipe, on pictures in folders or on CIFAR-10.

    python examples/train_paper.py --recipe imagenet --model resnet50_v1 --data imagenet/ --out resnet50.pth
    python examples/train_paper.py --recipe cifar --model cifar_resnet110 --data torchvision:CIFAR10:data --out r110.pth
    resnet-fused evaluate --model cifar_resnet110=r110.pth --data torchvision:CIFAR10:data

`--data` is a folder with `train/` and `val/`, each with a subfolder per class, or a torchvision dataset that is there
already. Both recipes: SGD, momentum 0.9, weight decay 1e-4, He initialisation, no dropout, rate 0.1, batch norm's
statistics averaged over training batches once the weights are final. He et al., 2015, sections 3.4 and 4.2.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

import resnet_fused
from resnet_fused import models
from resnet_fused.evaluate import ranks
from resnet_fused.evaluate.loading import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD

BN_BATCHES = 200  # that the final statistics are averaged over
WARM_UP_RATE, WARM_UP_UNTIL = 0.01, 0.80  # the 110-layer net's first rate, until the training error falls below


@dataclass(frozen=True)
class Recipe:
    """What the two settings differ in.

    Attributes:
        crop, mean, std: of the pictures.
        batch, iterations: pictures in a step, steps.
        milestones: steps after which the rate falls tenfold; None: when the validation error stops falling.
    """

    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch: int
    iterations: int
    milestones: tuple[float, ...] | None


RECIPES = {
    "imagenet": Recipe(224, IMAGENET_MEAN, IMAGENET_STD, 256, 600_000, None),
    "cifar": Recipe(32, CIFAR_MEAN, CIFAR_STD, 128, 64_000, (0.5, 0.75)),
}


class Lighting(nn.Module):
    """AlexNet's colour augmentation: a random step, sigma 0.1, along the principal components of ImageNet's colours,
    for pictures in [0, 1]. Krizhevsky et al., 2012, section 4.1; the components as published with fb.resnet.torch.
    """

    VALUES = (0.2175, 0.0188, 0.0045)
    VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

    def forward(self, picture: Tensor) -> Tensor:
        step = torch.tensor(self.VECTORS) @ (torch.tensor(self.VALUES) * torch.randn(3) * 0.1)
        return picture + step.view(3, 1, 1)


def transforms(name: str, crop: int, training: bool) -> v2.Compose:
    """Scale in [256, 480] for crops of 224, crop, mirror, colours (ImageNet); 4 pixels of padding, mirror (CIFAR)."""
    recipe = RECIPES[name]
    steps: list[nn.Module] = []
    if name == "imagenet" and training:
        sides = list(range(round(crop * 256 / 224), round(crop * 480 / 224) + 1))
        steps = [v2.RandomShortestSize(sides), v2.RandomCrop(crop), v2.RandomHorizontalFlip()]
    elif name == "imagenet":
        steps = [v2.Resize(round(crop * 256 / 224)), v2.CenterCrop(crop)]
    else:
        steps = [v2.Resize((crop, crop))]
        if training:
            steps += [v2.RandomCrop(crop, padding=4), v2.RandomHorizontalFlip()]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if name == "imagenet" and training:
        steps.append(Lighting())
    return v2.Compose([*steps, v2.Normalize(recipe.mean, recipe.std)])


def open_split(data: str, training: bool, transform: Any) -> Any:
    """The training or validation pictures of a folder or torchvision dataset.

    Raises:
        FileNotFoundError, RuntimeError: they are not there.
    """
    if not data.startswith("torchvision:"):
        return datasets.ImageFolder(Path(data) / ("train" if training else "val"), transform)
    name, _, root = data.removeprefix("torchvision:").partition(":")
    return getattr(datasets, name)(root or "data", train=training, transform=transform)


def loaders(name: str, data: str, crop: int, batch: int, workers: int) -> tuple[DataLoader, DataLoader, int]:
    """Training batches, validation batches, the number of classes."""
    train, test = (open_split(data, training, transforms(name, crop, training)) for training in (True, False))
    pinned = torch.cuda.is_available()
    shuffled = DataLoader(
        train, batch, shuffle=True, drop_last=len(train) >= batch, num_workers=workers, pin_memory=pinned
    )
    return shuffled, DataLoader(test, batch, num_workers=workers, pin_memory=pinned), len(train.classes)


def sgd(model: nn.Module, rate: float = 0.1) -> torch.optim.SGD:
    """The optimiser of both recipes."""
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)


def for_ever(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


class Trainer:
    """One network on its way through a recipe.

    Attributes:
        iteration: steps taken.
        warming_up: whether the rate is still the first, small one.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, warm_up: bool = False) -> None:
        self.model = model.to(device, memory_format=torch.channels_last)
        self.device, self.dtype = device, dtype
        self.optimizer = sgd(self.model, WARM_UP_RATE if warm_up else 0.1)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, factor=0.1, patience=4)
        self.iteration, self.warming_up = 0, warm_up

    def state(self) -> dict[str, Any]:
        """All that `resume` needs to go on."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "plateau")}
        return {**parts, "iteration": self.iteration, "warming_up": self.warming_up}

    def resume(self, state: dict[str, Any]) -> None:
        for name in ("model", "optimizer", "plateau"):
            getattr(self, name).load_state_dict(state[name])
        self.iteration, self.warming_up = state["iteration"], state["warming_up"]

    def logits(self, pictures: Tensor) -> Tensor:
        pictures = pictures.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(pictures).float()

    def step(self, pictures: Tensor, targets: Tensor) -> tuple[float, float]:
        """One step of SGD: loss and error of the batch."""
        self.model.train()
        logits, targets = self.logits(pictures), targets.to(self.device)
        loss = F.cross_entropy(logits, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item(), (logits.argmax(1) != targets).double().mean().item()

    @torch.no_grad()
    def error(self, loader: DataLoader) -> float:
        """Top-1 error."""
        self.model.eval()
        places = torch.cat([ranks(self.logits(pictures).cpu(), targets) for pictures, targets in loader])
        return (places > 0).double().mean().item()

    def rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def average_statistics(self, loader: DataLoader) -> None:
        """Batch norm's statistics as their mean over training batches, with the final weights."""
        update_bn(itertools.islice(for_ever(loader), min(BN_BATCHES, len(loader))), self.model, self.device)


def train(trainer: Trainer, recipe: Recipe, iterations: int, batches: DataLoader, test: DataLoader):
    """Run the recipe on; yields (rate, training loss and error since the last, validation error) after every epoch."""
    milestones = [round(share * iterations) for share in recipe.milestones or ()]
    seen: list[tuple[float, float]] = []
    per_epoch = max(1, len(batches))
    for pictures, targets in itertools.islice(for_ever(batches), max(0, iterations - trainer.iteration)):
        seen.append(trainer.step(pictures, targets))
        trainer.iteration += 1
        if trainer.iteration in milestones:
            trainer.rate(0.1 ** (2 + milestones.index(trainer.iteration)))
        if trainer.iteration % per_epoch and trainer.iteration != iterations:
            continue
        loss, wrong = (sum(column) / len(seen) for column in zip(*seen, strict=True))
        if trainer.warming_up and wrong < WARM_UP_UNTIL:
            trainer.warming_up = False
            trainer.rate(0.1 ** (1 + sum(trainer.iteration >= m for m in milestones)))
        error = trainer.error(test)
        rate = trainer.optimizer.param_groups[0]["lr"]
        if recipe.milestones is None:
            trainer.plateau.step(error)
        yield rate, loss, wrong, error
        seen = []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a network of the ResNet paper by its recipe.")
    add = parser.add_argument
    add("--recipe", choices=tuple(RECIPES), required=True)
    add("--model", required=True, help=f"one of {', '.join(models.list_models())}")
    add("--data", required=True, help="a folder with train/ and val/, or torchvision:CIFAR10:<root>")
    add("--out", type=Path, required=True, help="the checkpoint to write")
    add("--shortcut", choices=("A", "B", "C"), help="the paper's option (default: B, A for CIFAR nets)")
    add("--resume", action="store_true", help="go on from what an interrupted run left beside --out")
    add("--iterations", type=int, help="(default: 600000 and 64000)")
    add("--batch", type=int, help="(default: 256 and 128)")
    add("--crop", type=int, help="(default: 224 and 32)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 by autocast")
    add("--backend", default="auto", choices=("auto", "reference", "aten", "triton", "cuda"))
    add("--workers", type=int, default=4)
    add("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    recipe = RECIPES[arguments.recipe]
    iterations = arguments.iterations or recipe.iterations
    batch, crop = arguments.batch or recipe.batch, arguments.crop or recipe.crop
    try:
        batches, test, classes = loaders(arguments.recipe, arguments.data, crop, batch, arguments.workers)
        torch.manual_seed(arguments.seed)
        options = {"shortcut": arguments.shortcut} if arguments.shortcut else {}
        model = models.create(arguments.model, num_classes=classes, **options)
    except (FileNotFoundError, RuntimeError, ValueError, AttributeError) as error:
        parser.error(str(error))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    warm_up = arguments.model in ("cifar_resnet110", "cifar_resnet1202")
    trainer = Trainer(model, torch.device(arguments.device), dtype, warm_up)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    if arguments.resume and partial.exists():
        trainer.resume(torch.load(partial, map_location=arguments.device, weights_only=True))
    with resnet_fused.use_backend(arguments.backend):
        for rate, loss, wrong, error in train(trainer, recipe, iterations, batches, test):
            torch.save(trainer.state(), partial)
            print(
                f"{trainer.iteration:>7}/{iterations}  rate {rate:g}  training loss {loss:.4f}, error {wrong:.2%}  "
                f"validation error {error:.2%}",
                flush=True,
            )
        trainer.average_statistics(batches)
        error = trainer.error(test)
    saved = {"name": arguments.model, "options": options, "iterations": iterations, "error": error}
    torch.save({**saved, "state_dict": model.state_dict()}, arguments.out)
    partial.unlink(missing_ok=True)
    print(f"validation error {error:.2%} with averaged statistics; wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
