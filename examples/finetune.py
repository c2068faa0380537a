"""Fine-tune a torchvision or timm ResNet with fused blocks, in a plain loop; on a GPU each step is a CUDA graph.

    python examples/finetune.py --model resnet18 --epochs 4
    python examples/finetune.py --model timm:resnet26d --weights my_imagenet_weights.pt

The pictures are scikit-learn's handwritten digits, so that nothing is downloaded: put your own dataset in their place.
What is ours are the lines with `resnet_fused`; the checkpoint that is written is that of the plain model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import resnet_fused


def build(name: str, classes: int, weights: Path | None) -> nn.Module:
    """A network with a new last layer; `weights` is a state_dict of the whole network, of any number of classes."""
    if name.startswith("timm:"):
        import timm

        model = timm.create_model(name.removeprefix("timm:"))
    else:
        model = torchvision.models.get_model(name, weights=None)
    if weights:
        model.load_state_dict(torch.load(weights, weights_only=True))
    assert isinstance(model.fc, nn.Linear)
    model.fc = nn.Linear(model.fc.in_features, classes)
    return model


def digits(count: int) -> tuple[TensorDataset, TensorDataset]:
    """`count` pictures to train on and 297 to test on, [3, 32, 32] in fp32."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:count], order[-297:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def main(argv: list[str] | None = None) -> float:
    """Train, test, save; returns the accuracy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="torchvision's name, or timm:<name> (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="a state_dict to begin with (default: random weights)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=400, help="to train on, 1500 at most (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/finetuned.pt"), help="(default: %(default)s)")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(options.model, 10, options.weights).to(device, memory_format=torch.channels_last)
    resnet_fused.fuse(model)  # in place; before or after the optimizer is made, both are right
    print(str(resnet_fused.report(model)).splitlines()[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def forward_backward(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    step = resnet_fused.graphed(forward_backward, model)  # a CUDA graph from the fourth call on; on a CPU the function
    train, test = digits(options.pictures)
    for epoch in range(options.epochs):
        model.train()
        began, losses = time.monotonic(), []
        for images, labels in DataLoader(train, batch_size=25, shuffle=True):
            images = images.to(device, memory_format=torch.channels_last)
            optimizer.zero_grad()
            losses.append(step(images, labels.to(device)))
            optimizer.step()
        loss = torch.stack(losses).mean().item()
        print(f"epoch {epoch + 1}: loss {loss:.3f}, {time.monotonic() - began:.1f} s")

    model.eval()
    with torch.no_grad():
        images, labels = test.tensors
        right = model(images.to(device, memory_format=torch.channels_last)).argmax(1).cpu() == labels
    accuracy = right.double().mean().item()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), options.out)  # the plain model's: it loads without this package
    print(f"accuracy {accuracy:.1%}; wrote {options.out}")
    return accuracy


if __name__ == "__main__":
    main()
