"""Accuracy under a classifier, and the classifier two-sample test."""

import torch
from torch import Tensor

from limbeck.evaluate.rows import as_pair, squared_distances


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
