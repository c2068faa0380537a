"""What memory is left, where a control group has a say; and the peak of a call."""

import pytest
import torch

from resnet_fused.measure import memory

GB = 10**9


V2 = ("0::/outer/inner", "", "memory.max", "memory.current", "inactive_file", "max")
V1 = ("4:memory:/outer/inner", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", 2**63)


@pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
def test_what_a_control_group_leaves(version, monkeypatch, tmp_path):
    line, controller, limit_file, usage_file, cache, unlimited = version
    assert 0 < memory.available() < 2**50
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:  50 kB\n")
    (tmp_path / "cgroup").write_text(f"12:cpu:/x\n{line}\n")
    files = {"/proc/meminfo": tmp_path / "meminfo", "/proc/self/cgroup": tmp_path / "cgroup"}
    group = tmp_path / "fs" / controller
    (group / "outer" / "inner").mkdir(parents=True)
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "fs")
    real = memory._lines
    monkeypatch.setattr(memory, "_lines", lambda path: real(files.get(str(path), path)))
    assert memory.available() == 50 * 1024
    for name, limit, used in (("outer", 30000, 20000), ("outer/inner", unlimited, 5)):
        (group / name / limit_file).write_text(f"{limit}\n")
        (group / name / usage_file).write_text(f"{used}\n")
        (group / name / "memory.stat").write_text(f"anon 5\n{cache} 4000\n")
    assert memory.available() == 30000 - 20000 + 4000
    with pytest.raises(MemoryError, match="needs about 1.0 GB of main memory, 0.0 GB are left"):
        memory.require(GB)
    memory.require(14000)
    (tmp_path / "meminfo").unlink()
    assert memory.available() is None
    memory.require(10**18)


def test_peak_memory_sees_a_temporary():
    size = 64 * 2**20
    meter = memory.MemoryMeter(torch.device("cpu"))
    peak = meter.peak(lambda: torch.ones(size // 4).sum())
    small = meter.peak(lambda: torch.ones(1).sum())
    if peak is None:
        pytest.skip("this kernel has no high-water mark to reset")
    assert 0.9 * size < peak < 1.5 * size and small < 0.2 * size
