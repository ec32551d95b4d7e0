"""Metrics that pass through a classifier, and the classifier two-sample test.

Class probabilities come from any classifier of the data at hand. With a classifier other than Inception the score of
``inception_score`` is an analogue: its values compare only under that same classifier.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.evaluate.kernel import Estimate
from limbeck.evaluate.rows import as_pair, as_rows, squared_distances


def inception_score(probabilities: Tensor, splits: int = 10) -> Estimate:
    """``exp(E_x KL(p(y|x) || p(y)))`` of class probabilities (N, C): mean and std over ``splits`` consecutive parts.

    Salimans et al. 2016 (arXiv 1606.03498). Between 1 and C. Small parts bias it downward, so compare at equal N and
    ``splits``; rows sorted by class break the parts, shuffle them first.

    Blind to everything that the classifier ignores, to variety within a class (one perfect image per class scores C),
    and to the real data, which it never sees. Raises ValueError unless rows are probabilities that sum to one.
    """
    p = as_rows("probabilities", probabilities)
    if bool((p < 0).any()) or not bool(((p.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError("probabilities must be non-negative rows that sum to 1; apply softmax to logits first")
    if not 1 <= splits <= len(p):
        raise ValueError(f"splits must be between 1 and the number of rows {len(p)}, got {splits}")
    scores = []
    for part in p.tensor_split(splits):
        entropy_of_mean = -torch.xlogy(part.mean(0), part.mean(0)).sum()
        mean_of_entropy = -torch.xlogy(part, part).sum(1).mean()
        scores.append((entropy_of_mean - mean_of_entropy).exp())
    values = torch.stack(scores)
    return Estimate(float(values.mean()), float(values.std(correction=0)))


def class_accuracy(predicted: Tensor, wanted: Tensor) -> float:
    """Share of samples (N,) whose predicted class is the class that was asked for; both integer class numbers (N,).

    Blind to quality and variety within a class, and capped by the classifier's own error. Raises ValueError for scores
    or one-hot rows: reduce them with ``.argmax(1)``.
    """
    _check_classes("predicted", predicted)
    _check_classes("wanted", wanted)
    if predicted.shape != wanted.shape:
        raise ValueError(f"predicted has {len(predicted)} classes but wanted has {len(wanted)}; they must pair up")
    return float((predicted == wanted.to(predicted.device)).double().mean())


@dataclass(frozen=True, eq=False)
class ClassBalance:
    """Share of samples per class (C,) and its total-variation distance, in [0, 1], to the wanted law."""

    shares: Tensor
    distance: float


def class_balance(predicted: Tensor, classes: int, wanted: Tensor | None = None) -> ClassBalance:
    """How the predicted classes (N,) are spread over ``classes`` classes, against ``wanted`` (C,) or the uniform law.

    The distance is half the sum of ``|share - wanted|``: the share of samples that sits in the wrong class. Chance
    alone leaves about sqrt(C / (2 pi N)).

    Blind to quality and to what happens within a class; a classifier that confuses classes shifts it.
    """
    _check_classes("predicted", predicted)
    if classes < 1 or int(predicted.min()) < 0 or int(predicted.max()) >= classes:
        raise ValueError(f"predicted must lie in 0..{classes - 1}, got {int(predicted.min())}..{int(predicted.max())}")
    shares = predicted.bincount(minlength=classes).double() / len(predicted)
    law = torch.full_like(shares, 1 / classes) if wanted is None else wanted.to(shares)
    if law.shape != shares.shape or bool((law < 0).any()) or not abs(float(law.sum()) - 1) < 1e-6:
        raise ValueError(f"wanted must hold {classes} non-negative shares that sum to 1, got {law.tolist()}")
    return ClassBalance(shares, float((shares - law).abs().sum() / 2))


def c2st(a: Tensor, b: Tensor, seed: int = 0, folds: int = 5, neighbours: int = 15) -> float:
    """Classifier two-sample test: cross-validated accuracy of telling rows of a (N, d) from rows of b (M, d).

    0.5 for equal laws, 1 for separable ones (Lopez-Paz & Oquab 2017, arXiv 1610.06545). The classifier is the vote of
    an odd number of nearest neighbours: it needs no training, no tuning and converges to the best classifier in low
    dimension. Columns are first divided by their pooled standard deviation and the larger set is thinned at random to
    the size n of the smaller one, so that chance is 0.5; under equal laws the accuracy scatters by about
    0.5 / sqrt(2 n). Time O(n^2 d).

    Blind in high dimension, where neighbours say little (a shift that the best classifier sees at 0.87 scores 0.67 for
    d = 512, n = 1000): give it features, not pixels. Copies of held-out data pass; copies of rows of a itself push the
    accuracy below 0.5, since a copy's nearest neighbour bears the other label.
    Raises ValueError for too few rows or an even vote.
    """
    a, b = as_pair("a", a, "b", b, least=2)
    count = min(len(a), len(b))
    if not 2 <= folds <= count:
        raise ValueError(f"folds must be between 2 and {count} (the smaller set), got {folds}")
    if neighbours % 2 == 0 or not 1 <= neighbours <= 2 * (count - -(-count // folds)):
        raise ValueError(f"neighbours must be odd and at most the training rows of a fold, got {neighbours}")
    generator = torch.Generator().manual_seed(seed)
    a = a[torch.randperm(len(a), generator=generator)[:count].to(a.device)]
    b = b[torch.randperm(len(b), generator=generator)[:count].to(b.device)]
    rows = torch.cat([a, b])
    spread = rows.std(0)
    rows = (rows - rows.mean(0)) / torch.where(spread > 0, spread, 1.0)
    from_b = torch.arange(2 * count, device=a.device) >= count
    # Fold i holds out the i-th, (i + folds)-th, ... row of both sets: always equally many of either kind.
    fold = torch.arange(count, device=a.device).remainder(folds).repeat(2)
    right = 0
    for held_out in range(folds):
        test, train = fold == held_out, fold != held_out
        train_labels, test_labels = from_b[train].double(), from_b[test]
        for part, block in squared_distances(rows[test], rows[train]):
            votes = train_labels[block.topk(neighbours, largest=False).indices].mean(1)
            right += int(((votes > 0.5) == test_labels[part]).sum())
    return right / (2 * count)


def _check_classes(name: str, classes: Tensor) -> None:
    if classes.ndim != 1 or len(classes) == 0 or classes.is_floating_point() or classes.dtype == torch.bool:
        shape = tuple(classes.shape)
        raise ValueError(f"{name} must hold integer class numbers (N,), got {classes.dtype} {shape}; use .argmax(1)")
