"""Where batches come from: noise and labels, and data where an objective trains on data.

The source draws the whole *global* batch of a turn from a stream keyed by (seed, step, turn) and then cuts it into
micro-batches, of which each process of several takes its share: any number of either sees the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.device import CPU
from limbeck.distributed import rank_and_world
from limbeck.objective import Batch, Pairs
from limbeck.randomness import stream


@dataclass(frozen=True)
class NoiseSource:
    """z, u, eps and labels of one turn, as `micro_batches` batches.

    Attributes:
        shape: shape of one sample.
        latent_shape: shape of one latent.
        batch: global batch.
        classes: labels are uniform over the classes, as one-hot rows; 0 = no labels.
        contexts: condition rows are uniform in [0, 1)^classes instead.
        unlabelled: share of zero rows ("no label").
        stratified: u is one uniform draw from each of `batch` equal intervals, in random order.
        antithetic: the second half of a batch has the negatives of the first half's z and eps, at equal u and labels.
        device: where batches go; they are drawn on the CPU.
    """

    shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    batch: int
    seed: int
    classes: int = 0
    contexts: bool = False
    unlabelled: float = 0.0
    micro_batches: int = 1
    stratified: bool = False
    antithetic: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    def __call__(self, step: int, turn: int) -> Iterator[Batch]:
        yield from self.cut(self.draw(stream(self.seed, "batch", step, turn)))

    def draw(self, rng: torch.Generator) -> Batch:
        """The global batch from the stream `rng`."""
        n = -(-self.batch // 2) if self.antithetic else self.batch
        z = torch.randn(n, *self.latent_shape, generator=rng, dtype=self.dtype)
        u = torch.rand(n, generator=rng, dtype=self.dtype)
        if self.stratified:
            # (n - 1 + u) / n may round up to 1, which is not in [0, 1)
            below = 1 - torch.finfo(self.dtype).eps / 2
            u = ((torch.randperm(n, generator=rng) + u) / n).clamp(max=below)
        eps = torch.randn(n, *self.shape, generator=rng, dtype=self.dtype)
        coin = torch.rand(n, generator=rng, dtype=self.dtype)
        cond = None
        if self.contexts:
            cond = torch.rand(n, self.classes, generator=rng, dtype=self.dtype)
        elif self.classes:
            labels = torch.randint(self.classes, (n,), generator=rng)
            cond = one_hot(labels, self.classes, self.dtype)
            if self.unlabelled:
                cond = cond * (torch.rand(n, 1, generator=rng, dtype=self.dtype) >= self.unlabelled)
        if self.antithetic:
            z, eps = (torch.cat([t, -t])[: self.batch] for t in (z, eps))
            u, coin = (torch.cat([t, t])[: self.batch] for t in (u, coin))
            cond = None if cond is None else torch.cat([cond, cond])[: self.batch]
        return Batch(z, u, eps, cond, coin=coin)

    def cut(self, batch: Batch) -> Iterator[Batch]:
        """This process's micro-batches of a global batch."""
        (rank, world), parts = rank_and_world(), self.micro_batches
        for rows in torch.arange(len(batch.z)).tensor_split(parts * world)[rank * parts : (rank + 1) * parts]:
            one = slice(int(rows[0]), int(rows[-1]) + 1)
            share = replace(batch.mapped(itemgetter(one)), total=len(batch.z))
            yield share if self.device == CPU else share.to(self.device)


@dataclass(frozen=True)
class DataSource:
    """A `NoiseSource` whose batches carry data drawn with replacement, with the data's own labels."""

    noise: NoiseSource
    x: Tensor
    y: Tensor | None

    def __call__(self, step: int, turn: int) -> Iterator[Batch]:
        rng = stream(self.noise.seed, "batch", step, turn)
        batch = self.noise.draw(rng)
        rows = torch.randint(len(self.x), (self.noise.batch,), generator=rng)
        cond = batch.cond
        if cond is not None and self.y is not None:
            # the zero rows of the draw stay zero: label dropout
            cond = one_hot(self.y[rows], self.noise.classes, self.noise.dtype) * cond.sum(1, keepdim=True)
        batch = replace(batch, real=self.x[rows].to(self.noise.dtype), cond=cond)
        yield from self.noise.cut(batch)


Provider = Callable[[int, torch.Generator, Tensor | None], Tensor]


class Recorded(NamedTuple):
    """Real samples x (N, *shape), and the contexts in which they were drawn (N, classes)."""

    x: Tensor
    contexts: Tensor


@dataclass(frozen=True)
class RealSource:
    """A `NoiseSource` whose batches also carry real samples of the same labels, for critics, or pairs.

    `provider(n, rng, labels)` draws n real samples, (n, *shape), of classes `labels` (n,) if there are any, or in
    contexts `labels` (n, classes). Samples that are `Recorded` bring their contexts, which the batch then has.
    """

    noise: NoiseSource
    provider: Provider | Recorded | None = None
    pairs: Pairs | None = None

    def __call__(self, step: int, turn: int) -> Iterator[Batch]:
        rng = stream(self.noise.seed, "batch", step, turn)
        batch, n = self.noise.draw(rng), self.noise.batch
        if self.provider is not None:
            cond = batch.cond
            if isinstance(self.provider, Recorded):
                rows = torch.randint(len(self.provider.x), (n,), generator=rng)
                if self.noise.antithetic:
                    rows[n - n // 2 :] = rows[: n // 2]
                real, cond = self.provider.x[rows], self.provider.contexts[rows].to(self.noise.dtype)
            else:
                real = self.provider(n, rng, cond if cond is None or self.noise.contexts else cond.argmax(1))
            direction = torch.randn(n, *self.noise.shape, generator=rng, dtype=self.noise.dtype)
            batch = replace(batch, real=real.to(self.noise.dtype), direction=direction, cond=cond)
        if self.pairs is not None:
            batch = replace(batch, pairs=self.pairs.rows(torch.randint(len(self.pairs.z), (n,), generator=rng)))
        yield from self.noise.cut(batch)


def provider_of(x: Tensor, y: Tensor | None) -> Provider:
    """Rows of a data set, of the wanted classes where both have labels."""
    rows = {} if y is None else {int(k): torch.nonzero(y == k)[:, 0] for k in y.unique()}

    def provide(n: int, rng: torch.Generator, labels: Tensor | None) -> Tensor:
        if labels is None or not rows:
            return x[torch.randint(len(x), (n,), generator=rng)]
        spin = torch.rand(n, generator=rng, dtype=torch.float64)
        picks = [rows[int(k)][int(u * len(rows[int(k)]))] for k, u in zip(labels, spin, strict=True)]
        return x[torch.stack(picks)]

    return provide


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class numbers (B,) to condition rows (B, classes)."""
    return torch.nn.functional.one_hot(labels, classes).to(dtype)


def in_parts(source: Any, parts: int) -> Any:
    """The same source with so many micro-batches."""
    if isinstance(source, NoiseSource):
        return replace(source, micro_batches=parts)
    return replace(source, noise=replace(source.noise, micro_batches=parts))
