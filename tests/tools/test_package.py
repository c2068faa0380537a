"""The sdist and the wheel: what is in them, what they say of themselves, and that they install with nothing at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"]
BUILDS += ["CONTRIBUTING.md", "CITATION.cff"]
pytestmark = [
    pytest.mark.larger,  # minutes of setuptools; the tests of builds run its commands on a stub
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no checkout around these tests"),
]


def run(*command: str, cwd: Path, **environment: str) -> str:
    settings = {**os.environ, "PYTHONPATH": "", "RESNET_FUSED_BUILD": "none", **environment}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel without compiled kernels, of a copy of the checkout."""
    copy = tmp_path_factory.mktemp("package") / "checkout"
    left = shutil.ignore_patterns("_C_*", "__pycache__")
    for folder in ("resnet_fused", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=left)
    for name in BUILDS:
        shutil.copy(ROOT / name, copy)
    run("setup.py", "--quiet", "sdist", "bdist_wheel", "--dist-dir", "dist", cwd=copy)
    (sdist,), (wheel,) = (copy / "dist").glob("*.tar.gz"), (copy / "dist").glob("*.whl")
    return sdist, wheel


def modules() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "resnet_fused").rglob("*.py")}


def test_the_wheel_holds_the_package_and_its_licence_and_nothing_else(distributions):
    _, wheel = distributions
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.endswith("-py3-none-any.whl")
    rest = {name for name in names if ".dist-info/" not in name} - modules()
    assert rest == {"resnet_fused/_C_none.json", "resnet_fused/py.typed", "resnet_fused/dispatch/tables/README.md"}
    assert modules() <= names
    told = {name.partition(".dist-info/")[2] for name in names} - {""}
    assert told == {"licenses/LICENSE", "METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt"}


def test_the_metadata_names_the_licence(distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert metadata["License-Expression"] == "BSD-3-Clause" and metadata["License-File"] == "LICENSE"
    assert not metadata.get_all("Project-URL") and metadata["Requires-Python"] == ">=3.10"
    assert not [one for one in metadata.get_all("Classifier") if one.startswith("License")]  # PEP 639: not beside it


def test_the_sdist_holds_what_builds(distributions):
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cu", ".h"}}
    assert modules() | sources | set(BUILDS) <= names and "csrc/build.py" in names
    assert not [name for name in names if name.startswith(("tests", "tools", "benchmarks")) or "_C_" in name]


def test_twine_finds_nothing(distributions):
    assert run("-m", "twine", "check", "--strict", *map(str, distributions), cwd=ROOT).count("PASSED") == 2


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_it_installs_offline_and_without_a_compiler(distributions, kind, tmp_path):
    file, target = distributions[kind == "wheel"], tmp_path / "site"
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--target", str(target))
    empty = tmp_path / "bin"
    empty.mkdir()
    run("-m", "pip", "install", "--quiet", *offline, str(file), cwd=tmp_path, PATH=str(empty), CXX="")
    ask = "import resnet_fused, torch; print(resnet_fused.__file__); print(resnet_fused.info())"
    told = run("-c", ask, cwd=tmp_path, PYTHONPATH=str(target))
    assert told.startswith(str(target)) and "RESNET_FUSED_BUILD=none" in told
    assert (target / "bin" / "resnet-fused").exists()
