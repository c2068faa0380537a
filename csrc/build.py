"""Builds the C++/CUDA library: finds a toolkit, writes a ninja file, runs it; without ninja it compiles all anew.

Used by setup.py, the compile gate and the tests; torch is not imported. torch.utils.cpp_extension is not used: it
links against the unstable ABI, wants a GPU or an architecture list, and compiles for one Python at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
KINDS = ("auto", "cuda", "cpu", "none", "host")
DEFAULT_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
# The stable ABI of torch 2.11: one binary for every torch from there on.
COMMON_FLAGS = ("-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000")
# Of the kernels for CPUs: the instructions that a file may use. What this CPU has is asked for when it runs.
AVX512_FLAGS = tuple(f"-m{name}" for name in "avx512f avx512bw avx512vl avx512dq avx512vnni avx512bf16 prfchw".split())
AMX_FLAGS = (*AVX512_FLAGS, "-mamx-tile", "-mamx-int8", "-mamx-bf16")
INSTRUCTIONS = {"avx2": ("-mavx2", "-mfma"), "avx512": AVX512_FLAGS, "amx": AMX_FLAGS}
# GCC's own headers of these instructions warn of the registers that they leave undefined on purpose.
CPU_FLAGS = ("-O3", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-ignored-attributes")
HOST_FLAGS = (
    "-DRESNET_FUSED_HOST",
    "-O2",
    "-g1",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
)
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
    """What to build, and why: `kind` is "cuda", "cpu", "host" or "none"."""

    kind: str
    reason: str
    toolkit: Toolkit | None = None
    architectures: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"resnet_fused: building kind {self.kind!r}: {self.reason}"

    @property
    def advice(self) -> str:
        """How long it takes, and how not to wait; empty where nothing is compiled."""
        if self.kind in ("none", "cpu"):
            return ""
        cores = os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0))
        if self.kind == "host":
            return f"resnet_fused: on {cores} cores this takes a minute or two the first time"
        return (
            f"resnet_fused: compiling for {len(self.architectures)} GPU architecture(s) on {cores} cores; six took 7 "
            "minutes on 2 cores. TORCH_CUDA_ARCH_LIST=native compiles only for the GPU that is here, "
            "RESNET_FUSED_BUILD=none nothing: Triton's kernels need no build"
        )

    def describe(self) -> str:
        """The record that the package keeps: what `resnet_fused._library.status()` reads."""
        toolkit = self.toolkit.version if self.toolkit else None
        torch = find_torch().version if self.kind != "none" else None
        record = {
            "kind": self.kind,
            "reason": self.reason,
            "architectures": self.architectures,
            "nvcc": toolkit,
            "torch": torch,
        }
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
    """The toolkit of an nvcc. A wrapper script or a link is asked, not read: the real nvcc prints where it stands."""
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
        problems.append(
            f"{home} holds nvcc {toolkit.version}, but torch {torch.version} is built with CUDA {torch.cuda}: "
            "their major versions must agree"
        )
    raise Unusable(
        "; ".join(problems) or "no CUDA toolkit was found (CUDA_HOME, CUDA_PATH, nvcc on PATH, /usr/local/cuda*)"
    )


def present_architectures() -> list[str]:
    """Of the GPUs in this machine, such as "90"; none where its driver does not tell."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return []
    return sorted({major + minor for major, minor in re.findall(r"^(\d+)\.(\d)$", run.stdout, re.M)}, key=int)


def choose_architectures(toolkit: Toolkit) -> tuple[str, ...]:
    """Architectures such as "80", "90a", "120+PTX": from TORCH_CUDA_ARCH_LIST, where "native" means the GPUs that are
    here if nvcc knows them all, or the default.
    """
    listed = subprocess.run([toolkit.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = re.findall(r"compute_(\d+)", listed)
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", " ").replace(";", " ").split()
    if asked == ["native"]:
        if (present := present_architectures()) and set(present) <= set(known):
            return tuple(present)
        asked = []
    if not asked:
        chosen = [name for name in DEFAULT_ARCHITECTURES if name in known]
        return (*chosen[:-1], f"{chosen[-1]}+PTX")
    for name in asked:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if match is None or match[1] + match[2] not in known:
            choices = ", ".join(f"{number[:-1]}.{number[-1]}" for number in known)
            raise Unusable(f"TORCH_CUDA_ARCH_LIST names {name!r}; nvcc {toolkit.version} knows {choices}, or native")
    return tuple(name.replace(".", "") for name in asked)


def gencode_flags(architectures: Sequence[str]) -> list[str]:
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_tools() -> tuple[str, str | None]:
    """The C++ compiler, and ninja if there is one."""
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    if compiler is None:
        raise Unusable("no C++ compiler was found (CXX, g++, c++)")
    beside_python = Path(sys.executable).parent / "ninja"
    return compiler, shutil.which("ninja") or (str(beside_python) if beside_python.exists() else None)


@functools.cache
def choose() -> Target:
    """What RESNET_FUSED_BUILD or FORCE_CUDA=1 asks for and this machine can do. Raises Unusable if they contradict."""
    asked = os.environ.get("RESNET_FUSED_BUILD") or ("cuda" if os.environ.get("FORCE_CUDA") == "1" else "auto")
    if asked not in KINDS:
        raise Unusable(f"RESNET_FUSED_BUILD={asked!r} is unknown; choose one of {', '.join(KINDS)}")
    if asked == "none":
        return Target("none", "RESNET_FUSED_BUILD=none: Triton and PyTorch only")
    if asked == "cpu":
        return choose_cpu()
    if asked == "host":
        find_torch()
        find_tools()
        return Target("host", "the CUDA kernels compiled for CPU tensors, for tests")
    try:
        toolkit = find_toolkit()
        find_tools()
    except Unusable as problem:
        if asked == "cuda":
            raise Unusable(f"a CUDA build was asked for, but {problem}") from None
        try:
            return dataclasses.replace(choose_cpu(), reason=f"{problem}; the kernels for CPUs, and Triton")
        except Unusable as no_cpu:
            return Target("none", f"{problem}; {no_cpu}; Triton and PyTorch only")
    architectures = choose_architectures(toolkit)
    where = f"nvcc {toolkit.version} in {toolkit.home} for {', '.join(architectures)}"
    return Target("cuda", where, toolkit, architectures)


def choose_cpu() -> Target:
    """The library of kernels for this CPU's tensors. Raises Unusable where it cannot be compiled."""
    machine = f"{sys.platform} {platform.machine()}"
    if machine != "linux x86_64":
        raise Unusable(f"the kernels for CPUs are written for linux x86_64, this is {machine}")
    find_torch()
    compiler, _ = find_tools()
    command = [compiler, *AMX_FLAGS, "-x", "c++", "-E", os.devnull]
    if subprocess.run(command, capture_output=True).returncode != 0:
        raise Unusable(f"{compiler} does not know AVX-512 and AMX: GCC 12 or newer does")
    return Target("cpu", "batch norm in training and convolutions of frozen networks, for CPUs with AVX2 or AVX-512")


def choose_all() -> list[Target]:
    """What is asked for, and beside it the kernels for CPUs wherever anything is compiled and they can be."""
    target = choose()
    if target.kind in ("none", "cpu"):
        return [target]
    try:
        return [target, choose_cpu()]
    except Unusable as problem:
        print(f"resnet_fused: {problem}", file=sys.stderr)
        return [target]


def _commands(target: Target, extra_flags: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """How to compile a .cu and a .cpp, before `-c $in -o $out`, and the flags to link with after `$in`."""
    torch, (compiler, _) = find_torch(), find_tools()
    include = ["-isystem", f"{torch.root / 'include'}", *extra_flags, "-MMD", "-MF", "$out.d"]
    cxx = [compiler, *COMMON_FLAGS, "-fPIC", "-fvisibility=hidden", "-Wall", *include]
    link = ["-shared", f"-L{torch.root / 'lib'}", "-ltorch_cpu", "-pthread", *extra_flags]
    if target.kind == "cpu":
        return [], [*cxx, *CPU_FLAGS], [*link, "-Wl,--no-undefined"]
    if target.kind == "host":
        cxx += HOST_FLAGS
        return [*cxx, "-x", "c++"], cxx, link
    assert target.toolkit is not None
    nvcc = [str(target.toolkit.nvcc), f"-ccbin={compiler}", *COMMON_FLAGS, *CUDA_FLAGS, *include]
    nvcc += gencode_flags(target.architectures)
    if threads := os.environ.get("NVCC_THREADS"):
        nvcc.append(f"--threads={threads}")
    # The runtime is linked statically and hidden: no second libcudart.so that would have to agree with torch's.
    runtime = [f"-L{target.toolkit.folder('lib', 'libcudart_static.a')}", "-lcudart_static", "-ldl", "-lrt"]
    link += ["-ltorch_cuda", *runtime, "-Wl,--exclude-libs,ALL", "-Wl,--no-undefined"]
    return nvcc, [*cxx, "-O2", "-DUSE_CUDA"], link


def _ninja_file(target: Target, library: Path, sources: Sequence[Path], extra_flags: Sequence[str]) -> str:
    def command(words: Sequence[str]) -> str:
        return " ".join(word if word.startswith("$out") or word == "$in" else shlex.quote(word) for word in words)

    def path(p: Path) -> str:
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    cu, cxx, link = _commands(target, extra_flags)
    compiler, _ = find_tools()
    depends = "  depfile = $out.d\n  deps = gcc\n  description = $in"
    objects = {source: _object(source) for source in sources}
    lines = [
        f"rule cu\n  command = {command([*cu, '-c', '$in', '-o', '$out'])}\n{depends}",
        f"rule cpp\n  command = {command([*cxx, '-c', '$in', '-o', '$out'])} $instructions\n{depends}",
        f"rule link\n  command = {command([compiler, '$in', *link, '-o', '$out'])}\n  description = $out",
        *(
            f"build {path(Path(name))}: {source.suffix[1:]} {path(source)}\n  instructions = {_instructions(source)}"
            for source, name in objects.items()
        ),
        f"build {path(library)}: link {' '.join(path(Path(name)) for name in objects.values())}",
    ]
    return "\n".join(lines) + "\n"


def _instructions(source: Path) -> str:
    return " ".join(INSTRUCTIONS.get(source.stem, ())) if source.parent.name == "cpu" else ""


def _object(source: Path) -> str:
    return f"{source.parent.name}_{source.stem}.o"


def _compile_anew(
    target: Target, library: Path, work: Path, sources: Sequence[Path], extra_flags: Sequence[str], jobs: int
) -> None:
    cu, cxx, link = _commands(target, extra_flags)

    def compile_one(source: Path) -> str:
        made = str(work / _object(source))
        words = [word.replace("$out", made) for word in (cu if source.suffix == ".cu" else cxx)]
        subprocess.run([*words, *_instructions(source).split(), "-c", str(source), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([find_tools()[0], *objects, *link, "-o", str(library)], check=True)


def compile_library(
    target: Target, library: Path, work: Path, extra_flags: Sequence[str] = (), csrc: Path = CSRC
) -> None:
    """Compile and link `library` of the sources in `csrc`, reusing what is up to date in `work`.

    Raises subprocess.CalledProcessError when a compiler fails; what it said has been printed.
    """
    sources = [*sorted(csrc.glob("*.cu")), csrc / "ops.cpp"]
    if target.kind == "cpu":
        # Of a function that several objects have the linker takes the first: that with the fewest instructions.
        sources = sorted((csrc / "cpu").glob("*.cpp"), key=lambda source: (len(_instructions(source)), source))
    if target.kind == "host":
        sources += sorted((csrc / "host").glob("*.cpp"))
    work.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    _, ninja = find_tools()
    if ninja is None:
        _compile_anew(target, library, work, sources, extra_flags, int(jobs))
        return
    (work / "build.ninja").write_text(_ninja_file(target, library.resolve(), sources, extra_flags))
    subprocess.run([ninja, "-C", str(work), "-j", jobs, "--quiet"], check=True)
