"""One command, one GPU: memory, speed and correctness of every way of training, in a few minutes.

    python -m benchmarks.gpu [--out DIR] [--minutes 8] [--device cuda|cpu]

Nothing is downloaded. Each part is a process of its own with a time limit, so that a fault ends that part alone, and
results are written after each: those that matter most come first. On a CPU everything is shrunk, so that the command
itself can be tested; its figures then say nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.gpu.report import markdown, pictures
from benchmarks.gpu.rows import HOMES
from benchmarks.machine import machine

LIMITS = {
    "table2": 100,
    "feeds": 110,
    "correctness": 50,
    "stages": 60,
    "alternatives": 45,
    "writing": 50,
    "depth": 80,
    "compiled": 100,
    "pytest": 60,
}
"""Most seconds of each part of an 8-minute benchmark, in the order in which they run; the whole is limited as well."""
MINUTES = 8.0


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Default: benchmarks/results/gpu.")
@click.option("--minutes", type=click.FloatRange(min=0.1), default=MINUTES, show_default=True, help="For everything.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(HOMES)), help="These parts alone. May be repeated.")
def main(out: Path | None, minutes: float, device: str, only: tuple[str, ...]) -> None:
    """Run the parts one after another; exits with 1 if any of them failed in anything."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda was asked for and torch finds no CUDA device: try --device cpu")
    out = out or Path(__file__).parents[1] / "results" / "gpu"
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    results: dict[str, Any] = {"machine": _described(device), "device": device, "minutes": minutes, "parts": {}}
    for name, limit in LIMITS.items():
        if only and name not in only:
            continue
        left = min(limit * max(1.0, minutes / MINUTES), end - time.monotonic() - 3)  # seconds to draw and write
        part: dict[str, Any] = (
            _run(name, device, left) if left > 2 else {"seconds": 0.0, "problem": "no time was left", "rows": []}
        )
        results["parts"][name] = part
        failed = sum("problem" in row for row in part["rows"])
        click.echo(
            f"{name:<13} {part['seconds']:6.1f} s  {len(part['rows']):3} rows, {failed} failed  {part['problem'] or ''}"
        )
        _write(out, results)
    if any(part["problem"] or any("problem" in row for row in part["rows"]) for part in results["parts"].values()):
        sys.exit(1)


def _described(device: str) -> dict[str, Any]:
    told = machine() | {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    return told if device == "cuda" else told | {"device": "CPU"}


def _run(name: str, device: str, seconds: float) -> dict[str, Any]:
    """The rows that a part found within its time, and what ended it if it did not end by itself."""
    began = time.monotonic()
    problem = None
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "rows.jsonl"), Path(folder, "errors")
        # Rows stop a little earlier than the process would be ended.
        command = [sys.executable, "-m", "benchmarks.gpu.rows", name, "--device", device, "--out", str(out)]
        with open(errors, "w") as file:
            paths = os.pathsep.join(path for path in sys.path if path)
            process = subprocess.Popen(
                [*command, "--seconds", str(0.9 * seconds)],
                stdout=file,
                stderr=file,
                env={**os.environ, "PYTHONPATH": paths},
                cwd=Path(__file__).parents[2],
                start_new_session=True,  # so that its own processes end with it
            )
            try:
                if (code := process.wait(seconds)) != 0:
                    last = errors.read_text().strip().splitlines()[-1:] or ["no message"]
                    problem = f"its process ended with {code}: {last[0]}"
            except subprocess.TimeoutExpired:
                problem = f"ended after its {seconds:.0f} s"
            finally:
                _end(process)
        lines = out.read_text().splitlines() if out.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the process was ended while it wrote
            problem = problem or "its last row is cut off"
    return {"seconds": time.monotonic() - began, "problem": problem, "rows": rows}


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write(out: Path, results: dict[str, Any]) -> None:
    (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "gpu.md").write_text(markdown(results))
    for name, content in pictures(results).items():
        (out / name).write_bytes(content)


if __name__ == "__main__":
    main()
