"""Do plain networks degrade with depth, and residual ones not? The paper's central claim, as pictures.

    python examples/degradation.py --out docs/images                                  # digits: minutes on 2 cores
    python examples/degradation.py --data torchvision:CIFAR10:data --depths 20,56,110 --epochs 164 --out out/cifar
    python examples/degradation.py --data imagenet/ --recipe imagenet --depths 18,34 --epochs 90 --out out/imagenet
    python examples/degradation.py --redraw docs/images/degradation.json --out docs/images

Trains plain and residual nets of growing depth from one seed on the same batches, and measures: training and test
error; the norm of every layer's gradient before the first step; the standard deviation of every layer's response after
the last; how fast an 18-layer net of each kind converges; zero-initialised residual branches; and how far the fused
networks drift from the same modules called one by one. Writes `degradation.json` and a chart of each.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models

FAMILIES = ("plain", "residual")
PARTS = ("curves", "gradients", "responses", "speed", "zero_init", "drift")
BATCH = 128
HELD_OUT = 360  # of the 1797 digits
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Data:
    """Pictures to train and test on.

    Attributes:
        name, channels, classes: of the pictures.
        train: one epoch of training batches, drawn from a seed.
        test: the test batches.
        imagenet: whether the networks are the ImageNet ones.
        widths: of the CIFAR nets' three stages; the four of an 18-layer net go on from there.
    """

    name: str
    channels: int
    classes: int
    train: Callable[[int], Batches]
    test: Callable[[], Batches]
    imagenet: bool
    widths: tuple[int, ...]

    def network(self, family: str, depth: int, **options: Any) -> nn.Module:
        """The net of that family and depth for these pictures."""
        options = {"num_classes": self.classes, "in_channels": self.channels, **options}
        if self.imagenet or depth in (18, 34):
            if not self.imagenet:
                options = {"stem": "small", "widths": (*self.widths, 2 * self.widths[-1]), **options}
            return models.create(f"{'resnet' if family == 'residual' else 'plain'}{depth}", **options)
        make = models.cifar_resnet if family == "residual" else models.cifar_plain
        return make(depth, widths=self.widths, **options)


def digits() -> Data:
    """scikit-learn's handwritten digits, 8 x 8: 1437 to train on, 360 held out. The nets have half the usual width."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    targets = torch.tensor(found.target)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(1))  # the split is not the seed's
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]

    def train(seed: int) -> Batches:
        shuffled = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
        return ((pictures[chunk], targets[chunk]) for chunk in shuffled.split(BATCH))

    def test() -> Batches:
        return ((pictures[chunk], targets[chunk]) for chunk in held_out.split(BATCH))

    return Data("handwritten digits", 1, 10, train, test, imagenet=False, widths=(8, 16, 32))


def from_disk(where: str, recipe: str, crop: int | None, workers: int) -> Data:
    """CIFAR-10 or a folder of pictures, prepared as `train_paper.py` does."""
    import train_paper

    chosen = train_paper.RECIPES[recipe]
    batches, test, classes = train_paper.loaders(recipe, where, crop or chosen.crop, chosen.batch, workers)

    def train(seed: int) -> Batches:
        torch.manual_seed(seed)
        return iter(batches)

    imagenet = recipe == "imagenet"
    name = "CIFAR-10" if "CIFAR10" in where else where
    return Data(name, 3, classes, train, lambda: iter(test), imagenet, widths=models.zoo.CIFAR_WIDTHS)


@dataclass
class Study:
    """What every measurement needs: data, seed, length, where it runs."""

    data: Data
    epochs: int
    seed: int
    device: torch.device
    plain_modules: bool = False

    def network(self, family: str, depth: int, **options: Any) -> nn.Module:
        torch.manual_seed(self.seed)
        model = self.data.network(family, depth, **options).to(self.device, memory_format=torch.channels_last)
        return module_by_module(model) if self.plain_modules else model

    def batch(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        pictures, targets = next(self.data.train(seed))
        return self.place(pictures), targets.to(self.device)

    def place(self, pictures: Tensor, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
        return pictures.to(self.device).contiguous(memory_format=memory_format)

    def fit(self, model: nn.Module, epochs: int, memory_format: torch.memory_format = torch.channels_last) -> dict:
        """Train: SGD, momentum 0.9, weight decay 1e-4, rate 0.1, a tenth of it after a half and three quarters.

        Returns:
            Loss and training error (of the batches as they were trained on, in %) and test error (%) of every epoch,
            the loss of every step, seconds.
        """
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        milestones = [epochs // 2, epochs * 3 // 4]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        curve: dict[str, Any] = {"loss": [], "train_error": [], "test_error": [], "steps": []}
        start = time.perf_counter()
        for epoch in range(epochs):
            model.train()
            losses, wrong, seen = [], 0, 0
            for pictures, targets in self.data.train(1000 * self.seed + epoch):
                targets = targets.to(self.device)
                logits = model(self.place(pictures, memory_format))
                loss = F.cross_entropy(logits, targets)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                wrong, seen = wrong + int((logits.argmax(1) != targets).sum()), seen + len(targets)
            schedule.step()
            curve["steps"] += losses
            curve["loss"].append(sum(losses) / len(losses))
            curve["train_error"].append(100 * wrong / seen)
            curve["test_error"].append(self.test_error(model, memory_format))
        return {**curve, "seconds": time.perf_counter() - start}

    @torch.no_grad()
    def test_error(self, model: nn.Module, memory_format: torch.memory_format = torch.channels_last) -> float:
        model.eval()
        wrong, seen = 0, 0
        for pictures, targets in self.data.test():
            wrong += int((model(self.place(pictures, memory_format)).argmax(1).cpu() != targets).sum())
            seen += len(targets)
        return 100 * wrong / seen


def module_by_module(model: nn.Module) -> nn.Module:
    """The model with every module called by itself, as plain PyTorch does: what has hooks is not fused."""
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
    return model


def layers(model: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """The weighted layers with the batch norm behind each, in order; projections of shortcuts are left out."""
    named = [(name, m) for name, m in model.named_modules() if "downsample" not in name]
    convolutions = [m for _, m in named if isinstance(m, nn.Conv2d)]
    norms = [m for _, m in named if isinstance(m, nn.BatchNorm2d)]
    return list(zip(convolutions, norms, strict=True))


def gradient_norms(study: Study, model: nn.Module) -> list[float]:
    """||dL/dW|| of every convolution, for the first batch, before the first step."""
    pictures, targets = study.batch()
    F.cross_entropy(model.train()(pictures), targets).backward()
    return [conv.weight.grad.norm().item() for conv, _ in layers(model)]  # type: ignore[union-attr]


@torch.no_grad()
def response_deviations(study: Study, model: nn.Module) -> list[float]:
    """The standard deviation of every convolution's response: behind batch norm, before ReLU and addition.

    The statistics of the batch norms should have been averaged: those of a net that does not settle lag behind it.
    """
    found: list[float] = []
    handles = [
        norm.register_forward_hook(lambda _, inputs, output: found.append(output.std().item()))
        for _, norm in layers(model)[1:]  # the paper's figure begins behind the stem
    ]
    model.eval()(study.batch()[0])
    for handle in handles:
        handle.remove()
    return found


def zero_init(study: Study, depth: int, standard: dict) -> dict:
    """Residual branches that start at zero: are the blocks the identity then, and how does the net train?"""
    model = study.network("residual", depth, zero_init_residual=True)
    apart = []
    x = study.place(torch.randn(8, model.layer1[0].conv1.in_channels, 8, 8).relu())
    for block in model.layer1:
        with torch.no_grad():
            apart.append((copy.deepcopy(block).train()(x) - x).abs().max().item())
    return {
        "depth": depth,
        "distance_from_identity": max(apart),
        "gradients": gradient_norms(study, copy.deepcopy(model)),
        "zero": study.fit(model, study.epochs),
        "standard": standard,
    }


def gradient(study: Study, model: nn.Module, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
    """The gradient of all parameters for the first batch, in float64."""
    model = copy.deepcopy(model).train()
    pictures, targets = study.batch()
    pictures = pictures.contiguous(memory_format=memory_format).to(next(model.parameters()).dtype)
    F.cross_entropy(model(pictures), targets).backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def drift(study: Study, depth: int, epochs: int, backends: tuple[str, ...]) -> list[dict]:
    """The same training with modules called one by one and fused; beside it, as a yardstick, one by one in NCHW order.

    The yardstick is what rounding alone does: the same modules, whose sums PyTorch forms in another order. Of each run,
    too: the relative error of the first gradient against float64.
    """
    found = []
    nhwc, nchw = torch.channels_last, torch.contiguous_format
    for family in FAMILIES:
        start = study.network(family, depth)
        truth = gradient(study, module_by_module(copy.deepcopy(start)).double())
        ways: list[tuple[str, str, torch.memory_format]] = [
            ("modules one by one", "auto", nhwc),
            ("one by one, NCHW", "auto", nchw),
            *((f"fused, {backend}", backend, nhwc) for backend in backends),
        ]
        runs: dict[str, dict] = {}
        for name, backend, layout in ways:
            model = copy.deepcopy(start).to(memory_format=layout)
            if not name.startswith("fused"):
                module_by_module(model)
            with resnet_fused.use_backend(backend):
                error = (gradient(study, model, layout) - truth).norm() / truth.norm()
                runs[name] = {"gradient_error": error.item(), **study.fit(model, epochs, layout)}
        found.append({"family": family, "depth": depth, "runs": runs})
    return found


def run(study: Study, depths: list[int], parts: tuple[str, ...], say: Callable[[str], None]) -> dict[str, Any]:
    """All measurements; the keys are `PARTS`."""
    results: dict[str, Any] = {}
    curves, responses = [], []
    for family in FAMILIES if {"curves", "responses", "zero_init"} & set(parts) else ():
        for depth in depths:
            model = study.network(family, depth)
            curve = study.fit(model, study.epochs)
            del curve["steps"]
            curves.append({"family": family, "depth": depth, **curve})
            torch.optim.swa_utils.update_bn((study.place(x) for x, _ in study.data.train(study.seed)), model)
            responses.append({"family": family, "depth": depth, "deviations": response_deviations(study, model)})
            say(f"{family}-{depth}: test error {curve['test_error'][-1]:.2f} %, {curve['seconds']:.0f} s")
    results["curves"], results["responses"] = curves, responses
    if "gradients" in parts:
        results["gradients"] = [
            {"family": family, "depth": depth, "norms": gradient_norms(study, study.network(family, depth))}
            for family in FAMILIES
            for depth in depths
        ]
    if "speed" in parts:
        results["speed"] = [
            {"family": family, **study.fit(study.network(family, 18), study.epochs)} for family in FAMILIES
        ]
        say("18 layers: " + ", ".join(f"{one['family']} {one['test_error'][-1]:.2f} %" for one in results["speed"]))
    if "zero_init" in parts:
        standard = next(c for c in curves if (c["family"], c["depth"]) == ("residual", depths[-1]))
        results["zero_init"] = zero_init(study, depths[-1], standard)
        apart = results["zero_init"]["distance_from_identity"]
        say(f"zero-initialised branches: blocks are the identity to within {apart:.1g}")
    if "drift" in parts:
        results["drift"] = drift(
            study, depths[min(1, len(depths) - 1)], max(1, study.epochs // 2), ("auto", "reference")
        )
        for one in results["drift"]:
            plain, *others = one["runs"].items()
            for name, other in others:
                apart = max(abs(a - b) for a, b in zip(plain[1]["steps"], other["steps"], strict=True))
                wrong = other["gradient_error"]
                say(
                    f"{one['family']}-{one['depth']}, {name}: losses differ by at most {apart:.1e}, the first gradient "
                    f"from float64 by {wrong:.1e} (one by one: {plain[1]['gradient_error']:.1e})"
                )
    return {key: value for key, value in results.items() if key in parts}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The paper's degradation study.")
    add = parser.add_argument
    add("--data", default="digits", help="digits, torchvision:CIFAR10:<root>, or a folder with train/ and val/")
    add("--recipe", choices=("cifar", "imagenet"), default="cifar", help="of other data than the digits")
    add("--crop", type=int, help="of other data than the digits (default: 32, 224 for ImageNet)")
    add("--depths", help="comma list (default: 8,20,32,56; 18,34 for ImageNet)")
    add("--epochs", type=int, default=24)
    add("--parts", default=",".join(PARTS), help="comma list (default: all: %(default)s)")
    add("--plain-modules", action="store_true", help="call every module by itself, without the fused functions")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=4)
    add("--out", type=Path, default=Path("out/degradation"), help="folder for the charts and degradation.json")
    add("--redraw", type=Path, metavar="JSON", help="draw the charts of an earlier run, train nothing")
    arguments = parser.parse_args(argv)
    import degradation_charts

    if arguments.redraw:
        recorded = json.loads(arguments.redraw.read_text())
    else:
        parts = tuple(arguments.parts.split(","))
        depths = [
            int(d)
            for d in (arguments.depths or ("18,34" if arguments.recipe == "imagenet" else "8,20,32,56")).split(",")
        ]
        if not set(parts) <= set(PARTS):
            parser.error(f"--parts {arguments.parts}: choose of {', '.join(PARTS)}")
        if arguments.epochs < 1:
            parser.error(f"--epochs {arguments.epochs}: must be at least 1")
        try:
            where = (arguments.data, arguments.recipe, arguments.crop, arguments.workers)
            data = digits() if arguments.data == "digits" else from_disk(*where)
            for depth in depths:
                data.network("plain", depth, device="meta")
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            parser.error(str(error))
        study = Study(data, arguments.epochs, arguments.seed, torch.device(arguments.device), arguments.plain_modules)
        start = time.perf_counter()
        results = run(study, depths, parts, lambda text: print(text, flush=True))
        recorded = {
            "command": shlex.join(["python", "examples/degradation.py", *(sys.argv[1:] if argv is None else argv)]),
            "torch": torch.__version__,
            "data": data.name,
            "epochs": arguments.epochs,
            "seed": arguments.seed,
            "seconds": round(time.perf_counter() - start),
            **results,
        }
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "degradation.json").write_text(json.dumps(_rounded(recorded)) + "\n")
    for path in degradation_charts.draw(recorded, arguments.out):
        print(f"wrote {path}")
    return 0


def _rounded(value: Any) -> Any:
    """Six significant digits are enough for a chart; the losses of steps are compared, and keep all of theirs."""
    if isinstance(value, dict):
        return {key: one if key == "steps" else _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    raise SystemExit(main())
