"""Teachers from diffusers folders and from callers' own networks, against posteriors written independently."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import limbeck
from limbeck import artifact, cli, config, features, networks, students, teachers
from limbeck.denoiser import Preconditioned, Rescaled
from limbeck.exact import Gaussian
from limbeck.methods import METHODS
from limbeck.networks.unet2d import UNet2D
from limbeck.sample import heun
from limbeck.schedule import VP, Alphas, described, named
from limbeck.source import one_hot
from limbeck.teachers import own, pipeline

SMALL: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "layers_per_block": 1,
    "norm_num_groups": 4, "attention_head_dim": 4, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
KEYS = (
    "--steps 3 --batch 4 --every.save 3 --every.sample 0 --evaluate.samples 4 --evaluate.teacher_steps 2 "
    "--method.N 5 --optimizer.generator.lr 1e-4"
)
RUN = KEYS.split()


def save_pipeline(folder: Path, scheduler: str = "DDPMScheduler", options: Any = None, **config: Any) -> Path:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**{**SMALL, **config})
    chosen = getattr(diffusers, scheduler)(**(options or {}))
    # a DDPMPipeline turns its scheduler into its own class, so the folder is written part by part
    unet.save_pretrained(folder / "unet")
    chosen.save_pretrained(folder / "scheduler")
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", scheduler]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


class Posterior(nn.Module):
    """The exact eps, v or x0 of N(mean, std^2) noised to step t, from Bayes' rule in x_t's own coordinates."""

    def __init__(self, alphas: Tensor, output: str, mean: float, std: float) -> None:
        super().__init__()
        self.alphas, self.output, self.mean, self.std = alphas.double(), output, mean, std

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        step = t.round()
        torch.testing.assert_close(t, step, rtol=0, atol=1e-2 if x.dtype == torch.float32 else 1e-6)
        a = self.alphas[step.long()].reshape(-1, 1, 1, 1).to(x.dtype)
        gain = a.sqrt() * self.std**2 / (a * self.std**2 + 1 - a)
        clean = self.mean + gain * (x - a.sqrt() * self.mean)
        noise = (x - a.sqrt() * clean) / (1 - a).sqrt()
        return {"epsilon": noise, "sample": clean, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean}[
            self.output
        ]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("output", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_a_discrete_model_is_the_exact_denoiser_at_its_levels(
    dtype: torch.dtype, tolerance: float, output: str, beta_schedule: str
) -> None:
    settings = {"prediction_type": output, "beta_schedule": beta_schedule}
    alphas = diffusers.DDPMScheduler(**settings).alphas_cumprod
    net = Posterior(alphas, output, 0.3, 0.6)
    denoiser = pipeline.denoiser(net, "DDPMScheduler", settings, (1, 4, 4))
    truth = Gaussian(torch.full((1, 4, 4), 0.3, dtype=torch.float64), 0.6)
    steps = torch.tensor([0, 1, 7, 130, 500, 980])
    sigma = ((1 - alphas.double()) / alphas.double()).sqrt()[steps].to(dtype)
    clean = 0.3 + 0.6 * torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    x = clean + sigma.reshape(-1, 1, 1, 1) * torch.randn(
        6, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=dtype
    )
    scale = 1 if dtype == torch.float64 else x.abs().amax((1, 2, 3), keepdim=True).clamp(min=1)
    assert ((denoiser(x, sigma) - truth(x, sigma)) / scale).abs().max() <= tolerance
    assert denoiser.sigma_min == pytest.approx(float(sigma[0])) and denoiser.sigma_max > 150


@pytest.mark.parametrize("output", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_the_librarys_own(tmp_path: Path, output: str) -> None:
    options = {"prediction_type": output, "clip_sample": False}
    folder = save_pipeline(tmp_path, "DDIMScheduler", options)
    teacher = teachers.load(f"diffusers:{folder}")
    scheduler = diffusers.DDIMScheduler(**options)
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval()
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod.double()
    noisy = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    for t in (900, 500, 100):
        with torch.no_grad():
            theirs = scheduler.step(unet(noisy, t).sample, t, noisy).prev_sample
            now, then = (((1 - alphas[s]) / alphas[s]).sqrt() for s in (t, t - 100))
            x = noisy.double() / alphas[t].sqrt()
            clean = teacher(x.float(), now.float()).double()
            ours = (then / now * x + (1 - then / now) * clean) * alphas[t - 100].sqrt()
        size = max(1.0, float(theirs.abs().max()))
        assert float((ours - theirs).abs().max()) <= 1e-5 * size, t


def test_between_two_steps_time_is_monotone_and_consistent() -> None:
    steps = Alphas(tuple(diffusers.DDPMScheduler().alphas_cumprod.tolist()))
    low, high = steps.ratios
    ratio = torch.logspace(math.log10(low), math.log10(high), 5000, dtype=torch.float64)
    t = steps.time(ratio)
    assert (t[1:] > t[:-1]).all() and t[0] == pytest.approx(0, abs=1e-9) and t[-1] == pytest.approx(999)
    torch.testing.assert_close(steps.sigma(t) / steps.alpha(t), ratio, rtol=1e-10, atol=0)
    torch.testing.assert_close(steps.sigma(t) ** 2 + steps.alpha(t) ** 2, torch.ones_like(t))
    outside = steps.time(torch.tensor([low / 10, high * 10]))
    torch.testing.assert_close(outside, torch.tensor([0.0, 999.0]))


def test_a_last_step_without_signal_is_left_out() -> None:
    assert Alphas((0.9, 0.5, 0.0)).alphas_cumprod == (0.9, 0.5)
    folder_settings = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    teacher = pipeline.denoiser(nn.Identity(), "DDIMScheduler", folder_settings, (1, 4, 4))
    assert math.isfinite(teacher.sigma_max) and teacher.sigma_max > 80


@pytest.mark.parametrize("numbers", [[], [0.5], [0.5, 0.5], [0.5, 0.9], [1.5, 0.5], [0.5, -0.1], [float("nan"), 0.1]])
def test_bad_alphas(numbers: list[float]) -> None:
    with pytest.raises(ValueError, match=r"alphas_cumprod: must be"):
        Alphas(tuple(numbers))


def test_schedules_by_name() -> None:
    for schedule in (VP(10.0, 0.2), Alphas((0.9, 0.5))):
        assert named(json.loads(json.dumps(described(schedule)))) == schedule
    with pytest.raises(ValueError, match="schedule: unknown name 'os'"):
        named("os")
    with pytest.raises(ValueError, match="schedule: vp does not take"):
        named({"name": "vp", "gamma": 1})


def test_classes_are_one_hot_rows(tmp_path: Path) -> None:
    teacher = teachers.load(f"diffusers:{save_pipeline(tmp_path, num_class_embeds=3)}")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    assert teacher.classes == 3 and isinstance(teacher, Rescaled)
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor(1.0)
    with torch.no_grad():
        t = teacher.schedule.time(sigma)
        eps = unet(teacher.schedule.alpha(t) * x, t, class_labels=torch.tensor([2, 0, 1])).sample
        labelled = teacher(x, sigma, torch.eye(3)[[2, 0, 1]])
        torch.testing.assert_close(labelled, x - eps)
        unet.class_embedding.weight.zero_()
        t0 = unet(teacher.schedule.alpha(t) * x, t, class_labels=torch.tensor([0, 0, 0])).sample
        torch.testing.assert_close(teacher(x, sigma), x - t0)


def test_an_edm_scheduler(tmp_path: Path) -> None:
    options = {"sigma_data": 0.7, "sigma_max": 60.0}
    teacher = teachers.load(f"diffusers:{save_pipeline(tmp_path, 'EDMEulerScheduler', options)}")
    assert isinstance(teacher, Preconditioned) and (teacher.sigma_data, teacher.sigma_max) == (0.7, 60.0)
    scheduler = diffusers.EDMEulerScheduler(**options)
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(3.0)
    with torch.no_grad():
        raw = unet(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)).sample
        torch.testing.assert_close(teacher(x, sigma), scheduler.precondition_outputs(x, raw, sigma))


def test_a_table_of_times_takes_the_nearest_step(tmp_path: Path) -> None:
    config = {"time_embedding_type": "learned", "num_train_timesteps": 1000}
    teacher = teachers.load(f"diffusers:{save_pipeline(tmp_path, **config)}")
    assert isinstance(teacher, Rescaled)
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            teacher.model(x, torch.tensor([400.4]), None), teacher.model(x, torch.tensor([400.0]), None)
        )


def damaged(folder: Path, how: str) -> None:
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if how == "bin":
        torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
        unet.unlink()
    elif how in ("missing", "extra", "nan"):
        tensors = safetensors.torch.load_file(str(unet))
        if how == "missing":
            del tensors["conv_out.bias"]
        elif how == "extra":
            tensors["more"] = torch.zeros(1)
        else:
            tensors["conv_out.bias"].fill_(math.nan)
        safetensors.torch.save_file(tensors, str(unet), {"format": "pt"})
    elif how == "cut":
        unet.write_bytes(unet.read_bytes()[:1000])
    else:
        (folder / how).write_text("{")


@pytest.mark.parametrize(
    "how, message",
    [
        ("bin", "opens no .bin file"),
        ("missing", "conv_out.bias is one of its missing keys"),
        ("extra", "more is one of its unexpected keys"),
        ("nan", "conv_out.bias contains NaN"),
        ("cut", "not a readable UNet2DModel"),
        ("model_index.json", "not a readable JSON"),
        ("unet/config.json", "not a readable UNet2DModel"),
        ("scheduler/scheduler_config.json", "not a readable JSON"),
    ],
)
def test_damaged_folders_end_in_one_line(
    tmp_path: Path, how: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged(save_pipeline(tmp_path / "p"), how)
    argv = ["distill", f"diffusers:{tmp_path / 'p'}", "--out", str(tmp_path / "r")]
    assert cli.main(argv) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vae": ["diffusers", "AutoencoderKL"]}, "nothing else"),
        ({"unet": ["pipeline", "Evil"]}, "must hold a UNet2DModel"),
        ({"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "not supported"),
        ({"scheduler": ["os", "system"]}, "not supported"),
    ],
)
def test_other_pipelines_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = save_pipeline(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(ValueError, match=message):
        teachers.load(f"diffusers:{folder}")


def test_distilling_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The student starts as the teacher, is stored by name, and one in EDM's form is too."""
    folder = save_pipeline(tmp_path / "p", num_class_embeds=2)
    out = tmp_path / "r"
    assert cli.main(["distill", f"diffusers:{folder}", "--out", str(out), *RUN]) == 0, capsys.readouterr().err
    assert "method.levels: cut to the teacher's range, 0.0100013 to 80" in capsys.readouterr().err
    told: list[str] = []
    recipe = config.resolve({"teacher": f"diffusers:{folder}", "method": "vardiu"}, METHODS)
    cut = cast(Any, students.fit_levels(recipe, teachers.load(f"diffusers:{folder}"), told.append).method).levels
    assert told == ["method.levels: cut to the teacher's range, 0.0100013 to 0.5"] and cut.power == 2
    assert (cut.sigma_min, cut.sigma_max) == pytest.approx((0.0100013, 0.5), rel=1e-5)
    generator = limbeck.load(out)
    assert isinstance(generator.denoiser, Rescaled) and isinstance(generator.denoiser.model, UNet2D)
    assert generator(torch.randn(2, 1, 8, 8), torch.eye(2)).shape == (2, 1, 8, 8)
    edm = tmp_path / "e"
    argv = ["distill", f"diffusers:{folder}", "--out", str(edm), *RUN, "--template.network", "unet2d"]
    assert cli.main(argv) == 0, capsys.readouterr().err
    student = limbeck.load(edm).denoiser
    assert isinstance(student, Preconditioned) and student.noise_unit == 1.0
    assert isinstance(student.network, UNet2D) and isinstance(student.network.unet, diffusers.UNet2DModel)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(2.5)
    with torch.no_grad():  # diffusers' consistency models: c_in x at time 1000 ln(sigma) / 4
        raw = student.network.unet(
            x / math.hypot(2.5, 0.5), 250 * sigma.log(), class_labels=torch.tensor([1, 0])
        ).sample
        wanted = 0.25 / (2.5**2 + 0.25) * x + 2.5 * 0.5 / math.hypot(2.5, 0.5) * raw
        torch.testing.assert_close(student(x, sigma, torch.eye(2)[[1, 0]]), wanted)


def test_the_trace_of_a_unet() -> None:
    network = UNet2D({**SMALL})
    x, noise = torch.randn(2, 1, 8, 8), torch.zeros(2)
    out, features = network.trace(x, noise)
    torch.testing.assert_close(out, network(x, noise))
    assert features.shape == (2, network.feature_width)
    with pytest.raises(ValueError, match=r"template\.depth: UNet2DModel has no such argument"):
        networks.for_samples("unet2d", (1, 8, 8), 0, {"depth": 3})


# A caller's own network


class Mine(nn.Module):
    """A network as users write them: no name, no arguments kept."""

    def __init__(self, width: int = 4, classes: int = 0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2 + 1 + classes, width), nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        parts = [x, t[:, None]] + ([] if cond is None else [cond])
        return self.last(torch.tanh(self.first(torch.cat(parts, 1))))


NAME = f"{__name__}:Mine"


def write_own(folder: Path, **card: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    weights = folder / "mine.safetensors"
    width, classes = card.get("arguments", {}).get("width", 4), card.get("classes", 0)
    safetensors.torch.save_file(Mine(width, classes).state_dict(), str(weights))
    (folder / "mine.json").write_text(json.dumps({"shape": [2], **card}))
    return weights


@pytest.mark.parametrize(
    "card, kind",
    [
        ({"sigma_data": 0.7, "noise_unit": 2.0, "arguments": {"width": 5}}, Preconditioned),
        ({"preconditioning": "rescaled", "schedule": "vp", "output": "eps", "sigma_max": 100}, Rescaled),
        ({"preconditioning": "rescaled", "schedule": {"name": "flow"}, "output": "flow"}, Rescaled),
        (
            {
                "preconditioning": "rescaled",
                "schedule": {"name": "alphas", "alphas_cumprod": [0.9, 0.1]},
                "output": "v",
            },
            Rescaled,
        ),
        ({"classes": 2, "arguments": {"classes": 2}}, Preconditioned),
    ],
)
def test_a_network_of_the_callers(tmp_path: Path, card: dict[str, Any], kind: type) -> None:
    weights = write_own(tmp_path, **card)
    teacher = teachers.load(str(weights), network=Mine)
    assert type(teacher) is kind and teacher.sigma_data == card.get("sigma_data", 0.5)
    assert teacher.classes == card.get("classes", 0) and teacher.sigma_max == card.get("sigma_max", math.inf)
    x = torch.randn(3, 2)
    if isinstance(teacher, Preconditioned):
        assert teacher.noise_unit == card.get("noise_unit", 1.0)
    # and it can be stored, as a student will be
    artifact.save(tmp_path / "again.safetensors", "denoiser", teacher, {})
    again = artifact.load(tmp_path / "again.safetensors", "denoiser", Mine)
    torch.testing.assert_close(again(x, torch.tensor(0.5)), teacher(x, torch.tensor(0.5)), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"network: Mine is the caller's own class; give it"):
        artifact.load(tmp_path / "again.safetensors", "denoiser")


@pytest.mark.parametrize(
    "card, message",
    [
        ({"shape": []}, "shape: must be positive"),
        ({"sigma_daat": 1}, "sigma_daat: unknown key, perhaps you meant sigma_data"),
        ({"preconditioning": "rescaled"}, "schedule: belongs to preconditioning rescaled"),
        ({"output": "eps"}, "output: belongs to preconditioning rescaled"),
        ({"preconditioning": "vp"}, "preconditioning: input should be 'edm' or 'rescaled'"),
        ({"preconditioning": "rescaled", "schedule": "os.system", "output": "eps"}, "schedule: unknown name"),
        ({"preconditioning": "rescaled", "schedule": "alphas", "output": "eps"}, "alphas needs its numbers"),
        ({"arguments": {"depth": 3}}, "network: Mine does not take these arguments"),
        ({"arguments": {"width": 9}}, "has shape"),
        ({"sigma_data": -1}, "sigma_data: must be positive"),
    ],
)
def test_a_bad_card_names_its_field(tmp_path: Path, card: dict[str, Any], message: str) -> None:
    weights = write_own(tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps({"shape": [2], **card}))
    with pytest.raises(ValueError, match="mine"):
        own.load(weights, tmp_path / "mine.json", Mine)
    with pytest.raises(ValueError) as told:
        teachers.load(str(weights), network=Mine)
    assert message in str(told.value) and "\n" not in str(told.value)


def test_the_whole_way_of_a_callers_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = write_own(tmp_path / "w", sigma_max=100), tmp_path / "r"
    argv = ["distill", str(weights), "--out", str(out), *RUN]
    assert cli.main(argv) == 2 and "give it with --network pkg.mod:Class" in capsys.readouterr().err
    assert cli.main([*argv, "--network", NAME]) == 0, capsys.readouterr().err
    assert cli.main([*argv, "--network", NAME]) == 0 and "finished" in capsys.readouterr().err
    with pytest.raises(ValueError, match="caller's own class"):
        limbeck.load(out)
    assert limbeck.load(out, network=Mine)(torch.randn(3, 2)).shape == (3, 2)
    picture = tmp_path / "s.npz"
    for model in (weights, out):
        sample = ["sample", str(model), "--count", "4", "--out", str(picture), "--network", NAME]
        assert cli.main(sample) == 0, capsys.readouterr().err
    scored = ["evaluate", str(out), "--against", "exact:gaussian", "--samples", "50", "--network", NAME]
    assert cli.main(scored) == 0, capsys.readouterr().err
    report = limbeck.distill(str(weights), out=tmp_path / "p", network=Mine, steps=1, batch=2, method={"name": "pid"})
    assert report["steps"] == 1


def test_teaching_a_callers_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    np.savez(tmp_path / "points.npz", x=np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32))
    argv = ["teach", str(tmp_path / "points.npz"), "--out", str(tmp_path / "t"), "--steps", "2", "--batch", "4"]
    assert cli.main([*argv, "--network", NAME, "--template.width", "6"]) == 0, capsys.readouterr().err
    assert teachers.load(str(tmp_path / "t"), network=Mine).network.first.out_features == 6


@pytest.mark.parametrize("name", ["nowhere:Mine", "limbeck.run:Job", "limbeck.run:nothing", "math", "os:system", ":"])
def test_only_classes_of_networks_are_taken(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = write_own(tmp_path)
    assert cli.main(["sample", str(weights), "--out", "x.png", "--network", name]) == 2
    told = capsys.readouterr().err
    assert told.startswith("limbeck: network: ") and told.count("\n") == 1


def test_a_recipe_may_not_name_a_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ('network = "os:system"', '[template]\nnetwork = "os:system"'):
        (tmp_path / "r.toml").write_text(f'teacher = "exact:gaussian"\n{text}\n')
        assert cli.main(["distill", str(tmp_path / "r.toml"), "--out", str(tmp_path / "r")]) == 2
        assert "network" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_the_fashion_teacher_makes_what_it_is_asked_for() -> None:
    """At least 85% of 10,000 samples were classified right when it was bundled; 100 of fewer steps come near."""
    card = artifact.read_card(artifact.locate("fashion", "denoiser"))
    assert card["scores"]["class_accuracy"] >= 0.85 and card["scores"]["nfe"] == 35
    teacher, classifier = teachers.load("fashion"), features.load("fashion")
    wanted = torch.arange(100) % 10
    z = torch.randn(100, *teacher.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = heun(teacher, z, 9, cond=one_hot(wanted, 10))
        assert (classifier.logits(x).argmax(1) == wanted).float().mean() > 0.7
