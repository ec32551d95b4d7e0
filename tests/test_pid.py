"""PID in closed form: identities of its residual, Gaussian and mixture paths, the Euler solution as its fixed point.

In units of the data: T = 80, sigma_min = 0.002, rho = 7, as everywhere in the paper.
"""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from limbeck import features
from limbeck.denoiser import Denoiser, Preconditioned, expand
from limbeck.exact import Gaussian, Mixture
from limbeck.generator import OneStep, Trajectory
from limbeck.methods.pid import PID, neighbours, pid_prediction
from limbeck.networks.mlp import MLP
from limbeck.noise import Karras
from limbeck.objective import Batch
from limbeck.optimizer import Optimizer
from limbeck.sample import euler
from limbeck.source import NoiseSource
from limbeck.train import Trainer

T, LOW = 80.0, 0.002
MIXTURE = Mixture([0.4, 0.6], [[-1.0], [0.5]], [0.2, 0.3])
STARTS = (-1.5, -0.5, -0.26, 0.0, 0.7, 2.0)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(n: int) -> Tensor:
    """t_0 = T > ... > t_{N-1} = sigma_min, as the paper's grid is written."""
    i = torch.arange(n, dtype=torch.float64)
    return (T ** (1 / 7) + i / (n - 1) * (LOW ** (1 / 7) - T ** (1 / 7))) ** 7


def every_index(n: int) -> Tensor:
    """A uniform u in the middle of every index's interval."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def partner(i: int, n: int) -> int:
    return i + 1 if i < n - 1 else n - 2


def gains(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of P = a F(s) - b F(t)."""
    return t * (1 - s / T) / (t - s), s * (1 - t / T) / (t - s)


def printed(value: float, text: str) -> None:
    """`value` rounds to the decimal number `text`, half a unit of the last digit allowed for ties."""
    mantissa, _, exponent = text.partition("e")
    digits = len(mantissa.partition(".")[2])
    assert abs(value - float(text)) <= 0.51 * 10.0 ** (int(exponent or 0) - digits), (value, text)


class Function(Denoiser):
    """A denoiser, or a student's F, given as a function of (x, sigma); calls are noted."""

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...] = (1,), **facts: Any
    ) -> None:
        super().__init__(shape, facts.pop("classes", 0), facts.pop("sigma_data", 0.5), **facts)
        self.function = function
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls.append((x, sigma, cond))
        return self.function(x, expand(sigma, x))


class Table(Denoiser):
    """A student without a network: one free value of F per grid level, the same for every latent."""

    def __init__(self, values: Tensor, levels: Tensor) -> None:
        super().__init__(tuple(values.shape[1:]), 0, 0.5)
        self.values, self.levels = nn.Parameter(values), levels

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.values[(self.levels - sigma[:, None]).abs().argmin(1)]


def players(student: Denoiser, levels: Karras | None = None, **others: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"generator": Trajectory(student, levels or Karras()), **others})


def batch_of(u: Tensor, z: Tensor, cond: Tensor | None = None) -> Batch:
    return Batch(z, u, torch.zeros_like(z), cond)


def mlp(seed: int = 0, scale: float = 0.3, dropout: float = 0.0, **changes: Any) -> MLP:
    """A small network in float64, none of whose layers is left at its zero start."""
    arguments = {"shape": (2,), "width": 16, "depth": 1} | changes
    network = MLP(**arguments, dropout=dropout).double()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
    return network


def test_dropout_is_off_where_its_difference_would_be_multiplied() -> None:
    student = Preconditioned(mlp(dropout=0.5), (2,), 0, 1.0)
    nets, rng = players(student), torch.Generator().manual_seed(1)
    feed = batch_of(
        torch.rand(8, generator=rng, dtype=torch.float64), torch.randn(8, 2, generator=rng, dtype=torch.float64)
    )
    wanted = PID().loss(nets.eval(), Gaussian([0.0, 0.0], 1.0), feed)
    assert torch.equal(PID().loss(nets.train(), Gaussian([0.0, 0.0], 1.0), feed), wanted)
    assert student.network.train()(feed.z, feed.u, None).ne(student.network(feed.z, feed.u, None)).any()


# A. Identities --------------------------------------------------------------------------------------------------------


def random_pairs(n: int = 250, width: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(F(t), F(s), t, s) over every index of the grid."""
    levels = grid(n)
    partners = [partner(i, n) for i in range(n)]
    return normal(n, width, seed=1), normal(n, width, seed=2), levels[:, None], levels[partners][:, None]


def three_lines(f_t: Tensor, f_s: Tensor, t: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """P as the authors' code forms it, from two points of the path; z has unit variance."""
    x_t, x_s = (level / T * (T * z) + (1 - level / T) * f for f, level in ((f_t, t), (f_s, s)))
    slope = (x_t - x_s) / (t - s)
    return x_t - t * slope


def test_prediction_is_the_three_line_form_for_any_start() -> None:
    f_t, f_s, t, s = random_pairs()
    p = pid_prediction(f_t, f_s, t, s, T)
    for seed in (3, 4):
        # z of size 1 / T, so that cancellation against T z does not set the tolerance
        assert (p - three_lines(f_t, f_s, t, s, normal(250, 3, seed=seed) / T)).abs().max() <= 1e-9
    assert (p - three_lines(f_t, f_s, t, s, torch.zeros(250, 3, dtype=torch.float64))).abs().max() <= 1e-12


def test_prediction_is_linear_with_gains_that_differ_by_1() -> None:
    f_t, f_s, t, s = random_pairs()
    a, b = gains(t, s)
    assert (a - b - 1).abs().max() <= 1e-11
    assert (pid_prediction(f_t, f_s, t, s, T) - (a * f_s - b * f_t)).abs().max() <= 1e-9
    # landmarks of the gain at N = 250
    printed(a[-1].item(), "-9.62")
    printed(b[-1].item(), "-10.62")
    printed(a.abs().max().item(), "30.2")
    assert abs(t[a.argmax()].item() - 10) < 1.5
    printed(a[0].item(), "1.000000000")
    printed(a[:-1].mean().item(), "21.8")
    torch.testing.assert_close(pid_prediction(f_t, f_t, t, s, T), f_t, rtol=1e-13, atol=1e-13)


def test_the_first_index_predicts_with_the_next_level_alone() -> None:
    f_t, f_s = normal(4, seed=1), normal(4, seed=2)
    t, s = f64([T]), grid(250)[1:2]
    assert (pid_prediction(f_t, f_s, t, s, T) - f_s).abs().max() <= 1e-12
    assert (pid_prediction(1e3 * f_t, f_s, t, s, T) - f_s).abs().max() <= 1e-9


def test_prediction_keeps_the_digits_that_differences_of_points_lose() -> None:
    levels, z = grid(250), f64([[1.3]])
    partners = [partner(i, 250) for i in range(250)]
    f = gaussian_student(T * z, levels[:, None])
    t, s = levels[:, None], levels[partners][:, None]
    f32 = [v.float() for v in (f, f[partners], t, s)]
    rounded = [v.double() for v in f32]
    truth = pid_prediction(*rounded, T)
    assert (pid_prediction(*f32, T).double() - truth).abs().max() < 1e-5
    assert (three_lines(*f32, z.float()).double() - truth).abs().max() > 1e-4


@pytest.mark.parametrize("n", [2, 5, 250])
def test_index_pairs(n: int) -> None:
    levels = grid(n)
    t, s = neighbours(every_index(n), levels, "flip")
    assert torch.equal(t, levels)
    assert torch.equal(s, levels[[partner(i, n) for i in range(n)]])
    t, s = neighbours(every_index(n - 1), levels, "drop")
    assert torch.equal(t, levels[:-1]) and torch.equal(s, levels[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_index_has_the_same_share_of_u(dtype: torch.dtype) -> None:
    n = 250
    u = ((torch.arange(8 * n, dtype=torch.float64) + 0.5) / (8 * n)).to(dtype)
    modes: tuple[tuple[Literal["flip", "drop"], int], ...] = (("flip", n), ("drop", n - 1))
    for last_index, kinds in modes:
        v = (
            u
            if last_index == "flip"
            else ((torch.arange(8 * kinds, dtype=torch.float64) + 0.5) / (8 * kinds)).to(dtype)
        )
        t, s = neighbours(v, grid(n), last_index)
        assert t.dtype == s.dtype == dtype
        values, counts = t.unique(return_counts=True)
        assert len(values) == kinds and (counts == 8).all()
    # the ends of [0, 1)
    ends = torch.tensor([0.0, torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(0.0)).item()], dtype=dtype)
    assert torch.equal(neighbours(ends, grid(n), "flip")[0], grid(n)[[0, n - 1]].to(dtype))
    assert torch.equal(neighbours(ends, grid(n), "drop")[0], grid(n)[[0, n - 2]].to(dtype))


class Learnable(Denoiser):
    """A teacher with a weight that a leaking graph would reach."""

    def __init__(self) -> None:
        super().__init__((3,), 0, 0.5)
        self.weight = nn.Parameter(f64([0.3, -0.8, 1.1]))

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.sin(self.weight * x) / (1 + expand(sigma, x))


@pytest.mark.parametrize("gradient", ["both", "causal"])
@pytest.mark.parametrize("index", [0, 1, 7, 16, 17])
def test_gradients_are_a_g_and_minus_b_g(index: int, gradient: Literal["both", "causal"]) -> None:
    n, teacher, z = 18, Learnable(), normal(1, 3, seed=5)
    student = Table(normal(n, 3, seed=6), Karras().grid(n)[:-1])
    loss = PID(N=n, gradient=gradient).loss(players(student), teacher, batch_of(f64([(index + 0.5) / n]), z))
    loss.sum().backward()
    assert teacher.weight.grad is None

    levels, other = grid(n), partner(index, n)
    f_t, f_s, t, s = student.values[index], student.values[other], levels[index], levels[other]
    p = three_lines(f_t, f_s, t, s, torch.zeros(3, dtype=torch.float64)).detach()
    q = teacher((t * z + (1 - t / T) * f_t).detach(), t).detach()[0]
    assert loss.item() == pytest.approx((p - q).square().mean().item(), rel=1e-9)
    g = 2 * (p - q) / 3
    a, b = gains(t, s)
    expected = torch.zeros(n, 3, dtype=torch.float64)
    expected[other] = a * g
    # had the teacher's input a gradient, this row would have a part through D(x(t), t) as well
    expected[index] = torch.zeros(3, dtype=torch.float64) if gradient == "causal" else -b * g
    assert student.values.grad is not None
    assert (student.values.grad - expected).abs().max() <= 1e-9 * (1 + a.abs().item())


# B. Finite differences ------------------------------------------------------------------------------------------------


def directional(loss: Callable[[], Tensor], parameters: list[nn.Parameter], direction: list[Tensor]) -> float:
    """Central difference of `loss` along `direction`."""
    step, ends = 1e-5, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, direction, strict=True):
                p += sign * step * d
            ends.append(loss().item())
        for p, d in zip(parameters, direction, strict=True):
            p += step * d
    return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("metric", ["l2", "huber"])
def test_autograd_is_the_difference_quotient_with_the_teacher_frozen(metric: Literal["l2", "huber"]) -> None:
    method, n = PID(N=18, metric=metric), 36
    teacher = Mixture([1, 1], [[-1.0, 0.2], [0.5, -0.4]], [0.2, 0.4])
    student = Preconditioned(mlp(), (2,), sigma_data=teacher.sigma_data)
    nets = nn.ModuleDict(method.players(student))
    batch = batch_of(every_index(n), normal(n, 2, seed=8))
    live = Function(lambda x, sigma: teacher(x, sigma), (2,), sigma_data=teacher.sigma_data)
    method.loss(nets, live, batch).sum().backward()
    q = teacher(*live.calls[0][:2])
    frozen = Function(lambda x, sigma: q, (2,), sigma_data=teacher.sigma_data)
    parameters = list(nets.parameters())
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)
        direction = [torch.randn(p.shape, generator=rng, dtype=torch.float64) for p in parameters]
        slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True) if p.grad is not None)
        surrogate = directional(lambda: method.loss(nets, frozen, batch).sum(), parameters, direction)
        assert surrogate == pytest.approx(slope, rel=1e-5)
        # a teacher whose graph leaked would make autograd agree with this one instead
        whole = directional(lambda: method.loss(nets, live, batch).sum(), parameters, direction)
        assert abs(whole - slope) > 1e-3 * abs(slope)


# C. The exact student of a Gaussian -----------------------------------------------------------------------------------

RESIDUALS = {
    18: ("2.583e-2", "6.315e-2"),
    35: ("1.246e-2", "3.197e-2"),
    70: ("6.014e-3", "1.550e-2"),
    140: ("2.954e-3", "7.585e-3"),
    250: ("1.641e-3", "4.211e-3"),
    500: ("8.163e-4", "2.093e-3"),
    1000: ("4.071e-4", "1.043e-3"),
    2000: ("2.033e-4", "5.208e-4"),
}


def gaussian_path(start: Tensor, t: Tensor, std: float = 0.5, mean: float = 0.0) -> Tensor:
    return mean + (start - mean) * torch.sqrt((std**2 + t**2) / (std**2 + T**2))


def gaussian_student(start: Tensor, t: Tensor, std: float = 0.5, mean: float = 0.0) -> Tensor:
    """F of the exact path; at t = T, where F does not matter, anything finite."""
    share = torch.where(t < T * (1 - 1e-9), 1 - t / T, 1.0)
    return (gaussian_path(start, t, std, mean) - t / T * start) / share


def residuals(n: int, metric: Literal["l2", "l1"] = "l2", std: float = 0.5, mean: float = 0.0) -> Tensor:
    """The loss of the exact student at every index, from one standard deviation of the start."""
    student = Function(lambda x, sigma: gaussian_student(T * x / sigma, sigma, std, mean))
    # the teacher states the scale 0.5, so that the loss is in absolute units
    teacher = Function(Gaussian(mean, std))
    z = torch.ones(n, 1, dtype=torch.float64)
    return PID(N=n, metric=metric).loss(players(student), teacher, batch_of(every_index(n), z))


@pytest.mark.parametrize("n", RESIDUALS)
def test_residual_of_the_exact_student(n: int) -> None:
    loss = residuals(n)
    printed(loss.mean().sqrt().item(), RESIDUALS[n][0])
    printed(loss.max().sqrt().item(), RESIDUALS[n][1])
    torch.testing.assert_close(residuals(n, "l1"), loss.sqrt(), rtol=1e-9, atol=1e-12)


def test_loss_of_the_exact_student() -> None:
    """E over z is the loss at one standard deviation, as the residual is linear in z."""
    printed(residuals(250).mean().item(), "2.693e-6")
    printed(residuals(1000).mean().item(), "1.658e-7")


def test_leading_term_of_the_residual() -> None:
    t, loss = grid(250), residuals(250)
    peak = int(loss.argmax())
    assert t[peak].item() == pytest.approx(0.64, abs=0.03)
    gap = t[peak] - t[peak + 1]
    leading = t[peak] * gap * 0.25 / (2 * (0.25 + t[peak] ** 2) ** 1.5) * T / math.sqrt(0.25 + T**2)
    printed((loss[peak].sqrt() / leading).item(), "1.03")


def test_residual_of_a_shifted_gaussian_is_of_first_order() -> None:
    coarse, fine = (residuals(n, std=0.3, mean=0.7).mean().sqrt().item() for n in (500, 1000))
    assert coarse / fine == pytest.approx(2, abs=0.05)


# D. The fixed point is Euler's solution -------------------------------------------------------------------------------

EULER = {
    18: "-0.15391", 35: "-0.08018", 70: "-0.04035", 140: "-0.02024", 250: "-0.011348", 500: "-0.0056788",
    1000: "-0.0028406",
}  # fmt: skip


def euler_path(denoiser: Denoiser, z: Tensor, n: int) -> Tensor:
    """N - 1 explicit Euler steps on the grid, written out: (N, B, 1)."""
    levels, x = grid(n).tolist(), T * z
    walk = [x]
    for t, s in pairwise(levels):
        x = x + (s - t) * (x - denoiser(x, f64(t))) / t
        walk.append(x)
    return torch.stack(walk)


def as_values(walk: Tensor, z: Tensor) -> Tensor:
    """F at every level of a path; 0 at the first, where it does not matter."""
    t = grid(len(walk))[1:, None]
    return torch.cat([torch.zeros_like(walk[:1]), (walk[1:] - t * z) / (1 - t / T)])


@pytest.mark.parametrize("n", EULER)
def test_euler_row(n: int) -> None:
    z = f64([[1.0]])
    end, exact = euler_path(Gaussian(0.0, 0.5), z, n)[-1], gaussian_path(T * z, f64(LOW))
    printed((end / exact - 1).item(), EULER[n])
    sampled = euler(Gaussian(0.0, 0.5), z, sigmas=Karras().grid(n)[:-1])
    torch.testing.assert_close(sampled, end, rtol=1e-10, atol=0)


def test_limit_of_the_euler_error() -> None:
    z = f64([[1.0]])
    errors = [
        (n - 1) * (euler_path(Gaussian(0.0, 0.5), z, n)[-1] / gaussian_path(T * z, f64(LOW)) - 1) for n in (1000, 2000)
    ]
    printed(errors[0].item(), "-2.84")
    printed((2 * errors[1] - errors[0]).item(), "-2.84")  # the limit, by Richardson


@pytest.mark.parametrize("n", [10, 50])
def test_the_euler_solution_has_no_residual_but_the_flipped_one(n: int) -> None:
    z = f64([[0.7]])
    student = Table(as_values(euler_path(MIXTURE, z, n)[:, 0], z[0]), grid(n))
    dropped = PID(N=n, last_index="drop").loss(
        players(student), MIXTURE, batch_of(every_index(n - 1), z.expand(n - 1, 1))
    )
    assert dropped.max() < 1e-20
    flipped = PID(N=n).loss(players(student), MIXTURE, batch_of(every_index(n), z.expand(n, 1)))
    assert flipped[:-1].max() < 1e-20
    assert flipped[-1] > 1e-14


def stationary_values(n: int, **fields: Any) -> Tensor:
    """F(t_1 ... t_{N-1}) at which the gradient of the Gaussian loss vanishes; that gradient is affine in F."""
    teacher, z = Gaussian(0.0, 0.5), torch.ones(n, 1, dtype=torch.float64)
    method = PID(N=n, **fields)

    def gradient(values: Tensor) -> Tensor:
        student = Table(torch.cat([f64([[0.0]]), values[:, None]]), grid(n))
        loss = method.loss(players(student), teacher, batch_of(every_index(n), z)).sum()
        (g,) = torch.autograd.grad(loss, student.values)
        return g[1:, 0]

    offset = gradient(torch.zeros(n - 1, dtype=torch.float64))
    matrix = torch.stack([gradient(row) - offset for row in torch.eye(n - 1, dtype=torch.float64)], 1)
    return torch.linalg.solve(matrix, -offset)


@pytest.mark.parametrize(("n", "shift", "digits"), [(10, 1.2e-4, 0.05e-4), (250, 8e-8, 0.5e-8)])
def test_the_flipped_residual_hardly_moves_the_fixed_point(n: int, shift: float, digits: float) -> None:
    values = stationary_values(n)
    end = LOW + (1 - LOW / T) * values[-1]
    target = euler_path(Gaussian(0.0, 0.5), f64([[1.0]]), n)[-1, 0, 0]
    assert abs((end / target - 1).item()) == pytest.approx(shift, abs=digits)


# E. A mixture ---------------------------------------------------------------------------------------------------------

PATH_ENDS = {
    250: (-1.188033, -0.844757, -0.441526, 0.207164, 0.570072, 1.025208),
    1000: (-1.191664, -0.849157, -0.483800, 0.209870, 0.572990, 1.031056),
}
EXACT_ENDS = (-1.192871, -0.850598, -0.496092, 0.210763, 0.573957, 1.033006)
LARGEST_ERRORS = {18: 0.2994, 50: 0.2207, 100: 0.1437, 250: 0.0546, 500: 0.0255, 1000: 0.0123}


@pytest.fixture(scope="module")
def exact_ends() -> np.ndarray:
    """dx / d(ln t) = x - D from T down to sigma_min."""

    def slope(log_t: float, x: np.ndarray) -> np.ndarray:
        points = torch.from_numpy(x.copy())[:, None]
        return (points - MIXTURE(points, f64(math.exp(log_t))))[:, 0].numpy()

    start = T * np.array(STARTS)
    solution = solve_ivp(slope, (math.log(T), math.log(LOW)), start, method="DOP853", rtol=1e-12, atol=1e-13)
    return np.asarray(solution.y[:, -1])


def test_exact_ends_of_the_mixture(exact_ends: np.ndarray) -> None:
    np.testing.assert_allclose(exact_ends, EXACT_ENDS, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", LARGEST_ERRORS)
def test_euler_ends_of_the_mixture(n: int, exact_ends: np.ndarray) -> None:
    ends = euler(MIXTURE, f64(STARTS)[:, None], sigmas=Karras().grid(n)[:-1])[:, 0].numpy()
    if n in PATH_ENDS:
        np.testing.assert_allclose(ends, PATH_ENDS[n], rtol=0, atol=6e-7)
    assert np.abs(ends - exact_ends).max() == pytest.approx(LARGEST_ERRORS[n], abs=1e-4)


# The path as a network ------------------------------------------------------------------------------------------------


class Spy(nn.Module):
    """Passes calls to a network on and notes them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls.append((x, noise, cond))
        out: Tensor = self.network(x, noise, cond)
        return out


def test_path_is_the_paper_s_parameterisation() -> None:
    network = mlp()
    path = Trajectory(Preconditioned(network, (2,)), Karras())
    z, t = normal(4, 2), f64([80.0, 3.0, 0.1, 0.002])
    start, c_in = T * z, 1 / math.sqrt(0.5**2 + T**2)
    printed(c_in, "0.01249976")
    share = (t / T)[:, None]
    expected = share * start + (1 - share) * network(c_in * start, t.log() / 4)
    torch.testing.assert_close(path.at(z, t), expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(path(z), path.at(z, f64(LOW)))
    torch.testing.assert_close(path(z), 2.5e-5 * start + (1 - 2.5e-5) * network(c_in * start, f64([LOW] * 4).log() / 4))


@pytest.mark.parametrize("kind", ["preconditioned", "scaled", "exact"])
def test_paths_start_at_the_noise_for_any_network(kind: str) -> None:
    denoiser = {
        "preconditioned": lambda: Preconditioned(mlp(scale=5), (2,)),
        "scaled": lambda: Preconditioned(mlp(scale=5), (2,), sigma_data=60.0),
        "exact": lambda: Mixture([1, 1], [[5.0, 5.0], [-9.0, 0.0]], 0.1),
    }[kind]()
    levels = Karras().scaled(denoiser.unit)
    z = normal(8, 2)
    assert torch.equal(Trajectory(denoiser, levels).at(z, f64(levels.sigma_max)), levels.sigma_max * z)


def test_one_call_per_sample_and_per_point() -> None:
    spy = Spy(mlp())
    path, z = Trajectory(Preconditioned(spy, (2,)), Karras()), normal(3, 2)
    path(z)
    assert len(spy.calls) == 1 and spy.calls[0][0].shape == (3, 2)
    spy.calls.clear()
    sigmas = f64([80.0, 5.0, 0.3, 0.002])
    walk = path.trajectory(z, sigmas)
    assert len(spy.calls) == 4 and walk.shape == (4, 3, 2)
    for i, sigma in enumerate(sigmas):
        assert torch.equal(walk[i], path.at(z, sigma))
        torch.testing.assert_close(walk[i], path.at(z, sigma.expand(3)), rtol=1e-14, atol=1e-14)
    assert torch.equal(walk[-1], path(z))


def test_another_template_enters_as_its_clean_estimate() -> None:
    law, z, t = Gaussian([0.3, -0.2], 0.5), normal(3, 2), f64([70.0, 2.0, 0.01])
    path = Trajectory(law, Karras())
    t_ = t[:, None]
    torch.testing.assert_close(path.at(z, t), t_ * z + (1 - t_ / T) * law(t_ * z, t), rtol=1e-13, atol=1e-13)


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_index", ["flip", "drop"])
def test_one_student_call_of_both_branches_and_one_teacher_call(last_index: Literal["flip", "drop"]) -> None:
    n, rows = 10, 4
    spy = Spy(mlp(classes=3))
    cond, u, z = torch.eye(4, dtype=torch.float64)[:, :3], f64([0.0, 0.33, 0.71, 0.999]), normal(rows, 2)
    teacher = Function(lambda x, sigma: 0.5 * x, (2,), classes=3)
    PID(N=n, last_index=last_index).loss(players(Preconditioned(spy, (2,), classes=3)), teacher, batch_of(u, z, cond))
    assert len(spy.calls) == len(teacher.calls) == 1

    index = [0, 3, 7, 9] if last_index == "flip" else [0, 2, 6, 8]
    t, s = grid(n)[index], grid(n)[[partner(i, n) for i in index]]
    inputs, noise, labels = spy.calls[0]
    torch.testing.assert_close(inputs, torch.cat([z, z]) * T / math.hypot(T, 0.5), rtol=1e-14, atol=0)
    torch.testing.assert_close(noise, torch.cat([t, s]).log() / 4, rtol=1e-12, atol=1e-12)
    assert labels is not None and torch.equal(labels, torch.cat([cond, cond]))

    f_t = spy.network(inputs, noise, labels)[:rows]
    x, sigma, given = teacher.calls[0]
    torch.testing.assert_close(sigma, t, rtol=1e-12, atol=0)
    torch.testing.assert_close(x, t[:, None] * z + (1 - t / T)[:, None] * f_t, rtol=1e-12, atol=1e-12)
    assert given is not None and torch.equal(given, cond)
    assert not x.requires_grad


def test_labels_change_what_each_branch_predicts() -> None:
    """A loss in which P and Q both depend on the label, checked sample by sample."""
    n, rows = 12, 3
    student = Preconditioned(mlp(classes=3), (2,), classes=3)

    class Teacher(Function):
        def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
            assert cond is not None
            return 0.1 * x / (1 + expand(sigma, x)) + cond @ f64([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])

    teacher, z, u = Teacher(lambda x, sigma: x, (2,), classes=3), normal(rows, 2), f64([0.1, 0.5, 0.95])
    for cond in (torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64).flip(0)):
        loss = PID(N=n).loss(players(student), teacher, batch_of(u, z, cond))
        for row, i in enumerate((1, 6, 11)):
            t, s = grid(n)[[i]], grid(n)[[partner(i, n)]]
            path = Trajectory(student, Karras())
            x_t, x_s = (path.at(z[[row]], level, cond[[row]]) for level in (t, s))
            p = x_t - t * (x_t - x_s) / (t - s)
            q = teacher(x_t, t, cond[[row]])
            assert loss[row].item() == pytest.approx((p - q).square().mean().item(), rel=1e-8)


METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda gap: gap.square().flatten(1).mean(1),
    "l1": lambda gap: gap.abs().flatten(1).mean(1),
    "huber": lambda gap: (
        (gap.square().flatten(1).sum(1) + (0.00054**2 * gap[0].numel())).sqrt() - 0.00054 * math.sqrt(gap[0].numel())
    ),
}


def predictions(student: Denoiser, teacher: Denoiser, u: Tensor, z: Tensor, n: int, c: float) -> tuple[Tensor, Tensor]:
    """P and Q from the path and the teacher, for data of scale c times that of the defaults."""
    path = Trajectory(student, Karras().scaled(c))
    levels, index = c * grid(n), (u.double() * n).long()
    t = levels[index].to(u.dtype)
    s = levels[[partner(int(i), n) for i in index]].to(u.dtype)
    x_t, x_s = path.at(z, t), path.at(z, s)
    ratio = t / (t - s)
    return x_t - expand(ratio, z) * (x_t - x_s), teacher(x_t, t)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("c", [1.0, 3.0])
def test_metrics(metric: Literal["l2", "l1", "huber"], c: float) -> None:
    """The distance is that of P and Q in units of sigma_data / 0.5."""
    n, shape = 12, (1, 2, 2)
    student = Preconditioned(mlp(shape=shape), shape, sigma_data=0.5 * c)
    teacher = Function(lambda x, sigma: torch.sin(x) / (1 + sigma), shape, sigma_data=0.5 * c)
    u, z = every_index(n), normal(n, *shape)
    method = PID(N=n, metric=metric)
    loss = method.loss(nn.ModuleDict(method.players(student)), teacher, batch_of(u, z))
    p, q = predictions(student, teacher, u, z, n, c)
    assert loss.shape == (n,)
    torch.testing.assert_close(loss, METRICS[metric]((p - q) / c), rtol=1e-7, atol=1e-10)


def test_huber_is_smooth_at_0() -> None:
    z, gap = normal(2, 1), 1e-9

    def student(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, 0.3)

    teacher = Function(lambda x, sigma: torch.full_like(x, 0.3 + gap))
    loss = PID(N=10, metric="huber").loss(players(Function(student)), teacher, batch_of(f64([0.2, 0.7]), z))
    # gap^2 / 2 c, of which sqrt(gap^2 + c^2) - c would keep only a few digits
    torch.testing.assert_close(loss, f64([gap**2 / (2 * 0.00054)] * 2), rtol=1e-6, atol=0)


def feature_case(sigma_data: float, seed: int = 0) -> tuple[PID, nn.ModuleDict, Preconditioned, Denoiser]:
    shape = (1, 8, 8)
    method = PID(N=30, metric="features", features="digits")
    template = Preconditioned(mlp(shape=shape, width=32, seed=seed, scale=0.05), shape, sigma_data=sigma_data)
    teacher = Gaussian(torch.zeros(shape, dtype=torch.float64), sigma_data)
    return method, nn.ModuleDict(method.players(template.float())), template, teacher


@pytest.mark.parametrize("sigma_data", [0.5, 0.85])
def test_features_of_samples_in_their_own_scale(sigma_data: float) -> None:
    """The network reads P and Q as it reads data, whatever the data's scale: it was trained on them."""
    method, nets, template, teacher = feature_case(sigma_data)
    rng = torch.Generator().manual_seed(0)
    u, z = torch.rand(16, generator=rng), torch.randn(16, 1, 8, 8, generator=rng)
    loss = method.loss(nets, teacher, batch_of(u, z))
    network = features.load("digits").double()
    p, q = predictions(copy.deepcopy(template).double(), teacher, u.double(), z.double(), 30, 2 * sigma_data)
    expected = (network(p) - network(q)).square().mean(1)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=1e-6)


def test_features_pass_gradients_on_and_take_none() -> None:
    method, nets, _, teacher = feature_case(0.5)
    assert set(nets) == {"generator", "features"}
    assert not any(p.requires_grad for p in nets["features"].parameters()) and not nets["features"].training
    method.loss(nets, teacher, batch_of(torch.tensor([0.3, 0.8]), normal(2, 1, 8, 8).float())).sum().backward()
    assert all(p.grad is None for p in nets["features"].parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in nets["generator"].parameters())


# The method -----------------------------------------------------------------------------------------------------------


def test_players_and_turns() -> None:
    method, template = PID(), Preconditioned(mlp(), (2,), sigma_data=1.5)
    made = method.players(template)
    assert set(made) == {"generator"} == set(method.optimizers()) and method.product == "generator"
    path = made["generator"]
    assert isinstance(path, Trajectory) and path.levels == Karras(0.006, 240.0)
    assert path.shape == path.latent_shape == (2,) and path.classes == 0
    mine = {p.data_ptr() for p in path.parameters()}
    assert mine and not mine & {p.data_ptr() for p in template.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(path.parameters(), template.parameters(), strict=True))
    for step in (0, 7, 1000):
        assert [turn.players for turn in method.turns(step, 64 * step)] == [("generator",)]


def test_a_given_generator_is_kept_with_its_own_levels() -> None:
    given = Trajectory(Preconditioned(mlp(), (2,)), Karras(0.01, 40.0))
    assert PID().players(given.denoiser, given)["generator"] is given
    spy = Spy(mlp())
    given = Trajectory(Preconditioned(spy, (2,)), Karras(0.01, 40.0))
    PID(N=9).loss(
        nn.ModuleDict({"generator": given}), Gaussian([0.0, 0.0], 0.5), batch_of(every_index(9), normal(9, 2))
    )
    torch.testing.assert_close(spy.calls[0][1][:9], Karras(0.01, 40.0).grid(9)[:-1].log() / 4, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"^generator: .*Trajectory"):
        PID().players(given.denoiser, OneStep(given.denoiser, 2.5))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"N": 1}, "N"),
        ({"N": 0}, "N"),
        ({"metric": "features"}, "features"),
        ({"features": "digits"}, "features"),
    ],
)
def test_bad_fields(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        PID(**fields)


def test_defaults_are_the_paper_s() -> None:
    method = PID()
    assert (method.N, method.levels, method.metric, method.last_index) == (250, Karras(0.002, 80.0, 7.0), "l2", "flip")
    assert method.gradient == "both"
    assert PID() == PID() and hash(PID()) == hash(PID())


def trained(c: float, start: nn.Module, optimizer: Optimizer) -> Trajectory:
    """A student after 20 steps on a mixture scaled by c, from the weights of `start`."""
    means = f64([[-1.0, 0.4], [0.5, -0.3]])
    teacher = Mixture([0.4, 0.6], c * means, c * f64([0.2, 0.3]))
    template = Preconditioned(copy.deepcopy(start), (2,), sigma_data=teacher.sigma_data)
    trainer = Trainer(PID(N=30), teacher, template, {"generator": optimizer}, steps=20, seed=1)
    source = NoiseSource((2,), (2,), 32, seed=1, dtype=torch.float64)
    for _ in range(20):
        trainer.advance(source)
    student = trainer.nets["generator"]
    assert isinstance(student, Trajectory)
    return student


@pytest.mark.parametrize("c", [2.0, 31.0])
@pytest.mark.parametrize("name", ["radam", "adam"])
def test_a_scaled_teacher_makes_the_scaled_student(c: float, name: Literal["radam", "adam"]) -> None:
    start, optimizer = MLP((2,), width=32, depth=2).double(), Optimizer(name, lr=2e-3)
    one, other = trained(1.0, start, optimizer), trained(c, start, optimizer)
    z = normal(64, 2, seed=9)
    untrained = Trajectory(Preconditioned(start, (2,), sigma_data=one.denoiser.sigma_data), one.levels)
    assert (one(z) - untrained(z)).abs().max() > 0.02
    for t in (LOW, 1.0, 20.0):
        unit = one.denoiser.unit
        torch.testing.assert_close(
            other.at(z, f64(c * unit * t)), c * one.at(z, f64(unit * t)), rtol=1e-6, atol=1e-6 * c
        )
    torch.testing.assert_close(other(z), c * one(z), rtol=1e-6, atol=1e-6 * c)


def test_methods_table_names_pid() -> None:
    from limbeck.methods import METHODS

    assert METHODS["pid"] is PID
