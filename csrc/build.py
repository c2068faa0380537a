"""Builds the C++/CUDA library: finds a toolkit, writes a ninja file, runs it. Used by setup.py, the compile gate and the tests; needs no torch import.

torch.utils.cpp_extension is not used: it links against the unstable ABI, wants a GPU or an architecture list, and compiles for one Python at a time.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
KINDS = ("auto", "cuda", "none", "host")
DEFAULT_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
SOURCES = sorted(CSRC.glob("*.cu")) + [CSRC / "ops.cpp"]
HOST_SOURCES = sorted((CSRC / "host").glob("*.cpp"))
# The stable ABI of torch 2.10: one binary for every torch from there on.
COMMON_FLAGS = ("-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000")
HOST_FLAGS = ("-DRESNET_FUSED_HOST", "-O2", "-g1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized")
CUDA_FLAGS = ("-O3", "-lineinfo", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")


class Unusable(Exception):
    """Why a kind of build is not possible here, in one line."""


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str
    cuda: str | None


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: str

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    def folder(self, kind: str, file: str) -> Path | None:
        """The folder of this kind (`include`, `lib`) that holds `file`."""
        places = [self.home / kind, self.home / f"{kind}64", *self.home.glob(f"targets/*/{kind}")]
        return next((place for place in places if (place / file).exists()), None)


@dataclass(frozen=True)
class Target:
    """What to build, and why: `kind` is "cuda", "host" or "none"."""

    kind: str
    reason: str
    toolkit: Toolkit | None = None
    architectures: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"resnet_fused: building kind {self.kind!r}: {self.reason}"

    def describe(self) -> str:
        """The record that the package keeps: what `resnet_fused._library.status()` reads."""
        toolkit = self.toolkit.version if self.toolkit else None
        torch = find_torch().version if self.kind != "none" else None
        record = {"kind": self.kind, "reason": self.reason, "architectures": self.architectures, "nvcc": toolkit, "torch": torch}
        return json.dumps(record, indent=1) + "\n"


@functools.cache
def find_torch() -> Torch:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Unusable("torch is not installed in the environment that builds")
    root = Path(next(iter(spec.submodule_search_locations)))
    version = runpy.run_path(str(root / "version.py"))
    return Torch(root, str(version["__version__"]), version.get("cuda"))


def _nvcc_home(nvcc: Path) -> Path:
    """The toolkit that an nvcc belongs to. A wrapper script or a link is asked, not read: the real nvcc prints where it stands."""
    run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", run.stderr, re.M)
    return Path(top[1]).resolve() if top else nvcc.resolve().parent.parent


def _candidates() -> Iterable[Path]:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    yield from (Path(home) for home in homes if home)
    if nvcc := shutil.which("nvcc"):
        yield _nvcc_home(Path(nvcc))
    yield from sorted(Path("/usr/local").glob("cuda*"), reverse=True)


def _toolkit_at(home: Path) -> Toolkit:
    if not (home / "bin" / "nvcc").exists():
        raise Unusable(f"{home} has no bin/nvcc")
    home = _nvcc_home(home / "bin" / "nvcc")
    run = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+\.\d+)", run.stdout)
    if release is None:
        raise Unusable(f"{home}/bin/nvcc does not tell its version")
    toolkit = Toolkit(home, release[1])
    if toolkit.folder("include", "cuda_runtime.h") is None:
        raise Unusable(f"{home} holds nvcc {toolkit.version} but no include/cuda_runtime.h")
    if toolkit.folder("lib", "libcudart_static.a") is None:
        raise Unusable(f"{home} holds nvcc {toolkit.version} but no libcudart_static.a")
    return toolkit


def find_toolkit() -> Toolkit:
    """The first toolkit that can build for the installed torch. Raises Unusable with what was found instead."""
    torch = find_torch()
    if torch.cuda is None:
        raise Unusable(f"torch {torch.version} is a build without CUDA")
    problems: list[str] = []
    for home in dict.fromkeys(path.resolve() for path in _candidates()):
        try:
            toolkit = _toolkit_at(home)
        except Unusable as problem:
            problems.append(str(problem))
            continue
        if toolkit.version.split(".")[0] == torch.cuda.split(".")[0]:
            return toolkit
        problems.append(f"{home} holds nvcc {toolkit.version}, but torch {torch.version} is built with CUDA {torch.cuda}: their major versions must agree")
    raise Unusable("; ".join(problems) or "no CUDA toolkit was found (CUDA_HOME, CUDA_PATH, nvcc on PATH, /usr/local/cuda*)")


def choose_architectures(toolkit: Toolkit) -> tuple[str, ...]:
    """Architectures as "80", "90a", the last or those with "+PTX" also as PTX; from TORCH_CUDA_ARCH_LIST or the default."""
    listed = subprocess.run([toolkit.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = re.findall(r"compute_(\d+)", listed)
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", " ").replace(";", " ").split()
    if not asked:
        chosen = [name for name in DEFAULT_ARCHITECTURES if name in known]
        return (*chosen[:-1], f"{chosen[-1]}+PTX")
    for name in asked:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if match is None or match[1] + match[2] not in known:
            raise Unusable(f"TORCH_CUDA_ARCH_LIST names {name!r}; nvcc {toolkit.version} knows {', '.join(f'{k[:-1]}.{k[-1]}' for k in known)}")
    return tuple(name.replace(".", "") for name in asked)


def gencode_flags(architectures: Sequence[str]) -> list[str]:
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_tools() -> tuple[str, str]:
    """The C++ compiler and ninja."""
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    if compiler is None:
        raise Unusable("no C++ compiler was found (CXX, g++, c++)")
    beside_python = Path(sys.executable).parent / "ninja"
    ninja = shutil.which("ninja") or (str(beside_python) if beside_python.exists() else None)
    if ninja is None:
        raise Unusable("ninja was not found; pip install ninja")
    return compiler, ninja


@functools.cache
def choose() -> Target:
    """What RESNET_FUSED_BUILD (or FORCE_CUDA=1) asks for and this machine can do. Raises Unusable if they contradict."""
    asked = os.environ.get("RESNET_FUSED_BUILD") or ("cuda" if os.environ.get("FORCE_CUDA") == "1" else "auto")
    if asked not in KINDS:
        raise Unusable(f"RESNET_FUSED_BUILD={asked!r} is unknown; choose one of {', '.join(KINDS)}")
    if asked == "none":
        return Target("none", "RESNET_FUSED_BUILD=none: Triton and PyTorch only")
    if asked == "host":
        find_torch()
        find_tools()
        return Target("host", "the CUDA kernels compiled for CPU tensors, for tests")
    try:
        toolkit = find_toolkit()
        find_tools()
        architectures = choose_architectures(toolkit)
    except Unusable as problem:
        if asked == "cuda":
            raise Unusable(f"a CUDA build was asked for, but {problem}") from None
        return Target("none", f"{problem}; Triton and PyTorch only")
    return Target("cuda", f"nvcc {toolkit.version} in {toolkit.home} for {', '.join(architectures)}", toolkit, architectures)


def _ninja_file(target: Target, library: Path, extra_flags: Sequence[str]) -> str:
    torch = find_torch()
    compiler, _ = find_tools()
    include = f"-isystem {torch.root / 'include'}"
    extra = " ".join(extra_flags)
    cxx_flags = f"{' '.join(COMMON_FLAGS)} -fPIC -fvisibility=hidden {include} {extra}"
    link = ["-shared", "-Wl,-O1", f"-L{torch.root / 'lib'}", "-ltorch_cpu"]
    if target.kind == "host":
        link += ["-pthread", extra]
        compile_cu = f"{compiler} -x c++ {cxx_flags} {' '.join(HOST_FLAGS)} -MMD -MF $out.d -c $in -o $out"
        cxx_flags += " " + " ".join(HOST_FLAGS)
        sources = SOURCES + HOST_SOURCES
    else:
        assert target.toolkit is not None
        threads = os.environ.get("NVCC_THREADS")
        flags = [*COMMON_FLAGS, *CUDA_FLAGS, f"-ccbin={compiler}", *gencode_flags(target.architectures), *([f"--threads={threads}"] if threads else [])]
        compile_cu = f"{target.toolkit.nvcc} {' '.join(flags)} {include} {extra} -MMD -MF $out.d -c $in -o $out"
        cxx_flags += " -O2 -Wall -DUSE_CUDA"
        # The runtime is linked statically and hidden: no second libcudart.so to agree with torch's.
        link += ["-ltorch_cuda", f"-L{target.toolkit.folder('lib', 'libcudart_static.a')}", "-lcudart_static", "-ldl", "-lrt", "-pthread"]
        link += ["-Wl,--exclude-libs,ALL", "-Wl,--no-undefined"]
        sources = SOURCES
    objects = {source: f"{source.parent.name}_{source.stem}.o" for source in sources}
    lines = [
        f"rule cu\n  command = {compile_cu}\n  depfile = $out.d\n  deps = gcc\n  description = $in",
        f"rule cxx\n  command = {compiler} {cxx_flags} -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n  description = $in",
        f"rule link\n  command = {compiler} $in {' '.join(link)} -o $out\n  description = $out",
        *(f"build {name}: {'cu' if source.suffix == '.cu' else 'cxx'} {source}" for source, name in objects.items()),
        f"build {library}: link {' '.join(objects.values())}",
    ]
    return "\n".join(lines) + "\n"


def compile_library(target: Target, library: Path, work: Path, extra_flags: Sequence[str] = ()) -> None:
    """Compile and link `library`, reusing what is up to date in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(_ninja_file(target, library.resolve(), extra_flags))
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    subprocess.run([find_tools()[1], "-C", str(work), "-j", jobs, "--quiet"], check=True)
