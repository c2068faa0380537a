"""Host execution notices what it is for: broken kernels fail, and the real ones are clean under sanitizers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiers import larger

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1")

_spec = importlib.util.spec_from_file_location("resnet_fused_build", CSRC / "build.py")
assert _spec is not None and _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = build
_spec.loader.exec_module(build)

try:
    COMPILER, _ = build.find_tools()
except build.Unusable as problem:
    pytest.skip(f"nothing can be compiled: {problem}", allow_module_level=True)

BUGS = {
    "missing barrier": 1,
    "missing second barrier": 2,
    "off by one": 3,
    "uninitialised shared memory": 4,
    "wrong mask": 5,
    "threads leave before a barrier": 6,
    "two barriers": 7,
    "partial warp": 8,
}


def run_kernel(program: Path, bug: int, seed: int) -> tuple[int, str]:
    environment = {**os.environ, "RESNET_FUSED_HOST_SEED": str(seed)}
    run = subprocess.run([program, str(bug)], capture_output=True, text=True, env=environment, timeout=60)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize("how", ["plain", larger("sanitized")])
def test_broken_kernels_are_caught_and_the_correct_one_passes_in_every_order(how, tmp_path):
    program = tmp_path / "broken_kernels"
    source = ROOT / "tests" / "support" / "broken_kernels" / "broken_kernels.cu"
    include = ["-isystem", str(build.find_torch().root / "include"), f"-I{CSRC}"]
    sources = ["-x", "c++", str(source), *map(str, sorted((CSRC / "host").glob("*.cpp")))]
    flags = ["-O1"] if how == "plain" else [*SANITIZE, "-g1"]
    command = [COMPILER, *build.COMMON_FLAGS, *build.HOST_FLAGS, *flags, *include, *sources, "-pthread"]
    subprocess.run([*command, "-o", str(program)], check=True)

    for seed in range(12):
        assert run_kernel(program, 0, seed) == (0, "")
    says = {
        "off by one": "heap-buffer-overflow" if how == "sanitized" else "nan",
        "threads leave before a barrier": "96 of 128 threads wait at",
        "two barriers": "threads meet at",
        "partial warp": "threads meet at",
    }
    for bug, number in BUGS.items():
        runs = [run_kernel(program, number, seed) for seed in range(6)]
        caught = [output for code, output in runs if code != 0]
        assert caught, f"{bug}: every order gave the right result"
        assert says.get(bug, "expected") in caught[0], bug


# Mutations of the real sources: the op tests must fail on each.

MUTATIONS = {
    "missing barrier between lanes": (
        "columns.cuh",
        "    __syncthreads();\n",
        "",
        "ops/test_bn_ops.py",
        "2x65x3x8-nhwc-float32",
    ),
    "a range one pixel too long": (
        "bn_backward.cuh",
        "end = begin + per_row < pixels ? begin + per_row : pixels;",
        "end = begin + per_row < pixels ? begin + per_row + 1 : pixels;",
        "ops/test_bn_ops.py",
        "2x72x7x7-nhwc-float32",
    ),
    "mask bits of the wrong element": (
        "bn_backward.cuh",
        "bits >> j & 1",
        "bits >> (7 - j) & 1",
        "ops/test_bn_ops.py",
        "residual-2x8x4x6-nhwc-float32",
    ),
    "mask before rounding": (
        "bn_apply.cuh",
        "passes<T>(v[j])",
        "!(v[j] <= 0.0f)",
        "ops/test_bn_ops.py",
        "test_mask_is_that_of_the_rounded_output",
    ),
    "the last of equals wins": (
        "max_pool.cuh",
        "value[j] > best[j] ||",
        "value[j] >= best[j] ||",
        "ops/test_stem_ops.py",
        "test_stem_index_is_that_of_pytorch",
    ),
    "naive sums of squares": (
        "bn_stats.cuh",
        "return fabsf(first) <= 3.4028234e38f ? first : 0.0f;",
        "return 0.0f * first;",
        "ops/test_bn_ops.py",
        "test_means_a_million_deviations_from_zero",
    ),
}


def run_tests(library: Path, file: str, select: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The op tests of the cuda backend, in a process that loads this library."""
    program = (
        "import pathlib, sys, pytest\n"
        "from resnet_fused import _library\n"
        "_library._PACKAGE = pathlib.Path(sys.argv[1]).parent\n"
        "how = ['-q', '-x', '-p', 'no:cacheprovider', '--tb=line', '--capture=sys']\n"  # a sanitizer writes past sys
        "sys.exit(pytest.main([*how, sys.argv[2], '-k', sys.argv[3]]))\n"
    )
    command = [sys.executable, "-c", program, str(library), str(ROOT / "tests" / file), f"cuda and {select}"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=settings, cwd=ROOT, timeout=900)


class Workshop:
    """A copy of csrc/ to build libraries of, whole or with one replacement; what it does not touch is compiled once."""

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        self.csrc, self.work, self.library, self.flags = folder / "csrc", folder / "work", folder / "_C_host.so", flags
        shutil.copytree(CSRC, self.csrc)
        (folder / "_C_host.json").write_text('{"kind": "host", "torch": "test"}')

    def build(self, file: str = "ops.h", old: str = "", new: str = "") -> Path:
        original = (self.csrc / file).read_text()
        assert old in original, f"{file} no longer has {old!r}: update the mutation"
        (self.csrc / file).write_text(original.replace(old, new) if old else original)
        try:
            build.compile_library(build.Target("host", "test"), self.library, self.work, self.flags, self.csrc)
        finally:
            (self.csrc / file).write_text(original)
        return self.library


def sanitizer_environment() -> dict[str, str]:
    """Python itself is not sanitized: the runtime is preloaded, with the C++ library whose throw it wraps."""
    find = [COMPILER, "-print-file-name=libasan.so"], [COMPILER, "-print-file-name=libstdc++.so"]
    runtimes = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in find]
    return {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@pytest.mark.larger  # than the broken kernels above
def test_every_mutation_of_a_kernel_fails_the_op_tests_that_the_sources_pass(tmp_path):
    """One test, so that parallel test processes do not each compile the sources."""
    workshop = Workshop(tmp_path, ["-O0"])
    library = workshop.build()
    for file in sorted({file for _, _, _, file, _ in MUTATIONS.values()}):
        select = " or ".join(f"({select})" for _, _, _, where, select in MUTATIONS.values() if where == file)
        run = run_tests(library, file, f"({select})")
        assert run.returncode == 0, run.stdout
    for mutation, (source, old, new, file, select) in MUTATIONS.items():
        run = run_tests(workshop.build(source, old, new), file, select, RESNET_FUSED_HOST_SEED="3")
        assert run.returncode == 1 and "1 failed" in run.stdout, f"{mutation}\n{run.stdout}{run.stderr}"


@pytest.mark.larger  # than the broken kernels above, which run under sanitizers too
def test_the_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    """The whole op matrix once: accesses out of bounds or misaligned, to global and shared memory; overflows.

    And a kernel that reads beyond a tensor is seen: the preloaded runtime watches torch's allocations too.
    """
    workshop = Workshop(tmp_path, [*SANITIZE, "-g1"])
    library = workshop.build()
    for file in ("ops/test_bn_ops.py", "ops/test_stem_ops.py", "ops/test_ops.py"):
        run = run_tests(library, file, "not opcheck", **sanitizer_environment())
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
        assert "passed" in run.stdout
    library = workshop.build("bn_stats.cuh", "p + u * tiling.lanes < end", "p + u * tiling.lanes <= end")
    run = run_tests(library, "ops/test_bn_ops.py", "test_each_row and 2x72x7x7-nhwc-float32", **sanitizer_environment())
    assert run.returncode != 0 and "heap-buffer-overflow" in run.stderr + run.stdout, run.stdout[-2000:]


def test_division_by_a_runtime_constant(tmp_path):
    """The multiplication that replaces it, over the edges of 31 bits, and the 64-bit path beyond them."""
    program = tmp_path / "divider"
    source = tmp_path / "divider.cpp"
    source.write_text(
        """
#include <cstdio>
#include "device.cuh"
int main() {
  const int64_t top = int64_t(1) << 31;
  for (int64_t d : {int64_t(1), int64_t(2), int64_t(3), int64_t(7), int64_t(49), int64_t(64), int64_t(65),
                    int64_t(3136), int64_t(12345677), top - 1, top, top + 1, top * 9 + 5}) {
    const resnet_fused::Divider divider(d);
    for (int64_t n : {int64_t(0), int64_t(1), d - 1, d, d + 1, 2 * d - 1, 1000 * d, 1000 * d - 1, top - 1, top, top + 1,
                      top * d - 1, top * d, top / d * d, top / d * d - 1, int64_t(123456789), int64_t(1) << 40}) {
      if (divider.quotient(n) != n / d || divider.remainder(n) != n % d) {
        std::printf("%lld / %lld\\n", static_cast<long long>(n), static_cast<long long>(d));
        return 1;
      }
    }
  }
}
"""
    )
    include = ["-isystem", str(build.find_torch().root / "include"), f"-I{CSRC}"]
    sources = [str(source), *map(str, sorted((CSRC / "host").glob("*.cpp")))]
    command = [COMPILER, *build.COMMON_FLAGS, *build.HOST_FLAGS, *include, *sources, "-pthread", "-o", str(program)]
    subprocess.run(command, check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")
