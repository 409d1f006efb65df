"""The loss against an independent, straightforward computation in float64 with the same negatives."""

from __future__ import annotations

import math
import re

import pytest
import torch

from layerwise.errors import RecipeError
from layerwise.objectives.contrast import contrast
from layerwise.objectives.infonce import PatchInfoNCELoss
from layerwise.objectives.objective import Context


def straightforward_loss(z, weights, negatives, skip, generator):
    """Position by position, as the paper writes it: -log exp(z_{t+k}^T W_k z_t) / sum over positive and negatives."""
    batch, _, rows, columns = z.shape
    z = z.double()
    total = 0.0
    for index, weight in enumerate(weights):
        k = index + 1 + skip
        w = weight.double()
        targets = [z[b, :, r + k, s] for b in range(batch) for r in range(rows - k) for s in range(columns)]
        contexts = [z[b, :, r, s] for b in range(batch) for r in range(rows - k) for s in range(columns)]
        drawn = torch.randint(len(targets), (len(targets), negatives), generator=generator).tolist()
        losses = []
        for position, context in enumerate(contexts):
            scores = [float((w @ targets[position]) @ context)] + [
                float((w @ targets[other]) @ context) for other in drawn[position]
            ]
            top = max(scores)
            losses.append(top + math.log(sum(math.exp(score - top) for score in scores)) - scores[0])
        total += sum(losses) / len(losses)
    return total / len(weights)


@pytest.mark.parametrize(
    ("batch", "channels", "negatives", "steps", "skip"), [(2, 8, 16, 5, 1), (1, 3, 4, 3, 1), (3, 4, 2, 2, 0)]
)
def test_equals_an_independent_computation(batch, channels, negatives, steps, skip):
    torch.manual_seed(0)
    z = torch.randn(batch, channels, 7, 7)
    objective = PatchInfoNCELoss(channels, channels, steps, skip, negatives)
    found = objective.loss((z,), Context(torch.Generator().manual_seed(1)))
    weights = [predictor.weight[:, :, 0, 0].detach() for predictor in objective.predictors]
    expected = straightforward_loss(z, weights, negatives, skip, torch.Generator().manual_seed(1))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_both_ways_of_scoring_negatives_agree():
    torch.manual_seed(0)
    context, candidates = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)
    drawn = torch.randint(40, (40, 5))
    gathered = contrast(context, candidates, candidates, drawn)  # 40 candidates > 5 * 6: vectors are gathered
    repeated = drawn.repeat(1, 8)  # 40 <= 40 * 6: all scores are taken
    negatives = (context @ candidates.T).gather(1, drawn)
    own = (context * candidates).sum(1, keepdim=True)
    expected = -torch.log_softmax(torch.cat([own, negatives], 1), 1)[:, 0].mean()
    assert gathered.item() == pytest.approx(expected.item(), rel=1e-12)
    many = torch.cat([own, negatives.repeat(1, 8)], 1)
    assert contrast(context, candidates, candidates, repeated).item() == pytest.approx(
        -torch.log_softmax(many, 1)[:, 0].mean().item(), rel=1e-12
    )


def test_an_untrained_guess_costs_about_log_17():
    """With tiny scores, each of 17 candidates is as likely."""
    objective = PatchInfoNCELoss(4, 4, 5, 1, 16)
    loss = objective.loss((1e-4 * torch.randn(2, 4, 7, 7),), Context(torch.Generator()))
    assert loss.item() == pytest.approx(math.log(17), abs=1e-4)


def test_too_few_rows_is_one_clear_error():
    objective = PatchInfoNCELoss(4, 4, 5, 1, 16)
    with pytest.raises(RecipeError, match=r"skip = 1 .* 4 row.*: choose --set objective.steps=2 or fewer"):
        objective.loss((torch.randn(2, 4, 4, 4),), Context(torch.Generator()))


@pytest.mark.parametrize(
    ("rows", "steps", "skip", "advised"),
    [
        (3, 5, 1, ["steps=1"]),
        (3, 1, 2, ["skip=1"]),
        (2, 1, 1, ["skip=0"]),
        (2, 3, 4, ["skip=0", "steps=1"]),
        (1, 1, 0, []),
    ],
)
def test_the_advised_steps_and_skip_do(rows, steps, skip, advised):
    with pytest.raises(RecipeError) as refused:
        PatchInfoNCELoss(4, 4, steps, skip, 16).loss((torch.randn(2, 4, rows, 4),), Context(torch.Generator()))
    found = re.findall(r"--set objective\.(\w+=\d+)", str(refused.value))
    assert found == advised
    if found:
        settings = {"steps": steps, "skip": skip, **{name: int(value) for name, value in (f.split("=") for f in found)}}
        better = PatchInfoNCELoss(4, 4, settings["steps"], settings["skip"], 16)
        better.loss((torch.randn(2, 4, rows, 4),), Context(torch.Generator()))
