"""The evaluation protocol: what a score depends on, and that it tells good samples from bad ones."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import Outline, opened, root_of
from torch import Tensor, nn

import limbeck
from limbeck import artifact, cli, config, features, loop, networks, run, summary
from limbeck.config import Evaluation
from limbeck.data import Data
from limbeck.denoiser import Denoiser, Preconditioned
from limbeck.evaluate import VALIDATION, ExactJudge, ImageJudge, Reference, Scores, measure, measure_data
from limbeck.evaluate import contest as contests
from limbeck.evaluate.draws import latents, quantize
from limbeck.evaluate.judge import DRAWS, KEPT, is_inception, measured_judge, read_judge
from limbeck.exact import Empirical, Gaussian
from limbeck.features import Classifier
from limbeck.folder import Stopped
from limbeck.generator import Generator, OneStep
from limbeck.glossary import METRICS
from limbeck.methods import METHODS
from limbeck.randomness import stream
from limbeck.report import spread_text
from limbeck.source import NoiseSource, one_hot
from limbeck.teachers import ring8
from limbeck.train import Trainer

# --- samples that a computer makes without rounding -----------------------------------------------------------------


class Toy(Classifier):
    """Features are the 16 pixels of an image, and the class is its brightest quadrant: no sum, so no rounding."""

    def __init__(self, sure: float = 2.0) -> None:
        nn.Module.__init__(self)
        self.shape, self.classes, self.sure = (1, 4, 4), 4, sure
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return x.double().flatten(1)

    def head(self, features: Tensor) -> Tensor:
        return self.sure * features[:, [0, 2, 8, 10]]


def toy_images(z: Tensor, cond: Tensor | None) -> Tensor:
    """Class k has its k-th quadrant at 0.75 and the rest at -0.75, plus an eighth of the noise."""
    assert cond is not None
    bright = cond.reshape(-1, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return (1.5 * bright - 0.75 + 0.125 * z).clamp(-1, 1)


def toy_data(count: int, seed: int = 100) -> Data:
    drawn = latents(seed, range(count), (1, 4, 4), 4)
    assert drawn.labels is not None
    return Data("toy", quantize(toy_images(drawn.z, one_hot(drawn.labels, 4))), drawn.labels)


@pytest.fixture(scope="module")
def toy() -> ImageJudge:
    return ImageJudge(Reference.measure(toy_data(300), Toy(), "toy"), Toy(), "toy")


def toy_scores(judge: ImageJudge, samples: int = 330, **keys: Any) -> Scores:
    return measure(toy_images, 1, judge, (1, 4, 4), 4, samples=samples, **keys)


def close(a: dict[str, float], b: dict[str, float], rel: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-13), name


# --- latents --------------------------------------------------------------------------------------------------------


def rows_of(x: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


@pytest.mark.parametrize(("shape", "classes"), [((2,), 0), ((1, 4, 4), 10)])
def test_a_sample_depends_on_seed_and_index_alone(shape: tuple[int, ...], classes: int) -> None:
    whole = latents(3, range(40), shape, classes)
    for some in (range(1), range(7, 19), range(39, 40), range(0, 40, 3), range(12, 12)):
        part = latents(3, some, shape, classes)
        assert torch.equal(part.z, whole.z[list(some)])
        if classes:
            assert part.labels is not None and whole.labels is not None
            assert torch.equal(part.labels, whole.labels[list(some)])
    assert (whole.labels is None) == (classes == 0)
    assert torch.equal(latents(3, range(40), shape, 0).z, whole.z)  # labels do not move the noise
    assert not rows_of(latents(4, range(40), shape, classes).z) & rows_of(whole.z)


def test_ranges_share_no_sample() -> None:
    """Draw 0, draw 1, the watched range, and what training sees under the same seed."""
    n, shape = 200, (2,)
    sets = [rows_of(latents(5, range(k, k + n), shape, 0).z) for k in (0, n, VALIDATION, VALIDATION + n)]
    for step in range(4):
        batch = NoiseSource(shape, shape, n, 5).draw(stream(5, "batch", step, 0))
        sets += [rows_of(batch.z), rows_of(batch.eps)]
    assert all(len(rows) == n for rows in sets)
    assert len(set().union(*sets)) == n * len(sets)


def test_labels_are_uniform() -> None:
    count = latents(0, range(5000), (1,), 10).labels.bincount(minlength=10).double()
    assert float(((count - 500).square() / 500).sum()) < 33.7  # exceeded once in ten thousand seeds


def test_validation_begins_where_the_docs_say() -> None:
    assert VALIDATION == 2**31


def test_noise_is_standard_normal() -> None:
    z = latents(0, range(2000), (5,), 0).z.double()
    assert abs(float(z.mean())) < 5 / math.sqrt(10_000)
    assert float(z.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / 10_000))


# --- measure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [7, 100])
def test_scores_do_not_depend_on_the_batch(toy: ImageJudge, batch: int) -> None:
    whole, parts = (toy_scores(toy, batch=size) for size in (1000, batch))
    close(parts.metrics, whole.metrics)
    assert {"fd_feature", "fd_pixel", "fd_feature_infinity", "kid", "precision", "c2st", "class_accuracy"} <= set(
        whole.metrics
    )
    for name in ("accuracy_by_class", "share_by_class"):
        assert parts.details[name] == pytest.approx(whole.details[name], rel=1e-12)
    assert parts.intervals["fd_feature"] == pytest.approx(whole.intervals["fd_feature"], rel=1e-10)
    low, high = whole.intervals["fd_feature"]
    assert low < whole.metrics["fd_feature"] < high


def test_a_distance_of_more_samples_than_are_kept_has_no_interval(
    toy: ImageJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the kept ones is the interval of a larger distance."""
    whole = toy_scores(toy)
    for kept, told in ((330, True), (329, False)):
        monkeypatch.setattr("limbeck.evaluate.judge.KEPT", kept)
        scores = toy_scores(toy)
        assert scores.metrics["fd_feature"] == whole.metrics["fd_feature"]
        assert ("fd_feature" in scores.intervals) == told
        assert any("bootstrap interval" in note for note in scores.notes) != told


def test_exact_scores_do_not_depend_on_the_batch() -> None:
    judge = ExactJudge(ring8())
    whole, parts = (measure(lambda z, cond: 2 * z, 1, judge, (2,), 0, samples=150, batch=batch) for batch in (1000, 7))
    close(parts.metrics, whole.metrics)


def test_draws_are_averaged_and_give_the_spread(toy: ImageJudge) -> None:
    both = toy_scores(toy, draws=2, seed=4)
    one, two = (toy_scores(toy, first=first, seed=4) for first in (0, 330))
    close(both.metrics, {name: (one.metrics[name] + two.metrics[name]) / 2 for name in one.metrics})
    close(both.spread, {name: statistics.stdev((one.metrics[name], two.metrics[name])) for name in one.metrics})
    assert both.spread["fd_feature"] > 0 and both.spread["kid"] > 0
    assert one.spread == {} and both.intervals == one.intervals and both.details == one.details
    assert both.nfe == 1 and both.ms_per_image is not None and both.ms_per_image > 0


def test_the_time_of_a_sample_is_that_of_one_process(toy: ImageJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second a sample, also where another process makes the other half."""
    clock = [0.0]

    def slow(z: Tensor, cond: Tensor | None) -> Tensor:
        clock[0] += len(z)
        return toy_images(z, cond)

    monkeypatch.setattr("limbeck.evaluate.time.perf_counter", lambda: clock[0])
    for world in (1, 2):
        monkeypatch.setattr("limbeck.evaluate.rank_and_world", lambda world=world: (0, world))
        monkeypatch.setattr("limbeck.evaluate.gather", lambda state, world=world: [state] * world)
        assert measure(slow, 1, toy, (1, 4, 4), 4, samples=400, batch=100).ms_per_image == 1000


def test_given_samples_are_scored_once_each(toy: ImageJudge) -> None:
    given = toy_data(330, seed=0)
    scores = measure_data(given, toy, batch=77)
    close(scores.metrics, toy_scores(toy).metrics)
    assert scores.nfe == 0 and scores.ms_per_image is None
    unlabelled = measure_data(Data("toy", given.x, None), toy)
    assert "class_accuracy" not in unlabelled.metrics and "accuracy_by_class" not in unlabelled.details
    close(
        unlabelled.metrics, {name: value for name, value in scores.metrics.items() if name != "class_accuracy"}, 1e-12
    )


# --- several processes ------------------------------------------------------------------------------------------------


def merged(judge: Any, shares: Sequence[tuple[Tensor, Tensor | None]]) -> dict[str, float]:
    """The scores that processes with these shares of the samples would all find."""
    whole = judge.tally()
    for x, labels in shares:
        tally = judge.tally()
        if len(x):
            tally.add(x, labels)
        whole.merge({name: tensor.clone() for name, tensor in tally.tensors().items()})
    return whole.judgement().metrics


@pytest.mark.parametrize("cuts", [(150,), (1, 2), (0, 80, 80, 300)])
def test_shares_of_several_processes_equal_one(toy: ImageJudge, cuts: tuple[int, ...]) -> None:
    given = toy_data(300, seed=0)
    assert given.y is not None
    parts = list(zip(given.x.tensor_split(cuts), given.y.tensor_split(cuts), strict=True))
    close(merged(toy, parts), merged(toy, [(given.x, given.y)]))
    close(merged(toy.watching(), parts), merged(toy.watching(), [(given.x, given.y)]))
    points = latents(0, range(300), (2,), 0).z
    exact = ExactJudge(ring8())
    close(merged(exact, [(p, None) for p in points.tensor_split(cuts)]), merged(exact, [(points, None)]))


def test_states_can_be_gathered(toy: ImageJudge) -> None:
    """Tensors of equal shape on all ranks but for the first dimension of those that are named rows."""
    for judge, x in ((toy, toy_data(9).x), (ExactJudge(ring8()), torch.zeros(9, 2))):
        empty, full = judge.tally(), judge.tally()
        full.add(x, None)
        a, b = empty.tensors(), full.tensors()
        assert a.keys() == b.keys()
        for name in a:
            skip = int(name.startswith("rows"))
            assert a[name].shape[skip:] == b[name].shape[skip:] and a[name].dtype == b[name].dtype
            assert not skip or (len(a[name]), len(b[name])) == (0, 9)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random generator of digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = networks.build("mlp", {"shape": [1, 8, 8], "classes": 10, "width": 16, "depth": 1})
        nn.init.normal_(network.last.weight, std=0.2)
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    denoiser = Preconditioned(network, (1, 8, 8), 10, 0.6)
    artifact.save(path, "generator", OneStep(denoiser, 2.5), {"recipe": {"teacher": "digits"}})
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What `limbeck evaluate ... --json` prints."""
    assert cli.main(["evaluate", *map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_torchrun_equals_one_process(
    student: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes over gloo; the second has a share of its own, and one model is named twice."""
    arguments = [str(student), str(digits), str(student), "--samples", "600", "--teacher", "false"]
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 -m limbeck evaluate"
    done = subprocess.run(
        [sys.executable, *launch.split(), *arguments, "--json", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    both, one = json.loads(done.stdout), told(capsys, *arguments)
    for ours, theirs in zip(both["rows"], one["rows"], strict=True):
        close(ours["metrics"], theirs["metrics"])
        for name in ("accuracy_by_class", "share_by_class"):
            assert ours["details"][name] == pytest.approx(theirs["details"][name], rel=1e-10)
        assert ours["intervals"]["fd_feature"] == pytest.approx(theirs["intervals"]["fd_feature"], rel=1e-10)
        assert ours["nfe"] == theirs["nfe"] and "class_accuracy" in ours["metrics"]
    assert len(both["rows"]) == 3 and both["rows"][0]["metrics"] == both["rows"][2]["metrics"]
    assert json.loads((tmp_path / "out" / "contest.json").read_text())["rows"] == both["rows"]
    assert len(list((tmp_path / "out" / "scores").iterdir())) == 2


# --- references -------------------------------------------------------------------------------------------------------


def small_reference(count: int = 60) -> Reference:
    return Reference.measure(toy_data(count), Toy(), "ab" * 32)


def test_a_reference_comes_back(tmp_path: Path) -> None:
    made = small_reference()
    made.save(tmp_path / "deep" / "r.npz")
    read = Reference.read(tmp_path / "deep" / "r.npz")
    assert (read.features, read.count, read.floors) == (made.features, 60, made.floors)
    assert torch.equal(read.rows, made.rows) and read.rows.dtype == torch.float32
    assert read.moments.keys() == made.moments.keys() == {"feature", "pixel", "feature_half", "feature_rest"}
    for space, (mean, cov) in made.moments.items():
        assert torch.equal(read.moments[space][0], mean) and torch.equal(read.moments[space][1], cov)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.npz"]


def test_moments_and_floors_of_a_reference() -> None:
    given = toy_data(60)
    made = Reference.measure(given, Toy(), "")
    flat = given.x.double().flatten(1)
    for space in ("feature", "pixel"):
        torch.testing.assert_close(made.moments[space][0], flat.mean(0), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(made.moments[space][1], torch.cov(flat.T), rtol=1e-10, atol=1e-14)
    half, rest = made.moments["feature_half"][0], made.moments["feature_rest"][0]
    torch.testing.assert_close((half + rest) / 2, flat.mean(0), rtol=1e-12, atol=1e-14)  # disjoint and complete
    assert not torch.allclose(half, rest, rtol=1e-6)
    assert sorted(map(tuple, made.rows.tolist())) == sorted(map(tuple, flat.half().float().tolist()))
    assert made.floors["class_accuracy"] == 1
    for space in ("feature", "pixel"):
        assert 0 < made.floors[f"fd_{space}"] < made.floors[f"fd_{space}_halves"]
    assert {"precision", "recall", "density", "coverage"} <= made.floors.keys()


def test_a_reference_keeps_a_bounded_number_of_rows() -> None:
    ramp = torch.linspace(-1, 0.8, KEPT + 500)
    many = Data("toy", ramp.reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4), None)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :1]

    with pytest.MonkeyPatch.context() as patched:  # ten thousand neighbours are not the point
        nothing = dataclasses.make_dataclass("Nothing", [])
        nothing._asdict = lambda self: {}  # type: ignore[attr-defined]
        patched.setattr("limbeck.evaluate.judge.precision_recall_density_coverage", lambda *args: nothing())
        made = Reference.measure(many, Mean(), "")
    assert made.rows.shape == (KEPT, 1) and made.count == KEPT + 500
    assert float(made.moments["feature"][0]) == pytest.approx(float(ramp.double().mean()), rel=1e-12)
    assert float(made.moments["feature"][1]) == pytest.approx(float(ramp.double().var()), rel=1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_samples_for_a_reference(count: int) -> None:
    with pytest.raises(ValueError, match=f"^toy: a reference needs at least 4 samples, got {count}$"):
        small_reference(count)


def test_statistics_of_edm(tmp_path: Path) -> None:
    made = small_reference()
    mu, sigma = made.moments["feature"]
    np.savez(tmp_path / "edm.npz", mu=mu.numpy(), sigma=sigma.numpy())
    read = Reference.read(tmp_path / "edm.npz")
    assert torch.equal(read.moments["feature"][0], mu) and torch.equal(read.moments["feature"][1], sigma)
    assert (read.features, read.count, read.floors, tuple(read.rows.shape)) == ("", 0, {}, (0, 16))
    judge = ImageJudge(read, Toy(), "")
    scores = measure_data(toy_data(60), judge)
    assert abs(scores.metrics["fd_feature"]) < 1e-10
    assert "kid" not in scores.metrics and "fd_pixel" not in scores.metrics
    assert judge.floor(60).metrics == {} and "unknown" in judge.floor(60).note and judge.halves() is None
    assert judge.watching().watched


def changed(**arrays: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda whole: {name: value for name, value in {**whole, **arrays}.items() if value is not None}


BAD_REFERENCES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a data set": (lambda whole: {"x": np.zeros((4, 2))}, "'mean_feature' is missing"),
    "nothing": (lambda whole: {}, "'mean_feature' is missing"),
    "no features": (changed(mean_feature=None), "'mean_feature' is missing"),
    "no covariance": (changed(cov_pixel=None), "'cov_pixel' is missing"),
    "no rows": (changed(rows=None), "'rows' is missing"),
    "no count": (changed(count=None), "'count' is missing"),
    "other covariance": (changed(cov_feature=np.zeros((5, 5))), r"\(16,\) and a covariance of shape \(5, 5\)"),
    "flat covariance": (changed(cov_pixel=np.zeros(16)), r"of pixel of shape \(16,\) and a covariance"),
    "mean of two": (changed(mean_feature=np.zeros((2, 16))), "do not fit"),
    "scalar mean": (changed(mean_feature=np.zeros(())), "do not fit"),
    "NaN": (changed(mean_feature=np.full(16, np.nan)), "of feature contain NaN or Inf"),
    "text": (changed(mean_feature=np.full(16, "a")), "not a reference file"),
    "rows of others": (changed(rows=np.zeros((9, 5))), r"rows of shape \(9, 5\) are not features"),
    "rows of text": (changed(rows=np.full((9, 16), "a")), "not a reference file"),
    "infinite rows": (changed(rows=np.full((9, 16), np.inf)), "are not features"),
    "two floors": (changed(floor_fd_feature=np.zeros(2)), "not a reference file"),
    "count of text": (changed(count=np.array("many")), "not a reference file"),
    "EDM, other sigma": (lambda whole: {"mu": np.zeros(3), "sigma": np.eye(2)}, r"\(3,\) and a covariance of"),
    "asymmetric": (changed(cov_feature=np.triu(np.ones((16, 16)))), "covariance of feature is not symmetric"),
    "negative": (changed(cov_pixel=-np.eye(16)), "covariance of pixel is not positive semi-definite"),
    "EDM, asymmetric": (lambda whole: {"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "is not symmetric"),
    "EDM, negative": (lambda whole: {"mu": np.zeros(2), "sigma": np.diag([1.0, -0.1])}, "not positive semi-definite"),
    "EDM, NaN": (lambda whole: {"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "contain NaN or Inf"),
    "EDM, text": (lambda whole: {"mu": np.full(3, "a"), "sigma": np.eye(3)}, "not a reference file"),
    "EDM, empty": (lambda whole: {"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_REFERENCES)
def test_bad_references(tmp_path: Path, case: str) -> None:
    spoil, says = BAD_REFERENCES[case]
    path = tmp_path / "r.npz"
    small_reference().save(path)
    with np.load(path) as file:
        whole = {name: file[name] for name in file.files}
    np.savez(path, **spoil(whole))
    with pytest.raises(ValueError, match=says) as caught:
        Reference.read(path)
    assert str(caught.value).startswith(f"{path}: not a reference file (") and "\n" not in str(caught.value)


def test_rounding_does_not_make_a_covariance_bad(tmp_path: Path) -> None:
    """Fewer samples than features, summed in single precision."""
    rows = np.random.default_rng(0).normal(size=(20, 200)).astype(np.float32)
    np.savez(tmp_path / "edm.npz", mu=rows.mean(0), sigma=np.cov(rows.T).astype(np.float32))
    assert len(Reference.read(tmp_path / "edm.npz").moments["feature"][0]) == 200


def test_damaged_references(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    small_reference().save(path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:200] + bytes(50) + whole[250:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"r\.npz: not a readable \.npz file"):
            Reference.read(path)


# --- the image judge --------------------------------------------------------------------------------------------------


def photos(count: int, seed: int, classes: Sequence[int] = (0, 1, 2, 3)) -> Data:
    """8 x 8 images in bytes: a blob in the quadrant of its class, of random place and brightness, and some grain."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.tensor(classes)[torch.randint(len(classes), (count,), generator=rng)]
    centre = torch.stack([y // 2, y % 2], 1) * 4 + 1.5 + 0.5 * torch.randn(count, 2, generator=rng)
    place = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))
    distance = (place - centre[:, :, None, None]).square().sum(1)
    bright = 1.2 + 0.3 * torch.rand(count, 1, 1, generator=rng)
    x = bright * torch.exp(-distance / 4) - 0.8 + 0.05 * torch.randn(count, 8, 8, generator=rng)
    return Data("photos", quantize(x[:, None].clamp(-1, 1)), y)


@pytest.fixture(scope="module")
def random_network() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier((1, 8, 8), 4, width=8, features=12).eval()


@pytest.fixture(scope="module")
def camera(random_network: Classifier) -> ImageJudge:
    return ImageJudge(Reference.measure(photos(300, 0), random_network, "random"), random_network, "photos")


@pytest.fixture(scope="module")
def good(camera: ImageJudge) -> dict[str, float]:
    """Scores of fresh samples of the law."""
    return measure_data(photos(300, 1), camera).metrics


def test_the_floor_has_the_models_number_of_samples() -> None:
    """Of all rows with replacement, of a part of them without; the reference's own where neither can be."""
    whole = Reference.measure(photos(500, 0), Toy8(), "")
    judge = ImageJudge(whole, Toy8(), "")
    floors = [judge.floor(n) for n in (50, 500, DRAWS)]
    assert [floor.samples for floor in floors] == [50, 500, DRAWS]
    values = [floor.metrics["fd_feature"] for floor in floors]
    assert values == sorted(values, reverse=True) and values[0] > 5 * values[1] > 25 * values[2] > 0
    assert "fd_pixel" not in floors[0].metrics and "fd_pixel is known for 10,000 only" in floors[0].note
    assert floors[2].metrics["fd_pixel"] == whole.floors["fd_pixel"]
    part = dataclasses.replace(whole, rows=whole.rows[:300])
    judge = dataclasses.replace(judge, reference=part)
    few, many = judge.floor(100), judge.floor(400)
    assert few.samples == 100 and "100 real images, of the 500" in few.note
    assert many.samples == DRAWS and many.metrics["fd_feature"] == whole.floors["fd_feature"]
    halves = judge.halves()
    assert halves is not None and halves.samples == 250
    assert halves.metrics["fd_feature"] == whole.floors["fd_feature_halves"] and "recall" in halves.metrics
    shown = summary.truth_columns({"floor": dataclasses.asdict(many), "halves": dataclasses.asdict(halves)}, 400)
    assert list(shown) == ["floor, n=10000", "halves, n=250"]
    assert any("floor, n=10000: 10,000 real images" in line for line in summary.table_of(shown))


class Toy8(nn.Module):
    """Features are four pixels of an 8 x 8 image."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, ::4, ::4].flatten(1)


def test_copies_are_found_out() -> None:
    """About half of a memoriser's samples are copies of the half that plays the training set."""
    real = photos(600, 0)
    judge = ImageJudge(Reference.measure(real, nn.Flatten(), ""), nn.Flatten(), "")
    fresh, copies = (measure_data(given, judge).metrics for given in (photos(600, 1), real))
    assert fresh["memorisation_share"] < 0.04 and fresh["memorisation_ratio"] == pytest.approx(1, abs=0.1)
    assert copies["memorisation_share"] == pytest.approx(0.5, abs=0.02) and copies["memorisation_ratio"] < 0.6
    assert copies["sliced_wasserstein"] < 1e-3 < fresh["sliced_wasserstein"]
    assert judge.floor(600).metrics["memorisation_share"] == 0.01
    for key in ("c2st", "density", "memorisation_share", "memorisation_ratio"):
        assert METRICS[key].aim == "floor"


def test_what_is_missing_is_said() -> None:
    class Wider(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).repeat(1, 5)[:, :260]

    judge = ImageJudge(Reference.measure(photos(20, 0), Wider(), ""), Wider(), "")
    scores = measure_data(photos(20, 1), judge)
    assert scores.intervals == {} and "fd_feature_infinity" not in scores.metrics
    interval, infinity = scores.notes
    assert "No bootstrap interval beyond 256 features (260 here)" in interval
    assert "needs 20 samples per feature, 5,200 here; 20 were kept" in infinity
    assert interval in summary.table_of({"student": dataclasses.asdict(scores)})


def test_judges_name_what_they_measure(camera: ImageJudge) -> None:
    names = measure_data(photos(300, 1), camera).metrics.keys()
    assert names == camera.names and "memorisation_share" not in names  # of too few real images
    for law in (ring8(), Gaussian([0.0, 0.0], 0.5), Empirical(torch.randn(50, 2))):
        judge = ExactJudge(law)
        assert measure_data(Data("p", law.sample(150), None), judge).metrics.keys() == judge.names


def test_every_metric_is_explained(toy: ImageJudge) -> None:
    text = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    names = {*summary.MAIN, *toy.names, *ExactJudge(ring8()).names, "fid", "inception_score"}
    for name in sorted(names):
        assert name.startswith("share_") or name in METRICS, name
    skipped = {"held_out_accuracy", "fd_feature_rest", "mmd2", "log_mmd2"}
    for name in names - skipped:
        assert name.startswith("share_") or f"`{name}`" in text, name


def test_the_data_themselves_have_no_distance(camera: ImageJudge) -> None:
    scores = measure_data(photos(300, 0), camera).metrics
    trace = float(camera.reference.moments["pixel"][1].trace())
    assert abs(scores["fd_pixel"]) < 1e-10 * trace
    assert abs(scores["fd_feature"]) < 1e-6 * float(camera.reference.moments["feature"][1].trace())
    assert scores["precision"] == scores["recall"] == scores["coverage"] == 1
    assert scores["c2st"] < 0.4  # copies: below chance


def noised(level: float) -> Data:
    fresh = photos(300, 1)
    eps = torch.randn(fresh.x.shape, generator=torch.Generator().manual_seed(7))
    return Data("noised", fresh.x + level * eps, fresh.y)


def blurred(times: float) -> Data:
    fresh = photos(300, 1)
    x = fresh.x
    for _ in range(int(times)):
        x = nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1), "replicate"), 3, 1)
    return Data("blurred", x, fresh.y)


def dropped(classes: float) -> Data:
    return photos(300, 1, range(int(classes), 4))


def copied(times: float) -> Data:
    fresh = photos(300, 1)
    rows = torch.arange(300) % (300 // int(times))
    assert fresh.y is not None
    return Data("copied", fresh.x[rows], fresh.y[rows])


HARMS: list[tuple[Callable[[float], Data], list[float], str, str]] = [
    (noised, [0.1, 0.3, 0.9], "fd_feature fd_pixel kid c2st fd_feature_infinity", "precision density coverage"),
    (blurred, [1, 3, 9], "fd_feature fd_pixel kid fd_feature_infinity", "coverage"),
    (dropped, [1, 2, 3], "fd_feature fd_pixel kid fd_feature_infinity", "recall coverage"),
    (copied, [3, 20, 100], "fd_feature fd_pixel", "recall coverage"),
]


@pytest.mark.parametrize(("harm", "levels", "rising", "falling"), HARMS, ids=["noise", "blur", "drop", "copies"])
def test_scores_get_worse_with_the_samples(
    camera: ImageJudge,
    good: dict[str, float],
    harm: Callable[[float], Data],
    levels: list[float],
    rising: str,
    falling: str,
) -> None:
    scores = [good, *(measure_data(harm(level), camera).metrics for level in levels)]
    for name in rising.split() + falling.split():
        sign = 1 if name in rising.split() else -1
        values = [sign * score[name] for score in scores]
        assert values == sorted(values) and values[0] < values[-1], (name, values)


def test_pixels_are_a_feature_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reference", "digits", "--features", "pixels", "--out", str(tmp_path / "r.npz")]) == 0
    place = ["--reference", str(tmp_path / "r.npz"), "--out", str(tmp_path / "out")]
    assert cli.main(["evaluate", "digits@2", "--samples", "50", "--features", "pixels", *place]) == 0
    (row,) = json.loads((tmp_path / "out" / "contest.json").read_text())["rows"]
    assert row["metrics"]["fd_feature"] == pytest.approx(row["metrics"]["fd_pixel"], rel=1e-9)
    assert "class_accuracy" not in row["metrics"] and row["metrics"]["kid"] > 0
    assert cli.main(["evaluate", "digits@2", "--features", "digits", *place]) == 2
    assert "made with the feature network" in capsys.readouterr().err


def test_class_scores_in_closed_form(toy: ImageJudge) -> None:
    """100 images, 40, 30, 20 and 10 of the four classes, of which every tenth carries the next class's label."""
    wanted = torch.arange(4).repeat_interleave(torch.tensor([40, 30, 20, 10]))
    x = toy_images(torch.zeros(100, 1, 4, 4), one_hot(wanted, 4))
    labels = wanted.clone()
    labels[::10] = (labels[::10] + 1) % 4
    scores = measure_data(Data("toy", x, labels), toy, batch=33)
    assert scores.metrics["class_accuracy"] == pytest.approx(0.9, rel=1e-14)
    assert scores.metrics["class_balance"] == pytest.approx(0.15 + 0.05, rel=1e-12)
    assert scores.details["share_by_class"] == pytest.approx([0.4, 0.3, 0.2, 0.1], rel=1e-14)
    # of those asked for 0: 36 right and 1 of class 3; for 1: 27 and 4 of class 0; and so on
    assert scores.details["accuracy_by_class"] == pytest.approx([36 / 37, 27 / 31, 18 / 21, 9 / 11], rel=1e-14)
    # the classifier's logits are 2 * 0.75 and 2 * -0.75, rounded down to bytes
    odds = math.exp(2 * ((223 - 32) / 127.5))
    sure, other = odds / (odds + 3), 1 / (odds + 3)
    mean = [share * sure + (1 - share) * other for share in (0.4, 0.3, 0.2, 0.1)]
    one = -sure * math.log(sure) - 3 * other * math.log(other)
    every = -sum(p * math.log(p) for p in mean)
    assert scores.metrics["classifier_score"] == pytest.approx(math.exp(every - one), rel=1e-6)


def test_labels_that_the_classifier_does_not_know(toy: ImageJudge) -> None:
    given = toy_data(20)
    with pytest.raises(ValueError, match=r"^labels: the samples have class 4, the feature network knows 4 classes"):
        measure_data(Data("toy", given.x, torch.full((20,), 4)), toy)


@pytest.mark.parametrize("count", [2, 3, 6, 9, 99])
def test_few_samples_have_the_scores_that_they_can_have(toy: ImageJudge, count: int) -> None:
    scores = toy_scores(toy, samples=count).metrics
    assert all(math.isfinite(value) for value in scores.values())
    assert ("kid" in scores) == (count > 5) and "c2st" not in scores


def test_quantize_is_what_a_file_would_hold(toy: ImageJudge) -> None:
    raw = dataclasses.replace(toy, quantize=False)
    drawn = latents(0, range(300), (1, 4, 4), 4)
    assert drawn.labels is not None
    x = toy_images(drawn.z, one_hot(drawn.labels, 4))
    stored = np.trunc((127.5 * x + 128).clamp(0, 255).numpy()).astype(np.uint8)
    from_file = torch.from_numpy(stored.astype(np.float32) / 127.5 - 1)
    assert torch.equal(quantize(x), from_file) and torch.equal(quantize(from_file), from_file)
    on, off = (measure_data(Data("toy", x, drawn.labels), judge).metrics for judge in (toy, raw))
    assert on["fd_pixel"] != off["fd_pixel"]
    close(measure_data(Data("toy", from_file, drawn.labels), raw).metrics, on, 1e-14)


def test_watching_sees_the_half_only(camera: ImageJudge) -> None:
    fresh = photos(200, 1)

    def scores(judge: ImageJudge, **moments: tuple[Tensor, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        reference = dataclasses.replace(judge.reference, moments={**judge.reference.moments, **moments})
        judge = dataclasses.replace(judge, reference=reference)
        return measure_data(fresh, judge.watching()).metrics, measure_data(fresh, judge).metrics

    watched, final = scores(camera)
    assert camera.watching().watched and watched["fd_feature"] != final["fd_feature"]
    assert watched.keys() <= final.keys() and "fd_pixel" not in watched and "kid" not in watched
    zero = torch.zeros(12, dtype=torch.float64), torch.eye(12, dtype=torch.float64)
    other_watched, other_final = scores(camera, feature=zero)
    assert other_watched == watched and other_final["fd_feature"] != final["fd_feature"]
    other_watched, other_final = scores(camera, feature_half=zero)
    assert other_watched["fd_feature"] != watched["fd_feature"] and other_final == final
    other_watched, other_final = scores(camera, feature_rest=zero)
    assert other_watched == watched and other_final["fd_feature_rest"] != final["fd_feature_rest"]


def test_the_rest_does_not_see_the_half_that_chose_the_best_step() -> None:
    given = toy_data(60)
    rng = stream(0, "reference")
    torch.randint(60, (DRAWS,), generator=rng)
    half = torch.randperm(60, generator=rng)[:30]
    x = given.x.clone()
    x[half] = -x[half]
    one, two = (Reference.measure(d, Toy(), "") for d in (given, Data("toy", x, given.y)))
    assert not torch.equal(one.moments["feature_half"][0], two.moments["feature_half"][0])
    assert not torch.equal(one.moments["feature"][0], two.moments["feature"][0])
    for a, b in zip(one.moments["feature_rest"], two.moments["feature_rest"], strict=True):
        assert torch.equal(a, b)
    rest = [measure_data(given, ImageJudge(r, Toy(), "")).metrics["fd_feature_rest"] for r in (one, two)]
    assert rest[0] == rest[1] > 0


# --- the exact judge --------------------------------------------------------------------------------------------------

TRUE_DENSITY = -math.log(8) - math.log(2 * math.pi * 0.01) - 1  # of ring8, whose modes are 15 of their widths apart


def ring_scores(x: Tensor, seed: int = 0) -> dict[str, float]:
    return measure_data(Data("points", x, None), ExactJudge(ring8(), seed)).metrics


def test_the_truth_scores_near_the_floor() -> None:
    n = 1500
    floor = ExactJudge(ring8()).floor(n).metrics
    scores = ring_scores(ring8().sample(n, torch.Generator().manual_seed(9)))
    assert scores.keys() == floor.keys()
    for found in (scores, floor):
        assert found["log_density"] == pytest.approx(TRUE_DENSITY, abs=4 / math.sqrt(n))
        assert found["mode_recall"] == 1
        assert found["mode_outside"] == pytest.approx(math.exp(-4.5), abs=4 * 0.1 / math.sqrt(n))
        assert found["mode_spread"] == pytest.approx(1, abs=4 / math.sqrt(2 * n))
        assert found["c2st"] == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * n))
        shares = [value for name, value in found.items() if name.startswith("share_")]
        # a mode's disc of three widths holds all but exp(-4.5) of it
        assert len(shares) == 8 and sum(shares) == pytest.approx(1 - math.exp(-4.5), abs=4 * 0.1 / math.sqrt(n))
        assert found["mmd"] == pytest.approx(math.sqrt(found["mmd2"])) and found["mmd"] < 0.06
        assert found["log_mmd2"] == pytest.approx(math.log(found["mmd2"]))
        assert found["sliced_wasserstein"] < 0.2


def test_dropped_modes_and_narrow_ones() -> None:
    n = 1500
    angles = torch.arange(8) * math.pi / 4
    means = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    truth, six, narrow = (
        ring_scores(means[torch.arange(n) % modes] + std * noise) for modes, std in ((8, 0.1), (6, 0.1), (8, 0.02))
    )
    assert (truth["mode_recall"], six["mode_recall"], narrow["mode_recall"]) == (1, 0.75, 1)
    assert six["share_6"] == six["share_7"] == 0 and six["share_0"] > 0.15
    assert six["log_density"] == pytest.approx(truth["log_density"], abs=0.1)  # it does not see them
    wanted = TRUE_DENSITY + 1 - 0.02**2 / 0.1**2
    assert narrow["log_density"] == pytest.approx(wanted, abs=0.01) and narrow["log_density"] > TRUE_DENSITY + 0.9
    assert narrow["mode_spread"] == pytest.approx(0.2, rel=0.05) and narrow["mode_outside"] == 0
    assert "mode_spread" not in ring_scores(torch.zeros(150, 2))  # all outside
    for worse in (six, narrow):
        assert worse["c2st"] > truth["c2st"] + 0.03
    assert six["mmd"] > 2 * truth["mmd"] and six["sliced_wasserstein"] > 2 * truth["sliced_wasserstein"]


def test_points_and_gaussians_as_targets() -> None:
    points = Empirical(torch.randn(50, 2, generator=torch.Generator().manual_seed(0)))
    scores = measure_data(Data("p", points.sample(120, torch.Generator().manual_seed(1)), None), ExactJudge(points))
    assert "log_density" not in scores.metrics and scores.metrics["mmd"] < 0.2
    scores = measure_data(Data("p", torch.zeros(120, 2), None), ExactJudge(Gaussian([0.0, 0.0], 0.5)))
    assert scores.metrics["log_density"] == pytest.approx(-math.log(2 * math.pi * 0.25), rel=1e-12)
    assert "mode_recall" not in scores.metrics and scores.metrics["c2st"] > 0.9


def test_watching_an_exact_law_draws_another_truth() -> None:
    judge, x = ExactJudge(ring8()), Data("p", ring8().sample(150, torch.Generator().manual_seed(1)), None)
    watched, final = (measure_data(x, j).metrics for j in (judge.watching(), judge))
    assert watched.keys() == final.keys() and watched["mmd"] != final["mmd"]
    assert watched["log_density"] == final["log_density"]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_tally_does_not_grow_with_the_samples(toy: ImageJudge) -> None:
    x, tally, other = toy_data(500).x, toy.tally(), toy.tally()
    sizes = []
    for _ in range(2 * KEPT // 500 + 5):
        tally.add(x, None)
        sizes.append(sum(tensor.numel() for tensor in tally.tensors().values()))
    assert len(tally.rows) == KEPT
    assert set(sizes[KEPT // 500 - 1 :]) == {sizes[-1]} and sizes[0] < sizes[-1]
    other.merge(tally.tensors())
    other.merge(tally.tensors())
    assert len(other.rows) == KEPT and sum(tensor.numel() for tensor in other.tensors().values()) == sizes[-1]
    assert other.moments["feature"].count == 2 * 500 * len(sizes)


class Wide(nn.Module):
    """2048 features of an 8-bit RGB image, as Inception has."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, count)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert return_features
        return torch.relu(self.layer(x.flatten(1).float() / 128 - 1))


def script(path: Path, size: int, count: int) -> Path:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(0)
        torch.jit.script(Wide(size, count)).save(str(path))
    return path


MEASURED = """
import json, sys, torch
from pathlib import Path
from limbeck.evaluate import measure
from limbeck.evaluate.judge import read_judge

def resident():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

torch.set_num_threads(1)
judge = read_judge(Path(sys.argv[1]), sys.argv[2], True)
before = resident()
scores = measure(lambda z, cond: z, 1, judge, (1, 4, 4), 0, samples=2000)
print(json.dumps({"grown": resident() - before, "metrics": scores.metrics}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc: the peak of memory was not measured")
def test_memory_of_an_evaluation_with_the_features_of_inception(tmp_path: Path) -> None:
    """At most 600 MiB, for 2,000 samples. A child's ru_maxrss would begin at its parent's peak; VmHWM is its own."""
    network = script(tmp_path / "inception-2015-12-05.pt", 48, 2048)
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "edm.npz"), str(network)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    assert 50 < found["grown"] < 600  # the moments alone take 32 MiB
    assert found["metrics"]["fid"] == found["metrics"]["fd_feature"] > 0


# --- TorchScript features ---------------------------------------------------------------------------------------------


class Means(nn.Module):
    """Channel means of bytes, and the highest; fails for anything but bytes in three channels."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert return_features and x.dtype == torch.uint8 and x.shape[1] == 3
        return torch.cat([x.double().mean([2, 3]), x.amax([1, 2, 3])[:, None].double()], 1)


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).float()


class Strict(nn.Module):
    """Reads 8 x 8 only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape([-1, 192]).float()[:, :5] + torch.zeros(x.shape[0], 5)


class List(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x.flatten(1).float()]


class Judging(nn.Module):
    """Features are the channel means; without return_features, probabilities (or logits) of three classes."""

    def __init__(self, logits: bool) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        means = x.double().mean([2, 3]) / 255
        if return_features:
            return means
        scores = 9 * means + (0.0 if no_output_bias else 5.0) * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        return scores if self.logits else torch.softmax(scores, 1)


class Mute(nn.Module):
    @torch.jit.export
    def other(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name, module in (("probabilities", Judging(False)), ("logits", Judging(True))):
            torch.jit.script(module).save(str(folder / f"{name}.pt"))
        for module in (Means(), Plain(), Strict(), Mute(), List()):
            torch.jit.script(module).save(str(folder / f"{type(module).__name__.lower()}.pt"))
    torch.save({"weights": torch.zeros(3)}, folder / "pickle.pt")
    (folder / "text.pt").write_text("hello")
    whole = (folder / "means.pt").read_bytes()
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    return folder


def test_a_script_reads_bytes_in_three_channels(scripts: Path) -> None:
    network = features.load(str(scripts / "means.pt"))
    stored = torch.randint(0, 256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    x = stored / 127.5 - 1
    mean = stored.double().mean([2, 3])
    torch.testing.assert_close(network(x)[:, :3], mean, rtol=1e-13, atol=0)
    grey = network(x[:, :1])
    torch.testing.assert_close(grey[:, :3], mean[:, :1].expand(-1, 3), rtol=1e-13, atol=0)
    assert network(torch.full((1, 1, 2, 2), 9.0)).tolist() == [[255.0] * 4]
    assert network(torch.full((1, 3, 2, 2), -9.0)).tolist() == [[0.0] * 4]
    assert features.load(str(scripts / "plain.pt"))(x).shape == (5, 192)
    with pytest.raises(
        ValueError, match=r"features: this network reads images \(B, 1 or 3, H, W\), got \(5, 2, 8, 8\)"
    ):
        network(x[:, :2])
    with pytest.raises(ValueError, match=r"^features: the script fails on images \(3, 9, 9\) \(.*$"):
        features.load(str(scripts / "strict.pt"))(torch.zeros(2, 3, 9, 9))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pickle.pt", "pickle.pt is not a TorchScript file"),
        ("text.pt", "text.pt is not a TorchScript file"),
        ("half.pt", "half.pt is not a TorchScript file"),
        ("mute.pt", "mute.pt has no forward method"),
        ("gone.pt", "no file '"),
    ],
)
def test_what_is_no_script_is_refused(scripts: Path, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        features.load(str(scripts / name))
    assert str(caught.value).startswith("features: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["probabilities", "logits"])
def test_the_inception_score_of_a_script(scripts: Path, name: str) -> None:
    """exp(mean KL) of the probabilities without the last layer's bias, whether the script gives them or logits."""
    rng = torch.Generator().manual_seed(0)
    given = Data("rgb", torch.randint(0, 256, (40, 3, 4, 4), generator=rng) / 127.5 - 1, None)
    judge = measured_judge(given, str(scripts / f"{name}.pt"), True)
    judge.check("rgb", given.shape)
    means = (given.x.double() + 1).mul(127.5).round().mean([2, 3]) / 255
    p = torch.softmax(9 * means, 1)
    wanted = float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp())
    for judge_, key in ((judge, "classifier_score"), (dataclasses.replace(judge, is_fid=True), "inception_score")):
        scores = measure_data(given, judge_, batch=7).metrics
        assert scores[key] == pytest.approx(wanted, rel=1e-9) and key in judge_.names
        assert len({"classifier_score", "inception_score"} & scores.keys()) == 1
        assert "classifier_score" not in measure_data(given, judge_.watching()).metrics
    silent = measured_judge(given, str(scripts / "means.pt"), True)  # gives features alone
    assert "classifier_score" not in measure_data(given, silent).metrics | dict.fromkeys(silent.names)


def test_a_script_is_named_as_a_program(
    scripts: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features._told.clear()
    network = scripts / "means.pt"
    line = f"limbeck evaluate {digits} --data digits --features {network} --samples 50 --json"
    assert cli.main(shlex.split(line)[1:]) == 0
    said = capsys.readouterr()
    warned = [row for row in said.err.splitlines() if "program" in row]
    digest = features.digest(str(network))[:16]
    assert warned == [f"features: {network} is a program that now runs with your rights (SHA-256 {digest}...)"]
    (row,) = json.loads(said.out)["rows"]
    assert row["metrics"]["fd_feature"] >= 0 and "fid" not in row["metrics"] and "class_accuracy" not in row["metrics"]
    reference = tmp_path / "r.npz"
    assert cli.main(["reference", "digits", "--features", str(network), "--out", str(reference)]) == 0
    assert "program" not in capsys.readouterr().err  # said once
    assert Reference.read(reference).features == features.digest(str(network))


def test_only_inceptions_features_give_fid(toy: ImageJudge) -> None:
    def reference(count: int) -> Reference:
        return Reference({"feature": (torch.zeros(count), torch.zeros(count, count))}, torch.empty(0, count), {}, "", 0)

    assert is_inception("/some/where/inception-2015-12-05.pt", reference(2048))
    assert not is_inception("inception-2015-12-05.pt", reference(2047))
    for name in ("inception-v3.pt", "inception-2015-12-05-mine.pt", "my-inception-2015-12-05.pt", "digits"):
        assert not is_inception(name, reference(2048))
    scores = toy_scores(dataclasses.replace(toy, is_fid=True), samples=60).metrics
    assert scores["fid"] == scores["fd_feature"]
    assert "fid" not in toy_scores(toy, samples=60).metrics


# --- the best checkpoint ----------------------------------------------------------------------------------------------

WATCHED = {2: 0.5, 4: 0.1, 6: 0.3, 8: 0.2}


def distill(out: Path, tiny: dict[str, Any], **keys: Any) -> dict[str, Any]:
    every = {"save": 1, "log": 1, "sample": 0, "evaluate": 2}
    settings = {**tiny, "steps": 8, "every": every, **keys}
    return limbeck.distill("exact:ring8", out=out, tell=lambda line: None, **settings)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Tensor]]:
    """Scores by step, and the weights that had them."""
    seen: dict[int, dict[str, Tensor]] = {}

    def watch(job: run.Job) -> dict[str, float]:
        step = job.trainer.step
        seen[step] = {name: tensor.clone() for name, tensor in job.trainer.ema.module.state_dict().items()}
        return {"mmd": WATCHED[step], "log_density": -1.0}

    monkeypatch.setattr(loop, "_watch", watch)
    return seen


def test_the_best_step_is_kept(
    tmp_path: Path, tiny: dict[str, Any], watched: dict[int, dict[str, Tensor]], equal: Any
) -> None:
    result = distill(tmp_path / "r", tiny)
    best = result["best"]
    assert (best["step"], best["metric"], best["value"]) == (4, "mmd", 0.1) and best["step"] < result["steps"] == 8
    file = tmp_path / "r" / "generator-best.safetensors"
    chosen, last = (artifact.load_generator(path) for path in (file, tmp_path / "r" / "generator.safetensors"))
    assert equal(dict(chosen.state_dict()), watched[4]) and equal(dict(last.state_dict()), watched[8])
    assert not equal(watched[4], watched[8]) and artifact.read_card(file)["step"] == 4
    for model, scores in ((chosen, best), (last, result["student"])):
        again = measure(model, 1, ExactJudge(ring8()), (2,), 0, samples=200)
        close(again.metrics, scores["metrics"], 1e-12)
    assert best["metrics"]["mmd"] != result["student"]["metrics"]["mmd"]
    assert json.loads((tmp_path / "r" / "report.json").read_text())["best"] == best
    assert [row["metrics"]["mmd"] for row in result["history"]] == list(WATCHED.values())


def test_the_page_says_which_is_which(
    tmp_path: Path, tiny: dict[str, Any], watched: dict[int, dict[str, Tensor]]
) -> None:
    distill(tmp_path / "r", tiny)
    text = Outline((tmp_path / "r" / "report.html").read_text()).text
    assert "Best, step 4" in text
    assert "The first column is the last step. Best is the checkpoint that scored best on other noise" in text
    assert text.index("Student") < text.index("Best, step 4")


@pytest.mark.parametrize("stop", [3, 4, 5, 7])
def test_a_stopped_run_keeps_the_choice(
    tmp_path: Path, tiny: dict[str, Any], watched: dict[int, dict[str, Tensor]], stop: int
) -> None:
    whole = distill(tmp_path / "a", tiny)
    with pytest.MonkeyPatch.context() as patched:
        advance = Trainer.advance

        def play(self: Any, source: Any) -> Any:
            if self.step == stop - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return advance(self, source)

        patched.setattr(Trainer, "advance", play)
        with pytest.raises(Stopped):
            distill(tmp_path / "b", tiny)
    resumed = distill(tmp_path / "b", tiny)
    for name in ("generator-best.safetensors", "checkpoints/ckpt-000000008/state.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for best in (whole["best"], resumed["best"]):
        best.pop("ms_per_image")
    assert resumed["best"] == whole["best"]


def test_a_best_model_newer_than_the_checkpoint_is_not_taken_for_it(
    tmp_path: Path, tiny: dict[str, Any], watched: dict[int, dict[str, Tensor]], equal: Any
) -> None:
    """A kill after step 4, whose model is stored as the best, and whose last checkpoint is an earlier one."""
    out, told = tmp_path / "r", list[str]()
    distill(out, tiny, keep=8)
    file = out / "generator-best.safetensors"

    def resumed(step: int) -> loop.Best | None:
        for path in (out / "checkpoints").iterdir():
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        assert artifact.read_card(file)["step"] == 4
        recipe = config.resolve(config.read_toml(out / "recipe.toml"), METHODS)
        return loop.resume(run.distillation(recipe, out, told.append), told.append)[1]

    best = resumed(5)
    assert best is not None and best.step == 4
    assert resumed(3) is None and any("damaged, missing or newer" in line for line in told)  # that of step 2 is lost
    best = resumed(2)  # where it is that of the checkpoint
    assert best is not None and best.step == 2 and artifact.read_card(file)["step"] == 2
    assert equal(dict(artifact.load_generator(file).state_dict()), watched[2])


def test_without_watching_there_is_no_best(tmp_path: Path, tiny: dict[str, Any]) -> None:
    result = distill(tmp_path / "r", tiny, every={"save": 1, "log": 1, "sample": 0, "evaluate": 0})
    assert "best" not in result and not list((tmp_path / "r").glob("*-best.safetensors"))


def test_watched_scores_are_not_the_final_ones(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Other samples, a quarter as many, and another truth."""
    result = distill(tmp_path / "r", tiny)
    last = result["history"][-1]
    assert last["step"] == 8 and last["metrics"]["log_density"] != result["student"]["metrics"]["log_density"]
    model = artifact.load_generator(tmp_path / "r")
    again = measure(model, 1, ExactJudge(ring8()).watching(), (2,), 0, samples=50, first=VALIDATION)
    close(again.metrics, last["metrics"], 1e-12)


# --- side by side -----------------------------------------------------------------------------------------------------


class Calls:
    """Samples that networks were asked for, by class; calls with one row are those that try a file out."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.rows = {"generator": 0, "denoiser": 0}
        call = nn.Module.__call__

        def counted(module: nn.Module, *args: Any, **keys: Any) -> Any:
            for kind, cls in (("generator", Generator), ("denoiser", Denoiser)):
                if isinstance(module, cls) and len(args[0]) > 1:
                    self.rows[kind] += len(args[0])
            return call(module, *args, **keys)

        patched.setattr(nn.Module, "__call__", counted)

    def taken(self) -> dict[str, int]:
        rows, self.rows = self.rows, dict.fromkeys(self.rows, 0)
        return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on ring8 that was watched. Tests read it only."""
    out = tmp_path_factory.mktemp("finished") / "run"
    limbeck.distill(
        "exact:ring8", out=out, tell=lambda line: None, steps=4, batch=8, evaluate={"samples": 200, "teacher_steps": 4},
        template={"network": "mlp", "width": 8, "depth": 1}, every={"sample": 0, "evaluate": 2},
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("points") / "points.npz"
    np.savez(path, x=ring8().sample(200, torch.Generator().manual_seed(3)).numpy())
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 of the digits with their labels, as bytes."""
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    given = limbeck.data.load("digits")
    x = ((given.x[:120] + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    assert given.y is not None
    np.savez(path, x=x.numpy(), y=given.y[:120].numpy())
    return path


QUICK = Evaluation(samples=200, teacher_steps=4)


def quiet(line: str) -> None:
    pass


def test_side_by_side(finished: Path, points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [str(finished), "exact:ring8@5", str(points)]
    result = told(capsys, *sources, "--samples", 200, "--teacher_steps", 4, "--out", tmp_path / "out")
    assert [row["name"] for row in result["rows"]] == sources and result["law"] == "exact:ring8"
    assert [row["nfe"] for row in result["rows"]] == [1, 9, 0]
    run_row, teacher, given = result["rows"]
    report = json.loads((finished / "report.json").read_text())
    close(run_row["metrics"], report["student"]["metrics"], 1e-12)
    assert result["floor"] == report["floor"]
    assert (run_row["steps"], run_row["images"], run_row["seconds"]) == (4, 32, report["seconds"])
    direct = measure_data(limbeck.data.load(str(points)), ExactJudge(ring8()))
    close(given["metrics"], direct.metrics, 1e-12)
    assert given["ms_per_image"] is None and teacher["metrics"]["mmd"] < run_row["metrics"]["mmd"]
    assert result["settings"]["samples"] == 200 and result["settings"]["quantize"] is True
    assert {"versions", "machine", "commit", "hashes"} <= result.keys()
    assert json.loads((tmp_path / "out" / "contest.json").read_text()) == result
    text = Outline((tmp_path / "out" / "contest.html").read_text()).text
    for said in (
        "3 contestants against exact:ring8, 200 samples each",
        "Score over network calls",
        "Score over images",
    ):
        assert said in text
    for name in (*sources, "floor", "Target"):
        assert name in text
    assert cli.main(["evaluate", *sources, "--samples", "200", "--teacher_steps", "4"]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in (*sources, "floor", "mode_recall", "network calls"))


def test_a_contest_goes_on(finished: Path, points: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, out = Calls(monkeypatch), tmp_path / "out"
    sources = [str(finished), str(points), "exact:ring8@5"]
    with monkeypatch.context() as patched:

        def interrupted(*args: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(contests, "measure_data", interrupted)
        with pytest.raises(KeyboardInterrupt):
            contests.contest(sources, QUICK, out, quiet)
    assert calls.taken() == {"generator": 200, "denoiser": 0} and not (out / "contest.json").exists()
    first = contests.contest(sources, QUICK, out, quiet)
    # the student's are pictures alone; five steps of Heun's method are nine calls; a loss at 16 levels
    assert calls.taken() == {"generator": 2000, "denoiser": 9 * (200 + 2000) + 16 * 500}
    page = (out / "contest.html").stat().st_mtime_ns
    again = contests.contest(sources, QUICK, out, quiet)
    assert calls.taken() == {"generator": 0, "denoiser": 0}
    assert again == json.loads(json.dumps(first)) and (out / "contest.html").stat().st_mtime_ns == page
    other = contests.contest(sources, dataclasses.replace(QUICK, seed=1), out, quiet)
    assert calls.taken()["generator"] == 200 + 2000
    assert other["rows"][0]["metrics"]["mmd"] != first["rows"][0]["metrics"]["mmd"]
    assert not list(out.rglob("*.tmp"))


def test_the_teacher_stands_beside_its_student(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [finished, "--samples", 100, "--teacher_steps", 3, "--out", tmp_path / "out"]
    rows = told(capsys, *arguments)["rows"]
    assert [(row["name"], row["nfe"]) for row in rows] == [(str(finished), 1), ("exact:ring8", 5)]
    assert len(told(capsys, *arguments, "--teacher", "false")["rows"]) == 1
    assert len(told(capsys, finished, "exact:ring8@2", *arguments[1:5])["rows"]) == 2
    text = Outline((tmp_path / "out" / "contest.html").read_text()).text
    assert rows[0]["sha256"] in text and "commit" in text and torch.__version__ in text


def test_the_page_has_one_line_per_model_and_scores_first(finished: Path, tmp_path: Path) -> None:
    sources = [str(finished), "exact:ring8@3", "exact:ring8@5", "exact:gaussian@2"]
    settings = dataclasses.replace(QUICK, draws=2)
    result = contests.contest(sources, settings, tmp_path / "out", quiet)
    (calls, *_) = contests._curves(result)
    assert {name: len(points) for name, points in calls.series.items()} == {
        str(finished): 1, "exact:ring8": 2, "exact:gaussian": 1,
    }  # fmt: skip
    page = Outline((tmp_path / "out" / "contest.html").read_text())
    assert page.text.index("MMD") < page.text.index("network calls")
    spread = result["rows"][0]["spread"]["mmd"]
    assert spread > 0 and spread_text("mmd", spread).startswith("± ") and spread_text("mmd", spread) in page.text


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"nfe": 1, "metrics": 3}', "\x00"])
def test_damaged_scores_are_measured_anew(points: Path, tmp_path: Path, content: str) -> None:
    whole = contests.contest([str(points)], QUICK, tmp_path, quiet, against="exact:ring8")
    (stored,) = (tmp_path / "scores").iterdir()
    stored.write_text(content)
    assert contests.contest([str(points)], QUICK, tmp_path, quiet, against="exact:ring8")["rows"] == whole["rows"]
    assert json.loads(stored.read_text())["metrics"] == whole["rows"][0]["metrics"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"steps": 4, "history": [3]}'])
def test_a_damaged_report_is_named(
    finished: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ = tmp_path / "run"
    run_.mkdir()
    for name in ("recipe.toml", "generator.safetensors"):
        (run_ / name).write_bytes((finished / name).read_bytes())
    (run_ / "report.json").write_text(content)
    assert cli.main(["evaluate", str(run_), "--samples", "50", "--teacher", "false"]) == 2
    assert f"limbeck: {run_ / 'report.json'}: damaged" in capsys.readouterr().err


def test_scores_are_stored_by_what_they_depend_on(points: Path, tmp_path: Path) -> None:
    """Another file of the same name, or another judge, is scored anew."""
    path, out = tmp_path / "p.npz", tmp_path / "out"
    path.write_bytes(points.read_bytes())
    one = contests.contest([str(path)], QUICK, out, quiet, against="exact:ring8")
    np.savez(path, x=np.zeros((200, 2)))
    two = contests.contest([str(path)], QUICK, out, quiet, against="exact:ring8")
    three = contests.contest([str(path)], QUICK, out, quiet, against="exact:gaussian")
    assert len({result["rows"][0]["metrics"]["mmd"] for result in (one, two, three)}) == 3
    assert len(list((out / "scores").iterdir())) == 3


@pytest.mark.parametrize("level", [1.0, 5.0])
def test_the_same_weights_at_another_level_are_another_model(tmp_path: Path, level: float) -> None:
    denoiser = Preconditioned(networks.build("mlp", {"shape": [2], "width": 8, "depth": 1}), (2,))
    for name, sigma in (("a", 2.5), ("b", level)):
        (tmp_path / name).mkdir()
        artifact.save(tmp_path / name / "generator.safetensors", "generator", OneStep(denoiser, sigma), {})
    names = [str(tmp_path / name) for name in "ab"]
    one, two = contests.contest(names, QUICK, tmp_path / "out", quiet, against="exact:ring8")["rows"]
    assert one["metrics"]["mmd"] != two["metrics"]["mmd"]


def test_labels_that_are_not_the_denoisers_are_left_out(tmp_path: Path) -> None:
    """A teacher of three classes beside ten digits: its curve of losses is that without labels."""
    network = {"shape": [1, 8, 8], "classes": 3, "width": 16, "depth": 1, "heads": 2, "patch": 4}
    artifact.save(
        tmp_path / "few.safetensors", "denoiser", Preconditioned(networks.build("dit", network), (1, 8, 8), 3), {}
    )
    settings = dataclasses.replace(QUICK, samples=20, teacher_steps=2)
    contests.contest([str(tmp_path / "few.safetensors")], settings, tmp_path / "out", quiet, against="digits")
    assert "Denoising loss over noise levels" in (tmp_path / "out" / "contest.html").read_text()


def test_pictures_of_given_data_are_resized_for_the_page_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "pics").mkdir()
    for number in range(30):
        Image.fromarray(rng.integers(0, 256, (16, 16)).astype(np.uint8)).save(tmp_path / "pics" / f"{number}.png")
    settings = dataclasses.replace(QUICK, samples=20, teacher_steps=2, data=str(tmp_path / "pics"), features="digits")
    contests.contest(["digits"], settings, tmp_path / "out", quiet, size=8)
    assert "are not on this machine" not in (tmp_path / "out" / "contest.html").read_text()


def test_other_numbers_of_samples_are_named_on_the_terminal(points: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "exact:ring8@2", str(points), "--samples", "150"]) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert f"{points}, n=200" in head and "exact:ring8@2, n=" not in head


def test_other_numbers_of_samples_are_named(points: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, samples=150)
    result = contests.contest(["exact:ring8@2", str(points)], settings, tmp_path / "out", quiet)
    assert [row["samples"] for row in result["rows"]] == [150, 200]
    text = Outline((tmp_path / "out" / "contest.html").read_text()).text
    assert f"these have another one: {points} (200)." in text


@pytest.fixture(scope="module")
def gallery(student: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A contest of images."""
    out = tmp_path_factory.mktemp("gallery") / "out"
    settings = Evaluation(samples=120, teacher_steps=2)
    contests.contest([str(student), "digits@2", str(digits)], settings, out, quiet)
    return out


def test_a_contest_of_images(gallery: Path) -> None:
    result = json.loads((gallery / "contest.json").read_text())
    noise, teacher, real = (row["metrics"] for row in result["rows"])
    assert [row["nfe"] for row in result["rows"]] == [1, 3, 0]
    assert real["fd_feature"] < teacher["fd_feature"] < noise["fd_feature"]
    assert real["class_accuracy"] > 0.95 and noise["class_accuracy"] < 0.5
    assert real["precision"] == 1 and noise["precision"] < 0.5
    outline = Outline((gallery / "contest.html").read_text())
    assert "Distances fall with the number of samples" not in outline.text
    for said in ("Accuracy by class", "Share by class", "Nearest training images", "Smallest pixel distance"):
        assert said in outline.text
    assert len([at for tag, at in outline.elements if tag == "img"]) == 4  # three grids, and the neighbours
    assert "Nothing to show" not in outline.text and "not recorded" not in outline.text


def test_the_nearest_images_of_a_copy_are_itself(digits: Path, tmp_path: Path) -> None:
    """A generator that only knows one image of the data is found out."""
    given = limbeck.data.load("digits")

    class Copier(Generator):
        shape = latent_shape = (1, 8, 8)
        classes = 0

        def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
            return given.x[:1].expand(len(z), -1, -1, -1)

    judge = contests.judge_of("digits", QUICK, None, {})
    who = contests.Contestant("digits", Copier(), None, 2)
    (panel,) = contests._neighbours([who], judge, QUICK, None)
    assert "Smallest pixel distance of a sample to any training image: 0 (0 is a copy)" in panel.caption


def test_panels_without_data_say_so(student: Path, digits: Path, tmp_path: Path) -> None:
    """The student of a teacher whose data are not here."""
    generator = artifact.load_generator(student)
    artifact.save(tmp_path / "s.safetensors", "generator", generator, {"recipe": {"teacher": "gone"}})
    reference = str(artifact.bundled("digits-reference.npz"))
    settings = Evaluation(samples=60, reference=reference, features="digits")
    result = contests.contest([str(tmp_path / "s.safetensors")], settings, tmp_path / "out", quiet)
    assert result["law"] == "gone"
    text = Outline((tmp_path / "out" / "contest.html").read_text()).text
    assert "Nothing to show: the data of gone are not on this machine (give --data)." in text
    assert "Nothing to show: no contestant takes more than one network call" in text
    assert "Nothing to show: no contestant is a denoiser" in text
    assert text.count("This picture was not recorded") == 3


def test_the_data_of_a_teacher_of_ones_own(student: Path, digits: Path, tmp_path: Path) -> None:
    """A run folder holds pictures of samples: they are not what the teacher was taught."""
    teacher = tmp_path / "teacher"
    (teacher / "samples").mkdir(parents=True)
    (teacher / "samples" / "step-000000001.png").write_bytes(
        limbeck.pictures.png(limbeck.pictures.grid(torch.zeros(2, 1, 8, 8), 2))
    )
    (teacher / "recipe.toml").write_text(f'data = "{digits}"\n[method]\nname = "denoising"\n')
    generator = artifact.load_generator(student)
    artifact.save(tmp_path / "s.safetensors", "generator", generator, {"recipe": {"teacher": str(teacher)}})
    judge = read_judge(artifact.bundled("digits-reference.npz"), "digits", True)
    who = contests.contestant(str(tmp_path / "s.safetensors"), 4)
    (panel,) = contests._neighbours([who], judge, QUICK, None)
    assert "Smallest pixel distance" in panel.caption


def test_quantize_is_recorded(digits: Path, student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on, off = (told(capsys, student, "--samples", 60, "--quantize", word) for word in ("true", "false"))
    assert on["settings"]["quantize"] is True and off["settings"]["quantize"] is False
    assert on["rows"][0]["metrics"]["fd_pixel"] != off["rows"][0]["metrics"]["fd_pixel"]
    assert on["rows"][0]["metrics"]["fd_pixel"] == pytest.approx(off["rows"][0]["metrics"]["fd_pixel"], rel=0.05)


@pytest.mark.parametrize("name", ["gallery", "points"])
def test_a_browser_opens_the_page(name: str, gallery: Path, finished: Path, tmp_path: Path) -> None:
    if name == "points":
        contests.contest([str(finished), "exact:ring8@5"], QUICK, tmp_path / "out", quiet)
    page = (gallery if name == "gallery" else tmp_path / "out") / "contest.html"
    dom = opened(page.read_text(), tmp_path)
    root = root_of(dom)
    assert root.get("data-ready") == "yes" and "data-error" not in root
    assert Outline(dom).count("path", "line") >= 1


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(scripts: Path, student: Path, finished: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files for the command line, most of them bad."""
    folder = tmp_path_factory.mktemp("shelf")
    for path in (*scripts.iterdir(), student, digits):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "run").symlink_to(finished)
    arrays: dict[str, dict[str, Any]] = {
        "plane.npz": {"x": np.zeros((50, 2))}, "nan.npz": {"x": np.full((50, 1, 8, 8), np.nan)},
        "bytes.npz": {"x": np.full((50, 1, 8, 8), 200.0)}, "whole.npz": {"x": np.ones((50, 1, 8, 8), int)},
        "large.npz": {"x": np.zeros((50, 9, 9, 1), np.uint8)}, "rgb.npz": {"x": np.zeros((50, 8, 8, 3), np.uint8)},
        "classes.npz": {"x": np.zeros((50, 8, 8, 1), np.uint8), "y": np.full(50, 12)},
        "one.npz": {"x": np.zeros((1, 8, 8, 1), np.uint8)},
        "half.npz": {"x": np.linspace(0, 1, 50 * 64).reshape(50, 1, 8, 8)},
        "edmt.npz": {"mu": np.zeros(64), "sigma": np.triu(np.ones((64, 64)))},
        "edm5.npz": {"mu": np.zeros(5), "sigma": np.eye(5)}, "edm64.npz": {"mu": np.zeros(64), "sigma": -np.eye(64)},
    }  # fmt: skip
    for name, content in arrays.items():
        np.savez(folder / name, **content)
    (folder / "corrupt.npz").write_bytes(b"PK\x03\x04 nonsense")
    for kind in ("empty", "corrupt", "mixed", "unfinished", "pngs", "taught", "folder.npz"):
        (folder / kind).mkdir()
    (folder / "corrupt" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n nonsense")
    for name, side in (("mixed/a.png", 8), ("mixed/b.png", 9), ("pngs/a.png", 9), ("pngs/b.png", 9)):
        (folder / name).write_bytes(limbeck.pictures.png(limbeck.pictures.grid(torch.zeros(1, 1, side, 40), 1)))
    for kind in ("unfinished", "taught"):
        (folder / kind / "recipe.toml").write_text('teacher = "digits"\n')
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name in ("other.safetensors", "taught/classifier.safetensors"):
            artifact.save(folder / name, "classifier", Classifier((1, 8, 8), 10, 8, 64), {})
        artifact.save(folder / "wide.safetensors", "classifier", Classifier((3, 9, 9), 10, 8, 64), {})
    small_reference().save(folder / "toy.npz")
    (folder / "digits.ref.npz").write_bytes(artifact.bundled("digits-reference.npz").read_bytes())
    return folder


OTHER = "--features other.safetensors"
BAD: list[tuple[str, tuple[str, ...]]] = [
    ("evaluate", ("FILE: expected at least one",)),
    ("evaluate gone.npz", ("'gone.npz'",)),
    ("evaluate gone", ("'gone'",)),
    ("evaluate student.safetensors gone.npz", ("'gone.npz'",)),
    ("evaluate corrupt.npz --against digits", ("corrupt.npz: not a readable .npz file",)),
    ("evaluate empty --against digits", ("empty: holds no pictures",)),
    ("evaluate corrupt --against digits", ("a.png: not a readable picture",)),
    ("evaluate mixed --against digits", ("b.png: has 27 x 120 pixels, the others 32 x 160", "--size")),
    ("evaluate unfinished", ("unfinished: has no finished model yet",)),
    ("evaluate nan.npz --against digits", ("nan.npz: x contains NaN or Inf",)),
    ("evaluate whole.npz --against digits", ("uint8 or floating point, got int64",)),
    ("evaluate bytes.npz --against digits", ("bytes.npz: its values span [200, 200]", "[-1, 1]")),
    ("evaluate classes.npz --against digits", ("class 12", "10 classes")),
    ("evaluate one.npz --against digits", ("one.npz: scores need at least 2 samples, got 1",)),
    ("evaluate digits.npz", ("reference: there is none for 'digits.npz'", "--against")),
    ("evaluate gone.safetensors", ("gone.safetensors",)),
    # two things that do not fit: both are named
    ("evaluate plane.npz --against digits", ("plane.npz", "(2,)", "digits", "(1, 8, 8)")),
    ("evaluate large.npz --against digits", ("large.npz", "(1, 9, 9)", "digits", "(1, 8, 8)")),
    ("evaluate rgb.npz --against digits", ("rgb.npz", "(3, 8, 8)", "digits", "(1, 8, 8)")),
    ("evaluate pngs --size 16 --against digits", ("pngs", "(1, 16, 16)", "digits", "(1, 8, 8)")),
    ("evaluate student.safetensors large.npz", ("large.npz", "(1, 9, 9)", "digits", "(1, 8, 8)")),
    ("evaluate digits.npz --against exact:ring8", ("digits.npz", "(1, 8, 8)", "exact:ring8", "(2,)")),
    ("evaluate run digits.npz", ("digits.npz", "(1, 8, 8)", "exact:ring8", "(2,)")),
    ("evaluate run digits", ("digits", "(1, 8, 8)", "exact:ring8", "(2,)")),
    (f"evaluate digits --reference digits.ref.npz {OTHER}", ("digits.ref.npz", "HASH", "other.", "OTHER")),
    (f"evaluate student.safetensors --reference toy.npz {OTHER}", ("toy.npz", "abababababab", "other.", "OTHER")),
    (f"evaluate large.npz --reference digits.ref.npz {OTHER}", ("digits.ref.npz", "HASH", "other.", "OTHER")),
    ("evaluate large.npz --reference digits.ref.npz --features digits", ("(1, 9, 9)", "(1, 8, 8)")),
    ("evaluate student.safetensors --reference edm5.npz --features digits", ("edm5.npz: has 5", "digits gives 64")),
    ("evaluate student.safetensors --reference edm64.npz --features digits", ("edm64.npz", "positive semi-definite")),
    ("evaluate student.safetensors --data digits --features wide.safetensors",
     ("digits", "wide.safetensors", "(3, 9, 9)", "(1, 8, 8)")),
    ("distill digits --out o --evaluate.reference edm5.npz --evaluate.features digits",
     ("edm5.npz: has 5 features", "digits gives 64")),
    ("distill digits --out o --evaluate.reference edm64.npz --evaluate.features digits",
     ("edm64.npz", "positive semi-definite")),
    ("distill digits --out o --evaluate.reference edmt.npz --evaluate.features digits", ("edmt.npz", "not symmetric")),
    ("teach digits.npz --out o --evaluate.reference edm5.npz --evaluate.features digits", ("edm5.npz", "digits gives")),
    ("evaluate digits --data large.npz --features gone", ("digits", "(1, 8, 8)", "large.npz", "(1, 9, 9)")),
    ("evaluate half.npz --against digits", ("half.npz: its values span [0, 1]", "2 x - 1")),
    ("evaluate run --reference edm5.npz --features digits", ("evaluate.reference: an exact law",)),
    ("evaluate taught", ("taught: holds a classifier", "--features")),
    ("evaluate run --out text.pt", ("out: text.pt is a file",)),
    ("evaluate run --out text.pt/o", ("out: text.pt is a file",)),
    ("evaluate run --out=", ("out: is empty",)),
    ("evaluate run --teacher maybe", ("teacher: ", "'maybe'")),
    ("evaluate run digits.npz --size 8", ("size: ", "digits.npz")),
    # references and features
    ("evaluate student.safetensors --reference digits.ref.npz", ("evaluate.features: a reference needs a feature",)),
    ("evaluate student.safetensors --features digits", ("evaluate.features: needs evaluate.data",)),
    ("evaluate student.safetensors --reference gone.npz --features digits", ("gone.npz",)),
    ("evaluate student.safetensors --reference digits.npz --features digits", ("digits.npz: not a reference file",)),
    ("evaluate student.safetensors --reference digits.ref.npz --features gone", ("'gone'",)),
    ("evaluate student.safetensors --reference digits.ref.npz --features gone.pt", ("features: no file 'gone.pt'",)),
    ("evaluate student.safetensors --data digits --features text.pt", ("text.pt is not a TorchScript file",)),
    ("evaluate student.safetensors --data digits --features pickle.pt", ("pickle.pt is not a TorchScript file",)),
    ("evaluate student.safetensors --data gone --features digits", ("no file or folder 'gone'",)),
    # keys
    ("evaluate digits --smaples 50", ("smaples: unknown key, perhaps you meant samples",)),
    ("evaluate digits --samples 1", ("samples: must be at least 2, got 1",)),
    ("evaluate digits --samples many", ("samples: ", "'many'")),
    ("evaluate digits --draws 0", ("draws: must be at least 1",)),
    ("evaluate digits --quantize maybe", ("quantize: ", "'maybe'")),
    ("evaluate pngs --against digits --size 0", ("size: must be at least 1, got 0",)),
    ("evaluate digits@1", ("digits@1", "at least 2 steps")),
    ("evaluate digits --out", ("--out: needs a value",)),
    # limbeck reference
    ("reference --features digits --out r.npz", ("DATA: expected one, got none",)),
    ("reference digits --out r.npz", ("features: is missing",)),
    ("reference digits --features digits", ("out: is missing",)),
    ("reference digits --features digits --out r.txt", ("out: must end in .npz, got r.txt",)),
    ("reference digits --features digits --out r.npz --colour 3", ("colour: unknown key",)),
    ("reference gone --features digits --out r.npz", ("no file or folder 'gone'",)),
    ("reference empty --features digits --out r.npz", ("empty: holds no pictures",)),
    ("reference corrupt --features digits --out r.npz", ("a.png: not a readable picture",)),
    ("reference mixed --features digits --out r.npz", ("b.png: has 27 x 120 pixels", "--size")),
    ("reference whole.npz --features digits --out r.npz", ("got int64",)),
    ("reference one.npz --features digits --out r.npz", ("one.npz: a reference needs at least 4 samples, got 1",)),
    ("reference large.npz --features digits --out r.npz", ("large.npz", "digits", "(1, 8, 8)", "(1, 9, 9)")),
    ("reference bytes.npz --features digits --out r.npz", ("bytes.npz: its values span [200, 200]", "[-1, 1]")),
    ("reference half.npz --features digits --out r.npz", ("half.npz: its values span [0, 1]", "[-1, 1]", "2 x - 1")),
    ("reference classes.npz --features digits --out r.npz", ("classes.npz", "labels up to 12", "10 classes")),
    ("reference digits --size 8 --features digits --out r.npz", ("size: ", "digits")),
    ("reference digits --features digits --out folder.npz", ("out: folder.npz is a folder",)),
    ("reference digits --features digits --out text.pt/r.npz", ("out: text.pt is a file",)),
    ("reference digits.npz --features list.pt --out r.npz", ("digits.npz", "list.pt", "returns a list")),
    ("reference plane.npz --features means.pt --out r.npz", ("(B, 1 or 3, H, W)", "(2,)")),
    ("reference digits --features text.pt --out r.npz", ("text.pt is not a TorchScript file",)),
    ("reference digits --features gone --out r.npz", ("'gone'",)),
    ("reference pngs --size -1 --features digits --out r.npz", ("size: must be at least 1, got -1",)),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), BAD, ids=[line for line, _ in BAD])
def test_bad_input(
    shelf: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    says: tuple[str, ...],
) -> None:
    """Exit code 2, one line, and nothing written."""
    monkeypatch.chdir(shelf)
    before = sorted(shelf.iterdir())
    assert cli.main(shlex.split(line)) == 2
    heard = capsys.readouterr()
    rows = [row for row in heard.err.splitlines() if "is a program that now runs" not in row]
    assert heard.out == "" and len(rows) == 1, heard
    hashes = {"HASH": features.digest("digits")[:12], "OTHER": features.digest("other.safetensors")[:12]}
    assert rows[0].startswith("limbeck: ") and all(hashes.get(word, word) in rows[0] for word in says), rows[0]
    assert sorted(shelf.iterdir()) == before
