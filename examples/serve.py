"""Serve a frozen ResNet: save and load it, inputs of several shapes, several threads.

    python examples/serve.py --model resnet50 --threads 2 --requests 20

A frozen model is made for the machine it runs on (folded and prepacked weights; on a GPU CUDA graphs), so it is not
what is shipped. Shipped are the plain weights; a server freezes them when it starts, which takes about a second.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Lock

import torch
import torchvision
from torch import Tensor, nn

import resnet_fused


def save(model: nn.Module, path: Path) -> None:
    """What is shipped: the state_dict, which is the plain model's, fused or not."""
    torch.save(model.state_dict(), path)


def load(name: str, path: Path, device: torch.device) -> nn.Module:
    """A frozen model of shipped weights, for this machine."""
    model = torchvision.models.get_model(name, weights=None)
    model.load_state_dict(torch.load(path, weights_only=True))
    model = model.eval().to(device, memory_format=torch.channels_last)
    example = torch.zeros(1, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    return resnet_fused.freeze(model, example)


class Server:
    """Answers requests from any thread. A CUDA graph has one place for its input, so that a GPU serves one request at a
    time, which is all it can compute at once; on a CPU threads run side by side."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self.turn = Lock() if device.type == "cuda" else nullcontext()

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, memory_format=torch.channels_last)
        with self.turn:
            return self.model(images).cpu()


def main(argv: list[str] | None = None) -> float:
    """Serve, compare with the plain model; returns the largest relative difference of logits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="a torchvision ResNet (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--side", type=int, default=224, help="of the largest pictures (default: %(default)s)")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    torch.manual_seed(0)
    plain = torchvision.models.get_model(options.model, weights=None).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        save(plain, path)
        began = time.monotonic()
        server = Server(load(options.model, path, device), device)
    print(f"loaded and frozen in {time.monotonic() - began:.1f} s")
    shapes = [(1, options.side), (4, options.side), (2, options.side // 2)]  # batch and side; no new freeze
    images = [torch.randn(n, 3, side, side) for n, side in shapes] * options.requests
    images = images[: options.requests]
    began = time.monotonic()
    with ThreadPoolExecutor(options.threads) as pool:
        answers = list(pool.map(server, images))
    seconds, count = time.monotonic() - began, sum(map(len, images))
    print(f"{count} pictures in {len(images)} requests of {len(shapes)} shapes, {count / seconds:.1f} pictures/s")
    with torch.no_grad():
        wanted = list(map(plain, images))
    worst = max(float((a - w).abs().max() / w.abs().max()) for a, w in zip(answers, wanted, strict=True))
    print(f"largest difference from the plain model, relative to its largest logit: {worst:.1e}")
    return worst


if __name__ == "__main__":
    main()
