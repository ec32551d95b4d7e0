"""VDD in closed form: its bound against divergences by quadrature, experts as a generator, laws that turn."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import limbeck
from limbeck import artifact, teachers
from limbeck.denoiser import Denoiser, score
from limbeck.evaluate.quadrature import kullback_leibler
from limbeck.exact import Gaussian, Mixture, Policy
from limbeck.experts import Components, Experts
from limbeck.generator import Generator
from limbeck.methods import vdd
from limbeck.methods.vdd import VDD, vdd_bound
from limbeck.objective import Batch
from limbeck.source import NoiseSource, RealSource
from limbeck.train import Source, Trainer

LEVEL = 0.05


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def law() -> Mixture:
    """Two modes that overlap, of root mean square 1/2."""
    means, stds = f64([[-0.4, 0.1], [0.5, -0.2]]), f64([0.3, 0.35])
    c = 0.5 / Mixture([1.0, 2.0], means, stds).sigma_data
    return Mixture([1.0, 2.0], c * means, c * stds)


def experts(count: int = 3, classes: int = 0, seed: int = 1) -> Experts:
    torch.manual_seed(seed)
    made = Experts((2,), classes, count, 8, 0.5).double()
    with torch.no_grad():  # close to each other, so that every responsibility counts
        made.experts[-1].bias.reshape(count, -1)[:, :2] *= 0.4  # type: ignore[operator, union-attr]
    return made


def nodes(n: int = 64) -> tuple[Tensor, Tensor]:
    """Nodes (n^2, 2) and weights of the mean under N(0, I) in the plane."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    one, weight = f64(x.tolist()), f64((w / w.sum()).tolist())
    return torch.cartesian_prod(one, one), torch.cartesian_prod(weight, weight).prod(1)


EPS, W = nodes()


def batch(real: Tensor | None = None, cond: Tensor | None = None) -> Batch:
    u = torch.zeros(len(EPS), dtype=torch.float64)
    return Batch(EPS, u, EPS, cond, EPS if real is None else real)


def divergence(student: Experts, cond: Tensor | None = None) -> Tensor:
    """KL(student || law at LEVEL), by the same nodes for every expert, differentiable in everything."""
    mixture = student.at(cond, EPS)
    x = mixture.means + (mixture.factors @ EPS[:, None, :, None]).squeeze(-1)
    log_q = torch.logsumexp(mixture.log_joint(x), 2)
    log_p = law().log_prob(x.flatten(0, 1), LEVEL).reshape(log_q.shape)
    return (W * (mixture.log_gate.exp() * (log_q - log_p)).sum(1)).sum()


def gradients(value: Tensor, module: nn.Module) -> Tensor:
    found = torch.autograd.grad(value, list(module.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(module.parameters(), found, strict=True)
        ]
    )


def error_of_the_experts_gradient() -> float:
    student = experts()
    loss = (W * VDD(sigma=LEVEL).loss(nn.ModuleDict({"generator": student}), law(), batch())).sum()
    wanted = gradients(divergence(student), student.experts)
    assert wanted.norm() > 0.1
    return float((gradients(loss, student.experts) - wanted).abs().max())


def test_the_experts_descend_the_divergence() -> None:
    # the quadrature itself: KL by the grid, which knows no expert
    student = experts()
    exact = kullback_leibler(student.log_prob, lambda x: law().log_prob(x, LEVEL), 6.0, 601)
    assert divergence(student).item() == pytest.approx(exact, abs=1e-8)
    assert error_of_the_experts_gradient() <= 1e-8


MISTAKES: dict[str, Callable[..., Tensor]] = {
    "no responsibilities": lambda x, g, n, r, s: vdd_bound(x, g, n, 0 * r, s),
    "no entropy": lambda x, g, n, r, s: vdd_bound(x, g, 0 * n, r, s),
    "no teacher": lambda x, g, n, r, s: vdd_bound(x, g, n, r, 0 * s),
    "no gate": lambda x, g, n, r, s: vdd_bound(x, torch.zeros_like(g), n, r, s),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_gradient_sees_mistakes(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vdd, "vdd_bound", MISTAKES[mistake])
    assert error_of_the_experts_gradient() > 1e-2


def test_an_expert_of_no_weight_counts_nothing() -> None:
    """Its gate is 0 in single precision, below e^-104; the logarithm is not."""
    x = torch.zeros(1, 2, 2)
    one = torch.zeros(1, 2)
    bound = vdd_bound(x, torch.tensor([[0.0, -200.0]]), one + 0.5, one, torch.ones(1, 2, 2))
    assert bound.tolist() == [0.5]


def test_wrong_responsibilities_cost_their_own_divergence() -> None:
    student = experts()
    with torch.no_grad():
        mixture = student.at(None, EPS)
        x = mixture.means + (mixture.factors @ EPS[:, None, :, None]).squeeze(-1)
        log_expert = mixture.log_experts(x).diagonal(dim1=1, dim2=2)
        joint = mixture.log_joint(x)
        wrong = (joint + f64([0.5, -0.3, 0.1])).log_softmax(2)
        score = torch.zeros_like(x)
        values = [
            (W * vdd_bound(x, mixture.log_gate, log_expert, r.diagonal(dim1=1, dim2=2), score)).sum().item()
            for r in (joint.log_softmax(2), wrong)
        ]
        # sum_x p(x) KL(p(k | x) || r), by the grid
        axis = torch.linspace(-5, 5, 501, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        one = Components(*(part[:1] for part in mixture))
        log_joint = one.log_joint(grid[None])[0]
        right, off = log_joint.log_softmax(1), (log_joint + f64([0.5, -0.3, 0.1])).log_softmax(1)
        gap = (log_joint.exp().sum(1) * (right.exp() * (right - off)).sum(1)).sum() * (axis[1] - axis[0]) ** 2
    assert values[1] - values[0] == pytest.approx(gap.item(), abs=1e-8)
    # tight for the right ones: log g + log N - log r = log p_G
    assert values[0] == pytest.approx(
        (W * (mixture.log_gate.exp() * joint.logsumexp(2)).sum(1)).sum().item(), abs=1e-12
    )


def test_the_gate_takes_em_s_step_and_nothing_else() -> None:
    student, real = experts(), law().sample(len(EPS), torch.Generator().manual_seed(0))
    method, nets = VDD(sigma=LEVEL), nn.ModuleDict({"generator": student})
    loss = (W * method.loss(nets, law(), batch(real))).sum()
    # at the present parameters the M-step's gradient is the likelihood's
    likelihood = -(W * student.log_prob(real)).sum()
    assert torch.allclose(gradients(loss, student.gate), gradients(likelihood, student.gate), rtol=0, atol=1e-12)
    assert gradients(loss, student.gate).norm() > 1e-3
    # and the experts do not see the data
    other = (W * method.loss(nets, law(), batch(real + 1))).sum()
    assert torch.equal(gradients(loss, student.experts), gradients(other, student.experts))


def test_a_finished_student_rests() -> None:
    """At the teacher's own law the gradient is zero sample by sample."""
    student = experts(1)
    with torch.no_grad():
        last = student.experts[-1]
        last.weight.zero_()  # type: ignore[operator, union-attr]
        std = math.log(math.expm1(math.hypot(0.4, LEVEL) / 0.5))
        last.bias.copy_(f64([0.3 / 0.5, -0.3 / 0.5, std, 0.0, std]))  # type: ignore[operator, union-attr]
    target = Gaussian(f64([0.3, -0.3]), f64([0.4, 0.4]))
    assert target.unit == pytest.approx(1.0)
    rows = VDD(sigma=LEVEL, experts=1).loss(nn.ModuleDict({"generator": student}), target, batch())
    assert gradients(rows[7], student.experts).abs().max() < 1e-12


# Experts as a generator -----------------------------------------------------------------------------------------------


def test_samples_follow_the_density_in_every_context() -> None:
    student = experts(3, 1)
    n = 200_000
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for c in (0.0, 0.7):
        cond = f64([[c]])
        with torch.no_grad():
            x = student(z, cond.expand(n, 1))
            axis = torch.linspace(-6, 6, 601, dtype=torch.float64)
            grid = torch.cartesian_prod(axis, axis)
            density = student.log_prob(grid, cond.expand(len(grid), 1)).exp() * (axis[1] - axis[0]) ** 2
        assert density.sum().item() == pytest.approx(1, abs=1e-9)
        mean = density @ grid
        cov = (grid - mean).T @ (density[:, None] * (grid - mean))
        assert torch.allclose(x.mean(0), mean, atol=0.01) and torch.allclose(torch.cov(x.T), cov, atol=0.01)
        # a half plane, which sees more than moments
        for edge in (-0.51, 0.21):  # between grid lines
            share = density[grid[:, 0] < edge].sum()
            assert (x[:, 0] < edge).double().mean().item() == pytest.approx(share.item(), abs=0.005)


def test_the_latent_s_first_number_is_the_expert_and_a_normal() -> None:
    student = experts(3)
    mixture = student.at(None, EPS[:1])
    edges = torch.cat([f64([0.0]), mixture.log_gate[0].exp().cumsum(0)])
    for k in range(3):
        u = edges[k] + 0.25 * (edges[k + 1] - edges[k])
        z = torch.stack([torch.special.ndtri(u), f64(1.3)])[None]
        fresh = torch.stack([torch.special.ndtri(f64(0.25)), f64(1.3)])
        assert torch.allclose(student(z)[0], mixture.means[0, k] + mixture.factors[0, k] @ fresh, atol=1e-9)
    # far in the tails, in single precision too
    far = student.float()(torch.tensor([[40.0, 0.0], [-40.0, 0.0], [6.0, 0.0]]))
    assert torch.isfinite(far).all()


def test_densities_of_the_components_are_torch_s() -> None:
    student = experts(3, 2)
    x, cond = torch.randn(5, 4, 2, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
    mixture = student.at(cond, x)
    for k in range(3):
        normal = torch.distributions.MultivariateNormal(mixture.means[:, k], scale_tril=mixture.factors[:, k])
        wanted = normal.log_prob(x.transpose(0, 1)).T
        assert torch.allclose(mixture.log_experts(x)[:, :, k], wanted, rtol=1e-10)
    assert torch.allclose(mixture.log_gate.exp().sum(1), torch.ones(5, dtype=torch.float64))


def test_experts_in_a_file(tmp_path: Path) -> None:
    made = experts(3, 2).float()
    artifact.save(tmp_path / "generator.safetensors", "generator", made, {})
    z, cond = torch.randn(4, 2), torch.rand(4, 2)
    assert torch.equal(limbeck.load(tmp_path)(z, cond), made(z, cond))


@pytest.mark.parametrize(
    ("action", "line"),
    [
        (lambda: Experts((1, 8, 8), 0, 3, 8, 0.5), "experts: are for points"),
        (lambda: experts(3, 2)(torch.zeros(3, 2), torch.zeros(3, 1)), r"cond: expected shape \(3, 2\)"),
        (lambda: experts(3)(torch.zeros(3, 2), torch.zeros(3, 1)), r"cond: expected shape \(3, 0\)"),
        (lambda: VDD(experts=0), "experts: must be at least 1"),
        (lambda: VDD(sigma=0.0), "sigma: must be positive"),
        (lambda: VDD().players(law(), Generator()), "generator: VDD trains a mixture of experts"),
        (lambda: Policy(Mixture([1.0], [[0.0]], 1.0)), "policy: rotates a mixture in the plane"),
    ],
)
def test_what_is_refused(action: Callable[[], Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        action()


# Contexts -------------------------------------------------------------------------------------------------------------


def test_a_policy_is_its_mixture_turned() -> None:
    policy, c = Policy(law()), 0.8
    turn = f64([[math.cos(c), -math.sin(c)], [math.sin(c), math.cos(c)]])
    turned = Mixture([1.0, 2.0], law().means @ turn.T, law().stds)
    x, cond, sigma = torch.randn(20, 2, dtype=torch.float64), torch.full((20, 1), c, dtype=torch.float64), f64(0.3)
    assert torch.allclose(policy(x, sigma, cond), turned(x, sigma), rtol=1e-12)
    assert torch.allclose(policy.log_prob(x, 0.3, cond), turned.log_prob(x, 0.3), rtol=1e-12)
    assert torch.allclose(policy(x, sigma), law()(x, sigma), rtol=1e-12)
    x.requires_grad_()
    slope = torch.autograd.grad(policy.log_prob(x, 0.3, cond).sum(), x)[0]
    assert torch.allclose(score(policy, x, sigma, cond), slope, rtol=1e-9, atol=1e-9)
    drawn = [p.sample(9, torch.Generator().manual_seed(3)) for p in (turned, law())]
    same = policy.sample(9, torch.Generator().manual_seed(3), cond[:9])
    assert not torch.allclose(same, drawn[1]) and torch.allclose((same - drawn[1] @ turn.T), torch.zeros(9, 2).double())


def test_real_samples_have_the_context_of_their_row() -> None:
    policy = teachers.load("exact:policy4")
    assert isinstance(policy, Policy)
    noise = NoiseSource((2,), (2,), 400, 0, policy.classes, policy.contexts)
    (drawn,) = RealSource(noise, lambda n, rng, contexts: policy.sample(n, rng, contexts))(0, 0)
    assert drawn.cond is not None and drawn.real is not None and drawn.cond.shape == (400, 1)
    assert drawn.cond.min() < 0.05 and drawn.cond.max() > 0.95 and drawn.cond.unique().numel() > 390
    density = policy.log_prob(drawn.real, 0.0, drawn.cond).mean()
    # -log 4 - log(2 pi 0.09) - 1, the modes being apart
    assert density.item() == pytest.approx(-math.log(4) - math.log(2 * math.pi * 0.09) - 1, abs=0.15)
    assert policy.log_prob(drawn.real, 0.0, drawn.cond.flip(0)).mean() < density - 1


def trained(name: str, method: VDD, steps: int, seed: int = 0) -> tuple[Any, Experts]:
    teacher = teachers.load(name)
    assert isinstance(teacher, Mixture | Policy)
    noise = NoiseSource((2,), (2,), 128, seed, teacher.classes, teacher.contexts)
    rows = (lambda n, rng, c: teacher.sample(n, rng, c)) if isinstance(teacher, Policy) else None
    batches: Source = RealSource(noise, rows or (lambda n, rng, c: teacher.sample(n, rng)))
    trainer = Trainer(method, teacher, Denoiser((2,), teacher.classes, teacher.sigma_data), steps=steps, seed=seed)
    for _ in range(steps):
        trainer.advance(batches)
    student = trainer.nets["generator"].double()
    assert isinstance(student, Experts)
    return teacher, student


def test_eight_experts_recover_eight_modes() -> None:
    teacher, student = trained("exact:mixture8", VDD(), 500)
    assert kullback_leibler(student.log_prob, teacher.log_prob, 6.0, 241) <= 0.02


def test_experts_follow_a_policy_s_context() -> None:
    teacher, student = trained("exact:policy4", VDD(), 250)
    for c in (0.0, 0.5, 1.0):
        cond = torch.full((241**2, 1), c, dtype=torch.float64)
        told = kullback_leibler(
            lambda x, rows=cond: student.log_prob(x, rows),  # type: ignore[misc]
            lambda x, rows=cond: teacher.log_prob(x, 0.0, rows),  # type: ignore[misc]
            5.0, 241,
        )  # fmt: skip
        assert told <= 0.02, c
    # a student that ignores the context is far away
    stale = torch.zeros(241**2, 1, dtype=torch.float64)
    wrong = kullback_leibler(
        lambda x: student.log_prob(x, stale), lambda x: teacher.log_prob(x, 0.0, stale + 0.5), 5.0, 241
    )
    assert wrong > 1


def test_divergences_by_quadrature() -> None:
    a, b = Gaussian(f64([0.0, 0.3]), f64([0.5, 0.7])), Gaussian(f64([0.2, 0.0]), f64([0.6, 0.5]))
    p, q = (torch.distributions.Normal(g.mean, g.std) for g in (a, b))
    exact = torch.distributions.kl_divergence(p, q).sum().item()
    assert kullback_leibler(a.log_prob, b.log_prob, 6.0) == pytest.approx(exact, abs=1e-10)
    for reach, points in ((0.5, 401), (200.0, 401)):
        with pytest.raises(ValueError, match=r"^reach: the density has mass"):
            kullback_leibler(a.log_prob, b.log_prob, reach, points)


@pytest.mark.parametrize("name", ["exact:mixture8", "exact:policy4"])
def test_runs(name: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"every": {"sample": 2}, "evaluate": {"samples": 100, "teacher_steps": 3}}
    limbeck.distill(name, "vdd", out=tmp_path / "run", steps=3, batch=8, tell=lambda line: None, **keys)
    made = limbeck.load(tmp_path / "run")
    assert isinstance(made, Experts) and made.classes == (name == "exact:policy4")
