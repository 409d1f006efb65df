"""The optimisers that a recipe can name, and the settings that each one uses.

No torch here, so that the fields of a recipe can be listed and checked without it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

KindName = Literal["Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD", "RMSprop", "Adagrad", "Adadelta", "LARS"]
ScheduleName = Literal["constant", "cosine", "step"]
Argument = bool | float


@dataclass(frozen=True)
class Kind:
    """What one optimiser uses, besides the learning rate and weight decay that all of them have."""

    fields: tuple[str, ...] = ()
    """Fields of `Optimiser`."""
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    """Other arguments of the class, as torch names them, with their defaults: what `Optimiser.arguments` may hold."""


_MOMENTS = ("beta1", "beta2", "epsilon")
KINDS: dict[KindName, Kind] = {
    "Adam": Kind(_MOMENTS, {"amsgrad": False}),
    "AdamW": Kind(_MOMENTS, {"amsgrad": False}),
    "Adamax": Kind(_MOMENTS),
    "NAdam": Kind(_MOMENTS, {"momentum_decay": 4e-3, "decoupled_weight_decay": False}),
    "RAdam": Kind(_MOMENTS, {"decoupled_weight_decay": False}),
    "SGD": Kind(("momentum",), {"dampening": 0.0, "nesterov": False}),
    "RMSprop": Kind(("momentum", "epsilon"), {"alpha": 0.99, "centered": False}),
    "Adagrad": Kind(("epsilon",), {"lr_decay": 0.0, "initial_accumulator_value": 0.0}),
    "Adadelta": Kind(("epsilon",), {"rho": 0.9}),
    "LARS": Kind(("momentum",), {"trust": 1e-3}),
}
OF_KINDS = ("beta1", "beta2", "epsilon", "momentum")
"""Fields that only some optimisers use."""
OF_SCHEDULES: dict[str, ScheduleName] = {
    "cosine_length": "cosine",
    "cosine_end": "cosine",
    "step_every": "step",
    "step_factor": "step",
}
"""Fields that one schedule alone uses."""
AS_FIELDS = {"lr": "learning_rate", "betas": "beta1 and beta2", "eps": "epsilon", "weight_decay": "weight_decay"}
"""Arguments in torch's words that are fields of `Optimiser`."""


def as_spelled(name: object) -> object:
    """The name of an optimiser in its own capitals, however it was typed."""
    known = {kind.lower(): kind for kind in get_args(KindName)}
    return known.get(name.lower(), name) if isinstance(name, str) else name


def checked_arguments(kind: KindName, given: Mapping[str, Argument | None]) -> dict[str, Argument]:
    """The arguments that are given (null: not given), of the types that the optimiser takes.

    Raises:
        ValueError: the optimiser has no such argument, or not with this value; one line.
    """
    known = KINDS[kind].arguments
    found: dict[str, Argument] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in known:
            raise ValueError(f"{kind} has no argument {name!r} here: {_hint(kind, name)}")
        flag = isinstance(known[name], bool)
        if flag is not isinstance(value, bool):
            raise ValueError(f"{name} = {value!r}: should be {'true or false' if flag else 'a number'}")
        if not flag and value < 0:
            raise ValueError(f"{name} = {value!r}: should be at least 0; the nearest valid value is 0")
        found[name] = value
    return found


def _hint(kind: KindName, name: str) -> str:
    fields = {**AS_FIELDS, **{field: field for field in KINDS[kind].fields}}
    if name in fields:
        return f"set optimiser.{fields[name]} instead"
    known = KINDS[kind].arguments
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"did you mean {close[0]}?"
    return f"there are {', '.join(known)}" if known else "only the other fields of optimiser can be set"


def unused(name: str, value: Any, kind: KindName) -> str | None:
    """Why a field has no effect with this optimiser; None where it has one."""
    if name in KINDS[kind].fields:
        return None
    users = ", ".join(other for other, uses in KINDS.items() if name in uses.fields)
    return f"{value:g} would have no effect: {kind} has no {name} ({users} do). Leave it out, or set it to null"
