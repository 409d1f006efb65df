"""Peak memory against the number of modules, for every way of training (predicted: no GPU is needed).

    python -m benchmarks.depth --depth 3,6,12,24,48

The network repeats the first module of the recipe's. Depths that are measured again replace those in
benchmarks/results/depth.json; the picture beside it shows all that are there.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from layerwise.paper.memory_report import depth_chart
from layerwise.paper.memory_rows import Asked, Found, Row, depth_rows, work_out

RESULTS = Path(__file__).parent / "results"


@click.command()
@click.option("--recipe", default="stl10", show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--depth", "depths", default="3,6,12,24,48", show_default=True)
def main(recipe: str, batch: int, depths: str) -> None:
    """Work the depths out and add them to the results."""
    found = {(row.row.name, row.depth): row for row in _known()}
    for depth in map(int, depths.split(",")):
        for row in depth_rows(depth):
            result = work_out(Asked(recipe, batch=batch, depth=depth), row)
            found[row.name, depth] = result
            click.echo(f"{depth:>3} modules  {row.name:<28} {(result.peak or 0) / 2**30:8.3f} GiB")
    ordered = sorted(found.values(), key=lambda one: one.depth)
    RESULTS.mkdir(exist_ok=True)
    told = {"kind": "predicted", "recipe": recipe, "batch": batch, "rows": [asdict(one) for one in ordered]}
    (RESULTS / "depth.json").write_text(json.dumps(told, indent=1) + "\n")
    (RESULTS / "depth.png").write_bytes(depth_chart(ordered, Asked(recipe, batch=batch)))


def _known() -> list[Found]:
    file = RESULTS / "depth.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return [Found(**{**row, "row": Row(**row["row"])}) for row in rows]


if __name__ == "__main__":
    main()
