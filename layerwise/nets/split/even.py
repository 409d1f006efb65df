"""Where to cut a network so that all modules take about the same memory in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from layerwise.errors import UsageError
from layerwise.nets.split.parts import cut, last_uses
from layerwise.nets.split.trace import trace, without_memory


def even_starts(network: nn.Module, count: int, inputs: Sequence[Tensor]) -> tuple[fx.Graph, list[fx.Node]]:
    """Where to cut the network into `count` modules of about the same memory, wherever one tensor alone crosses.

    Costly pieces are opened, where they can be, until each is small beside a module.
    """
    opened: set[str] = set()
    closed: set[str] = set()
    graph = trace(network, opened, inputs)
    while True:
        pieces = _pieces(graph)
        costs = _costs(network, graph, pieces, inputs)
        small = sum(costs) / count / 8
        costly = [piece for cost, piece in zip(costs, pieces, strict=True) if cost > small]
        names = {name for piece in costly if (name := _largest_module(network, piece, closed)) is not None}
        if not names:
            break
        try:
            graph = trace(network, opened | names, inputs)
            opened |= names
        except UsageError:
            if len(names) == 1:
                closed |= names
            else:
                closed |= {name for name in names if not _opens(network, opened | {name}, inputs)}
    if len(pieces) < count:
        raise UsageError(
            f"{type(network).__name__} has {len(pieces)} pieces between which a single tensor passes, too few for "
            f"modules={count}: ask for {len(pieces)} or fewer, or name the children to cut at"
        )
    return graph, [pieces[first][0] for first in _even(costs, count)]


def _opens(network: nn.Module, opened: set[str], inputs: Sequence[Tensor]) -> bool:
    try:
        trace(network, opened, inputs)
    except UsageError:
        return False
    return True


def _pieces(graph: fx.Graph) -> list[list[fx.Node]]:
    """The forward as a chain of pieces, each of which hands a single tensor to the next."""
    nodes = list(graph.nodes)
    body = [node for node in nodes if node.op not in ("placeholder", "get_attr", "output")]
    used_last = last_uses(nodes, body)
    pieces: list[list[fx.Node]] = [[]]
    alive = {node for node in nodes if node.op == "placeholder"}
    for place, node in enumerate(body):
        pieces[-1].append(node)
        alive = {value for value in {*alive, node} if used_last[value] > place}
        if place + 1 < len(body) and len(alive) == 1 and next(iter(alive)).meta["tensor"]:
            pieces.append([])
    return pieces


def _costs(
    network: nn.Module, graph: fx.Graph, pieces: Sequence[Sequence[fx.Node]], inputs: Sequence[Tensor]
) -> list[int]:
    return training_bytes(cut(network, graph, [piece[0] for piece in pieces[1:]]), inputs)


def training_bytes(modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> list[int]:
    """Bytes that each of these modules, one after another, takes in training: what its backward pass keeps of the
    inputs, and its weights four times (gradients and Adam's two moments). Found on tensors without memory.
    """
    values: Any = tuple(x.to("meta") for x in inputs)
    costs = []
    for module in modules:
        shadow = without_memory(module).train()
        weights = {id(weight.untyped_storage()) for weight in shadow.parameters()}
        kept: dict[int, Any] = {}

        def keep(tensor: Tensor, kept: dict[int, Any] = kept) -> Tensor:
            kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
            return tensor

        # A copy: a leaf that requires a gradient takes no ReLU in place.
        fed = [x.detach().requires_grad_(x.is_floating_point()).clone() for x in values]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = shadow(*fed)
        values = found if isinstance(found, tuple) else (found,)
        activations = sum(storage.nbytes() for name, storage in kept.items() if name not in weights)
        costs.append(activations + 4 * sum(weight.nbytes for weight in shadow.parameters()))
    return costs


def _largest_module(network: nn.Module, piece: Sequence[fx.Node], closed: set[str]) -> str | None:
    """The module of a piece that has most weights, of those that may be opened: containers, and modules that are not
    torch's own.
    """
    names = [str(node.target) for node in piece if node.op == "call_module" and node.target not in closed]
    found = {name: network.get_submodule(name) for name in names}
    inner = {
        name: sum(weight.numel() for weight in module.parameters())
        for name, module in found.items()
        if next(module.children(), None) is not None
        and (isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.nn"))
    }
    return max(inner, key=lambda name: inner[name]) if inner else None


def _even(costs: Sequence[int], count: int) -> list[int]:
    """The first piece of each group after the first, so that the costliest of `count` groups is as cheap as can be."""
    total = np.concatenate([[0], np.cumsum(costs)])
    pieces = len(costs)
    best = total[1:].astype(float)  # best[i]: the costliest group, where pieces 0 to i are one group; then two, ...
    choices = []
    for _ in range(count - 1):
        costliest = [
            [max(best[first - 1], total[last + 1] - total[first]) for first in range(1, last + 1)]
            for last in range(pieces)
        ]
        choices.append([int(np.argmin(row)) + 1 if row else 0 for row in costliest])
        best = np.array([min(row) if row else np.inf for row in costliest])
    starts, last = [], pieces - 1
    for choice in reversed(choices):
        starts.append(choice[last])
        last = choice[last] - 1
    return starts[::-1]
