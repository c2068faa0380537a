"""Two processes of a group on this machine - gloo, and NCCL where there are two GPUs - to run functions of tests on."""

from __future__ import annotations

import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

WORLD = 2
SIZES = {"equal": (2, 2), "unequal": (3, 1), "one empty": (0, 3), "the other empty": (2, 0)}
sizes = pytest.mark.parametrize("batches", SIZES.values(), ids=SIZES)
needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
PATIENCE = 120.0  # seconds; a rank that waits for one that will not come must not hang the tests


class Ranks:
    """`run(function, ...)` calls it on every rank and returns the results in the order of the ranks."""

    def __init__(self, rendezvous: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, rendezvous, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results of `function(rank, *arguments)`.

        Raises:
            AssertionError: a rank raised; its traceback is the message. Or it did not answer in time, or died.
        """
        for pipe in self.pipes:
            pipe.send_bytes(_packed((function, arguments)))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            try:
                assert pipe.poll(PATIENCE), f"rank {rank} did not answer in {PATIENCE:g} s"
                answers.append(_unpacked(pipe.recv_bytes()))
            except (AssertionError, EOFError) as error:
                self.close()
                raise AssertionError(f"rank {rank}: {error!r}") from error
        failures = [f"rank {rank}:\n{text}" for rank, (failed, text) in enumerate(answers) if failed]
        assert not failures, "\n".join(failures)
        return [result for _, result in answers]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(10)


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(rank: int, rendezvous: str, pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    backend = "gloo"
    if torch.cuda.device_count() >= WORLD:
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    while True:
        try:
            function, arguments = _unpacked(pipe.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = (False, function(rank, *arguments))
        except Exception:
            answer = (True, traceback.format_exc())
        pipe.send_bytes(_packed(answer))
