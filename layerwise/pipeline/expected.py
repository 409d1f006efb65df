"""What a recipe asks for, noted in its run for those who look at it without the recipe."""

from __future__ import annotations

from layerwise.files.records import EXPECTED, ExpectedModule, ExpectedRecord, check_record
from layerwise.files.storage import parse_json, sealed_json, write_json
from layerwise.pipeline.frozen import stage_part
from layerwise.pipeline.module_cache import cache_part
from layerwise.pipeline.probe import probe_part
from layerwise.pipeline.setup import Setup
from layerwise.pipeline.status import NOTE, recipe_digest


def expected(setup: Setup) -> ExpectedRecord:
    """What this recipe asks for.

    Raises:
        NotReady: nothing says what the dataset is like.
    """
    cache, depth = setup.recipe.cache, setup.depth
    modules: list[ExpectedModule] = [
        {
            "group": list(setup.group(number)),
            "stage": stage_part(setup, number),
            "cache": cache_part(setup, number),
            "stored": setup.recipe.feed == "cache" and setup.group(number)[-1] == number and number < depth,
            "probe": probe_part(setup, number),
            "part": max(part for part, holder in enumerate(setup.holders, 1) if holder == number),
        }
        for number in range(1, depth + 1)
    ]
    found: ExpectedRecord = {
        "dtype": cache.dtype,
        "codec": cache.codec,
        "budget": cache.budget,
        "renew": cache.renew,
        "window_epochs": cache.window_epochs,
        "batch_size": setup.recipe.training.batch_size,
        "feed": setup.recipe.feed,
        "labelled": bool(setup.facts.classes) and {"probe", "test"} <= setup.facts.sizes.keys(),
        "recipe": recipe_digest(setup.run.folder),
        "modules": modules,
    }
    path = setup.run.folder / NOTE
    as_read = {name: value for name, value in parse_json(sealed_json(found)).items() if name in found}
    return check_record(path, as_read, EXPECTED)  # tuples are lists there


def note_expected(setup: Setup) -> None:
    """Write it into the run."""
    write_json(setup.run.folder / NOTE, expected(setup))
