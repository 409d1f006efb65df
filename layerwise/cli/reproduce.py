"""layerwise reproduce"""

from __future__ import annotations

import sys

import click

from layerwise.cli.command import Command, Number
from layerwise.cli.common import named_recipe, pick_device, require_data_options, stop_on_signal, trust_named_data
from layerwise.cli.options import DATA, Options, options
from layerwise.cli.outcome import emit

WHAT = ("table1", "table2", "table3", "table4", "figure2", "figure3", "figure4")


@click.command(cls=Command, name="reproduce")
@click.argument("what", type=click.Choice(WHAT), metavar="WHAT")
@click.option(
    "--scale",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Shrink samples, epochs and channels to this fraction, above 0 and at most 1.",
)
@click.option(
    "--seeds",
    type=Number(min=1),
    metavar="COUNT",
    default=1,
    show_default=True,
    help="Trainings of each row.",
)
@click.option("--fresh", is_flag=True, help="Train everything again.")
@options(
    "recipe",
    "set",
    "run_dir",
    "device",
    *DATA,
    recipe="A built-in recipe, or the path of your own. Default: the one that follows the paper.",
    run_dir="Folder of the runs and results. Default: runs/reproduce-RECIPE.",
)
def command(what: str, scale: float | None, seeds: int, fresh: bool, options: Options) -> None:
    """Train what a table or figure of the paper shows, and put ours beside the paper's.

    WHAT is one of table1, table2, table3, table4, figure2, figure3 and figure4.

    Rows that are finished are skipped. Writes JSON, Markdown and a picture beside the runs (--run-dir, or
    runs/reproduce-RECIPE). The default recipe is the one that follows the paper, which takes days of one GPU;
    --recipe digits shows the same on two cores in minutes, and --scale makes any recipe smaller.
    """
    from layerwise.errors import UsageError
    from layerwise.paper.rendering import require_own_files, show_reproduction, write_reproduction
    from layerwise.paper.reproduce import Ground, reproduce
    from layerwise.pipeline.run import RUNS, run_name
    from layerwise.recipe.loader import resolve_recipe
    from layerwise.render.progress import console_progress

    changed = {override.partition("=")[0].strip() for override in options.set} & {"method", "schedule"}
    if changed:
        raise UsageError(f"{what} says itself which methods and schedules to train: leave out --set {changed.pop()}")
    if scale is not None:
        options = options.override(scale=scale)
    trust_named_data(options)
    source = named_recipe(options.recipe or DEFAULTS[what])
    recipe = resolve_recipe(source, options.set)
    require_data_options(options, recipe)
    root = options.run_dir or RUNS / f"reproduce-{run_name(recipe)}"
    require_own_files(what, root)  # before hours of training, not after
    with stop_on_signal() as stopping, console_progress(sys.stderr if options.json else sys.stdout) as progress:
        ground = Ground(
            source=source,
            overrides=options.set,
            root=root,
            seeds=seeds,
            device=pick_device(options.device),
            data_dir=options.data_dir,
            download=options.download,
            fresh=fresh,
            progress=progress,
            stopping=stopping,
        )
        result = reproduce(ground, what)
    files = write_reproduction(what, result, root)
    emit(options, {**result, "files": [str(file) for file in files]}, lambda: show_reproduction(what, result, files))


DEFAULTS = {
    "table1": "stl10",
    "table2": "stl10",
    "table3": "librispeech",
    "table4": "librispeech",
    "figure2": "stl10",
    "figure3": "stl10",
    "figure4": "librispeech",
}
