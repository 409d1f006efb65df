"""How much of the device's arithmetic a stage uses when its inputs lie there already."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.part import Bench, Figures, Task, prepared, same, trial, use_precision, wait
from layerwise.paper.memory_rows import Row
from layerwise.training.step import Learner, train_step

SHEET = {
    "H100 PCIe": (51e12, 378e12, 756e12),
    "H100": (67e12, 495e12, 989e12),
    "H200": (67e12, 495e12, 989e12),
    "A100": (19.5e12, 156e12, 312e12),
    "RTX 4090": (82.6e12, 82.6e12, 165e12),
}
"""Most operations a second, dense, that the maker's data sheet gives for fp32, tf32 and bf16; the first name that is a
part of the device's counts."""
SHEET_ORDER = ("fp32", "tf32", "bf16")


def stages(bench: Bench) -> Iterator[Task]:
    for batch in bench.batches:
        for precision in bench.precisions:
            for number in bench.modules:
                title = f"batch {batch}, module {number}, {precision}"
                yield title, partial(_stage, bench, batch, number, precision)


def compiled(bench: Bench) -> Iterator[Task]:
    """With `torch.compile`; on a CPU with a backend that generates no code."""
    for number in bench.modules:
        for precision in bench.precisions[-2:]:
            title = f"batch {bench.batches[-1]}, module {number}, {precision}"
            for way in ("not compiled", "compiled"):
                work = partial(_stage, bench, bench.batches[-1], number, precision, compiling=way == "compiled")
                yield f"{title}, {way}", work


def _stage(bench: Bench, batch: int, number: int, precision: str, *, compiling: bool = False) -> Figures:
    word = use_precision(precision)
    recipe = bench.recipe_of(Row("", "gim", (number,), (f"precision={word}",)), batch)
    backend = "aot_eager" if bench.small else "inductor"

    def compile_module(learner: Learner) -> Learner:
        learner.module.compile(backend=backend)
        return learner

    change = compile_module if compiling else same
    figures = trial(recipe, (number,), bench, change=change, on_device=True)
    flops = _flops(bench, batch, number)
    figures |= {"batch": batch, "module": number, "precision": precision, "flops": flops}
    figures["backend"] = backend if compiling else None
    rate, product = flops / figures["seconds"], _product_rate(bench.device, precision)
    sheet = _sheet(bench.device, precision)
    figures |= {"of_matrix_product": rate / product, "mfu": None if sheet is None else rate / sheet}
    figures["waiting"] = None if bench.small else _waiting(bench, batch, number, word)
    return figures


def _flops(bench: Bench, batch: int, number: int) -> int:
    """Of one step on whole batches: multiplications and additions in convolutions and matrix products."""
    recipe = bench.recipe_of(Row("", "gim", (number,)), batch)
    learners, given, arithmetic = prepared(recipe, (number,), bench.device, on_device=True)
    with FlopCounterMode(display=False) as counter:
        train_step(learners, given, 0, arithmetic)
    return int(counter.get_total_flops())


def _product_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product: what this device reaches, whatever its data sheet says."""
    side = 256 if device.type == "cpu" else 8192
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    times = []
    for _ in range(5):
        wait(device)
        began = time.perf_counter()
        left @ right
        wait(device)
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times)


def _sheet(device: torch.device, precision: str) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rates[SHEET_ORDER.index(precision)] for part, rates in SHEET.items() if part in name), None)


def _waiting(bench: Bench, batch: int, number: int, precision: str) -> float:
    """The part of three steps in which no kernel runs on the GPU, as the profiler sees them."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    recipe = bench.recipe_of(Row("", "gim", (number,), (f"precision={precision}",)), batch)
    learners, given, arithmetic = prepared(recipe, (number,), bench.device, on_device=True)
    for step in range(2):
        train_step(learners, given, step, arithmetic)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for step in range(3):
            train_step(learners, given, step, arithmetic)
        wait(bench.device)
    events = seen.events() or []
    ranges = sorted(
        (event.time_range.start, event.time_range.end) for event in events if event.device_type == DeviceType.CUDA
    )
    if not ranges:
        raise RuntimeError("the profiler saw no kernel")
    busy, until = 0.0, ranges[0][0]
    for start, end in ranges:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return float(1 - busy / (until - ranges[0][0]))
