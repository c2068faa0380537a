"""What ran longest, by name: kernels on a GPU, ops without their callees on a CPU."""

import types

import pytest
import torch
from rich.console import Console

from resnet_fused.bench import kernel_times
from resnet_fused.bench.kernel_times import Kernel

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def event(name, kind, start, end, own=0.0, mark=False):
    times = types.SimpleNamespace(start=start, end=end)
    return types.SimpleNamespace(
        name=name, device_type=kind, time_range=times, self_cpu_time_total=own, is_user_annotation=mark
    )


EVENTS = [
    event("one step", CPU, 0, 100, 10, mark=True),
    event("aten::conv2d", CPU, 0, 60, 5),
    event("aten::cudnn_convolution", CPU, 1, 59, 50),
    event("autograd::engine::evaluate_function: X", CPU, 60, 70, 3),
    event("one step", CUDA, 0, 100, mark=True),
    event("sm90_xmma_fprop", CUDA, 10, 40),
    event("sm90_xmma_fprop", CUDA, 40, 60),
    event("elementwise", CUDA, 60, 70),
]


def test_on_a_gpu_its_kernels_count_and_marks_do_not():
    found = kernel_times.kernels(EVENTS, on_gpu=True, steps=2)
    assert found == (Kernel("sm90_xmma_fprop", 1, 0.025), Kernel("elementwise", 0.5, 0.005))


def test_on_a_cpu_an_op_counts_without_those_it_calls():
    names = {kernel.name: kernel.ms for kernel in kernel_times.kernels(EVENTS[:3], on_gpu=False, steps=1)}
    assert names == {"aten::cudnn_convolution": pytest.approx(0.05), "aten::conv2d": pytest.approx(0.005)}


def test_the_table_adds_up_and_names_are_cut(capsys):
    found = tuple(Kernel("k" * 200 if i == 0 else f"k{i}", 2, 10.0 - i / 2) for i in range(18))
    console = Console(width=150)
    console.print(kernel_times.table("all", found))
    out = capsys.readouterr().out
    assert "3 others" in out and "..." in out and f"{10 / sum(k.ms for k in found):.1%}" in out and "5.0000" in out


def test_a_measured_call_tells_its_ops():
    x = torch.randn(64, 64)
    found = kernel_times.measure(lambda: x @ x, torch.device("cpu"), 3)
    product = next(kernel for kernel in found if kernel.name == "aten::mm")
    assert product.calls == 1 and product.ms > 0
