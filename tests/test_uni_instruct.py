"""Divergences and Uni-Instruct's three terms against quadrature in float64.

The references rebuild everything from log densities: a live law, whose parameters are differentiated through the
density, both scores and the ratio. The losses under test see what a training run shows them: samples that carry the
gradient, and a student, a teacher and a ratio frozen in their parameters.

The laws are such that q^2 / p and p^2 / q are integrable at every level used, so that Pearson's and Neyman's
divergences are finite together with the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.divergence import DIVERGENCES
from limbeck.exact import Mixture
from limbeck.methods.diff_instruct import diff_instruct_loss
from limbeck.methods.sid import sid_loss
from limbeck.methods.sim import sim_loss
from limbeck.methods.uni_instruct import uni_instruct_loss

Function = Callable[[Tensor], Tensor]


class Row(NamedTuple):
    """A row of the printed table: f, and the coefficients of the gradient of E_p[h |delta|^2].

    They are 2 h on (s_q - s_p) . (s_p - conditional score), h - r h' on |delta|^2 and r^2 h'' on |delta|^2 delta . dx.
    """

    f: Function
    score: Function
    path: Function
    pull: Function


def zero(r: Tensor) -> Tensor:
    return 0 * r


TABLE = {
    "reverse_kl": Row(lambda r: -torch.log(r), lambda r: 2 + 0 * r, lambda r: 1 + 0 * r, zero),
    "forward_kl": Row(lambda r: r * torch.log(r), lambda r: 2 * r, zero, zero),
    "jeffreys": Row(lambda r: (r - 1) * torch.log(r), lambda r: 2 * (1 + r), lambda r: 1 + 0 * r, zero),
    "jensen_shannon": Row(
        lambda r: r * torch.log(r) - (r + 1) * torch.log((r + 1) / 2),
        lambda r: 2 * r / (1 + r),
        lambda r: r**2 / (1 + r) ** 2,
        lambda r: -2 * r**2 / (1 + r) ** 3,
    ),
    "hellinger": Row(
        lambda r: (torch.sqrt(r) - 1) ** 2, torch.sqrt, lambda r: torch.sqrt(r) / 4, lambda r: -torch.sqrt(r) / 8
    ),
    "pearson": Row(lambda r: (r - 1) ** 2, lambda r: 4 * r**2, lambda r: -2 * r**2, lambda r: 4 * r**2),
    "neyman": Row(lambda r: (1 - r) ** 2 / r, lambda r: 4 / r, lambda r: 4 / r, lambda r: 4 / r),
    "softened_reverse_kl": Row(
        lambda r: (1 + r) * (torch.log((1 + r) / r) - math.log(2)),
        lambda r: 2 / (1 + r),
        lambda r: (1 + 2 * r) / (1 + r) ** 2,
        lambda r: 2 * r**2 / (1 + r) ** 3,
    ),
}
HAS_PATH = set(TABLE) - {"forward_kl"}
HAS_PULL = set(TABLE) - {"reverse_kl", "forward_kl", "jeffreys"}
every_divergence = pytest.mark.parametrize("name", TABLE)


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gap(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|."""
    return float((value - truth).norm() / truth.norm())


# Table ----------------------------------------------------------------------------------------------------------------


def derivative(value: Tensor, r: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(value.sum(), r, create_graph=True)
    return slope


R = torch.logspace(-1, 1, 101, dtype=torch.float64)


def test_table_is_complete() -> None:
    assert list(DIVERGENCES) == list(TABLE)


@every_divergence
def test_generator_vanishes_at_one_and_is_the_printed_one(name: str) -> None:
    assert abs(float(DIVERGENCES[name].f(f64(1.0)))) <= 1e-15
    torch.testing.assert_close(DIVERGENCES[name].f(R), TABLE[name].f(R), rtol=1e-12, atol=1e-14)


@every_divergence
def test_weights_are_the_derivatives_of_the_generator(name: str) -> None:
    """h = r^2 f'', r h' and r^2 h'' by nested autograd from the library's own f."""
    d, r = DIVERGENCES[name], R.clone().requires_grad_()
    h = r**2 * derivative(derivative(d.f(r), r), r)
    first = derivative(h, r)
    assert (d.h(R) > 0).all()
    for mine, theirs in ((h, d.h), (r * first, d.h1), (r**2 * derivative(first, r), d.h2)):
        # atol is for derivatives that vanish
        torch.testing.assert_close(theirs(R), mine.detach(), rtol=1e-10, atol=1e-13)


@every_divergence
def test_weights_agree_under_autograd(name: str) -> None:
    """What back-propagation makes of h, as the score term uses it, is h1 and h2."""
    d, r = DIVERGENCES[name], R.clone().requires_grad_()
    first = derivative(d.h(r) + 0 * r, r)
    torch.testing.assert_close((r * first).detach(), d.h1(R), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close((r**2 * derivative(first + 0 * r**2, r)).detach(), d.h2(R), rtol=1e-12, atol=1e-13)


@every_divergence
def test_printed_coefficients(name: str) -> None:
    d, row = DIVERGENCES[name], TABLE[name]
    for mine, theirs in ((row.score(R), 2 * d.h(R)), (row.path(R), d.h(R) - d.h1(R)), (row.pull(R), d.h2(R))):
        torch.testing.assert_close(theirs, mine, rtol=1e-13, atol=1e-13)
    assert (name in HAS_PATH) == bool((row.path(R) != 0).any())
    assert (name in HAS_PULL) == bool((row.pull(R) != 0).any())


# Laws and quadrature --------------------------------------------------------------------------------------------------


class Law(NamedTuple):
    """sum_k weights_k N(means_k, stds_k^2 I); means (K, d). Everything may carry a graph."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Of the law noised to sigma (B,), at x (B, d): (B,)."""
        variance = self.stds**2 + sigma[:, None] ** 2
        squares = ((x[:, None] - self.means) ** 2).sum(-1)
        log_normal = -squares / (2 * variance) - x.shape[1] / 2 * torch.log(2 * math.pi * variance)
        return torch.logsumexp(torch.log(self.weights) + log_normal, 1)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad log density (B, d), with a graph: through x it is a sum of pulls to the means, by posterior weight."""
        variance = self.stds**2 + sigma[:, None] ** 2
        offsets = self.means - x[:, None]
        logits = torch.log(self.weights) - (offsets**2).sum(-1) / (2 * variance) - x.shape[1] / 2 * torch.log(variance)
        return ((torch.softmax(logits, 1) / variance)[..., None] * offsets).sum(1)

    def frozen(self) -> Mixture:
        return Mixture(self.weights, self.means.detach(), self.stds.detach())


def trapezoid(half_width: float, n: int, d: int = 1) -> tuple[Tensor, Tensor]:
    """Nodes (n^d, d) and weights (n^d,) on a cube. Exponentially accurate for analytic functions that decay."""
    line = torch.linspace(-half_width, half_width, n, dtype=torch.float64)
    nodes = torch.cartesian_prod(*[line] * d).reshape(-1, d)
    return nodes, torch.full((len(nodes),), (2 * half_width / (n - 1)) ** d, dtype=torch.float64)


def legendre(low: float, high: float, n: int) -> tuple[Tensor, Tensor]:
    """Levels sigma and weights with sum w g(sigma) = int g d(sigma^2), Gauss-Legendre in log sigma."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(n))
    half = math.log(high / low) / 2
    sigma = torch.exp(math.log(low * high) / 2 + half * nodes)
    return sigma, 2 * sigma**2 * half * weights


class Points(NamedTuple):
    """What a training step shows a loss, and each row's weight in the expectation over z and eps."""

    x: Tensor
    noisy: Tensor
    sigma: Tensor
    fake: Tensor
    real: Tensor
    ratio: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Setting:
    """A generator x = means_k + stds_k z with probability weights_k, at one or more noise levels, against a teacher."""

    teacher: Law
    weights: Tensor
    means: Tensor
    log_stds: Tensor
    levels: Tensor
    nodes: int  # per direction

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.means, self.log_stds

    @property
    def student(self) -> Law:
        return Law(self.weights, self.means, self.log_stds.exp())

    @cached_property
    def points(self) -> Points:
        """Quadrature over z and eps in their rotation to (a, b): noisy depends on a alone, everything is polynomial of
        degree 2 at most in b, for which two Gauss-Hermite nodes are exact."""
        d = self.means.shape[1]
        line, da = trapezoid(12.0, self.nodes, d)
        density = torch.exp(-(line**2).sum(1) / 2) / (2 * math.pi) ** (d / 2)
        signs = torch.cartesian_prod(*[f64([-1.0, 1.0])] * d).reshape(-1, d)
        a, b = line.repeat_interleave(len(signs), 0), signs.repeat(len(line), 1)
        ab_weight = (da * density / len(signs)).repeat_interleave(len(signs))
        xs, noisies, sigmas, weights = [], [], [], []
        for level in self.levels:
            for w, m, log_std in zip(self.weights, self.means, self.log_stds, strict=True):
                s = log_std.exp().detach()
                root = torch.sqrt(s**2 + level**2)
                z, eps = (s * a + level * b) / root, (level * a - s * b) / root
                xs.append(m + log_std.exp() * z)
                noisies.append(xs[-1] + level * eps)
                sigmas.append(level.expand(len(a)))
                weights.append(w * ab_weight)
        x, noisy, sigma, weight = (torch.cat(v) for v in (xs, noisies, sigmas, weights))
        student, teacher = self.student.frozen(), self.teacher.frozen()
        ratio = torch.exp(teacher.log_prob(noisy, sigma) - student.log_prob(noisy, sigma))
        return Points(x, noisy, sigma, student(noisy, sigma), teacher(noisy, sigma), ratio, weight)

    def gradient(self, loss: Tensor) -> Tensor:
        """Of the expectation of a loss given at `points`, in the generator's parameters."""
        grads = torch.autograd.grad((self.points.weight * loss).sum(), self.parameters, retain_graph=True)
        return torch.cat([g.reshape(-1) for g in grads])

    def exact_gradient(self, integrand: Callable[[Tensor, Tensor, Tensor], Tensor], level: Tensor) -> Tensor:
        """Of int integrand(log q, log p, |s_p - s_q|^2) dx at one level, everything live, on a grid fixed in space."""
        d = self.means.shape[1]
        student = self.student
        widest = max(law.stds.detach().max().item() for law in (self.teacher, student))
        furthest = max(law.means.detach().abs().max().item() for law in (self.teacher, student))
        x, dx = trapezoid(furthest + 12 * math.hypot(widest, float(level)), 2 * self.nodes, d)
        sigma = level.expand(len(x))
        log_q, log_p = self.teacher.log_density(x, sigma), student.log_density(x, sigma)
        delta = student.score(x, sigma) - self.teacher.score(x, sigma)
        value = (dx * integrand(log_q, log_p, (delta**2).sum(1))).sum()
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, self.parameters)])


TEACHER = Law(f64([0.35, 0.65]), f64([[-1.0], [1.2]]), f64([0.5, 0.6]))
TEACHER_2D = Law(f64([0.35, 0.65]), f64([[-0.7, 0.4], [0.8, -0.1]]), f64([0.5, 0.6]))
STUDENTS = {
    "gaussian": (TEACHER, f64([1.0]), f64([[0.3]]), f64([0.65])),
    "mixture": (TEACHER, f64([0.6, 0.4]), f64([[-0.7], [1.6]]), f64([0.55, 0.62])),
    "plane": (TEACHER_2D, f64([0.6, 0.4]), f64([[-0.5, -0.3], [0.9, 0.6]]), f64([0.55, 0.62])),
}


@cache
def setting(student: str, *levels: float) -> Setting:
    teacher, weights, means, stds = STUDENTS[student]
    nodes = 120 if student == "plane" else 240
    return Setting(teacher, weights, means.clone().requires_grad_(), stds.log().requires_grad_(), f64(levels), nodes)


every_student = pytest.mark.parametrize("student", STUDENTS)
every_line = pytest.mark.parametrize("student", ["gaussian", "mixture"])
two_levels = pytest.mark.parametrize("level", [0.5, 1.5])


def uni_instruct(p: Points, name: str, ratio: Tensor | None) -> Tensor:
    return uni_instruct_loss(p.x, p.noisy, p.sigma, p.fake, p.real, ratio, name)


def f_distill(p: Points, name: str) -> Tensor:
    """Its gradient is E_p[h (s_p - s_q) dx]."""
    return diff_instruct_loss(p.x, p.fake, p.real, DIVERGENCES[name].h(p.ratio)) / p.sigma**2


# The exact gradient ---------------------------------------------------------------------------------------------------


@every_student
@two_levels
def test_ratio_has_mean_one(student: str, level: float) -> None:
    """B9, and a check on the quadrature: E_p[1] = E_p[r] = 1."""
    p = setting(student, level).points
    assert abs(p.weight.sum().item() - 1) <= 1e-14
    assert abs((p.weight * p.ratio).sum().item() - 1) <= 1e-13


@every_student
@two_levels
@every_divergence
def test_gradient_is_that_of_one_level_of_the_expansion(name: str, level: float, student: str) -> None:
    """B6: with scores and ratio frozen, grad E[loss] = sigma^4 grad E_p[h |s_p - s_q|^2]."""
    s, h = setting(student, level), DIVERGENCES[name].h

    def integrand(log_q: Tensor, log_p: Tensor, squares: Tensor) -> Tensor:
        return log_p.exp() * h((log_q - log_p).exp()) * squares

    truth = level**4 * s.exact_gradient(integrand, s.levels[0])
    assert gap(s.gradient(uni_instruct(s.points, name, s.points.ratio)), truth) <= 1e-12


@every_line
@two_levels
@every_divergence
def test_no_part_of_the_gradient_can_be_left_out(name: str, level: float, student: str) -> None:
    """Without the gradient through h, the path term or the pull: wrong wherever the table has one, and only there."""
    s, row = setting(student, level), TABLE[name]
    p = s.points
    exact = s.gradient(uni_instruct(p, name, p.ratio))
    delta = p.fake - p.real
    squares = (delta**2).sum(1)
    path = s.gradient(row.path(p.ratio).detach() * squares)
    force = (row.pull(p.ratio) * squares / p.sigma**2)[:, None] * delta
    pull = s.gradient((force.detach() * p.x).sum(1))
    detached = s.gradient(uni_instruct(p, name, p.ratio.detach()))
    for needed, without in (
        (name != "reverse_kl", detached),
        (name in HAS_PATH, exact - path),
        (name in HAS_PULL, exact - pull),
    ):
        assert gap(without, exact) >= 1e-3 if needed else gap(without, exact) <= 1e-12


@every_line
@two_levels
@every_divergence
def test_f_distill_is_the_gradient_of_the_divergence(name: str, level: float, student: str) -> None:
    """B7: E_p[h (s_p - s_q) dx] = grad D_f(q || p); the reverse KL is Diff-Instruct."""
    s, f = setting(student, level), DIVERGENCES[name].f
    p = s.points
    truth = s.exact_gradient(lambda log_q, log_p, _: log_p.exp() * f((log_q - log_p).exp()), s.levels[0])
    assert gap(s.gradient(f_distill(p, name)), truth) <= 1e-12
    if name == "reverse_kl":
        assert gap(s.gradient(diff_instruct_loss(p.x, p.fake, p.real)) / level**2, truth) <= 1e-12


# The expansion --------------------------------------------------------------------------------------------------------

LOW, HIGH = 0.3, 6.0


@every_line
@every_divergence
def test_divergence_expands_over_levels(name: str, student: str) -> None:
    """B5: D_f(LOW) - D_f(HIGH) = int 1/2 E_p[h |s_p - s_q|^2] d(sigma^2)."""
    s, d = setting(student, LOW), DIVERGENCES[name]
    teacher, generator = s.teacher, Law(*(t.detach() for t in s.student))

    def at(sigma: Tensor) -> tuple[Tensor, Tensor]:
        """D_f and E_p[h |s_p - s_q|^2] at each level (L,): (L,) and (L,)."""
        t, dt = trapezoid(15.0, 601)
        scale = torch.sqrt(sigma**2 + generator.stds.max() ** 2)
        x = (scale[:, None] * t[:, 0]).reshape(-1, 1)
        level = sigma.repeat_interleave(len(t))
        log_q, log_p = teacher.log_density(x, level), generator.log_density(x, level)
        r = (log_q - log_p).exp()
        squares = (generator.score(x, level) - teacher.score(x, level)).squeeze(1) ** 2
        mass = log_p.exp() * scale.repeat_interleave(len(t)) * dt.repeat(len(sigma))
        return (mass * d.f(r)).view(-1, len(t)).sum(1), (mass * d.h(r) * squares).view(-1, len(t)).sum(1)

    ends, _ = at(f64([LOW, HIGH]))
    sigma, weight = legendre(LOW, HIGH, 80)
    _, rate = at(sigma)
    torch.testing.assert_close((weight * rate / 2).sum(), ends[0] - ends[1], rtol=1e-12, atol=0)


@every_divergence
def test_f_distill_expands_in_uni_instruct(name: str) -> None:
    """B8: f-distill(LOW) - f-distill(HIGH) = int 1/2 grad E_p[h |s_p - s_q|^2] d(sigma^2), levels mixed in a batch."""
    sigma, weight = legendre(LOW, HIGH, 80)
    s = setting("mixture", *sigma.tolist())
    each = weight.repeat_interleave(len(s.points.x) // len(sigma)) / (2 * s.points.sigma**4)
    integral = s.gradient(each * uni_instruct(s.points, name, s.points.ratio))
    low, high = (setting("mixture", level) for level in (LOW, HIGH))
    truth = low.gradient(f_distill(low.points, name)) - high.gradient(f_distill(high.points, name))
    assert gap(integral, truth) <= 1e-12


def test_integral_kl_is_uni_instruct_with_an_integrated_weight() -> None:
    """int w grad KL d sigma = W(HIGH) grad KL(HIGH) + int W 1/2 grad E_p |s_p - s_q|^2 d(sigma^2), W = int_LOW w.

    Here w(sigma) = sigma, so that W = (sigma^2 - LOW^2) / 2.
    """
    sigma, measure = legendre(LOW, HIGH, 80)
    s = setting("mixture", *sigma.tolist())
    each = measure.repeat_interleave(len(s.points.x) // len(sigma))  # of d(sigma^2) = 2 sigma d sigma
    truth = s.gradient(each / 2 * f_distill(s.points, "reverse_kl"))
    integrated = (s.points.sigma**2 - LOW**2) / 2
    rest = setting("mixture", HIGH)
    end = (HIGH**2 - LOW**2) / 2 * rest.gradient(f_distill(rest.points, "reverse_kl"))
    expanded = s.gradient(each * integrated / (2 * s.points.sigma**4) * uni_instruct(s.points, "reverse_kl", None))
    assert gap(end + expanded, truth) <= 1e-12
    flat = s.gradient(each / (2 * s.points.sigma**4) * uni_instruct(s.points, "reverse_kl", None))
    assert gap(end + flat, truth) > 0.1  # the weight matters


# Pointwise identities, for any networks -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One turn's tensors with arbitrary smooth networks in place of denoisers, and an arbitrary ratio."""

    x: Tensor
    noisy: Tensor
    sigma: Tensor
    fake: Tensor
    real: Tensor
    ratio: Tensor

    def loss(self, name: str, ratio: Tensor | None) -> Tensor:
        return uni_instruct_loss(self.x, self.noisy, self.sigma, self.fake, self.real, ratio, name)

    def value_and_slope(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        assert loss.shape == self.sigma.shape
        return loss.detach(), torch.autograd.grad(loss.sum(), self.x, retain_graph=True)[0]


def step(same: bool = False, dtype: torch.dtype = torch.float64) -> Step:
    rng = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    x, eps, sigma = normal(6, 3, 2, 2).requires_grad_(), normal(6, 3, 2, 2), normal(6).exp()
    noisy = x + sigma.view(-1, 1, 1, 1) * eps
    flat, mix = noisy.flatten(1), normal(3, 12, 12) / 4
    fake, real = (torch.tanh(flat @ m).reshape(x.shape) for m in mix[:2])
    ratio = torch.exp(torch.sin(flat @ mix[2]).sum(1) / 4)
    return Step(x, noisy, sigma, fake, fake.clone() if same else real, ratio)


def assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    for mine, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", [True, False], ids=["with ratio", "without"])
def test_reverse_kl_is_twice_sid_at_one_half(given: bool) -> None:
    s = step()
    mine = s.loss("reverse_kl", s.ratio if given else None)
    assert_same(s.value_and_slope(mine), s.value_and_slope(2 * sid_loss(s.x, s.fake, s.real, 0.5)))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_reverse_kl_with_another_path_term_is_sid(alpha: float) -> None:
    """C4: coefficient 2 (1 - alpha) in place of 1."""
    s = step()
    path = ((s.fake - s.real) ** 2).flatten(1).sum(1)
    mine = s.loss("reverse_kl", None) + (2 * (1 - alpha) - 1) * path
    assert_same(s.value_and_slope(mine), s.value_and_slope(2 * sid_loss(s.x, s.fake, s.real, alpha)))


def test_reverse_kl_without_path_term_is_sim() -> None:
    s = step()
    mine = s.loss("reverse_kl", None) - ((s.fake - s.real) ** 2).flatten(1).sum(1)
    sim = s.value_and_slope(sim_loss(s.x, s.fake, s.real, None))
    assert_same(s.value_and_slope(mine), sim)
    assert_same(sim, s.value_and_slope(2 * sid_loss(s.x, s.fake, s.real, 1.0)))


def test_forward_kl_at_ratio_one_is_twice_sid_at_one() -> None:
    """C5: a ratio stuck at 1 takes everything from the forward KL that sets it apart."""
    s = step()
    sid = s.value_and_slope(2 * sid_loss(s.x, s.fake, s.real, 1.0))
    assert_same(s.value_and_slope(s.loss("forward_kl", torch.ones_like(s.ratio))), sid)
    _, slope = s.value_and_slope(s.loss("forward_kl", s.ratio))
    assert gap(slope, sid[1]) >= 1e-2


def test_jeffreys_is_forward_plus_reverse() -> None:
    s = step()
    both = s.loss("forward_kl", s.ratio) + s.loss("reverse_kl", None)
    assert_same(s.value_and_slope(s.loss("jeffreys", s.ratio)), s.value_and_slope(both))


@every_divergence
def test_equal_scores_give_zero(name: str) -> None:
    """C6: value and gradient, whatever the ratio."""
    s = step(same=True)
    value, slope = s.value_and_slope(s.loss(name, s.ratio))
    assert (value == 0).all() and (slope == 0).all()
    assert step().loss(name, s.ratio).abs().min() > 0


@every_divergence
def test_samples_do_not_mix(name: str) -> None:
    s = step()
    together = s.loss(name, s.ratio)
    for i in range(len(s.x)):
        one = slice(i, i + 1)
        alone = Step(s.x[one], s.noisy[one], s.sigma[one], s.fake[one], s.real[one], s.ratio[one])
        torch.testing.assert_close(alone.loss(name, alone.ratio), together[one], rtol=1e-13, atol=1e-13)


@every_divergence
def test_single_precision_stays(name: str) -> None:
    s = step(dtype=torch.float32)
    value = s.loss(name, None if name == "reverse_kl" else s.ratio)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), step().loss(name, step().ratio), rtol=1e-4, atol=1e-4)


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl", "", "Reverse_KL"])
def test_unknown_divergence(name: str) -> None:
    s = step()
    with pytest.raises(ValueError, match=r"^divergence: .*reverse_kl.*forward_kl.*softened_reverse_kl") as caught:
        s.loss(name, s.ratio)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n in TABLE if n != "reverse_kl"])
def test_missing_ratio(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^divergence: {name} needs the density ratio.*reverse_kl"):
        step().loss(name, None)


@every_divergence
def test_limited_pull_never_drives_samples_away(name: str) -> None:
    """Far samples of a generator that the fake score knows, and a critic that says r = 1 there: descent approaches."""
    x = f64([[3.0], [-2.0], [0.5], [10.0]]).requires_grad_()
    sigma, start = f64([0.1, 0.2, 0.4, 0.8]), x.detach()
    noisy = x + sigma[:, None] * f64([[0.3], [-1.0], [0.7], [0.1]])
    # a point mass per sample, whose exact denoiser is constant; the teacher's data are near 0
    fake, real, ratio = start + 0 * noisy, 0 * noisy, torch.ones(4, dtype=torch.float64)

    def towards(limit: float) -> Tensor:
        loss = uni_instruct_loss(x, noisy, sigma, fake, real, ratio, name, limit)
        return torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] * start

    assert (towards(1.0) > 0).all()
    if name in ("jensen_shannon", "hellinger"):  # the exact term alone, with a ratio that does not fit the gap
        assert (towards(math.inf) < 0).any()


def test_limit_leaves_gentle_pulls_exact() -> None:
    s = step()
    gentle = replace(s, real=s.fake + 1e-3 * s.real)
    args = (gentle.x, gentle.noisy, gentle.sigma, gentle.fake, gentle.real, gentle.ratio, "jensen_shannon")
    assert torch.equal(uni_instruct_loss(*args, pull_limit=1.0), uni_instruct_loss(*args))
    half = uni_instruct_loss(s.x, s.noisy, s.sigma, s.fake, s.real, s.ratio, "jensen_shannon", 0.0)
    assert not torch.equal(half, s.loss("jensen_shannon", s.ratio))
