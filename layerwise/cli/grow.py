"""layerwise grow"""

from __future__ import annotations

import dataclasses
import json

import click

from layerwise.cli.command import Command, Number
from layerwise.cli.common import setup_for
from layerwise.cli.options import DATA, MEMORY, RUN, Options, options
from layerwise.cli.outcome import emit
from layerwise.settings.choices import TOGETHER


@click.command(cls=Command, name="grow")
@click.option(
    "--channels",
    type=Number(min=4),
    metavar="COUNT",
    help="Channels of the new module. Default: twice those of the last module.",
)
@click.option(
    "--blocks",
    type=Number(min=1),
    metavar="COUNT",
    default=1,
    show_default=True,
    help="Residual blocks of the new module.",
)
@click.option(
    "--stride",
    type=Number(1, 4),
    metavar="1-4",
    default=1,
    show_default=True,
    help="Stride of the new module's first block.",
)
@options(*RUN, "device", *DATA, *MEMORY)
def command(channels: int | None, blocks: int, stride: int, options: Options) -> None:
    """Add a module on top of a finished run, and train only it.

    The modules below keep their weights, bit for bit, even if they were trained together: the new module trains on
    their frozen outputs. The new module becomes part of the run's recipe.
    """
    with setup_for(options, purpose="grow", writes=False) as setup:
        from layerwise.errors import UsageError
        from layerwise.nets.resnet import PatchResNet
        from layerwise.pipeline.frozen import require_stages

        recipe, depth, folder = setup.recipe, setup.depth, setup.run.folder
        network = recipe.network
        if not isinstance(network, PatchResNet) or network.cuts is not None:
            raise UsageError(
                f"grow adds a group to a PatchResNet with one module for each group (network.cuts = null), and the "
                f"recipe {recipe.name!r} has another network or method: add the module in the recipe, and train it "
                "with layerwise stage"
            )
        if recipe.scale < 1:
            raise UsageError(
                f"the run was scaled down (scale = {recipe.scale:g}), and the grown network would be scaled again: "
                "grow a run of the full recipe, or choose its channels with --set instead of a scale"
            )
        require_stages(setup, depth)
        last = network.groups[-1]
        added = {"channels": channels or 2 * last.channels, "blocks": blocks, "stride": stride}
        taller = network.model_copy(update={"groups": (*network.groups, last.model_copy(update=added))})
        if taller.through(depth) != network.through(depth):
            raise UsageError(
                f"with {added['channels']} channels (times network.width = {network.width:g}) and stride 1, the first "
                "block reads its input before the ReLU, but the module below only outputs relu(x): choose other "
                "--channels, or a --stride"
            )
        groups = json.dumps([group.model_dump() for group in taller.groups])
    together = depth if recipe.schedule in TOGETHER and recipe.together is None else None
    grown = dataclasses.replace(options.override(**{"network.groups": groups, "together": together}), run_dir=folder)
    with setup_for(grown, purpose="grow") as setup:
        from layerwise.pipeline.caching import write_cache
        from layerwise.pipeline.module_cache import cached
        from layerwise.pipeline.probe import probe_module
        from layerwise.pipeline.schedule import run_stage
        from layerwise.render.tables import probe_table

        if setup.recipe.feed == "cache" and not cached(setup, depth):
            write_cache(setup, depth)
        record = run_stage(setup, depth + 1)
        labelled = {"probe", "test"} <= setup.facts.sizes.keys()
        probes = [probe_module(setup, number) for number in (depth, depth + 1)] if labelled else []
        result = {"run": str(folder), "module": depth + 1, "trained": record, "probes": probes}
        emit(options, result, lambda: probe_table(probes))
