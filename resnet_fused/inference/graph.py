"""A network as CUDA graphs, one for each shape of input."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

MAX_GRAPHS = 8
_COPIED = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

Network = Callable[[Tensor], Any]


def capture(network: Network, example: Tensor) -> Network:
    """The network as a CUDA graph for inputs like `example`; results are copies, free of the graph's memory."""
    # Whoever calls first decides nothing: a tensor made in inference mode could not be written to outside of it.
    with torch.cuda.device(example.device), torch.inference_mode(False), torch.no_grad():
        static_input = example.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Outside the capture: cuDNN chooses its algorithms, Triton compiles, every convolution asks its backend
            # whether it takes these operands, and the allocator fills its pools.
            for _ in range(3):
                network(static_input)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # PyTorch's default is one stream, on the device that came first
            static_output = network(static_input)
    opaque = {type(leaf).__name__ for leaf in tree_leaves(static_output) if not isinstance(leaf, _COPIED)}
    if opaque:  # whose tensors the next replay would overwrite in the hands of whoever got this one's
        raise RuntimeError(f"the result holds a {opaque.pop()}, which torch.utils._pytree does not look into")

    def replay(x: Tensor) -> Any:
        static_input.copy_(x)
        graph.replay()
        return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, static_output)

    return replay


def leaves(value: Any) -> Iterator[Any]:
    """What a result is made of, in containers and in dataclasses."""
    for leaf in tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from leaves(getattr(leaf, field.name))
        else:
            yield leaf


class Graphs:
    """A network by graph for the first `MAX_GRAPHS` shapes it meets, since each keeps its memory; else op by op.

    Args:
        network: neither synchronises nor depends on the values of its input.
        capture: makes the callable for inputs like an example.
    """

    def __init__(self, network: Network, capture: Callable[[Network, Tensor], Network] = capture) -> None:
        self.network = network
        self._capture = capture
        self._captured: dict[Any, Network] = {}

    def __call__(self, x: Tensor) -> Any:
        key = (x.shape, x.stride(), x.dtype, x.device)
        if key not in self._captured:
            if len(self._captured) == MAX_GRAPHS:
                return self.network(x)
            try:
                self._captured[key] = self._capture(self.network, x)
            except RuntimeError as error:
                y = self.network(x)  # which raises where the fault is the input's
                warnings.warn(f"freeze: no CUDA graph, the network runs kernel by kernel: {error}", stacklevel=5)
                self._captured[key] = self.network
                return y
        return self._captured[key](x)
