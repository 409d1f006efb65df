"""What all commands share: options, the way from them to a `Setup`, errors to exit codes, and the two kinds of
output.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from layerwise.choices import FeedName, MethodName, ScheduleName
from layerwise.stopping import Stopping

if TYPE_CHECKING:
    from layerwise.setup import Setup

Command = TypeVar("Command", bound=Callable[..., Any])
METHODS: tuple[str, ...] = get_args(MethodName)
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
FEEDS: tuple[str, ...] = get_args(FeedName)
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Options:
    """What was asked on the command line, whichever the command."""

    recipe: str | None
    method: str | None
    set: tuple[str, ...]
    run_dir: Path | None
    data_dir: Path | None
    download: bool
    device: str
    json: bool

    def override(self, **fields: object) -> Options:
        """The same with these fields of the recipe set too; None leaves a field as it is."""
        chosen = (f"{name}={value}" for name, value in fields.items() if value is not None)
        return dataclasses.replace(self, set=(*self.set, *chosen))


def schedule_options(command: Command) -> Command:
    """Add the options that say how stages follow each other; they arrive in `Options` as fields of the recipe."""

    @functools.wraps(command)
    def gathered(*args: Any, schedule: str | None, feed: str | None, options: Options, **kwargs: Any) -> Any:
        return command(*args, options=options.override(schedule=schedule, feed=feed), **kwargs)

    gathered = click.option("--feed", type=click.Choice(FEEDS), help="What the modules above the first read.")(gathered)
    return click.option(  # type: ignore[return-value]
        "--schedule", type=click.Choice(SCHEDULES), help="One module after another, or all in each step."
    )(gathered)


def memory_options(command: Command) -> Command:
    """Add the options that limit memory; what they set arrives in `Options` as fields of the recipe."""

    @functools.wraps(command)
    def gathered(*args: Any, max_memory: str | None, micro_batch: int | None, options: Options, **kwargs: Any) -> Any:
        chosen = {"training.max_memory": max_memory, "training.micro_batch": micro_batch}
        return command(*args, options=options.override(**chosen), **kwargs)

    gathered = click.option(
        "--micro-batch", type=click.IntRange(min=1), help="Samples that go through a module at once; same gradients."
    )(gathered)
    return click.option(  # type: ignore[return-value]
        "--max-memory", metavar="BYTES", help="Device memory a stage may take, as 500MB or 2GiB; picks --micro-batch."
    )(gathered)


def cache_options(command: Command) -> Command:
    """Add the options that say how much the caches may take; they arrive in `Options` as fields of the recipe."""

    @functools.wraps(command)
    def gathered(
        *args: Any, cache_budget: str | None, cache_url: str | None, views: int | None, options: Options, **kwargs: Any
    ) -> Any:
        chosen = {"cache.budget": cache_budget, "cache.url": cache_url, "cache.views": views}
        return command(*args, options=options.override(**chosen), **kwargs)

    gathered = click.option(
        "--views", type=click.IntRange(min=1), help="Augmentations that a cache stores for each training sample."
    )(gathered)
    gathered = click.option(
        "--cache-url", metavar="URL", help="Keep the caches there: s3://bucket/prefix, gs://, az:// or file://."
    )(gathered)
    return click.option(  # type: ignore[return-value]
        "--cache-budget",
        metavar="BYTES",
        help="Disk a cache may take, as 50GB; more is held in a window that rolls. Default: what is free.",
    )(gathered)


def options(command: Command) -> Command:
    """Add the options that every command takes; they arrive as one `Options`."""

    @functools.wraps(command)
    def gathered(*args: Any, **kwargs: Any) -> Any:
        shared = Options(**{name: kwargs.pop(name) for name in Options.__dataclass_fields__})
        with errors_to_exit_codes(shared.json):
            return command(*args, options=shared, **kwargs)

    declarations = [
        click.option(
            "--recipe",
            metavar="NAME|FILE.py",
            help="A built-in recipe, or the path of your own. Default: that of the run used last.",
        ),
        click.option(
            "--method",
            type=click.Choice(METHODS),
            help="How the network is trained. Default: module by module, by the recipe's own objective (gim).",
        ),
        click.option(
            "--set",
            "set",
            metavar="KEY=VALUE",
            multiple=True,
            help="Override a field of the recipe, as in objective.negatives=32.",
        ),
        click.option(
            "--run-dir",
            type=click.Path(path_type=Path),
            help="Where the run lives. Default: runs/RECIPE[-METHOD][-SCHEDULE], or the run used last.",
        ),
        click.option(
            "--data-dir", type=click.Path(path_type=Path), help="Where the dataset lies. Default: where it lay last."
        ),
        click.option("--download", is_flag=True, help="Fetch the dataset into --data-dir where it is missing."),
        click.option(
            "--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where to compute."
        ),
        click.option("--json", is_flag=True, help="Machine output on stdout; everything else goes to stderr."),
    ]
    for declare in reversed(declarations):
        gathered = declare(gathered)
    return gathered  # type: ignore[return-value]


@contextmanager
def errors_to_exit_codes(as_json: bool) -> Iterator[None]:
    """One line for an error that a user can act on; our own mistakes keep their traceback."""
    try:
        with interruption_as_error():
            yield
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        if as_json:
            click.echo(json.dumps({"error": type(error).__name__, "message": str(error), "exit_code": code}))
        else:
            click.echo(f"{click.style('layerwise:', fg='red', bold=True)} {error}", err=True)
        sys.exit(code)


@contextmanager
def interruption_as_error() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        from layerwise.errors import StoppedEarly

        raise StoppedEarly(
            "stopped; what is finished is kept, and the same command, without --fresh, goes on from there"
        ) from None


def exit_code(error: Exception) -> int | None:
    from layerwise.errors import LayerwiseError

    if isinstance(error, LayerwiseError):
        return error.exit_code
    if isinstance(error, OSError):
        return 1 if error.filename is not None else None

    from activation_cache import CacheError

    return 1 if isinstance(error, CacheError) else None  # looking at a cache, such as on a store that is not reached


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


def emit(options: Options, result: dict[str, Any], people: Callable[[], None]) -> None:
    """Print the result: for machines with --json, else for people."""
    if options.json:
        click.echo(json.dumps(result, allow_nan=False))
    else:
        people()
