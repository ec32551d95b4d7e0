"""Generators that the caller brings: refined from Python and from files, stored, sampled, exported; a GAN to refine."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from test_run import Told, at_step, kill_self
from torch import Tensor, nn

import limbeck
from limbeck import artifact, refine, replay
from limbeck.cli import main
from limbeck.critic import R1_STEP
from limbeck.folder import Stopped
from limbeck.game import Game
from limbeck.generator import Dirac, Generator, OneStep
from limbeck.given import Given
from limbeck.networks.gan import Decoder, Discriminator
from limbeck.objective import Batch
from limbeck.teaching import GAN
from limbeck.train import NonFinite


class Plane(nn.Module):
    """A generator of points as a caller may have one: three latents, and a weight that is no layer."""

    def __init__(self, width: int = 8, latent: int = 3, classes: int = 0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(latent + classes, width), nn.Linear(width, 2)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        z = z if cond is None else torch.cat([z, cond], 1)
        x: Tensor = self.last(torch.tanh(self.first(z))) * self.scale
        return x


NAME = f"{__name__}:Plane"
TINY: dict[str, Any] = {
    "steps": 6, "batch": 8, "template": {"network": "mlp", "width": 8, "depth": 1}, "warm_start": 3, "ema.half_life": 4,
    "every": {"save": 1, "log": 1, "sample": 0}, "evaluate": {"samples": 100}, "method.game.settle": 1,
}  # fmt: skip


def plane(**arguments: int) -> Given:
    torch.manual_seed(0)
    return Given(Plane(**arguments), (3,), (2,), arguments=arguments)


def refined(out: Path, generator: Any, method: str = "diff_instruct", **keys: Any) -> dict[str, Any]:
    return limbeck.distill("exact:ring8", method, out=out, tell=Told(), generator=generator, **{**TINY, **keys})


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Plain weights of a `Plane` with a card beside them, as another program leaves them."""
    safetensors.torch.save_file(plane(width=5).network.state_dict(), tmp_path / "gan.safetensors")
    (tmp_path / "gan.json").write_text(json.dumps({"latent_shape": [3], "shape": [2], "arguments": {"width": 5}}))
    return tmp_path / "gan.safetensors"


# The generator


def test_latents_and_labels_reach_the_network() -> None:
    given = Given(Plane(classes=4), (3,), (2,), 4)
    z = torch.randn(5, 3)
    assert torch.equal(given(z), given.network(z, torch.zeros(5, 4)))  # no label is a zero row
    assert torch.equal(given(z, torch.eye(5, 4)), given.network(z, torch.eye(5, 4)))
    with pytest.raises(ValueError, match=r"^shape: the network makes samples of shape \(2,\), not \(3,\)"):
        Given(Plane(), (3,), (3,))(z)
    for sizes, line in ((((), (2,)), "^latent_shape: "), (((3,), (0,)), "^shape: ")):
        with pytest.raises(ValueError, match=line):
            Given(Plane(), *sizes)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 9, 16)])
def test_a_decoder_makes_images_of_any_size(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    decoder, judge = Decoder(shape, 3, latent=5, width=4), Discriminator(shape, 3, width=4, features=6)
    z, cond = torch.randn(4, 5), torch.eye(4, 3)
    x = decoder(z, cond)
    assert x.shape == (4, *shape) and x.abs().max() <= 1
    assert torch.allclose(x[1:2], decoder(z[1:2], cond[1:2]), atol=1e-6)  # of its own latent alone
    assert not torch.allclose(x, decoder(z, cond.roll(1, 0)), atol=1e-3)
    assert judge(x, cond).shape == (4,) and not torch.allclose(judge(x, cond), judge(x, cond.roll(1, 0)))
    with pytest.raises(ValueError, match="gan: needs images"):
        Decoder((2,))


def test_a_file_brings_it_back_and_names_no_code(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = Given(Decoder((1, 8, 8), 3, latent=5, width=4), (5,), (1, 8, 8), 3)
    artifact.save(tmp_path / "a.safetensors", "generator", made, {})
    back = limbeck.load(tmp_path / "a.safetensors")
    z = torch.randn(4, 5)
    assert (back.latent_shape, back.shape, back.classes) == ((5,), (1, 8, 8), 3)
    assert torch.equal(back(z), made(z))
    own = plane(width=6)
    artifact.save(tmp_path / "b.safetensors", "generator", own, {})
    assert torch.equal(limbeck.load(tmp_path / "b.safetensors", network=Plane)(z[:, :3]), own(z[:, :3]))
    with pytest.raises(ValueError, match="Plane is the caller's own class; give it with network=CLASS or --network"):
        limbeck.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"network": "mlp"}, {"network": "os:system"}, {"latent_shape": [6]}, {"latent_shape": []}, {"shape": [1, 9, 9]},
        {"classes": -1}, {"classes": 2}, {"arguments": {"shape": [1, 8, 8], "width": 10**9}}, {"arguments": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_card_is_one_line(tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = Given(Decoder((1, 8, 8), latent=5, width=4), (5,), (1, 8, 8))
    card = made.card() | change
    monkeypatch.setattr(Given, "card", lambda self: card)
    artifact.save(tmp_path / "a.safetensors", "generator", made, {})
    with pytest.raises(ValueError, match=r"a\.safetensors: its card does not describe a generator"):
        limbeck.load(tmp_path / "a.safetensors")


# Runs


def test_a_run_trains_a_copy_and_stores_it(tmp_path: Path, weights: Any, equal: Any) -> None:
    given = plane(width=6).train()
    before = copy.deepcopy(given.state_dict())
    told = refined(tmp_path / "a", given)
    assert equal(given.state_dict(), before) and given.training
    assert told["recipe"]["generator"] == {"file": "<limbeck.given.Given>"}
    assert told["hashes"]["given"] == artifact.fingerprint(given)
    back = limbeck.load(tmp_path / "a", network=Plane)
    assert back.latent_shape == (3,) and not equal(back.state_dict(), before)
    assert back(torch.zeros(4, 3)).shape == (4, 2)
    refined(tmp_path / "b", given)  # the same start, the same end
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("step", [1, 4])
def test_it_resumes_bit_for_bit(tmp_path: Path, weights: Any, equal: Any, step: int) -> None:
    keys = {"method.game.settle": 2, "steps": 8, "warm_start": 0}
    refined(tmp_path / "whole", plane(), **keys)
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, step, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped):
            refined(tmp_path / "run", plane(), **keys)
    other = plane()
    with torch.no_grad():
        other.network.scale.mul_(1.5)
    with pytest.raises(ValueError, match="was begun with another teacher, data set or generator of the same name"):
        refined(tmp_path / "run", other, **keys)
    refined(tmp_path / "run", plane(), **keys)
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    last = "checkpoints/ckpt-000000008/state.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_the_generator_waits_until_the_fake_score_knows_it(tmp_path: Path) -> None:
    """Without a word in the recipe windows are 200 turns long; then the generator is as it was given."""
    told = limbeck.distill(
        "exact:ring8", "sid", out=tmp_path / "a", tell=Told(), generator=plane(), steps=3, batch=8, warm_start=0,
        template={"network": "mlp", "width": 8, "depth": 1}, **{"every.log": 1, "evaluate.samples": 100},
    )  # fmt: skip
    assert told["method"]["game"]["settle"] == refine.SETTLE == 200
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert all(row["settling/settled"] == 0 and "loss/generator" not in row for row in rows)
    state = limbeck.load(tmp_path / "a", network=Plane).state_dict()
    assert all(torch.equal(state[name], value) for name, value in plane().state_dict().items())
    told = limbeck.distill("exact:ring8", "sid", out=tmp_path / "b", tell=Told(), **{**TINY, "method.game.settle": 0})
    assert told["method"]["game"]["settle"] == 0  # nobody gave one


@pytest.mark.parametrize(
    "method", ["diff_instruct", "sid", "sim", "dmd2", "f_distill", "sida", "uni_instruct", "vardiu"]
)
def test_every_method_that_can_refines(tmp_path: Path, method: str) -> None:
    keys = {k: v for k, v in TINY.items() if method != "vardiu" or not k.startswith("method.")}
    if method == "sida":  # whose generator waits 100,000 images
        keys["method.game.fake_first"] = 0
    limbeck.distill("exact:ring8", method, out=tmp_path / "a", tell=Told(), generator=plane(), **keys)
    moved = limbeck.load(tmp_path / "a", network=Plane).state_dict()
    assert not torch.equal(moved["network.scale"], torch.ones(2))


def test_a_generator_without_labels_refines_too(tmp_path: Path) -> None:
    made = Given(Decoder((1, 8, 8), 0, 5, 4), (5,), (1, 8, 8))
    keys = {**TINY, "evaluate": {"samples": 100, "teacher_steps": 2}, "template": {}, "steps": 3}
    told = limbeck.distill("digits", "diff_instruct", out=tmp_path / "a", tell=Told(), generator=made, **keys)
    assert told["student"]["nfe"] == 1 and limbeck.load(tmp_path / "a").classes == 0


class Wide(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))


def test_refinement_brings_a_generator_to_the_teacher_s_law(tmp_path: Path) -> None:
    """A perceptron of three latents, which knows nothing of the ring: mmd from 0.72 to 0.13."""
    torch.manual_seed(1)
    start = Given(Wide(), (3,), (2,))
    keys: dict[str, Any] = {
        "batch": 64, "warm_start": 200, "template": {"network": "mlp", "width": 64, "depth": 2}, "every": {"sample": 0},
        "optimizer": {"generator": {"lr": 1e-2}, "fake": {"lr": 4e-3}}, "method.game.settle": 50, "ema.half_life": 5000,
        "evaluate.samples": 1000, "health.every": 0,
    }  # fmt: skip
    before, after = (
        refined(tmp_path / str(steps), start, steps=steps, **keys)["student"]["metrics"]["mmd"] for steps in (1, 600)
    )
    assert after < 0.4 * before


# Files and the command line


def command(*words: Any) -> int:
    return main([str(word) for word in words])


def short(out: Path) -> list[str]:
    text = "--steps 4 --batch 8 --warm_start 2 --template.network mlp --template.width 8 --evaluate.samples 100"
    return [*text.split(), "--method.game.settle", "1", "--out", str(out)]


def test_plain_weights_on_the_command_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = ["distill", "exact:ring8", "--method", "diff_instruct", "--generator.file"]
    assert command(*begin, files, "--network", NAME, *short(tmp_path / "a")) == 0
    assert limbeck.load(tmp_path / "a", network=Plane).network.first.out_features == 5
    # a run folder and its file can be refined again
    again = tmp_path / "a" / "generator.safetensors"
    assert command(*begin, tmp_path / "a", "--network", NAME, *short(tmp_path / "b")) == 0
    assert command(*begin, again, "--network", NAME, *short(tmp_path / "c")) == 0
    assert command("sample", tmp_path / "b", "--network", NAME, "--count", 5, "--out", tmp_path / "x.npz") == 0
    assert command("sample", files, "--network", NAME, "--count", 5, "--out", tmp_path / "y.npz") == 0
    assert np.load(tmp_path / "y.npz")["x"].shape == (5, 2)
    capsys.readouterr()
    words = (files, tmp_path / "b", "--against", "exact:ring8", "--network", NAME, "--samples", 100, "--json")
    assert command("evaluate", *words) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["nfe"] for row in rows[:2]] == [1, 1] and all(row["metrics"]["mmd"] > 0 for row in rows)
    assert command("bench", "exact:ring8", "--method", "sid", "--generator.file", files, "--network", NAME,
                   "--repeats", 1, "--batch", 8, "--method.game.settle", 1) == 0  # fmt: skip


def test_another_file_of_the_same_name(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["distill", "exact:ring8", "--method", "sid", "--generator.file", files, "--network", NAME]
    assert command(*words, *short(tmp_path / "a")) == 0
    safetensors.torch.save_file({k: 2 * v for k, v in plane(width=5).network.state_dict().items()}, files)
    assert command(*words, *short(tmp_path / "a")) == 2
    assert "generator of the same name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"latent_shape": [4]}, "gan.safetensors: its card does not describe a generator"),
        ({"shape": [3]}, "not (3,)"),
        ({"shape": "two"}, "gan.json: shape: input should be a valid list"),
        ({"latent": [3]}, "gan.json: latent: unknown key, perhaps you meant latent_shape"),
        ({"arguments": {"depth": 2}}, "Plane does not take these arguments"),
        ({"arguments": {"width": 6}}, "gan.safetensors: network.first.bias has shape (5,), expected (6,)"),
        ({"latent_shape": None}, "generator.file: no generator in"),
    ],
    ids=str,
)
def test_wrong_cards_beside_weights(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], line: str
) -> None:
    table = json.loads(files.with_suffix(".json").read_text()) | change
    files.with_suffix(".json").write_text(json.dumps({k: v for k, v in table.items() if v is not None}))
    words = ("distill", "exact:ring8", "--method", "sid", "--generator.file", files, "--network", NAME)
    assert command(*words, *short(tmp_path / "a")) == 2
    told = capsys.readouterr().err
    assert line in told and told.count("\n") == 1 and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--method", "pid"], "generator: PID trains a whole path"),
        (["--method", "vdd"], "generator: VDD trains a mixture of experts"),
        (["--method", "sds"], "generator: SDS knows the score of a single point only"),
        (["--method", "dmd"], "generator: DMD regresses on the teacher's own noise"),
        (["--method", "sid", "--method.game.calls", "2"], "game.calls: the given generator takes 1 network calls"),
        (["--method", "sid", "--generator.noise", "1"], "generator.noise: describes a fresh generator"),
        (["--method", "diff_instruct", "--method.updated_at", "0"], "updated_at: needs a plain generator"),
    ],
    ids=str,
)
def test_what_cannot_be_refined(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    begin = ("distill", "exact:ring8", "--generator.file", files, "--network", NAME, "--out", tmp_path / "a")
    assert command(*begin, *words) == 2
    told = capsys.readouterr().err
    assert line in told and told.count("\n") == 1 and not (tmp_path / "a").exists()


def test_files_that_hold_no_generator(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = ("distill", "exact:ring8", "--method", "sid", "--out", tmp_path / "a", "--generator.file")
    digits = artifact.bundled("digits-denoiser.safetensors")
    for words, line in (
        (["nowhere.safetensors"], "generator.file: no generator in 'nowhere.safetensors'"),
        ([tmp_path], "generator.file: no generator in"),
        ([digits], "generator.file: no generator in"),
        ([files], "gan.json: the network is the caller's own class; give it with --network"),
    ):
        assert command(*begin, *words) == 2
        assert line in capsys.readouterr().err


class Halved(Plane):
    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return super().forward(z, cond).double()


class Deaf(Plane):
    @torch.no_grad()
    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return super().forward(z, cond)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (Plane, "^generator: must be a limbeck.generator.Generator, got Plane; a network becomes one by limbeck.Given"),
        (lambda: Given(Plane(), (4,), (2,)), r"^generator: .*shapes cannot be multiplied.*\(latents \(4,\)\)"),
        (
            lambda: Given(Plane(), (3,), (3,)),
            r"^generator: shape: the network makes samples of shape \(2,\), not \(3,\)",
        ),
        (
            lambda: Given(Decoder((1, 8, 8), 0, 3, 4), (3,), (1, 8, 8)),
            r"^generator: makes samples of shape \(1, 8, 8\)",
        ),
        (lambda: Given(Plane(classes=2), (3,), (2,), 2), "^generator: has 2 classes, the teacher 0"),
        (lambda: Given(Plane(width=9), (3,), (2,)), r"^generator: Plane\(\*\*{}\) has other weights .* set arguments"),
        (lambda: Given(Plane(), (3,), (2,), 0, {"w": 1}), "^generator: network: Plane does not take these arguments"),
        (lambda: Given(Plane(), (3,), (2,), 0, {"w": Plane}), "^generator: .*not JSON serializable"),
        (lambda: Given(Halved(), (3,), (2,)), "^generator: makes samples of torch.float64"),
        (lambda: Given(Deaf(), (3,), (2,)), "^generator: its samples have no gradient"),
    ],
)
def test_objects_that_cannot_be_refined(tmp_path: Path, make: Callable[[], Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        refined(tmp_path / "a", make())
    assert not (tmp_path / "a").exists()


def test_a_turn_that_is_not_finite_is_replayed(tmp_path: Path) -> None:
    given = plane()
    with torch.no_grad():
        given.network.scale.fill_(1e25)
    with pytest.raises(NonFinite):
        refined(tmp_path / "a", given)
    found = replay.replay(tmp_path / "a", Told(), network=Plane, generator=given)
    assert found.reproduced and found.samples


def test_export_of_the_caller_s_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact.save(tmp_path / "a.safetensors", "generator", plane(width=6), {})
    words = ("export", tmp_path / "a.safetensors", "--to", "torch", "--out", tmp_path / "a.pt2")
    assert command(*words) == 2 and "--network" in capsys.readouterr().err
    assert command(*words, "--network", NAME) == 0
    z = torch.randn(7, 3)
    found = torch.export.load(tmp_path / "a.pt2").module()(z)
    assert torch.allclose(found, plane(width=6)(z), atol=1e-6)


# The GAN


def test_the_penalty_is_the_squared_gradient() -> None:
    """In the mean over directions, to first order; a linear discriminator has it exactly known."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

        def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
            return x @ self.weight

    torch.manual_seed(0)
    n = 200_000
    real, eps = torch.randn(n, 3, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)
    nets = nn.ModuleDict({"discriminator": Linear(), "generator": Zero()})
    batch = Batch(torch.zeros(n, 1), torch.zeros(n), eps, real=real)
    none, some = (GAN(r1=r1).discriminator_loss(nets, None, batch).mean() for r1 in (0.0, 0.3))  # type: ignore[arg-type]
    assert float(some - none) == pytest.approx(0.3 * 5.25, rel=0.01) and R1_STEP < 0.1
    plain = nn.functional.softplus(-nets["discriminator"](real)).mean() + np.log(2)
    assert float(none) == pytest.approx(float(plain), rel=1e-12)
    assert float(GAN().loss(nets, None, batch).mean()) == pytest.approx(np.log(2))  # type: ignore[arg-type]


class Zero(nn.Module):
    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return z.new_zeros(len(z), 3, dtype=torch.float64)


SMALL = {"name": "gan", "latent": 4, "width": 8, "discriminator_width": 8}


def test_teaching_a_gan_resumes_bit_for_bit(tmp_path: Path, weights: Any, equal: Any) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", x=rng.integers(0, 256, (20, 8, 9, 3)).astype(np.uint8), y=np.arange(20) % 2)
    keys: dict[str, Any] = {"steps": 6, "batch": 8, "every": {"save": 1, "log": 1, "sample": 0}, "ema.half_life": 4}
    told = limbeck.teach(str(tmp_path / "images.npz"), SMALL, out=tmp_path / "a", tell=Told(), **keys)
    assert told["kind"] == "generator"
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 3, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped):
            limbeck.teach(str(tmp_path / "images.npz"), SMALL, out=tmp_path / "b", tell=Told(), **keys)
    limbeck.teach(str(tmp_path / "images.npz"), SMALL, out=tmp_path / "b", tell=Told(), **keys)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_gan_learns_and_is_refined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hundred steps bring it closer to the digits, by a factor; then the teacher has it."""
    keys: dict[str, Any] = {"batch": 64, "every.sample": 120, "evaluate.samples": 500, "ema.half_life": 1000}
    method = {**SMALL, "latent": 16, "width": 16}
    keys["optimizer"] = {name: {"lr": 2e-3} for name in ("generator", "discriminator")}
    first, last = (
        limbeck.teach("digits", method, out=tmp_path / str(steps), tell=Told(), steps=steps, **keys)["student"]
        for steps in (1, 120)
    )
    assert last["nfe"] == 1 and last["metrics"]["fd_feature"] < 0.5 * first["metrics"]["fd_feature"]
    assert (tmp_path / "120" / "samples" / "step-000000120.png").is_file()
    page = (tmp_path / "120" / "report.html").read_text()
    assert "A generator trained on <em>digits</em>" in page and "distilled from" not in page
    made = limbeck.load(tmp_path / "120")
    assert isinstance(made, Given) and made.latent_shape == (16,) and made.classes == 10
    assert command("evaluate", tmp_path / "120", "--samples", 100, "--teacher", "false") == 0  # against its own data
    assert "fd_feature" in capsys.readouterr().out
    del keys["optimizer"]
    keys |= {"generator.file": str(tmp_path / "120"), "evaluate.teacher_steps": 2, "steps": 3, "evaluate.samples": 100}
    told = limbeck.distill("digits", "diff_instruct", out=tmp_path / "c", tell=Told(), **keys)
    assert limbeck.load(tmp_path / "c").latent_shape == (16,) and told["student"]["metrics"]["fd_feature"] > 0


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"latent": 0}, "latent: "),
        ({"width": 0}, "width: "),
        ({"discriminator_width": 0}, "discriminator_"),
        ({"r1": -1.0}, "r1: "),
    ],
)
def test_bad_fields_of_a_gan(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        GAN(**fields)


def test_a_gan_needs_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "points.npz", x=np.random.default_rng(0).normal(size=(50, 2)))
    with pytest.raises(ValueError, match="gan: needs images"):
        limbeck.teach(str(tmp_path / "points.npz"), "gan", out=tmp_path / "a", tell=Told())
    assert not (tmp_path / "a").exists()


def test_given_generators_of_limbeck_s_own_classes() -> None:
    law = limbeck.teachers.load("exact:ring8")
    for made in (OneStep(law, 2.0), Dirac((2,))):
        assert isinstance(made, Generator)
    with pytest.raises(ValueError, match="no gradient"):
        refine.accepted(OneStep(law, 2.0), law)
    assert isinstance(refine.accepted(Dirac((2,)), law), Dirac)
    assert Game().settle == 0
