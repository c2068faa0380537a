"""Fuse the backbone of a detector, train and freeze a segmentation network.

    python examples/backbones.py --side 320

Nothing is special about them: `fuse` looks at every module, whoever calls it. The weights are random here, so that
nothing is downloaded; torchvision's `weights="DEFAULT"` goes where `weights=None` stands.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.segmentation import deeplabv3_resnet50

import resnet_fused


def detect(side: int) -> tuple[Tensor, Tensor]:
    """A Faster R-CNN's boxes of one picture, plain and fused. It takes lists, so it is fused and not frozen."""
    detector = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=side, max_size=side).eval()
    picture = torch.rand(3, side, side)
    with torch.no_grad():
        plain = detector([picture])[0]["boxes"]
        resnet_fused.fuse(detector)
        fused = detector([picture])[0]["boxes"]
    print(f"detector: {str(resnet_fused.report(detector)).splitlines()[0]}; {len(fused)} boxes")
    return plain, fused


def segment(side: int) -> tuple[Tensor, Tensor]:
    """A training step of DeepLabV3, then its masks' logits, plain and frozen."""
    network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3)
    resnet_fused.fuse(network.to(memory_format=torch.channels_last))
    pictures = torch.rand(2, 3, side, side).to(memory_format=torch.channels_last)
    masks = torch.randint(3, (2, side, side))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    loss = F.cross_entropy(network(pictures)["out"], masks)
    loss.backward()
    optimizer.step()
    print(f"segmentation: {str(resnet_fused.report(network)).splitlines()[0]}; loss {loss.item():.2f}")
    frozen = resnet_fused.freeze(network.eval(), pictures)
    print(str(frozen.plan).splitlines()[0])
    resnet_fused.unfuse(network)  # exactly torchvision's classes again
    with torch.no_grad():
        return network(pictures)["out"], frozen(pictures)["out"]


def main(argv: list[str] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Both; returns what the plain networks computed and what ours did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=224, help="of the pictures (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    return {"boxes": detect(options.side), "logits": segment(options.side)}


if __name__ == "__main__":
    main()
