"""Supervised classification from one module: average over the positions, one linear layer, cross-entropy.

With one module for the whole network this is the ordinary end-to-end training; with a module a loss it is greedy
supervised training (Belilovsky et al. 2019, "Greedy Layerwise Learning Can Scale to ImageNet"; paper, sections 4.1
and 4.2).

Letters: B batch, C channels, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import RecipeError
from layerwise.nets.module import Encoded, Module
from layerwise.nets.speech import at_labels
from layerwise.objectives.objective import Context, Objective, at_least_float32
from layerwise.objectives.settings import ObjectiveSettings
from layerwise.settings.base import Shape


class CrossEntropy(ObjectiveSettings):
    """Learn the labels of one task."""

    task: str | None = Field(None, description="task whose labels to learn; null: the dataset's first")
    pooled: bool = Field(
        True, description="classify the mean over positions; false: each position, by its own label if it has one"
    )

    def build(self, module: Module, sample_shape: Shape, classes: Mapping[str, int]) -> Objective:
        task = choose_task(self.task, classes)
        return CrossEntropyLoss(module.channels, task, classes[task], self.pooled, module.hop)


def choose_task(task: str | None, classes: Mapping[str, int]) -> str:
    """The named task, or the first.

    Raises:
        RecipeError: the dataset has no such labels.
    """
    if not classes:
        raise RecipeError("this objective learns from labels, and the dataset has none")
    chosen = next(iter(classes)) if task is None else task
    if chosen not in classes:
        raise RecipeError(f"objective.task = {chosen!r}: the dataset has labels for {', '.join(classes)}")
    return chosen


UNKNOWN = nn.CrossEntropyLoss().ignore_index  # what the data marks labels with that nobody knows


class CrossEntropyLoss(Objective):
    def __init__(self, channels: int, task: str, classes: int, pooled: bool, hop: int | None = None) -> None:
        super().__init__()
        self.task, self.pooled, self.hop = task, pooled, hop
        self.classifier = nn.Linear(channels, classes)

    def represent(self, encoded: Encoded) -> tuple[Tensor, ...]:
        """(B, C) mean over the positions, or (B, C, P)."""
        c = encoded.c.flatten(2)
        return (c.mean(2) if self.pooled else c,)

    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        """Labels are (B,), or (B, L) for frames, of which there may be several a label; unknown ones do not count."""
        labels = context.labels[self.task]
        read = representations[0]
        if self.pooled:
            require_one_label(self.task, labels, "set objective.pooled=false to learn from each frame")
        else:
            if labels.dim() == 1:  # one label a sample is each position's
                labels = labels.unsqueeze(1).expand(-1, read.shape[2])
            else:
                read = at_labels(read, self.hop, labels.shape[1])
            read = read.transpose(1, 2)
        logits = at_least_float32(self.classifier(read).flatten(0, -2))
        wanted = labels.flatten()
        known = (wanted != UNKNOWN).sum().clamp_min(1)  # a batch in which nothing is labelled teaches nothing
        return F.cross_entropy(logits, wanted, ignore_index=UNKNOWN, reduction="sum") / known


def require_one_label(task: str, labels: Tensor, instead: str) -> None:
    """
    Raises:
        RecipeError: the task has a label for each frame.
    """
    if labels.dim() != 1:
        raise RecipeError(
            f"objective.task = {task!r} has a label for each frame, and this objective reads one a sample: {instead}"
        )
