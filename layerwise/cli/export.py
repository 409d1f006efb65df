"""layerwise export"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from layerwise.cli.command import Command, Number
from layerwise.cli.common import setup_for
from layerwise.cli.options import RUN, Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="export")
@click.option(
    "--module",
    "number",
    type=Number(min=1),
    metavar="NUMBER",
    help="The module whose representation the encoder ends with. Default: the last.",
)
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    metavar="FILE",
    required=True,
    help="Where to write it; the ending .pt2, .onnx or .safetensors chooses the format.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there already.")
@options(*RUN)
def command(number: int | None, to: Path, overwrite: bool, options: Options) -> None:
    """Write a trained encoder to a file that works without the run, and print the code that loads it.

    \b
    .pt2          a graph of torch.export: needs torch alone
    .onnx         a graph for ONNX Runtime (extra `onnx`)
    .safetensors  the weights and the network's settings: needs layerwise

    Torch can run code that a .pt2 file hides: load only those of people you trust. The other two run none.

    FILE.json is written beside it: shapes, and how a picture or a recording becomes an input.
    """
    with setup_for(dataclasses.replace(options, device="cpu"), purpose="export", writes=False) as setup:
        from layerwise.pipeline.export import export_encoder
        from layerwise.render.exported import export_json, show_export

        exported = export_encoder(setup, number or len(setup.holders), to, overwrite=overwrite)
        emit(options, export_json(exported), lambda: show_export(exported))
