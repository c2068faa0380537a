"""Calls as CUDA graphs: what the GPU does, without the time it takes to launch each kernel.

Networks that are worth tuning for run as CUDA graphs, or far enough ahead of the GPU: there a launcher's own overhead,
which differs from candidate to candidate, costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from resnet_fused.measure.timing import Call

WARM_UP = 2


def captured(call: Call, device: torch.device, pool: object | None = None) -> Callable[[], object]:
    """The call as a CUDA graph, its results in memory that graphs of the same pool share; elsewhere the call itself.

    Args:
        call: runs on the current stream, and waits for nothing.
        device: where.
        pool: of `torch.cuda.graph_pool_handle()`.

    Raises:
        RuntimeError: it cannot be captured, or does not run.
    """
    if device.type != "cuda":
        call()
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # compilation, and what cuDNN tries: all outside of the graph
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
        call()
    graph.replay()
    torch.cuda.synchronize(device)
    return graph.replay
