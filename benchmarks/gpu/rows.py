"""The process of one part of the GPU benchmark.

    python -m benchmarks.gpu.rows NAME --device cuda --out rows.jsonl --seconds 60

A part is a sequence of rows. Each is worked out by itself and written at once: a row that fails says why and the next
one follows, and a process that is ended has lost the row under way alone.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch

from benchmarks.gpu.part import Bench, Figures, Skipped, Task, clear
from layerwise.errors import in_one_line

HOMES = {
    "table2": "memory",
    "alternatives": "memory",
    "depth": "memory",
    "stages": "speed",
    "compiled": "speed",
    "feeds": "feeding",
    "writing": "feeding",
    "correctness": "correctness",
    "pytest": "correctness",
}
"""Part to the file that it is in."""


def run_part(name: str, bench: Bench, write: Callable[[Figures], None]) -> None:
    """Work out the rows one by one and hand each over as soon as it is known."""
    rows: Callable[[Bench], Iterator[Task]] = getattr(importlib.import_module(f"benchmarks.gpu.{HOMES[name]}"), name)
    for title, work in rows(bench):
        if time.monotonic() > bench.deadline:
            write({"name": title, "skipped": "the part's time was over"})
            continue
        began = time.perf_counter()
        try:
            found = work()
        except Skipped as reason:
            found = {"skipped": str(reason)}
        except Exception as error:  # whatever it is, the next row is worth trying
            found = {"problem": in_one_line(error)}
        write({"name": title, **found, "took": time.perf_counter() - began})
        clear(bench.device)


@click.command()
@click.argument("name", type=click.Choice(list(HOMES)))
@click.option("--device", required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seconds", type=float, required=True)
def main(name: str, device: str, out: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work, open(out, "a") as file:

        def write(row: Figures) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        run_part(name, Bench(torch.device(device), Path(work), deadline), write)


if __name__ == "__main__":
    main()
