"""InfoNCE over the frames of a sequence (paper, section 4.2 and appendix A.2; Oord et al. 2018).

Context c at frame t predicts the representations of the frames after it: for k = 1..K the score of c_t and z is z^T
W_k c_t. Of a longer sequence a random window, shared by the batch, gives the contexts and the positives; negatives
come from all of it. Equal to the published code's loss but for its `log(softmax + 1e-11)`, here a stable log-softmax.

Letters: B batch, C channels of z, H channels of c, T frames, W frames of the window, K prediction steps, N negatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import RecipeError
from layerwise.nets.module import Module
from layerwise.objectives.contrast import surprise
from layerwise.objectives.objective import Context, Objective
from layerwise.objectives.settings import ObjectiveSettings
from layerwise.settings.base import MOST_SAMPLES, Shape

Sampling = Literal["others", "shuffled", "sequence"]


class FrameInfoNCE(ObjectiveSettings):
    """Predict the frames to come."""

    steps: int = Field(12, ge=1, le=1000, description="K: frames predicted")
    negatives: int = Field(10, ge=1, le=MOST_SAMPLES, description="N: frames drawn for each prediction")
    window: int = Field(128, ge=2, le=MOST_SAMPLES, description="W: frames that give contexts and positives")
    sampling: Sampling = Field(
        "shuffled",
        description="others: for each k, any frame of the batch but the positive; shuffled: one permutation of all "
        "frames of the batch for each negative, for every k, which may hit the positive; sequence: likewise within it",
    )

    def build(self, module: Module, sample_shape: Shape, classes: Mapping[str, int]) -> Objective:
        return FrameInfoNCELoss(module.target_channels, module.channels, self)


class FrameInfoNCELoss(Objective):
    """All W_k in one linear map without bias, on the context's side."""

    def __init__(self, target_channels: int, context_channels: int, settings: FrameInfoNCE) -> None:
        super().__init__()
        self.settings = settings
        self.predictor = nn.Linear(context_channels, settings.steps * target_channels, bias=False)

    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        """Mean over k; representations are z (B, C, T) and c (B, H, T), or z alone where they are the same."""
        steps, generator = self.settings.steps, context.generator
        z, c = (part.transpose(1, 2) for part in (representations[0], representations[-1]))  # (B, T, C), (B, T, H)
        frames, width = z.shape[1], min(self.settings.window, z.shape[1])
        if width <= steps:
            fewer = f"choose --set objective.steps={width - 1} or fewer, or " if width > 1 else ""
            raise RecipeError(
                f"objective.steps = {steps} predicts {steps} frames ahead, and there are {width} (objective.window = "
                f"{self.settings.window}, sequences of {frames}): {fewer}take a longer dataset.window"
            )
        # Where memory is predicted the draw has no value and reads as 1, which may be past the last start.
        begin = min(int(torch.randint(frames - width + 1, (), generator=generator)), frames - width)
        window = slice(begin, begin + width)
        predicted = self.predictor(c[:, window]).unflatten(2, (steps, -1))  # (B, W, K, C)
        positives, candidates = z[:, window], z.flatten(0, 1)

        shared = None
        if self.settings.sampling != "others":
            drawn = self._shared_negatives(z.shape[0], frames, width, generator)
            vectors = F.embedding(drawn.to(z.device), candidates)  # (B, W, N, C)
            shared = predicted @ vectors.transpose(2, 3)  # (B, W, K, N)
        total = z.new_zeros(())
        for k in range(1, steps + 1):
            guess = predicted[:, :-k, k - 1]  # (B, W - k, C)
            own = (guess * positives[:, k:]).sum(2, keepdim=True)
            if shared is not None:
                others = shared[:, :-k, k - 1]
            else:
                drawn = self._other_negatives(z.shape[0], frames, range(begin + k, begin + width), generator)
                others = torch.einsum("bwc,bwnc->bwn", guess, F.embedding(drawn.to(z.device), candidates))
            total = total + surprise(own, others)
        return total / steps

    def _shared_negatives(self, batch: int, frames: int, width: int, generator: torch.Generator) -> Tensor:
        """(B, W, N) indices into the (B * T) frames of the batch."""
        count = self.settings.negatives
        if self.settings.sampling == "shuffled":
            orders = [torch.randperm(batch * frames, generator=generator)[: batch * width] for _ in range(count)]
            return torch.stack(orders, 1).view(batch, width, count)
        orders = [torch.randperm(frames, generator=generator)[:width] for _ in range(batch * count)]
        within = torch.stack(orders).view(batch, count, width).transpose(1, 2)
        return within + frames * torch.arange(batch).view(-1, 1, 1)

    def _other_negatives(self, batch: int, frames: int, positives: range, generator: torch.Generator) -> Tensor:
        """(B, len(positives), N) indices into the (B * T) frames of the batch, none that of its own positive."""
        own = frames * torch.arange(batch).view(-1, 1, 1) + torch.tensor(positives).view(1, -1, 1)
        offsets = torch.randint(
            1, batch * frames, (batch, len(positives), self.settings.negatives), generator=generator
        )
        return (own + offsets) % (batch * frames)
