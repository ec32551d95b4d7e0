"""Every way into the coordinate x = x_0 + sigma eps, against the posterior of a Gaussian mixture written out here."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.denoiser import (
    Denoiser,
    EpsPreconditioned,
    Form,
    Guided,
    Preconditioned,
    Rescaled,
    eps,
    expand,
    iddpm_levels,
    score,
)
from limbeck.schedule import VP, Cosine, Flow, Schedule

SCHEDULES: dict[str, Schedule] = {"vp": VP(), "vp_narrow": VP(6.0, 0.5), "cosine": Cosine(), "flow": Flow()}
SIGMAS = (0.01, 0.1, 0.5, 1.0, 3.0, 20.0)
# three components in the plane
WEIGHTS = (0.2, 0.5, 0.3)
MEANS = ((-1.0, 0.5), (0.3, -0.8), (1.2, 1.0))
STDS = (0.3, 0.15, 0.5)
Output = Literal["eps", "v", "x0", "flow"]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def coefficients(name: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t as the papers write them."""
    if name == "flow":
        return 1 - t, t
    if name == "cosine":
        return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)
    beta_d, beta_min = (19.9, 0.1) if name == "vp" else (6.0, 0.5)
    log_alpha = -(beta_d * t**2 / 4 + beta_min * t / 2)
    return log_alpha.exp(), (-torch.special.expm1(2 * log_alpha)) ** 0.5


def posterior_mean(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """E[x_0 | a x_0 + s eps = x] for x (B, 2) and a, s (B,), component by component."""
    log_weights, means = [], []
    for w, m, std in zip(WEIGHTS, MEANS, STDS, strict=True):
        gap = x - a[:, None] * f64(*m)
        variance = a**2 * std**2 + s**2
        log_weights.append(math.log(w) - gap.square().sum(1) / (2 * variance) - variance.log())
        means.append(f64(*m) + (a * std**2 / variance)[:, None] * gap)
    weights = torch.stack(log_weights).softmax(0)
    return (weights[:, :, None] * torch.stack(means)).sum(0)


class Foreign(nn.Module):
    """The perfect model of a schedule and an output, at the schedule's own x_t and t."""

    def __init__(self, schedule: str, output: Output) -> None:
        super().__init__()
        self.schedule, self.output = schedule, output

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        assert t.shape == (len(x),) and cond is None
        a, s = coefficients(self.schedule, t)
        clean = posterior_mean(x, a, s)
        a, s = a[:, None], s[:, None]
        noise = (x - a * clean) / s
        return {"eps": noise, "v": a * noise - s * clean, "x0": clean, "flow": noise - clean}[self.output]


class Recorder(nn.Module):
    """A network of constant output that keeps what it was called with."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None) -> Tensor:
        self.calls.append((x, noise, cond))
        return torch.full_like(x, self.value)


class Labelled(Denoiser):
    """D = x / (1 + sigma^2) + cond . row, a denoiser whose dependence on the label is plain to see."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__((2,), classes, 0.5, 0.01, 50.0)
        self.batches: list[int] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        rows = self.labels(cond, x)
        assert rows is not None
        return x / (1 + expand(sigma, x) ** 2) + rows @ f64(1, 2, 3, 4, 5, 6).reshape(3, 2)


# Preconditioned -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sd", [0.5, 0.7])
@pytest.mark.parametrize("unit", [None, 1.0, 3.0])
def test_coefficients_of_edm(sd: float, unit: float | None) -> None:
    x, sigma = torch.randn(4, 2, dtype=torch.float64), f64(0.002, 0.3, 5, 80)
    silent, loud = Recorder(), Recorder(1.0)
    skipped = Preconditioned(silent, (2,), sigma_data=sd, noise_unit=unit)(x, sigma)
    full = Preconditioned(loud, (2,), sigma_data=sd, noise_unit=unit)(x, sigma)
    for i, s in enumerate(sigma.tolist()):
        root = math.hypot(s, sd)
        torch.testing.assert_close(skipped[i], (sd / root) ** 2 * x[i], rtol=1e-14, atol=0)
        torch.testing.assert_close(full[i] - skipped[i], (f64(1, 1) * s * sd / root), rtol=1e-13, atol=1e-14)
        network_input, noise, cond = silent.calls[0]
        torch.testing.assert_close(network_input[i], x[i] / root, rtol=1e-14, atol=0)
        assert noise.shape == (4,) and cond is None
        assert noise[i].item() == pytest.approx(math.log(s / (2 * sd if unit is None else unit)) / 4, abs=1e-14)


def test_a_scalar_level_is_a_level_for_every_sample() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    network = Recorder(0.3)
    denoiser = Preconditioned(network, (2,))
    assert torch.equal(denoiser(x, torch.tensor(0.7, dtype=torch.float64)), denoiser(x, f64(0.7, 0.7, 0.7)))
    assert network.calls[0][1].shape == network.calls[1][1].shape == (3,)


def test_the_network_sees_the_dtype_of_the_sample() -> None:
    network = Recorder()
    denoised = Preconditioned(network, (2,), classes=2)(torch.zeros(3, 2), f64(1, 2, 3), f64(1, 0).expand(3, 2))
    assert denoised.dtype == torch.float32
    assert all(seen is not None and seen.dtype == torch.float32 for seen in network.calls[0])


class Bump(nn.Module):
    """A smooth network of input and noise level."""

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None) -> Tensor:
        return torch.sin(3 * x + noise[:, None]) * (1 + noise[:, None] ** 2)


@pytest.mark.parametrize("c", [2.0, 0.01, 127.5])
def test_default_units_make_the_denoiser_of_scaled_data(c: float) -> None:
    x, sigma = torch.randn(5, 2, dtype=torch.float64), f64(0.002, 0.1, 1, 9, 80)
    one, other = Preconditioned(Bump(), (2,), sigma_data=0.6), Preconditioned(Bump(), (2,), sigma_data=0.6 * c)
    torch.testing.assert_close(other(c * x, c * sigma), c * one(x, sigma), rtol=1e-12, atol=1e-12 * c)
    fixed = [Preconditioned(Bump(), (2,), sigma_data=sd, noise_unit=1) for sd in (0.6, 0.6 * c)]
    assert (fixed[1](c * x, c * sigma) - c * fixed[0](x, sigma)).abs().max() > 1e-3 * c


# Rescaled -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["eps", "v", "x0", "flow"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_foreign_model_is_the_posterior_mean(name: str, output: Output) -> None:
    denoiser = Rescaled(Foreign(name, output), SCHEDULES[name], output, (2,))
    rng = torch.Generator().manual_seed(1)
    for value in SIGMAS:
        sigma = torch.full((64,), value, dtype=torch.float64)
        x = torch.randn(64, 2, generator=rng, dtype=torch.float64) * math.hypot(1, value)
        expected = posterior_mean(x, torch.ones_like(sigma), sigma)
        assert (denoiser(x, sigma) - expected).abs().max() <= 1e-12
        assert (denoiser(x, sigma[0]) - expected).abs().max() <= 1e-12


def test_a_foreign_model_takes_a_level_per_sample_and_labels() -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return cond * t[:, None]

    denoiser = Rescaled(Network(), Flow(), "x0", (2,), classes=2)
    out = denoiser(torch.zeros(2, 2, dtype=torch.float64), f64(1, 3), f64(1, 0, 0, 1).reshape(2, 2))
    torch.testing.assert_close(out, f64(0.5, 0, 0, 0.75).reshape(2, 2))
    with pytest.raises(ValueError, match="cond"):
        denoiser(torch.zeros(2, 2), torch.ones(2), torch.ones(2, 3))


def test_unknown_output() -> None:
    with pytest.raises(ValueError, match=r"output.*'noise'"):
        Rescaled(Recorder(), Flow(), "noise", (2,))  # type: ignore[arg-type]


@given(st.sampled_from(sorted(SCHEDULES)), st.floats(-4, 4))
def test_time_inverts_the_ratio(name: str, exponent: float) -> None:
    schedule, ratio = SCHEDULES[name], f64(10**exponent)
    t = schedule.time(ratio)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    for mine, theirs in zip((alpha, sigma), coefficients(name, t), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=0)
    assert (sigma / alpha / ratio).item() == pytest.approx(1, abs=1e-11)
    preserved = alpha + sigma if name == "flow" else alpha**2 + sigma**2
    assert preserved.item() == pytest.approx(1, abs=1e-14)
    assert schedule.time(1.01 * ratio) > t


def test_landmarks_of_the_vp_schedule() -> None:
    vp, t = VP(), f64(1)
    assert (vp.sigma(t) / vp.alpha(t)).item() == pytest.approx(math.sqrt(math.exp(10.05) - 1), rel=1e-13)
    assert (vp.sigma(t) / vp.alpha(t)).item() == pytest.approx(152.167, abs=5e-4)
    textbook = (math.sqrt(0.1**2 + 2 * 19.9 * math.log1p(0.002**2)) - 0.1) / 19.9
    assert vp.time(f64(0.002)).item() == pytest.approx(textbook, rel=1e-10)
    ratio = 1e-9  # t = ratio^2 / beta_min to first order, where ln(1 + ratio^2) alone would give 0
    assert vp.time(f64(ratio)).item() == pytest.approx(ratio**2 / 0.1, rel=1e-9)


# Functions of the denoiser --------------------------------------------------------------------------------------------


class Noise(nn.Module):
    """The perfect noise network of a preconditioning: told c_in x and c_noise, it answers for the level meant by both.

    A second block of channels, as iDDPM's networks have for the variance, is garbage.
    """

    def __init__(self, form: Form, levels: Tensor) -> None:
        super().__init__()
        self.form, self.levels, self.seen = form, levels, torch.zeros(0)

    def sigma(self, c_noise: Tensor) -> Tensor:
        if self.form == "ve":
            return 2 * c_noise.exp()
        if self.form == "iddpm":
            return self.levels[(999 - c_noise).round().long()]
        t = c_noise / 999
        return torch.expm1(19.9 * t**2 / 2 + 0.1 * t).sqrt()

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None) -> Tensor:
        self.seen = c_noise
        sigma = self.sigma(c_noise)
        y = x if self.form == "ve" else x * (sigma**2 + 1).sqrt()[:, None]
        noise = (y - posterior_mean(y, torch.ones_like(sigma), sigma)) / sigma[:, None]
        return torch.cat([-noise if self.form == "ve" else noise, torch.full_like(x, 1e9)], 1)


@pytest.mark.parametrize("form", ["vp", "ve", "iddpm"])
def test_older_preconditionings_are_the_posterior_mean(form: Form) -> None:
    levels = torch.from_numpy(iddpm_levels()).double()
    denoiser = EpsPreconditioned(Noise(form, levels), form, (2,), sigma_min=0.01).double()
    sigma = levels[[990, 950, 700, 500, 200, 60]] if form == "iddpm" else f64(*SIGMAS)
    x = 2 * torch.randn(6, 2, dtype=torch.float64)
    expected = posterior_mean(x, torch.ones(6, dtype=torch.float64), sigma)
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=0, atol=1e-6 if form == "iddpm" else 1e-9)
    one = denoiser(x, sigma[3])
    torch.testing.assert_close(one[3], denoiser(x, sigma)[3], rtol=1e-12, atol=1e-12)


def test_noise_inputs_of_older_preconditionings() -> None:
    x = torch.zeros(2, 2)
    vp, ve, iddpm = (EpsPreconditioned(nn.Identity(), form, (2,)) for form in ("vp", "ve", "iddpm"))
    sigma = torch.tensor([0.002, 80.0])
    assert vp.c_noise(sigma, x)[0].item() == pytest.approx(
        0.0403283, abs=1e-6
    )  # with float32's rounding of 1 + sigma^2
    torch.testing.assert_close(ve.c_noise(sigma, x), torch.tensor([math.log(0.001), math.log(40)]))
    assert iddpm.c_noise(sigma, x).tolist() == [-1.0, 991.0]
    assert iddpm.levels[8].item() == pytest.approx(80.2037, abs=1e-3)


def test_levels_of_iddpm() -> None:
    levels = iddpm_levels()
    assert levels.shape == (1001,) and levels.dtype == "float32" and (levels[1:] < levels[:-1]).all()
    landmarks = {
        0: 20291.171875, 1: 641.662415, 10: 64.161102, 100: 6.36459303, 500: 1.01238942, 900: 0.169435710,
        990: 0.0251310728, 998: 0.00934774894, 999: 0.00642233714, 1000: 0.0,
    }  # fmt: skip
    for j, value in landmarks.items():
        assert levels[j] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"form": "edm"}, {"steps": 1}, {"steps": 10**9}, {"beta_d": 0.0}, {"beta_min": math.inf}]
)
def test_bad_facts_of_older_preconditionings(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^(form|steps|beta_d): must"):
        EpsPreconditioned(nn.Identity(), **({"form": "iddpm", "shape": (2,)} | wrong))


def test_score_and_noise_follow_from_the_clean_estimate() -> None:
    denoiser = Preconditioned(Bump(), (2,))
    x, sigma = torch.randn(3, 2, dtype=torch.float64), f64(0.2, 1, 7)
    clean = denoiser(x, sigma)
    torch.testing.assert_close(score(denoiser, x, sigma), (clean - x) / sigma[:, None] ** 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(eps(denoiser, x, sigma), (x - clean) / sigma[:, None], rtol=1e-14, atol=0)
    torch.testing.assert_close(x, clean + sigma[:, None] * eps(denoiser, x, sigma), rtol=1e-14, atol=0)


def test_expand() -> None:
    x = torch.zeros(3, 1, 4, 4)
    assert expand(f64(1, 2, 3), x).shape == (3, 1, 1, 1) and expand(f64(1, 2, 3), x).dtype == torch.float32
    assert expand(torch.tensor(2.0), x).shape == (1, 1, 1, 1)


# Guidance -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("sigma", [f64(0.1, 1, 4), torch.tensor(0.7, dtype=torch.float64)], ids=["levels", "level"])
def test_guidance_extrapolates_from_no_label(scale: float, sigma: Tensor) -> None:
    inner = Labelled()
    x, cond = torch.randn(3, 2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    with_label, without = inner(x, sigma, cond), inner(x, sigma, None)
    assert torch.equal(without, inner(x, sigma, torch.zeros_like(cond)))
    guided = Guided(inner, scale)
    torch.testing.assert_close(guided(x, sigma, cond), (1 - scale) * without + scale * with_label, rtol=1e-13, atol=0)
    torch.testing.assert_close(guided(x, sigma), without, rtol=1e-14, atol=0)
    if scale == 1:
        inner.batches.clear()
        assert torch.equal(guided(x, sigma, cond), with_label)
        assert inner.batches == [3]


def test_guided_denoiser_keeps_its_facts() -> None:
    guided = Guided(Labelled(), 2)
    assert (guided.shape, guided.classes, guided.sigma_data) == ((2,), 3, 0.5)
    assert (guided.sigma_min, guided.sigma_max) == (0.01, 50.0)
    assert type(guided.scale) is float


def test_guidance_needs_labels_and_a_finite_scale() -> None:
    with pytest.raises(ValueError, match="guidance"):
        Guided(Preconditioned(Recorder(), (2,)), 2)
    for scale in (math.inf, math.nan):
        with pytest.raises(ValueError, match=r"guidance\.scale"):
            Guided(Labelled(), scale)


# Labels and facts -----------------------------------------------------------------------------------------------------


def test_labels() -> None:
    x = torch.zeros(3, 2, dtype=torch.float64)
    plain, labelled = Preconditioned(Recorder(), (2,)), Labelled()
    assert plain.labels(None, x) is None
    with pytest.raises(ValueError, match=r"cond.*unconditional"):
        plain(x, f64(1), torch.ones(3, 1))
    rows = labelled.labels(None, x)
    assert rows is not None and rows.shape == (3, 3) and not rows.any() and rows.dtype == torch.float64
    rows = labelled.labels(torch.eye(3), x)
    assert rows is not None and rows.dtype == torch.float64 and torch.equal(rows, torch.eye(3, dtype=torch.float64))
    for shape in ((3, 2), (2, 3), (3,), (3, 3, 1)):
        with pytest.raises(ValueError, match="cond"):
            labelled(x, f64(1), torch.ones(shape))


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("sigma_data", {"sigma_data": 0.0}),
        ("sigma_data", {"sigma_data": -1.0}),
        ("sigma_data", {"sigma_data": math.nan}),
        ("sigma_data", {"sigma_data": math.inf}),
        ("sigma_min", {"sigma_min": -0.1}),
        ("sigma_min", {"sigma_min": 2.0, "sigma_max": 2.0}),
        ("sigma_max", {"sigma_max": math.nan}),
    ],
)
def test_bad_facts(field: str, arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=field):
        Preconditioned(Recorder(), (2,), **arguments)  # type: ignore[arg-type]


def test_unit_is_twice_the_scale_of_the_data() -> None:
    assert Preconditioned(Recorder(), (2,), sigma_data=0.5).unit == 1
    assert Preconditioned(Recorder(), (2,), sigma_data=1.7).unit == 3.4
