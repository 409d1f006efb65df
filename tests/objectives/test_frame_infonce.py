"""The loss over frames against an independent computation in float64, term by term, with the same negatives."""

from __future__ import annotations

import math

import pytest
import torch

from layerwise.errors import RecipeError
from layerwise.objectives.frame_infonce import FrameInfoNCE, FrameInfoNCELoss
from layerwise.objectives.objective import Context

SAMPLINGS = ("others", "shuffled", "sequence")


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def straightforward_loss(z, c, weight, settings, draws):
    """Term by term as the paper writes it: z (B, C, T), c (B, H, T), weight (K * C, H)."""
    batch, channels, frames = z.shape
    z, c = z.double(), c.double()
    maps = weight.double().reshape(settings.steps, channels, -1)
    width = min(settings.window, frames)
    begin = int(torch.randint(frames - width + 1, (), generator=draws))

    drawn = {}  # (sequence, place in the window) -> negatives (sequence, frame), where they are the same for all k
    if settings.sampling == "shuffled":
        orders = [torch.randperm(batch * frames, generator=draws).tolist() for _ in range(settings.negatives)]
        for b in range(batch):
            for w in range(width):
                drawn[b, w] = [divmod(order[b * width + w], frames) for order in orders]
    if settings.sampling == "sequence":
        for b in range(batch):
            orders = [torch.randperm(frames, generator=draws).tolist() for _ in range(settings.negatives)]
            for w in range(width):
                drawn[b, w] = [(b, order[w]) for order in orders]

    total = 0.0
    for k in range(1, settings.steps + 1):
        terms = []
        if settings.sampling == "others":
            shape = (batch, width - k, settings.negatives)
            offsets = torch.randint(1, batch * frames, shape, generator=draws).tolist()
        for b in range(batch):
            for w in range(width - k):
                guess = maps[k - 1] @ c[b, :, begin + w]
                positive = b * frames + begin + w + k
                if settings.sampling == "others":
                    chosen = [divmod((positive + offset) % (batch * frames), frames) for offset in offsets[b][w]]
                    assert divmod(positive, frames) not in chosen
                else:
                    chosen = drawn[b, w]
                scores = [float(z[b, :, begin + w + k] @ guess)] + [float(z[i, :, t] @ guess) for i, t in chosen]
                top = max(scores)
                terms.append(top + math.log(sum(math.exp(score - top) for score in scores)) - scores[0])
        total += sum(terms) / len(terms)
    return total / settings.steps


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    ("batch", "frames", "window", "steps", "contexts"), [(3, 20, 128, 12, None), (2, 40, 15, 4, 5), (1, 9, 9, 3, 7)]
)
def test_equals_an_independent_computation(sampling, batch, frames, window, steps, contexts):
    torch.manual_seed(0)
    z = torch.randn(batch, 6, frames).relu()
    c = z if contexts is None else torch.randn(batch, contexts, frames)
    settings = FrameInfoNCE(steps=steps, window=window, negatives=10, sampling=sampling)
    objective = FrameInfoNCELoss(6, c.shape[1], settings)
    found = objective.loss((z,) if c is z else (z, c), Context(generator()))
    expected = straightforward_loss(z, c, objective.predictor.weight.detach(), settings, generator())
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_negatives_within_the_sequence_stay_there_and_differ_from_those_of_the_batch():
    settings = FrameInfoNCE(sampling="sequence", negatives=7)
    drawn = FrameInfoNCELoss(2, 2, settings)._shared_negatives(4, 30, 20, generator())
    assert drawn.shape == (4, 20, 7)
    assert (drawn // 30 == torch.arange(4).view(-1, 1, 1)).all()
    everywhere = FrameInfoNCELoss(2, 2, FrameInfoNCE(negatives=7))._shared_negatives(4, 30, 20, generator())
    assert all(len(set(part.tolist())) == 80 for part in everywhere.flatten(0, 1).T)  # a permutation for each
    assert (everywhere // 30 != torch.arange(4).view(-1, 1, 1)).any()


def test_other_negatives_never_hit_the_positive():
    objective = FrameInfoNCELoss(2, 2, FrameInfoNCE(sampling="others", negatives=500))
    drawn = objective._other_negatives(2, 5, range(1, 5), generator())
    own = torch.arange(2).view(-1, 1, 1) * 5 + torch.arange(1, 5).view(1, -1, 1)
    assert not (drawn == own).any()
    for row, positive in zip(drawn.flatten(0, 1), own.flatten(), strict=True):
        assert set(row.tolist()) == set(range(10)) - {int(positive)}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_window_moves_and_is_shared_by_the_batch(sampling):
    """Only frames of the window carry contexts: the gradient on c is zero elsewhere, at the same frames of all."""
    objective = FrameInfoNCELoss(3, 4, FrameInfoNCE(steps=2, window=6, sampling=sampling))
    begins = set()
    for seed in range(8):
        z, c = torch.randn(2, 3, 30), torch.randn(2, 4, 30, requires_grad=True)
        objective.loss((z, c), Context(generator(seed))).backward()
        used = [part.abs().sum(0).nonzero().flatten().tolist() for part in c.grad]
        assert used[0] == used[1] == list(range(used[0][0], used[0][0] + 5))
        begins.add(used[0][0])
    assert len(begins) > 3


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_an_untrained_guess_costs_about_log_11(sampling):
    objective = FrameInfoNCELoss(4, 4, FrameInfoNCE(sampling=sampling))
    loss = objective.loss((1e-4 * torch.randn(2, 4, 200),), Context(generator()))
    assert loss.item() == pytest.approx(math.log(11), abs=1e-4)


def test_too_few_frames_is_one_clear_error():
    objective = FrameInfoNCELoss(4, 4, FrameInfoNCE())
    with pytest.raises(
        RecipeError, match=r"steps = 12 predicts 12 frames ahead, and there are 9 .* --set objective\.steps=8 or fewer"
    ):
        objective.loss((torch.randn(2, 4, 9),), Context(generator()))
