"""Diff-Instruct, SiD and SIM in closed form: linear laws, mixtures with exact scores, identities, turns and training.

Notation of the linear case: teacher N(0, SD^2), generator theta z, one level s; S = SD^2 + s^2, P = theta^2 + s^2,
D_real = b x with b = SD^2 / S, and D_fake = a x with a = theta^2 / P, the exact fake score.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.denoiser import Denoiser, Preconditioned, expand, score
from limbeck.exact import Gaussian, Mixture
from limbeck.game import Game
from limbeck.generator import Generator, OneStep
from limbeck.losses import denoising, l1_scale, pseudo_huber
from limbeck.methods import METHODS
from limbeck.methods.diff_instruct import DiffInstruct, diff_instruct_loss
from limbeck.methods.sid import SiD, sid_loss
from limbeck.methods.sim import SIM, sim_loss
from limbeck.networks.mlp import MLP
from limbeck.noise import Karras, Levels, LogNormal
from limbeck.objective import Batch, Objective, Turn, perturb
from limbeck.optimizer import Optimizer
from limbeck.source import NoiseSource
from limbeck.train import Trainer

SD = 0.5
LEVELS = (0.1, 0.5, 1.0, 10.0)
THETAS = (0.1, 0.4, 1.3, 4.0)
ALPHAS = (-0.5, 0.0, 0.5, 1.0, 1.2, 2.0)
FAMILY: dict[str, Any] = {
    "diff_instruct": DiffInstruct(),
    "diff_instruct-dmd": DiffInstruct(weight="dmd"),
    "sid": SiD(),
    "sid-levels": SiD(levels=Karras(stop=0.8)),
    "sid-plain": SiD(alpha=0.5, normalizer="none", loss_scale=100.0),
    "sid-1.2": SiD(alpha=1.2, game=Game(fake_steps=2)),
    "sim": SIM(),
    "sim-squared": SIM(distance="squared"),
}
Scored = DiffInstruct | SiD | SIM


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (n,) of the mean under N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return f64(nodes.tolist()), f64((weights / weights.sum()).tolist())


def plane(n: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes z, eps (n^2, 1) and weights (n^2,) of the mean under N(0, I) in the plane."""
    nodes, weights = hermite(n)
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    return z.reshape(-1, 1), eps.reshape(-1, 1), torch.outer(weights, weights).flatten()


Z, EPS, W = plane()
# four points of equal weight with the second moments of N(0, I): the mean of a quadratic form
CROSS_Z, CROSS_EPS = (
    f64([[1.0], [-1.0], [0.0], [0.0]]) * math.sqrt(2),
    f64([[0.0], [0.0], [1.0], [-1.0]]) * math.sqrt(2),
)


def filled(s: float, like: Tensor) -> Tensor:
    return like.new_full((len(like),), s)


def u_of(levels: Levels, s: float) -> float:
    """The u at which a law has the quantile s, from the laws' definitions."""
    if isinstance(levels, Karras):
        low, high = (v ** (1 / levels.rho) for v in (levels.sigma_min, levels.sigma_max))
        return (s ** (1 / levels.rho) - low) / (high - low) / levels.stop
    assert isinstance(levels, LogNormal)
    return 0.5 * (1 + math.erf((math.log(s) - levels.mean) / levels.std / math.sqrt(2)))


class Affine(Generator):
    """x = mean + slope z."""

    def __init__(self, slope: float, mean: float = 0.0) -> None:
        super().__init__()
        self.shape = self.latent_shape = (1,)
        self.classes = 0
        self.slope, self.mean = nn.Parameter(f64(slope)), nn.Parameter(f64(mean))

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.mean + self.slope * z


def gradient(value: Tensor, *inputs: Tensor) -> Tensor:
    """d value / d inputs as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, inputs, retain_graph=True)])


def coefficients(theta: float, s: float) -> tuple[float, float, float, float]:
    """a, b, P, S."""
    big_p, big_s = theta**2 + s**2, SD**2 + s**2
    return theta**2 / big_p, SD**2 / big_s, big_p, big_s


def method_loss(method: Scored, generator: Generator, fake: Denoiser, s: float, teacher: Denoiser) -> Tensor:
    """The objective's mean loss at one level, its nodes fed as a batch."""
    u = filled(u_of(method.levels, s), Z)
    nets = nn.ModuleDict({"generator": generator, "fake": fake})
    return (W * method.loss(nets, teacher, Batch(Z, u, EPS))).sum()


def test_the_quadrature_has_the_moments_of_the_normal_law() -> None:
    for k, moment in ((0, 1), (1, 0), (2, 1), (3, 0), (4, 3), (6, 15), (8, 105)):
        assert (W * Z[:, 0] ** k).sum().item() == pytest.approx(moment, abs=1e-11 * max(1, moment))
        assert (W * EPS[:, 0] ** k).sum().item() == pytest.approx(moment, abs=1e-11 * max(1, moment))
    assert abs((W * (Z * EPS)[:, 0]).sum().item()) < 1e-14
    for s in LEVELS:
        for levels in (LogNormal(), Karras(stop=0.8), Karras()):
            assert levels.quantile(f64(u_of(levels, s))).item() == pytest.approx(s, rel=1e-10)


# A. The linear case ---------------------------------------------------------------------------------------------------


def linear_kl(theta: float, s: float) -> float:
    _, _, p, big_s = coefficients(theta, s)
    return (p / big_s - 1 - math.log(p / big_s)) / 2


@pytest.mark.parametrize("s", LEVELS)
@pytest.mark.parametrize("theta", THETAS)
def test_a1_kullback_leibler(theta: float, s: float) -> None:
    x = theta * Z + s * EPS
    level = filled(s, Z)
    value = (W * (Gaussian(0.0, theta).log_prob(x, level) - Gaussian(0.0, SD).log_prob(x, level))).sum()
    assert value.item() == pytest.approx(linear_kl(theta, s), rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("s", LEVELS)
@pytest.mark.parametrize("theta", THETAS)
def test_a2_diff_instruct_descends_the_kullback_leibler_divergence(theta: float, s: float) -> None:
    a, b, p, big_s = coefficients(theta, s)
    generator, fake, teacher = Affine(theta), Gaussian(0.0, theta), Gaussian(0.0, SD)
    expected = s**2 * theta * (1 / big_s - 1 / p)  # s^2 dKL/dtheta
    assert theta * (a - b) == pytest.approx(expected, rel=1e-10)
    x = generator(Z)
    noisy, level = perturb(x, filled(s, Z), EPS), filled(s, Z)
    pure = (W * diff_instruct_loss(x, fake(noisy, level), teacher(noisy, level))).sum()
    whole = method_loss(DiffInstruct(), generator, fake, s, teacher)
    for loss in (pure, whole):
        assert gradient(loss, generator.slope).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    step = 1e-5 * theta
    difference = s**2 * (linear_kl(theta + step, s) - linear_kl(theta - step, s)) / (2 * step)
    assert difference == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("s", LEVELS)
@pytest.mark.parametrize("theta", THETAS)
def test_a3_values(theta: float, s: float) -> None:
    """L1 = E|D_real - D_fake|^2 = (b-a)^2 P and L2 = E (D_real - D_fake)(D_real - x) = (b-a)(bP - theta^2)."""
    a, b, p, _ = coefficients(theta, s)
    x = theta * Z
    noisy = x + s * EPS
    for slope in (a, 0.37):  # the exact fake score, and one that lags
        first, second = (b - slope) ** 2 * p, (b - slope) * (b * p - theta**2)
        for alpha in ALPHAS:
            value = (W * sid_loss(x, slope * noisy, b * noisy, alpha)).sum()
            assert value.item() == pytest.approx(second - alpha * first, rel=1e-10, abs=1e-11 * (first + abs(second)))
        assert (slope == a) == (first == pytest.approx(second, rel=1e-10))


@pytest.mark.parametrize("s", LEVELS)
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a4_gradient_of_sid(alpha: float, theta: float, s: float) -> None:
    a, b, *_ = coefficients(theta, s)
    generator, fake, teacher = Affine(theta), Gaussian(0.0, theta), Gaussian(0.0, SD)
    expected = 2 * theta * (b - a) * ((b - 1) - alpha * (b - a))
    loss = method_loss(SiD(alpha=alpha, normalizer="none"), generator, fake, s, teacher)
    assert gradient(loss, generator.slope).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    scaled = method_loss(SiD(alpha=alpha, normalizer="none", loss_scale=100.0), generator, fake, s, teacher)
    assert scaled.item() == pytest.approx(100 * loss.item(), rel=1e-12)
    if alpha == 1:
        squared = method_loss(SIM(distance="squared"), generator, fake, s, teacher)
        assert gradient(squared, generator.slope).item() == pytest.approx(
            4 * theta * (b - a) * (a - 1), rel=1e-10, abs=1e-12
        )
    if alpha == 0.5:  # the Fisher divergence (b-a)^2 P and its derivative, psi* following theta
        da = 2 * theta * s**2 / (theta**2 + s**2) ** 2
        fisher = -2 * (b - a) * da * (theta**2 + s**2) + (b - a) ** 2 * 2 * theta
        assert 2 * expected == pytest.approx(fisher, rel=1e-10, abs=1e-12)


def drift(theta: Tensor, s: float, alpha: float) -> Tensor:
    """-d E L_alpha / d theta of every entry of theta (n,), by the library's loss and an exact fake score."""
    slope = theta.clone().requires_grad_()
    x = slope * CROSS_Z  # (4, n): the entries are coordinates
    noisy = x + s * CROSS_EPS
    a, b = theta**2 / (theta**2 + s**2), SD**2 / (SD**2 + s**2)
    (g,) = torch.autograd.grad(sid_loss(x, a * noisy, b * noisy, alpha).mean(), slope)
    return -g


@pytest.mark.parametrize("s", [0.3, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_a5_the_repeller_of_alpha_above_1(alpha: float, s: float) -> None:
    edge = math.sqrt((SD**2 + s**2) * alpha / (alpha - 1) - s**2)
    still = drift(f64([0.0, SD, edge]), s, alpha)
    assert still.abs().max() < 1e-13 * edge
    theta = f64([0.98 * edge, 1.02 * edge])
    for _ in range(32_000):
        rate = drift(theta, s, alpha)
        # an Euler step that moves by 5 % at most
        theta = theta + rate * torch.minimum(f64(0.5), 0.05 * theta / rate.abs().clamp(min=1e-300))
        if theta[1] > 1e3 * edge and (theta[0] - SD).abs() < 1e-9:
            break
    assert theta[0].item() == pytest.approx(SD, abs=1e-8)
    assert theta[1] > 100 * edge


@pytest.mark.parametrize("s", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a5_alpha_up_to_1_has_one_stationary_point(alpha: float, s: float) -> None:
    theta = torch.logspace(-3, 3, 400, dtype=torch.float64)
    assert torch.equal(drift(theta, s, alpha).sign(), (SD - theta).sign())
    assert drift(f64([0.0, SD]), s, alpha).abs().max() < 1e-15


@pytest.mark.parametrize("s", LEVELS)
@pytest.mark.parametrize("mean", [-0.7, 0.2, 3.0])
def test_a6_a_shifted_mean_knows_no_alpha(mean: float, s: float) -> None:
    _, b, *_ = coefficients(SD, s)
    generator, fake, teacher = Affine(SD, mean), Gaussian(mean, SD), Gaussian(0.0, SD)
    expected = 2 * (1 - b) ** 2 * mean
    for alpha in ALPHAS:
        loss = 2 * method_loss(SiD(alpha=alpha, normalizer="none"), generator, fake, s, teacher)
        assert gradient(loss, generator.mean).item() == pytest.approx(expected, rel=1e-10)
    # SIM: d'(y) (1 - b) with y = (1 - b) mean; and Diff-Instruct: y
    y = (1 - b) * mean
    huber = method_loss(SIM(), generator, fake, s, teacher)
    assert gradient(huber, generator.mean).item() == pytest.approx(
        (1 - b) * y / math.sqrt(y**2 + 0.00054**2), rel=1e-10
    )
    kl = method_loss(DiffInstruct(), generator, fake, s, teacher)
    assert gradient(kl, generator.mean).item() == pytest.approx(y, rel=1e-10)


@pytest.mark.parametrize(("s", "printed"), [(0.1, 0.0782), (1.0, 0.3568), (10.0, 0.3984)])
def test_a7_the_l1_weight_in_many_dimensions(s: float, printed: float) -> None:
    """mean |x - D_real| of exact samples tends to sqrt(2 / pi) / sqrt(1 / s^2 + 1 / SD^2)."""
    limit = math.sqrt(2 / math.pi) / math.sqrt(1 / s**2 + 1 / SD**2)
    assert limit == pytest.approx(printed, abs=0.51e-4)
    x, eps = SD * normal(500, 3072, seed=1), normal(500, 3072, seed=2)
    weight = l1_scale(x, Gaussian(torch.zeros(3072, dtype=torch.float64), SD)(x + s * eps, filled(s, x)))
    assert weight.shape == (500,)
    spread = math.sqrt(math.pi / 2 - 1) / math.sqrt(3072)  # relative, of one sample
    assert (1 / weight).mean().item() == pytest.approx(limit, rel=4.5 * spread / math.sqrt(500))
    assert ((1 / weight / limit - 1).abs() < 5 * spread).all()


@pytest.mark.parametrize("s", [0.3, 2.0])
def test_a7_many_dimensions_are_their_eigen_directions(s: float) -> None:
    """Teacher, generator and fake score share eigenvectors R; the gradient in A is R diag(one-dimensional) R^T."""
    stds, slopes = f64([0.2, 0.5, 1.5]), f64([0.6, 0.5, 0.3])
    basis = torch.linalg.qr(normal(3, 3, seed=4)).Q
    factor = (basis * slopes @ basis.T).requires_grad_()
    # the mean of a quadratic form from 12 points
    points = torch.cat([torch.eye(6, dtype=torch.float64), -torch.eye(6, dtype=torch.float64)]) * math.sqrt(6)
    x = points[:, :3] @ factor.T
    noisy = x + s * points[:, 3:]
    b, a = stds**2 / (stds**2 + s**2), slopes**2 / (slopes**2 + s**2)
    real, fake = noisy @ (basis * b @ basis.T), noisy @ (basis * a @ basis.T)
    for alpha in ALPHAS:
        (g,) = torch.autograd.grad(sid_loss(x, fake, real, alpha).mean(), factor, retain_graph=True)
        expected = 2 * slopes * (b - a) * ((b - 1) - alpha * (b - a))
        torch.testing.assert_close(basis.T @ g @ basis, torch.diag(expected), rtol=1e-10, atol=1e-12)
    (g,) = torch.autograd.grad(diff_instruct_loss(x, fake, real).mean(), factor)
    torch.testing.assert_close(basis.T @ g @ basis, torch.diag(slopes * (a - b)), rtol=1e-10, atol=1e-12)


# B. Mixtures with exact scores ----------------------------------------------------------------------------------------

TEACHER = Mixture([0.4, 0.6], f64([[-1.0], [0.5]]), f64([0.3, 0.4]))
FISHER_LEVELS = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Law:
    """A generator of sum_k w_k N(m_k, t_k^2) with means and stds to be learned, and its exact fake score."""

    shares: Tensor
    means: Tensor
    stds: Tensor

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.means, self.stds

    @property
    def weights(self) -> Tensor:
        return torch.cat([share * W for share in self.shares])

    def samples(self) -> Tensor:
        """x (K n^2, 1), differentiable in the parameters: every component at every node."""
        return torch.cat([m + t * Z for m, t in zip(self.means, self.stds, strict=True)])

    def noisy(self, s: float) -> Tensor:
        return self.samples() + s * EPS.repeat(len(self.shares), 1)

    def frozen(self) -> Mixture:
        """The exact fake score as a denoiser that does not follow the parameters."""
        return Mixture(self.shares, self.means.detach()[:, None], self.stds.detach())

    def density(self, x: Tensor, s: float) -> Tensor:
        """log p_s(x) (n,) for x (n, 1), which follows the parameters."""
        variance = self.stds**2 + s**2
        logs = torch.log(self.shares) - (x - self.means) ** 2 / (2 * variance) - torch.log(2 * math.pi * variance) / 2
        return torch.logsumexp(logs, 1)

    def live(self, x: Tensor, s: float) -> Tensor:
        """The exact fake score at x, which follows the parameters: component means by their posterior shares."""
        variance = self.stds**2 + s**2
        logs = torch.log(self.shares) - (x - self.means) ** 2 / (2 * variance) - torch.log(variance) / 2
        local = (self.means * s**2 + x * self.stds**2) / variance
        return (torch.softmax(logs, 1) * local).sum(1, keepdim=True)


def law(kind: str, shift: Tensor | None = None) -> Law:
    shares, means, stds = {
        "gaussian": ([1.0], [0.3], [0.6]),
        "mixture": ([0.3, 0.7], [-0.6, 0.8], [0.4, 0.5]),
    }[kind]
    m, t = f64(means), f64(stds)
    if shift is not None:
        m, t = m + shift[: len(m)], t + shift[len(m) :]
    return Law(f64(shares), m.requires_grad_(), t.requires_grad_())


KINDS = pytest.mark.parametrize("kind", ["gaussian", "mixture"])
AT = pytest.mark.parametrize("s", FISHER_LEVELS)


@dataclass(frozen=True)
class Setting:
    """Clean and noised samples with both exact estimates, frozen as functions; all carry their graph."""

    law: Law
    x: Tensor
    noisy: Tensor
    fake: Tensor
    real: Tensor

    def mean(self, loss: Tensor) -> Tensor:
        return (self.law.weights * loss).sum()

    def gradient(self, loss: Tensor) -> Tensor:
        return gradient(self.mean(loss), *self.law.parameters)


def setting(kind: str, s: float) -> Setting:
    generated = law(kind)
    x, noisy = generated.samples(), generated.noisy(s)
    level = filled(s, x)
    return Setting(generated, x, noisy, generated.frozen()(noisy, level), TEACHER(noisy, level))


def squared_gap(generated: Law, s: float) -> Tensor:
    """E_p |D_real - D_fake|^2 with a fake score that follows the generator."""
    noisy = generated.noisy(s)
    gap = TEACHER(noisy, filled(s, noisy)) - generated.live(noisy, s)
    return (generated.weights * gap[:, 0] ** 2).sum()


@AT
@KINDS
def test_b1_score_projection(kind: str, s: float) -> None:
    """E u(x_s) (D_fake(x_s) - x) = 0 for any u; not so for the teacher's estimate."""
    at = setting(kind, s)
    for u in (torch.ones_like(at.noisy), at.noisy, at.noisy.sin(), at.fake - at.real):
        assert at.mean((u * (at.fake - at.x))[:, 0]).abs() < 1e-12
    assert at.mean((at.noisy * (at.real - at.x))[:, 0]).abs() > 1e-2


@AT
@KINDS
def test_b2_tweedie_both_ways(kind: str, s: float) -> None:
    generated = law(kind)
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    teacher = Law(f64([0.4, 0.6]), f64([-1.0, 0.5]), f64([0.3, 0.4]))
    for exact, of in ((generated.frozen(), generated), (TEACHER, teacher)):
        x = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None].requires_grad_()
        level = filled(s, x)
        torch.testing.assert_close(exact(x, level), of.live(x, s), rtol=1e-12, atol=1e-12)
        # the score of the noised density is (D - x) / s^2
        (slope,) = torch.autograd.grad(of.density(x, s).sum(), x)
        torch.testing.assert_close(score(exact, x, level), slope, rtol=1e-10, atol=1e-12)
        # and D is the mean of clean samples given the noised one, by summation of Bayes' rule on a fine grid
        joint = torch.exp(of.density(grid[:, None], 0.0) - (x - grid) ** 2 / (2 * s**2))
        torch.testing.assert_close(exact(x, level), (joint @ grid / joint.sum(1))[:, None], rtol=1e-10, atol=1e-10)


@AT
@KINDS
def test_b3_both_values_of_the_fisher_divergence(kind: str, s: float) -> None:
    at = setting(kind, s)
    first = at.mean((at.real - at.fake)[:, 0] ** 2)
    assert first > 1e-3
    assert at.mean(sid_loss(at.x, at.fake, at.real, 0.0)).item() == pytest.approx(first.item(), abs=1e-12)


@AT
@KINDS
def test_b4_only_alpha_one_half_is_the_fisher_divergence(kind: str, s: float) -> None:
    at = setting(kind, s)
    parameters = at.law.parameters
    exact = gradient(squared_gap(at.law, s), *parameters)
    step = 1e-4
    for i, slope in enumerate(exact.tolist()):  # the exact gradient itself, by differences
        move = step * torch.eye(len(exact), dtype=torch.float64)[i]
        ends = [squared_gap(law(kind, sign * move), s).item() for sign in (1, -1)]
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-7)
    unbiased = 2 * at.gradient(sid_loss(at.x, at.fake, at.real, 0.5))
    torch.testing.assert_close(unbiased, exact, rtol=1e-10, atol=1e-10)
    # what alpha adds: the path term, of samples moving through a divergence that stays
    path = at.gradient((at.real - at.fake)[:, 0] ** 2)
    for alpha in (0.0, 1.0, 1.2):
        other = 2 * at.gradient(sid_loss(at.x, at.fake, at.real, alpha))
        assert (other - exact).norm() > 4e-3 * exact.norm()
        torch.testing.assert_close(other, exact + (1 - 2 * alpha) * path, rtol=1e-10, atol=1e-10)


@AT
@KINDS
def test_b4_diff_instruct_is_the_kullback_leibler_divergence(kind: str, s: float) -> None:
    at = setting(kind, s)
    noisy = at.law.noisy(s)
    divergence = at.mean(at.law.density(noisy, s) - TEACHER.log_prob(noisy, filled(s, noisy)))
    exact = s**2 * gradient(divergence, *at.law.parameters)
    torch.testing.assert_close(at.gradient(diff_instruct_loss(at.x, at.fake, at.real)), exact, rtol=1e-10, atol=1e-10)


def huber(y: Tensor, c: float) -> Tensor:
    return (y**2 + c**2).sqrt() - c


@pytest.mark.parametrize(("s", "c"), [(0.5, 1.0), (1.0, 0.1), (1.5, 0.1)])
@KINDS
def test_sim_differentiates_the_score_and_not_the_sampling_law(kind: str, s: float, c: float) -> None:
    """Its gradient is that of E_p d(y), y = D_fake - D_real, with x_s ~ p held and D_fake following the generator.

    E u(x_s) (D_fake(x_s) - x) = 0 holds at all parameters for a fixed u. Differentiated, with u = d'(y) fixed: the
    derivative of D_fake at held x_s, averaged against u, is the negative of what moves through x_s and x with D_fake
    held. The latter is the gradient of the library's loss.
    """
    at = setting(kind, s)
    parameters, noisy = at.law.parameters, at.noisy.detach()
    held = at.law.live(noisy, s) - TEACHER(noisy, filled(s, noisy))
    whole = at.law.live(at.noisy, s) - at.real
    for constant, d in ((c, lambda y: huber(y, c)), (None, torch.square)):
        ours = at.gradient(sim_loss(at.x, at.fake, at.real, constant))
        torch.testing.assert_close(ours, gradient(at.mean(d(held)[:, 0]), *parameters), rtol=1e-10, atol=1e-10)
        # the whole gradient has a path term as well
        total = gradient(at.mean(d(whole)[:, 0]), *parameters)
        path = at.gradient(d(at.fake - at.real)[:, 0])
        torch.testing.assert_close(ours + path, total, rtol=1e-10, atol=1e-10)
        assert (ours - total).norm() > 1e-3 * total.norm()
        assert at.mean(sim_loss(at.x, at.fake, at.real, constant)).abs() < 1e-10  # a value of 0 at every parameter


def test_sim_takes_the_norm_of_a_whole_sample() -> None:
    """The same in the plane: linear scores of unequal slopes, d = sqrt(|y|^2 + c^2) - c of the two-vector y."""
    s, c, n = 0.8, 0.7, 24
    nodes, weights = hermite(n)
    points = torch.cartesian_prod(nodes, nodes, nodes, nodes)
    share = torch.cartesian_prod(weights, weights, weights, weights).prod(1)
    theta, mean = f64([0.9, 0.3]).requires_grad_(), f64([0.4, -0.5]).requires_grad_()
    teacher = Gaussian([0.0, 0.0], [0.5, 0.7])

    def fake_at(x: Tensor, m: Tensor, t: Tensor) -> Tensor:
        return m + t**2 / (t**2 + s**2) * (x - m)

    x = mean + theta * points[:, :2]
    noisy = x + s * points[:, 2:]
    level = filled(s, noisy)
    loss = sim_loss(x, fake_at(noisy, mean.detach(), theta.detach()), teacher(noisy, level), c)
    still = noisy.detach()
    y = fake_at(still, mean, theta) - teacher(still, level)
    torch.testing.assert_close(
        gradient((share * loss).sum(), mean, theta),
        gradient((share * ((y**2).sum(1) + c**2).sqrt()).sum(), mean, theta),
        rtol=1e-7,
        atol=1e-8,
    )  # fmt: skip
    # coordinate by coordinate it would be another one
    apart = gradient((share * (y**2 + c**2).sqrt().sum(1)).sum(), mean, theta)
    assert (gradient((share * loss).sum(), mean, theta) - apart).norm() > 1e-2 * apart.norm()


# C. Identities of any networks ----------------------------------------------------------------------------------------


def estimates(seed: int = 0, shape: tuple[int, ...] = (6, 2, 3, 3)) -> tuple[Tensor, Tensor, Tensor]:
    """x, and a fake and a real estimate that depend on it."""
    x = normal(*shape, seed=seed).requires_grad_()
    noisy = x + 0.7 * normal(*shape, seed=seed + 1)
    fake = torch.sin(noisy) * 0.8 + 0.1 * noisy.roll(1, -1)
    real = torch.tanh(noisy) + 0.2 * noisy.flip(1)
    return x, fake, real


def total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


def slopes(loss: Tensor, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    return g


def assert_same(loss: Tensor, other: Tensor, x: Tensor) -> None:
    """Equal per sample, and so are the gradients in x."""
    torch.testing.assert_close(loss, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slopes(loss, x), slopes(other, x), rtol=1e-11, atol=1e-12)


def test_c1_twice_one_half_is_a_difference_of_two_errors() -> None:
    x, fake, real = estimates()
    assert_same(2 * sid_loss(x, fake, real, 0.5), total((real - x) ** 2) - total((fake - x) ** 2), x)


def test_c2_alpha_1_and_its_neighbours() -> None:
    x, fake, real = estimates()
    assert_same(sid_loss(x, fake, real, 1.0), total((real - fake) * (fake - x)), x)
    for alpha in ALPHAS:
        whole = (1 - alpha) * total((real - fake) ** 2) + total((real - fake) * (fake - x))
        assert_same(sid_loss(x, fake, real, alpha), whole, x)


def test_c3_without_the_networks_graphs_every_alpha_is_diff_instruct() -> None:
    x, fake, real = estimates()
    weight = l1_scale(x, real)
    mean = (x - real).abs().flatten(1).mean(1)
    assert not weight.requires_grad and torch.allclose(weight * mean, torch.ones(6, dtype=torch.float64), rtol=1e-14)
    expected = weight.reshape(6, 1, 1, 1) * (fake - real)
    for alpha in ALPHAS:
        detached = weight * sid_loss(x, fake.detach(), real.detach(), alpha)
        torch.testing.assert_close(slopes(detached, x), expected, rtol=1e-12, atol=1e-13)
        assert (slopes(weight * sid_loss(x, fake, real, alpha), x) - expected).norm() > 0.05 * expected.norm()
    # DMD's weight; the same with a graph of its own, which counts as a constant; and numbers
    for given, slope in (
        (weight, expected),
        (1 / mean, expected),
        (1.0, fake - real),
        (3.0, 3 * (fake - real)),
    ):
        assert given is weight or not isinstance(given, Tensor) or given.requires_grad
        torch.testing.assert_close(
            slopes(diff_instruct_loss(x, fake, real, given), x), slope.detach(), rtol=1e-12, atol=1e-13
        )


def test_the_l1_weight_has_a_floor_per_sample() -> None:
    x = f64([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    real = f64([[1.0, 2.0], [1.0, 2.0 + 4e-6], [1.0, -3.0]])
    torch.testing.assert_close(l1_scale(x, real), f64([1e5, 1e5, 0.5]), rtol=1e-12, atol=0)


def test_c6_equal_scores_leave_nothing_to_do() -> None:
    x, fake, _ = estimates()
    real = fake + 0 * x  # the same function, by a graph of its own
    losses = [sid_loss(x, fake, real, alpha) for alpha in ALPHAS]
    losses += [sim_loss(x, fake, real, c) for c in (None, 0.1, 1e-5)]
    losses += [diff_instruct_loss(x, fake, real), diff_instruct_loss(x, fake, real, l1_scale(x, real))]
    for loss in losses:
        assert torch.equal(loss, torch.zeros_like(loss))
        # SIM with c = 1e-5 takes the difference of two graphs 1e5 times
        assert slopes(loss, x).abs().max() < 1e-10


@pytest.mark.parametrize("alpha", ALPHAS)
@AT
@KINDS
def test_c8_the_value_tells_nothing_at_alpha_1(kind: str, s: float, alpha: float) -> None:
    at = setting(kind, s)
    first = at.mean((at.real - at.fake)[:, 0] ** 2).item()
    value = at.mean(sid_loss(at.x, at.fake, at.real, alpha)).item()
    assert value == pytest.approx((1 - alpha) * first, abs=1e-12)


def test_sim_of_a_square_is_twice_sid_at_alpha_1() -> None:
    x, fake, real = estimates()
    assert_same(sim_loss(x, fake, real, None), 2 * sid_loss(x, fake, real, 1.0), x)


@pytest.mark.parametrize("c", [1e-3, 0.3, 5.0])
def test_sim_s_slope_is_the_derivative_of_the_pseudo_huber_distance(c: float) -> None:
    x, fake, real = estimates()
    y = (fake - real).detach().requires_grad_()
    (direction,) = torch.autograd.grad(pseudo_huber(y, torch.zeros_like(y), c).sum(), y)
    loss = sim_loss(x, fake, real, c)
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, -total(direction * (fake - x)), rtol=1e-10, atol=1e-12)
    # d(y) is |y|^2 / 2c for small y, |y| for large
    if c == 5.0:
        near = sim_loss(x, 1e-4 * fake, 1e-4 * real, c)
        flat = sim_loss(x, 1e-4 * fake, 1e-4 * real, None) / (2 * c)
        torch.testing.assert_close(near, flat, rtol=1e-6, atol=0)


def test_losses_are_per_sample() -> None:
    x, fake, real = (v.detach() for v in estimates())
    functions: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda x, fake, real: sid_loss(x, fake, real, 1.2),
        lambda x, fake, real: sim_loss(x, fake, real, 0.1),
        diff_instruct_loss,
    ]
    for function in functions:
        whole = function(x, fake, real)
        assert whole.shape == (6,)
        alone = torch.cat([function(x[i : i + 1], fake[i : i + 1], real[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(whole, alone, rtol=1e-13, atol=1e-14)


# D. The objectives are the pure functions -----------------------------------------------------------------------------

PLANE = Mixture([0.4, 0.6], f64([[-1.0, 0.4], [0.5, -0.3]]), f64([0.2, 0.3]))


def template(dropout: float = 0.0, seed: int = 0, sigma_data: float = PLANE.sigma_data) -> Preconditioned:
    """A student in float64 with no layer left at its zero start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MLP((2,), width=16, depth=1, dropout=dropout).double()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return Preconditioned(network, (2,), sigma_data=sigma_data)


def batch_of(n: int = 40) -> Batch:
    return Batch(normal(n, 2, seed=1), (torch.arange(n, dtype=torch.float64) + 0.5) / n, normal(n, 2, seed=2))


def levels_by_hand(method: Scored, u: Tensor, unit: float) -> Tensor:
    if isinstance(method.levels, LogNormal):
        return unit * torch.exp(-1.2 + 1.2 * torch.special.ndtri(u))
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    return unit * (low + 0.8 * u * (high - low)) ** 7


def documented(method: Scored, x: Tensor, fake: Tensor, real: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """The loss by its printed formula, and by the pure function with its documented weight: (B,) each."""
    l1 = (unit / (x - real).abs().mean(1)).detach()
    match method:
        case DiffInstruct():
            weight = l1 if method.weight == "dmd" else torch.ones_like(l1)
            plain = weight / unit**2 * ((fake - real).detach() * x).sum(1)
            return plain, diff_instruct_loss(x, fake, real, weight) / unit**2
        case SiD():
            weight = method.loss_scale / unit**2 * (l1 if method.normalizer == "l1" else 1)
            gap = real - fake
            plain = weight * ((gap * (real - x)).sum(1) - method.alpha * (gap**2).sum(1))
            return plain, weight * sid_loss(x, fake, real, method.alpha)
        case SIM():
            y, rest = (fake - real) / unit, (fake - x) / unit
            if method.distance == "squared":
                return -2 * (y * rest).sum(1), sim_loss(x, fake, real, None) / unit**2
            c = 0.00054 * math.sqrt(2)
            plain = -(y * rest).sum(1) / ((y**2).sum(1) + c**2).sqrt()
            return plain, sim_loss(x, fake, real, c * unit) / unit


def on(nets: nn.ModuleDict, name: str) -> nn.ModuleDict:
    """Players as the trainer leaves them in a turn of `name`."""
    nets.eval().requires_grad_(False)
    nets[name].train().requires_grad_(True)
    return nets


def gradients(net: nn.Module) -> Tensor:
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("name", FAMILY)
def test_the_loss_on_a_batch_is_the_pure_function(name: str) -> None:
    method, unit, batch = FAMILY[name], PLANE.sigma_data / 0.5, batch_of()
    assert abs(unit - 1) > 0.2
    nets = nn.ModuleDict(method.players(template()))
    nets["fake"] = template(seed=3)
    on(nets, "generator")
    method.loss(nets, PLANE, batch).sum().backward()
    ours = gradients(nets["generator"])
    assert all(p.grad is None for p in nets["fake"].parameters())
    nets.zero_grad(set_to_none=True)

    x, sigma_init = nets["generator"](batch.z), method.game.sigma_init * unit
    assert torch.equal(x, nets["generator"].denoiser(sigma_init * batch.z, f64(sigma_init)))
    sigma = levels_by_hand(method, batch.u, unit)
    noisy = x + sigma[:, None] * batch.eps
    fake, real = nets["fake"](noisy, sigma), PLANE(noisy, sigma)
    for formula in documented(method, x, fake, real, unit):
        torch.testing.assert_close(method.loss(nets, PLANE, batch), formula, rtol=1e-10, atol=1e-11)
    # SiD and SIM differentiate through both estimates, Diff-Instruct through neither
    graphs = {}
    for key, estimate in (
        ("both", (fake, real)),
        ("no fake", (fake.detach(), real)),
        ("no real", (fake, real.detach())),
        ("neither", (fake.detach(), real.detach())),
    ):
        nets.zero_grad(set_to_none=True)
        documented(method, x, *estimate, unit)[0].sum().backward(retain_graph=True)
        graphs[key] = gradients(nets["generator"])
    torch.testing.assert_close(ours, graphs["both"], rtol=1e-10, atol=1e-10 * ours.abs().max().item())
    for key, other in graphs.items():
        if isinstance(method, DiffInstruct):
            assert torch.equal(other, graphs["both"])
        elif key != "both":
            assert (other - ours).norm() > 0.02 * ours.norm(), key


class Watched(Denoiser):
    """A denoiser with a weight that notes whether its input and output carry a graph."""

    def __init__(self, weight: float) -> None:
        super().__init__((2,), 0, 0.5)
        self.weight = nn.Parameter(f64(weight))
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        out = torch.sin(self.weight * x) / (1 + expand(sigma, x))
        self.seen.append((x.requires_grad, out.requires_grad))
        return out


@pytest.mark.parametrize("name", FAMILY)
def test_where_graphs_go(name: str) -> None:
    method, teacher, fake, batch = FAMILY[name], Watched(0.4), Watched(0.7), batch_of()
    teacher.requires_grad_(False)
    nets = nn.ModuleDict({"generator": OneStep(template(), 2.5), "fake": fake})
    method.loss(on(nets, "generator"), teacher, batch).sum().backward()
    flows = not isinstance(method, DiffInstruct)
    assert teacher.seen[-1][1] == fake.seen[-1][1] == flows
    assert teacher.weight.grad is None and fake.weight.grad is None
    assert gradients(nets["generator"]).abs().max() > 0

    nets.zero_grad(set_to_none=True)
    on(nets, "fake")
    calls = len(teacher.seen)
    # not even a generator that asks for a gradient gets one
    nets["generator"].requires_grad_(True)
    first = next(iter(method.turns(0, 0)))
    assert first.players == ("fake",)
    first.loss(nets, teacher, batch).sum().backward()
    assert fake.seen[-1] == (False, True) and len(teacher.seen) == calls
    assert fake.weight.grad is not None and fake.weight.grad.abs() > 0
    assert all(p.grad is None for p in nets["generator"].parameters())


# T. Turns and training ------------------------------------------------------------------------------------------------


class Slopes(Denoiser):
    """D = a(sigma) x: a free slope for every level."""

    def __init__(self, levels: Iterable[float], start: float = 0.5) -> None:
        super().__init__((1,), 0, SD)
        self.levels = f64(list(levels))
        self.slopes = nn.Parameter(torch.full_like(self.levels, start))

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.slopes[(self.levels.log() - sigma[:, None].log()).abs().argmin(1)][:, None] * x


def crossed(levels: Levels, values: Iterable[float]) -> Batch:
    """Every level at the four points whose equal-weight mean is exact for quadratic losses."""
    u = f64([u_of(levels, s) for s in values])
    return Batch(CROSS_Z.repeat(len(u), 1), u.repeat_interleave(4), CROSS_EPS.repeat(len(u), 1))


@pytest.mark.parametrize("theta", [0.1, 0.5, 2.0])
def test_t1_the_fake_turn_s_minimum_is_the_exact_score(theta: float) -> None:
    levels = (0.05, 0.3, 1.0, 4.0)
    for s in levels:  # by the fine quadrature
        fake = Slopes([s])
        nets = on(nn.ModuleDict({"generator": Affine(theta), "fake": fake}), "fake")
        batch = Batch(Z, filled(u_of(LogNormal(), s), Z), EPS)
        loss = (W * Game().fake_turn().loss(nets, Gaussian(0.0, SD), batch)).sum()
        a = fake.slopes
        weight = (s**2 + SD**2) / (s * SD) ** 2
        assert loss.item() == pytest.approx(weight * ((0.5 - 1) ** 2 * theta**2 + 0.5**2 * s**2), rel=1e-10)
        (g,) = torch.autograd.grad(loss, a, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), a)
        assert (a - g / h).item() == pytest.approx(theta**2 / (theta**2 + s**2), rel=1e-10)


@dataclass(frozen=True)
class FakeOnly:
    """A method's fake turns alone, on given players."""

    method: Any
    made: tuple[Generator, Denoiser]
    product: ClassVar[str] = "generator"
    needs_real: ClassVar[bool] = False

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        return {"generator": self.made[0], "fake": self.made[1]}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"fake": Optimizer("adam", lr=0.1, betas=(0.9, 0.99), schedule="cosine")}

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        yield from (turn for turn in self.method.turns(step, images) if turn.players == ("fake",))


@pytest.mark.parametrize("name", ["diff_instruct", "sid", "sim"])
def test_t1_descent_of_the_fake_score_alone(name: str) -> None:
    theta, levels = 1.3, (0.05, 0.3, 1.0, 4.0)
    fake, generator, teacher = Slopes(levels), Affine(theta), Gaussian(0.0, SD)
    run = Trainer(FakeOnly(FAMILY[name], (generator, fake)), teacher, fake, steps=300)
    for _ in range(300):
        run.advance(lambda step, turn: [crossed(LogNormal(), levels)])
    expected = theta**2 / (theta**2 + f64(levels) ** 2)
    torch.testing.assert_close(fake.slopes.detach(), expected, rtol=1e-6, atol=1e-6)
    assert generator.slope.item() == theta and run.images == 300 * 16


def test_t2_coupled_dynamics() -> None:
    """theta on 40 levels with high-dimensional L1 weights, and slopes of the fake score that lag behind.

    All four starts end at SD for Diff-Instruct and alpha <= 1; alpha = 1.2 runs away from 20, alpha = 2 from 2.5 too.
    """
    s = torch.logspace(math.log10(0.05), 1, 40, dtype=torch.float64)
    starts, kf, kg = f64([0.1, 1.0, 2.5, 20.0]), 0.05, 0.01
    b = SD**2 / (SD**2 + s**2)
    for alpha, home in (
        (None, [True] * 4),
        (0.5, [True] * 4),
        (1.0, [True] * 4),
        (1.2, [True, True, True, False]),
        (2.0, [True, True, False, False]),
    ):
        theta = starts.clone().requires_grad_()
        a = (starts[:, None] ** 2) / (starts[:, None] ** 2 + s**2)  # (4, 40)
        for _ in range(32_000):
            p = theta.detach()[:, None] ** 2 + s**2
            a = a + kf * (theta.detach()[:, None] ** 2 / p - a)
            residual = ((1 - b) ** 2 * theta.detach()[:, None] ** 2 + b**2 * s**2).sqrt()
            weight = (math.sqrt(math.pi / 2) / residual).flatten().repeat(4)
            x = (theta[None, :, None] * CROSS_Z[:, :, None]).expand(4, 4, 40)
            noisy = x + s * CROSS_EPS[:, :, None]
            real, fake, x = (v.reshape(-1, 1) for v in (b * noisy, a * noisy, x))
            if alpha is None:
                loss = diff_instruct_loss(x, fake, real, weight)
            else:
                loss = weight * sid_loss(x, fake, real, alpha)
            (g,) = torch.autograd.grad(loss.sum() / 160, theta)
            theta = (theta.detach() - kg * g).requires_grad_()
            end = theta.detach()
            arrived, left = (end - SD).abs() < 1e-6, (end > 25) & (g < 0)
            if (arrived | left).all():
                break
        assert arrived.tolist() == home and left.tolist() == [not h for h in home], (alpha, end)


@pytest.mark.parametrize("s", LEVELS)
def test_t3_coupled_linearisation(s: float) -> None:
    """At theta = SD, a = b both players' steps are stable; they circle where the generator is fast.

    Diff-Instruct: theta' = -kg SD da, a' = -2 kf w (S da - 2 SD (1 - b) dtheta). SiD: theta' times 2 (1 - b), for
    every alpha.
    """
    level, b, total = f64([s]), SD**2 / (SD**2 + s**2), SD**2 + s**2
    w = total / (s * SD) ** 2

    def field(theta: Tensor, a: Tensor, kg: float, kf: float, alpha: float | None) -> Tensor:
        """(theta', a'), in expectation: the crossed samples have its second moments."""
        theta, a = (v.detach().clone().requires_grad_() for v in (theta, a))
        x = theta * CROSS_Z[:, :1]
        noisy = x + s * CROSS_EPS[:, :1]
        fake, real = a * noisy, b * noisy
        loss = diff_instruct_loss(x, fake, real) if alpha is None else sid_loss(x, fake, real, alpha)
        (of_theta,) = torch.autograd.grad(loss.mean(), theta, retain_graph=True)
        held = x.detach()
        (of_a,) = torch.autograd.grad(denoising(a * noisy.detach(), held, level.expand(len(x)), SD).mean(), a)
        return torch.stack([-kg * of_theta, -kf * of_a])

    def jacobian(kg: float, kf: float, alpha: float | None) -> Tensor:
        """By central differences, exact for fields that are quadratic in each player."""
        at, h, columns = f64([SD, b]), 1e-3, []
        for step in (f64([h, 0]), f64([0, h])):
            ahead, back = (field(*(at + sign * step), kg, kf, alpha) for sign in (1, -1))
            columns.append((ahead - back) / (2 * h))
        return torch.stack(columns, 1)

    assert field(f64(SD), f64(b), 1.0, 1.0, 0.7).abs().max() < 1e-10 * w
    for kf in (0.05, 1.0):
        edge = kf * w * total**2 / (4 * SD**2 * (1 - b))  # of kg, where the discriminant changes its sign
        for kg in (0.5 * edge, 2 * edge):
            instruct = jacobian(kg, kf, None)
            expected = f64([[0, -kg * SD], [4 * kf * w * SD * (1 - b), -2 * kf * w * total]])
            torch.testing.assert_close(instruct, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
            trace, det = instruct.trace(), torch.linalg.det(instruct)
            assert trace < 0 and det > 0 and (trace**2 < 4 * det) == (kg > edge)
            for alpha in (0.5, 1.0, 1.2):
                sid = jacobian(kg, kf, alpha)
                torch.testing.assert_close(sid[0], 2 * (1 - b) * instruct[0], rtol=1e-10, atol=1e-10 * kg)
                torch.testing.assert_close(sid[1], instruct[1], rtol=1e-12, atol=0)


def noise(batch: int = 24, **fields: Any) -> NoiseSource:
    return NoiseSource((2,), (2,), batch, seed=fields.pop("seed", 5), dtype=torch.float64, **fields)


def trainer_of(objective: Any, dropout: float = 0.0, **fields: Any) -> Trainer:
    settings = {"steps": 4, "seed": 3} | fields
    return Trainer(objective, copy.deepcopy(PLANE), template(dropout), **settings)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@dataclass(frozen=True)
class Spied:
    """A method whose losses also note modes, gradients switched on, and who drops units."""

    method: Any
    seen: list[tuple[tuple[str, ...], dict[str, tuple[bool, bool, bool]]]]
    product: ClassVar[str] = "generator"
    needs_real: ClassVar[bool] = False

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        return self.method.players(template, generator)

    def optimizers(self) -> dict[str, Optimizer]:
        return self.method.optimizers()

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        for turn in self.method.turns(step, images):
            yield Turn(turn.players, self.spy(turn))

    def spy(self, turn: Turn) -> Any:
        def loss(nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
            calls = {
                "generator": lambda: nets["generator"](batch.z),
                "fake": lambda: nets["fake"](batch.eps, 0.1 + batch.u),
                "teacher": lambda: teacher(batch.eps, 0.1 + batch.u),
            }
            facts = {}
            for name, net in (*nets.items(), ("teacher", teacher)):
                with torch.no_grad():
                    drops = not torch.equal(calls[name](), calls[name]())
                modes = {module.training for module in net.modules()}
                assert len(modes) == 1
                facts[name] = (modes.pop(), any(p.requires_grad for p in net.parameters()), drops)
            self.seen.append((turn.players, facts))
            return turn.loss(nets, teacher, batch)

        return loss


@pytest.mark.parametrize("name", FAMILY)
def test_t4_players_out_of_turn_rest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, seen = FAMILY[name], list[tuple[tuple[str, ...], dict[str, tuple[bool, bool, bool]]]]()
    # a teacher with weights and dropout, which must never show
    teacher = template(0.5, seed=7).train()
    run = Trainer(Spied(method, seen), teacher, template(0.5), steps=4, seed=3)
    reached: list[tuple[str, set[str]]] = []
    for player, optimizer in run.optimizers.items():
        update = optimizer.step

        def step(player: str = player, update: Any = update) -> None:
            everyone = {**run.nets, "teacher": run.teacher}
            got = {key for key, net in everyone.items() if any(p.grad is not None for p in net.parameters())}
            reached.append((player, got))
            before = {key: weights(net) for key, net in everyone.items()}
            update()
            moved = {key for key, net in everyone.items() if not torch.equal(weights(net), before[key])}
            assert moved == {player}

        monkeypatch.setattr(optimizer, "step", step)
    for _ in range(2):
        told = run.advance(noise())
        assert set(told) == {f"{kind}/{who}" for kind in ("loss", "grad_norm", "lr") for who in ("fake", "generator")}
        for net in (run.nets, run.teacher, run.ema.module):
            assert not any(module.training for module in net.modules())
            assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    order = ["fake"] * method.game.fake_steps + ["generator"]
    assert [players for players, _ in seen] == [(player,) for player in order] * 2
    assert reached == [(player, {player}) for player in order] * 2
    for (turn,), facts in seen:
        assert facts.keys() == {"generator", "fake", "teacher"}
        assert all(fact == ((True,) * 3 if key == turn else (False,) * 3) for key, fact in facts.items())
    assert run.images == 48


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("name", FAMILY)
def test_t5_micro_batches_are_one_batch(name: str, k: int) -> None:
    whole, cut = trainer_of(FAMILY[name]), trainer_of(FAMILY[name])
    start = weights(whole.nets)
    for step in range(3):
        one, other = whole.advance(noise()), cut.advance(noise(micro_batches=k))
        for key, value in one.items():
            assert other[key].item() == pytest.approx(value.item(), rel=1e-12, abs=1e-13), (step, key)
    assert whole.images == cut.images == 72
    assert (weights(whole.nets) - start).abs().max() > 1e-3
    assert (weights(whole.nets) - weights(cut.nets)).abs().max() <= 1e-12
    assert (weights(whole.ema.module) - weights(cut.ema.module)).abs().max() <= 1e-12


def test_t8_laws() -> None:
    for method in (SiD(levels=Karras(stop=0.8)), SIM(levels=Karras(stop=0.8))):
        ends = method.levels.quantile(f64([0.0, 1.0]))
        assert ends[0].item() == pytest.approx(0.002, rel=1e-12)
        assert ends[1].item() == pytest.approx(24.408, abs=5e-4)
        # u of the schedule itself runs up to 0.8
        assert 0.8 * u_of(method.levels, 2.5) == pytest.approx(0.49932, abs=5e-6)
        assert method.levels.quantile(f64(0.49932 / 0.8)).item() == pytest.approx(2.5, rel=1e-4)
        printed = {0.1: 0.0167, 0.2: 0.085, 0.3: 0.318, 0.4: 0.965, 0.5: 2.515, 0.6: 5.84, 0.7: 12.4, 0.8: 24.4}
        for u, sigma in printed.items():
            assert method.levels.quantile(f64(u / 0.8)).item() == pytest.approx(sigma, rel=5e-3)
        # 27.7 % lie above and 13.2 % below what the fake score's law has in its central 98 %
        fine = method.levels.quantile((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
        assert (fine > 4.91).double().mean().item() == pytest.approx(0.277, abs=6e-4)
        assert (fine < 0.0185).double().mean().item() == pytest.approx(0.132, abs=6e-4)
    for law in (DiffInstruct().levels, SiD().levels, SIM().levels, Game().fake_levels):
        assert law.quantile(f64([0.01, 0.5, 0.99])).tolist() == pytest.approx([0.0185, 0.301, 4.91], rel=3e-3)


def test_defaults() -> None:
    assert (SiD().alpha, SiD().normalizer, SiD().loss_scale) == (1.0, "l1", 1.0)
    assert all(kind().game == Game() for kind in (DiffInstruct, SiD, SIM))
    assert (Game().fake_steps, Game().sigma_init, Game().calls, Game().adversarial) == (1, 2.5, 1, None)
    assert (SIM().distance, SIM().c) == ("huber", 0.00054)
    assert DiffInstruct().weight == "uniform"
    assert [METHODS[key] for key in ("diff_instruct", "sid", "sim")] == [DiffInstruct, SiD, SIM]
    for method in FAMILY.values():
        assert method == replace(method) and hash(method) == hash(replace(method))
        assert method.product == "generator" and set(method.optimizers()) == {"fake", "generator"}
        assert all(o.betas[0] == 0 for o in method.optimizers().values())


# Determinism, scale and mistakes --------------------------------------------------------------------------------------


def flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries by path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat(value, f"{name}/{key}")
    else:
        yield name, tree


def same(a: Any, b: Any) -> bool:
    """Bit-identical state dictionaries."""
    one, other = dict(flat(a)), dict(flat(b))
    assert one.keys() == other.keys() and len(one) > 10
    return all(torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k] for k, v in one.items())


@pytest.mark.parametrize("name", FAMILY)
def test_the_same_seed_gives_the_same_run_and_resumes_anywhere(name: str) -> None:
    whole, other = trainer_of(FAMILY[name], 0.4), trainer_of(FAMILY[name], 0.4)
    states = [copy.deepcopy(whole.state_dict())]
    for _ in range(4):
        one, two = whole.advance(noise()), other.advance(noise())
        assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())
        states.append(copy.deepcopy(whole.state_dict()))
    assert same(other.state_dict(), states[-1])
    for part in ("generator", "fake"):
        changes = [{"nets": state["nets"][part], "optimizers": state["optimizers"][part]} for state in states[1:]]
        assert not any(same(a, b) for a, b in pairwise(changes))
    for k in range(4):
        resumed = trainer_of(FAMILY[name], 0.4)
        resumed.load_state_dict(copy.deepcopy(states[k]))
        for _ in range(4 - k):
            resumed.advance(noise())
        assert same(resumed.state_dict(), states[-1])
    different = trainer_of(FAMILY[name], 0.4, seed=4)
    different.advance(noise())
    assert not same(different.state_dict(), states[1])


def scaled(c: float) -> Mixture:
    return Mixture(PLANE.weights, c * PLANE.means, c * PLANE.stds)


def trained(method: Any, c: float, eps: float) -> Trainer:
    """A run of 10 steps on the teacher scaled by c."""
    teacher = scaled(c)
    optimizers = {key: replace(settings, eps=eps) for key, settings in method.optimizers().items()}
    run = Trainer(method, teacher, template(sigma_data=teacher.sigma_data), optimizers, steps=10, seed=1)
    for _ in range(10):
        run.advance(noise(32))
    return run


@pytest.mark.parametrize(("eps", "tolerance"), [(1e-8, 1e-5), (1e-30, 1e-8)])
@pytest.mark.parametrize("name", FAMILY)
def test_a_scaled_teacher_makes_the_scaled_student(name: str, eps: float, tolerance: float) -> None:
    """Adam's eps is the only thing that sees the data's scale."""
    one, two = trained(FAMILY[name], 1.0, eps), trained(FAMILY[name], 2.0, eps)
    z = normal(64, 2, seed=9)
    start = OneStep(template(), FAMILY[name].game.sigma_init * PLANE.unit)
    student, other = one.nets["generator"](z), two.nets["generator"](z)
    assert (student - start(z)).abs().max() > 1e-2
    torch.testing.assert_close(other / 2, student, rtol=0, atol=tolerance)
    sigma = 0.05 + 3 * torch.arange(64, dtype=torch.float64) / 64
    torch.testing.assert_close(
        two.nets["fake"](2 * z, 2 * sigma) / 2, one.nets["fake"](z, sigma), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("c", [2.0, 1e-3, 1e3])
@pytest.mark.parametrize("name", FAMILY)
def test_the_generator_s_loss_has_no_unit(name: str, c: float) -> None:
    method, batch, values = FAMILY[name], batch_of(), []
    for factor in (1.0, c):
        teacher = scaled(factor)
        nets = nn.ModuleDict(method.players(template(sigma_data=teacher.sigma_data)))
        nets["fake"] = template(seed=3, sigma_data=teacher.sigma_data)
        values.append(method.loss(nets, teacher, batch).detach())
    torch.testing.assert_close(values[1], values[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("c", [2.0, 1e-3])
def test_the_fake_score_s_loss_has_no_unit(c: float) -> None:
    batch, values = batch_of(), []
    for factor in (1.0, c):
        teacher = scaled(factor)
        nets = nn.ModuleDict(SiD().players(template(sigma_data=teacher.sigma_data)))
        values.append(Game().fake_turn().loss(nets, teacher, batch).detach())
    torch.testing.assert_close(values[1], values[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sd", [0.5, 1.5])
def test_the_fake_score_s_loss_is_edm_s(sd: float) -> None:
    """A network of zero output, D = sd^2 / (s^2 + sd^2) x, on data of that std has the loss 1 at every level."""
    network = MLP((1,), width=4, depth=1).double()  # as it starts, its output is 0
    for s in (0.1, 1.0, 5.0):
        level = filled(sd / 0.5 * s, Z)
        zero = Preconditioned(network, (1,), sigma_data=sd)
        x = sd * Z
        direct = (W * denoising(zero(x + level[:, None] * EPS, level), x, level, sd)).sum()
        assert direct.item() == pytest.approx(1, rel=1e-10)
        nets = nn.ModuleDict({"generator": Affine(sd), "fake": zero})
        batch = Batch(Z, filled(u_of(LogNormal(), s), Z), EPS)
        value = (W * Game().fake_turn().loss(nets, Gaussian(0.0, sd), batch)).sum()
        assert value.item() == pytest.approx(1, rel=1e-10)


@pytest.mark.parametrize("name", ["diff_instruct", "sid", "sim"])
def test_players(name: str) -> None:
    method, start = FAMILY[name], template(sigma_data=1.5)
    made = replace(method, game=Game(sigma_init=4.0)).players(start)
    assert set(made) == {"generator", "fake"}
    generator, fake = made["generator"], made["fake"]
    assert isinstance(generator, OneStep) and generator.sigma == pytest.approx(12.0) and generator.shape == (2,)
    pointers = [{p.data_ptr() for p in net.parameters()} for net in (generator, fake, start)]
    assert all(pointers) and not (pointers[0] & pointers[1] or pointers[0] & pointers[2] or pointers[1] & pointers[2])
    for net in (generator, fake):
        assert torch.equal(weights(net), weights(start))


@pytest.mark.parametrize("name", ["diff_instruct", "sid", "sim"])
def test_a_given_generator(name: str) -> None:
    class Refined(Generator):
        """Not one of the library's, with latents of its own shape."""

        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.shape, self.latent_shape, self.classes = shape, (3,), 0
            self.layer = nn.Linear(3, math.prod(shape)).double()

        def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
            return self.layer(z).reshape(-1, *self.shape)

    given = Refined((2,))
    run = trainer_of(FAMILY[name], generator=given)
    assert run.nets["generator"] is given and torch.equal(weights(run.nets["fake"]), weights(template()))
    before = weights(given)
    run.advance(NoiseSource((2,), (3,), 8, seed=0, dtype=torch.float64))
    assert not torch.equal(weights(given), before)
    for shape in ((1,), (3,), (2, 1), (1, 2)):
        with pytest.raises(ValueError, match=r"^generator: "):
            trainer_of(FAMILY[name], generator=Refined(shape))
        with pytest.raises(ValueError, match=r"^generator: "):
            FAMILY[name].players(template(), Refined(shape))


NOT_POSITIVE = (0.0, -1.0, math.nan, math.inf)
MISTAKES: list[tuple[type, str, Any]] = [
    *((SiD, "alpha", value) for value in (math.nan, math.inf, -math.inf, 1e3)),
    *((SiD, "loss_scale", value) for value in NOT_POSITIVE),
    *((SIM, "c", value) for value in NOT_POSITIVE),
    *((Game, field, value) for field in ("fake_steps", "calls") for value in (0, -1)),
    *((Game, "sigma_init", value) for value in NOT_POSITIVE),
]


@pytest.mark.parametrize(("kind", "field", "value"), MISTAKES)
def test_bad_fields(kind: type, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: ") as error:
        kind(**{field: value})
    assert "\n" not in str(error.value)


def test_objectives_have_the_protocol_s_shape() -> None:
    methods: list[Objective] = [DiffInstruct(), SiD(), SIM()]
    for method in methods:
        turns = list(method.turns(0, 0))
        assert [turn.players for turn in turns] == [("fake",), ("generator",)]
    assert [turn.players for turn in SIM(game=Game(fake_steps=3)).turns(5, 0)] == [("fake",)] * 3 + [("generator",)]
