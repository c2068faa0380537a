"""What the commands share: a file is written whole or not at all, and one that cannot be written is said beforehand."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from resnet_fused import __version__, _command, _library, info
from resnet_fused.info import Info
from resnet_fused.ops import cpu


def test_a_file_is_whole_and_for_everyone_to_read(tmp_path):
    path = tmp_path / "new" / "a.json"
    _command.write_json({"a": 1}, path)
    assert path.read_text() == '{\n "a": 1\n}\n' and stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(file):
        file.write_text("half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        _command.write_atomically(path, fail)
    with pytest.raises(ValueError, match="JSON compliant"):
        _command.write_json(float("nan"), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    pipe, heard = tmp_path / "pipe", []
    os.mkfifo(pipe)
    listener = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    listener.start()
    _command.check_writable("--json", pipe)
    _command.write_json([1], pipe)
    listener.join(10)
    assert heard == ["[\n 1\n]\n"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_cannot_be_written_is_said_beforehand_and_touches_nothing(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a.json", Path("/proc/nowhere/a.json")):
        with pytest.raises(_command.UsageError, match="--json") as error:
            _command.check_writable("--json", path)
        assert "\n" not in str(error.value)
    _command.check_writable("--json", tmp_path / "new" / "folder" / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("value", "count", "hint"),
    [
        ("resnet5", 3, "choices: resnet0, resnet1, resnet2"),
        ("resnet5x", 30, "did you mean resnet5"),
        ("RESNET5X", 30, "did you mean resnet5"),
        ("r", 30, "did you mean resnet0, resnet1"),
        ("vgg", 30, "there are 30, none with a name like it"),
    ],
)
def test_a_choice_that_is_none_names_the_choices_or_those_close_to_it(value, count, hint):
    with pytest.raises(_command.UsageError, match=f"unknown model '{value}'; {hint}"):
        _command.choose(value, (f"resnet{i}" for i in range(count)), "model")


def test_a_list_of_choices_keeps_its_order_and_each_once():
    assert _command.choose_many("bf16, fp32,bf16", ("fp32", "bf16", "fp16"), "dtype") == ("bf16", "fp32")


@pytest.mark.parametrize("text", ["0", "-1", "1,x", "1.5", "many", "", ","])
def test_one_integer_is_one_and_a_list_holds_nothing_else(text):
    assert _command.positive_integer("8", "--batch") == 8 and _command.positive_integers("1,8", "--batch") == (1, 8)
    with pytest.raises(_command.UsageError, match=f"--batch '{text}' is not an integer > 0"):
        _command.positive_integer(text, "--batch")
    with pytest.raises(_command.UsageError):
        _command.positive_integers(text, "--batch")


@pytest.mark.parametrize("text", ["tpu", "cuda:x", "cpu:0", "cuda:", "cuda:99"])
def test_devices_that_are_not_here(text):
    with pytest.raises(_command.UsageError, match=text):
        _command.resolve_device(text)


def test_an_error_of_another_library_is_one_line_and_never_nothing():
    assert _command.one_line(OSError("no\n  such\tfile")) == "no such file"
    assert _command.one_line(AssertionError()) == "AssertionError"
    long = _command.one_line(RuntimeError("missing key " * 99))
    assert len(long) <= 300 and long.startswith("missing key missing") and long.endswith(" ...")


def test_importing_is_silent_and_the_package_runs_as_a_module(tmp_path):
    """No triton, no compiler, nothing printed: only torch is imported."""
    root = Path(_command.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    heavy = {"torch._dynamo", "triton", "torchvision", "rich", "matplotlib"}
    code = f"import resnet_fused, sys; sys.exit(bool({heavy} & set(sys.modules)))"
    for arguments in (["-c", code], ["-m", "resnet_fused", "info"]):
        done = subprocess.run(
            [sys.executable, "-W", "error", *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert bool(done.stdout) == ("info" in arguments)


def test_info_says_which_backends_run_and_why_others_do_not():
    rows = [("aten", "cpu", None), ("cuda", "cpu", "not built")]
    text = str(Info([("torch", "2")], "none", ["cpu"], rows)).splitlines()
    assert [" ".join(line.split()) for line in text[-2:]] == [
        "aten on cpu runs: native PyTorch kernels",
        "cuda on cpu no: not built",
    ]
    assert len({line.index(word) for line, word in zip(text[-2:], ("runs", "no: "), strict=True)}) == 1


def test_info_says_what_runs_frozen_models_on_a_cpu(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "they need AVX-512")
    assert info().frozen == "oneDNN, not our kernels: they need AVX-512"
    monkeypatch.setattr(cpu, "unavailable", lambda: None)
    for found, columns, text in [
        ({"float32", "bfloat16"}, 16, "fp32, bf16; AVX-512 no, VNNI no, AMX no"),
        ({"float32"}, 32, "fp32; AVX-512 yes, VNNI no, AMX no"),
        ({"int8", "amx", "bfloat16", "float32"}, 32, "fp32, bf16, int8; AVX-512 yes, VNNI yes, AMX yes"),
    ]:
        monkeypatch.setattr(cpu, "_supported", lambda f=found, c=columns: dict.fromkeys(f, [c, 4]))
        assert " ".join(str(info()).splitlines()[-1].split()) == f"frozen on a CPU our kernels: {text}"


def test_info_fits_120_columns_and_counts_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(_library, "status", lambda: "; ".join(["built for this and that"] * 20))
    lines = str(info()).splitlines()
    assert max(map(len, lines)) <= 120 and any(line.endswith(", 1 thread") for line in lines)


def test_the_version_is_that_of_the_code_that_runs():
    assert dict(info().versions)["resnet_fused"] == __version__
