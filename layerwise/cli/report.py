"""layerwise report"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerwise.cli.command import Command
from layerwise.cli.common import setup_for
from layerwise.cli.options import RUN, Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="report")
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path, file_okay=False), metavar="[RUN]...")
@click.option(
    "--compare", is_flag=True, help="Show these runs side by side on one page, as in --compare runs/a runs/b."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="Where --compare writes its page.  [default: comparison.html]",
)
@options(*RUN)
def command(runs: tuple[Path, ...], compare: bool, out: Path | None, options: Options) -> None:
    """Write a page on a run: what came out, curves, probes, memory, caches and settings, as far as it has come."""
    from layerwise.errors import UsageError

    if compare:
        _compare(runs, out or Path("comparison.html"), options)
        return
    if runs:
        raise UsageError(f"report RUN: name one run with --run-dir {runs[0]}, or compare several with --compare")
    if out is not None:
        raise UsageError("--out is of --compare: a run's report lies in the run, in report/report.html")
    with setup_for(options, purpose="report") as setup:
        from layerwise.pipeline.results import for_report
        from layerwise.render.report import write_report

        results = for_report(setup)
        page = write_report(results, setup.run.report)
        emit(options, {**results, "report": str(page)}, lambda: click.echo(f"report: {page}"))


def _compare(runs: tuple[Path, ...], out: Path, options: Options) -> None:
    from layerwise.errors import NotReady, UsageError

    given = (options.recipe, options.method, options.run_dir, *options.set)
    if any(one is not None for one in given):
        raise UsageError("--compare takes folders of runs: leave out --recipe, --method, --set and --run-dir")
    folders = list(dict.fromkeys(runs))
    if len(folders) < 2:
        raise UsageError(f"--compare needs two runs or more, and {len(folders)} is named: --compare runs/a runs/b")
    for folder in folders:
        if not folder.is_dir():
            raise NotReady(f"{folder} is no folder of a run. `layerwise run --run-dir {folder}` makes one")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    found: dict[str, Any] = {}
    for name, folder in zip(names, folders, strict=True):
        with setup_for(Options(options.json, run_dir=folder), purpose="report", writes=False) as setup:
            from layerwise.pipeline.results import for_report

            found[name] = for_report(setup)
    from layerwise.render.comparison import write_comparison

    page = write_comparison(found, out)
    emit(options, {"runs": found, "comparison": str(page)}, lambda: click.echo(f"comparison: {page}"))
