"""A GPU's clocks and throttling while it is measured, with nvidia-smi's part played by a script."""

import time

import pytest
import torch

from resnet_fused.measure import telemetry as clocks


def test_clocks_and_throttling_as_nvidia_smi_prints_them():
    output = "1980, 2619, 61, 650.21, 0x0000000000000004\n1755, 2619, 64, [N/A], 0x0000000000000001\n1980, 26"
    seen = clocks.summary(output)
    assert seen["samples"] == 2 and seen["sm_mhz"] == {"min": 1755, "median": 1867.5, "max": 1980}
    assert seen["power_w"]["max"] == 650.21 and seen["throttled"] == {"software power cap": 0.5}
    text = clocks.line(seen)
    assert text.startswith("1755-1980 MHz, 2619 MHz memory, 61-64 C, 650 W;") and "power cap 50% of the time" in text
    assert "not throttled" in clocks.line(clocks.summary("1980, 2619, 61, 650.21, 0x0"))
    assert clocks.summary("") is None and clocks.summary("No devices were found") is None and clocks.line(None) is None


@pytest.mark.parametrize("driver", ["old", "new", "none"])
def test_the_watch_samples_while_it_lasts(driver, tmp_path, monkeypatch):
    unknown = {"old": "clocks_event_reasons", "new": "nothing", "none": "query-gpu"}[driver]
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f"""#!/bin/sh
case "$*" in *{unknown}*) exit 2;; esac
echo "1980, 2619, 61, 650.21, 0x4"
case "$*" in *loop-ms*) touch {tmp_path}/sampled; sleep 60 >/dev/null & wait;; esac
"""
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(clocks.torch.cuda, "get_device_properties", lambda device: object())
    with clocks.GpuTelemetry(torch.device("cuda", 0)) as watch:
        while driver != "none" and not (tmp_path / "sampled").exists():
            time.sleep(0.01)
    seen = watch.seen()
    assert (seen is None) == (driver == "none")
    assert driver == "none" or (seen["samples"] == 1 and seen["throttled"] == {"software power cap": 1.0})
    with clocks.GpuTelemetry(torch.device("cpu")) as watch:
        pass
    assert watch.seen() is None
