"""`resnet-fused evaluate`."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from resnet_fused import _command
from resnet_fused._command import UsageError
from resnet_fused.cli.output import PROGRAM, complain, show

DTYPES = ("fp32", "bf16", "fp16")


def register(commands: Any) -> None:
    """Add the subcommand to argparse's `commands`."""
    evaluate = commands.add_parser(
        "evaluate",
        help="top-1 and top-5 error: single crop, 10-crop, multi-scale, ensembles",
        description="Top-1 and top-5 error with 95 % confidence intervals under the protocols of the ResNet paper. "
        "Several --model make an ensemble, beside each of them alone.",
    )
    add = evaluate.add_argument
    add(
        "--model",
        action="append",
        required=True,
        metavar="NAME=CHECKPOINT",
        help="a network of resnet_fused.models, torchvision:<name> or timm:<name>, and its weights: a file, or "
        "'pretrained' for what torchvision or timm bring; may be repeated",
    )
    add(
        "--data",
        required=True,
        metavar="FOLDER",
        help="a folder with a subfolder per class, or torchvision:<dataset>:<root>",
    )
    add("--protocol", metavar="NAMES", default="single", help="single (one centre crop), ten-crop, multi-scale, as a "
        "comma list (default: %(default)s)")  # fmt: skip
    add("--shorter-side", type=int, metavar="PIXELS", help="resize pictures to this before crops are cut (default: 256 "
        "for crops of 224, in proportion for others)")  # fmt: skip
    add("--crop", type=int, metavar="PIXELS", help="side of a crop (default: what the first model was trained on)")
    add("--scales", metavar="SIZES", help="multi-scale: shorter sides that pictures are resized to, as a comma list "
        "(default: 224,256,384,480,640 for crops of 224)")  # fmt: skip
    add("--window", type=int, metavar="N", help="multi-scale: side of the features that the classifier averages at "
        "each place (default: what --crop gives: 7 for 224)")  # fmt: skip
    add("--average", default="softmax", choices=("softmax", "logits"), help="multi-scale: what is averaged (default: "
        "%(default)s)")  # fmt: skip
    add("--flip", action="store_true", help="multi-scale: average over the mirrored pictures, too")
    add("--batch", type=int, metavar="N", default=16, help="pictures at a time (default: %(default)s)")
    add("--workers", type=int, metavar="N", default=0, help="processes that decode pictures (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="at most this many pictures, evenly spread over the data")
    add("--device", help="cpu, cuda or cuda:<index> (default: a GPU if there is one)")
    add("--dtype", default="fp32", choices=DTYPES, help="fp16 and bf16 by autocast (default: %(default)s)")
    add("--backend", default="auto", help="the kernels that run: auto, aten (native PyTorch), triton, cuda or "
        "reference (default: %(default)s)")  # fmt: skip
    add("--plain", action="store_true", help="leave torchvision's and timm's models as they are, unfused")
    add("--json", type=Path, metavar="FILE", help="write the results and what they were made with here")
    evaluate.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; the exit status is 2 after one line on stderr where the arguments cannot be honoured."""
    try:
        from rich.console import Console
        from torchvision import datasets  # noqa: F401 - pictures, crops and datasets are torchvision's

        from resnet_fused.evaluate import pictures, report
        from resnet_fused.evaluate import run as runner
    except ImportError as error:
        return complain(f"evaluate needs the extra packages of `pip install 'resnet_fused[bench]'`: {error}")
    import torch

    import resnet_fused

    try:
        chosen = _command.choose_many(arguments.protocol, runner.PROTOCOLS, "protocol")
        device = _command.resolve_device(arguments.device)
        _check(arguments)
        _command.check_backend(arguments.backend, device)
        source = pictures.open_data(arguments.data)
        loaded = _load(arguments)
        _say_order(arguments.data, source, loaded)
        settings = _settings(arguments, loaded[0].crop, device)
        _check_memory(settings, chosen)
        contestants = []
        for one in loaded:
            if not arguments.plain:
                resnet_fused.fuse(one.model)
            contestants.append((one.name, one.model.to(device, memory_format=torch.channels_last)))
        with resnet_fused.use_backend(arguments.backend):
            evaluation = runner.evaluate(contestants, source, chosen, settings, _Progress())
    except ValueError as error:  # UsageError, and what the protocols and `use_backend` refuse
        raise UsageError(str(error)) from None
    out = Console(width=None if sys.stdout.isatty() else 150)

    def write(path: Path) -> None:
        command = shlex.join([PROGRAM, *arguments.argv])
        _command.write_json(report.to_json(evaluation, loaded, arguments.data, settings, command), path)

    status = 130 if evaluation.interrupted else 0
    return show(out, status, lambda: report.render(evaluation, out), ("--json", arguments.json, write))


def _load(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    from resnet_fused.evaluate.loading import load

    return [load(text) for text in arguments.model]


def _say_order(data: str, source: Any, loaded: Any) -> None:
    """Say what class a folder stands for, where there are fewer than a model has outputs: its name is not read."""
    from resnet_fused.evaluate.loading import outputs

    if data.startswith("torchvision:"):
        return
    folders = len(source.classes)
    with contextlib.suppress(UsageError):  # a classifier that is no matrix
        if (most := max(outputs(one.model.state_dict()) for one in loaded)) > folders:
            order = "the k-th folder in alphabetical order is taken as class k"
            print(f"{folders} class folders, {most} outputs: {order}", file=sys.stderr)


def _settings(arguments: argparse.Namespace, trained_on: int, device: Any):  # type: ignore[no-untyped-def]
    import torch

    from resnet_fused.evaluate import protocols
    from resnet_fused.evaluate.run import Settings

    crop = arguments.crop or trained_on
    shorter = arguments.shorter_side or (round(crop * protocols.SHORTER_SIDE / protocols.CROP) if crop > 32 else crop)
    if shorter < crop:
        raise UsageError(f"--shorter-side {shorter} is smaller than the crop of {crop}")
    scales = tuple(round(crop * scale / protocols.CROP) for scale in protocols.SCALES)
    if arguments.scales:
        try:
            scales = tuple(int(item) for item in arguments.scales.split(","))
        except ValueError:
            scales = (0,)
        if min(scales) < 1:
            raise UsageError(f"--scales {arguments.scales!r} is not a comma list of integers > 0, like 224,256")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype]
    return Settings(
        shorter_side=shorter,
        crop=crop,
        scales=scales,
        window=arguments.window,
        average=arguments.average,
        flip=arguments.flip,
        batch=arguments.batch,
        workers=arguments.workers,
        limit=arguments.limit,
        device=device,
        dtype=dtype,
    )


def _check(arguments: argparse.Namespace) -> None:
    for option, least in (("shorter_side", 1), ("crop", 1), ("window", 1), ("batch", 1), ("limit", 1), ("workers", 0)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise UsageError(f"--{option.replace('_', '-')} {value}: must be at least {least}")
    _command.check_writable("--json", arguments.json)  # before an hour's work, not after it


def _check_memory(settings: Any, chosen: tuple[str, ...]) -> None:
    """Raise UsageError where the pictures of one batch, as a protocol sees them, would not fit into memory."""
    from resnet_fused.measure import memory

    s = settings
    views = {
        "single": s.crop**2,
        "ten-crop": 10 * s.crop**2,
        "multi-scale": sum(side**2 for side in s.scales),
    }
    largest = max(views[protocol] for protocol in chosen)
    count = min(s.batch, s.limit or s.batch)
    try:
        memory.require(3 * 4 * (count * largest + max(s.shorter_side, *s.scales) ** 2))
    except MemoryError as error:
        sides = f"--crop {s.crop}, --shorter-side {s.shorter_side}, --scales {','.join(map(str, s.scales))}"
        raise UsageError(f"--batch {s.batch}, {sides}: one batch {error}") from None


class _Progress:
    """A bar on a terminal; elsewhere a line every few seconds and one at the end of each protocol."""

    EVERY_S = 5.0

    def __init__(self) -> None:
        self.start = self.said = time.monotonic()

    def __call__(self, protocol: str, done: int, total: int) -> None:
        now = time.monotonic()
        text = f"[{now - self.start:5.0f} s] {protocol}: {done}/{total} pictures"
        if sys.stderr.isatty():
            print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done == total or now - self.said > self.EVERY_S:
            self.said = now
            print(text, file=sys.stderr, flush=True)
