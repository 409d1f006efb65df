"""From the graph of a forward, and where to cut it, to modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from layerwise.errors import UsageError
from layerwise.nets.split.trace import CONSTANT


def cut(network: nn.Module, graph: fx.Graph, starts: Sequence[fx.Node]) -> list[fx.GraphModule]:
    nodes = list(graph.nodes)
    # Parameters and buffers are read where they are used, whatever the order in which they were met.
    body = [node for node in nodes if node.op not in ("placeholder", "get_attr", "output")]
    inputs = [node for node in nodes if node.op == "placeholder"]
    output = next(node for node in nodes if node.op == "output")
    bounds = [0, *(_place(body, nodes, start) for start in starts), len(body)]
    used_last = last_uses(nodes, body)
    modules, handed = [], inputs
    for number, (begin, end) in enumerate(pairwise(bounds), 1):
        own = body[begin:end]
        if end == len(body):
            given: Any = output.args[0]
        else:
            alive = [node for node in [*handed, *own] if used_last[node] >= end]
            _require_tensors(alive, number)
            given = tuple(alive) if len(alive) > 1 else alive[0]
        modules.append(_module(network, handed, own, given, number))
        if end < len(body):
            handed = alive
    return modules


def _place(body: Sequence[fx.Node], nodes: Sequence[fx.Node], start: fx.Node) -> int:
    """The first node of the body from `start` on."""
    return next(index for index, node in enumerate(body) if nodes.index(node) >= nodes.index(start))


def last_uses(nodes: Sequence[fx.Node], body: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """For each node, the place in the body of the last one that reads it; -1 where nobody does."""
    place = {node: index for index, node in enumerate(body)}
    return {node: max((place.get(user, len(body)) for user in node.users), default=-1) for node in nodes}


def _require_tensors(values: Sequence[fx.Node], number: int) -> None:
    """What crosses a cut is stored, sample by sample: tensors, and neither sizes nor lists of tensors."""
    for node in values:
        tensor = node.meta.get("tensor", not _is_size(node))
        if not tensor:
            raise UsageError(
                f"module {number} would have to hand on {node.name}, which is not a tensor: it is computed before the "
                "cut and used after it. Cut elsewhere, or compute it again from a tensor that the later part reads"
            )


def _is_size(node: fx.Node) -> bool:
    """Whether a value is a size or made of sizes alone, as far as the graph tells."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    read = node.all_input_nodes
    return node.op == "call_function" and bool(read) and all(map(_is_size, read))


def _module(
    network: nn.Module, reads: Sequence[fx.Node], body: Sequence[fx.Node], gives: Any, number: int
) -> fx.GraphModule:
    graph, copies = fx.Graph(), {}
    for node in reads:
        copies[node] = graph.placeholder(node.name)

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter or buffer
            assert node.op == "get_attr", f"{node} is read before it is made"
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in body:
        copies[node] = graph.node_copy(node, copied)
        if _in_place(network, node):
            for read in node.all_input_nodes:
                if read in reads:  # it belongs to the module before, or to a cache
                    with graph.inserting_before(copies[node]):
                        own = graph.call_method("clone", (copies[read],))
                    copies[node].replace_input_with(copies[read], own)
    graph.output(map_arg(gives, copied))
    graph.lint()
    with _holding(network, {str(node.target): node.meta[CONSTANT] for node in copies if CONSTANT in node.meta}) as made:
        found = fx.GraphModule(network, graph, f"{type(network).__name__}Part{number}")
    found._non_persistent_buffers_set |= made
    return found


@contextmanager
def _holding(network: nn.Module, constants: Mapping[str, Tensor]) -> Iterator[set[str]]:
    """The network with these tensors as buffers, as long as the block lasts."""
    for name, value in constants.items():
        network.register_buffer(name, value, persistent=False)
    try:
        yield set(constants)
    finally:
        for name in constants:
            delattr(network, name)


def _in_place(network: nn.Module, node: fx.Node) -> bool:
    """Whether a node changes what it reads, as nn.ReLU(inplace=True) does, or a sequence that begins with one."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        while isinstance(module, nn.Sequential) and len(module):
            module = module[0]
        return getattr(module, "inplace", False) is True
    return node.kwargs.get("inplace") is True
