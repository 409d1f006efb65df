"""Commands as users meet them: options under headings, summaries in full, wrong use with the nearest right one."""

from __future__ import annotations

import difflib
import io
import sys
from typing import Any

import click

from layerwise.cli.outcome import emit_error
from layerwise.render.words import terminal_width, wrapped

HEADINGS = ("Options", "Run", "Data", "Memory", "Cache", "Timeline", "Output")
"""In the order of the help; a command's own options come first."""


class Option(click.Option):
    """An option that is listed under a heading."""

    def __init__(self, *args: Any, heading: str = HEADINGS[0], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


class Number(click.IntRange):
    """A whole number from `min` on."""

    name = "number"


class Command(click.Command):
    """A command whose options are listed under headings, and which answers a misplaced argument with its option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_extra_args = True  # refused in `parse_args`

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        if ctx.args and not ctx.resilient_parsing:
            word = ctx.args[0]
            option = "--module" if word.isdecimal() else "--recipe"
            known = any(option in parameter.opts for parameter in self.params)
            hint = f": did you mean {option} {word}?" if known else ""
            raise click.UsageError(f"{word!r} is one argument too many{hint}", ctx)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        under: dict[str, list[tuple[str, str]]] = {heading: [] for heading in HEADINGS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                is_help = parameter is self.get_help_option(ctx)
                under["Output" if is_help else getattr(parameter, "heading", HEADINGS[0])].append(record)
        longest = max(len(names) for records in under.values() for names, _ in records)
        for heading, records in under.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl([(names.ljust(longest), text) for names, text in records], col_max=longest)


class Commands(click.Group):
    """Commands in the order in which they were added, each with its whole first sentence.

    Wrong use is told to machines as every other error is, where `--json` is among the arguments.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):  # what a file says need not be text that can be shown
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        given = kwargs.get("args", args[0] if args else None)
        as_json = "--json" in (sys.argv[1:] if given is None else given)
        if not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.ClickException as error:
            told = error.format_message()
            if as_json:
                emit_error(
                    "UsageError" if isinstance(error, click.UsageError) else type(error).__name__, told, error.exit_code
                )
            elif isinstance(error, click.UsageError) and "\n" not in told:
                width = terminal_width(sys.stderr)
                click.UsageError(wrapped(told, width, begun=len("Error: ")), error.ctx).show()
            else:
                error.show()
            sys.exit(error.exit_code)
        except click.Abort:  # a question was not answered
            if as_json:
                emit_error("Abort", "a question was not answered", 1)
            else:
                click.echo("Aborted!", err=True)
            sys.exit(1)
        sys.exit(status if isinstance(status, int) else 0)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(1000)) for name, command in self.commands.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name.startswith("-") or name in self.commands:
            return super().resolve_command(ctx, args)
        near = difflib.get_close_matches(name, self.commands, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self.commands)}"
        raise click.UsageError(f"there is no command {name!r}: {hint}", ctx)
