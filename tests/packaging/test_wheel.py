"""The built wheel, used from elsewhere: nothing of the checkout may be needed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel, as `pip install --target` leaves it."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "from hatchling.build import build_wheel; print(build_wheel(__import__('sys').argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(folder / result.stdout.strip().splitlines()[-1]) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_inside(installed: Path) -> None:
    tops = sorted(path.name for path in installed.iterdir() if not path.name.endswith(".dist-info"))
    assert tops == ["activation_cache", "layerwise"]
    for name in ("layerwise/py.typed", "activation_cache/py.typed", "layerwise/_recipes/digits.py"):
        assert (installed / name).is_file()


def test_it_runs_digits_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    program = (
        "import layerwise, pathlib\n"
        "assert (pathlib.Path(layerwise.__file__).parent / '_recipes').is_dir()\n"
        "from layerwise.cli import main; main()"
    )
    short = ("--set", "training.epochs=1", "--set", "dataset.samples=200", "--set", "probe.epochs=2")
    result = run(installed, tmp_path, "-c", program, "run", "--recipe", "digits", *short)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "digits" / "report" / "report.html").is_file()
