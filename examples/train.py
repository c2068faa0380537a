"""Train any torchvision or timm ResNet on any folder of pictures, fused or plain, on one process or several.

    python examples/train.py DATA --model resnet50 --epochs 90
    torchrun --nproc-per-node 8 examples/train.py DATA --model timm:resnet50d --amp bf16 --ema 0.9999 --sync-bn

DATA holds `train/<class>/*` and `val/<class>/*`, as torchvision.datasets.ImageFolder reads them. Data pipeline, models,
optimiser and schedules are torchvision's, timm's and PyTorch's; ours are two lines, `fuse` and `graphed`.

Every epoch ends with a checkpoint in `--out`. `--resume` goes on behind the last one, with the pictures, in the order
and with the augmentations that an uninterrupted run would have seen; `--until` stops early. A checkpoint holds plain
PyTorch state: a run may go on plain that began fused, and the other way round.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import gc
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision.transforms import v2

import resnet_fused

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
# What a resumed run must share with the run that it goes on with, or it would be another.
BINDING = (
    *("model", "epochs", "batch", "size", "seed", "amp", "ema", "sync_bn"),
    *("lr", "schedule", "step", "warmup", "weight_decay", "smoothing"),
)


class Problem(Exception):
    """What the user can put right; the message says how."""


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among all."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def processes() -> Iterator[Place]:
    """The process group that torchrun asks for, or one process alone."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        if local >= torch.cuda.device_count():
            raise Problem(f"process {local} has no GPU of its own: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield Place(0, 1, device)
        return
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), device)
    finally:
        gc.collect()  # the trainer is a cycle and its model holds the group, whose threads must end before Python does
        dist.destroy_process_group()


# --- data ---


def folders(data: Path, size: int) -> tuple[torchvision.datasets.ImageFolder, torchvision.datasets.ImageFolder]:
    """The pictures to train on, augmented, and those to validate on."""
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augment = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *finish])
    centre = v2.Compose([v2.Resize(round(size / 0.875), antialias=True), v2.CenterCrop(size), *finish])
    sets = []
    for part, transform in (("train", augment), ("val", centre)):
        if not (data / part).is_dir():
            raise Problem(f"{data / part} is no folder; expected {data}/train/<class>/* and {data}/val/<class>/*")
        try:
            sets.append(torchvision.datasets.ImageFolder(str(data / part), transform))
        except FileNotFoundError as error:  # no classes, or a class without pictures
            raise Problem(f"{data / part}: {error}") from error
    train, val = sets
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise Problem(f"train and val hold different classes; {len(odd)} are in one only, such as {odd[0]!r}")
    return train, val


class Loaders:
    """Batches that depend on nothing but the seed, the epoch and the rank."""

    def __init__(self, options: argparse.Namespace, place: Place) -> None:
        train, val = folders(options.data, options.size)
        self.classes = len(train.classes)
        self.seed, self.rank = options.seed, place.rank
        self.sampler = DistributedSampler(train, place.world, place.rank, seed=options.seed, drop_last=True)
        if len(self.sampler) < options.batch:
            raise Problem(
                f"{options.data}/train has {len(train)} pictures, fewer than a batch of {options.batch} for each of "
                f"{place.world} processes; choose a smaller --batch"
            )
        common: dict[str, Any] = {
            "batch_size": options.batch,
            "num_workers": options.workers,
            "pin_memory": place.device.type == "cuda",
        }
        self.generator = torch.Generator()
        self.train = DataLoader(train, sampler=self.sampler, drop_last=True, generator=self.generator, **common)
        # Every picture once: DistributedSampler would repeat some to make the parts equal.
        self.val = DataLoader(Subset(val, range(place.rank, len(val), place.world)), **common)

    def begin(self, epoch: int) -> None:
        """Put all random numbers to where this epoch starts."""
        self.sampler.set_epoch(epoch)
        seed = (self.seed * 1_000_003 + epoch) * 65_537 + self.rank
        self.generator.manual_seed(seed)  # seeds the workers
        torch.manual_seed(seed)  # augmentation without workers, dropout


# --- model ---


def build(name: str, classes: int) -> nn.Module:
    """A torchvision model, or with the prefix `timm:` one of timm."""
    library, _, bare = name.rpartition(":")
    if library not in ("", "torchvision", "timm"):
        raise Problem(f"--model {name}: unknown library {library!r}; choose torchvision or timm")
    if library == "timm":
        try:
            import timm
        except ImportError as error:
            raise Problem(f"--model {name} needs timm: pip install timm") from error
        known = timm.list_models()
    else:
        known = torchvision.models.list_models(module=torchvision.models)
    if bare not in known:
        near = difflib.get_close_matches(bare, known, n=3)
        raise Problem(f"--model {name}: unknown{'; did you mean ' + ' or '.join(near) + '?' if near else ''}")
    if library == "timm":
        made: nn.Module = timm.create_model(bare, num_classes=classes)
        return made
    return torchvision.models.get_model(bare, num_classes=classes)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for weights only: not for biases and batch norm (He et al., Bag of Tricks, 2018)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def learning_rate(options: argparse.Namespace, steps: int) -> Any:
    """The factor on the learning rate at a step: linear warm-up, then a cosine, or a tenth every `--step` epochs."""

    def factor(step: int) -> float:
        epoch = step / steps
        if epoch < options.warmup:
            return (step + 1) / (options.warmup * steps)
        if options.schedule == "step":
            return 0.1 ** int(epoch / options.step)
        progress = (epoch - options.warmup) / max(options.epochs - options.warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    return factor


class Trainer:
    """A model with all that its training carries from epoch to epoch."""

    def __init__(self, options: argparse.Namespace, place: Place) -> None:
        if options.sync_bn and place.world > 1 and place.device.type == "cpu":
            raise Problem("--sync-bn needs GPUs: DistributedDataParallel refuses nn.SyncBatchNorm on a CPU")
        self.options, self.place = options, place
        self.loaders = Loaders(options, place)
        torch.manual_seed(options.seed)
        model = build(options.model, self.loaders.classes)
        if options.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = model.to(place.device, memory_format=torch.channels_last)
        if options.fuse:
            resnet_fused.fuse(model)
            if place.leads:
                found = resnet_fused.report(model)
                print(f"fused {len(found.fused)} modules, left {len(found.skipped)} alone")
        self.model = model
        self.ema = None
        if options.ema:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True)
        devices = [place.device] if place.device.type == "cuda" else None
        self.parallel = DistributedDataParallel(model, device_ids=devices) if place.world > 1 else model
        groups = parameter_groups(model, options.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True)
        self.schedule = LambdaLR(self.optimizer, learning_rate(options, len(self.loaders.train)))
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=options.amp == "fp16")
        if self.scaler.is_enabled():  # the schedule counts the steps that the scaler skips, the first one too
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        self.step = resnet_fused.graphed(self.compute, self.parallel) if options.graph else self.compute
        self.epoch = 0  # finished ones

    def compute(self, pictures: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, and its gradients."""
        with self.autocast():
            loss = F.cross_entropy(self.parallel(pictures), labels, label_smoothing=self.options.smoothing)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def autocast(self) -> torch.autocast:
        dtype = AMP[self.options.amp]
        return torch.autocast(self.place.device.type, dtype=dtype, enabled=dtype is not None)

    def move(self, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        where: dict[str, Any] = {"device": self.place.device, "non_blocking": True}
        return pictures.to(memory_format=torch.channels_last, **where), labels.to(**where)

    def train_epoch(self) -> float:
        """One pass over the pictures; the mean loss of all processes."""
        self.loaders.begin(self.epoch)
        self.parallel.train()
        total = torch.zeros(2, dtype=torch.float64, device=self.place.device)
        quiet = self.options.quiet or not self.place.leads or not sys.stdout.isatty()
        for batch in track(self.loaders.train, f"epoch {self.epoch + 1}", transient=True, disable=quiet):
            pictures, labels = self.move(*batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.step(pictures, labels)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            total += torch.stack([loss.double(), torch.ones_like(total[0])])
        self.epoch += 1
        if self.place.world > 1:
            dist.all_reduce(total)
        mean = float(total[0] / total[1])
        if not math.isfinite(mean):
            raise Problem(f"the loss became {mean} in epoch {self.epoch}; the last checkpoint is from before")
        return mean

    @torch.inference_mode()
    def accuracy(self, model: nn.Module) -> tuple[float, float]:
        """Top-1 and top-5 over all validation pictures."""
        model.eval()
        if self.place.world > 1:
            for buffer in model.buffers():  # each process has running statistics of its own batches
                dist.broadcast(buffer, 0)
        counts = torch.zeros(3, dtype=torch.int64, device=self.place.device)
        for batch in self.loaders.val:
            pictures, labels = self.move(*batch)
            with self.autocast():
                scores = model(pictures)
            hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
            counts += torch.stack([hits[:, 0].sum(), hits.sum(), counts.new_tensor(len(labels))])
        if self.place.world > 1:
            dist.all_reduce(counts)
        first, five, seen = counts.tolist()
        return first / seen, five / seen

    def save(self, path: Path) -> None:
        """Everything `resume` needs; the model under the names of the plain one."""
        state = {
            "epoch": self.epoch,
            "options": {name: getattr(self.options, name) for name in BINDING} | {"world": self.place.world},
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)  # never half a checkpoint under the name that `resume` reads

    def resume(self, path: Path) -> None:
        if not path.is_file():
            raise Problem(f"--resume: there is no {path}")
        state = torch.load(path, map_location=self.place.device, weights_only=True)
        mine = {name: getattr(self.options, name) for name in BINDING} | {"world": self.place.world}
        for name, value in state["options"].items():
            if mine.get(name) != value:
                raise Problem(f"--resume: {path} was made with {name} {value!r}, not {mine.get(name)!r}")
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]


def run(options: argparse.Namespace, place: Place) -> None:
    trainer = Trainer(options, place)
    checkpoint = options.out / "checkpoint.pt"
    if options.resume:
        trainer.resume(checkpoint)
    elif checkpoint.exists():
        raise Problem(f"{checkpoint} exists; --resume goes on with it, another --out starts anew")
    if place.world > 1:
        dist.barrier()  # nobody looks for a checkpoint once the first may write one
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    while trainer.epoch < min(options.epochs, options.until or options.epochs):
        start = time.perf_counter()
        rate = trainer.schedule.get_last_lr()[0]
        loss = trainer.train_epoch()
        seconds = time.perf_counter() - start
        pictures = len(trainer.loaders.train) * options.batch * place.world
        models = {"": trainer.model} | ({"EMA ": trainer.ema.module} if trainer.ema is not None else {})
        scores = {name: trainer.accuracy(model) for name, model in models.items()}
        if place.leads:
            trainer.save(checkpoint)
            console.print(
                f"epoch {trainer.epoch}/{options.epochs}  loss {loss:.4f}  "
                + "  ".join(f"{name}top-1 {one:.2%}  {name}top-5 {five:.2%}" for name, (one, five) in scores.items())
                + f"  lr {rate:.3g}  {pictures / seconds:.0f} pictures/s",
                soft_wrap=True,
            )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a ResNet on an ImageFolder, fused or plain.")
    parser.add_argument("data", type=Path, help="folder with train/<class>/* and val/<class>/*")
    parser.add_argument("--model", default="resnet50", help="a torchvision model, or timm:<name> (resnet50)")
    parser.add_argument("--fuse", action=argparse.BooleanOptionalAction, default=True, help="run it fused (yes)")
    parser.add_argument(
        "--graph", action=argparse.BooleanOptionalAction, default=True, help="on a GPU, a step as a CUDA graph (yes)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/train"), help="where checkpoint.pt is (out/train)")
    parser.add_argument("--resume", action="store_true", help="go on behind the checkpoint in --out")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--until", type=int, help="stop behind this epoch, to be resumed")
    parser.add_argument("--batch", type=int, default=256, help="pictures per process and step (256)")
    parser.add_argument("--size", type=int, default=224, help="edge of the pictures, in pixels (224)")
    parser.add_argument("--lr", type=float, default=0.1, help="the largest learning rate; not scaled by --batch (0.1)")
    parser.add_argument("--schedule", choices=("cosine", "step"), default="cosine")
    parser.add_argument("--step", type=int, default=30, help="epochs per tenth of the step schedule (30)")
    parser.add_argument("--warmup", type=int, default=5, help="epochs of linear warm-up (5)")
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--smoothing", type=float, default=0.0, help="label smoothing (0)")
    parser.add_argument("--amp", choices=tuple(AMP), default="none", help="mixed precision (none)")
    parser.add_argument("--ema", type=float, default=0.0, help="decay of the averaged weights, such as 0.9999 (0: off)")
    parser.add_argument("--sync-bn", action="store_true", help="batch statistics of all processes")
    parser.add_argument("--workers", type=int, default=4, help="loading processes per process (4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    for name, least in (("epochs", 1), ("batch", 1), ("size", 1), ("step", 1), ("warmup", 0), ("workers", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: must be at least {least}")
    if not 0 <= options.ema < 1:
        parser.error(f"--ema {options.ema}: must be in [0, 1)")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        with processes() as place:
            run(options, place)
    except Problem as problem:
        rank = os.environ.get("RANK")
        print(f"train.py{f' (process {rank})' if rank else ''}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
