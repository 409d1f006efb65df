"""Optimisers: from settings to an object of torch's, the learning rate of each update, and what a checkpoint may hold.

The learning rate is a function of the number of the step alone, so that no checkpoint stores the state of a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from layerwise.errors import RecipeError
from layerwise.settings.optimiser_kinds import KINDS, KindName
from layerwise.settings.training import Optimiser
from layerwise.stopping import signals_wait
from layerwise.training.lars import LARS as LarsOptimiser

NORMS = (
    nn.modules.batchnorm._NormBase,  # those of batches and of instances
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
FUSED = ("Adam", "AdamW", "SGD")
"""Kinds that update all weights in one kernel on a CUDA device, without temporaries."""


def make_optimiser(
    settings: Optimiser, parts: Sequence[nn.Module], device: torch.device, number: int = 1
) -> torch.optim.Optimizer:
    """The optimiser of the parameters of these parts, in their order.

    Args:
        number: of the module that is trained, for the error.

    Raises:
        RecipeError: torch refuses an argument.
    """
    kind = KINDS[settings.kind]
    given: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, **settings.arguments}
    if "beta1" in kind.fields:
        given["betas"] = settings.beta1, settings.beta2
    if "epsilon" in kind.fields:
        given["eps"] = settings.epsilon
    if "momentum" in kind.fields:
        given["momentum"] = settings.momentum
    if settings.kind in FUSED:
        given["fused"] = True if device.type == "cuda" else None
    elif settings.kind != "LARS" and device.type == "cuda":
        given["foreach"] = False  # the default makes temporaries as large as all parameters together
    parameters: list[Any] = [weight for part in parts for weight in part.parameters()]
    if not settings.decay_norms_and_biases:
        spared = list(norms_and_biases(parts))
        known = {id(weight) for weight in spared}
        plain = {"weight_decay": 0.0, **({"adapted": False} if settings.kind == "LARS" else {})}
        groups: list[dict[str, Any]] = [
            {"params": [weight for weight in parameters if id(weight) not in known]},
            {"params": spared, **plain},
        ]
        parameters = [group for group in groups if group["params"]]
    try:
        made: torch.optim.Optimizer = _class(settings.kind)(parameters, **given)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"optimiser of module {number}: torch.optim.{settings.kind} rejects the settings: {error}"
        ) from error
    return made


def _class(kind: KindName) -> Any:
    return LarsOptimiser if kind == "LARS" else getattr(torch.optim, kind)


def norms_and_biases(parts: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    """Parameters of normalisations, biases, and other parameters of fewer than two axes; each once."""
    seen = set()
    for layer in (layer for part in parts for layer in part.modules()):
        for name, weight in layer.named_parameters(recurse=False):
            if id(weight) not in seen and (isinstance(layer, NORMS) or "bias" in name or weight.ndim < 2):
                seen.add(id(weight))
                yield weight


def learning_rate(settings: Optimiser, steps_per_epoch: int, step: int) -> float:
    """The learning rate of the update at `step`, counted from 0 over all epochs.

    Warm-up: (step + 1) / warm-up of the full rate, so that no update is made at rate 0. The cosine goes from the last
    step of the warm-up to its end, and stays there. Steps down are counted from the start.

    Args:
        settings: with the length of its cosine filled in (`Optimiser.lasting`).
    """
    unit = steps_per_epoch if settings.schedule_unit == "epochs" else 1
    warmup = settings.warmup * unit
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = 1.0
    if settings.schedule == "cosine":
        assert settings.cosine_length is not None
        length = settings.cosine_length * unit - warmup
        done = min((step - warmup) / length, 1.0) if length > 0 else 1.0
        share = settings.cosine_end + (1 - settings.cosine_end) * (1 + math.cos(math.pi * done)) / 2
    elif settings.schedule == "step":
        share = settings.step_factor ** (step // (settings.step_every * unit))
    return settings.learning_rate * share


def state_forms(optimiser: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """What the optimiser keeps of each parameter once it has updated it, by the parameter's number in `state_dict`: the
    names, and tensors without memory of the shapes and dtypes.

    Found by a step of the same optimiser on fake parameters, so that nothing about it comes from a file.
    """
    with signals_wait(), FakeTensorMode():
        groups = []
        for group in optimiser.param_groups:
            fakes = [nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype)) for weight in group["params"]]
            for fake in fakes:
                fake.grad = torch.empty_like(fake)
            options = {name: None if name in ("fused", "foreach") else value for name, value in group.items()}
            groups.append({**options, "params": fakes})
        rehearsed = type(optimiser)(groups)  # type: ignore[call-arg]
        rehearsed.step()
        state = rehearsed.state_dict()["state"]
        found = {
            index: {name: (value.shape, value.dtype) for name, value in fields.items() if isinstance(value, Tensor)}
            for index, fields in state.items()
        }
    return {
        index: {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in fields.items()}
        for index, fields in found.items()
    }
