"""Optimisers as they are named in Python: `AdamW(lr=1e-3)`, a class of torch.optim, or one with its arguments."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, get_args

import torch
from pydantic import ValidationError

from layerwise.errors import RecipeError, UsageError
from layerwise.recipe.overrides import explain
from layerwise.settings.optimiser_kinds import KINDS, Argument, KindName
from layerwise.settings.training import Optimiser

GivenOptimiser = Optimiser | type[torch.optim.Optimizer] | partial[torch.optim.Optimizer]


def optimiser_of(given: GivenOptimiser) -> Optimiser:
    """Settings from what `layerwise.train` takes: settings, a class of `torch.optim`, or a `functools.partial` of one
    with its arguments. What is not given is as torch has it for that class.

    Raises:
        UsageError: it is none of these.
        RecipeError: a value that the optimiser cannot have.
    """
    if isinstance(given, Optimiser):
        return given
    kind, named = (given.func, given.keywords) if isinstance(given, partial) else (given, {})
    name = getattr(kind, "__name__", "")
    if not isinstance(kind, type) or name not in KINDS or getattr(torch.optim, name, kind) is not kind:
        what = "an optimiser of other parameters" if isinstance(kind, torch.optim.Optimizer) else repr(given)
        known = ", ".join(get_args(KindName))
        raise UsageError(
            f"optimiser={what}: copies of the modules are trained, each by an optimiser of its own. Give settings such "
            f"as layerwise.AdamW(lr=1e-3), or functools.partial(torch.optim.RMSprop, lr=1e-3); there are {known}"
        )
    if isinstance(given, partial) and given.args:
        raise UsageError("optimiser=partial(…): give its arguments by name, as in partial(torch.optim.SGD, lr=0.1)")
    usual = {
        argument: one.default
        for argument, one in inspect.signature(kind).parameters.items()
        if argument in ("lr", "betas", "eps", "momentum", "weight_decay")
    }
    return named_optimiser(name, **{**usual, **named})


def named_optimiser(
    kind: KindName,
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    **options: Any,
) -> Optimiser:
    """Settings of the optimiser `kind`, in torch's words.

    Args:
        lr: the learning rate, no unit.
        options: other fields of `layerwise.recipe.Optimiser` (weight_decay, momentum, schedule="cosine", warmup=5,
            clip_norm=1.0, decay_norms_and_biases=False, …) and arguments of the class (nesterov=True, amsgrad=True, …).

    Raises:
        RecipeError: a value that the optimiser cannot have; one line.
    """
    if betas is not None:
        options["beta1"], options["beta2"] = betas
    if eps is not None:
        options["epsilon"] = eps
    fields = {name: value for name, value in options.items() if name in Optimiser.model_fields}
    arguments: dict[str, Argument] = {name: value for name, value in options.items() if name not in fields}
    if arguments:
        fields["arguments"] = arguments
    try:
        return Optimiser.model_validate({"kind": kind, "learning_rate": lr, **fields})
    except ValidationError as error:
        raise RecipeError(explain(error, "optimiser.")) from error


def Adam(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    **options: Any,
) -> Optimiser:
    """Adam (Kingma & Ba 2014), as torch.optim has it; `options` as in `named_optimiser`: schedule, clip_norm, …"""
    return named_optimiser("Adam", lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)


def AdamW(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    **options: Any,
) -> Optimiser:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), as torch.optim has it; `options` as in
    `named_optimiser`: schedule, clip_norm, …
    """
    return named_optimiser("AdamW", lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)


def SGD(lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0, **options: Any) -> Optimiser:
    """Stochastic gradient descent, as torch.optim has it; `options` as in `named_optimiser`: nesterov=True, …"""
    return named_optimiser("SGD", lr, momentum=momentum, weight_decay=weight_decay, **options)


def LARS(
    lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 1e-3, **options: Any
) -> Optimiser:
    """LARS (You et al. 2017): momentum descent with a learning rate for each weight tensor, for large batches; see
    `layerwise.training.lars`. `options` as in `named_optimiser`: schedule="cosine", warmup=10, …
    """
    return named_optimiser("LARS", lr, momentum=momentum, weight_decay=weight_decay, trust=trust, **options)
