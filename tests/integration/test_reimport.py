"""The package can be forgotten and imported again in one process, as notebooks and test runners do."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiers import larger

from resnet_fused import ops

PROGRAM = """
import gc, sys
import torch
from torch import nn

def load():
    for name in [name for name in sys.modules if name.split(".")[0] == "resnet_fused"]:
        del sys.modules[name]
    import resnet_fused
    return resnet_fused

def step(package, block, backend):
    block.zero_grad()
    with package.use_backend(backend):
        y = block(x)
        y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in block.parameters())]

x, expected, kept = torch.randn(1, 2, 4, 4), None, []
for k in range(3):
    package = load()
    block = package.fuse(nn.Sequential(package.nn.BasicBlock(2, 2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()))
    if kept:
        block.load_state_dict(kept[0][1].state_dict())
    if "--keep" in sys.argv:
        kept.append((package, block))
    elif not kept:
        kept.append((package, package.unfuse(block)))
    for used in [*kept, (package, block)]:
        for backend in sys.argv[2:]:
            actual = step(*used, backend)
            expected = expected or actual
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)
    if "--keep" in sys.argv:  # an old fused module, fused by the new package
        assert len(package.report(package.fuse(kept[0][1])).fused) == 2
    del package, block
    gc.collect()
print("imported", k + 1, "times")
"""


@pytest.mark.parametrize("keep", ["--keep", larger("--forget")])
def test_the_ops_run_after_every_import_and_so_do_old_modules(keep):
    backends = [name for name in ("reference", "cuda") if ops.available(name, "cpu")]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, keep, *backends]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "imported 3 times\n", done.stderr
