"""Samplers against the ODE path of a Gaussian law in closed form, and against a recorded run of EDM's own code."""

import json
import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from limbeck.denoiser import Denoiser, Preconditioned
from limbeck.exact import Gaussian
from limbeck.networks.songunet import SongUNet
from limbeck.noise import Karras, LogUniform
from limbeck.sample import ancestral, euler, heun

GOLDEN = Path(os.environ.get("LIMBECK_GOLDEN", "golden"))
MEAN, STD = 0.3, 0.5
LAW = Gaussian(MEAN, STD)
KARRAS = Karras()
Sampler = Callable[..., Tensor]


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_path(z: Tensor, start: float, sigma: Tensor) -> Tensor:
    """x(sigma) = m + (x(T) - m) sqrt((s^2 + sigma^2) / (s^2 + T^2)), the probability-flow path of N(m, s^2)."""
    return MEAN + (start * z - MEAN) * torch.sqrt((STD**2 + sigma**2) / (STD**2 + start**2))


class Counting(Denoiser):
    """Passes calls on and notes them."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.shape, inner.classes, inner.sigma_data, inner.sigma_min, inner.sigma_max)
        self.inner = inner
        self.sigmas: list[float] = []
        self.seen: list[tuple[torch.dtype, torch.dtype]] = []
        self.conds: list[Tensor | None] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        self.sigmas.append(sigma.item())
        self.seen.append((x.dtype, sigma.dtype))
        self.conds.append(cond)
        return self.inner(x, sigma, cond)


class Ranged(Denoiser):
    """The Gaussian's denoiser with a range of trusted levels and labels that it ignores."""

    def __init__(self, low: float, high: float, sigma_data: float = 0.5, classes: int = 0) -> None:
        super().__init__((1,), classes, sigma_data, low, high)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return LAW(x, sigma)


# Accuracy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "order"), [(heun, 2.0), (euler, 1.0)])
def test_order_of_convergence(sampler: Sampler, order: float) -> None:
    z = normal(16, 1)
    truth = exact_path(z, 80.0, f64(0.002))
    counts = (40, 80, 160, 320)
    errors = [(sampler(LAW, z, sigmas=KARRAS.grid(n)[:-1]) - truth).abs().max().item() for n in counts]
    slope = np.polyfit(np.log([n - 1 for n in counts]), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.1)


def test_the_whole_path_follows_the_ode() -> None:
    z, grid = normal(8, 1), KARRAS.grid(200)[:-1]
    walk = heun(LAW, z, sigmas=grid, path=True)
    assert (walk - exact_path(z, 80.0, grid[:, None, None])).abs().max() < 2e-3
    walk = heun(LAW, z, sigmas=KARRAS.grid(2000)[:-1], path=True)
    assert (walk - exact_path(z, 80.0, KARRAS.grid(2000)[:-1, None, None])).abs().max() < 2e-5


def test_euler_takes_the_tangent() -> None:
    z, grid = normal(5, 1), f64([10.0, 3.0, 0.5, 0.0])
    walk = euler(LAW, z, sigmas=grid, path=True)
    x = 10 * z
    for (t, s), point in zip(pairwise(grid), walk[1:], strict=True):
        x = x + (s - t) * (x - LAW(x, t)) / t
        torch.testing.assert_close(point, x, rtol=1e-13, atol=1e-13)
    # the last step lands on the clean estimate
    torch.testing.assert_close(walk[-1], LAW(walk[-2], grid[-2]), rtol=1e-14, atol=1e-14)


def test_heun_takes_the_mean_of_two_slopes_and_the_last_tangent() -> None:
    z, grid = normal(5, 1), f64([10.0, 3.0, 0.5, 0.0])
    walk = heun(LAW, z, sigmas=grid, path=True)
    x = 10 * z
    for i, (t, s) in enumerate(pairwise(grid.tolist())):
        slope = (x - LAW(x, f64(t))) / t
        ahead = x + (s - t) * slope
        if s:
            slope = 0.5 * (slope + (ahead - LAW(ahead, f64(s))) / s)
        x = x + (s - t) * slope
        torch.testing.assert_close(walk[i + 1], x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(walk[-1], LAW(walk[-2], grid[-2]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", [heun, euler])
def test_path(sampler: Sampler) -> None:
    z = normal(3, 1)
    walk = sampler(LAW, z, 6, KARRAS, path=True)
    assert walk.shape == (7, 3, 1)
    torch.testing.assert_close(walk[0], 80 * z, rtol=1e-12, atol=0)
    assert torch.equal(walk[-1], sampler(LAW, z, 6, KARRAS))


# Calls ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 7, 18])
def test_number_of_calls(steps: int) -> None:
    z = normal(2, 1)
    for sampler, calls in ((heun, 2 * steps - 1), (euler, steps), (ancestral, steps)):
        denoiser = Counting(LAW)
        sampler(denoiser, z, steps, Karras())
        assert len(denoiser.sigmas) == calls
        # without a last step to 0 Heun corrects every step
        denoiser = Counting(LAW)
        sampler(denoiser, z, sigmas=KARRAS.grid(steps)[:-1])
        assert len(denoiser.sigmas) == (2 * (steps - 1) if sampler is heun else steps - 1)


def test_levels_of_the_calls() -> None:
    denoiser, grid = Counting(LAW), KARRAS.grid(4)
    heun(denoiser, normal(2, 1), 4, KARRAS)
    assert denoiser.sigmas == [grid[i].item() for i in (0, 1, 1, 2, 2, 3, 3)]
    denoiser = Counting(LAW)
    euler(denoiser, normal(2, 1), 4, LogUniform(0.1, 10))
    assert denoiser.sigmas == pytest.approx([10, 10 ** (1 / 3), 10 ** (-1 / 3), 0.1], rel=1e-12)


@pytest.mark.parametrize("sampler", [heun, euler, ancestral])
def test_state_in_float64_and_calls_in_the_type_of_z(sampler: Sampler) -> None:
    z, denoiser = normal(64, 1), Counting(LAW)
    rng = (torch.Generator().manual_seed(0) for _ in range(2))
    extra = [{"generator": g} if sampler is ancestral else {} for g in rng]
    low = sampler(denoiser, z.float(), 200, **extra[0])
    assert low.dtype == torch.float32
    assert set(denoiser.seen) == {(torch.float32, torch.float32)}
    # float32 only ever rounds the clean estimate: a float32 state would lose about 1e-5 from 80 down to 0
    high = sampler(LAW, z.float().double(), 200, **extra[1])
    assert (low.double() - high).abs().max() < 1e-6


@pytest.mark.parametrize("sampler", [heun, euler, ancestral])
def test_default_levels(sampler: Sampler) -> None:
    z = normal(2, 1)
    for denoiser, high, low in (
        (Ranged(0, math.inf), 80.0, 0.002),
        (Ranged(0, math.inf, sigma_data=1.5), 240.0, 0.006),
        (Ranged(0.01, 20.0), 20.0, 0.01),
        (Ranged(0.01, 20.0, sigma_data=50.0), 20.0, 0.2),
    ):
        counting = Counting(denoiser)
        sampler(counting, z, 5)
        assert counting.sigmas[0] == pytest.approx(high, rel=1e-12)
        assert counting.sigmas[-1] == pytest.approx(low, rel=1e-12)


@pytest.mark.parametrize("sampler", [heun, euler, ancestral])
def test_labels_reach_every_call(sampler: Sampler) -> None:
    cond, denoiser = torch.eye(2, dtype=torch.float64), Counting(Ranged(0, math.inf, classes=2))
    sampler(denoiser, normal(2, 1), 3, cond=cond)
    assert denoiser.conds and all(c is not None and torch.equal(c, cond) for c in denoiser.conds)


@pytest.mark.parametrize(
    "sigmas",
    [
        [1.0, 2.0],
        [2.0, 1.0, 1.0],
        [1.0],
        [],
        [[2.0, 1.0]],
        [2.0, math.nan, 0.0],
        [2.0, 1.0, -0.5],
        [0.0, -1.0],
        [math.inf, 1.0, 0.0],
    ],
)
def test_bad_levels(sigmas: list[float]) -> None:
    for sampler in (heun, euler, ancestral):
        with pytest.raises(ValueError, match="sigmas"):
            sampler(LAW, normal(2, 1), sigmas=f64(sigmas))


def test_too_few_steps() -> None:
    with pytest.raises(ValueError, match="steps"):
        heun(LAW, normal(2, 1), 1)


# Ancestral ------------------------------------------------------------------------------------------------------------


def ancestral_moments(grid: Tensor) -> tuple[float, float]:
    """Mean and variance of the end of the chain, which is linear in its noise for a Gaussian law."""
    mean, variance = 0.0, grid[0].item() ** 2
    for t, s in pairwise(grid.tolist()):
        shrink, keep = STD**2 / (STD**2 + t**2), (s / t) ** 2
        slope = keep + (1 - keep) * shrink
        mean = slope * mean + (1 - keep) * (1 - shrink) * MEAN
        variance = slope**2 * variance + s**2 * (t**2 - s**2) / t**2
    return mean, variance


def test_ancestral_chain_approaches_the_law() -> None:
    errors = []
    for steps in (100, 200, 400, 3200):
        mean, variance = ancestral_moments(KARRAS.grid(steps))
        assert mean == pytest.approx(MEAN, abs=1e-3)
        errors.append(1 - variance / STD**2)
    assert all(1.8 < a / b < 2.2 for a, b in pairwise(errors[:3]))
    assert 0 < errors[-1] < 0.005


@pytest.mark.parametrize("steps", [10, 1500])
def test_ancestral_sampler_is_that_chain(steps: int) -> None:
    n = 40_000
    z = normal(n, 1, seed=1)
    x = ancestral(LAW, z, steps, KARRAS, generator=torch.Generator().manual_seed(2))
    mean, variance = ancestral_moments(KARRAS.grid(steps))
    assert abs(x.mean().item() - mean) < 4.5 * math.sqrt(variance / n)
    assert abs(x.var().item() / variance - 1) < 4.5 * math.sqrt(2 / n)
    if steps == 1500:  # where the chain has come within 1 % of the law's variance
        assert abs(x.mean().item() - MEAN) < 4.5 * STD / math.sqrt(n)
        assert abs(x.var().item() / STD**2 - 1) < 0.01 + 4.5 * math.sqrt(2 / n)


def test_ancestral_draws_from_the_given_generator_alone() -> None:
    z, before = normal(4, 1), torch.get_rng_state()
    runs = [ancestral(LAW, z, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), before)


# EDM's own run --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_recorded_run_of_edm() -> None:
    if not GOLDEN.is_dir():
        pytest.skip("LIMBECK_GOLDEN does not name the folder of golden files of the EDM networks")
    path = GOLDEN / "edm_ddpmpp_uncond_aug.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    arguments = json.loads(metadata["kwargs"])
    assert arguments.pop("model_type") == "SongUNet"
    channels = arguments.pop("img_channels")
    network = SongUNet(in_channels=channels, out_channels=channels, **arguments)
    prefix = "state.model."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    size = arguments["img_resolution"]
    denoiser = Counting(Preconditioned(network.eval(), (channels, size, size), noise_unit=1))
    # float32 latents, float64 state, as the recorded run
    y = heun(denoiser, tensors["sampler_latents"], int(metadata["sampler_num_steps"]))
    assert denoiser.sigmas == pytest.approx(tensors["sampler_sigma_calls"].tolist(), rel=1e-6)
    expected = tensors["sampler_y"]
    error = (y.double() - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1)
    assert error.max() <= 1e-5
