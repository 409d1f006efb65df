"""Does training one module after another lose accuracy, and what gives it back?

The paper's iterative schedule reaches 79.8 % where its simultaneous one reaches 81.9 %, which it tentatively lays to
overfitting on inputs without noise. Here both, and the iterative schedule with what it lacks, one thing at a time and
all together, at equal numbers of updates:

    python -m benchmarks.gap --recipe digits --seeds 3
    python -m benchmarks.gap --recipe stl10 --data-dir DIR --set dataset.max_train=1000 …

Writes gap-NAME.json, .md and .png to benchmarks/results.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import click

from layerwise.paper.numbers import Training

RESULTS = Path(__file__).parent / "results"
NOISE = 0.25  # of each input's deviation

FRESH = ("cache.renew=true", "cache.window_epochs=1")
EARLY = ("training.keep=best",)
NOISY = (f"training.noise={NOISE}",)
ARMS = {
    "simultaneous": Training("gim", "simultaneous"),
    "iterative": Training("gim", "iterative"),
    "+ early stopping": Training("gim", "iterative", EARLY),
    "+ noise": Training("gim", "iterative", NOISY),
    "+ fresh views": Training("gim", "iterative", FRESH),
    "+ all three": Training("gim", "iterative", (*FRESH, *NOISY, *EARLY)),
}


@click.command()
@click.option("--recipe", required=True)
@click.option("--name", help="Of the results. Default: the recipe's.")
@click.option("--seeds", type=click.IntRange(min=2), default=3, show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), required=True, help="Of every module, in every arm.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
@click.option("--data-dir", type=click.Path(path_type=Path))
@click.option("--run-dir", type=click.Path(path_type=Path), default=Path("runs/gap"), show_default=True)
def main(
    recipe: str,
    name: str | None,
    seeds: int,
    epochs: int,
    overrides: tuple[str, ...],
    data_dir: Path | None,
    run_dir: Path,
) -> None:
    import torch

    from layerwise.files.storage import write_file, write_json
    from layerwise.paper.reproduce import Ground
    from layerwise.pipeline.frozen import require_stage
    from layerwise.pipeline.probe import probe_module
    from layerwise.pipeline.results import curve
    from layerwise.render.progress import console_progress
    from layerwise.stopping import Stopping

    equal = (f"training.epochs={epochs}", f"training.patience={epochs}", "training.keep=last")
    arms: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with console_progress(sys.stderr) as progress:
        ground = Ground(
            source=recipe,
            overrides=(*overrides, *equal),
            root=run_dir,
            seeds=seeds,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            data_dir=data_dir,
            download=False,
            fresh=False,
            progress=progress,
            stopping=Stopping(),
        )
        for seed in ground.all_seeds():
            for arm, training in ARMS.items():
                progress.note(f"seed {seed}: {arm}")
                with ground.trained(training, seed) as setup:
                    records = [require_stage(setup, number) for number in range(1, setup.depth + 1)]
                    lines = [curve(setup.run, record, number) for number, record in enumerate(records, 1)]
                    found = probe_module(setup, setup.depth)["tasks"]
                    task = next(iter(found))
                    arms[arm].append(
                        {
                            "seed": seed,
                            "accuracy": 100 * found[task]["trained"]["accuracy"],
                            "updates": [line[-1]["step"] for line in lines],
                            "kept_epoch": [record["best_epoch"] for record in records],
                            "loss": [line[-1]["loss"] for line in lines],
                            "validation_loss": [line[-1]["validation_loss"] for line in lines],
                            "lowest_validation_loss": [min(one["validation_loss"] for one in line) for line in lines],
                            "notes": setup.facts.notes,
                        }
                    )
    result = {
        "recipe": recipe,
        "set": list(overrides),
        "epochs": epochs,
        "noise": NOISE,
        "torch": torch.__version__,
        "arms": arms,
    }
    target = RESULTS / f"gap-{name or recipe}"
    write_json(target.with_suffix(".json"), result)
    write_file(target.with_suffix(".md"), page(result, name or recipe).encode())
    write_file(target.with_suffix(".png"), picture(result, name or recipe))
    click.echo(target.with_suffix(".md").read_text())


def page(result: dict[str, Any], name: str) -> str:
    arms = result["arms"]
    base = [one["accuracy"] for one in arms["simultaneous"]]
    modules = len(arms["simultaneous"][0]["loss"])
    head = ["arm", "accuracy, %", "against simultaneous", *(f"module {m}: gap, nats" for m in range(2, modules + 1))]
    lines = [f"| {' | '.join(head)} |", f"| --- {'| ---: ' * (len(head) - 1)}|"]
    for arm, found in arms.items():
        accuracies = [one["accuracy"] for one in found]
        paired = [own - other for own, other in zip(accuracies, base, strict=True)]
        gaps = [
            statistics.fmean(one["validation_loss"][m] - one["loss"][m] for one in found) for m in range(1, modules)
        ]
        cells = [
            arm,
            f"{statistics.fmean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f}",
            "–" if arm == "simultaneous" else f"{statistics.fmean(paired):+.1f} ± {statistics.stdev(paired):.1f}",
            *(f"{gap:+.3f}" for gap in gaps),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = len(base)
    settings = f" {', '.join(f'`{one}`' for one in result['set'])}." if result["set"] else ""
    notes = "".join(f" {note}." for note in arms["simultaneous"][0]["notes"])
    return "\n".join(
        [
            f"# Iterative against simultaneous training: {name}",
            "",
            f"Recipe `{result['recipe']}`, {result['epochs']} epochs of every module in every arm, so that all have "
            f"as many updates; mean ± standard deviation of {seeds} seeds, differences taken seed by "
            f"seed.{settings}{notes}",
            "",
            *lines,
            "",
            "Accuracy: a linear classifier on the last module. Gap: validation loss less training loss after the last "
            f"epoch. Noise: Gaussian, {result['noise']} of each input's deviation, on training inputs of the modules "
            "above the first (training loss is taken with it). Early stopping: the weights of the lowest validation "
            "loss are frozen instead of the last. Fresh views: the cache is a rolling window; every epoch a "
            "quarter of it is computed anew, in augmentations that were never seen, where the plain iterative schedule "
            "reads one view of each sample throughout.",
            "",
        ]
    )


def picture(result: dict[str, Any], name: str) -> bytes:
    from matplotlib.figure import Figure

    from layerwise.render.plots import LIGHT, Picture, Theme, panels

    arms = result["arms"]

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = panels(1, 1, 3.6)
        for row, (arm, found) in enumerate(arms.items()):
            accuracies = [one["accuracy"] for one in found]
            color = theme.first if arm == "simultaneous" else theme.second
            axes.plot(accuracies, [row] * len(accuracies), "o", color=color, alpha=0.45, markersize=7)
            axes.errorbar(
                statistics.fmean(accuracies),
                row,
                xerr=statistics.stdev(accuracies),
                fmt="D",
                color=color,
                markersize=9,
                capsize=4,
            )
        axes.set_yticks(range(len(arms)), list(arms))
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xlabel("test accuracy of a linear classifier on the last module (%)")
        seeds = len(arms["simultaneous"])
        axes.set_title(f"{name}: dots are seeds, diamonds the mean ± standard deviation of {seeds}")
        return figure

    return Picture("gap", "gap", "", draw).png(LIGHT)


if __name__ == "__main__":
    main()
