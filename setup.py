"""Packaging beyond pyproject.toml: compiles csrc/ as RESNET_FUSED_BUILD=auto|cuda|none|host says (csrc/build.py)."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit(
        "resnet_fused: building without isolation needs setuptools>=77; pip install -U setuptools"
    ) from None

ROOT = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("resnet_fused_build", ROOT / "csrc" / "build.py")
assert _spec is not None and _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = build  # dataclasses look their module up
_spec.loader.exec_module(build)

LIBRARY, RECORD = "_C.so", "_build_info.json"


def choose() -> build.Target:  # type: ignore[name-defined]
    try:
        return build.choose()
    except build.Unusable as problem:
        raise SystemExit(f"resnet_fused: {problem}") from None


class BuildLibrary(build_ext):
    """Compiles the library, no Python extension but a plain shared library of operators, and records what was built."""

    def run(self) -> None:
        target = choose()
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "resnet_fused"
        package.mkdir(parents=True, exist_ok=True)
        print(target, file=sys.stderr, flush=True)
        if target.kind == "none":
            (package / LIBRARY).unlink(missing_ok=True)
        else:
            # Each kind has its own folder, so that one is never taken for the other; replaced, so that a process that
            # has the old library loaded keeps it.
            work = ROOT / "build" / f"resnet_fused-{target.kind}"
            try:
                build.compile_library(target, work / LIBRARY, work)
            except subprocess.CalledProcessError as problem:
                code = problem.returncode
                raise SystemExit(f"resnet_fused: compilation failed, see above (exit code {code})") from None
            shutil.copy2(work / LIBRARY, package / f"{LIBRARY}.new")
            (package / f"{LIBRARY}.new").replace(package / LIBRARY)
        (package / RECORD).write_text(target.describe())

    def get_outputs(self) -> list[str]:
        names = [RECORD] if choose().kind == "none" else [LIBRARY, RECORD]
        return [str(Path(self.build_lib) / "resnet_fused" / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """A wheel for every Python 3: the library uses torch's stable ABI and no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", "any" if choose().kind == "none" else platform


class BinaryDistribution(Distribution):
    """Asks what can be built only when a build asks for it: metadata and sdists need no torch."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=BinaryDistribution,
    ext_modules=[Extension("resnet_fused._C", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
