"""Pages of the documentation that are generated when the site is built: a hook of MkDocs.

Commands come from click, recipe fields from the settings, the cache format from its own page, and notebooks become
pages. Links from a page to a file of the repository lead to a copy of it in the site.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
REPOSITORY = "repository"
"""The folder of the site that holds copies of files of the repository."""
COPIED = ("benchmarks/results", "recipes")
KINDS = (".md", ".png", ".svg", ".json", ".csv", ".py")
FORMAT = "reference/cache-format.md"
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)]*)?\))")


def generated() -> dict[str, str]:
    """Path of each generated page, within the documentation, to its Markdown."""
    pages = {
        "reference/commands.md": commands(),
        "reference/recipe-fields.md": recipe_fields(),
        FORMAT: (ROOT / "cache" / "README.md").read_text(),
    }
    for path in sorted((DOCS / "tutorials").glob("*.ipynb")):
        pages[f"tutorials/{path.stem}.md"] = notebook(json.loads(path.read_text()))
    return pages


def copied() -> Iterator[tuple[str, Path]]:
    """Files of the repository that the site holds: path in the site, and where the file is."""
    for folder in COPIED:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in KINDS and "__pycache__" not in path.parts:
                yield f"{REPOSITORY}/{path.relative_to(ROOT).as_posix()}", path


def commands() -> str:
    """The help of every command, as the terminal prints it."""
    import click

    from layerwise.cli import main

    parts = [
        "# Commands\n\nThis is what `layerwise COMMAND --help` prints. Every command ends with an exit code: 0 done, "
        "1 failed, 2 wrong usage, 3 will not fit (memory or disk), 65 damaged data, 73 another process holds the run, "
        "75 stopped early and resumable.\n"
    ]
    for name, command in (("", main), *main.commands.items()):
        context = click.Context(command, info_name=f"layerwise {name}".strip(), max_content_width=90, terminal_width=90)
        title = name or "layerwise"
        parts.append(f"## {title}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def recipe_fields() -> str:
    """A table for each class of settings: every field with its default, the values it takes, and what it means."""
    from layerwise.recipe.fields import described
    from layerwise.settings.base import Settings

    parts = [
        "# Recipe fields\n\n`--set NAME=VALUE` sets a field. A field inside another one is reached with dots: "
        "`--set optimiser.learning_rate=1e-3`, and `--set stages.2.optimiser.learning_rate=1e-3` for module 2 alone. "
        "Run `layerwise recipes NAME` for the values of one recipe.\n"
    ]
    for heading, kinds in _kinds():
        parts.append(f"## {heading}\n")
        for kind in kinds:
            assert issubclass(kind, Settings)
            first = (kind.__doc__ or "").strip().split("\n\n")[0]
            parts.append(f"### {kind.__name__}\n\n{' '.join(first.split())}\n")
            rows = [
                f"| `{name}` | {_cell(default)} | {_text(allowed)} | {_text(meaning)} |"
                for name, default, allowed, meaning in described(kind)
            ]
            if rows:
                parts.append(
                    "| field | default | values | meaning and unit |\n| --- | --- | --- | --- |\n"
                    + "\n".join(rows)
                    + "\n"
                )
    return "\n".join(parts)


def _kinds() -> list[tuple[str, list[type]]]:
    """Headings, and the classes of settings under each: all that layerwise has, but those made from Python objects."""
    from layerwise.data import digits, folder, librispeech, speech, stl10, voices
    from layerwise.nets import pixelcnn, resnet
    from layerwise.nets import speech as speech_network
    from layerwise.objectives import barlow_twins, cross_entropy, dim, frame_infonce, infonce, nt_xent, predsim
    from layerwise.recipe.recipe import Recipe
    from layerwise.settings import training

    return [
        ("Recipe", [Recipe]),
        (
            "Training, probes, caches",
            [training.Training, training.Optimiser, training.Probe, training.SpeechProbes, training.CacheSettings],
        ),
        (
            "Datasets: `dataset`",
            [
                digits.Digits,
                folder.ImageFolder,
                stl10.STL10,
                speech.Speech,
                librispeech.LibriSpeech,
                voices.Voices,
            ],
        ),
        (
            "Networks: `network`",
            [
                resnet.PatchResNet,
                resnet.Group,
                pixelcnn.PixelCNN,
                speech_network.SpeechEncoder,
                speech_network.Convolution,
                speech_network.GRUContext,
            ],
        ),
        (
            "Objectives: `objective`",
            [
                infonce.PatchInfoNCE,
                frame_infonce.FrameInfoNCE,
                barlow_twins.BarlowTwins,
                nt_xent.NTXent,
                cross_entropy.CrossEntropy,
                dim.DeepInfoMax,
                predsim.PredSim,
            ],
        ),
    ]


def _cell(value: str) -> str:
    return f"`{value}`" if value else "required"


def _text(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def notebook(cells: dict[str, Any]) -> str:
    """A notebook as Markdown: its text, its code, and the text that the code printed."""
    parts = []
    for cell in cells["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(output.get("text", ())) for output in cell["outputs"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def resolved(page: str, link: str) -> str:
    """Where a link of a page leads, as a path within the documentation.

    Links to the repository (`../cache/README.md` on a page of the first level) lead to its copy in the site, and links
    to a notebook to the page made of it.

    Args:
        page: path of the page within the documentation.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if not path.startswith("../"):
        return path.removesuffix(".ipynb") + ".md" if path.endswith(".ipynb") else path
    inside = path.removeprefix("../")
    return FORMAT if inside == "cache/README.md" else f"{REPOSITORY}/{inside}"


def on_page_markdown(markdown: str, /, *, page: Any, **_: Any) -> str:
    """MkDocs calls this with each page: links that leave the documentation lead to copies in the site."""
    source = page.file.src_uri
    if source == FORMAT or source.startswith(f"{REPOSITORY}/"):
        return markdown

    def inside(found: re.Match[str]) -> str:
        before, link, after = found.groups()
        if ":" in link:
            return found[0]
        return f"{before}{posixpath.relpath(resolved(source, link), posixpath.dirname(source) or '.')}{after}"

    return LINK.sub(inside, markdown)


def on_files(files: Any, /, *, config: Any, **_: Any) -> Any:
    """MkDocs calls this with the files of the site: adds what is generated and copied."""
    from mkdocs.structure.files import File

    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    for path, source in copied():
        files.append(File.generated(config, path, abs_src_path=os.fspath(source)))
    return files
