"""What RESNET_FUSED_BUILD and its neighbours choose, in a fresh process each; the built library and its record."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from resnet_fused import _library
from resnet_fused.ops import backends

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("RESNET_FUSED_BUILD", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "NVCC_THREADS")


def choose(code: str = "print(build.choose())", path: str | None = None, **environment: str) -> tuple[int, str]:
    """Runs `code` with csrc/build.py as `build`; its output, or the one line of its error."""
    program = f"import build\ntry:\n    {code}\nexcept build.Unusable as problem:\n    raise SystemExit(str(problem))\n"
    settings = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    settings |= {"PYTHONPATH": str(ROOT / "csrc"), **environment}
    if path is not None:
        settings["PATH"] = path
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=settings, timeout=600)
    return run.returncode, (run.stdout + run.stderr).strip()


def nothing_to_do(folder: Path) -> str:
    """What the ninja that builds here says, asked to be quiet, where nothing is to be done: by its version."""
    (folder / "build.ninja").write_text("build x: phony\n")
    ninja = choose("print(build.find_tools()[1])")[1]
    run = subprocess.run([ninja, "-C", str(folder), "--quiet"], capture_output=True, text=True, check=True)
    said = run.stdout.strip()
    assert said in ("", "ninja: no work to do.")
    return said


def toolkit(folder: Path, version: str = "13.0", header: bool = True, wrapper: Path | None = None) -> Path:
    """A folder that looks like a CUDA toolkit of this version; `wrapper` is a script that calls its nvcc."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
case "$*" in
  *--dryrun*) echo '#$ TOP={folder}/bin/..' >&2 ;;
  *--list-gpu-arch*) printf 'compute_80\\ncompute_90\\ncompute_100\\n' ;;
  *) echo 'Cuda compilation tools, release {version}, V{version}.1' ;;
esac
"""
    )
    nvcc.chmod(0o755)
    if header:
        (folder / "include").mkdir()
        (folder / "include" / "cuda_runtime.h").touch()
        (folder / "lib64").mkdir()
        (folder / "lib64" / "libcudart_static.a").touch()
    if wrapper is not None:
        wrapper.mkdir()
        (wrapper / "nvcc").write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
        (wrapper / "nvcc").chmod(0o755)
    return folder


needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="torch is a build without CUDA")
MAJOR = (torch.version.cuda or "0").split(".")[0]


_spec = importlib.util.spec_from_file_location("resnet_fused_build", ROOT / "csrc" / "build.py")
assert _spec is not None and _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = build
_spec.loader.exec_module(build)

try:
    WITHOUT_CUDA = build.choose_cpu().kind  # what `auto` falls back to on this machine
except build.Unusable:
    WITHOUT_CUDA = "none"
BESIDE = {f"_C_cpu.{kind}" for kind in ("so", "json")} if WITHOUT_CUDA == "cpu" else set()


def test_an_unknown_kind_is_one_clear_error():
    code, text = choose(RESNET_FUSED_BUILD="gpu")
    assert code == 1
    assert text == "RESNET_FUSED_BUILD='gpu' is unknown; choose one of auto, cuda, cpu, none, host"


def test_a_compiler_or_a_machine_without_avx512_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    with pytest.raises(build.Unusable, match="linux x86_64, this is .* aarch64"):
        build.choose_cpu()
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setattr(build, "find_tools", lambda: ("false", None))
    with pytest.raises(build.Unusable, match="false does not know AVX-512 and AMX"):
        build.choose_cpu()


@pytest.mark.parametrize("kind", ["none", "host"])
def test_the_kinds_that_need_no_toolkit(kind):
    code, text = choose(RESNET_FUSED_BUILD=kind)
    assert code == 0 and text.startswith(f"resnet_fused: building kind {kind!r}: ") and "\n" not in text


@needs_cuda_torch
@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_toolkit_named_by_the_environment(tmp_path, variable):
    home = toolkit(tmp_path / "cuda", f"{MAJOR}.0")
    code, text = choose(**{variable: str(home)})
    assert code == 0 and text == f"resnet_fused: building kind 'cuda': nvcc {MAJOR}.0 in {home} for 80, 90, 100+PTX"


@needs_cuda_torch
@pytest.mark.parametrize("how", ["wrapper script", "link"])
def test_the_toolkit_behind_an_nvcc_on_the_path(tmp_path, how):
    home = toolkit(tmp_path / "cuda", f"{MAJOR}.0", wrapper=tmp_path / "wrapped")
    folder = tmp_path / "wrapped"
    if how == "link":
        folder = tmp_path / "linked"
        folder.mkdir()
        (folder / "nvcc").symlink_to(home / "bin" / "nvcc")
    code, text = choose(path=f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert code == 0 and f"in {home} for" in text


@needs_cuda_torch
@pytest.mark.parametrize(
    "version,header,reason",
    [
        ("11.8", True, "holds nvcc 11.8, but torch"),
        (f"{MAJOR}.0", False, "but no include/cuda_runtime.h"),
    ],
)
def test_a_toolkit_that_cannot_be_used_is_named(tmp_path, version, header, reason):
    """As CUDA_HOME and nothing else: the search goes on to other places, so those are taken away."""
    home = toolkit(tmp_path / "cuda", version, header)
    only = f"build._candidates = lambda: [build.Path({str(home)!r})]; print(build.choose())"
    code, text = choose(only)
    assert code == 0 and str(home) in text and reason in text
    assert text.startswith(f"resnet_fused: building kind {WITHOUT_CUDA!r}: ")
    for request in ({"RESNET_FUSED_BUILD": "cuda"}, {"FORCE_CUDA": "1"}):
        code, text = choose(only, **request)
        assert code == 1 and text.startswith("a CUDA build was asked for, but ") and reason in text and "\n" not in text


@needs_cuda_torch
def test_no_toolkit_at_all():
    code, text = choose("build._candidates = lambda: []; print(build.choose())")
    assert code == 0 and "no CUDA toolkit was found (CUDA_HOME, CUDA_PATH, nvcc on PATH, /usr/local/cuda*)" in text


@needs_cuda_torch
@pytest.mark.parametrize("asked,chosen", [("8.0", "80"), ("9.0a;10.0+PTX", "90a, 100+PTX"), ("8.0, 9.0", "80, 90")])
def test_torch_cuda_arch_list(tmp_path, asked, chosen):
    home = toolkit(tmp_path / "cuda", f"{MAJOR}.0")
    code, text = choose(CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=asked)
    assert code == 0 and text.endswith(f"for {chosen}")


@needs_cuda_torch
@pytest.mark.parametrize(
    "capabilities,chosen",
    [
        (["9.0", "9.0"], "90"),
        (["10.0", "8.0"], "80, 100"),
        (["10.3"], "80, 90, 100+PTX"),  # newer than nvcc: its driver compiles the PTX
        (["[N/A]"], "80, 90, 100+PTX"),
        (None, "80, 90, 100+PTX"),
    ],
)
def test_native_is_the_gpu_that_is_here(tmp_path, capabilities, chosen):
    home, tools = toolkit(tmp_path / "cuda", f"{MAJOR}.0"), tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "g++"):
        (tools / tool).symlink_to(shutil.which(tool))
    if capabilities is not None:
        (tools / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo '{one}'\n" for one in capabilities))
        (tools / "nvidia-smi").chmod(0o755)
    code, text = choose(path=str(tools), CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST="native")
    assert code == 0 and text.endswith(f"for {chosen}")


@needs_cuda_torch
@pytest.mark.parametrize("asked", ["7.0", "Hopper", "8.0;x"])
def test_an_unknown_architecture_names_the_choices(tmp_path, asked):
    home = toolkit(tmp_path / "cuda", f"{MAJOR}.0")
    code, text = choose(CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=asked)
    assert (
        code == 1
        and text.endswith(f"; nvcc {MAJOR}.0 knows 8.0, 9.0, 10.0, or native")
        and asked.split(";")[-1] in text
    )


def test_what_compiles_says_how_long_it_takes_and_how_to_do_without():
    for kind, architectures, said in (("none", (), ""), ("cuda", ("80", "90"), "2 GPU architecture(s) on 3 cores")):
        code = f"print(build.Target({kind!r}, 'why', None, {architectures}).advice)"
        status, text = choose(code, MAX_JOBS="3")
        assert status == 0 and said in text and ("RESNET_FUSED_BUILD=none" in text) == bool(said)
    assert "on 3 cores" in choose("print(build.Target('host', 'why').advice)", MAX_JOBS="3")[1]


def test_gencode_flags():
    code, text = choose("print(build.gencode_flags(['80', '90a', '120+PTX']))")
    names = ["80,code=sm_80", "90a,code=sm_90a", "120,code=sm_120", "120,code=compute_120"]
    assert code == 0 and text == str([f"-gencode=arch=compute_{name}" for name in names])


def test_a_build_needs_no_import_of_torch():
    code, text = choose("build.choose(); import sys; print('torch' in sys.modules)", RESNET_FUSED_BUILD="host")
    assert (code, text) == (0, "False")


@pytest.mark.larger  # the stand-in's build, below, of the real sources; that they compile, every run of the tests shows
def test_a_second_build_of_the_sources_compiles_nothing(tmp_path):
    """And the first one leaves a library that loads into this torch and registers every op."""
    target = "build.Target('host', 'test')"
    library, work = tmp_path / "a folder" / "_C.so", tmp_path / "work $1"
    code = f"build.compile_library({target}, build.Path({str(library)!r}), build.Path({str(work)!r}), ['-O0'])"
    status, text = choose(code)
    assert status == 0, text
    stamp = library.stat().st_mtime_ns
    status, text = choose(code)
    assert (status, text) == (0, nothing_to_do(tmp_path)) and library.stat().st_mtime_ns == stamp
    ops = f"import torch; torch.ops.load_library({str(library)!r}); x = torch.randn(2, 8, 3, 3)\n"
    ops += "print(torch.equal(torch.ops.resnet_fused_host.add_act(x, x, True), (x + x).relu()))"
    run = subprocess.run([sys.executable, "-c", ops], capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr


@pytest.fixture
def compiles(tmp_path):
    """Build four empty sources with a stand-in for the compiler; status, output and where the library goes."""
    sources, work, library = tmp_path / "csrc", tmp_path / "work $1", tmp_path / "a folder" / "_C.so"
    (sources / "host").mkdir(parents=True)
    for name in ("a.cu", "b.cu", "ops.cpp", "host/fibre.cpp"):
        (sources / name).touch()

    def build(ninja: bool, breaks: bool = False) -> tuple[int, str, Path, Path]:
        compiler = tmp_path / "compiler"
        fails = 'case "$*" in *b.cu*) exit 3;; esac\n' if breaks else ""
        depends = 'while [ "$1" != -o ]; do [ "$1" = -MF ] && echo "x:" > "$2"; shift; done'
        compiler.write_text(f'#!/bin/sh\n{fails}{depends}; echo made > "$2"\n')
        compiler.chmod(0o755)
        paths = ", ".join(f"build.Path({str(path)!r})" for path in (library, work))
        tools = f"lambda: ({str(compiler)!r}, found)"
        code = f"found = build.find_tools()[1] if {ninja} else None; build.find_tools = {tools}; "
        code += f"build.compile_library(build.Target('host', ''), {paths}, csrc=build.Path({str(sources)!r}))"
        return *choose(code), library, work

    return build


def test_a_second_build_compiles_nothing(compiles, tmp_path):
    status, text, library, _ = compiles(ninja=True)
    assert status == 0 and library.read_text() == "made\n", text
    stamp = library.stat().st_mtime_ns
    status, text, *_ = compiles(ninja=True)
    assert (status, text) == (0, nothing_to_do(tmp_path)) and library.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("breaks", [False, True])
def test_without_ninja_all_is_compiled(compiles, breaks):
    status, text, library, work = compiles(ninja=False, breaks=breaks)
    made = {path.name for path in work.iterdir() if path.suffix == ".o"}
    if breaks:
        assert status == 1 and "exit status 3" in text and not library.exists()
        return
    assert (status, text) == (0, "") and library.read_text() == "made\n"
    assert made == {"csrc_a.o", "csrc_b.o", "csrc_ops.o", "host_fibre.o"}


# Several kinds beside each other


@pytest.fixture
def checkout(tmp_path):
    """What a build needs, with a compiler that writes which kind it was asked for; a library for a GPU is there."""
    package = tmp_path / "resnet_fused"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "1"\n')
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    stub = "\ndef compile_library(target, library, work):\n    work.mkdir(parents=True, exist_ok=True)\n"
    stub += "    library.write_text(target.kind)\n"
    (tmp_path / "csrc" / "build.py").write_text((ROOT / "csrc" / "build.py").read_text() + stub)
    for name in ("_C_cuda.so", "_C_cuda.json"):
        (package / name).write_text("of a GPU")
    return tmp_path


def setup(checkout: Path, kind: str, *command: str) -> None:
    environment = {**os.environ, "RESNET_FUSED_BUILD": kind, "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *command], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_building_for_tests_leaves_the_library_for_a_gpu(checkout):
    for kind in ("host", "none"):
        setup(checkout, kind, "build_ext", "--inplace")
    package = checkout / "resnet_fused"
    found = {path.name: path.read_text() for path in package.glob("_C_*")}
    assert found.keys() == {"_C_cuda.so", "_C_cuda.json", "_C_host.so", "_C_host.json", "_C_none.json"} | BESIDE
    assert found["_C_cuda.so"] == found["_C_cuda.json"] == "of a GPU" and found["_C_host.so"] == "host"
    assert json.loads(found["_C_host.json"])["kind"] == "host"


def test_a_wheel_has_the_library_it_was_built_with_and_no_other(checkout):
    for kind, expected in (("host", {"_C_host.so", "_C_host.json"} | BESIDE), ("none", {"_C_none.json"})):
        setup(checkout, kind, "bdist_wheel", "--dist-dir", kind)
        (wheel,) = (checkout / kind).glob("*.whl")
        assert ("none-any" in wheel.name) == (kind == "none")
        names = zipfile.ZipFile(wheel).namelist()
        assert {name.removeprefix("resnet_fused/") for name in names if "_C" in name} == expected


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package of whose libraries only the records are there: `package(kind, **record)` adds one."""
    monkeypatch.setattr(_library, "_PACKAGE", tmp_path)
    for function in (_library._record, _library.load):
        monkeypatch.setattr(_library, function.__name__, getattr(function, "__wrapped__", function))  # past the cache

    def record(kind: str, **values: object) -> None:
        (tmp_path / f"_C_{kind}.json").write_text(json.dumps({"kind": kind, "reason": "", "torch": "2.11.0", **values}))

    return record


CUDA = {"architectures": ["80", "90+PTX"], "nvcc": "13.0"}


def test_status_says_what_was_built_and_why_not(package):
    assert _library.status().startswith("not built: ") and _library.operators("bn_stats") == {}
    assert "build_ext --inplace" in str(_library.load("cuda"))
    package("none", reason="no toolkit")
    assert _library.load("cpu") == "the compiled kernels are not built: no toolkit"
    package("cuda", **CUDA)
    assert _library.status() == "cuda sm_80, sm_90+PTX (nvcc 13.0, torch 2.11.0)"
    assert "cannot be loaded" in str(_library.load("cuda"))
    assert str(_library.load("cpu")).endswith("torch 2.11.0)) run on cuda tensors; these are on cpu")
    package("host")
    assert _library.status().endswith(
        "torch 2.11.0); host (the CUDA source executed on a CPU, for tests; torch 2.11.0)"
    )
    assert str(_library.load("cpu")).startswith("the compiled kernels (host (")
    assert str(_library.load("mps")).endswith("run on cuda, cpu tensors; these are on mps")
    assert str(_library.load_cpu.__wrapped__()).startswith("the kernels for CPUs are not built: cuda sm_80")
    package("cpu")
    assert _library.status().endswith("; cpu (for training and freeze on a CPU; torch 2.11.0)")
    assert "cannot be loaded" in str(_library.load_cpu.__wrapped__())


def test_each_library_takes_the_tensors_of_its_device(package, monkeypatch):
    """Both in one process; the meta device stands for a GPU."""
    monkeypatch.setattr(_library, "_KINDS", {"meta": "cuda", "cpu": "host"})
    monkeypatch.setattr(_library, "load", lambda device_type: None)
    implementation = backends.implementation.__wrapped__
    libraries = [torch.library.Library(f"resnet_fused_{kind}", "FRAGMENT") for kind in ("cuda", "host")]
    for library, key, answer in zip(libraries, ("Meta", "CPU"), (1, 2), strict=True):
        library.define("twin(Tensor x) -> Tensor")
        library.impl("twin", lambda x, answer=answer: x.new_empty(answer), key)
    monkeypatch.setitem(backends.OPS, "twin", dataclasses.replace(backends.OPS["add_act"], name="twin"))
    package("host")
    assert implementation("cuda", "twin") is torch.ops.resnet_fused_host.twin.default
    package("cuda", **CUDA)
    run = implementation("cuda", "twin")
    assert len(run(torch.ones(1, device="meta"))) == 1 and len(run(torch.ones(1))) == 2
