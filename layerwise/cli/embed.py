"""layerwise embed"""

from __future__ import annotations

from pathlib import Path

import click

from layerwise.cli.command import Command, Number
from layerwise.cli.common import setup_for
from layerwise.cli.options import RUN, Options, options
from layerwise.cli.outcome import emit


@click.command(cls=Command, name="embed")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="FILE...", required=True)
@click.option(
    "--module",
    "number",
    type=Number(min=1),
    metavar="NUMBER",
    help="The module whose representation to write. Default: the last.",
)
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    metavar="FILE",
    default=Path("embeddings.safetensors"),
    show_default=True,
    help="Where to write; the ending .safetensors, .npz or .parquet chooses the format.",
)
@click.option(
    "--positions", is_flag=True, help="Keep a vector for each patch or frame. Without it, their mean is written."
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there already.")
@options(*RUN, "device")
def command(
    files: tuple[Path, ...], number: int | None, to: Path, positions: bool, overwrite: bool, options: Options
) -> None:
    """Write the representations of new images or recordings.

    Files are decoded and preprocessed exactly as the dataset's own are for a probe, and the representation is what a
    probe reads: a vector for each file.
    """
    with setup_for(options, purpose="embed", writes=False) as setup:
        from layerwise.pipeline.embed import embed_files, require_writable, write_embeddings
        from layerwise.pipeline.export import require_free
        from layerwise.render.exported import embeddings_json, show_embeddings

        require_writable(to)  # before hours of work, not after
        require_free((to,), overwrite)
        embeddings = embed_files(setup, number or len(setup.holders), files, positions=positions)
        write_embeddings(embeddings, to)
        result = embeddings_json(embeddings, to)
        emit(options, result, lambda: show_embeddings(result))
