"""What a tracker costs: updates per second of the same stage with and without it, in turns.

    python -m benchmarks.tracking --recipe digits --rounds 7

Each round trains some updates without a tracker and as many with it, in an order that alternates. The ratio is that of
the medians; it is written to benchmarks/results/tracking.json with the range over the rounds.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import click
import torch

from benchmarks.machine import machine
from layerwise.errors import StoppedEarly
from layerwise.pipeline.run import open_run
from layerwise.pipeline.schedule import run_stage
from layerwise.pipeline.setup import Setup
from layerwise.progress import Silent, Step
from layerwise.recipe.loader import resolve_recipe
from layerwise.render.trackers import tracked
from layerwise.settings.choices import TrackerName

RESULTS = Path(__file__).parent / "results"


class Clock(Silent):
    """When each update ended, seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self, done: Step) -> None:
        self.ends.append(time.perf_counter())


def updates_per_second(recipe: str, tracker: TrackerName | None, updates: int) -> float:
    """Of module 1, from its third update on."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["training.checkpoint_every=1000000"]
        setup = Setup(open_run(Path(folder) / "run", resolve_recipe(recipe, overrides)), torch.device("cpu"))
        setup.should_stop = lambda: len(clock.ends) >= updates
        with tracked(clock, tracker, setup.run.folder) as setup.progress, suppress(StoppedEarly):
            run_stage(setup, 1)
    return (len(clock.ends) - 3) / (clock.ends[-1] - clock.ends[2])


@click.command()
@click.option("--recipe", default="digits", show_default=True)
@click.option(
    "--tracker", type=click.Choice(["tensorboard", "wandb", "trackio"]), default="tensorboard", show_default=True
)
@click.option("--rounds", default=7, show_default=True)
@click.option("--updates", default=150, show_default=True)
def main(recipe: str, tracker: TrackerName, rounds: int, updates: int) -> None:
    """Measure, print and write the result."""
    rates: dict[str, list[float]] = {"without": [], "with": []}
    updates_per_second(recipe, tracker, 10)  # imports, and the first touch of everything
    for number in range(rounds):
        for name in ("without", "with") if number % 2 else ("with", "without"):
            rates[name].append(updates_per_second(recipe, tracker if name == "with" else None, updates))
        click.echo(f"round {number + 1}: {rates['without'][-1]:.1f} without, {rates['with'][-1]:.1f} with {tracker}")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians["with"] / medians["without"]
    click.echo(f"{ratio:.3f} of the updates per second")
    told = {
        "recipe": recipe, "tracker": tracker, "updates": updates, "updates_per_second": rates, "medians": medians,
        "ratio": ratio, "machine": machine(),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tracking.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
