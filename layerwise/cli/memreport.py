"""layerwise memreport"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerwise.cli.command import Command, Number, Option
from layerwise.cli.common import named_recipe, pick_device
from layerwise.cli.options import DEVICES, METHODS
from layerwise.cli.outcome import errors_to_exit_codes

if TYPE_CHECKING:
    from layerwise.paper.memory_rows import Asked, Found, Row


class Depths(click.ParamType):  # type: ignore[type-arg]
    """`3,6,12`: numbers of modules, in rising order."""

    name = "depths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a list of numbers of modules, such as 3,6,12", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


@click.command(cls=Command, name="memreport")
@click.option(
    "--recipe", metavar="NAME|FILE.py", default="stl10", show_default=True, help="The recipe whose network to measure."
)
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a field of the recipe. May be repeated."
)
@click.option(
    "--method",
    "methods",
    type=click.Choice(METHODS),
    metavar="METHOD",
    multiple=True,
    help=f"Only these rows: {', '.join(METHODS)}. May be repeated.",
)
@click.option("--batch", type=Number(min=1), metavar="SAMPLES", default=16, show_default=True, help="Samples a step.")
@click.option(
    "--max-memory",
    "budget",
    metavar="BYTES",
    default="500MB",
    show_default=True,
    help="Memory budget, for the rows that have one.",
)
@click.option(
    "--depth",
    "depths",
    type=Depths(),
    metavar="NUMBERS",
    help="Show the peak against the number of modules instead, as in 3,6,12,24,48.",
)
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    metavar="DEVICE",
    default="auto",
    help="cuda: measure; cpu: predict only; auto: measure if there is a GPU.",
)
@click.option(
    "--csv",
    "csv_file",
    cls=Option,
    heading="Output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the rows to this file.",
)
@click.option(
    "--chart",
    cls=Option,
    heading="Output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also draw the peaks to this file, a PNG.",
)
@click.option(
    "--timeline",
    cls=Option,
    heading="Timeline",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.svg",
    help="Draw the memory over one step there, by category, with the largest tensors at its peak.",
)
@click.option(
    "--compare",
    cls=Option,
    heading="Timeline",
    is_flag=True,
    help="Draw five ways to train under one axis: end to end, checkpointed, whole batch, eager, micro-batched.",
)
@click.option(
    "--module",
    cls=Option,
    heading="Timeline",
    type=Number(min=1),
    metavar="NUMBER",
    help="Only this module. Default: all modules in one step.",
)
@click.option(
    "--real",
    cls=Option,
    heading="Timeline",
    is_flag=True,
    help="Take real steps on the device, in place of steps on fake tensors.",
)
@click.option(
    "--snapshot",
    cls=Option,
    heading="Timeline",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.pickle",
    help="On CUDA: write PyTorch's own record of the allocator too, for pytorch.org/memory_viz.",
)
@click.option("--json", "as_json", cls=Option, heading="Output", is_flag=True, help="Machine output on stdout.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    batch: int,
    methods: tuple[Any, ...],
    budget: str,
    depths: tuple[int, ...] | None,
    device: str,
    csv_file: Path | None,
    chart: Path | None,
    timeline: Path | None,
    compare: bool,
    module: int | None,
    real: bool,
    snapshot: Path | None,
    as_json: bool,
) -> None:
    """What one step of training takes, row by row: the paper's memory table (Table 2), and ways that need less.

    With CUDA each row is measured, in a process of its own, and predicted beside it; without, predicted on fake
    tensors, in about a minute. --timeline shows where the bytes of one step go instead.
    """
    with errors_to_exit_codes(as_json):
        from layerwise.errors import UsageError
        from layerwise.paper.memory_report import depth_chart, memory_chart, memory_csv, memory_json, memory_table
        from layerwise.paper.memory_rows import PAPER, Asked, Row, count_modules, depth_rows, row_recipe, table_rows
        from layerwise.settings.units import parse_bytes

        try:
            parse_bytes(budget)
        except ValueError as error:
            raise UsageError(f"--max-memory: {error}") from error
        recipe = named_recipe(recipe)
        asked = Asked(recipe, overrides, batch, str(pick_device(device)))
        if timeline is not None:
            _refuse_with_timeline(depths, csv_file, chart, compare, module, methods, snapshot, asked.device)
            _draw_timeline(asked, timeline, compare, module, methods, real, snapshot, as_json)
            return
        for name, given in (("compare", compare), ("module", module), ("real", real), ("snapshot", snapshot)):
            if given:
                raise UsageError(f"--{name} is of a timeline: add --timeline FILE.svg")
        if depths is None:
            modules = count_modules(row_recipe(asked, Row("", "gim")))
            as_published = (recipe, batch, overrides) == ("stl10", 16, ())
            rows = table_rows(modules, methods or ("supervised", "cpc", "gim"), budget, PAPER if as_published else {})
            found = _work_out([(asked, row) for row in rows])
        else:
            pairs = [
                (Asked(recipe, overrides, batch, asked.device, depth), row)
                for depth in depths
                for row in depth_rows(depth)
                if not methods or row.method in methods
            ]
            if not pairs:
                compared = ", ".join(dict.fromkeys(row.method for row in depth_rows(1)))
                raise UsageError(f"--depth compares {compared}: leave out --method, or choose among these")
            found = _work_out(pairs)
        for path, content in ((csv_file, memory_csv), (chart, memory_chart if depths is None else depth_chart)):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content(found, asked))
        if as_json:
            click.echo(json.dumps(memory_json(found, asked), allow_nan=False))
        else:
            memory_table(found, asked)
        failed = [row for row in found if row.problem is not None]
        if len(failed) == len(found):
            raise UsageError(f"no row could be worked out: {failed[0].problem}")


def _refuse_with_timeline(
    depths: object,
    csv_file: object,
    chart: object,
    compare: bool,
    module: int | None,
    methods: tuple[Any, ...],
    snapshot: object,
    device: str,
) -> None:
    from layerwise.errors import UsageError

    for name, given in (("depth", depths), ("csv", csv_file), ("chart", chart)):
        if given is not None:
            raise UsageError(f"--{name} is of the table, and --timeline of one step: ask for one of them")
    if compare and (module is not None or methods):
        raise UsageError("--compare draws the five ways that it names: leave out --module and --method")
    if len(methods) > 1:
        raise UsageError(f"--timeline draws one method, and {len(methods)} are named: choose one, or --compare")
    if snapshot is not None and not device.startswith("cuda"):
        raise UsageError("--snapshot records CUDA's allocator, and this step runs on the CPU: leave it out")


def _draw_timeline(
    asked: Asked,
    file: Path,
    compare: bool,
    module: int | None,
    methods: tuple[Any, ...],
    real: bool,
    snapshot: Path | None,
    as_json: bool,
) -> None:
    from layerwise.paper.memory_timeline import COMPARED, one_row, picture, timeline_table, timelines

    rows = list(COMPARED) if compare else [one_row(asked, (*methods, "gim")[0], module)]
    found = timelines(asked, rows, real=real, snapshot=snapshot)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(picture(found, asked, real=real))
    if as_json:
        click.echo(json.dumps({"asked": asdict(asked), "rows": found, "timeline": str(file)}, allow_nan=False))
    else:
        timeline_table(found, asked, real=real)
        click.echo(f"timeline: {file}")


def _work_out(pairs: list[tuple[Asked, Row]]) -> list[Found]:
    from activation_cache.reading.processors import allowed_processors
    from layerwise.paper.memory_rows import work_out_apart

    predicted = pairs[0][0].device == "cpu"
    # Predictions go side by side, a share for each core; on a GPU each row has a process and the device to itself.
    count = min(allowed_processors(), 8, len(pairs)) if predicted else len(pairs)
    shares = [pairs[first::count] for first in range(count)]
    found: dict[int, Found] = {}
    with ThreadPoolExecutor(count if predicted else 1) as pool:
        for first, results in enumerate(pool.map(work_out_apart, shares)):
            found |= {first + count * place: result for place, result in enumerate(results)}
            if sys.stderr.isatty():
                click.echo(f"\r\033[K{len(found)} of {len(pairs)} rows", nl=False, err=True)
    if sys.stderr.isatty():
        click.echo("\r\033[K", nl=False, err=True)
    return [found[number] for number in range(len(pairs))]
