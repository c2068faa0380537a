"""What ran longest, by name: kernels on a GPU, ops without their callees on a CPU."""

import types

import pytest
import torch
from rich.console import Console

from resnet_fused.bench import kernel_times
from resnet_fused.bench.kernel_times import Kernel

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def average(key, kind, count, own, mark=False):
    times = {"self_cpu_time_total": 0, "self_device_time_total": 0}
    times["self_cpu_time_total" if kind == CPU else "self_device_time_total"] = own
    return types.SimpleNamespace(key=key, device_type=kind, count=count, is_user_annotation=mark, **times)


AVERAGES = [
    average("one step", CPU, 2, 10, mark=True),
    average("aten::conv2d", CPU, 2, 5),
    average("aten::cudnn_convolution", CPU, 2, 50),
    average("autograd::engine", CPU, 1, 0),
    average("ConvolutionBackward0", CPU, 1, 3),
    average("one step", CUDA, 2, 100, mark=True),
    average("elementwise", CUDA, 1, 10),
    average("sm90_xmma_fprop", CUDA, 2, 50),
]


@pytest.mark.parametrize("on_gpu,expected", [
    (True, (Kernel("sm90_xmma_fprop", 1, 0.025), Kernel("elementwise", 0.5, 0.005))),
    (False, (Kernel("aten::cudnn_convolution", 1, 0.025), Kernel("aten::conv2d", 1, 0.0025))),
])  # fmt: skip
def test_kernels_on_a_gpu_ops_on_a_cpu_and_no_marks(on_gpu, expected):
    assert kernel_times.kernels(AVERAGES, on_gpu, steps=2) == expected


def test_the_table_adds_up_and_names_are_cut(capsys):
    found = tuple(Kernel("k" * 200 if i == 0 else f"k{i}", 2, 10.0 - i / 2) for i in range(18))
    console = Console(width=150)
    console.print(kernel_times.table("all", found))
    out = capsys.readouterr().out
    assert "3 others" in out and "..." in out and f"{10 / sum(k.ms for k in found):.1%}" in out and "5.0000" in out


def test_a_recorded_call_tells_its_ops_without_those_they_call():
    x, w = torch.randn(4, 64, 32, 32), torch.randn(64, 64, 3, 3)
    profiler = kernel_times.record(lambda: torch.conv2d(x, w), torch.device("cpu"), 3)
    found = {kernel.name: kernel for kernel in kernel_times.kernels(profiler.key_averages(), False, 3)}
    whole, *_ = (one for one in profiler.key_averages() if one.key == "aten::conv2d")
    assert found["aten::conv2d"].calls == 1 and 0 < found["aten::conv2d"].ms < whole.cpu_time_total / 1e3 / 3 / 2
    assert kernel_times.STEP not in found
