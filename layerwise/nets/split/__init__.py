"""Cut any network into modules, at named children or evenly by memory, so that each can be trained on its own.

The forward of the network is traced (torch.fx), but only as deep as the cuts need: everything else stays the module
that it is. So dropout, stochastic depth and batch statistics go on telling training from evaluation, and the modules
share their parameters with the network that was cut: training them trains it.

With an example input the trace runs along on tensors without memory (device `meta`), so that a forward may branch on
shapes; and the modules are held against the network before they are returned.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from layerwise.errors import UsageError
from layerwise.nets.split.even import even_starts
from layerwise.nets.split.parts import cut
from layerwise.nets.split.trace import trace

Example = Tensor | Sequence[Tensor]


def split(
    network: nn.Module, at: Sequence[str] = (), *, modules: int | None = None, example: Example | None = None
) -> list[fx.GraphModule]:
    """Modules that compute, one after another, what `network` computes.

    Each name in `at` (as `network.named_modules()` gives it, such as "layer2" or "encoder.layers.3") begins a module.
    With `modules` instead, the network is cut into so many that take about the same memory in training: what their
    backward pass keeps of the example, and their weights four times (gradients and Adam's two moments).

    Where several tensors cross a cut, a module returns them as a tuple and the next takes them as its arguments;
    `crossing` names them. Parameters are those of the network, under their names there.

    Args:
        network: the modules are left in the mode, training or evaluation, that it is in.
        at: in the order in which the forward reaches them.
        modules: how many, instead of `at`.
        example: a batch of inputs, (B, ...), or all inputs where the network takes several. Needed with `modules`, and
            where the forward branches on shapes.

    Raises:
        UsageError: no child has a name, or the forward cannot be cut there; the message says why.
    """
    inputs = None if example is None else (example,) if isinstance(example, Tensor) else tuple(example)
    if modules is None:
        _require_names(network, at)
        graph = trace(network, _ancestors(at), inputs)
        starts = _starts(graph, at)
    else:
        if at or inputs is None or modules < 2:
            raise UsageError(
                f"split takes names to cut at, or modules=2 or more with example=, a batch of inputs; got "
                f"at={list(at)}, modules={modules}, {'no example' if inputs is None else 'an example'}"
            )
        graph, starts = even_starts(network, modules, inputs)
    found = cut(network, graph, starts)
    _require_own_weights(found)
    if inputs is not None:
        _require_equal(network, found, inputs)
    return found


def crossing(module: fx.GraphModule) -> list[str]:
    """Names of the tensors that a module from `split` hands to the next: what it returns, in order."""
    returned = next(node for node in module.graph.nodes if node.op == "output").args[0]
    return [str(value) for value in (returned if isinstance(returned, tuple) else (returned,))]


def chain(modules: Sequence[nn.Module], *inputs: Tensor) -> Any:
    """What the modules compute one after another."""
    values: Any = inputs
    for module in modules:
        values = module(*values) if isinstance(values, tuple) else module(values)
    return values


def _require_names(network: nn.Module, at: Sequence[str]) -> None:
    known = [name for name, _ in network.named_modules() if name]
    for name in at:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"its children are {', '.join(_children(network))}"
            raise UsageError(f"{type(network).__name__} has no child {name!r} to cut at: {hint}")
    if twice := [name for name in at if at.count(name) > 1]:
        raise UsageError(f"{twice[0]!r} is named twice: name each place to cut at once")
    if not at:
        raise UsageError(
            f"name at least one child to cut {type(network).__name__} at, of {', '.join(_children(network))}"
        )


def _children(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_children()]


def _ancestors(at: Sequence[str]) -> set[str]:
    """Names of the modules whose forward a cut goes through."""
    return {name.rsplit(".", depth)[0] for name in at for depth in range(1, name.count(".") + 1)}


def _starts(graph: fx.Graph, at: Sequence[str]) -> list[fx.Node]:
    """The node that begins each module after the first."""
    nodes = list(graph.nodes)
    starts = []
    for name in at:
        first = next((node for node in nodes if _belongs(node, name)), None)
        if first is None:
            raise UsageError(f"the forward never reaches {name!r}: cut at a child that it calls")
        if all(node.op in ("placeholder", "get_attr") for node in nodes[: nodes.index(first)]):
            raise UsageError(
                f"{name!r} is the first thing that the forward calls, and begins module 1 as it is: leave it out"
            )
        starts.append(first)
    places = [nodes.index(node) for node in starts]
    if places != sorted(set(places)):
        order = [name for _, name in sorted(zip(places, at, strict=True))]
        raise UsageError(f"the forward reaches these children in the order {', '.join(order)}: name them so, each once")
    return starts


def _belongs(node: fx.Node, name: str) -> bool:
    """Whether a node is the call of the module of that name, or inside of it."""
    stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    called = [node.target] if node.op == "call_module" else []
    return any(path == name or str(path).startswith(f"{name}.") for path in [*stack, *called])


def _require_own_weights(modules: Sequence[nn.Module]) -> None:
    """Modules are trained and frozen one by one: none may share a weight with another."""
    owner: dict[int, tuple[int, str]] = {}
    for number, module in enumerate(modules, 1):
        for name, weight in [*module.named_parameters(), *module.named_buffers()]:
            first, known = owner.setdefault(id(weight), (number, name))
            if first != number:
                also = f" (as {known})" if known != name else ""
                raise UsageError(
                    f"{name} is used in module {number} and in module {first}{also}: modules are trained one by one, "
                    "and cannot share a weight. Cut so that both uses lie in one module"
                )


def _require_equal(network: nn.Module, modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> None:
    """For the example, and for a batch of another size."""
    with torch.no_grad(), _evaluating(network, *modules):
        for batch in (inputs, [torch.cat([x, x, x[:1]]) for x in inputs]):
            try:
                found, wanted = chain(modules, *batch), network(*batch)
            except Exception as error:
                reason = str(error).strip().split("\n")[0]
                raise UsageError(
                    f"{type(network).__name__}, cut, fails on a batch of {len(batch[0])}: {reason}. Its forward fixes "
                    "the size of the batch, or takes other inputs than the example"
                ) from error
            if not _same(found, wanted):
                raise UsageError(
                    f"the modules of {type(network).__name__} do not compute what it computes, for a batch of "
                    f"{len(batch[0])}: its forward draws random numbers in evaluation, or fixes the size of the batch"
                )


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Tensor):
        return torch.allclose(found, wanted, rtol=1e-4, atol=1e-6, equal_nan=True)
    if isinstance(wanted, Mapping):
        return all(_same(found[name], value) for name, value in wanted.items())
    return all(_same(one, other) for one, other in zip(found, wanted, strict=True))


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    before = {layer: layer.training for module in modules for layer in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for layer, training in before.items():
            layer.training = training
