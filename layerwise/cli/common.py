"""From the options of a command to what it works with: a run, its data, a device; and how signals reach it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerwise.cli.options import Options
from layerwise.cli.outcome import interruption_as_error
from layerwise.stopping import Stopping

if TYPE_CHECKING:
    from layerwise.setup import Setup


def run_folder(options: Options) -> Path:
    """The run that the options name, or the one that was used last, which is said; no recipe of a run is looked at.

    Raises:
        NotReady: no run was used yet.
    """
    from layerwise.run import RUNS, last_run, run_name

    if options.run_dir is not None:
        return options.run_dir
    if options.recipe is None:
        folder = last_run()
        click.echo(f"using {folder}, the run that was used last", err=True)
        return folder
    from layerwise.recipe_loader import resolve_recipe

    chosen = options if options.method is None else options.override(method=options.method)
    return RUNS / run_name(resolve_recipe(options.recipe, chosen.set))


@contextmanager
def setup_for(options: Options, *, purpose: str, writes: bool = True) -> Iterator[Setup]:
    """The run that the options name, held while the command works, stoppable by SIGINT and SIGTERM."""
    from layerwise.recipe_loader import heeded, require_heeded, resolve_recipe
    from layerwise.render.progress import console_progress
    from layerwise.run import RUNS, last_run, open_run, remember_last, run_name, run_source
    from layerwise.setup import Setup

    if options.method is not None:
        options = options.override(method=options.method)
    folder = options.run_dir
    if options.recipe is None:
        folder = folder or last_run()
        source, before = run_source(folder)
        overrides = [*before, *options.set]
        if options.method is not None:
            kept = [*heeded(source, [*before, f"method={options.method}"])[:-1], *options.set]
            if lost := [override for override in before if override not in kept]:
                click.echo(f"left behind, since {options.method} replaces it: {', '.join(lost)}", err=True)
            overrides = kept
        if options.run_dir is None:
            click.echo(f"using {folder}, the run of {source} that was used last", err=True)
            wanted = run_name(resolve_recipe(source, overrides))
            if wanted != run_name(resolve_recipe(source, before)):
                folder = RUNS / wanted
                click.echo(f"another method or schedule has a run of its own: {folder}", err=True)
    else:
        source, overrides = options.recipe, list(options.set)
        if source.endswith(".py"):
            source = str(Path(source).resolve())
    recipe = resolve_recipe(source, overrides)
    require_heeded(recipe)
    folder = folder or RUNS / run_name(recipe)
    run = open_run(folder, recipe)
    with stop_on_signal() as stopping, console_progress(sys.stderr if options.json else sys.stdout) as progress:
        data_dir, device = options.data_dir or run.data_dir, pick_device(options.device)
        setup = Setup(run, device, data_dir, options.download, progress, stopping, stopping.at_steps, writes)
        if not writes:
            yield setup
            return
        with run.locked(purpose), run.following(source, overrides, data_dir):
            remember_last(folder)
            yield setup


def pick_device(name: str) -> Any:
    import torch

    from layerwise.errors import UsageError

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no usable CUDA device. Use --device cpu, or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def stop_on_signal() -> Iterator[Stopping]:
    """The first SIGINT or SIGTERM ends the work, a training at its next step; a second one ends the process at once."""
    stopping = Stopping()

    def ask(number: int, _: object) -> None:
        if stopping.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if stopping.ask():
            click.echo("stopping after this step; once more to quit at once", err=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with interruption_as_error():
            yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
