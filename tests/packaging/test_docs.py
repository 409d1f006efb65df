"""The documentation: its code runs, its commands are understood, its links lead somewhere, and the site builds.

A block of code is run by a test, unless an HTML comment on the line before says what it needs: `<!-- needs data -->`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
import yaml
from torch.utils.data import TensorDataset

import layerwise
from layerwise.cli import main
from layerwise.recipe.loader import load_recipe
from layerwise.settings.base import Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
BLOCK = re.compile(r"(?:<!-- needs ([^\n]+?) -->\n)?^```(\w+)\n(.*?)^```", re.S | re.M)


def blocks(page: Path, language: str, *, runs: bool | None = None) -> list[str]:
    """Code of one language on a page: all, or that which runs (or does not) without anything else."""
    found = BLOCK.findall(page.read_text())
    return [code for needs, spoken, code in found if spoken == language and runs in (None, not needs)]


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("documentation", DOCS / "generated.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_as_file(code: str, folder: Path, names: dict[str, Any]) -> None:
    path = folder / "examples.py"
    path.write_text(code)  # code of one's own is read from its file
    exec(compile(code, str(path), "exec"), names | {"__name__": "examples"})  # noqa: S102


def given(page: str) -> dict[str, Any]:
    """What the examples of a page are told to have: `pictures` and `labelled` on the page on your own code."""
    if page != "your-own.md":
        return {}
    pixels = torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pictures": TensorDataset(pixels), "labelled": TensorDataset(pixels, torch.arange(64) % 10)}


WITH_PYTHON = [page for page in PAGES if blocks(page, "python", runs=True)]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_as_file("\n".join(blocks(page, "python", runs=True)), tmp_path, given(page.name))
    if page.name == "your-own.md":
        assert {run.name for run in Path("runs").iterdir()} >= {"own-loss", "own-decoder", "own-data", "own-network"}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_that_is_not_run_is_python(page: Path) -> None:
    for code in blocks(page, "python", runs=False):
        compile(code, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_is_understood(page: Path) -> None:
    for code in blocks(page, "sh"):
        for words in re.findall(r"(?<![\w/])(?:-m )?layerwise ([a-z][^\n\"|;)]*)", code):
            name, *arguments = shlex.split(words, comments=True)
            main.commands[name].make_context(name, arguments, parent=click.Context(main))


def test_every_block_has_a_language_that_a_test_knows() -> None:
    for page in PAGES:
        fences = re.findall(r"^```(\w*)$", page.read_text(), re.M)
        assert set(fences[::2]) <= {"python", "sh", "text"}, page
        assert set(fences[1::2]) <= {""}, page


WITH_SHELL = [page for page in PAGES if blocks(page, "sh", runs=True)]


@pytest.mark.long
@pytest.mark.parametrize("page", WITH_SHELL, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cache")])
    env = {**os.environ, "PYTHONPATH": paths, "XDG_STATE_HOME": str(tmp_path / "state")}
    for code in blocks(page, "sh", runs=True):
        typed = f'layerwise() {{ {shlex.quote(sys.executable)} -m layerwise "$@"; }}\n{code}'
        subprocess.run(["bash", "-ec", typed], cwd=tmp_path, env=env, check=True, timeout=900)


def cells(notebook: Path) -> list[str]:
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_are_python(notebook: Path) -> None:
    assert len(cells(notebook)) > 4
    for cell in cells(notebook):
        compile(cell, str(notebook), "exec")


@pytest.mark.long
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_as_file("\n\n".join(cells(notebook)), tmp_path, {})


def test_every_page_of_the_navigation_exists_and_every_page_is_in_it(hook: ModuleType) -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for value in (entry.values() if isinstance(entry, dict) else entry) for page in pages(value)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.relative_to(DOCS).as_posix() for page in PAGES} | set(hook.generated())


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_every_link_between_pages_leads_somewhere(hook: ModuleType) -> None:
    texts = hook.generated() | {page.relative_to(DOCS).as_posix(): page.read_text() for page in PAGES}
    copies = dict(hook.copied())
    links = 0
    for page, text in texts.items():
        for _, link, after in hook.LINK.findall(re.sub(r"```.*?```", "", text, flags=re.S)):
            if ":" in link:
                continue
            leads = hook.resolved(page, link)
            assert leads in texts or leads in copies or (DOCS / leads).is_file(), f"{page}: {link}"
            if after.startswith("#"):
                assert after[1:-1] in anchors(texts[leads]), f"{page}: {link}{after}"
            links += 1
    assert links > 40


def test_every_field_and_command_is_in_the_reference(hook: ModuleType) -> None:
    pages = hook.generated()
    for name in main.commands:
        assert f"\n## {name}\n" in pages["reference/commands.md"]
    shown = pages["reference/recipe-fields.md"]
    kinds = [kind for _, kinds in hook._kinds() for kind in kinds]
    for kind in kinds:
        table = shown.partition(f"\n### {kind.__name__}\n")[2].partition("\n### ")[0]
        assert all(f"| `{name}` |" in table for name in kind.model_fields), kind

    def concrete(kind: type[Settings]) -> set[type[Settings]]:
        return {kind, *(one for inner in kind.__subclasses__() for one in concrete(inner))}

    missing = {
        kind.__name__ for kind in concrete(Settings) if kind.__module__.startswith("layerwise.") and kind not in kinds
    }
    bases = {"Settings", "DatasetSettings", "NetworkSettings", "ObjectiveSettings", "SpeechSettings"}
    made = {"GivenData", "GivenNetwork", "GivenObjective", "Merged", "Labelled", "Fraction"}  # by methods and objects
    assert missing <= bases | made


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "python.md").read_text()
    shown = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    assert shown >= set(layerwise.__all__)
    for line in page.splitlines():
        if line.startswith("::: "):
            home, _, name = line[4:].rpartition(".")
            assert hasattr(importlib.import_module(home), name), line


@pytest.mark.long
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra docs is not installed")
    pytest.importorskip("mkdocstrings")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cache")])
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    assert (tmp_path / "site" / "reference" / "commands.html").is_file()
    start = (tmp_path / "site" / "index.html").read_text()
    assert not re.findall(r"(?:src|<link[^>]*stylesheet[^>]*href)=\"https?://", start)  # loads without a network


def test_the_recipe_of_the_page_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(blocks(DOCS / "how-to" / "recipe.md", "python", runs=True)[0])
    recipe = load_recipe(str(path))
    assert len(recipe.network.modules((1, 64, 64))) == 4


def test_the_described_recipe_is_one() -> None:
    (code,) = blocks(DOCS / "how-to" / "recipe.md", "python", runs=False)
    data = TensorDataset(torch.rand(20, 4), torch.arange(20) % 2)
    layers = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)]
    names: dict[str, Any] = {"modules": layers, "objective": layerwise.CrossEntropy()}
    names |= dict.fromkeys(("images", "labelled", "test"), data)
    exec(code, names)  # noqa: S102
    assert isinstance(names["recipe"], layerwise.Recipe)


def test_every_file_that_the_layout_names_is_there() -> None:
    page = (DOCS / "how-it-works" / "layout.md").read_text()
    named = re.findall(r"^(?:  )?([a-z_]+(?:/[a-z_]+)*(?:\.py|/))", page, re.M)
    assert len(named) > 15
    assert all(any((ROOT / top / path).exists() for top in ("", "layerwise", "cache")) for path in named)
