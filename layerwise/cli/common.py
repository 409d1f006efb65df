"""From the options of a command to what it works with: a run, its data, a device; and how signals reach it."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from layerwise.cli.options import Options
from layerwise.cli.outcome import interruption_as_error, say
from layerwise.stopping import Stopping

if TYPE_CHECKING:
    from layerwise.pipeline.run import Run
    from layerwise.pipeline.setup import Setup
    from layerwise.recipe.recipe import Recipe
    from layerwise.training.ranks import Ranks


def run_folder(options: Options) -> Path:
    """The run that the options name, or the one that was used last, which is said; no recipe of a run is looked at.

    Raises:
        NotReady: no run was used yet.
    """
    from layerwise.pipeline.run import RUNS, last_run, run_name

    if options.run_dir is not None:
        return options.run_dir
    if options.recipe is None:
        folder = last_run()
        say(f"using {folder}, the run that was used last")
        return folder
    from layerwise.recipe.loader import read_recipe, resolve_recipe

    chosen = options if options.method is None else options.override(method=options.method)
    return RUNS / run_name(resolve_recipe(read_recipe(named_recipe(options.recipe)), chosen.set))


def named_recipe(source: str) -> str:
    """What `--recipe` names. A file is given by its absolute path, and trusted from now on: later commands run it when
    a run follows it.
    """
    from layerwise.pipeline import trust

    if not source.endswith(".py") or not os.path.isfile(source):
        return source
    path = Path(source).resolve()
    trust.trust(path, say)
    return str(path)


def trust_named_data(options: Options) -> None:
    """Note the files of the functions that --data names, so that later commands run them when a run follows them."""
    if not any(override.lstrip().startswith("dataset") for override in options.set):
        return  # without the time that these imports take
    from layerwise.pipeline import trust
    from layerwise.recipe.named_data import function_named, sources_of

    for name in filter(None, map(function_named, options.set)):
        sources = sources_of(name)
        trust.trust(sources[""], say, sources)


@contextmanager
def setup_for(options: Options, *, purpose: str, writes: bool = True) -> Iterator[Setup]:
    """The run that the options name, held while the command works, stoppable by SIGINT and SIGTERM.

    Of several processes, as torchrun starts them, only the first returns from here; the others help it, and exit.
    """
    from layerwise.training.ranks import ALONE, is_follower, joined

    if not writes:  # quickly done by one
        if is_follower():
            sys.exit()
        ranks = ALONE
    else:
        ranks = joined(pick_device(options.device))
        if not ranks.first:
            _follow(ranks)
    from layerwise.pipeline.following import leading

    with leading(ranks), _held_setup(options, ranks, purpose, writes) as setup:
        yield setup


def _follow(ranks: Ranks) -> NoReturn:
    """Help the first process until it ends, and end with its exit code."""
    from layerwise.pipeline.following import follow
    from layerwise.pipeline.remembered import settings_in
    from layerwise.pipeline.run import IN_PYTHON, open_run
    from layerwise.pipeline.setup import Setup
    from layerwise.recipe.loader import read_recipe, resolve_recipe

    with stop_on_signal() as stopping, stopping.at_steps():

        def make_setup(begun: Mapping[str, Any]) -> Setup:
            folder, source = Path(begun["folder"]), begun["source"]
            as_written = settings_in(folder) if source == IN_PYTHON else read_recipe(source)
            run = open_run(folder, resolve_recipe(as_written, begun["overrides"]))
            data_dir = None if begun["data_dir"] is None else Path(begun["data_dir"])
            device = pick_device(begun["device"])
            return Setup(run, device, data_dir, should_stop=stopping, writes=False, measure_threads=True, ranks=ranks)

        code = follow(ranks, make_setup)
    sys.exit(code)


@contextmanager
def _held_setup(options: Options, ranks: Ranks, purpose: str, writes: bool) -> Iterator[Setup]:
    from layerwise.pipeline.expected import note_expected
    from layerwise.pipeline.remembered import remembered_recipe
    from layerwise.pipeline.run import RUNS, last_run, open_run, run_name
    from layerwise.pipeline.setup import Origin, Setup
    from layerwise.recipe.loader import heeded, read_recipe, require_heeded, resolve_recipe
    from layerwise.render.progress import console_progress
    from layerwise.render.trackers import tracked

    if writes:
        import layerwise.training.threads  # noqa: F401 - notes torch's own number of threads before a recipe can change it

    if options.method is not None:
        options = options.override(method=options.method)
    folder = options.run_dir
    trust_named_data(options)
    if options.recipe is None:
        folder = folder or last_run()
        source, before, as_written = remembered_recipe(folder, say, options.set)
        overrides = [*before, *options.set]
        if options.method is not None:
            kept = [*heeded(as_written, [*before, f"method={options.method}"])[:-1], *options.set]
            if lost := [override for override in before if override not in kept]:
                say(f"left behind, since {options.method} replaces it: {', '.join(lost)}")
            overrides = kept
        if options.run_dir is None:
            say(f"using {folder}, the run of {source} that was used last")
            wanted = run_name(resolve_recipe(as_written, overrides))
            if wanted != run_name(resolve_recipe(as_written, before)):
                folder = RUNS / wanted
                say(f"this method or schedule gets its own run: {folder}")
    else:
        source, overrides = named_recipe(options.recipe), list(options.set)
        as_written = read_recipe(source)
    recipe = resolve_recipe(as_written, overrides)
    require_heeded(recipe)
    require_data_options(options, recipe)
    folder = folder or RUNS / run_name(recipe)
    run = open_run(folder, recipe)
    data_dir = options.data_dir or run.data_dir
    _require_known_address(run, options, writes)
    if writes and options.recipe is None:
        _say_what_lies_elsewhere(run, options, data_dir)
    with (
        stop_on_signal() as stopping,
        console_progress(sys.stderr if options.json else sys.stdout) as console,
        tracked(console, options.track, folder) as progress,
    ):
        device, words = pick_device(options.device), options.words()
        setup = Setup(
            run,
            device,
            data_dir,
            options.download,
            progress,
            stopping,
            stopping.at_steps,
            writes,
            measure_threads=True,
            asked=words,
            origin=Origin(source, tuple(overrides), as_written),
            ranks=ranks,
            remember=True,
        )
        with setup.held(purpose):
            ranks.told(
                {
                    "do": "begin",
                    "folder": str(folder),
                    "source": source,
                    "overrides": overrides,
                    "data_dir": None if data_dir is None else str(data_dir),
                    "device": options.device,
                }
            )
            yield setup
            if writes and setup.knows_dataset:
                note_expected(setup)


def _require_known_address(run: Run, options: Options, writes: bool) -> None:
    """A run may come from a stranger: because it says so, no address is contacted, and no cache outside it is replaced.

    Raises:
        UsageError: the run names an address that nobody named on this machine.
    """
    from layerwise.errors import UsageError
    from layerwise.pipeline import trust

    url = run.recipe.cache.url
    if options.recipe is not None or any(map(_is_address, options.set)):
        trust.trust_address(url)
    elif url is not None and not trust.knows_address(url, writes=writes):
        raise UsageError(trust.not_contacted(run.folder, url, writes=writes))


def _is_address(override: str) -> bool:
    return override.partition("=")[0].strip() == "cache.url"


def _say_what_lies_elsewhere(run: Run, options: Options, data_dir: Path | None) -> None:
    """A run may come from a stranger: name the places outside it that it chose, and not this command."""
    url = run.recipe.cache.url
    if url is not None and not any(map(_is_address, options.set)):
        say(f"{run.folder} keeps its caches at {url}")
    if data_dir is not None and options.data_dir is None:
        say(f"{run.folder} has its data at {data_dir}")


def require_data_options(options: Options, recipe: Recipe) -> None:
    """Hold --data-dir and --download to what the recipe's dataset reads.

    Raises:
        UsageError: one of them would have no effect, or there is no such folder.
    """
    from layerwise.errors import UsageError

    for name, given in (("data_dir", options.data_dir is not None), ("download", options.download)):
        if given and name not in recipe.dataset.heeds():
            reason = "reads no files" if name == "data_dir" else "cannot be downloaded"
            raise UsageError(
                f"--{name.replace('_', '-')} would have no effect: the dataset of the recipe {recipe.name!r} {reason}. "
                "Leave it out, or choose another recipe: layerwise recipes"
            )
    if options.data_dir is not None and not options.download and not options.data_dir.is_dir():
        found = "is not a folder" if options.data_dir.exists() else "does not exist"
        fetch = ", or add --download to fetch them" if "download" in recipe.dataset.heeds() else ""
        raise UsageError(
            f"--data-dir {str(options.data_dir)!r} {found}: name the folder that holds the dataset's files{fetch}"
        )


def pick_device(name: str) -> Any:
    import torch

    from layerwise.errors import UsageError
    from layerwise.training.ranks import local_device

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no usable CUDA device. Use --device cpu or --device auto")
    return local_device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def stop_on_signal() -> Iterator[Stopping]:
    """The first SIGINT or SIGTERM ends the work, a training at its next step; a second one ends the process at once.

    Python drops an exception that is raised in a finaliser or in the callback of a weak reference, which a signal may
    interrupt like any other code: then the signal is given again a moment later.
    """
    stopping = Stopping()

    def ask(number: int, _: object) -> None:
        if stopping.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if stopping.ask():
            say("stopping after this step; press again to quit at once")

    def ask_again(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            report_dropped(dropped)
            return
        stopping.asked = False
        threading.Timer(0.01, _thread.interrupt_main, [signal.SIGTERM]).start()

    report_dropped, sys.unraisablehook = sys.unraisablehook, ask_again
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with interruption_as_error():
            yield stopping
    finally:
        sys.unraisablehook = report_dropped
        for number, handler in before.items():
            signal.signal(number, handler)
