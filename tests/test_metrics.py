"""The metrics against closed forms, brute force and independent implementations, and against samples that get worse."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from limbeck.evaluate.bootstrap import bootstrap
from limbeck.evaluate.classify import c2st, class_accuracy
from limbeck.evaluate.frechet import Moments, frechet_distance, frechet_infinity
from limbeck.evaluate.kernel import kid, mmd2, polynomial_mmd2_unbiased
from limbeck.evaluate.modes import mode_statistics
from limbeck.evaluate.neighbours import memorisation, nearest_neighbour_distance, precision_recall_density_coverage
from limbeck.evaluate.rows import as_rows, squared_distances
from limbeck.evaluate.transport import directions, sliced_wasserstein


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.atleast_2d(x.T.cov())


def frechet(a: Tensor, b: Tensor) -> float:
    return frechet_distance(*moments_of(a), *moments_of(b))


# --- rows ---------------------------------------------------------------------------------------------------------


def test_squared_distances_far_from_the_origin_and_over_many_blocks() -> None:
    x, y = normal(1200, 3, 0) + 1e6, normal(1000, 3, 1) + 1e6
    blocks = list(squared_distances(x, y))
    assert len(blocks) > 1
    assert torch.equal(torch.cat([torch.arange(1200)[rows] for rows, _ in blocks]), torch.arange(1200))
    direct = (x[:, None] - y).square().sum(2)
    torch.testing.assert_close(torch.cat([block for _, block in blocks]), direct, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.zeros(3), "shape"),
        (torch.zeros(2, 1, 4, 4), "flatten"),
        (torch.zeros(2, 3, dtype=torch.int64), "floating point"),
        (torch.tensor([[0.0], [math.nan]]), "non-finite"),
        (torch.zeros(0, 3), "at least 1"),
    ],
)
def test_bad_rows_are_refused_by_name(bad: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=f"samples.*{words}"):
        as_rows("samples", bad)


def test_no_metric_touches_its_input_or_the_global_generator() -> None:
    x, y = normal(60, 2, 0).float().requires_grad_(), normal(60, 2, 1).float()
    x_before, y_before, state = x.detach().clone(), y.clone(), torch.get_rng_state()
    values = [
        mmd2(x, y),
        sliced_wasserstein(x, y),
        kid(x, y, subsets=2, subset_size=20).mean,
        c2st(x, y),
        *precision_recall_density_coverage(x, y),
        *memorisation(x, y, normal(40, 2, 2)),
        mode_statistics(x, y[:4], 1.0).recall,
        *frechet_infinity(x, torch.zeros(2), torch.eye(2)),
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(2)),
    ]
    assert all(type(value) is float for value in values)
    assert torch.equal(x, x_before) and torch.equal(y, y_before)
    assert torch.equal(torch.get_rng_state(), state)


# --- Fréchet distance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 40, 60])
@pytest.mark.parametrize("dim", [40, 60])
def test_frechet_closed_form_for_non_commuting_covariances(dim: int, rank: int) -> None:
    # For B = T A T with T positive definite the optimal map is T, hence FD = |dm|^2 + tr(A + B - 2 T A).
    half = normal(rank, dim, 0)
    a = half.T @ half / rank
    map_half = normal(dim, dim, 1) / math.sqrt(dim)
    transport = map_half.T @ map_half + 0.1 * torch.eye(dim, dtype=torch.float64)
    b = transport @ a @ transport
    mean_a, mean_b = normal(2, dim, 2)
    truth = float((mean_a - mean_b).square().sum() + (a + b - 2 * transport @ a).trace())
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(truth, rel=1e-9)
    assert frechet_distance(mean_b, b, mean_a, a) == pytest.approx(truth, rel=1e-9)


def test_frechet_of_commuting_and_of_point_laws() -> None:
    a, b = torch.tensor([4.0, 1e-6, 9.0]).double(), torch.tensor([1.0, 1e-2, 0.0]).double()
    zero = torch.zeros(3, dtype=torch.float64)
    truth = float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(truth, rel=1e-12)
    assert frechet_distance(zero + 1, zero.diag(), zero, a.diag()) == pytest.approx(3 + float(a.sum()), rel=1e-12)
    assert frechet_distance(zero + 1, zero.diag(), zero, zero.diag()) == 3
    one = torch.ones(1).double()
    assert frechet_distance(one, one[None], 3 * one, 25 * one[None]) == pytest.approx(4 + 16, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(500, 20), (20, 200), (2, 50)])
def test_frechet_of_identical_sets_is_zero_also_with_fewer_samples_than_features(n: int, d: int) -> None:
    x = normal(n, d, 0) * torch.logspace(-3, 1, d, dtype=torch.float64) + 5
    trace = float(x.var(0).sum())
    assert abs(frechet(x, x)) <= 1e-10 * trace
    assert abs(frechet(x, x[torch.randperm(n, generator=torch.Generator().manual_seed(0))])) <= 1e-10 * trace


def test_frechet_with_few_samples_equals_the_singular_values_of_the_cross_gram_matrix() -> None:
    x, y = normal(30, 100, 0), 0.5 * normal(40, 100, 1) + 0.1
    nuclear = torch.linalg.svdvals((x - x.mean(0)) @ (y - y.mean(0)).T).sum() / math.sqrt(29 * 39)
    truth = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * nuclear
    assert frechet(x, y) == pytest.approx(float(truth), rel=1e-9)


def test_frechet_against_eigenvalues_of_the_product() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    x, y = normal(300, 50, 0) @ normal(50, 50, 1), normal(300, 50, 2)
    (mean_x, a), (mean_y, b) = moments_of(x), moments_of(y)
    root_trace = float(abs(linalg.eigvals((a @ b).numpy())).__pow__(0.5).sum())
    truth = float((mean_x - mean_y).square().sum() + a.trace() + b.trace()) - 2 * root_trace
    assert frechet(x, y) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize(
    ("mean", "cov", "words"),
    [
        (torch.zeros(3), torch.eye(2), "shapes"),
        (torch.zeros(2, 2), torch.eye(2), "shapes"),
        (torch.tensor([0.0, math.inf]), torch.eye(2), "mean_a has non-finite"),
        (torch.zeros(2), torch.full((2, 2), math.nan), "cov_a has non-finite"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (torch.zeros(2), torch.tensor([1.0, -1.0]).diag(), "semi-definite"),
        (torch.zeros(2), -torch.eye(2), "semi-definite"),
        (torch.zeros(3), torch.eye(3), "mean_b has 2"),
    ],
)
def test_frechet_refuses_bad_moments(mean: Tensor, cov: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        frechet_distance(mean, cov, torch.zeros(2), torch.eye(2))


@pytest.mark.parametrize("sizes", [[1000], [1] * 20 + [980], [333, 333, 334], [0, 999, 1]])
def test_moments_do_not_depend_on_batching(sizes: list[int]) -> None:
    x = normal(1000, 7, 0) @ normal(7, 7, 1) + 1e4
    moments = Moments(7)
    for part in x[torch.randperm(1000, generator=torch.Generator().manual_seed(2))].split(sizes):
        moments.update(part)
    mean, cov = moments_of(x)
    assert moments.count == 1000
    torch.testing.assert_close(moments.mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.cov, cov, rtol=0, atol=1e-12 * float(cov.trace()))


def test_moments_merge_like_one_pass_and_come_back_from_a_cache() -> None:
    x = normal(500, 5, 0) + 100
    mean, cov = moments_of(x)
    total = Moments(5)
    for part in x.split([100, 150, 250]):
        rank = Moments(5)
        rank.update(part)
        total.merge(Moments.of(rank.count, rank.mean, rank.cov))
    total.merge(Moments(5))
    assert total.count == 500
    torch.testing.assert_close(total.mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(total.cov, cov, rtol=0, atol=1e-12 * float(cov.trace()))


def test_moments_refuse_what_they_cannot_use() -> None:
    moments = Moments(3)
    with pytest.raises(ValueError, match="3 columns"):
        moments.update(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="at least 2 rows"):
        _ = moments.cov
    with pytest.raises(ValueError, match="cannot merge"):
        moments.merge(Moments(2))
    with pytest.raises(ValueError, match="count"):
        Moments.of(1, torch.zeros(2), torch.eye(2))


@pytest.mark.parametrize("smallest", [None, 400])
def test_frechet_infinity_removes_the_bias_and_finds_its_slope(smallest: int | None) -> None:
    # Around N(0, I): E FD = d/N for the mean and |S - I|^2 / 4 = d (d + 1) / (4 N) for the covariance, to first order.
    d = 16
    zero, eye = torch.zeros(d), torch.eye(d)
    pools = [normal(4000, d, seed) for seed in range(8)]
    lines = [frechet_infinity(x, zero, eye, smallest=smallest, seed=3) for x in pools]
    biased = sum(frechet_distance(*moments_of(x), zero.double(), eye.double()) for x in pools) / 8
    bias = d + d * (d + 1) / 4
    assert biased == pytest.approx(bias / 4000, rel=0.15)
    assert sum(line.slope for line in lines) / 8 == pytest.approx(bias, rel=0.15)
    assert abs(sum(line.estimate for line in lines) / 8) < 0.2 * biased


def test_frechet_infinity_uses_the_given_reference_and_works_with_fewer_rows_than_features() -> None:
    x = normal(60, 40, 0)
    mean, cov = moments_of(normal(400, 40, 1) + 3)
    line = frechet_infinity(x, mean, cov, smallest=20, points=2, seed=0)
    assert line.estimate + line.slope / 60 == pytest.approx(frechet_distance(*moments_of(x), mean, cov), rel=1e-9)
    with pytest.raises(ValueError, match="smallest"):
        frechet_infinity(x, mean, cov, smallest=60)


# --- kernels ------------------------------------------------------------------------------------------------------


def naive_mmd2(x: Tensor, y: Tensor) -> float:
    def mean_kernel(p: Tensor, q: Tensor) -> Tensor:
        d2 = (p[:, None] - q).square().sum(2)
        return torch.stack([(-d2 / (2 * h**2)).exp().mean() for h in (0.25, 0.5, 1, 2, 4)]).mean()

    return float(mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


@pytest.mark.parametrize(("d", "spread"), [(1, 0.3), (2, 3.0), (2, 40.0), (10, 1.0)])
def test_mmd2_equals_the_direct_formula(d: int, spread: float) -> None:
    x, y = spread * normal(700, d, 0) + 50, spread * normal(600, d, 1) + 50.5
    assert mmd2(x, y) == pytest.approx(naive_mmd2(x, y), abs=1e-12)
    assert mmd2(x, y, scale=2.5) == pytest.approx(naive_mmd2(x / 2.5, y / 2.5), abs=1e-12)
    assert mmd2(x, x) == pytest.approx(0, abs=1e-14)


def test_mmd2_of_two_points() -> None:
    kernel = sum(math.exp(-9 / (2 * h**2)) for h in (0.25, 0.5, 1, 2, 4)) / 5
    assert mmd2(torch.zeros(1, 2), torch.tensor([[0.0, 3.0]])) == pytest.approx(2 - 2 * kernel, rel=1e-13)
    with pytest.raises(ValueError, match="scale"):
        mmd2(torch.zeros(1, 2), torch.zeros(1, 2), scale=0.0)


def test_mmd2_floor_of_the_forty_mode_mixture() -> None:
    torch_rand = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    means, std = (torch_rand.double() - 0.5) * 80, math.log1p(math.e)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(40, (10_000,), generator=generator)
        return means[which] + std * torch.randn(10_000, 2, dtype=torch.float64, generator=generator)

    x, y = draw(1), draw(2)
    assert math.log(mmd2(x, y)) == pytest.approx(-8.5, abs=0.2)
    found = mode_statistics(x, means, std)
    assert found.recall == 1 and found.outside == pytest.approx(math.exp(-4.5), abs=0.005)


def test_polynomial_mmd2_equals_the_direct_formula() -> None:
    a, b = normal(40, 6, 0), normal(55, 6, 1) * 1.3

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / 6 + 1) ** 3

    off_a, off_b = 1 - torch.eye(40, dtype=torch.float64), 1 - torch.eye(55, dtype=torch.float64)
    truth = (kernel(a, a) * off_a).sum() / (40 * 39) + (kernel(b, b) * off_b).sum() / (55 * 54)
    truth -= 2 * kernel(a, b).mean()
    assert polynomial_mmd2_unbiased(a, b) == pytest.approx(float(truth), rel=1e-11)


def test_kid_is_unbiased() -> None:
    values = torch.tensor(
        [polynomial_mmd2_unbiased(normal(50, 8, 2 * i), normal(50, 8, 2 * i + 1)) for i in range(400)]
    )
    error = float(values.std() / 20)
    assert abs(float(values.mean())) < 3 * error
    # The biased form would add 2/n (E k(x, x) - E k(x, x')), at least 2/50 (8 - (1 + 3/d)) by Jensen, and be caught.
    bias = 2 / 50 * (8 - 1 - 3 / 8)
    assert 20 * error < bias


def test_kid_draws_subsets() -> None:
    a, b = normal(300, 8, 0), normal(400, 8, 1) + 0.5
    full = polynomial_mmd2_unbiased(a, b)
    estimate = kid(a, b, subsets=60, subset_size=150, seed=5)
    assert estimate.mean == pytest.approx(full, abs=4 * estimate.std / math.sqrt(60)) and 0 < estimate.std < full
    assert kid(a, b, subsets=60, subset_size=150, seed=5) == estimate
    whole = kid(a, b[:300], subsets=3, subset_size=300)
    assert whole.mean == pytest.approx(polynomial_mmd2_unbiased(a, b[:300]), rel=1e-12) and whole.std < 1e-12
    with pytest.raises(ValueError, match="subset_size must be between 2 and 300"):
        kid(a, b)


# --- sliced Wasserstein -------------------------------------------------------------------------------------------


def test_sliced_wasserstein_by_hand() -> None:
    x, y = torch.tensor([[3.0], [0.0]]), torch.tensor([[1.0], [2.0]])
    assert sliced_wasserstein(x, y) == pytest.approx(1, rel=1e-14)
    # Two against three points: quantiles differ by 0-0, 0-6, 3-6, 3-6 on pieces of length 1/3, 1/6, 1/6, 1/3.
    three = torch.tensor([[6.0], [0.0], [6.0]])
    assert sliced_wasserstein(x, three) == pytest.approx(math.sqrt(36 / 6 + 9 / 6 + 9 / 3), rel=1e-14)


def test_sliced_wasserstein_does_not_count_copies_and_knows_a_shift() -> None:
    x, y, shift = normal(40, 3, 0), normal(30, 3, 1) + 0.3, torch.tensor([1.0, 2.0, -1.0]).double()
    assert sliced_wasserstein(x, y) == pytest.approx(sliced_wasserstein(x.repeat(3, 1), y.repeat(4, 1)), rel=1e-12)
    along = directions(3, 100, seed=7) @ shift
    assert sliced_wasserstein(x, x + shift, 100, seed=7) == pytest.approx(
        float(along.square().mean().sqrt()), rel=1e-12
    )
    assert float(directions(3, 10_000, seed=0).square().mean(0).max()) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("m", [200, 130])
def test_sliced_wasserstein_against_pot(m: int) -> None:
    ot = pytest.importorskip("ot")
    x, y = normal(200, 5, 0).numpy(), (1.5 * normal(m, 5, 1) + 0.2).numpy()
    axes = directions(5, 64, seed=3).numpy().T
    theirs = float(ot.sliced_wasserstein_distance(x, y, projections=axes, p=2))
    assert sliced_wasserstein(torch.from_numpy(x), torch.from_numpy(y), 64, seed=3) == pytest.approx(theirs, rel=1e-9)


# --- neighbours ---------------------------------------------------------------------------------------------------


def test_precision_recall_density_coverage_by_hand() -> None:
    # k = 1: the real radii are 1, 1, 8, the fake radii 1.5, 1.5.
    real, fake = torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([[0.5], [2.0]])
    found = precision_recall_density_coverage(real, fake, k=1)
    # 0.5 lies in the balls of 0 and 1; 2.0 lies in the ball of 9 (radius 8) and on the rim of that of 1 (excluded).
    assert found.precision == 1 and found.density == pytest.approx(3 / 2, rel=1e-15)
    # 0 and 1 lie in the fake ball of 0.5 (radius 1.5), 9 in none; every real ball holds a fake.
    assert found.recall == pytest.approx(2 / 3, rel=1e-15) and found.coverage == 1


def test_precision_recall_density_coverage_of_a_copy() -> None:
    # The ball of a row holds the row itself and k - 1 neighbours; the k-th lies on the rim.
    real = normal(500, 8, 0) + 3
    assert precision_recall_density_coverage(real, real.flip(0), k=4) == (1, 1, 1, 1)


def test_precision_recall_density_coverage_against_prdc(capsys: pytest.CaptureFixture[str]) -> None:
    prdc = pytest.importorskip("prdc")
    real, fake = normal(600, 8, 0), 1.2 * normal(500, 8, 1) + 0.3
    theirs = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    capsys.readouterr()
    assert precision_recall_density_coverage(real, fake)._asdict() == pytest.approx(theirs, rel=1e-12)
    assert 0.05 < theirs["precision"] < 0.95 and 0.05 < theirs["coverage"] < 0.95


def test_precision_recall_density_coverage_need_more_rows_than_neighbours() -> None:
    with pytest.raises(ValueError, match="fake needs at least 6 rows"):
        precision_recall_density_coverage(normal(10, 2, 0), normal(5, 2, 1))


def test_nearest_neighbour_distance_is_exact() -> None:
    points, queries = normal(800, 4, 0) + 1e3, normal(500, 4, 1) + 1e3
    queries[17] = points[3]
    found = nearest_neighbour_distance(queries, points)
    direct = torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert found[17] == 0
    torch.testing.assert_close(found, direct, rtol=1e-12, atol=1e-12)


def test_memorisation_tells_copies_from_new_samples() -> None:
    train, held_out, fresh = normal(2000, 4, 0), normal(2000, 4, 1), normal(2000, 4, 2)
    copied = train + 0.01 * normal(2000, 4, 3)
    new, mixed = memorisation(fresh, train, held_out), memorisation(torch.cat([fresh, copied]), train, held_out)
    assert new.ratio == pytest.approx(1, abs=0.05) and new.share == pytest.approx(0.01, abs=0.007)
    assert mixed.share == pytest.approx(0.5, abs=0.03)
    assert memorisation(copied, train, held_out).ratio < 0.1
    with pytest.raises(ValueError, match="held_out"):
        memorisation(fresh, train, train)


# --- classifiers --------------------------------------------------------------------------------------------------


def test_class_accuracy_by_hand() -> None:
    predicted = torch.tensor([0, 0, 0, 1])
    assert class_accuracy(predicted, torch.tensor([0, 0, 2, 1])) == 0.75
    with pytest.raises(ValueError, match="argmax"):
        class_accuracy(torch.eye(3), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="pair up"):
        class_accuracy(predicted, predicted[:3])


def test_c2st_reaches_the_bayes_accuracy_and_chance() -> None:
    x, shifted = normal(1500, 2, 0), normal(1500, 2, 1)
    shifted[:, 0] += 2
    bayes = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    assert c2st(x, shifted) == pytest.approx(bayes, abs=0.025)
    assert c2st(x * torch.tensor([1.0, 1e6]), shifted * torch.tensor([1.0, 1e6])) == pytest.approx(c2st(x, shifted))
    null = [c2st(normal(400, 2, 2 * i), normal(700, 2, 2 * i + 1), seed=i) for i in range(20)]
    assert sum(null) / 20 == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(800 * 20))
    assert c2st(x, x[1:] + 100) == 1
    with pytest.raises(ValueError, match="neighbours"):
        c2st(x, shifted, neighbours=10)
    with pytest.raises(ValueError, match="folds"):
        c2st(x[:3], shifted)


# --- modes --------------------------------------------------------------------------------------------------------


def test_mode_statistics_by_hand() -> None:
    means, stds = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]), torch.tensor([1.0, 2.0, 1.0])
    # The second sample is nearer to the first mean, but within 3 stds of the second mode only.
    samples = torch.tensor([[0.5, 0.0], [4.5, 0.0], [10.0, 2.0], [0.0, 5.0]])
    found = mode_statistics(samples, means, stds)
    assert found.shares.tolist() == [0.25, 0.5, 0] and found.outside == 0.25
    assert found.recall == pytest.approx(2 / 3, rel=1e-15)
    assert mode_statistics(samples, means, stds, weights=torch.tensor([0.6, 0.4, 0.0])).recall == pytest.approx(2 / 3)
    wide = mode_statistics(samples, means, stds, within=math.inf)
    radii = (0.5**2 + 2.75**2 + 1 + 5**2) / 4
    assert wide.outside == 0 and wide.spread == pytest.approx(math.sqrt(radii / 2), rel=1e-12)
    assert math.isnan(mode_statistics(samples + 1e3, means, stds).spread)
    with pytest.raises(ValueError, match="stds"):
        mode_statistics(samples, means, 0.0)
    with pytest.raises(ValueError, match="weights"):
        mode_statistics(samples, means, 1.0, weights=torch.ones(3))


@pytest.mark.parametrize(("d", "within"), [(1, 1.0), (2, 3.0), (6, 2.5)])
def test_mode_spread_is_one_for_the_truth_and_scales(d: int, within: float) -> None:
    found = mode_statistics(0.2 * normal(40_000, d, 0), torch.zeros(1, d), 0.2, within)
    assert found.spread == pytest.approx(1, abs=0.01)
    small = mode_statistics(0.02 * normal(40_000, d, 0), torch.zeros(1, d), 0.2, math.inf)
    assert small.spread == pytest.approx(0.1, abs=0.001)


# --- bootstrap ----------------------------------------------------------------------------------------------------


def test_bootstrap_of_a_mean_has_its_standard_error_and_covers() -> None:
    covered = 0
    for seed in range(60):
        x = normal(200, 1, seed)
        interval = bootstrap(lambda rows: float(rows.mean()), x, draws=200, seed=seed)
        assert interval.estimate == float(x.mean())
        assert interval.std == pytest.approx(float(x.std()) / math.sqrt(200), rel=0.25)
        covered += interval.low < 0 < interval.high
    assert 52 <= covered <= 60
    for level, z in ((0.95, 1.960), (0.5, 0.674)):
        interval = bootstrap(lambda rows: float(rows.mean()), normal(200, 1, 0), draws=4000, level=level)
        for side in (interval.high - interval.estimate, interval.estimate - interval.low):
            assert side / interval.std == pytest.approx(z, abs=0.08)


def test_bootstrap_interval_of_a_biased_distance_holds_its_estimate() -> None:
    d = 20
    zero, eye = torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    interval = bootstrap(lambda rows: frechet_distance(*moments_of(rows), zero, eye), normal(300, d, 0), draws=60)
    expected = (d + d * (d + 1) / 4) / 300
    assert interval.low < interval.estimate < interval.high and interval.low < expected < interval.high
    with pytest.raises(ValueError, match="level"):
        bootstrap(lambda rows: 0.0, zero, level=1.0)


# --- other implementations ----------------------------------------------------------------------------------------


class Rows(torch.nn.Module):
    num_features = 12

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_frechet_and_kid_against_torchmetrics() -> None:
    fid_module = pytest.importorskip("torchmetrics.image.fid")
    kid_module = pytest.importorskip("torchmetrics.image.kid")
    real, fake = normal(200, 12, 0), 1.1 * normal(200, 12, 1) + 0.2
    their_fid = fid_module.FrechetInceptionDistance(feature=Rows()).set_dtype(torch.float64)
    their_kid = kid_module.KernelInceptionDistance(feature=Rows(), subsets=2, subset_size=200).set_dtype(torch.float64)
    for metric in (their_fid, their_kid):
        metric.update(real.reshape(200, 3, 2, 2), real=True)
        metric.update(fake.reshape(200, 3, 2, 2), real=False)
    assert frechet(real, fake) == pytest.approx(float(their_fid.compute()), rel=1e-6)
    assert kid(real, fake, 2, 200).mean == pytest.approx(float(their_kid.compute()[0]), rel=1e-6)


# --- every metric gets worse when the samples do ------------------------------------------------------------------

ANGLES = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
MEANS, STD = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.1


def ring(seed: int, modes: int = 8, std: float = STD) -> Tensor:
    which = torch.randint(modes, (1200,), generator=torch.Generator().manual_seed(100 + seed))
    return MEANS[which] + std * normal(1200, 2, seed)


def posterior(x: Tensor) -> Tensor:
    return (-(x[:, None] - MEANS).square().sum(2) / (2 * 0.3**2)).softmax(1)


REAL, TRAIN = ring(0), ring(1)

WORSE = {
    "blur": ring(2, std=0.4),
    "noise": torch.cat([ring(2)[:900], 2 * normal(300, 2, 3)]),
    "drop": ring(2, modes=6),
    "copies": ring(2)[:40].repeat(30, 1),
    "narrow": ring(2, std=0.02),
    "memory": TRAIN + 1e-3 * normal(1200, 2, 4),
}

# Each is zero or a small floor for good samples and grows as they get worse.
LOSSES: dict[str, Callable[[Tensor], float]] = {
    "frechet": lambda x: frechet(REAL, x),
    "frechet_infinity": lambda x: abs(frechet_infinity(x, *moments_of(REAL)).estimate),
    "kid": lambda x: abs(kid(REAL, x, subsets=20, subset_size=500).mean),
    "mmd2": lambda x: mmd2(REAL, x, scale=0.5),
    "sliced_wasserstein": lambda x: sliced_wasserstein(REAL, x),
    "precision": lambda x: 1 - precision_recall_density_coverage(REAL, x).precision,
    "recall": lambda x: 1 - precision_recall_density_coverage(REAL, x).recall,
    "density": lambda x: abs(1 - precision_recall_density_coverage(REAL, x).density),
    "coverage": lambda x: 1 - precision_recall_density_coverage(REAL, x).coverage,
    "c2st": lambda x: max(c2st(REAL, x) - 0.5, 0),
    "memorisation": lambda x: memorisation(x, TRAIN, REAL).share,
    "mode_recall": lambda x: 1 - mode_statistics(x, MEANS, STD).recall,
    "mode_outside": lambda x: mode_statistics(x, MEANS, STD).outside,
    "mode_spread": lambda x: abs(1 - mode_statistics(x, MEANS, STD).spread),
}

# What each metric is for, and what its docstring says that it does not see.
SEES = {
    "frechet": ["noise", "drop", "copies"],
    "frechet_infinity": ["noise", "drop", "copies"],
    "kid": ["noise", "drop", "copies"],
    "mmd2": ["blur", "noise", "drop", "copies", "narrow"],
    "sliced_wasserstein": ["noise", "drop", "copies"],
    "precision": ["blur", "noise"],
    "recall": ["drop", "copies", "narrow"],
    "density": ["blur", "noise", "narrow"],
    "coverage": ["blur", "drop", "copies", "narrow"],
    "c2st": ["blur", "noise", "drop", "copies", "narrow"],
    "memorisation": ["memory"],
    "mode_recall": ["blur", "drop", "copies"],
    "mode_outside": ["blur", "noise"],
    "mode_spread": ["blur", "narrow"],
}
BLIND = {
    "frechet": ["narrow", "memory"],
    "kid": ["narrow", "memory"],
    "mmd2": ["memory"],
    "sliced_wasserstein": ["narrow", "memory"],
    "precision": ["drop", "copies", "narrow", "memory"],
    "recall": ["blur", "noise", "memory"],
    "density": ["drop", "memory"],
    "coverage": ["noise", "memory"],
    "c2st": ["memory"],
    "memorisation": ["blur", "noise", "drop", "copies", "narrow"],
    "mode_recall": ["noise", "narrow", "memory"],
    "mode_outside": ["drop", "copies", "narrow", "memory"],
    "mode_spread": ["noise", "drop", "memory"],
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_metric_gets_worse_with_what_it_sees_and_not_with_what_it_is_blind_to(name: str) -> None:
    loss = LOSSES[name]
    bar = 2 * max(loss(ring(seed)) for seed in (2, 5, 6)) + 0.001
    assert {how: round(loss(WORSE[how]), 5) for how in SEES[name] if loss(WORSE[how]) <= bar} == {}
    # 0.03 is the scatter of a share or an accuracy at this number of samples.
    assert {how: round(loss(WORSE[how]), 5) for how in BLIND.get(name, []) if loss(WORSE[how]) > bar + 0.03} == {}


def test_class_accuracy_falls_with_blur() -> None:
    wanted = torch.randint(8, (1200,), generator=torch.Generator().manual_seed(102))
    accuracy = [class_accuracy(posterior(ring(2, std=std)).argmax(1), wanted) for std in (0.1, 0.4, 0.8)]
    assert accuracy[0] > 0.99 and accuracy[1] < accuracy[0] - 0.02 and accuracy[2] < accuracy[1] - 0.2


def test_c2st_falls_below_chance_for_copies_of_its_own_rows() -> None:
    assert c2st(TRAIN, WORSE["memory"]) < 0.4
