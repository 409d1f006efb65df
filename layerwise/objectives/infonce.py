"""InfoNCE over the rows of a patch grid (paper, section 4.1 and appendix A.1; Oord et al. 2018, Hénaff et al. 2019).

Each patch predicts the patches below it in its column, skipping the first, which it overlaps: for k = 1..K the score
of context c at row r and target z at row r + k + 1 is z^T W_k c. Negatives are drawn with replacement from all targets
of the batch at that k, and may hit the positive. Equal to the published code's loss but for its
`log(softmax + 1e-11)`, here a stable log-softmax.

Letters: B batch, C channels, R rows, S columns, K prediction steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from layerwise.errors import RecipeError
from layerwise.nets.module import Module
from layerwise.objectives.contrast import contrast
from layerwise.objectives.objective import Context, Objective
from layerwise.objectives.settings import ObjectiveSettings
from layerwise.settings.base import MOST_SAMPLES, Shape


class PatchInfoNCE(ObjectiveSettings):
    """Predict the rows below."""

    steps: int = Field(5, ge=1, le=1000, description="K: rows predicted")
    skip: int = Field(1, ge=0, le=1000, description="rows skipped because they overlap the predicting one")
    negatives: int = Field(16, ge=1, le=MOST_SAMPLES, description="samples drawn for each prediction")

    def build(self, module: Module, sample_shape: Shape, classes: Mapping[str, int]) -> Objective:
        return PatchInfoNCELoss(module.target_channels, module.channels, self.steps, self.skip, self.negatives)


class PatchInfoNCELoss(Objective):
    """One W_k for each prediction step: a 1x1 convolution without bias, on the target's side."""

    def __init__(self, target_channels: int, context_channels: int, steps: int, skip: int, negatives: int) -> None:
        super().__init__()
        self.skip, self.negatives = skip, negatives
        self.predictors = nn.ModuleList(
            nn.Conv2d(target_channels, context_channels, 1, bias=False) for _ in range(steps)
        )

    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        """Mean over k; representations are z and c, each (B, C, R, S), or z alone where they are the same."""
        z, c = representations[0], representations[-1]
        rows = z.shape[2]
        if rows <= self.skip + len(self.predictors):
            raise RecipeError(
                f"objective.steps = {len(self.predictors)} with objective.skip = {self.skip} predicts "
                f"{len(self.predictors) + self.skip} rows down, and the patch grid has {rows} row(s): "
                f"{_way_out(rows, len(self.predictors), self.skip)}"
            )
        total = z.new_zeros(())
        for k, predictor in enumerate(self.predictors, start=1 + self.skip):
            targets = predictor(z[:, :, k:]).permute(0, 2, 3, 1).flatten(0, 2)  # (B * (R - k) * S, C)
            contexts = c[:, :, :-k].permute(0, 2, 3, 1).flatten(0, 2)
            drawn = torch.randint(len(targets), (len(targets), self.negatives), generator=context.generator)
            total = total + contrast(contexts, targets, targets, drawn.to(targets.device))
        return total / len(self.predictors)


def _way_out(rows: int, steps: int, skip: int) -> str:
    if rows < 2:
        return "a patch has none below it to predict. Take more patches (a larger dataset.crop)"
    if rows - 1 - skip >= 1:
        return f"choose --set objective.steps={rows - 1 - skip} or fewer, or more patches"
    fewer = f" --set objective.steps={rows - 1}" if steps > rows - 1 else ""
    return f"choose --set objective.skip={max(rows - 1 - steps, 0)}{fewer}, or more patches"
