"""The pages: links that lead somewhere, a short README whose code runs, an example of every public name."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_fused
from resnet_fused import evaluate, functional, models, nn

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MODULES = (resnet_fused, functional, nn, models, evaluate)
OF_THE_INSTALLED_TORCH = {(nn.BatchNormAct2d, "bias"), (nn.SyncBatchNormAct2d, "bias")}  # since 2.14; said in words
PUBLIC = [(module, name) for module in MODULES for name in module.__all__]
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no checkout around these tests")


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`|^ {4}.*$", "", page.read_text(), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """What a link into a page may name."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_listed():
    listed = (ROOT / "docs" / "README.md").read_text()
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in listed + "(README.md)"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.larger
@pytest.mark.parametrize("number", [0, 1], ids=["train", "infer"])
def test_the_code_in_the_readme_runs_as_it_stands(number, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    command = [sys.executable, "-c", blocks[number]]
    done = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left alone" in done.stdout or "53 convolutions" in done.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_examples_of_the_api_page_say_what_happens():
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.testfile(str(ROOT / "docs" / "api.md"), module_relative=False, optionflags=flags)
    assert tried > 40 and not failed


@pytest.mark.parametrize("module, name", PUBLIC, ids=lambda value: getattr(value, "__name__", value))
def test_every_public_name_has_an_example_and_its_parameters_described(module, name):
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.S))
    assert re.search(rf"\b{name}\b", code), f"{name} is in no example of docs/api.md"
    value = getattr(module, name)
    if not callable(value) or inspect.ismodule(value):
        return
    described = (value.__doc__ or "") + (value.__init__.__doc__ or "" if inspect.isclass(value) else "")
    function = value.__init__ if inspect.isclass(value) else value
    for parameter in list(inspect.signature(function).parameters.values())[inspect.isclass(value) :]:
        if (value, parameter.name) in OF_THE_INSTALLED_TORCH:
            continue
        where = rf"^ *[\w, ]*\b{parameter.name}\b[\w, ]*:"
        assert re.search(where, described, re.M), f"{name}: {parameter.name} is not described"


@pytest.mark.larger
def test_the_reference_is_made_of_every_public_name(tmp_path):
    command = [sys.executable, "-m", "pdoc", "-d", "google", "-o", str(tmp_path), *(m.__name__ for m in MODULES)]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for module, name in PUBLIC:
        page = tmp_path / f"{module.__name__.replace('.', '/')}.html"
        if not inspect.ismodule(getattr(module, name)):
            assert f'id="{name}"' in page.read_text(), f"{module.__name__}.{name}"
