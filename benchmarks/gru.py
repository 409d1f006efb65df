"""What a recurrent context without back-propagation through time costs: the cell stepped by hand with a graph, one
graph for all steps at once, and the ordinary unit, forward and backward, in one run.

    python -m benchmarks.gru [--device cuda] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from layerwise.nets.speech import steps_without_bptt

CHANNELS, HIDDEN, FRAMES = 512, 256, 128  # of the paper


def stepped(gru: nn.GRU, x: Tensor) -> Tensor:
    """The definition: one step after another, the state detached at each."""
    state, states = x.new_zeros(x.shape[0], gru.hidden_size), []
    for step in x.unbind(1):
        state = torch.gru_cell(step, state.detach(), *gru.all_weights[0])
        states.append(state)
    return torch.stack(states, 1)


def ordinary(gru: nn.GRU, x: Tensor) -> Tensor:
    states: Tensor = gru(x)[0]
    return states


WAYS: dict[str, Callable[[nn.GRU, Tensor], Tensor]] = {
    "stepped by hand": stepped,
    "all steps at once": steps_without_bptt,
    "ordinary, with BPTT": ordinary,
}


def measure(device: torch.device, batch: int, repeats: int) -> dict[str, float]:
    """Way to median seconds of a forward and a backward pass; the ways take turns."""
    torch.manual_seed(0)
    gru = nn.GRU(CHANNELS, HIDDEN, batch_first=True).to(device)
    x, gradient = torch.randn(batch, FRAMES, CHANNELS, device=device), torch.randn(batch, FRAMES, HIDDEN, device=device)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats + 1):
        for way, states in WAYS.items():
            gru.zero_grad()
            begin = _now(device)
            states(gru, x).backward(gradient)
            times[way].append(_now(device) - begin)
    return {way: statistics.median(found[1:]) for way, found in times.items()}  # the first round warms up


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    found = {batch: measure(device, batch, asked.repeats) for batch in asked.batch}
    if asked.json:
        print(json.dumps({"device": str(device), "threads": torch.get_num_threads(), "seconds": found}))
        return
    print(f"GRU {CHANNELS} -> {HIDDEN}, {FRAMES} frames, forward and backward on {device}, milliseconds")
    for batch, seconds in found.items():
        print(f"batch {batch:>3}  " + "  ".join(f"{way}: {1000 * value:.1f}" for way, value in seconds.items()))


if __name__ == "__main__":
    main()
