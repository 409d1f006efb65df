"""How fast the activation cache reads, writes and feeds a training, and how small it gets, beside other stores.

    python -m benchmarks.cache [--work DIR] [--megabytes 512] [--repeats 5] [--peers] [--json FILE]

Samples are real activations: outputs of module 1 of the paper's network (as its seed makes it) for crops of the two
photographs that scikit-learn ships. Workload A: the module's output for one image, 49 x 256 x 16 x 16 in float16
(6.4 MB). B: for one patch (131 KB). C: means over space of four patches (2 KB). Each is read in shuffled epochs from
files in the page cache. *The practical limit* is a shuffled `np.take`, one thread, from a page-cached raw file
into a warm buffer; everything is a fraction of it, measured in turns with it, medians. Speeds count the bytes as
float16, whatever is stored. Beside wall time, the processor's time is compared (`cpu`): on a machine that does other
work meanwhile it is the sturdier of the two for readers of one thread. Then trainings from a cache are compared with
the same from memory, and writing a cache with the forward pass that feeds it. Reading, training and writing each run in
a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from benchmarks.cache_reading import reading
from benchmarks.cache_training import training
from benchmarks.cache_workloads import make_raw
from benchmarks.cache_writing import writing
from benchmarks.machine import in_words, machine

Arguments = ParamSpec("Arguments")
Figures = TypeVar("Figures")


def apart(part: Callable[Arguments, Figures], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Figures:
    """What `part` returns, from a process of its own."""
    # Spawned, so that no part finds what another left in the process: threads of the peers, a heap in pieces,
    # whichever huge pages the C library happens to have.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(part, *args, **kwargs).result()


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    reading, writing = found["reading"], found["writing"]
    names = list(dict.fromkeys(name for workload in reading.values() for name in workload["speeds"]))
    lines = [
        f"{in_words(found['machine'])}; {found['megabytes']} MB of each workload, page cache warm, "
        f"medians of {found['repeats']} shuffled epochs taken in turns. Reading, training and writing each ran in a "
        "process of its own. Samples of 6.4 MB (A), 131 KB (B), 2 KB (C). GB/s of float16, and the fraction of the "
        "limit: a gather by one thread from a raw file into a warm buffer.",
        "",
        "| reader | A: GB/s | of the limit | B: GB/s | of the limit | C: GB/s | of the limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        cells = []
        for workload in reading.values():
            speed = workload["speeds"].get(name)
            cells += ["–", "–"] if speed is None else [f"{speed['gb_per_s']:.2f}", f"{speed['of_limit']:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| store | A: bytes | error | B: bytes | error | C: bytes | error |", "| --- |" + " ---: |" * 6]
    for name in next(iter(reading.values()))["stores"]:
        stores = [workload["stores"][name] for workload in reading.values()]
        lines.append(f"| {name} | " + " | ".join(f"{one['ratio']:.3f} | {one['error']:.1e}" for one in stores) + " |")
    lines += [
        "",
        "Bytes are relative to float16; errors are relative L2 norms.",
        "",
        *(
            f"- Training {name} from the cache: {one['ratio']:.3f} of the samples a second from memory."
            for name, one in found["training"].items()
        ),
        f"- Writing A: {writing['ratio']:.3f} of the longer of the forward pass alone ({writing['forward']:.2f} s) and "
        f"the raw write alone ({writing['raw write']:.2f} s); glibc keeps freed memory in all three.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a directory for the files; kept, so that a second run is quicker")
    parser.add_argument("--megabytes", type=int, default=512, help="of each workload")
    parser.add_argument("--repeats", type=int, default=5, help="epochs that are timed")
    parser.add_argument("--peers", action="store_true", help="other stores too: pip install 'layerwise[bench]'")
    parser.add_argument("--json", type=Path, help="where to write the figures, and beside them a page of them (.md)")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="cache-benchmark-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        raw = make_raw(work, options.megabytes)
        found = {
            "machine": machine(),
            "megabytes": options.megabytes,
            "repeats": options.repeats,
            "reading": apart(reading, work, raw, options.repeats, options.peers),
            "training": apart(training, work, raw, options.repeats),
            "writing": apart(writing, work, raw, 2 * options.repeats),
        }
    finally:
        if options.work is None:
            shutil.rmtree(work)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
        options.json.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    main()
