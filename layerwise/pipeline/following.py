"""The processes beside the first one of a command or script: they help where it asks them to, and write nothing else.

The first process decides, writes and prints, as a single one does. Where work is shared it tells the others, and all
do it together: training, and filling a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from layerwise.pipeline.caching import help_to_cache
from layerwise.pipeline.schedule import help_to_train
from layerwise.pipeline.setup import Setup
from layerwise.seeding import same_bits_in_every_run
from layerwise.training.ranks import Ranks

HELP: dict[str, Callable[[Setup, Mapping[str, Any]], None]] = {"train": help_to_train, "cache": help_to_cache}


@contextmanager
def leading(ranks: Ranks) -> Iterator[None]:
    """Work as the first process; at the end of the block the others are told with what exit code it ends."""
    code = 0
    try:
        yield
    except BaseException as error:
        code = getattr(error, "exit_code", 75 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    finally:
        ranks.told({"do": "end", "code": code})


def follow(ranks: Ranks, make_setup: Callable[[Mapping[str, Any]], Setup]) -> int:
    """Help the first process until it ends; returns the exit code that it ends with.

    Args:
        make_setup: the run as it is now, from what the first process told when it began.

    Raises:
        ProcessLost: the first process ended without a word.
    """
    begun: Mapping[str, Any] = {}
    while (job := ranks.told(None))["do"] != "end":
        if job["do"] == "begin":
            begun = job
            continue
        setup = make_setup(begun)
        with same_bits_in_every_run() if setup.device.type == "cpu" else nullcontext():
            HELP[job["do"]](setup, job)
    code: int = job["code"]
    return code
