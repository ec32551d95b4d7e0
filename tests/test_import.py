"""Checkpoints from elsewhere: good ones give the same images, all others one line, and none of them is ever run."""

from __future__ import annotations

import collections
import contextlib
import functools
import gzip
import io
import json
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import edm_files
import numpy as np
import pytest
import safetensors.torch
import torch
from edm_files import Persistent
from safetensors import safe_open
from torch import Tensor
from watch import WATCH

import limbeck
from limbeck import artifact, cli, importer, networks, pickles, teachers
from limbeck.denoiser import EpsPreconditioned, Preconditioned, Rescaled, iddpm_levels
from limbeck.generator import OneStep, Trajectory
from limbeck.noise import Karras
from limbeck.sample import heun
from limbeck.schedule import VP

GOLDEN = Path(os.environ.get("LIMBECK_GOLDEN", "golden")).absolute()  # tests change the folder
GOLDEN_NAMES = (
    "edm_adm_cond_multihead", "edm_adm_uncond_aug", "edm_ddpmpp_cond", "edm_ddpmpp_uncond_aug",
    "edm_ncsnpp_3level_gray", "edm_ncsnpp_cond_aug", "edm_song_skip_skip", "iddpm_adm_cond", "ve_ncsnpp_uncond",
    "vp_ddpmpp_uncond",
)  # fmt: skip
CANARY = Path("canary")  # in the test's own folder
COMMAND = "touch canary"
SOURCE = f"import os\nos.system({COMMAND!r})\nclass EDMPrecond: ...\n"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Small networks of our own as others would have saved them ------------------------------------------------------------

TINY = {"model_channels": 8, "channel_mult": [1, 2], "channel_mult_emb": 1, "num_blocks": 1, "attn_resolutions": [4]}
NCSNPP = {
    "embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual", "resample_filter": [1, 3, 3, 1],
}  # fmt: skip
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "edm": ("EDMPrecond", "SongUNet", {"augment_dim": 9, "dropout": 0.13}),
    "vp": ("VPPrecond", "SongUNet", {}),
    "ve": ("VEPrecond", "SongUNet", NCSNPP),
    "iddpm": ("iDDPMPrecond", "DhariwalUNet", {}),
}


def kwargs_of(form: str) -> dict[str, Any]:
    own = {"img_resolution": 8, "img_channels": 2, "label_dim": 3, "model_type": NETWORKS[form][1]}
    return own | TINY | NETWORKS[form][2]


@functools.cache
def denoiser_of(form: str, seed: int = 0) -> Preconditioned | EpsPreconditioned:
    """A denoiser with random weights, none of them zero."""
    kwargs = kwargs_of(form)
    model = {"SongUNet": "songunet", "DhariwalUNet": "adm"}[kwargs.pop("model_type")]
    channels = kwargs.pop("img_channels")
    network = networks.build(
        model, {"in_channels": channels, "out_channels": channels * (1 + (form == "iddpm")), **kwargs}
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (*network.parameters(), *network.buffers()):
            if p.ndim == 4 and p.shape[:2] == (1, 1):
                continue  # the filter of a resampling layer
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5))
    if form == "edm":
        return Preconditioned(network, (2, 8, 8), 3, noise_unit=1.0).eval()
    ranges = {"vp": (2**-10, 152.16697692871094), "ve": (0.02, 100.0)}
    if form == "iddpm":
        table = torch.tensor(iddpm_levels().tolist())
        ranges["iddpm"] = (float(table[-2]), float(table[0]))
    return EpsPreconditioned(network, form, (2, 8, 8), 3, 0.5, *ranges[form]).eval()


def state_of(denoiser: torch.nn.Module) -> dict[str, Tensor]:
    """Its state under EDM's names."""
    rename = {"levels": "u"}
    state = {rename.get(k, k.replace("network.", "model.", 1)): v.clone() for k, v in denoiser.state_dict().items()}
    return {name: state[name] for name in sorted(state, key=lambda name: name != "u")}


def good(form: str = "edm", state: Mapping[str, Tensor] | None = None, **changes: Any) -> Persistent:
    """A network as EDM pickles it."""
    state = state_of(denoiser_of(form)) if state is None else state
    return edm_files.network(NETWORKS[form][0], kwargs_of(form), state, SOURCE, **changes)


def write(value: Any, name: str = "net.pkl", **options: Any) -> Path:
    path = Path.cwd() / name
    path.write_bytes(value if isinstance(value, bytes) else edm_files.dumps(value, **options))
    return path


def rows(form: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, 2, 8, 8, generator=generator), torch.tensor([0.03, 1.0, 70.0]), torch.eye(3)]


@pytest.mark.parametrize("old", [False, True], ids=["torch2", "torch1"])
@pytest.mark.parametrize(("form", "protocol"), [("edm", 2), ("edm", 3), ("edm", 5), *((form, 4) for form in NETWORKS)])
@torch.no_grad()
def test_every_form_and_spelling(form: str, protocol: int, old: bool, equal: Any) -> None:
    original = denoiser_of(form)
    path = write(edm_files.snapshot(good(form, old=old), SOURCE), protocol=protocol, old=old)
    names = path.read_bytes()
    assert (b"numpy.core" in names, b"numpy._core" in names) == (old, not old)
    with WATCH:
        denoiser, facts = importer.load(path)
    assert WATCH.seen == [] and not CANARY.exists()
    assert type(denoiser) is type(original) and artifact.describe(denoiser) == artifact.describe(original)
    assert equal(denoiser.state_dict(), original.state_dict())
    assert torch.equal(denoiser(*rows(form)), original(*rows(form)))
    assert facts["source"]["class"] == NETWORKS[form][0] and len(facts["source"]["code_sha256"]) == 3


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], str]:
    """Constructor arguments, state, records and class of a golden file."""
    if not GOLDEN.is_dir():
        pytest.skip("golden files of the EDM networks not present beside the checkout")
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(GOLDEN / f"{name}.safetensors")
    state = {key.removeprefix("state."): tensors.pop(key) for key in list(tensors) if key.startswith("state.")}
    return json.loads(metadata["kwargs"]), state, tensors, metadata["class"]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@torch.no_grad()
def test_golden(name: str) -> None:
    """A pickle around EDM's recorded weights gives EDM's recorded images, also from the converted folder."""
    kwargs, state, records, precond = golden(name)
    network = edm_files.network(precond, kwargs, state, SOURCE)
    path = write(edm_files.snapshot(network, SOURCE))
    target = importer.convert(path, Path("out"))
    for denoiser in (teachers.load("out"), teachers.load("file:out"), teachers.load(f"edm:{path}")):
        expected = records.get("y_no_augment", records["y"])
        y = denoiser(records["x"], records["sigma"], records.get("labels"))
        error = (y - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1)
        assert error.max() <= 1e-5
        if "y_no_label" in records and "y_no_augment" not in records:
            y, expected = denoiser(records["x"], records["sigma"]), records["y_no_label"]
            assert ((y - expected).abs().max() / expected.abs().max()) <= 1e-5
    assert not CANARY.exists()
    card = artifact.read_card(target)
    assert card["card"]["preconditioning"] == importer.FORMS[precond]
    expected_range = {
        "EDMPrecond": (0.0, None), "VEPrecond": (0.02, 100.0), "VPPrecond": (0.0009765625, 152.16697692871094),
    }.get(precond)  # fmt: skip
    if expected_range is None:
        expected_range = (float(state["u"][-2]), float(state["u"][0]))
    assert (card["card"]["sigma_min"], card["card"]["sigma_max"]) == expected_range


@pytest.mark.parametrize("name", ["edm_ddpmpp_uncond_aug", "iddpm_adm_cond"])
@torch.no_grad()
def test_golden_sampler(name: str) -> None:
    """Heun's method on the recorded levels ends in the recorded samples."""
    kwargs, state, records, precond = golden(name)
    denoiser = teachers.load(f"edm:{write(edm_files.snapshot(edm_files.network(precond, kwargs, state, SOURCE)))}")
    calls = records["sampler_sigma_calls"].double()
    sigmas = torch.cat([calls[:1], calls[1::2], torch.zeros(1, dtype=torch.float64)])
    assert len(calls) == 7 and torch.equal(calls[1::2], calls[2::2])
    x = heun(denoiser, records["sampler_latents"], sigmas=sigmas, cond=records.get("sampler_labels"))
    expected = records["sampler_y"].float()
    assert (x - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_architecture_from_names_and_shapes(name: str) -> None:
    kwargs, state, _, precond = golden(name)
    shapes = {key.removeprefix("model."): tuple(value.shape) for key, value in state.items()}
    network, arguments = importer.infer(shapes)
    channels = kwargs.pop("img_channels")
    model = {"SongUNet": "songunet", "DhariwalUNet": "adm"}[kwargs.pop("model_type")]
    outputs = 2 * channels if precond == "iDDPMPrecond" else channels
    kwargs.pop("sigma_data", None)
    expected = networks.build(model, {"in_channels": channels, "out_channels": outputs, **kwargs})
    assert network == model
    # attention at a level too narrow for it leaves no trace
    kept = [side for side in expected.arguments["attn_resolutions"] if side in arguments["attn_resolutions"]]
    assert networks.build(network, arguments).arguments == expected.arguments | {
        "dropout": 0.0, "attn_resolutions": kept,
    }  # fmt: skip


CIFAR = {
    "img_resolution": 32, "in_channels": 3, "out_channels": 3, "channel_mult": [2, 2, 2], "augment_dim": 9,
    "dropout": 0.0,
}  # fmt: skip
IMAGENET = {"img_resolution": 64, "in_channels": 3, "out_channels": 3, "label_dim": 1000, "dropout": 0.0}


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [("songunet", CIFAR, 55_733_891), ("songunet", CIFAR | NCSNPP, 56_397_827), ("adm", IMAGENET, 295_899_267)],
)
def test_published_architectures_from_shapes(name: str, arguments: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        network: Any = networks.build(name, arguments)
        found = importer.infer({key: tuple(value.shape) for key, value in network.state_dict().items()})
        again = networks.build(*found)
    assert found[0] == name and again.arguments == network.arguments
    assert sum(p.numel() for p in again.parameters()) == parameters


# What each kind of checkpoint becomes ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_teacher(equal: Any) -> None:
    path = write(edm_files.snapshot(good(), SOURCE))
    target = importer.convert(path, Path("out"))
    assert sorted(p.name for p in Path("out").iterdir()) == ["card.json", "denoiser.safetensors"]
    card = artifact.read_card(target)
    assert json.loads(Path("out/card.json").read_text()) == card
    source = card["source"]
    assert source["file"] == "net.pkl" and source["sha256"] == limbeck.importer.sha256(path)
    assert source["class"] == "EDMPrecond" and source["network_class"] == "SongUNet" and source["use_fp16"] is False
    assert "CC BY-NC-SA" in card["licence"] and card["made_by"] == limbeck.__version__
    assert card["card"]["arguments"]["augment_dim"] == 9 and card["card"]["noise_unit"] == 1.0
    assert SOURCE.encode() not in target.read_bytes()
    loaded = teachers.load("out")
    assert equal(loaded.state_dict(), denoiser_of("edm").state_dict())
    with pytest.raises(ValueError, match=r"out: out already holds a denoiser"):
        importer.convert(path, Path("out"))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sid", "diff-instruct"])
def test_a_generator(kind: str, equal: Any) -> None:
    value = {"ema": good()} | ({"Sg": good(state=state_of(denoiser_of("edm", 1)))} if kind != "sid" else {})
    path = write(value)
    for role in (None, "generator") if kind != "sid" else ("generator",):
        with pytest.raises(ValueError, match=r"sigma_init: is missing"):
            importer.convert(path, Path("out"), role)
    if kind == "sid":
        with pytest.raises(ValueError, match=r"--as teacher, or --as generator --sigma-init S"):
            importer.convert(path, Path("out"))
        assert isinstance(importer.load(path, "teacher")[0], Preconditioned)
    else:
        with pytest.raises(ValueError, match="no teacher"):
            importer.convert(path, Path("out"), "teacher")
    assert not Path("out").exists()
    importer.convert(path, Path("out"), sigma_init=2.5)
    generator = limbeck.load("out")
    assert isinstance(generator, OneStep) and generator.sigma == 2.5
    assert equal(generator.denoiser.state_dict(), denoiser_of("edm").state_dict())
    z, label = rows("edm")[0], torch.eye(3)
    assert torch.equal(generator(z, label), denoiser_of("edm")(2.5 * z, torch.tensor(2.5), label))


@torch.no_grad()
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_a_pid_student(zipped: bool) -> None:
    denoiser = denoiser_of("edm")
    state = {k.removeprefix("network."): v for k, v in denoiser.state_dict().items()}
    if zipped:  # PID keeps the moving average as parameters
        state = {k: torch.nn.Parameter(v) for k, v in state.items()}
    path = write(edm_files.state_file(state, zipped), "ema.pt")
    with WATCH:
        importer.load(path)
    assert WATCH.seen == []
    importer.convert(path, Path("out"))
    generator = limbeck.load("out")
    assert isinstance(generator, Trajectory) and generator.levels == Karras(0.002, 80.0)
    z, label = rows("edm")[0], torch.eye(3)
    # the student of arXiv:2411.08378: x = (t/T) T z + (1 - t/T) F(T z / sqrt(1/4 + T^2), ln(t) / 4)
    t, top = 0.002, 80.0
    f = denoiser.network(top / (0.25 + top**2) ** 0.5 * z, torch.full((3,), t).log() / 4, label)
    torch.testing.assert_close(generator(z, label), t * z + (1 - t / top) * f, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", ["edm", "vp", "ve"])
@pytest.mark.parametrize("container", ["safetensors", "zip"])
def test_bare_weights(form: str, container: str) -> None:
    """Weights alone do not say how they were preconditioned; the user does."""
    original = denoiser_of(form)
    state = state_of(original)
    if container == "zip":
        path = write(edm_files.state_file(state), "net.pt")
    else:
        path = write(safetensors.torch.save(state), "net.safetensors")
        with pytest.raises(ValueError, match="say which with --as teacher"):
            importer.load(path)
    with pytest.raises(ValueError, match="preconditioning: is missing"):
        importer.load(path, "teacher")
    denoiser = importer.load(path, "teacher", preconditioning=form)[0]
    assert torch.equal(denoiser(*rows(form)), original(*rows(form)))
    student = importer.load(path, "generator", 2.5, form)[0]
    assert isinstance(student, OneStep)
    other = importer.load(path, "teacher", preconditioning="vp" if form == "ve" else "ve")[0]
    assert artifact.fingerprint(other) != artifact.fingerprint(denoiser)


@torch.no_grad()
def test_a_file_of_our_own(equal: Any) -> None:
    original = denoiser_of("vp")
    artifact.save(Path("own.safetensors"), "denoiser", original, {}, torch.float16)
    with pytest.raises(ValueError, match=r"preconditioning: own\.safetensors needs none"):
        importer.load(Path("own.safetensors"), preconditioning="edm")
    importer.convert(Path("own.safetensors"), Path("out"))
    assert equal(teachers.load("out").state_dict(), artifact.load("own.safetensors", "denoiser").state_dict())
    importer.convert(Path("own.safetensors"), Path("student"), "generator", 1.5)
    assert limbeck.load("student").sigma == 1.5
    with pytest.raises(
        ValueError, match=r"^sigma_init: belongs to a generator, and own\.safetensors is read as a teacher"
    ):
        importer.convert(Path("own.safetensors"), Path("lost"), sigma_init=1.5)
    discrete = Rescaled(original.network, VP(), "eps", original.shape, 3)
    artifact.save(Path("discrete.safetensors"), "denoiser", discrete, {})
    importer.convert(Path("discrete.safetensors"), Path("copy"))
    copied = teachers.load("copy")
    assert isinstance(copied, Rescaled) and artifact.describe(copied) == artifact.describe(discrete)
    assert equal(copied.state_dict(), discrete.state_dict())
    with pytest.raises(ValueError, match="is a generator of Limbeck's already"):
        importer.convert(Path("student/generator.safetensors"), Path("again"))


@pytest.mark.parametrize("form", NETWORKS)
def test_round_trips_keep_every_bit(form: str, equal: Any) -> None:
    """Pickle, folder, module, folder, module: the same bits and the same file."""
    target = importer.convert(write(edm_files.snapshot(good(form))), Path("out"))
    module = artifact.load(target, "denoiser")
    assert equal(module.state_dict(), denoiser_of(form).state_dict())
    facts = {k: v for k, v in artifact.read_card(target).items() if k not in ("format", "kind", "card")}
    artifact.save(Path("again.safetensors"), "denoiser", module, facts)
    assert Path("again.safetensors").read_bytes() == target.read_bytes()
    assert equal(artifact.load("again.safetensors", "denoiser").state_dict(), module.state_dict())
    shorter = safetensors.torch.load_file(str(target))
    assert all(tensor.dtype == torch.float32 for tensor in shorter.values())


def test_folders_say_what_they_hold() -> None:
    importer.convert(write(edm_files.snapshot(good())), Path("teacher"))
    importer.convert(write({"ema": good()}), Path("student"), "generator", 2.5)
    with pytest.raises(ValueError, match=r"teacher/denoiser\.safetensors: holds a denoiser, expected a gen"):
        limbeck.load("teacher")
    with pytest.raises(ValueError, match=r"student/generator\.safetensors: holds a generator, expected a den"):
        teachers.load("student")


def test_command_line(capsys: pytest.CaptureFixture[str], tiny_keys: list[str]) -> None:
    write(edm_files.snapshot(good(), SOURCE))
    write({"ema": good()}, "sid.pkl")
    assert cli.main(["import", "net.pkl", "--out", "teacher"]) == 0
    assert cli.main(["import", "sid.pkl", "--out", "student", "--as", "generator", "--sigma-init", "2.5"]) == 0
    told = capsys.readouterr().err
    assert "denoiser in teacher/denoiser.safetensors" in told and "CC BY-NC-SA" in told
    assert cli.main(["sample", "student", "--count", "4", "--seed", "1", "--class", "2", "--out", "s.npz"]) == 0
    assert cli.main(["sample", "teacher", "--count", "2", "--steps", "3", "--out", "t.npz"]) == 0
    assert cli.main(["sample", "edm:net.pkl", "--count", "2", "--steps", "3", "--out", "u.npz"]) == 0
    assert Path("t.npz").read_bytes() == Path("u.npz").read_bytes()
    for folder, kind in (("teacher", "denoiser"), ("student", "generator")):
        capsys.readouterr()
        assert cli.main(["show", folder]) == 0
        shown = capsys.readouterr().out
        assert kind in shown and "EDMPrecond" in shown and "licence" in shown
    keys = [*tiny_keys[:4], "--every.save", "1", "--evaluate.samples", "50"]
    assert cli.main(["distill", "teacher", "--method", "sid", "--out", "run", "--steps", "1", "--batch", "2"]) == 0
    assert cli.main(["distill", "edm:net.pkl", "--method", "pid", "--out", "run2", *keys]) == 0
    assert isinstance(limbeck.load("run"), OneStep) and isinstance(limbeck.load("run2"), Trajectory)
    np.savez("real.npz", x=np.random.default_rng(0).integers(0, 256, (60, 8, 8, 2), dtype=np.uint8))
    keys = ["--data", "real.npz", "--features", "pixels", "--samples", "20", "--teacher_steps", "3"]
    assert cli.main(["evaluate", "student", "teacher", *keys, "--out", "scores"]) == 0
    scores = json.loads(Path("scores/contest.json").read_text())
    assert {row["nfe"] for row in scores["rows"]} == {1, 5}
    assert not CANARY.exists()


@pytest.mark.parametrize("form", ["vp", "ve", "iddpm"])
@pytest.mark.parametrize("method", ["pid", "sid"])
def test_older_forms_teach(form: str, method: str) -> None:
    """A student of such a teacher is a copy of it, is stored and comes back."""
    importer.convert(write(edm_files.snapshot(good(form))), Path("teacher"))
    keys: dict[str, Any] = {"steps": 1, "batch": 2, "evaluate": {"samples": 20, "teacher_steps": 3}}
    keys["method.levels"] = {"sigma_min": 0.05, "sigma_max": 60.0}  # the default reaches below these teachers' range
    limbeck.distill("teacher", method, out="run", **keys)
    generator = limbeck.load("run")
    assert isinstance(generator.denoiser, EpsPreconditioned) and generator.denoiser.form == form


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("import --out o", "FILE: expected one"),
        ("import net.pkl", "out"),
        ("import nothing.pkl --out o", "nothing.pkl: cannot be read (No such file"),
        ("import . --out o", "not a regular file"),
        ("import net.pkl --out o --as student", "as"),
        ("import net.pkl --out o --sigma-init two", "sigma_init"),
        ("import net.pkl --out o --sigma-init -1", "sigma_init: must be positive"),
        ("import net.pkl --out o --as teacher --sigma-init 2.5", "sigma_init: belongs to a generator"),
        ("import net.pkl --out o --preconditioning vp", "preconditioning: net.pkl needs none"),
        ("import net.pkl --out o --trust true", "trust"),
        ("import net.pkl --out net.pkl", "out: net.pkl is a file"),
        ("import evil.pkl --out o", "names 'posix.system'"),
        ("import training.pt --out o", "a training state: not supported"),
        ("import consistency.pt --out o", "consistency models: not supported"),
        ("sample edm:evil.pkl --count 1 --out s.png", "names 'posix.system'"),
        ("distill edm:nothing.pkl --out o", "cannot be read"),
    ],
)
def test_mistakes(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(edm_files.snapshot(good(), SOURCE))
    write(HOSTILE["posix.system"](), "evil.pkl")
    write(training_state(), "training.pt")
    write(edm_files.state_file({"time_embed.0.weight": torch.ones(2), "input_blocks.0.0.weight": torch.ones(2)}),
          "consistency.pt")  # fmt: skip
    before = sorted(Path.cwd().iterdir())
    assert cli.main(line.split()) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1
    assert sorted(Path.cwd().iterdir()) == before


# Hostile and damaged files --------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(path: str) -> bytes:
    """GLOBAL of a dotted name."""
    module, _, leaf = path.rpartition(".")
    return f"c{module}\n{leaf}\n".encode()


def raw(body: bytes, version: int = 4) -> bytes:
    """A pickle of the dictionary {"ema": what `body` leaves on the stack}."""
    return b"\x80" + bytes([version]) + b"}" + text("ema") + body + b"s."


def call(path: str, *arguments: bytes) -> bytes:
    """A call of a name."""
    return name(path) + b"(" + b"".join(arguments) + b"tR"


def persistent(state: bytes, class_name: str = "EDMPrecond", source: str = SOURCE) -> bytes:
    meta = (text("type"), text("class"), text("version"), b"K\x06", text("module_src"), text(source),
            text("class_name"), text(class_name), text("state"), state)  # fmt: skip
    return call("torch_utils.persistence._reconstruct_persistent_obj", b"}(" + b"".join(meta) + b"u")


HEADER = (
    pickle.dumps(pickles.MAGIC, 2)
    + pickle.dumps(pickles.VERSION, 2)
    + pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
)


BIG_ENDIAN = pickle.dumps({"little_endian": False}, 2)


def binary(content: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(content)) + content


def storage(content: bytes) -> bytes:
    return call("torch.storage._load_from_bytes", binary(content))


def stream(count: int = 4, body: bytes | None = None, header: bytes = HEADER, key: str = "0") -> bytes:
    """A storage of float32 zeros as torch.save writes it."""
    reference = b"(" + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu")
    reference += b"J" + struct.pack("<i", count) + b"NtQ"
    numbers = struct.pack("<q", count) + bytes(4 * count) if body is None else body
    return header + b"\x80\x02" + reference + b"." + b"\x80\x02](" + text(key) + b"e." + numbers


def plain(value: Any) -> bytes:
    """The instructions of a plain value, without memory."""
    pickler = pickle.Pickler(file := io.BytesIO(), 2)
    pickler.fast = True
    pickler.dump(value)
    return file.getvalue()[2:-1]


def tensor(source: bytes, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", v) for v in values) + b"t"

    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", source, b"K" + bytes([offset]), numbers(shape), numbers(stride),
                b"\x89", hooks)  # fmt: skip


def changed_state(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[], bytes]:
    """A good file whose weights are changed before it is pickled."""

    def make() -> bytes:
        state = state_of(denoiser_of("edm"))
        change(state)
        return edm_files.dumps(edm_files.snapshot(good(state=state)))

    return make


def changed(change: Callable[[Persistent], Any]) -> Callable[[], bytes]:
    """A good file whose network object is changed before it is pickled."""

    def make() -> bytes:
        network = good()
        change(network)
        return edm_files.dumps(edm_files.snapshot(network))

    return make


def kwargs(**changes: Any) -> Callable[[], bytes]:
    return lambda: edm_files.dumps(edm_files.snapshot(good(model_kwargs=changes)))


def attributes(**changes: Any) -> Callable[[], bytes]:
    return lambda: edm_files.dumps(edm_files.snapshot(good(attributes=changes)))


def model_of(network: Persistent) -> Persistent:
    return network.state["_modules"]["model"]


def training_state() -> bytes:
    """What EDM's training keeps: whole modules and an optimiser, through torch.save."""
    file = io.BytesIO()
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    with edm_files.stand_ins():
        torch.save({"net": Persistent("EDMPrecond", SOURCE), "optimizer_state": optimizer.state_dict()}, file)
    return file.getvalue()


def zipped(change: Callable[[dict[str, bytes]], Any], compress: int = zipfile.ZIP_STORED) -> bytes:
    """A state dictionary's archive, rewritten after a change of its entries."""
    file = io.BytesIO(edm_files.state_file(state_of(denoiser_of("edm"))))
    with zipfile.ZipFile(file) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    change(entries)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return out.getvalue()


def flipped() -> bytes:
    content = bytearray(edm_files.state_file(state_of(denoiser_of("edm"))))
    content[len(content) // 2] ^= 4
    return bytes(content)


def shared_modules() -> bytes:
    """Eight levels of modules that each hold the next one 30 times."""
    inner: Any = Persistent("Conv2d", SOURCE, _parameters={}, _buffers={}, _modules={})
    for _ in range(8):
        inner = Persistent("Conv2d", SOURCE, _parameters={}, _buffers={}, _modules={str(i): inner for i in range(30)})
    network = good()
    model_of(network).state["_modules"]["map_layer0"] = inner
    return edm_files.dumps(edm_files.snapshot(network))


def nested_kwargs() -> Any:
    value: Any = {"x": 1}
    for _ in range(6):
        value = dict.fromkeys(map(str, range(64)), value)
    return value


def network_around(model: bytes) -> bytes:
    """EDMPrecond around the instructions of a U-Net."""
    numbers = {"img_resolution": 8, "img_channels": 2, "label_dim": 3, "sigma_data": 0.5, "sigma_min": 0.0,
               "sigma_max": 80.0}  # fmt: skip
    outer = b"".join(text(key) + plain(value) for key, value in numbers.items())
    return persistent(b"}(" + outer + text("_modules") + b"}" + text("model") + model + b"su")


def laughs() -> bytes:
    """Arguments of a network, one of which is 2^60 ones."""
    value = b"](K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"e"
    return b"}(" + text("_init_args") + b")" + text("_init_kwargs") + b"}" + text("channel_mult") + value + b"su"


def one_storage_for_all() -> bytes:
    """3,000 tensors of one megabyte on one storage, as the weights of a network that is otherwise good."""
    model = model_of(good())
    kept = pickle.loads(pickle.dumps(model.state["_init_kwargs"]))
    shared = tensor(storage(stream(2**18)), (2**18,), (1,)) + b"q\x05"
    weights = b"}(" + b"".join(text(f"w{i}") + (b"h\x05" if i else shared) for i in range(3000)) + b"u"
    module = persistent(b"}(" + text("_parameters") + weights + text("_init_kwargs") + plain(kept) + b"u", "SongUNet")
    return raw(network_around(module))[:-1] + text("loss_fn") + b"Ns."


def huge_picture() -> bytes:
    """Consistent weights of a network for pictures of 16,384 pixels a side."""
    side = 2**14
    arguments = kwargs_of("edm") | {"img_resolution": side, "attn_resolutions": [side // 2]}
    swap = {"8x8": f"{side}x{side}", "4x4": f"{side // 2}x{side // 2}"}
    state = {}
    for key, value in state_of(denoiser_of("edm")).items():
        for old, new in swap.items():
            key = key.replace(old, new)
        state[key] = value
    return edm_files.dumps(edm_files.snapshot(edm_files.network("EDMPrecond", arguments, state, SOURCE)))


def card_file(**changes: Any) -> Callable[[], bytes]:
    """A safetensors file of ours with a changed card."""

    def make() -> bytes:
        denoiser = denoiser_of("vp")
        card = artifact.describe(denoiser)
        card["arguments"] = card["arguments"] | changes.pop("arguments", {})
        text = json.dumps({"format": 1, "kind": "denoiser", "card": card | changes})
        return safetensors.torch.save(denoiser.state_dict(), {"limbeck": text})

    return make


NAMES = (
    "posix.system", "os.system", "nt.system", "builtins.exec", "builtins.eval", "builtins.__import__",
    "builtins.getattr", "builtins.compile", "__builtin__.eval", "subprocess.Popen", "subprocess.check_output",
    "importlib.import_module", "runpy._run_code", "pty.spawn", "shutil.rmtree", "webbrowser.open", "pickle.loads",
    "_pickle.loads", "torch.load", "torch.hub.load", "numpy.load", "functools.partial", "operator.attrgetter",
    "ctypes.CDLL", "socket.create_connection", "types.CodeType", "timeit.timeit", "code.InteractiveInterpreter",
    "torch._utils._import_dotted_name", "torch.storage.UntypedStorage", "collections.OrderedDict.__init__",
    "dnnlib.util.construct_class_by_name", "torch_utils.persistence.import_hook", "os:system.os:system",
)  # fmt: skip
HOSTILE: dict[str, Callable[[], bytes]] = {
    # holes of this very format
    "source that runs, in a small object": lambda: raw(persistent(b"}", "Evil")),
    "source that runs, as the whole network": lambda: raw(persistent(b"}", "EDMPrecond")),
    "system in a storage": lambda: raw(storage(b"cposix\nsystem\n(S'touch canary'\ntR.")),
    "system as the object of a storage": lambda: raw(
        storage(HEADER + b"\x80\x02" + call("posix.system", text(COMMAND)) + b".")
    ),
    "a storage in a storage": lambda: raw(storage(HEADER + b"\x80\x02" + storage(stream()) + b".")),
    "a tensor as a storage": lambda: raw(storage(HEADER + b"\x80\x02" + tensor(b"N", (1,), (1,)) + b".")),
    "class os:system": changed(lambda network: setattr(network, "class_name", "os:system")),
    "inner class os:system": changed(lambda network: setattr(model_of(network), "class_name", "os.system")),
    "class of EDM2": changed(lambda network: setattr(network, "class_name", "Precond")),
    "argument os:system": kwargs(embedding_type="os:system"),
    "argument hook": kwargs(hook="os:system"),
    "argument __class__": kwargs(__class__="os:system"),
    "persistent of another type": lambda: raw(call("torch_utils.persistence._reconstruct_persistent_obj", b"}")),
    "persistent of no dictionary": lambda: raw(call("torch_utils.persistence._reconstruct_persistent_obj", b"N")),
    # classic payloads
    **{path: (lambda path=path: raw(call(path, text(COMMAND)), 2)) for path in NAMES},
    "stack global": lambda: raw(text("posix") + text("system") + b"\x93" + text(COMMAND) + b"\x85R"),
    "inst": lambda: b"\x80\x02(" + text(COMMAND) + b"iposix\nsystem\n.",
    "obj": lambda: b"\x80\x02(" + name("dnnlib.util.EasyDict") + b"o.",
    "protocol 0": lambda: b"cposix\nsystem\n(S'touch canary'\ntR.",
    "protocol 1": lambda: b"\x80\x01" + call("posix.system", text(COMMAND)) + b".",
    "protocol 6": lambda: b"\x80\x06N.",
    "real pickle of a command": lambda: pickle.dumps(Command()),
    # tricks of the machine
    "extension": lambda: raw(b"\x82\x01"),
    "new object with keywords": lambda: raw(name("dnnlib.util.EasyDict") + b")}\x92"),
    "new object of a function": lambda: raw(name("_codecs.encode") + b")\x81"),
    "persistent id": lambda: raw(b"P0\n"),
    "binary persistent id": lambda: raw(text("0") + b"Q"),
    "persistent id of a storage": lambda: raw(
        b"(" + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu") + b"K\x04tQ"
    ),
    "build on a name": lambda: raw(name("_codecs.encode") + b"N}" + text("__defaults__") + text("x") + b"s\x86b"),
    "build on a class": lambda: raw(
        name("torch.nn.modules.container.ModuleDict") + b"}" + text("__setstate__") + text("x") + b"sb"
    ),
    "build twice": lambda: raw(name("torch.nn.modules.container.ModuleDict") + b")\x81}b}b"),
    "build on a number": lambda: raw(b"K\x01}b"),
    "call of text": lambda: raw(text("posix.system") + b")R"),
    "call of an instance": lambda: raw(name("torch.nn.modules.container.ModuleDict") + b")\x81)R"),
    "call with a list": lambda: raw(name("_codecs.encode") + b"]R"),
    "call with too much": lambda: raw(call("collections.OrderedDict", text("x"))),
    "other encoding": lambda: raw(call("_codecs.encode", text("x"), text("zip"))),
    "numpy objects": lambda: raw(call("numpy.dtype", text("O8"), b"\x89", b"\x88")),
    "numpy big-endian": lambda: raw(
        call("numpy.dtype", text("f8"), b"\x89", b"\x88") + b"(K\x03" + text(">") + b"NNNtb"
    ),
    "numpy scalar of no size": lambda: raw(
        call("numpy.core.multiarray.scalar", call("numpy.dtype", text("f8"), b"\x89", b"\x88"), b"C\x01x")
    ),
    "global of numbers": lambda: raw(b"K\x01K\x02\x93"),
    "global without end": lambda: raw(b"c" + b"x" * 1000),
    "unset memo": lambda: raw(b"h\x07"),
    "empty stack": lambda: b"\x80\x04\x85.",
    "pop below a mark": lambda: raw(b"K\x01(\x86t"),
    "no mark": lambda: raw(b"t"),
    "two values": lambda: b"\x80\x04NN.",
    "open mark": lambda: b"\x80\x04(N.",
    "dup": lambda: raw(b"N2"),
    "pop": lambda: raw(b"NN0"),
    "byte array": lambda: raw(b"\x96" + struct.pack("<Q", 4) + b"abcd"),
    "out of band buffer": lambda: raw(b"\x97"),
    "frozen set": lambda: raw(b"(N\x91"),
    "append to text": lambda: raw(text("x") + b"Na"),
    "items of a list": lambda: raw(b"](NNu"),
    "odd items": lambda: raw(b"}(" + text("x") + b"u"),
    "float key": lambda: raw(b"}G" + bytes(8) + b"Ns"),
    "add to a list": lambda: raw(b"](N\x90"),
    # bombs
    "hash bomb": lambda: raw(b")" + b"q\x00h\x00\x86" * 60 + b"q\x01}h\x01Ns"),
    "hash bomb in a set": lambda: raw(b"\x8f()" + b"q\x00h\x00\x86" * 60 + b"\x90"),
    "bytes of a terabyte": lambda: raw(b"\x8e" + struct.pack("<Q", 2**40)),
    "text of four gigabytes": lambda: raw(b"X\xff\xff\xff\xff"),
    "text of an exabyte": lambda: raw(b"\x8d" + struct.pack("<Q", 2**60)),
    "frame of a terabyte": lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
    "long of two gigabytes": lambda: raw(b"\x8b\xff\xff\xff\x7f"),
    "long of 255 bytes": lambda: raw(b"\x8a\xff" + b"\x01" * 255),
    "memo far away": lambda: raw(b"]r\xff\xff\xff\xff"),
    "billion lists": lambda: raw(b"](]q\x00" + b"](" + (b"h\x00" * 10 + b"eq\x00](") * 100 + b"ee"),
    "billion tuples": lambda: raw(b"]()q\x00(" + (b"h\x00" * 10 + b"tq\x00(") * 100 + b"te"),
    "billion dictionaries": lambda: raw(
        b"](}q\x00}(" + (text("a") + b"h\x00" + text("b") + b"h\x00uq\x00}(") * 1000 + b"ue"
    ),
    "billion arguments": lambda: raw(network_around(persistent(laughs(), "SongUNet"))),
    "deep tuples": lambda: raw(b")" + b"\x85" * 300_000),
    "deep lists": lambda: raw(b"]" * 150_000 + b"a" * 149_999),
    "deep modules": lambda: raw(
        (name("torch.nn.modules.container.ModuleDict") + b")\x81}" + text("_modules")) * 9000 + b"}" + b"sb" * 9000
    ),
    "a list in itself": lambda: raw(b"]q\x00h\x00a"),
    "a module in itself": lambda: edm_files.dumps(edm_files.snapshot(in_itself())),
    "shared modules": shared_modules,
    "nested arguments": kwargs(channel_mult=nested_kwargs()),
    "nested argument list": kwargs(channel_mult=[[1] * 64] * 64),
    "text encoded 50,000 times": lambda: raw(
        name("_codecs.encode") + b"q\x00" + text("x" * 2**20) + b"q\x01" + text("latin1")
        + b"q\x020" * 0 + b"\x86q\x03R" + b"](" + b"h\x00h\x03R" * 50_000 + b"e\x86"
    ),
    "one list made a set 50,000 times": lambda: raw(
        b"](" + b"".join(text(str(i)) for i in range(5000)) + b"eq\x00\x85q\x01]("
        + (name("builtins.set") + b"q\x02") + b"h\x02h\x01R" * 50_000 + b"e\x86"
    ),
    "wide text": lambda: raw(b"](" + (text("x" * 2**20 + "\U0001f600")) * 40 + b"e"),
    "a million instructions": lambda: raw(b"](" + b"N" * 2**20 + b"e"),
    "two million sets": lambda: raw(b"](" + b"\x8f" * 2**21 + b"e"),
    "colliding keys": lambda: raw(
        b"}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(50_000)) + b"u"
    ),
    "one storage, 3,000 tensors": one_storage_for_all,
    "stride of zero": lambda: raw(tensor(storage(stream()), (2**40,), (0,))),
    "stride of zero, small": lambda: raw(tensor(storage(stream()), (2, 2), (0, 1))),
    "tensor of 2^63 values": lambda: raw(tensor(storage(stream()), (2**21, 2**21, 2**21), (1, 1, 1))),
    "far more blocks": kwargs(num_blocks=10**6),
    "50,000 blocks": kwargs(num_blocks=50_000),
    "blocks beyond 64 bits": kwargs(num_blocks=10**30),
    "64 levels": kwargs(channel_mult=[1] * 64),
    "65 levels": kwargs(channel_mult=[1] * 65),
    "wide channels": kwargs(model_channels=2**20),
    "a million steps": lambda: edm_files.dumps(edm_files.snapshot(good("vp", attributes={"M": 10**9}))),
    # structure
    "empty": lambda: b"",
    "one byte": lambda: b"\x80",
    "gzip": lambda: gzip.compress(edm_files.dumps(edm_files.snapshot(good()))),
    "html": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "text": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "picture": lambda: b"\x89PNG\r\n\x1a\n" + bytes(100),
    "none": lambda: b"\x80\x04N.",
    "a list": lambda: pickle.dumps([1, 2]),
    "an empty dictionary": lambda: pickle.dumps({}),
    "other keys": lambda: pickle.dumps({"model": {}, "epoch": 3}),
    "ema a dictionary": lambda: pickle.dumps({"ema": {"a": 1}}),
    "ema a number": lambda: pickle.dumps({"ema": 3}),
    "ema a tensor": lambda: raw(tensor(storage(stream()), (4,), (1,))),
    "ema without attributes": lambda: raw(persistent(b"N")),
    "ema without a model": lambda: raw(persistent(b"}" + text("_modules") + b"}s")),
    "modules a list": lambda: raw(persistent(b"}" + text("_modules") + b"]s")),
    "trailing bytes": lambda: edm_files.dumps(edm_files.snapshot(good())) + b"N",
    "two pickles": lambda: edm_files.dumps(edm_files.snapshot(good())) * 2,
    "training state": training_state,
    "unknown state dictionary": lambda: edm_files.state_file({"a": torch.ones(2), "b": torch.ones(3)}),
    "OpenAI state dictionary": lambda: edm_files.state_file({"input_blocks.0.0.weight": torch.ones(2)}),
    # archives and streams
    "archive of something": lambda: zip_of({"word/document.xml": b"x"}),
    "archive of two": lambda: zip_of({"a/data.pkl": b"\x80\x02N.", "b/data.pkl": b"\x80\x02N."}),
    "archive that runs": lambda: zipped(
        lambda e: e.update({"archive/data.pkl": b"\x80\x02" + call("posix.system", text(COMMAND)) + b"."})
    ),
    "archive with a stream": lambda: zipped(
        lambda e: e.update({"archive/data.pkl": b"\x80\x02" + storage(b"cposix\nsystem\n.") + b"."})
    ),
    "archive of a program": lambda: zip_of({"a/data.pkl": b"\x80\x02N.", "a/constants.pkl": b"\x80\x02)."}),
    "archive compressed": lambda: zipped(lambda entries: None, zipfile.ZIP_DEFLATED),
    "archive bomb": lambda: zip_of({"a/data.pkl": b"\x80\x02N.", "a/data/0": bytes(2**26)}, zipfile.ZIP_DEFLATED),
    "archive of 12,000 entries": lambda: zip_of({"a/data.pkl": b"\x80\x02N."} | {f"{i}": b"" for i in range(12_000)}),
    "archive big-endian": lambda: zipped(lambda entries: entries.update({"archive/byteorder": b"big"})),
    "archive without a storage": lambda: zipped(lambda entries: entries.pop("archive/data/0")),
    "archive with a short storage": lambda: zipped(lambda entries: entries.update({"archive/data/0": b"1234"})),
    "archive with a strange key": lambda: zipped(
        lambda e: e.update({"archive/data.pkl": e["archive/data.pkl"].replace(b"\x01\0\0\x000", b"\x01\0\0\x00/", 1)})
    ),
    "archive with more behind": lambda: zipped(
        lambda e: e.update({"archive/data.pkl": e["archive/data.pkl"] + b"N."})
    ),
    "archive with a flipped bit": flipped,
    "archive cut short": lambda: edm_files.state_file(state_of(denoiser_of("edm")))[:-100],
    "stream with another magic": lambda: raw(storage(stream(header=pickle.dumps(3, 2)))),
    "stream big-endian": lambda: raw(
        storage(stream(header=pickle.dumps(pickles.MAGIC, 2) + pickle.dumps(1001, 2) + BIG_ENDIAN))
    ),
    "stream of other size": lambda: raw(storage(stream(body=struct.pack("<q", 5) + bytes(20)))),
    "stream cut short": lambda: raw(storage(stream()[:-1])),
    "stream with more behind": lambda: raw(storage(stream() + b"x")),
    "stream of another key": lambda: raw(storage(stream(key="1"))),
    "stream of keys like bombs": lambda: raw(
        storage(HEADER + b"\x80\x02N.\x80\x02](" + b")" + b"q\x00h\x00\x86" * 60 + b"e.")
    ),
    "stream claims two gigabytes": lambda: raw(storage(stream(2**29, struct.pack("<q", 2**29)))),
    "stream of nothing": lambda: raw(storage(HEADER + b"\x80\x02N.\x80\x02].")),
    # weights
    "tensor beyond its storage": lambda: raw(tensor(storage(stream()), (4,), (1,), 1)),
    "tensor of other rank": lambda: raw(tensor(storage(stream()), (2, 2), (1,))),
    "tensor of nine axes": lambda: raw(tensor(storage(stream()), (1,) * 9, (1,) * 9)),
    "tensor of negative size": lambda: raw(tensor(storage(stream()), (-4,), (1,))),
    "NaN": changed_state(lambda state: state["model.map_layer0.weight"].view(-1)[3].fill_(float("nan"))),
    "Inf": changed_state(lambda state: state["model.map_layer0.weight"].view(-1)[3].fill_(float("inf"))),
    "missing": changed_state(lambda state: state.pop("model.map_layer0.bias")),
    "four missing": changed_state(lambda state: [state.pop(k) for k in list(state)[5:9]]),
    "extra": changed_state(lambda state: state.update({"model.hook.weight": torch.zeros(2)})),
    "extra at the top": changed_state(lambda state: state.update({"u": torch.zeros(1001)})),
    "shape": changed_state(lambda state: state.update({"model.map_layer0.weight": torch.zeros(8, 9)})),
    "half": changed_state(lambda state: state.update({k: v.half() for k, v in state.items()})),
    "one double": changed_state(
        lambda state: state.update({"model.map_layer0.bias": state["model.map_layer0.bias"].double()})
    ),
    "integers": changed_state(lambda state: state.update({"model.enc.8x8_conv.bias": torch.zeros(8).long()})),
    "a strange name": changed_state(lambda state: state.update({"model.map_layer0.we\night": torch.zeros(1)})),
    "other resolution": attributes(img_resolution=16),
    "other channels": attributes(img_channels=3),
    "other labels": attributes(label_dim=10),
    "resolution text": attributes(img_resolution="8"),
    "sigma_data text": attributes(sigma_data="os:system"),
    "sigma_data negative": attributes(sigma_data=-1.0),
    "sigma_min NaN": attributes(sigma_min=float("nan")),
    "sigma_min above sigma_max": attributes(sigma_min=1.0, sigma_max=0.5),
    "positional arguments": changed(lambda network: model_of(network).state.update(_init_args=(8, 2, 2))),
    "no arguments": changed(lambda network: model_of(network).state.pop("_init_kwargs")),
    "a parameter that is text": changed(
        lambda network: model_of(network).state["_modules"]["map_layer0"].state["_parameters"].update(weight="x")
    ),
    # our own cards
    "card network os:system": card_file(network="os:system"),
    "card preconditioning os:system": card_file(preconditioning="os:system"),
    "card preconditioning list": card_file(preconditioning=["vp"]),
    "card steps": card_file(steps=10**9),
    "card steps text": card_file(steps="1000"),
    "card beta": card_file(beta_d=float("nan")),
    "card of 60,000 blocks": card_file(arguments={"num_blocks": 60_000}),
    "card with a strange tensor": lambda: safetensors.torch.save(
        denoiser_of("vp").state_dict() | {"a\nb" * 1000: torch.ones(1)},
        {"limbeck": json.dumps({"format": 1, "kind": "denoiser", "card": artifact.describe(denoiser_of("vp"))})},
    ),
    "card hook": card_file(arguments={"hook": "os:system"}),
    "card of a huge picture": card_file(shape=[2, 60_000, 60_000]),
    "card of 20,000 tensors": lambda: safetensors.torch.save({str(i): torch.ones(1) for i in range(20_000)}),
    "card without one": lambda: safetensors.torch.save({"a": torch.ones(1)}, {"limbeck": "{"}),
    "card of a newer format": lambda: safetensors.torch.save(
        {"a": torch.ones(1)}, {"limbeck": '{"format": 2, "kind": "denoiser"}'}
    ),
}  # fmt: skip


class Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (COMMAND,)


def in_itself() -> Persistent:
    network = good()
    table: dict[str, Any] = {}
    # a container of torch, because it is kept before its attributes are read
    loop = torch.nn.ModuleDict()
    loop._modules = table
    table["x"] = loop
    model_of(network).state["_modules"]["dec"] = loop
    return network


def zip_of(entries: Mapping[str, bytes], compress: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return out.getvalue()


@contextlib.contextmanager
def bounded(size: int) -> Iterator[None]:
    """No more new memory than twice `size` and 256 MiB, and no more than five seconds of the processor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    began = time.process_time()
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * size + 2**28, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - began < 5


def refused(path: Path, match: str | None = None) -> None:
    """Importing ends in one line that names the file, and runs, imports and writes nothing."""
    size = path.stat().st_size if path.is_file() else 0
    with pytest.raises(ValueError, match=match) as caught, bounded(size), WATCH:
        importer.load(path)
    line = str(caught.value)
    assert WATCH.seen == [] and not CANARY.exists()
    assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < 600


@pytest.fixture(autouse=True, scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Load a file of each kind once, so that imports which torch and Python postpone are over."""
    folder = tmp_path_factory.mktemp("warm")
    for form in NETWORKS:
        (folder / "net.pkl").write_bytes(edm_files.dumps(edm_files.snapshot(good(form))))
        importer.load(folder / "net.pkl")
    (folder / "net.pt").write_bytes(edm_files.state_file(state_of(denoiser_of("edm"))))
    importer.load(folder / "net.pt")
    artifact.save(folder / "own.safetensors", "denoiser", denoiser_of("edm"), {})
    importer.load(folder / "own.safetensors")
    (folder / "bad.pkl").write_bytes(b"\x80\x04X\x01\x00\x00\x00\xff.")
    with pytest.raises(ValueError):
        importer.load(folder / "bad.pkl")
    (folder / "bad.pt").write_bytes(zip_of({"x": b""}))
    with pytest.raises(ValueError):
        importer.load(folder / "bad.pt")


def test_the_payload_is_real() -> None:
    """Python's own unpickler runs what is refused here."""
    pickle.loads(HOSTILE["real pickle of a command"]())
    assert CANARY.exists()


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case: str) -> None:
    refused(write(HOSTILE[case](), "evil.pkl"))


def test_source_is_data() -> None:
    """A good file may carry any source: it is hashed, and the weights are what they are."""
    for source in ("", "\x00", "import os; os._exit(1)", "é" * 100_000, "\U0001f600" * 1000):
        network = edm_files.network("EDMPrecond", kwargs_of("edm"), state_of(denoiser_of("edm")), source)
        path = write({"ema": network, "loss_fn": None})
        with bounded(path.stat().st_size), WATCH:
            _, facts = importer.load(path)
        assert WATCH.seen == [] and not CANARY.exists()
        assert len(facts["source"]["code_sha256"]) == 1


def test_a_huge_picture_takes_no_memory() -> None:
    path = write(huge_picture())
    with bounded(path.stat().st_size), WATCH:
        denoiser, _ = importer.load(path)
    assert denoiser.shape == (2, 2**14, 2**14)


def test_truncated() -> None:
    for content in (edm_files.dumps(edm_files.snapshot(good())), edm_files.state_file(state_of(denoiser_of("edm")))):
        for share in range(40):
            refused(write(content[: len(content) * share // 40], "evil.pkl"))


def test_mutated() -> None:
    """Random damage gives one line or, within the weights of a pickle, other weights."""
    content = edm_files.dumps(edm_files.snapshot(good()))
    generator = torch.Generator().manual_seed(0)
    loaded = 0
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(1 + int(torch.randint(3, (), generator=generator))):
            place = int(torch.randint(len(content), (), generator=generator))
            damaged[place] = int(torch.randint(256, (), generator=generator))
        path = write(bytes(damaged), "evil.pkl")
        try:
            with bounded(len(content)), WATCH:
                importer.load(path)
            loaded += 1
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        assert WATCH.seen == [] and not CANARY.exists()
    assert loaded < 40


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo("fifo")
    os.symlink("/dev/zero", "zero")
    os.symlink("fifo", "link")
    for path in ("fifo", "zero", "link", "."):
        refused(Path(path), "not a regular file")
    refused(Path("nothing"), "cannot be read")
    with open("sparse", "wb") as file:  # a terabyte of nothing
        file.write(b"\x80\x04")
        file.truncate(2**40)
    with pytest.raises(ValueError), WATCH:
        importer.load(Path("sparse"))


def test_no_name_is_ever_imported() -> None:
    """Stand-ins for what files name exist, and still are not asked."""
    asked: list[str] = []

    class Module:
        def __getattr__(self, key: str) -> Any:
            asked.append(key)
            raise AttributeError(key)

    path = write(edm_files.snapshot(good(), SOURCE))
    for module in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
        sys.modules[module] = Module()
    try:
        importer.load(path)
    finally:
        for module in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
            del sys.modules[module]
    assert asked == []


def test_values_of_a_plain_pickle() -> None:
    """The machine agrees with Python's on what it accepts."""
    value = {
        "a": [1, -2, 300, 70_000, -(2**31), 2**70, True, False, None], "b": (1.5, ("x", "é", "\U0001f600")),
        "c": {"d": {}, "e": set(), "f": {"x", "y"}, 3: "z"}, "g": collections.OrderedDict(h=[]), "i": (), "j": (1,) * 9,
    }  # fmt: skip
    value["k"] = value["a"]
    for protocol in (2, 3, 4, 5):
        assert pickles.read(write(pickle.dumps(value, protocol))).value == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_a_state_dictionary(dtype: torch.dtype, zipped: bool) -> None:
    base = torch.arange(24).reshape(2, 3, 4).to(dtype)
    state = {
        "whole": base, "part": base[1], "turned": base.permute(2, 0, 1), "scalar": base[0, 0, 1], "none": base[:0],
        "last": torch.ones(2, 3, 2, 2).to(dtype).to(memory_format=torch.channels_last),
    }  # fmt: skip
    views = pickles.read(write(edm_files.state_file(state, zipped))).value
    for key, expected in state.items():
        assert torch.equal(views[key].tensor(), expected) and views[key].tensor().is_contiguous()
