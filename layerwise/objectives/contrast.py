"""The contrast at the heart of InfoNCE (Oord et al. 2018; paper, equations 1 and 4): find the positive among negatives.

Letters: N positions that predict, K negatives for each, M candidates to draw them from, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.objectives.objective import at_least_float32


def contrast(context: Tensor, positive: Tensor, candidates: Tensor, negatives: Tensor) -> Tensor:
    """Mean of -log softmax of the positive's score among itself and its negatives, in nats.

    Args:
        context: (N, D) what predicts.
        positive: (N, D) what it should recognise.
        candidates: (M, D) where negatives are drawn from.
        negatives: (N, K) integer indices into `candidates`.
    """
    own = (context * positive).sum(1, keepdim=True)
    return surprise(own, _negative_scores(context, candidates, negatives))


def surprise(own: Tensor, others: Tensor) -> Tensor:
    """Mean of -log softmax of the first of each row's scores, in nats: `own` (..., 1) beside `others` (..., K)."""
    return -F.log_softmax(at_least_float32(torch.cat([own, others], -1)), -1)[..., 0].mean()


def _negative_scores(context: Tensor, candidates: Tensor, negatives: Tensor) -> Tensor:
    """(N, K) inner products, by whichever way holds fewer numbers: all (N, M) scores, or the gathered (N, K, D)
    vectors.
    """
    if candidates.shape[0] <= negatives.shape[1] * candidates.shape[1]:
        return (context @ candidates.T).gather(1, negatives)
    return torch.einsum("nd,nkd->nk", context, candidates[negatives])
