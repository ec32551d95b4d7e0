"""Noise laws against closed forms, and the two grids of the literature to the digits in which they are known."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.noise import Karras, Levels, LogNormal, LogUniform, Power

LAWS: dict[str, Levels] = {
    "karras": Karras(),
    "sid": Karras(stop=0.8),
    "lognormal": LogNormal(),
    "loguniform": LogUniform(0.02, 100.0),
    "power": Power(0.1, 20.0, 2.5),
}
EDM_18 = (
    80, 57.586, 40.7856, 28.3746, 19.3525, 12.9101, 8.40094, 5.31519, 3.25682, 1.92334, 1.08817, 0.585348, 0.296442,
    0.139516, 0.0599473, 0.0229345, 0.00752802, 0.002, 0,
)  # fmt: skip
# u and sigma of SiD's law of levels, an EDM grid read backwards
SID = {0: 0.002, 0.1: 0.0167, 0.2: 0.085, 0.3: 0.318, 0.4: 0.965, 0.5: 2.515, 0.6: 5.84, 0.7: 12.4, 0.8: 24.4}
probability = st.floats(0, 1)
positive = st.floats(1e-3, 1e3)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at(law: Levels, u: float) -> float:
    return law.quantile(f64(u)).item()


@st.composite
def laws(draw: Callable[[st.SearchStrategy[float]], float]) -> Levels:
    low = draw(positive)
    high = low * draw(st.floats(1.5, 1e5))
    kind = draw(st.sampled_from((0, 1, 2, 3)))
    if kind == 0:
        return Karras(low, high, draw(st.floats(0.5, 20)), draw(st.floats(0.1, 1)))
    if kind == 1:
        return LogNormal(draw(st.floats(-5, 5)), draw(st.floats(0.05, 3)))
    if kind == 2:
        return LogUniform(low, high)
    return Power(low, high, draw(st.floats(0.2, 5)))


@given(laws(), probability, probability)
def test_quantiles_increase(law: Levels, a: float, b: float) -> None:
    a, b = min(a, b), max(a, b)
    low, high = at(law, a), at(law, b)
    assert 0 < low <= high * (1 + 1e-14) < math.inf
    # far enough inside that a step of 0.01 is no matter of rounding
    if b - a > 0.01 and a > 1e-3 and b < 1 - 1e-3:
        assert low < high


@given(laws(), probability, st.floats(0.01, 100))
def test_scaled_is_the_law_of_the_scaled_level(law: Levels, u: float, factor: float) -> None:
    assert type(law.scaled(factor)) is type(law)
    assert at(law.scaled(factor), u) == pytest.approx(factor * at(law, u), rel=1e-11)


@given(laws(), st.integers(2, 60), st.sampled_from((torch.float32, torch.float64)))
def test_grids_walk_the_quantiles_down_to_0(law: Levels, steps: int, dtype: torch.dtype) -> None:
    grid = law.grid(steps)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
    expected = [at(law, 1 - i / (steps - 1)) for i in range(steps)]
    torch.testing.assert_close(grid[:-1], f64(*expected), rtol=1e-11, atol=0)
    assert grid[-1] == 0 and (grid[1:] < grid[:-1]).all()
    u = torch.linspace(0, 1, 6, dtype=dtype).reshape(2, 3)
    assert law.quantile(u).dtype == dtype and law.quantile(u).shape == (2, 3)


@pytest.mark.parametrize("steps", [1, 0, -3])
def test_a_grid_needs_two_levels(steps: int) -> None:
    with pytest.raises(ValueError, match=r"^steps: "):
        Karras().grid(steps)


# Karras ---------------------------------------------------------------------------------------------------------------


def test_grid_of_pid() -> None:
    grid = Karras().grid(250)[:-1]
    assert len(grid) == 250
    assert grid[0].item() == pytest.approx(80, rel=1e-12) and grid[-1].item() == pytest.approx(0.002, rel=1e-12)
    assert grid[1].item() == pytest.approx(78.2623394922, abs=5.1e-11)
    assert grid[2].item() == pytest.approx(76.5571312922, abs=5.1e-11)
    assert grid[-2].item() == pytest.approx(0.00220797322, abs=5.1e-12)
    assert (grid[0] / (grid[0] - grid[1])).item() == pytest.approx(46.039, abs=5e-4)
    assert (grid[-2] / (grid[-2] - grid[-1])).item() == pytest.approx(10.617, abs=5e-4)
    # how a uniform index spreads its draws
    assert (grid > 1).double().mean().item() == pytest.approx(0.596, abs=5e-4)
    assert (grid < 0.1).double().mean().item() == pytest.approx(0.212, abs=5e-4)
    assert grid.quantile(0.5).item() == pytest.approx(2.52, abs=5e-3)


def test_grid_of_edm() -> None:
    grid = Karras(0.002, 80, 7).grid(18)
    assert grid[1].item() == pytest.approx(57.58598472125, abs=5.1e-12)
    torch.testing.assert_close(grid, f64(*EDM_18), rtol=6e-6, atol=0)


def test_karras_is_the_power_law_between_its_ends() -> None:
    u, low, high, rho = 0.3, 0.01, 40.0, 3.0
    assert at(Karras(low, high, rho), u) == pytest.approx(
        (0.7 * low ** (1 / 3) + 0.3 * high ** (1 / 3)) ** 3, rel=1e-14
    )
    assert at(Karras(low, high, 1.0), u) == pytest.approx(0.7 * low + 0.3 * high, rel=1e-14)


def test_law_of_sid() -> None:
    law = LAWS["sid"]
    assert at(law, 0) == pytest.approx(0.002, rel=1e-12)
    assert at(law, 1) == pytest.approx(24.408, abs=5e-4)
    # sigma_init = 2.5 sits at u = 0.49932 of the whole grid, of which the law draws the lowest 0.8
    whole = (2.5 ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    assert whole == pytest.approx(0.49932, abs=5e-6)
    assert at(Karras(), whole) == pytest.approx(2.5, rel=1e-12)
    assert at(law, whole / 0.8) == pytest.approx(2.5, rel=1e-12)
    for u, sigma in SID.items():
        assert at(law, u / 0.8) == pytest.approx(sigma, rel=4e-3)


# The other laws -------------------------------------------------------------------------------------------------------


def test_lognormal_quantiles() -> None:
    law = LogNormal()
    assert at(law, 0.01) == pytest.approx(0.0185, abs=5e-5)
    assert at(law, 0.5) == pytest.approx(math.exp(-1.2), rel=1e-14)
    assert at(law, 0.5) == pytest.approx(0.301, abs=5e-4)
    assert at(law, 0.99) == pytest.approx(4.91, abs=5e-3)
    # the distribution function, from the error function, is the inverse
    for u in (1e-6, 0.01, 0.2, 0.5, 0.77, 0.99, 1 - 1e-6):
        normal = (math.log(at(LogNormal(0.4, 0.7), u)) - 0.4) / 0.7
        assert 0.5 * math.erfc(-normal / math.sqrt(2)) == pytest.approx(u, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lognormal_ends_stay_finite(dtype: torch.dtype) -> None:
    ends = LogNormal().quantile(torch.tensor([0.0, 1.0], dtype=dtype))
    assert torch.isfinite(ends).all() and 0 < ends[0] < 0.01 and ends[1] > 50


def test_the_lowest_uniform_draws_of_float32_keep_their_order() -> None:
    u = torch.tensor([0.0, 1e-6, 1e-5, 1e-4, 0.5, 1 - 1e-4, 1 - 1e-5], dtype=torch.float32)
    assert (LogNormal().quantile(u).diff() > 0).all()


def test_loguniform_and_power() -> None:
    assert at(LogUniform(0.02, 100), 0.5) == pytest.approx(math.sqrt(2), rel=1e-14)
    assert at(LogUniform(0.02, 100), 0) == pytest.approx(0.02) and at(LogUniform(0.02, 100), 1) == pytest.approx(100)
    assert at(Power(0.1, 20), 0.25) == pytest.approx(0.1 + 0.25 * 19.9, rel=1e-14)
    assert at(Power(0.1, 20, 2), 0.25) == pytest.approx(0.1 + 19.9 / 16, rel=1e-14)
    assert at(Power(0.1, 20, 2), 1) == pytest.approx(20, rel=1e-14)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: Karras(sigma_min=0), "sigma_min"),
        (lambda: Karras(sigma_min=-1), "sigma_min"),
        (lambda: Karras(sigma_min=80, sigma_max=80), "sigma_min"),
        (lambda: Karras(sigma_min=math.nan), "sigma_min"),
        (lambda: Karras(sigma_max=math.inf), "sigma_max"),
        (lambda: Karras(rho=0), "rho"),
        (lambda: Karras(rho=math.inf), "rho"),
        (lambda: Karras(stop=0), "stop"),
        (lambda: Karras(stop=1.01), "stop"),
        (lambda: LogNormal(std=0), "std"),
        (lambda: LogNormal(std=math.nan), "std"),
        (lambda: LogNormal(mean=math.inf), "mean"),
        (lambda: LogUniform(0.5, 0.1), "sigma_min"),
        (lambda: Power(0, 1), "sigma_min"),
        (lambda: Power(power=0), "power"),
        (lambda: Power(power=math.nan), "power"),
    ],
)
def test_bad_arguments_name_the_field(build: Callable[[], Levels], field: str) -> None:
    with pytest.raises(ValueError, match=field) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_law_cannot_be_scaled_away(law: Levels, factor: float) -> None:
    with pytest.raises(ValueError):
        law.scaled(factor)


@pytest.mark.parametrize("name", LAWS)
def test_laws_are_values(name: str) -> None:
    assert LAWS[name] == LAWS[name].scaled(2).scaled(0.5)
    with pytest.raises(AttributeError):
        LAWS[name].sigma_min = 1.0  # type: ignore[attr-defined]
