"""Bootstrap confidence intervals (Efron 1979) for any statistic of sample rows."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """A statistic on all rows, its confidence interval and its standard error."""

    estimate: float
    low: float
    high: float
    std: float


def bootstrap(
    statistic: Callable[[Tensor], float], samples: Tensor, draws: int = 200, seed: int = 0, level: float = 0.95
) -> Interval:
    """Confidence interval of ``statistic(samples)`` under redrawing the rows of samples (N, ...) with replacement.

    The quantiles of the redrawn statistics are shifted by ``estimate - mean(draws)``. A plain percentile interval would
    count the sampling bias of distances such as FD or MMD twice (a redrawn set has fewer distinct rows) and can even
    exclude the estimate; with the shift the interval is for the expectation of the statistic at this N, bias included.

    Blind to the randomness of everything but these rows (the reference set, training seeds). Not valid for statistics
    that count nearest neighbours or extremes of the redrawn rows, where duplicates are neighbours at distance zero.
    """
    if len(samples) < 2:
        raise ValueError(f"samples needs at least 2 rows, got {len(samples)}")
    if draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    generator = torch.Generator().manual_seed(seed)
    estimate = float(statistic(samples))
    values = torch.empty(draws, dtype=torch.float64)
    for i in range(draws):
        rows = torch.randint(len(samples), (len(samples),), generator=generator)
        values[i] = float(statistic(samples[rows.to(samples.device)]))
    values += estimate - float(values.mean())
    low, high = values.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(estimate, low, high, float(values.std()))
