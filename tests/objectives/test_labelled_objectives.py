"""Cross-entropy and predsim against computations in NumPy, written from the papers' formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerwise.errors import RecipeError
from layerwise.nets.module import Encoded
from layerwise.objectives.cross_entropy import CrossEntropy, CrossEntropyLoss
from layerwise.objectives.objective import Context
from layerwise.objectives.predsim import PredSimLoss


def encoded(*shape: int, seed: int = 0) -> Encoded:
    c = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return Encoded(c, c, c)


def given(**labels: list[int] | list[list[int]]) -> Context:
    return Context(torch.Generator(), {task: torch.tensor(values) for task, values in labels.items()})


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[label]
    return total / len(labels)


def test_cross_entropy_of_the_average() -> None:
    objective = CrossEntropyLoss(5, "class", 3, pooled=True).double()
    sample = encoded(4, 5, 2, 3)
    loss = objective.loss(objective.represent(sample), given(**{"class": [0, 2, 1, 2]})).item()
    weight, bias = objective.classifier.weight.detach().numpy(), objective.classifier.bias.detach().numpy()
    logits = sample.c.detach().numpy().mean((2, 3)) @ weight.T + bias
    assert loss == pytest.approx(negative_log_likelihood(logits, np.array([0, 2, 1, 2])), abs=1e-12)


def test_cross_entropy_of_each_position() -> None:
    objective = CrossEntropyLoss(5, "phone", 3, pooled=False, hop=80).double()
    sample = encoded(2, 5, 9)  # two frames a label, and one too many in front
    labels = np.array([[0, 1, -100, 2], [1, 1, 0, 2]])  # one is not known
    loss = objective.loss(objective.represent(sample), given(phone=labels.tolist())).item()
    weight, bias = objective.classifier.weight.detach().numpy(), objective.classifier.bias.detach().numpy()
    frames = sample.c.detach().numpy()[:, :, 1:].reshape(2, 5, 4, 2).mean(3).transpose(0, 2, 1).reshape(8, 5)
    known = labels.ravel() >= 0
    expected = negative_log_likelihood(frames[known] @ weight.T + bias, labels.ravel()[known])
    assert loss == pytest.approx(expected, abs=1e-12)


def test_predsim() -> None:
    torch.manual_seed(3)
    objective = PredSimLoss(4, "class", 3, weight=0.99).double()
    torch.nn.init.normal_(objective.classifier.weight)
    sample, labels = encoded(5, 4, 3, 2), np.array([0, 2, 1, 2, 0])
    loss = objective.loss(objective.represent(sample), given(**{"class": labels.tolist()})).item()

    maps, kernel = sample.c.detach().numpy(), objective.convolution.weight.detach().numpy()
    padded = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)))
    convolved = np.zeros_like(maps)
    for row in range(3):
        for column in range(2):
            convolved[:, :, row, column] = np.einsum(
                "bcij,ocij->bo", padded[:, :, row : row + 3, column : column + 3], kernel
            )

    def similarity(rows: np.ndarray) -> np.ndarray:
        return np.clip(np.corrcoef(rows), -1, 1)  # the cosine of centred rows is their correlation

    found = similarity(convolved.reshape(5, 4, 6).std(2, ddof=1))
    wanted = similarity(np.eye(3)[labels])
    logits = maps.mean((2, 3)) @ objective.classifier.weight.detach().numpy().T
    expected = 0.01 * negative_log_likelihood(logits, labels) + 0.99 * ((found - wanted) ** 2).mean()
    assert loss == pytest.approx(expected, abs=1e-9)


def test_predsim_begins_without_an_opinion_on_classes() -> None:
    objective = PredSimLoss(4, "class", 3, weight=0.0)
    sample = Encoded(*(torch.randn(5, 4, 3, 3),) * 3)
    assert objective.loss(objective.represent(sample), given(**{"class": [0, 1, 2, 0, 1]})).item() == pytest.approx(
        np.log(3), abs=1e-6
    )


def test_predsim_survives_a_representation_that_does_not_vary() -> None:
    objective = PredSimLoss(4, "class", 3, weight=0.99)
    c = torch.zeros(5, 4, 3, 3, requires_grad=True)
    objective.loss(objective.represent(Encoded(c, c, c)), given(**{"class": [0, 1, 2, 0, 1]})).backward()
    assert c.grad is not None
    assert torch.isfinite(c.grad).all()


def test_labels_that_are_not_there_are_named() -> None:
    with pytest.raises(RecipeError, match=r"'speaker'.*class"):
        CrossEntropy(task="speaker").build(None, (1, 8, 8), {"class": 10})  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="the dataset has none"):
        CrossEntropy().build(None, (1, 8, 8), {})  # type: ignore[arg-type]


def test_a_batch_without_a_known_label_teaches_nothing() -> None:
    objective = CrossEntropyLoss(4, "phone", 3, pooled=False, hop=160).double()
    loss = objective.loss(objective.represent(encoded(2, 4, 5)), given(phone=[[-100] * 5, [-100] * 5]))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in objective.parameters())


def test_labels_of_frames_are_refused_where_one_a_sample_is_read() -> None:
    frames = given(phone=[[0, 1, 2], [2, 1, 0]])
    pooled = CrossEntropyLoss(4, "phone", 3, pooled=True).double()
    with pytest.raises(RecipeError, match=r"objective\.pooled=false"):
        pooled.loss(pooled.represent(encoded(2, 4, 3)), frames)
    similar = PredSimLoss(4, "phone", 3, 0.99).double()
    with pytest.raises(RecipeError, match="a task of whole samples"):
        similar.loss(similar.represent(encoded(2, 4, 3)), frames)
