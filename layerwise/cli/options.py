"""The options that several commands share: each is declared once, and a command names those that matter to it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from layerwise.cli.command import Number, Option
from layerwise.cli.outcome import errors_to_exit_codes
from layerwise.settings.choices import FeedName, MethodName, ScheduleName, TrackerName

Function = TypeVar("Function", bound=Callable[..., Any])
METHODS: tuple[str, ...] = get_args(MethodName)
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Options:
    """What was asked on the command line, whichever the command."""

    json: bool
    recipe: str | None = None
    method: str | None = None
    set: tuple[str, ...] = ()
    run_dir: Path | None = None
    data_dir: Path | None = None
    download: bool = False
    device: str = "auto"
    track: TrackerName | None = None

    def override(self, **fields: object) -> Options:
        """The same with these fields of the recipe set too; None leaves a field as it is."""
        chosen = (f"{name}={value}" for name, value in fields.items() if value is not None)
        return dataclasses.replace(self, set=(*self.set, *chosen))

    def words(self) -> tuple[str, ...]:
        """What chooses recipe, settings, data and device, as words of a command line."""
        chosen = {"recipe": self.recipe, "method": self.method, "data-dir": self.data_dir}
        chosen["device"] = self.device if self.device != "auto" else None
        fields = {override.partition("=")[0].strip(): override for override in self.set}
        if self.method is not None:
            fields.pop("method", None)
        return (
            *(f"--{name}={value}" for name, value in chosen.items() if value is not None),
            *(f"--set={override}" for override in fields.values()),
        )


FIELDS = {
    "data": "dataset",
    "schedule": "schedule",
    "feed": "feed",
    "max_memory": "training.max_memory",
    "micro_batch": "training.micro_batch",
    "cache_budget": "cache.budget",
    "cache_url": "cache.url",
    "views": "cache.views",
}
"""Options that are short for --set, and the field of the recipe that each sets."""

DECLARED: dict[str, tuple[str, dict[str, Any]]] = {
    "recipe": (
        "Run",
        {
            "metavar": "NAME|FILE.py",
            "help": "A built-in recipe, or the path of your own. Default: the recipe of the run used last.",
        },
    ),
    "method": (
        "Run",
        {
            "type": click.Choice(METHODS),
            "metavar": "METHOD",
            "help": f"How the network is trained: {', '.join(METHODS)}. Default: gim, module by module.",
        },
    ),
    "set": (
        "Run",
        {
            "metavar": "KEY=VALUE",
            "multiple": True,
            "help": "Override a field of the recipe, as in objective.negatives=32; `layerwise recipes NAME` lists "
            "all. May be repeated.",
        },
    ),
    "run_dir": (
        "Run",
        {
            "type": click.Path(path_type=Path, file_okay=False),
            "metavar": "DIR",
            "help": "Where the run lives. Default: runs/RECIPE[-METHOD][-SCHEDULE], or the run used last.",
        },
    ),
    "schedule": (
        "Run",
        {
            "type": click.Choice(get_args(ScheduleName)),
            "metavar": "SCHEDULE",
            "help": "iterative: one module after another; simultaneous: all in each step; pipelined: likewise, with "
            "consecutive modules in different processes. Default: as in the recipe.",
        },
    ),
    "feed": (
        "Run",
        {
            "type": click.Choice(get_args(FeedName)),
            "metavar": "FEED",
            "help": "What modules above the first read: cache, or recompute, which needs no disk. Default: as in the "
            "recipe.",
        },
    ),
    "device": (
        "Run",
        {
            "type": click.Choice(DEVICES),
            "metavar": "DEVICE",
            "default": "auto",
            "help": "Where to compute: cpu, cuda, or auto, which uses CUDA if it is available.",
        },
    ),
    "data_dir": (
        "Data",
        {
            "type": click.Path(path_type=Path),
            "metavar": "DIR",
            "help": "Folder of the dataset's files. Default: the folder used last.",
        },
    ),
    "data": (
        "Data",
        {
            "metavar": "FUNCTION",
            "help": "A function that returns your own datasets, as package.module:function or FILE.py:function; see "
            "`layerwise.recipe.named_data`.",
        },
    ),
    "download": ("Data", {"is_flag": True, "help": "Download the dataset into --data-dir if it is missing."}),
    "max_memory": (
        "Memory",
        {"metavar": "BYTES", "help": "Device memory a stage may use, as in 500MB or 2GiB; chooses --micro-batch."},
    ),
    "micro_batch": (
        "Memory",
        {
            "type": Number(min=1),
            "metavar": "SAMPLES",
            "help": "Samples that go through a module at once. The gradients stay those of the whole batch.",
        },
    ),
    "cache_budget": (
        "Cache",
        {
            "metavar": "BYTES",
            "help": "Disk space a cache may use, as in 50GB. A larger cache becomes a rolling window. Default: the "
            "free space.",
        },
    ),
    "cache_url": (
        "Cache",
        {"metavar": "URL", "help": "Keep the caches at this address: s3://bucket/prefix, gs://, az:// or file://."},
    ),
    "views": (
        "Cache",
        {
            "type": Number(min=1),
            "metavar": "COUNT",
            "help": "Augmentations that a cache stores for each training sample.",
        },
    ),
    "track": (
        "Output",
        {
            "type": click.Choice(get_args(TrackerName)),
            "metavar": "TRACKER",
            "help": "Also write curves to tensorboard, wandb or trackio. TensorBoard's files are in RUN/curves.",
        },
    ),
    "json": ("Output", {"is_flag": True, "help": "Machine output on stdout; everything else goes to stderr."}),
}

RUN = ("recipe", "method", "set", "run_dir")
"""What names a run."""
DATA = ("data_dir", "download", "data")
MEMORY = ("max_memory", "micro_batch")
CACHE = ("cache_budget", "cache_url", "views")


def options(*names: str, **helps: str) -> Callable[[Function], Function]:
    """Add these options, and --json; they arrive as one `Options`.

    Args:
        helps: another help for an option.
    """

    def add(command: Function) -> Function:
        @functools.wraps(command)
        def gathered(*args: Any, **kwargs: Any) -> Any:
            given = {name: kwargs.pop(name) for name in (*names, "json")}
            fields = {FIELDS[name]: given.pop(name) for name in names if name in FIELDS}
            with errors_to_exit_codes(given["json"]):
                return command(*args, options=Options(**given).override(**fields), **kwargs)

        for name in reversed((*names, "json")):
            heading, attributes = DECLARED[name]
            told = {**attributes, "help": helps.get(name, attributes["help"])}
            gathered = click.option(f"--{name.replace('_', '-')}", name, cls=Option, heading=heading, **told)(gathered)
        return gathered  # type: ignore[return-value]

    return add
