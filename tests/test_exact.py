"""Exact denoisers against Tweedie's formula, quadrature and naive sums."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.exact import Empirical, Gaussian, Mixture

Law = Gaussian | Mixture | Empirical
SIGMAS = (0.02, 0.1, 0.7, 3.0, 25.0)


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LAWS: dict[str, Callable[[], Law]] = {
    "gaussian": lambda: Gaussian(f64([1.0, -2.0, 0.0]), f64([0.3, 1.0, 2.0])),
    "gaussian_line": lambda: Gaussian(0.4, 0.2),
    "mixture": lambda: Mixture([1, 3, 2], normal(3, 3), f64([0.2, 0.5, 1.0])),
    "mixture_image": lambda: Mixture([0.5, 0.5], normal(2, 1, 2, 2), 0.3),
    "empirical": lambda: Empirical(normal(20, 3)),
    "empirical_image": lambda: Empirical(normal(9, 1, 2, 2)),
}
every_law = pytest.mark.parametrize("build", LAWS.values(), ids=LAWS)
LINE = Mixture([0.4, 0.6], [[-1.0], [0.5]], [0.2, 0.3])


def around(law: Law, n: int, sigma: float) -> Tensor:
    """Points at which the noised law has its mass."""
    rng = torch.Generator().manual_seed(7)
    return law.sample(n, rng).double() + sigma * normal(n, *law.shape, seed=3)


# Tweedie --------------------------------------------------------------------------------------------------------------


@every_law
@pytest.mark.parametrize("value", SIGMAS)
def test_denoiser_and_density_agree(build: Callable[[], Law], value: float) -> None:
    """D(x; sigma) = x + sigma^2 grad log p_sigma(x), the gradient by autograd."""
    law, sigma = build(), f64(value)
    x = around(law, 16, value).requires_grad_()
    (slope,) = torch.autograd.grad(law.log_prob(x, sigma).sum(), x)
    assert (law(x, sigma) - (x + sigma**2 * slope)).abs().max() <= 1e-10
    torch.testing.assert_close(law.score(x, sigma), slope, rtol=1e-9, atol=1e-9)


@every_law
def test_levels_may_differ_within_a_batch(build: Callable[[], Law]) -> None:
    law, sigma = build(), f64(SIGMAS)
    x = normal(len(SIGMAS), *law.shape)
    together = law(x, sigma), law.score(x, sigma), law.log_prob(x, sigma)
    for i in range(len(SIGMAS)):
        one = slice(i, i + 1)
        alone = law(x[one], sigma[i]), law.score(x[one], sigma[i]), law.log_prob(x[one], sigma[i])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[one], b, rtol=1e-12, atol=1e-12)


@every_law
@pytest.mark.parametrize("value", [0.1])
def test_a_level_given_as_a_number_keeps_its_digits(build: Callable[[], Law], value: float) -> None:
    law = build()
    x = around(law, 8, value)
    torch.testing.assert_close(law.log_prob(x, value), law.log_prob(x, f64(value)), rtol=1e-13, atol=1e-13)


# Against other ways of computing --------------------------------------------------------------------------------------


def test_gaussian_closed_forms() -> None:
    law = Gaussian(f64([1.0, -2.0]), f64([0.3, 2.0]))
    x, s = f64([[0.5, 4.0]]), 0.4
    expected = [1 + 0.09 / (0.09 + 0.16) * -0.5, -2 + 4 / 4.16 * 6]
    torch.testing.assert_close(law(x, f64(s)), f64([expected]), rtol=1e-14, atol=0)
    log_density = -0.5 * (0.25 / 0.25 + math.log(2 * math.pi * 0.25) + 36 / 4.16 + math.log(2 * math.pi * 4.16))
    assert law.log_prob(x, f64(s)).item() == pytest.approx(log_density, rel=1e-14)
    at_zero = -0.5 * (0.25 / 0.09 + math.log(2 * math.pi * 0.09) + 36 / 4 + math.log(2 * math.pi * 4))
    assert law.log_prob(x).item() == pytest.approx(at_zero, rel=1e-14)


def test_gaussian_is_the_mixture_of_one() -> None:
    gaussian, mixture = Gaussian(f64([1.0, -2.0]), 0.3), Mixture([5.0], f64([[1.0, -2.0]]), 0.3)
    x, sigma = normal(6, 2), f64(0.8)
    torch.testing.assert_close(gaussian(x, sigma), mixture(x, sigma), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gaussian.log_prob(x, sigma), mixture.log_prob(x, sigma), rtol=1e-13, atol=1e-13)
    assert gaussian.sigma_data == pytest.approx(mixture.sigma_data, rel=1e-14)


def line_density(x: np.ndarray) -> np.ndarray:
    """0.4 N(-1, 0.2^2) + 0.6 N(0.5, 0.3^2), written out."""
    parts = [w / s * np.exp(-((x - m) ** 2) / (2 * s * s)) for w, m, s in ((0.4, -1, 0.2), (0.6, 0.5, 0.3))]
    return sum(parts) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 10.0])
def test_mixture_by_quadrature(sigma: float) -> None:
    """Posterior mean and noised density as integrals over x_0; the trapezium rule is spectral for such integrands."""
    grid, step = np.linspace(-4, 4, 20001, retstep=True)
    x = np.linspace(-1.8, 1.8, 13) * math.hypot(1, sigma)
    kernel = np.exp(-((x[:, None] - grid) ** 2) / (2 * sigma**2)) / math.sqrt(2 * math.pi * sigma**2)
    joint = kernel * line_density(grid)
    density = joint.sum(1) * step
    mean = (joint * grid).sum(1) * step / density
    points = torch.from_numpy(x)[:, None]
    np.testing.assert_allclose(LINE(points, f64(sigma))[:, 0].numpy(), mean, rtol=0, atol=1e-11)
    np.testing.assert_allclose(LINE.log_prob(points, f64(sigma)).numpy(), np.log(density), rtol=0, atol=1e-11)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 4.0])
def test_densities_integrate_to_1(sigma: float) -> None:
    x = torch.linspace(-40, 40, 80001, dtype=torch.float64)[:, None]
    laws: list[Law] = [LINE, Gaussian(0.3, 0.4)]
    if sigma:
        laws.append(Empirical(f64([[-1.0], [0.2], [0.25]])))
    for law in laws:
        assert law.log_prob(x, f64(sigma)).exp().sum().item() * 1e-3 == pytest.approx(1, abs=1e-12)


def naive(points: Tensor, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Posterior mean and log density from all differences at once, in float64."""
    gaps = x.double().flatten(1)[:, None] - points.double().flatten(1)
    logits = -gaps.square().sum(2) / (2 * sigma**2)
    d = gaps.shape[2]
    density = torch.logsumexp(logits, 1) - math.log(len(points)) - d * math.log(sigma * math.sqrt(2 * math.pi))
    return (torch.softmax(logits, 1) @ points.double().flatten(1)).reshape(x.shape), density


@pytest.mark.parametrize("chunk", [1, 7, 40, 41, 1000])
@pytest.mark.parametrize("sigma", [0.01, 0.3, 20.0])
def test_chunks_do_not_show(chunk: int, sigma: float) -> None:
    # the points come nearer from chunk to chunk, so that the running maximum is replaced again and again
    points = normal(41, 3) * torch.linspace(30, 0.5, 41, dtype=torch.float64)[:, None]
    law = Empirical(points)
    law.chunk = chunk
    x = torch.cat([normal(5, 3, seed=1), points[[0, 20, 40]] + 0.01])
    mean, density = naive(points, x, sigma)
    torch.testing.assert_close(law(x, f64(sigma)), mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(law.log_prob(x, f64(sigma)), density, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.002, 0.05])
def test_images_in_float32_at_the_lowest_level(sigma: float) -> None:
    """|x - p|^2 is a small rest of terms of about 300, where a float32 sum would be off by more than the answer."""
    rng = torch.Generator().manual_seed(0)
    centre = 2 * torch.rand(1, 1, 28, 28, generator=rng) - 1
    # neighbours at distances of about sigma, so that several points share the posterior
    points = centre + sigma * torch.randn(300, 1, 28, 28, generator=rng) / 28
    x = centre + sigma * torch.randn(8, 1, 28, 28, generator=rng)
    law = Empirical(points)
    law.chunk = 64
    assert points.dtype == x.dtype == torch.float32
    mean, _ = naive(points, x, sigma)
    squares = (x.double().flatten(1)[:, None] - points.double().flatten(1)).square().sum(2)
    assert torch.softmax(-squares / (2 * sigma**2), 1).max() < 0.9  # the posterior is no mere nearest neighbour
    out = law(x, torch.tensor(sigma))
    assert out.dtype == torch.float32
    assert (out.double() - mean).abs().max() <= 2e-7
    noise = (x.double() - out.double()) / sigma
    torch.testing.assert_close(noise, (x.double() - mean) / sigma, rtol=0, atol=2e-7 / sigma)


def test_far_away_the_nearest_point_wins_without_overflow() -> None:
    law = Empirical(f64([[0.0, 0.0], [1.0, 0.0]]))
    x = f64([[1e4, 0.0], [-1e4, 0.0]])
    torch.testing.assert_close(law(x, f64(1e-3)), f64([[1.0, 0.0], [0.0, 0.0]]))
    assert torch.isfinite(law.log_prob(x, f64(1e-3))).all()
    assert torch.isfinite(LINE(f64([[1e4]]), f64(1e-3))).all()


class Sizes(TorchDispatchMode):
    """Notes the bytes of every tensor that an operation makes anew, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in held:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_no_distance_matrix_of_the_whole_set() -> None:
    n, d, batch, chunk = 4000, 6, 50, 100
    law = Empirical(normal(n, d))
    law.chunk = chunk
    with Sizes() as sizes:
        law(normal(batch, d), f64(0.1))
        law.log_prob(normal(batch, d), f64(0.1))
    # a chunk's distances (B, chunk) or squares (chunk, d) are made; (B, n) and (n, d) never
    assert sizes.largest == 8 * chunk * batch
    # with the default chunk, a batch of 64 against 60,000 images of 784 pixels works in pieces of 51 MB
    assert max(Empirical.chunk * 64, Empirical.chunk * 784) * 8 < 100e6


# Samples --------------------------------------------------------------------------------------------------------------


@every_law
def test_sample_moments(build: Callable[[], Law]) -> None:
    law, n = build(), 40_000
    x = law.sample(n, torch.Generator().manual_seed(0)).double()
    assert x.shape == (n, *law.shape)
    if isinstance(law, Gaussian):
        mean, square = law.mean, law.mean**2 + law.std**2
    elif isinstance(law, Mixture):
        w = law.weights.reshape(-1, *(1,) * len(law.shape))
        mean = (w * law.means).sum(0)
        square = (w * (law.means**2 + law.stds.reshape(w.shape) ** 2)).sum(0)
    else:
        mean, square = law.points.mean(0), law.points.pow(2).mean(0)
    for power, moment in ((1, mean), (2, square)):
        values = x**power
        assert ((values.mean(0) - moment).abs() <= 4.5 * values.std(0) / math.sqrt(n)).all()
    assert square.mean().sqrt().item() == pytest.approx(law.sigma_data, rel=1e-12)


def test_mixture_samples_follow_the_weights() -> None:
    law = Mixture([1, 3, 2], [[0.0], [10.0], [20.0]], [0.1, 0.2, 0.4])
    x = law.sample(60_000, torch.Generator().manual_seed(0)).double()[:, 0]
    for k, (share, std) in enumerate(zip((1 / 6, 3 / 6, 2 / 6), (0.1, 0.2, 0.4), strict=True)):
        mine = x[(x - 10 * k).abs() < 5]
        assert abs(len(mine) / len(x) - share) < 4.5 * math.sqrt(share * (1 - share) / len(x))
        assert mine.std().item() == pytest.approx(std, rel=4.5 / math.sqrt(2 * len(mine)))


def test_empirical_samples_are_points() -> None:
    points = normal(5, 2)
    x = Empirical(points).sample(10_000, torch.Generator().manual_seed(0))
    match = (x[:, None] == points).all(2)
    assert (match.sum(1) == 1).all()
    assert ((match.double().mean(0) - 0.2).abs() < 4.5 * math.sqrt(0.16 / 10_000)).all()


@every_law
def test_samples_come_from_the_given_generator_alone(build: Callable[[], Law]) -> None:
    law, before = build(), torch.get_rng_state()
    one, other = (law.sample(50, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, law.sample(50, torch.Generator().manual_seed(5)))
    assert torch.equal(torch.get_rng_state(), before)


# Types and facts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    laws: list[Law] = [
        Gaussian(torch.zeros(2, dtype=dtype), 1.0),
        Gaussian([0.0, 0.0], torch.ones(2, dtype=dtype)),
        Mixture([1], torch.zeros(1, 2, dtype=dtype), 1.0),
        Mixture([1], [[0.0, 0.0]], torch.ones(1, dtype=dtype)),
        Empirical(torch.ones(3, 2, dtype=dtype)),
    ]
    for law in laws:
        assert law.sample(2).dtype == dtype
        assert all(buffer.dtype == torch.float64 for buffer in law.buffers())
        for kind in (torch.float32, torch.float64):
            x = torch.zeros(2, 2, dtype=kind)
            for level in (torch.tensor(1.0), f64(1.0)):
                results = law(x, level), law.score(x, level), law.log_prob(x, level)
                assert all(result.dtype == kind for result in results)


def test_numbers_make_samples_of_the_default_dtype() -> None:
    laws: list[Law] = [
        Gaussian(0, 1),
        Mixture([1], [[0.0]], 1.0),
        Empirical([[0.0], [1.0]]),
        Empirical(torch.eye(3).long()),
    ]
    for law in laws:
        assert law.sample(2).dtype == torch.get_default_dtype()


def test_float32_results_are_float64_ones_rounded() -> None:
    for build in LAWS.values():
        law = build()
        x = around(law, 10, 0.5).float()
        exact = law(x.double(), f64(0.5))
        torch.testing.assert_close(law(x, torch.tensor(0.5)).double(), exact, rtol=3e-6, atol=3e-6)


def test_facts() -> None:
    assert Gaussian(1.0, 0.5).sigma_data == pytest.approx(math.sqrt(1.25), rel=1e-15)
    assert LINE.sigma_data == pytest.approx(math.sqrt(0.4 * 1.04 + 0.6 * 0.34), rel=1e-15)
    assert Empirical([[3.0], [4.0]]).sigma_data == pytest.approx(math.sqrt(12.5), rel=1e-15)
    for law, shape in ((Gaussian(0, 1), (1,)), (Gaussian(torch.zeros(2, 3), 1), (2, 3)), (LINE, (1,))):
        assert law.shape == shape and law.classes == 0
        assert law.sigma_min == 0 and law.sigma_max == math.inf
        assert not list(law.parameters())
    assert Mixture([2, 6], [[0.0], [1.0]], 0.5).weights.tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: Gaussian(math.nan, 1), "mean"),
        (lambda: Gaussian(0, math.inf), "std"),
        (lambda: Gaussian(0, 0), "std"),
        (lambda: Gaussian(0, -1), "std"),
        (lambda: Gaussian([0.0, 0.0], [1.0, 0.0]), "std"),
        (lambda: Gaussian([0.0, 0.0, 0.0], [1.0, 1.0]), "std"),
        (lambda: Mixture([1, 1], [[0.0]], 1), "weights"),
        (lambda: Mixture([1], [[0.0], [1.0]], 1), "weights"),
        (lambda: Mixture([1, 1], [[0.0], [1.0]], [1]), "stds"),
        (lambda: Mixture([1, 0], [[0.0], [1.0]], 1), "weights"),
        (lambda: Mixture([1, -1], [[0.0], [1.0]], 1), "weights"),
        (lambda: Mixture([1, math.nan], [[0.0], [1.0]], 1), "weights"),
        (lambda: Mixture([1], [[math.inf]], 1), "means"),
        (lambda: Mixture([1], [0.0], 1), "means"),
        (lambda: Mixture([], torch.zeros(0, 2), 1), "means"),
        (lambda: Mixture([1], [[0.0]], 0), "stds"),
        (lambda: Mixture([1], [[0.0]], [math.nan]), "stds"),
        (lambda: Empirical([1.0, 2.0]), "points"),
        (lambda: Empirical(torch.zeros(0, 2)), "points"),
        (lambda: Empirical([[math.nan]]), "points"),
    ],
)
def test_bad_input_names_the_field(build: Callable[[], Law], field: str) -> None:
    with pytest.raises(ValueError, match=field) as error:
        build()
    assert "\n" not in str(error.value)


def test_points_have_no_density_without_noise() -> None:
    law = Empirical(normal(3, 2))
    for level in (0.0, -1.0, f64([1.0, 0.0]), math.nan):
        with pytest.raises(ValueError, match=r"^sigma: "):
            law.log_prob(normal(2, 2), level)


@every_law
def test_exact_laws_take_no_labels(build: Callable[[], Law]) -> None:
    law = build()
    with pytest.raises(ValueError, match="cond"):
        law(normal(2, *law.shape), f64(1.0), torch.ones(2, 1))
