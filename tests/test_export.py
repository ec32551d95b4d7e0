"""Exported generators give PyTorch's samples wherever they are opened; what cannot be exported says so in one line."""

from __future__ import annotations

import base64
import html.parser
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import limbeck
from limbeck import artifact, cli, networks
from limbeck.denoiser import Preconditioned
from limbeck.experts import Experts
from limbeck.export import TARGETS, check, export, folders, graph, web
from limbeck.generator import Dirac, Direct, FewStep, Generator, OneStep, Trajectory
from limbeck.given import Given
from limbeck.hub import HubGenerator
from limbeck.networks.gan import Decoder
from limbeck.noise import Karras

ROOT = Path(__file__).parent.parent
RUNTIME = ROOT / "web-runtime"
TOLERANCE = 1e-4
RECIPE = {"teacher": "digits", "method": {"name": "sid"}}
UNET = {
    "img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [4],
}  # fmt: skip
NCSN = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}


def shaken(module: Any) -> Any:
    """The module with random weights: fresh networks hold many zeros."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / max(1, parameter[0].numel()) ** 0.5)
    return module.eval()


def preconditioned(name: str, arguments: dict[str, Any], shape: tuple[int, ...], classes: int = 0) -> Preconditioned:
    return Preconditioned(networks.build(name, arguments), shape, classes)


def dit() -> Preconditioned:
    arguments = {"shape": [3, 8, 4], "classes": 3, "width": 16, "depth": 2, "heads": 2, "patch": 2}
    return preconditioned("dit", arguments, (3, 8, 4), 3)


MODELS: dict[str, Callable[[], Generator]] = {
    "digits": lambda: OneStep(artifact.load(artifact.locate("digits", "denoiser"), "denoiser"), 2.5),
    "points": lambda: shaken(Trajectory(preconditioned("mlp", {"shape": [2], "width": 16}, (2,)), Karras(0.02, 40.0))),
    "dit": lambda: shaken(OneStep(dit(), 80.0)),
    "ddpm++": lambda: shaken(Trajectory(preconditioned("songunet", UNET, (1, 8, 8)), Karras())),
    "ncsn++": lambda: shaken(OneStep(preconditioned("songunet", UNET | NCSN | {"label_dim": 2}, (1, 8, 8), 2), 2.5)),
    "gan": lambda: shaken(Given(Decoder((1, 9, 12), 3, latent=5, width=8), (5,), (1, 9, 12), 3)),
    "plain": lambda: shaken(Direct(preconditioned("perceptron", {"shape": [2], "width": 16, "depth": 2}, (2,)), 1.0)),
    "point": lambda: shaken(Dirac((2,))),
    "adm": lambda: shaken(
        OneStep(preconditioned("adm", UNET | {"label_dim": 3, "model_channels": 32}, (1, 8, 8), 3), 2.5)
    ),
}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="session")
def file(place: Path) -> Callable[[str], Path]:
    """A model's own file."""

    def get(name: str) -> Path:
        path = place / f"{name}.safetensors"
        if not path.exists():
            artifact.save(path, "generator", MODELS[name](), {"recipe": RECIPE})
        return path

    return get


@pytest.fixture(scope="session")
def exported(place: Path, file: Callable[[str], Path]) -> Callable[[str, str], Path]:
    """A model in a form, exported once."""

    def get(name: str, to: Any) -> Path:
        path = place / f"{name}-{to}{ {'onnx': '.onnx', 'torch': '.pt2'}.get(to, '') }"
        if not path.exists():
            done = export(file(name), to, path, RUNTIME)
            assert done.difference <= TOLERANCE and done.samples == 64 and done.path == path
        return path

    return get


def inputs(generator: Generator, n: int, seed: int = 9) -> tuple[Tensor, Tensor, Tensor | None]:
    """Noise, labels (every class, and none) and their rows."""
    z = torch.randn(n, *generator.latent_shape, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(n) % (generator.classes + 1) - 1
    return z, labels, check.rows(labels, generator.classes) if generator.classes else None


@torch.no_grad()
def apart(generator: Generator, z: Tensor, cond: Tensor | None, other: Any) -> float:
    expected = generator(z, cond)
    assert tuple(other.shape) == tuple(expected.shape) and expected.std() > 1e-2
    return float((torch.as_tensor(other) - expected).abs().max())


def test_a_mixture_of_experts_is_a_program_and_not_onnx(tmp_path: Path) -> None:
    """The inverse of the normal distribution function is none of ONNX's."""
    mixture = Experts((2,), 0, 4, 8, 0.5).eval()
    assert export(mixture, "torch", tmp_path / "m.pt2").difference == 0
    with pytest.raises(ValueError, match=r"^to: ONNX cannot express this generator \(.*ndtri.*\); torch can$"):
        export(mixture, "onnx", tmp_path / "m.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt2"]


def test_files_say_how_many_network_calls_they_take(tmp_path: Path) -> None:
    few = FewStep(MODELS["points"]().denoiser, [5.0, 1.0]).eval()  # type: ignore[attr-defined]
    text = web.page(few, {}, 1)
    assert "<dd>2</dd>" in text and "drawn in <em>2 steps</em> each" in text
    assert "<dd>1</dd>" in web.page(MODELS["points"](), {}, 1)
    assert HubGenerator(few).nfe == 2
    export(few, "hub", tmp_path / "few")
    assert "from noise with 2 network calls" in (tmp_path / "few" / "README.md").read_text()


def test_weights_with_a_card_beside_them_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = MODELS["gan"]()
    safetensors.torch.save_file(given.network.state_dict(), tmp_path / "gan.safetensors")  # type: ignore[operator]
    card = {"latent_shape": [5], "shape": [1, 9, 12], "classes": 3, "arguments": {**given.network.arguments}}
    (tmp_path / "gan.json").write_text(json.dumps(card))
    for network in (None, Decoder):
        if network is None:
            with pytest.raises(ValueError, match=r"gan\.json: the network is the caller's own class"):
                export(tmp_path / "gan.safetensors", "torch", tmp_path / "gan.pt2")
        else:
            export(tmp_path / "gan.safetensors", "torch", tmp_path / "gan.pt2", network=network)
    module = torch.export.load(tmp_path / "gan.pt2").module()
    z, _, cond = inputs(given, 4)
    assert apart(given, z, cond, module(z, cond)) <= 1e-6


# --- ONNX and torch.export --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_onnx(name: str, file: Callable[[str], Path], exported: Callable[[str, str], Path]) -> None:
    generator, path = limbeck.load(file(name)), exported(name, "onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == (["z", "cond"] if generator.classes else ["z"])
    assert session.get_inputs()[0].shape == ["batch", *generator.latent_shape]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [("x", ["batch", *generator.shape])]
    for n in (1, 2, 64, 100):
        z, _, cond = inputs(generator, n)
        feeds = {"z": z.numpy()} | ({} if cond is None else {"cond": cond.numpy()})
        assert apart(generator, z, cond, session.run(None, feeds)[0]) <= TOLERANCE
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import if not entry.domain] == [("", 20)]
    assert json.loads({p.key: p.value for p in model.metadata_props}["limbeck"]) == artifact.read_card(file(name))


@pytest.mark.parametrize("name", MODELS)
def test_program(name: str, file: Callable[[str], Path], exported: Callable[[str, str], Path]) -> None:
    generator, extra = limbeck.load(file(name)), {"limbeck": ""}
    module = torch.export.load(exported(name, "torch"), extra_files=extra).module()
    for n in (1, 2, 64, 100):
        z, _, cond = inputs(generator, n)
        assert apart(generator, z, cond, module(z) if cond is None else module(z, cond)) <= 1e-6
    assert json.loads(extra["limbeck"]) == artifact.read_card(file(name))


def test_a_form_that_differs_is_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generator, other = MODELS["points"](), shaken(MODELS["points"]())
    with torch.no_grad():
        other.denoiser.network.last.bias += 1e-2
    original = graph.to_program
    frozen = torch.export.export(generator, (torch.zeros(2, 2),))
    for program, message in (
        (original(other), r"torch: its samples differ from PyTorch's by 0\.\d+; nothing was written"),
        (frozen, "torch: cannot run 1 samples"),
    ):
        monkeypatch.setattr(graph, "to_program", lambda generator, program=program: program)
        with pytest.raises(ValueError, match=message):
            export(generator, "torch", tmp_path / "p.pt2")
    assert not list(tmp_path.iterdir())


def test_comparison_sees_one_wrong_sample() -> None:
    generator = MODELS["digits"]()

    def wrong(value: float, label: int) -> Callable[[check.Probe], Tensor]:
        def run(probe: check.Probe) -> Tensor:
            assert probe.labels is not None
            x = generator(probe.z, probe.cond)
            x[(probe.labels == label).nonzero()[:1]] += value
            return x

        return run

    assert check.compare("f", generator, wrong(5e-5, -1)) == (pytest.approx(5e-5, rel=0.01), 64)
    for value in (1.1e-3, torch.nan):
        with pytest.raises(ValueError, match="f: its samples differ"):
            check.compare("f", generator, wrong(value, -1))
    with pytest.raises(ValueError, match=r"f: gives samples of shape \(1, 1\)"):
        check.compare("f", generator, lambda probe: torch.zeros(1, 1))


# --- diffusers --------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A diffusers UNet2DModel as a network of Limbeck's: the rule of `export.folders`."""

    def __init__(self, unet: nn.Module, factor: float = 1000.0) -> None:
        super().__init__()
        self.unet, self.factor = unet, factor

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        labels = None if cond is None else cond.argmax(1)
        return self.unet(x, self.factor * noise, labels, return_dict=False)[0]


def unet_student(channels: int, classes: int, factor: float = 1000.0, sigma_data: float = 0.5) -> OneStep:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=classes or None,
    )  # fmt: skip
    network = Preconditioned(Wrapped(unet, factor), (channels, 8, 8), classes, sigma_data, noise_unit=1.0)
    return OneStep(network, 2.5).eval()


OPEN = """
import socket, sys
import numpy, torch
def refused(*a): raise OSError("no network in this test")
socket.socket.connect = refused
from diffusers import DiffusionPipeline
custom, grey, colour, out = sys.argv[1:]
try:
    DiffusionPipeline.from_pretrained(custom)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("ran code unasked")
seeded = lambda: torch.Generator().manual_seed(5)
ours = DiffusionPipeline.from_pretrained(custom, trust_remote_code=True)
plain = DiffusionPipeline.from_pretrained(grey)
labelled = DiffusionPipeline.from_pretrained(colour)
z = torch.randn(6, 3, 8, 8, generator=seeded())
images = {
    "ours": ours(batch_size=6, class_labels=[0, 1, 2, 9, -1, 3], generator=seeded(), output_type="np").images,
    "plain": plain(batch_size=6, generator=seeded(), output_type="np").images,
    "labelled": labelled(batch_size=6, class_labels=[0, 1, 2, 3, 0, 1], latents=z, output_type="np").images,
}
(picture,) = ours(class_labels=3).images
assert picture.size == (8, 8) and type(plain).__name__ == type(labelled).__name__ == "ConsistencyModelPipeline"
numpy.savez(out, **images)
"""


def test_diffusers_opens_the_folders_offline(
    exported: Callable[[str, str], Path], file: Callable[[str], Path], tmp_path: Path
) -> None:
    grey, colour = unet_student(1, 0), unet_student(3, 4, sigma_data=0.7)
    for student, name in ((grey, "grey"), (colour, "colour")):
        assert export(student, "diffusers", tmp_path / name).difference <= TOLERANCE
        assert not list((tmp_path / name).rglob("*.py"))
    arguments = [str(exported("digits", "diffusers")), *(str(tmp_path / n) for n in ("grey", "colour", "out.npz"))]
    clean = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", OPEN, *arguments], env=os.environ | clean, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    images = np.load(tmp_path / "out.npz")
    digits = limbeck.load(file("digits"))
    for name, generator, labels in (
        ("ours", digits, [0, 1, 2, 9, -1, 3]),
        ("plain", grey, []),
        ("labelled", colour, [0, 1, 2, 3, 0, 1]),
    ):
        z, _, _ = inputs(generator, 6, seed=5)
        with torch.no_grad():
            x = generator(z, check.rows(torch.tensor(labels), generator.classes) if labels else None)
        expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        assert np.abs(images[name] - expected).max() <= TOLERANCE and expected.std() > 0.05, name


def test_the_readme_of_a_folder_says_how_to_open_it(exported: Callable[[str, str], Path]) -> None:
    folder = exported("digits", "diffusers")
    text = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in text and "needs `limbeck` installed" in text
    assert json.loads((folder / "limbeck.json").read_text())["recipe"] == RECIPE


def test_a_unet_of_other_conventions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="diffusers: its samples differ from PyTorch's"):
        export(unet_student(1, 0, factor=1.0), "diffusers", tmp_path / "a")
    other = unet_student(1, 0)
    other.denoiser.noise_unit = 2.0  # type: ignore[assignment]
    assert folders.unet_of(other) is None
    with pytest.raises(ValueError, match="OneStep: cannot be stored in a file"):
        export(other, "diffusers", tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_unet_runs_as_onnx_at_any_batch(tmp_path: Path) -> None:
    student = unet_student(3, 4)
    export(student, "onnx", tmp_path / "u.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "u.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 63, 64, 100):  # diffusers branches at 64
        z, labels, _ = inputs(student, n)
        cond = check.rows(labels.clamp(0), 4)
        x = session.run(None, {"z": z.numpy(), "cond": cond.numpy()})[0]
        assert apart(student, z, cond, x) <= TOLERANCE
    with pytest.raises(ValueError, match=r"to: torch\.export cannot trace this generator for every batch size"):
        export(student, "torch", tmp_path / "u.pt2")


def test_pipeline_refuses_in_one_line(exported: Callable[[str, str], Path]) -> None:
    from limbeck.export.pipeline import OneStepPipeline

    pipeline = OneStepPipeline(HubGenerator.from_pretrained(exported("digits", "hub")))
    for keys, message in (
        ({"num_inference_steps": 2}, "num_inference_steps: this generator takes 1 step, got 2"),
        ({"output_type": "latent"}, "output_type: must be pil, np or pt, got 'latent'"),
        ({"class_labels": 10}, "class_labels: expected 1 or 1 of the classes 0 to 9"),
        ({"class_labels": [1, 2], "batch_size": 3}, "class_labels: expected 1 or 3"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(**keys)
    with pytest.raises(NotImplementedError, match="copy the folder"):
        pipeline.save_pretrained("x")
    twice = [pipeline(batch_size=3, generator=torch.Generator().manual_seed(1), output_type="np") for _ in range(2)]
    assert np.array_equal(twice[0].images, twice[1].images)
    assert np.array_equal(
        pipeline(class_labels=1, latents=torch.ones(1, 1, 8, 8), return_dict=False)[0][0].size, (8, 8)
    )


# --- the Hub's folder -------------------------------------------------------------------------------------------------


def test_hub_folder(file: Callable[[str], Path], exported: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder, generator = exported("digits", "hub"), limbeck.load(file("digits"))
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = artifact.read_card(file("digits"))
    assert json.loads((folder / "config.json").read_text()) == card == artifact.read_card(folder / "model.safetensors")
    back = HubGenerator.from_pretrained(str(folder))
    z, _, cond = inputs(generator, 5)
    assert apart(generator, z, cond, back(z, cond)) == 0 and not back.training
    assert apart(generator, z, cond, limbeck.load(folder / "model.safetensors")(z, cond)) == 0
    back.save_pretrained(tmp_path / "again")
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_hub_folder_is_never_executed(exported: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder, canary = tmp_path / "hub", tmp_path / "canary"
    shutil.copytree(exported("digits", "hub"), folder)
    config = {"generator": "os:system", "facts": {"x": f"touch {canary}"}, "auto_map": {"AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    assert HubGenerator.from_pretrained(folder).facts == {"recipe": RECIPE}
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        HubGenerator.from_pretrained(folder)
    assert not canary.exists()


# --- what is refused --------------------------------------------------------------------------------------------------


BAD = [
    ("export digits.safetensors --to tensorrt --out o", "to: "),
    ("export digits.safetensors --out o.onnx", "to: "),
    ("export digits.safetensors --to onnx", "out: "),
    ("export digits.safetensors --to onnx --out o.pt", "out: must end in .onnx, got o.pt"),
    ("export digits.safetensors --to torch --out o", "out: must end in .pt2, got o"),
    ("export digits.safetensors --to hub --out full", "out: full exists; remove it or give another name"),
    ("export digits.safetensors --to web --out full/file", "out: full/file exists"),
    ("export digits.safetensors --to onnx --out folder.onnx", "out: folder.onnx exists"),
    ("export --to onnx --out o.onnx", "FILE: expected one, got none"),
    ("export nowhere --to onnx --out o.onnx", "generator: no file 'nowhere'"),
    (
        "export teacher.safetensors --to onnx --out o.onnx",
        "teacher.safetensors: holds a denoiser, expected a generator",
    ),
    ("export digits.safetensors --to onnx --out o.onnx --serve", "serve: goes with --to web, not --to onnx"),
    ("export digits.safetensors --to web --out o --port 70000", "port: must lie between 0 and 65535"),
    ("export digits.safetensors --to web --out o --colour red", "colour: "),
    ("export digits.safetensors --to web --out o --runtime full", "runtime: full has no ort.wasm.min.mjs; get"),
    ("export digits.safetensors --to web --out o --runtime wrong", "runtime: wrong/ort.wasm.min.mjs is not that of"),
    (
        "export points.safetensors --to diffusers --out o",
        "to: diffusers draws images (C, H, W) with 1, 3 or 4 channels",
    ),
    (
        "export vector.safetensors --to web --out o",
        "to: the page draws images (C, H, W) with 1, 3 or 4 channels and po",
    ),
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, file: Callable[[str], Path]) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("digits", "points"):
        shutil.copyfile(file(name), folder / f"{name}.safetensors")
    vector = OneStep(preconditioned("mlp", {"shape": [5], "width": 4, "depth": 1}, (5,)), 1.0)
    artifact.save(folder / "vector.safetensors", "generator", vector, {})
    artifact.save(folder / "teacher.safetensors", "denoiser", vector.denoiser, {})
    for name in ("full", "wrong", "folder.onnx"):
        (folder / name).mkdir()
    (folder / "full" / "file").write_text("mine")
    for name in web.RUNTIME:
        (folder / "wrong" / name).write_text("other")
    return folder


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_input_ends_in_one_line(
    line: str, message: str, shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shelf)
    before = sorted(shelf.rglob("*"))
    assert cli.main(shlex.split(line)) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith(f"limbeck: {message}") and error.count("\n") == 1, error
    assert sorted(shelf.rglob("*")) == before


@pytest.mark.parametrize(("to", "extra"), [("onnx", "export"), ("web", "export"), ("diffusers", "hub"), ("hub", "hub")])
def test_missing_extra_is_named(to: Any, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    out = tmp_path / ("o.onnx" if to == "onnx" else "o")
    with pytest.raises(ValueError, match=rf"to: {to} needs \w+: pip install 'limbeck\[{extra}\]'"):
        export(MODELS["points"](), to, out)


def test_a_generator_in_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="generator: is in training mode"):
        export(MODELS["points"]().train(), "torch", tmp_path / "p.pt2")


def test_command(shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(shelf)
    assert cli.main(shlex.split("export points.safetensors --to torch --out made/p.pt2")) == 0
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("made/p.pt2: 0.") and "over 64 samples" in error and error.count("\n") == 1
    assert [path.name for path in (shelf / "made").iterdir()] == ["p.pt2"]
    assert get_args(get_type_hints(cli.ExportOptions)["to"]) == TARGETS


# --- in the browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def page(exported: Callable[[str, str], Path]) -> Callable[[str], Path]:
    """The page of a model; skips where onnxruntime-web's files are not at hand."""
    if not RUNTIME.is_dir():
        assert "CI" not in os.environ, "the gate runs generators in the browser: `make web-runtime` must come first"
        pytest.skip("no web-runtime: the page of a generator was not made; `make web-runtime` fetches what it needs")
    return lambda name: exported(name, "web")


class Text(html.parser.HTMLParser):
    """Elements by id: attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.at: dict[str, dict[str, str | None]] = {}
        self.text: dict[str, str] = {}
        self.last = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.last = dict(attrs).get("id") or tag
        self.at[self.last] = dict(attrs)

    def handle_data(self, data: str) -> None:
        self.text[self.last] = self.text.get(self.last, "") + data


def chromium(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Headless Chromium; skips where it is not installed."""
    found = shutil.which("chromium")
    if found is None:
        assert "CI" not in os.environ, "the gate opens the page in chromium, which is not installed"
        pytest.skip("chromium not installed: the page of a generator was not opened in a browser")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    )
    command = [found, *flags.split(), f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


# Opens the page as shipped in a frame of a phone's width, runs `act` in it and posts what comes out.
DRIVER = """<!DOCTYPE html><iframe src="/index.html#seed=3" style="width:390px;height:800px"></iframe><script>
const post = result => fetch("/result", { method: "POST", body: JSON.stringify(result) });
const pause = ms => new Promise(done => setTimeout(done, ms));
document.querySelector("iframe").onload = async event => {
  const view = event.target.contentWindow, page = view.document, root = page.documentElement;
  const floats = text => new view.Float32Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
  const drawn = async seed => { while (root.dataset.drawn !== String(seed) && !root.dataset.error) await pause(20); };
  const pixels = canvas => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
  try {
    await view.limbeck.ready;
    const result = await (async () => { ACT })();
    post({ ...result, error: root.dataset.error ?? "", width: root.scrollWidth });
  } catch (error) { post({ error: String(error) }); }
};
</script>"""


def drive(folder: Path, act: str, work: Path) -> dict[str, Any]:
    """What `act` returns in the page."""
    answer: dict[str, Any] = {}
    arrived = threading.Event()

    class Handler(web._Handler):
        def do_GET(self) -> None:
            if self.path != "/driver":
                return super().do_GET()
            self.answer(DRIVER.replace("ACT", act).encode())

        def do_POST(self) -> None:
            answer.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer(b"")
            arrived.set()

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serving(web.server(folder, 0, Handler)) as port:
        browser = chromium(work, f"http://127.0.0.1:{port}/driver")
        try:
            assert arrived.wait(120), "the page gave no answer"
        finally:
            browser.kill()
            browser.communicate()
    assert answer["error"] == "" and answer["width"] <= 390, {key: answer.get(key) for key in ("error", "width")}
    return answer


class serving:
    """A server that runs in a thread; the port."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.server = server

    def __enter__(self) -> int:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self.server.server_port

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def packed(values: Tensor) -> str:
    return base64.b64encode(values.float().contiguous().numpy().tobytes()).decode()


def test_browser_draws_images(page: Callable[[str], Path], file: Callable[[str], Path], tmp_path: Path) -> None:
    generator = limbeck.load(file("digits"))
    z, labels, cond = inputs(generator, 64)
    act = f"""
      const x = Array.from(await view.limbeck.generate(floats("{packed(z)}"), {labels.tolist()}));
      const grid = () => [...page.querySelectorAll("#gallery canvas")].map(pixels);
      const [, middle] = page.querySelectorAll(".ends canvas");
      await drawn(3);
      const first = grid(), pace = page.getElementById("pace").textContent, half = pixels(middle);
      page.querySelectorAll(".sample")[7].click();
      page.getElementById("where").value = 0;
      page.getElementById("where").dispatchEvent(new view.Event("input"));
      while (String(pixels(middle)) !== String(first[7])) await pause(20);
      page.getElementById("again").click();
      await drawn(4);
      const second = grid();
      page.querySelectorAll(".chip")[1].click();
      await pause(300);
      return {{ x, first, second, half, pace, third: grid(), hash: view.location.hash,
                chips: page.querySelectorAll(".chip").length }};"""
    seen = drive(page("digits"), act, tmp_path)
    x = torch.tensor(seen["x"]).reshape(64, 1, 8, 8)
    assert apart(generator, z, cond, x) <= TOLERANCE
    assert len(seen["first"]) == 24 and seen["chips"] == 11 and seen["hash"] == "#seed=4&class=0"
    assert seen["pace"].endswith(" ms") and float(seen["pace"].removesuffix(" ms")) > 0
    for one, other in (("first", "second"), ("second", "third")):  # a click brings others; a class changes most
        assert sum(a != b for a, b in zip(seen[one], seen[other], strict=True)) >= 20
    grids = np.array([seen[name] for name in ("first", "second", "third")]).reshape(3, 24, 64, 4)
    assert (grids[..., 3] == 255).all() and (grids[..., 0] == grids[..., 2]).all()
    assert grids[..., 0].std(2).min() > 10 and seen["half"] not in seen["first"]  # pictures, and none is blank
    judge = artifact.load(artifact.locate("digits", "classifier"), "classifier")
    named = judge.logits(torch.tensor(grids[..., 0] / 127.5 - 1).float().reshape(72, 1, 8, 8)).argmax(1).reshape(3, 24)
    assert (named[2] == 0).float().mean() >= 0.75  # noises of the page's own, the class that was picked


def test_browser_draws_from_latents_of_another_shape(
    page: Callable[[str], Path], file: Callable[[str], Path], tmp_path: Path
) -> None:
    generator = limbeck.load(file("gan"))
    z, labels, cond = inputs(generator, 64)
    act = f"""
      const x = Array.from(await view.limbeck.generate(floats("{packed(z)}"), {labels.tolist()}));
      await drawn(3);
      return {{ x, grid: [...page.querySelectorAll("#gallery canvas")].map(pixels) }};"""
    seen = drive(page("gan"), act, tmp_path)
    assert apart(generator, z, cond, torch.tensor(seen["x"]).reshape(64, 1, 9, 12)) <= TOLERANCE
    assert len(seen["grid"]) == 24 and np.array(seen["grid"]).reshape(24, 108, 4)[..., 0].std(1).min() > 10


def test_browser_draws_points(page: Callable[[str], Path], file: Callable[[str], Path], tmp_path: Path) -> None:
    generator = limbeck.load(file("points"))
    z, _, _ = inputs(generator, 64)
    act = f"""
      const x = Array.from(await view.limbeck.generate(floats("{packed(z)}")));
      const [cloud, way] = page.querySelectorAll("canvas");
      const inked = canvas => pixels(canvas).filter((value, i) => i % 4 === 3 && value).length;
      await drawn(3);
      page.getElementById("theme").click();
      await pause(200);
      return {{ x, cloud: inked(cloud), way: inked(way), chips: page.querySelectorAll(".chip").length }};"""
    seen = drive(page("points"), act, tmp_path)
    assert apart(generator, z, None, torch.tensor(seen["x"]).reshape(64, 2)) <= TOLERANCE
    assert seen["cloud"] > 3000 and seen["way"] > 3000 and seen["chips"] == 0


def test_page_on_disk_says_how_to_serve_it(page: Callable[[str], Path], tmp_path: Path) -> None:
    path = page("digits") / "index.html"
    browser = chromium(tmp_path, "--virtual-time-budget=3000", "--dump-dom", path.as_uri())
    dom = Text(browser.communicate(timeout=120)[0].decode())
    assert "run `python3 -m http.server` in this folder and open http://localhost:8000" in dom.text["status"]
    assert "hidden" in dom.at["studio"] and "hidden" not in dom.at["status"] and "data-error" not in dom.at["html"]


def test_page_loads_its_own_folder_only_and_holds_hostile_names() -> None:
    bad = "</script><script>alert(1)</script>'\"&\ud800$title"
    for recipe in ({"teacher": bad}, {"teacher": bad, "method": {"name": bad}}, {"teacher": 3}, {"method": []}):
        text = web.page(MODELS["points"](), {"recipe": recipe}, 1)
        parsed = Text(text)
        assert "http://localhost:8000" in text and text.count("http") == text.count("http.server") + 2
        assert "script-src 'self' 'wasm-unsafe-eval' 'sha256-" in text and "connect-src 'self'" in text
        assert text.count("<script") == 2 and "alert(1)</script" not in text
        if recipe.get("teacher") == bad:
            assert bad in parsed.text["h1"] and parsed.text["title"].startswith(bad)
    assert "digits, distilled with" in Text(web.page(MODELS["digits"](), {"recipe": RECIPE}, 1)).text["title"]


def test_folder_holds_what_it_needs(page: Callable[[str], Path]) -> None:
    assert {path.name for path in page("digits").iterdir()} == {"index.html", "model.onnx", *web.RUNTIME}


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Stands for the browser: fetches every file, then presses Ctrl-C."""
    seen: dict[str, Any] = {}

    def visit(address: str) -> bool:
        def fetch() -> None:
            try:
                for name in ("index.html", "a.mjs", "a.wasm", "model.onnx"):
                    with urllib.request.urlopen(f"{address}/{name}") as answer:
                        seen[name] = answer.headers["Content-Type"]
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=fetch).start()
        return True

    monkeypatch.setattr(webbrowser, "open", visit)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    yield seen
    signal.signal(signal.SIGINT, before)


def test_serve(visited: dict[str, Any], tmp_path: Path) -> None:
    for name in ("index.html", "a.mjs", "a.wasm", "model.onnx"):
        (tmp_path / name).write_text("x")
    told: list[str] = []
    web.serve(tmp_path, 0, told.append)
    assert told[0].startswith("http://127.0.0.1:") and told[1] == "stopped"
    types = ["text/html; charset=utf-8", "text/javascript", "application/wasm", "application/octet-stream"]
    assert list(visited.values()) == types
