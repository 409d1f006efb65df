"""The forward of a network as a graph (torch.fx), followed only as deep as asked.

With example inputs the trace runs along on tensors without memory (device `meta`), so that a forward may branch on
shapes.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import _assert_is_none
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute

from layerwise.errors import UsageError

CONSTANT = "constant"
"""Under this name, in the meta of a node that reads a tensor which the network does not hold: that tensor."""


class _Tracer(fx.Tracer):
    """Follows the forward of the root and of the `opened` modules; every other module is one node."""

    def __init__(self, opened: set[str]) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


class _ShapeTracer(_Tracer):
    """The same, with a tensor without memory behind each proxy, so that a forward may ask for shapes."""

    def __init__(self, opened: set[str], inputs: Sequence[Tensor]) -> None:
        super().__init__(opened)
        self._inputs: Iterator[Tensor] = iter(inputs)
        self._computing = False

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        assert isinstance(proxy, _ShapeProxy)
        proxy.value = self._compute(kind, target, *map_aggregate((args, kwargs), _value_of))
        proxy.node.meta["tensor"] = isinstance(proxy.value, Tensor)
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ShapeProxy(node, self)

    def _compute(self, kind: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        args, kwargs = map_aggregate((args, kwargs), lambda x: x.to("meta") if isinstance(x, Tensor) else x)
        self._computing = True
        try:
            with torch.device("meta"):
                return self._carry_out(kind, target, args, kwargs)
        finally:
            self._computing = False

    def _carry_out(self, kind: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if kind == "placeholder":
            return next(self._inputs, None)
        if kind == "get_attr":
            found: Any = self.root
            for part in target.split("."):
                found = getattr(found, part)
            return found.to("meta") if isinstance(found, Tensor) else found
        if kind == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs) if kind == "call_function" else None

    # While a value is computed, torch.fx's patches of module calls and attributes have to stand aside.

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._computing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(_value_of(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([operator.getitem(obj, index) for index in range(len(_value_of(obj)))])


class _ShapeProxy(fx.Proxy):
    """Stands for a value in the trace, and knows what it looks like for the example."""

    value: Any = None

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__.get("value")
        found = getattr(value, name)
        if callable(found):
            return Attribute(self, name)
        if isinstance(found, bool | int):
            return found  # such as ndim; sizes come as a proxy of `shape`
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        return len(self.value)

    def __index__(self) -> int:
        return int(self.value)

    def __int__(self) -> int:
        return int(self.value)


def _value_of(argument: Any) -> Any:
    return argument.value if isinstance(argument, _ShapeProxy) else argument


def trace(network: nn.Module, opened: set[str], inputs: Sequence[Tensor] | None) -> fx.Graph:
    """The forward as a graph, the same in training and in evaluation."""
    found = []
    for training in (True, False):
        shadow = without_memory(network).train(training)
        tracer = _Tracer(opened) if inputs is None else _ShapeTracer(opened, [x.to("meta") for x in inputs])
        try:
            with torch.no_grad():
                graph = tracer.trace(shadow, concrete_args=_defaults(network, inputs))
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            hint = (
                "Pass example=, an input of the network, so that it may branch on shapes; or cut it by hand into a list"
                if inputs is None
                else "Cut it by hand into a list"
            )
            raise UsageError(
                f"the forward of {type(network).__name__} cannot be followed: {reason}. {hint} of modules that each "
                "read what the one before gives"
            ) from error
        _tidy(graph)
        for node in graph.find_nodes(op="get_attr"):
            if not hasattr(network, node.target.split(".")[0]):  # a tensor that the forward makes from nothing
                node.meta[CONSTANT] = getattr(shadow, node.target)
        found.append(graph)
    lines = (graph.python_code("self").src.split("\n") for graph in found)
    for in_training, in_evaluation in zip_longest(*lines, fillvalue="nothing"):
        if in_training != in_evaluation:
            raise UsageError(
                f"the forward of {type(network).__name__} differs between training and evaluation "
                f"({in_training.strip()!r} against {in_evaluation.strip()!r}), and a cut through it would keep only "
                "one of them. Use modules that tell the two apart (nn.Dropout instead of F.dropout), or cut elsewhere"
            )
    return found[0]


def without_memory(network: nn.Module) -> nn.Module:
    """A copy on the device `meta`: tracing neither computes anything nor changes any state."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in network.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in network.buffers()}
    return copy.deepcopy(network, memo)


def _defaults(network: nn.Module, inputs: Sequence[Tensor] | None) -> dict[str, Any]:
    """The arguments of the forward that are left at their defaults."""
    parameters = [p for p in inspect.signature(network.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    given = len(inputs) if inputs is not None else sum(p.default is p.empty for p in parameters)
    return {p.name: p.default for p in parameters[given:] if p.default is not p.empty}


def _tidy(graph: fx.Graph) -> None:
    """Without what tracing left behind for arguments at their defaults, and what was only asked for (a size, a flag).

    Calls of modules stay, used or not: they may count batches.
    """
    for node in reversed(graph.nodes):
        asserted = node.op == "call_function" and node.target in (_assert_is_none, torch._assert)
        asked = node.op in ("placeholder", "get_attr", "call_function", "call_method") and not node.users
        if node.target is _assert_is_none or (asked and not asserted):
            graph.erase_node(node)
