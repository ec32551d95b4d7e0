"""The command line: bad input ends in one line and exit code 2 with nothing written; good input does what it says."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import limbeck
from limbeck import artifact, checkpoint, cli, config, methods, networks
from limbeck.denoiser import Preconditioned
from limbeck.generator import OneStep
from limbeck.methods import METHODS
from limbeck.train import Trainer

FAST = "--steps 2 --batch 4 --template.network mlp --template.width 8 --template.depth 1 --evaluate.samples 50"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files, most of them bad."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    texts = {
        "syntax.toml": "steps = = 3", "unknown.toml": 'teacher = "exact:ring8"\nstpes = 3',
        "number.toml": "teacher = 3",
        "program.toml": 'teacher = "digits"\n[evaluate]\nfeatures = "x.pt"\ndata = "digits"',
        "foreign.toml": 'teacher = "exact:ring8"\n[method]\nname = "antigravity:fly"',
        "foreign-text.toml": 'teacher = "exact:ring8"\nmethod = "antigravity:fly"',
        "list.toml": 'teacher = "exact:ring8"\nmethod = ["pid"]', "teaching.toml": 'data = "digits"\nsteps = 1',
        "good.toml": 'teacher = "exact:ring8"\n[method]\nname = "pid"\nN = 20', "text.txt": "hello\n",
        "deep.toml": "steps = " + 5000 * "[",
        "no-means.toml": "weights = [1.0]\nstds = 0.1",
        "more.toml": "weights = [1]\nmeans = [[0, 0]]\nstds = 1\ncolour = 3",
        "stds.toml": "weights = [1, 1]\nmeans = [[0, 0], [1, 1]]\nstds = [0.1]",
        "weights.toml": "weights = [1, -1]\nmeans = [[0, 0], [1, 1]]\nstds = 0.1",
        "ragged.toml": "weights = [1, 1]\nmeans = [[0, 0], [1]]\nstds = 0.1",
        "nan.toml": "weights = [1]\nmeans = [[nan, 0]]\nstds = 0.1",
        "zero.toml": "weights = [1]\nmeans = [[0, 0]]\nstds = 0",
        "words.toml": 'weights = ["a"]\nmeans = [[0, 0]]\nstds = 1',
        "huge.toml": f"weights = [1{'0' * 400}]\nmeans = [[0, 0]]\nstds = 1",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    points = rng.normal(size=(30, 2))
    arrays: dict[str, dict[str, Any]] = {
        "points.npz": {"x": points}, "nox.npz": {"z": points}, "nan.npz": {"x": np.full((4, 2), np.nan)},
        "int.npz": {"x": np.ones((4, 2), int)}, "flat.npz": {"x": np.zeros((4, 8, 8), np.uint8)},
        "labels.npz": {"x": points, "y": np.zeros(3, int)}, "negative.npz": {"x": points, "y": -np.ones(30, int)},
        "empty.npz": {"x": np.zeros((0, 2))}, "scalar.npz": {"x": np.zeros(())}, "zero.npz": {"x": np.zeros((4, 2))},
        "objects.npz": {"x": np.array([object()] * 3)},
        "large.npz": {"x": np.full((3, 2), 1e300)},
        "tiny-images.npz": {"x": rng.integers(0, 255, (20, 4, 4, 1)).astype(np.uint8)},
    }  # fmt: skip
    for name, content in arrays.items():
        np.savez(folder / name, **content)
    whole = (folder / "points.npz").read_bytes()
    (folder / "corrupt.npz").write_bytes(b"PK\x03\x04 nonsense")
    (folder / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.npz").write_bytes(bytes(b ^ (i == len(whole) // 2) for i, b in enumerate(whole)))
    np.savez_compressed(folder / "deflated.npz", x=rng.normal(size=(300, 2)))
    packed = bytearray((folder / "deflated.npz").read_bytes())
    packed[60:90] = bytes(30)
    (folder / "deflated.npz").write_bytes(packed)
    (folder / "folder.npz").mkdir()
    network = networks.build("mlp", {"shape": [2], "width": 8, "depth": 1})
    low = Preconditioned(network, (2,), 0, 0.5, 0.002, 10.0)
    artifact.save(folder / "low.safetensors", "denoiser", low, {})
    artifact.save(
        folder / "student.safetensors", "generator", OneStep(low, 5.0), {"recipe": {"teacher": "exact:ring8"}}
    )
    safetensors.torch.save_file({"a": torch.zeros(2)}, folder / "plain.safetensors")
    (folder / "half.safetensors").write_bytes((folder / "low.safetensors").read_bytes()[:-9])
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`place` as working directory; what a test leaves in it goes."""
    monkeypatch.chdir(place)
    before = listing(place)
    yield place
    for path in place.iterdir():
        if path.name not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def listing(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def run(line: str) -> int:
    return cli.main(shlex.split(line))


BAD: list[tuple[str, str]] = [
    # words and verbs
    ("frobnicate", "frobnicate: unknown command"),
    ("Distill exact:ring8 --out o", "Distill: unknown command"),
    ("--out o distill exact:ring8", "--out: unknown command"),
    ("distill", "SOURCE: expected one"),
    ("distill exact:ring8 exact:mog40 --out o", "SOURCE: expected one"),
    ("distill exact:ring8", "out: is missing"),
    ("teach digits", "out: is missing"),
    ("distill exact:ring8 --out", "--out: needs a value"),
    ("distill exact:ring8 --out --steps 3", "--out: needs a value"),
    ("distill exact:ring8 --out o --out p", "--out: is given twice"),
    ("distill exact:ring8 --out o -- 3", "--: is not a key"),
    ("distill exact:ring8 --out o --.a 3", "--.a: is not a key"),
    ("distill exact:ring8 --out o --json=yes", "--json: takes no value"),
    ("methods sid", "sid: "),
    ("methods --colour 3", "colour: unknown key"),
    ("show", "RUN: expected one"),
    # keys and values
    ("distill exact:ring8 --out o --stpes 3", "stpes: unknown key, perhaps you meant steps"),
    ("distill exact:ring8 --out o --method.metrc l1", "method.metrc: unknown key, perhaps you meant method.metric"),
    ("distill exact:ring8 --out o --optimizer.generator.rl 1", "optimizer.generator.rl: unknown key, perhaps"),
    ("distill exact:ring8 --out o --optimizer.fake.lr 1", "optimizer.fake: unknown player"),
    ("distill exact:ring8 --out o --evry.save 1", "evry: unknown key, perhaps you meant every"),
    ("distill exact:ring8 --out o --every.save 1 --every.save.x 1", "every.save.x: every.save is a single value"),
    ("distill exact:ring8 --out o --steps many", "steps: "),
    ("distill exact:ring8 --out o --steps 0", "steps: must be at least 1"),
    ("distill exact:ring8 --out o --steps 1.5", "steps: "),
    ("distill exact:ring8 --out o --steps=", "steps: "),
    ("distill exact:ring8 --out o --batch -3", "batch: must be at least 1"),
    ("distill exact:ring8 --out o --seed 99999999999999999999", "seed: must be at most"),
    ("distill exact:ring8 --out o --threads 999999999999", "threads: must be at most"),
    ("distill exact:ring8 --out o --clip nan", "clip: "),
    ("distill exact:ring8 --out o --device toaster", "device: 'toaster' cannot be used here"),
    ("distill exact:ring8 --out o --device cuda:77", "device: 'cuda:77' cannot be used here"),
    ("teach digits --out o --device meta", "device: 'meta' cannot be used here"),
    ("sample digits --out o.npz --device cpu:x", "device: 'cpu:x' cannot be used here"),
    ("evaluate digits --device=", "device: '' cannot be used here"),
    ("bench exact:ring8 --device meta", "device: 'meta' cannot be used here"),
    ("distill exact:ring8 --out o --optimizer.generator.lr inf", "optimizer.generator.lr: "),
    ("distill exact:ring8 --out o --optimizer.generator.betas [1,2", "optimizer.generator.betas: "),
    ("distill exact:ring8 --out o --every.save -1", "every.save: must not be negative"),
    ("distill exact:ring8 --out o --method nowhere", "method.name: unknown method 'nowhere'"),
    ("distill exact:ring8 --out o --method denoising", "method.name: unknown method 'denoising'"),
    ("distill exact:ring8 --out o --method os:system", "method.name: 'os:system' is not an objective"),
    ("distill exact:ring8 --out o --method nowhere:Mine", "method.name: cannot find 'nowhere:Mine'"),
    ("distill exact:ring8 --out o --method .:x", "method.name: cannot find '.:x'"),
    ("distill exact:ring8 --out o --method [3]", "method.name: "),
    ("distill exact:ring8 --out o --method.N 1", "method.N: "),
    ("distill exact:ring8 --out o --method.metric l3", "method.metric: "),
    ("distill exact:ring8 --out o --method.metric features", "method.features: "),
    ("distill exact:ring8 --out o --method.levels.sigma_min 90", "method.levels.sigma_min: "),
    ("distill exact:ring8 --out o --data digits", "data: belongs to"),
    ("teach digits --out o --teacher digits", "teacher: belongs to"),
    ("teach digits --out o --method pid", "method.name: unknown method 'pid'"),
    ("teach digits --out o --method.label_dropout 1", "method.label_dropout: "),
    ("teach points.npz --out o --method classification", "classifier: needs "),
    # networks
    ("distill exact:ring8 --out o --template.network nowhere", "template.network: unknown name 'nowhere'"),
    ("distill exact:ring8 --out o --template.network os:system", "template.network: unknown name 'os:system'"),
    ("distill exact:ring8 --out o --template.network dit", "template.network: dit needs images"),
    ("distill exact:ring8 --out o --template.network songunet", "template.network: songunet needs square images"),
    ("distill exact:ring8 --out o --template.width 0", "template.width: must be at least 1"),
    ("distill exact:ring8 --out o --template.width wide", "template: mlp cannot be built"),
    ("distill exact:ring8 --out o --template.colour 3", "template.colour: mlp has no such argument"),
    ("distill exact:ring8 --out o --generator.network perceptron --generator.width 0", "generator.width: must be at"),
    ("distill exact:ring8 --out o --template mlp", "template: "),
    ("distill digits --out o --template.network dit --template.patch 3", "template.patch: must divide"),
    # teachers
    ("distill nowhere --out o", "teacher: no file or bundled teacher 'nowhere'"),
    ("distill exact:nowhere --out o", "teacher: no exact law 'nowhere'"),
    ("distill exact:text.txt --out o", "text.txt: an exact law is"),
    ("distill text.txt --out o", "text.txt: not a readable safetensors file"),
    ("distill plain.safetensors --out o", "plain.safetensors: a safetensors file without Limbeck's card"),
    ("distill half.safetensors --out o", "half.safetensors: not a readable safetensors file"),
    ("distill student.safetensors --out o", "student.safetensors: holds a generator, expected a denoiser"),
    ("distill low.safetensors --out o --method.levels.sigma_max 70", "method.levels.sigma_max: 70 is level 70 of this"),
    ("distill exact:no-means.toml --out o", "no-means.toml: means is missing"),
    ("distill exact:more.toml --out o", "more.toml: colour is not a key"),
    ("distill exact:stds.toml --out o", "stds.toml: weights: 2 means need 2 weights and 2 stds"),
    ("distill exact:weights.toml --out o", "weights.toml: weights: must be positive"),
    ("distill exact:ragged.toml --out o", "ragged.toml: "),
    ("distill exact:nan.toml --out o", "nan.toml: means: contains NaN"),
    ("distill exact:zero.toml --out o", "zero.toml: stds: must be positive"),
    ("distill exact:words.toml --out o", "words.toml: "),
    ("distill exact:syntax.toml --out o", "syntax.toml: not valid TOML"),
    ("distill exact:nox.npz --out o", "nox.npz: has no array x"),
    ("distill exact:nan.npz --out o", "nan.npz: x contains NaN"),
    # recipe files
    ("distill nowhere.toml --out o", "nowhere.toml: not a readable TOML file"),
    ("distill syntax.toml --out o", "syntax.toml: not a readable TOML file"),
    ("distill unknown.toml --out o", "stpes: unknown key"),
    ("distill number.toml --out o", "teacher: "),
    ("distill foreign.toml --out o", "method.name: 'antigravity:fly' names code"),
    ("distill foreign-text.toml --out o", "method.name: 'antigravity:fly' names code"),
    ("distill list.toml --out o", "method.name: "),
    ("distill teaching.toml --out o", "data: belongs to `limbeck teach`"),
    ("teach good.toml --out o", "method.name: unknown method 'pid'"),
    # data
    ("teach nowhere.npz --out o", "data: no file or folder 'nowhere.npz'"),
    ("teach nox.npz --out o", "nox.npz: has no array x"),
    ("teach nan.npz --out o", "nan.npz: x contains NaN"),
    ("teach int.npz --out o", "int.npz: x must be uint8 or floating point"),
    ("teach flat.npz --out o", "flat.npz: uint8 images x must have shape (n, H, W, C)"),
    ("teach labels.npz --out o", "labels.npz: y must be 30 class numbers"),
    ("teach negative.npz --out o", "negative.npz: y must be 30 class numbers"),
    ("teach empty.npz --out o", "empty.npz: x must have shape"),
    ("teach scalar.npz --out o", "scalar.npz: x must have shape"),
    ("teach zero.npz --out o", "zero.npz: all values are 0; sigma_data"),
    ("distill exact:zero.npz --out o", "zero.npz: sigma_data: must be positive"),
    ("teach digits --out o --size 8", "size: resizes folders of pictures only, not digits"),
    ("teach digits --out o --real.data nope", "real: belongs to"),
    ("distill digits --out o --real.data nope", "real.data: nothing reads it"),
    ("distill exact:ring8 --out o --method dmd2 --real.data nope", "real.data: nothing reads it"),
    ("distill digits --out o --size 8", "size: resizes folders of pictures only"),
    ("distill digits --out o --method.levels.sigma_max 500", "method.levels.sigma_max: 500 is level 846.6"),
    ("distill digits --out o --method.levels.sigma_min 0.0001", "method.levels.sigma_min: 0.0001 is level"),
    ("distill digits --out o --method.metric features --method.features x.pt", "method.features: a TorchScript file"),
    ("distill program.toml --out o", "evaluate.features: program.toml names x.pt, a program"),
    ("teach program.toml --out o", "evaluate.features: program.toml names x.pt, a program"),
    ("distill exact:ring8 --out=", "out: is empty"),
    ("teach digits --out=", "out: is empty"),
    ("compare good.toml --out=", "out: is empty"),
    ("sample exact:ring8 --out folder.npz", "out: folder.npz is a folder"),
    ("sample exact:ring8 --out text.txt/o.png", "out: text.txt is a file"),
    ("sample student.safetensors --out o.png --steps 4", "steps: belongs to teachers; student.safetensors"),
    ("evaluate exact:ring8 --out text.txt", "out: text.txt is a file"),
    ("distill exact:ring8 --out o --evaluate.reference points.npz", "evaluate.reference: an exact law is its own"),
    ("distill exact:ring8 --out o --evaluate.features [3]", "evaluate.features: must be a name"),
    ("teach objects.npz --out o", "objects.npz: not a readable .npz file"),
    ("teach corrupt.npz --out o", "corrupt.npz: not a readable .npz file"),
    ("teach truncated.npz --out o", "truncated.npz: not a readable .npz file"),
    ("teach flipped.npz --out o", "flipped.npz: not a readable .npz file"),
    ("teach text.txt --out o", "text.txt: not a readable .npz file"),
    ("teach . --out o", ".: holds no pictures"),
    # folders
    ("distill exact:ring8 --out text.txt", "out: text.txt is a file"),
    ("distill exact:ring8 --out .", "out: . holds other files"),
    # scores
    ("distill digits --out o --evaluate.samples 1", "evaluate.samples: must be at least 2"),
    ("distill digits --out o --evaluate.data points.npz", "evaluate.features: a reference needs a feature network"),
    ("distill digits --out o --evaluate.features digits", "evaluate.features: needs evaluate.data"),
    ("distill digits --out o --evaluate.data points.npz --evaluate.features digits",
     "digits: its samples have shape (1, 8, 8), those of points.npz (2,)"),
    ("distill digits --out o --evaluate.data tiny-images.npz --evaluate.features digits",
     "digits: its samples have shape (1, 8, 8), those of tiny-images.npz (1, 4, 4)"),
    ("distill low.safetensors --out o --method.levels.sigma_max 9 --evaluate.data digits --evaluate.features digits",
     "low.safetensors: its samples have shape (2,), those of digits (1, 8, 8)"),
    ("evaluate", "FILE: expected at least one"),
    ("evaluate nowhere", "teacher: no file or bundled teacher 'nowhere'"),
    ("evaluate low.safetensors", "reference: there is none for 'low.safetensors'"),
    ("evaluate digits --against exact:ring8", "digits: its samples have shape (1, 8, 8), those of the law exact:ring8"),
    ("evaluate exact:ring8 --against nowhere", "reference: there is none for 'nowhere'"),
    ("evaluate exact:ring8 --samples 1", "samples: must be at least 2"),
    ("evaluate exact:ring8 --sample 9", "sample: unknown key, perhaps you meant samples"),
    ("reference digits --features digits", "out: is missing"),
    ("reference digits --out r.npz", "features: is missing"),
    ("reference digits --features digits --out r.txt", "out: must end in .npz"),
    ("reference digits --features nowhere --out r.npz", "classifier: no file 'nowhere'"),
    ("reference points.npz --features digits --out r.npz", "points.npz: its samples of shape (2,) do not suit"),
    # samples
    ("sample", "FILE: expected one"),
    ("sample exact:ring8", "out: is missing"),
    ("sample exact:ring8 --out o.gif", "out: must end in .png or .npz"),
    ("sample exact:ring8 --out o.png --class 3", "class: exact:ring8 is unconditional"),
    ("sample student.safetensors --out o.png --class 0", "class: student.safetensors is unconditional"),
    ("sample digits --out o.png --class 10", "class: digits has classes 0 to 9, got 10"),
    ("sample digits --out o.png --class -1", "class: digits has classes 0 to 9, got -1"),
    ("sample digits --out o.png --class three", "class: "),
    ("sample exact:ring8 --out o.png --count 0", "count: must be at least 1"),
    ("sample exact:ring8 --out o.png --steps 1", "steps: must be at least 2"),
    ("sample exact:ring8 --out o.png --seed -1", "seed: must be at least 0"),
    ("sample exact:ring8 --out o.png --colour 3", "colour: unknown key"),
    ("sample text.txt --out o.png", "text.txt: not a readable safetensors file"),
    ("sample . --out o.png", ".: has no finished model"),
    ("sample nowhere --out o/o.png", "teacher: no file or bundled teacher 'nowhere'"),
    ("doctor exact:ring8 --out text.txt", "out: text.txt is a file"),
    ("import student.safetensors --out text.txt/o", "out: text.txt is a file"),
    ("export student.safetensors --to onnx --out text.txt/o.onnx", "out: text.txt is a file"),
    # folders that are no runs
    ("show nowhere", "nowhere: neither a run folder"),
    ("show .", ".: neither a run folder"),
    ("show text.txt", "text.txt: not a readable safetensors file"),
    ("show . --colour 3", "colour: unknown key"),
    ("compare nowhere.toml --out o", "nowhere.toml: not a readable TOML file"),
    ("compare good.toml", "out: is missing"),
    ("distill deep.toml --out o", "deep.toml: not a readable TOML file"),
    ("distill exact:deep.toml --out o", "deep.toml: not valid TOML"),
    (f"distill exact:ring8 --out o --steps {'[' * 3000}", "steps: "),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), BAD, ids=[line for line, _ in BAD])
def test_bad_input(here: Path, capsys: pytest.CaptureFixture[str], line: str, says: str) -> None:
    """Exit code 2, one line that begins with what is wrong, and nothing is written, nor imported."""
    before = listing(here)
    assert run(line) == 2
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.splitlines()
    assert len(lines) == 1, told.err
    assert lines[0].startswith("limbeck: ") and says in lines[0], lines[0]
    assert lines[0].index(says) <= len("limbeck: teacher: ")
    assert listing(here) == before
    assert "antigravity" not in sys.modules


# inputs that pass the first look and fail later, before anything is written
LATE = [
    ("distill exact:ring8 --out o --template.network [1]", "template.network: "),
    ("distill exact:ring8 --out o --template.dropout nan", "template.dropout: "),
    ("distill exact:ring8 --out o --template.dropout 2", "template.dropout: "),
    ("distill exact:huge.toml --out o", "huge.toml: "),
    ("teach large.npz --out o", "large.npz: x contains"),
    ("teach deflated.npz --out o", "deflated.npz: not a readable"),
    ("distill exact:ring8 --out o --evaluate.data nowhere", "evaluate.data: "),
    ("distill exact:ring8 --out text.txt/o", "out: "),
    ("distill exact:ring8 --out o --method.metric features --method.features digits", "features: "),
]


@pytest.mark.parametrize(("line", "says"), LATE)
def test_late_mistakes(here: Path, capsys: pytest.CaptureFixture[str], line: str, says: str) -> None:
    settings = FAST if line.startswith("distill") and "--template" not in line else "--steps 2 --batch 4"
    before = listing(here)
    assert run(f"{line} {settings}") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("limbeck: ") and says in lines[0]
    assert listing(here) == before


# Parsing


@given(st.lists(st.text(alphabet="-=.[]{}ab1 \n\x00é", max_size=6), max_size=6))
def test_parse_gives_keys_or_one_line(arguments: list[str]) -> None:
    try:
        words, keys = cli.parse(arguments)
    except cli.Mistake as error:
        assert str(error).startswith("--")
        return
    assert all(not word.startswith("--") for word in words)
    assert all(key and "=" not in key for key in keys)


def test_parse() -> None:
    words, keys = cli.parse(
        ["a", "--x", "1", "--y=2=3", "--json", "--a-b.c", "[1, 2.5]", "b", "--z", "-5", "--t={k=1}", "--w", "[1,"]
    )
    assert words == ["a", "b"]
    assert keys == {
        "x": "1", "y": "2=3", "json": "true", "a_b.c": [1, 2.5], "z": "-5", "t": {"k": 1}, "w": "[1,",
    }  # fmt: skip


# Help


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 0
    told = capsys.readouterr()
    assert told.err == "" and all(f"limbeck {verb}" in told.out for verb in cli.VERBS)


def test_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "limbeck distill" in capsys.readouterr().out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    keys = {
        "distill": ["steps", "method.N", "method.levels.sigma_min", "optimizer.generator.lr", "evaluate.samples"],
        "teach": ["steps", "method.label_dropout", "ema.half_life"],
        "sample": ["count", "seed", "out", "class", "network"],
        "evaluate": ["samples", "teacher_steps", "against", "out", "size", "teacher", "features", "json"],
        "compare": ["features", "json"],
        "import": ["as", "out"],
        "reference": ["features", "out"],
    }
    for flag in ("--help", "-h"):
        assert cli.main([verb, flag]) == 0
        told = capsys.readouterr()
        assert told.out.startswith(f"limbeck {verb}") and told.err == ""
        for key in keys.get(verb, []):
            assert re.search(f"--{key}\\b", told.out), key
        assert "--label" not in told.out and "--role" not in told.out


def test_help_on_a_method_of_the_callers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("distill --help --method limbeck.methods.sid:SiD") == 0
    assert "--method.loss_scale" in capsys.readouterr().out
    assert run("teach --help --method limbeck.methods.sid:SiD") == 2


@pytest.mark.parametrize(("verb", "method"), [("distill", "sid"), ("distill", "vardiu"), ("teach", "gan")])
def test_what_help_prints_can_be_typed(
    verb: str, method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key with its default, as help has them, together are the defaults."""
    monkeypatch.setenv("COLUMNS", "110")  # one column
    assert run(f"{verb} --help --method {method}") == 0
    told = " ".join(re.sub("[│╭╮╰╯─]", "", capsys.readouterr().out).split())
    printed = re.findall(r"--([\w.]+) (\S+) (?:(?!--).)*?\(default: (.*?)\) (?=--|\w+(?:\.\w+)* options|$)", told + " ")
    typed = [f"--{key}={default.strip(chr(39))}" for key, _, default in printed if default != "None"]
    assert len(typed) > 40 and "--compile=False" in typed and "--optimizer.generator.betas=(" in " ".join(typed)
    words, keys = cli.parse(typed)
    table: dict[str, Any] = {"method": {"name": method}}
    for key, value in keys.items():
        config.set_dotted(table, key, value)
    known = methods.METHODS if verb == "distill" else config.TEACHING
    assert not words and config.resolve(table, known) == config.resolve({"method": method}, known)


def test_help_shows_the_fields_of_the_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("teach --help --method classification") == 0
    assert "--method.smoothing" in capsys.readouterr().out
    assert run("distill --help --method nowhere") == 2
    assert "method.name: unknown method 'nowhere'" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == limbeck.__version__


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all("arXiv:" in line for line in lines)


# Distilling


@pytest.fixture
def distilled(tmp_path: Path, tiny_keys: list[str], capsys: pytest.CaptureFixture[str]) -> Path:
    """A finished run of ring8."""
    assert cli.main(["distill", "exact:ring8", "--out", str(tmp_path / "run"), *tiny_keys]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_distill_is_the_python_call(
    tmp_path: Path, distilled: Path, tiny: dict[str, Any], weights: Any, equal: Any
) -> None:
    limbeck.distill("exact:ring8", out=tmp_path / "python", tell=lambda line: None, **tiny)
    assert equal(weights(distilled), weights(tmp_path / "python"))
    assert (distilled / "recipe.toml").read_text() == (tmp_path / "python" / "recipe.toml").read_text()


def test_distill_tells_on_stderr_and_json_on_stdout(
    tmp_path: Path, tiny_keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["distill", "exact:ring8", "--out", str(tmp_path / "run"), *tiny_keys]
    assert cli.main(command) == 0
    told = capsys.readouterr()
    assert told.out == "" and "6 steps in" in told.err and "log_density" in told.err
    assert cli.main([*command, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == json.loads((tmp_path / "run" / "report.json").read_text())
    assert told.err.strip().startswith(f"{tmp_path / 'run'}: finished at step 6") and told.err.strip().count("\n") == 0


def test_recipe_files_and_keys(tmp_path: Path, tiny_keys: list[str]) -> None:
    """Keys win over the file; --method replaces the file's method as a whole."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'teacher = "exact:gaussian"\nbatch = 5\nsteps = 9\n[method]\nname = "pid"\nN = 20\nmetric = "l1"\n'
    )
    assert cli.main(["distill", str(recipe), "--out", str(tmp_path / "a"), *tiny_keys, "--method.N", "30"]) == 0
    told = json.loads((tmp_path / "a" / "report.json").read_text())
    assert (told["teacher"], told["steps"], told["recipe"]["batch"]) == ("exact:gaussian", 6, 8)
    assert (told["method"]["N"], told["method"]["metric"]) == (30, "l1")
    assert cli.main(["distill", str(recipe), "--out", str(tmp_path / "b"), *tiny_keys, "--method", "pid"]) == 0
    told = json.loads((tmp_path / "b" / "report.json").read_text())
    assert (told["method"]["N"], told["method"]["metric"]) == (250, "l2")


def test_the_recipe_of_a_run_repeats_it(tmp_path: Path, distilled: Path, weights: Any, equal: Any) -> None:
    assert cli.main(["distill", str(distilled / "recipe.toml"), "--out", str(tmp_path / "again")]) == 0
    assert equal(weights(distilled), weights(tmp_path / "again"))


def test_a_foreign_method(tmp_path: Path, tiny_keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The caller may name a class of its own on the command line; the run's recipe may not bring it back by itself."""
    out = ["--out", str(tmp_path / "run")]
    assert cli.main(["distill", "exact:ring8", "--method", "limbeck.methods.pid:PID", *out, *tiny_keys]) == 0
    file = tmp_path / "mine.toml"
    file.write_text('teacher = "exact:ring8"\nmethod = {name = "limbeck.methods.pid:PID"}\n')
    capsys.readouterr()
    assert cli.main(["distill", str(file), "--out", str(tmp_path / "other"), *tiny_keys]) == 2
    assert "names code" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_teach(tmp_path: Path, place: Path, tiny_keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    data, out = str(place / "points.npz"), tmp_path / "teacher"
    assert cli.main(["teach", data, "--out", str(out), *tiny_keys, "--method.label_dropout", "0.2"]) == 0
    assert json.loads((out / "report.json").read_text())["method"]["label_dropout"] == 0.2
    assert cli.main(["sample", str(out), "--count", "3", "--steps", "2", "--out", str(tmp_path / "s.npz")]) == 0
    assert np.load(tmp_path / "s.npz")["x"].shape == (3, 2)
    capsys.readouterr()
    assert cli.main(["sample", str(place / "points.npz"), "--out", str(tmp_path / "t.npz")]) == 2


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped(
    tmp_path: Path, tiny_keys: list[str], capsys: pytest.CaptureFixture[str], signum: int, code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real = Trainer.advance

    def advance(self: Trainer, source: Any) -> Any:
        if self.step == 2:
            os.kill(os.getpid(), signum)
        return real(self, source)

    monkeypatch.setattr(Trainer, "advance", advance)
    assert cli.main(["distill", "exact:ring8", "--out", str(tmp_path / "run"), *tiny_keys]) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.strip() == "limbeck: stopped at step 3, saved; the same command continues"


def test_interrupted_elsewhere(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("limbeck.teachers.load", interrupt)
    assert run("sample exact:ring8 --out never.png") == 130
    assert capsys.readouterr().err.startswith("limbeck: stopped")


def test_failures_are_one_line(
    tmp_path: Path, tiny_keys: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, a loss that is not finite, too little memory: exit code 1."""
    command = ["distill", "exact:ring8", "--out", str(tmp_path / "run"), *tiny_keys]
    with monkeypatch.context() as patch:
        patch.setattr("limbeck.methods.pid.pid_prediction", lambda f_t, *rest: f_t * float("nan"))
        assert cli.main(command) == 1
    assert (
        capsys.readouterr().err.strip().startswith("limbeck: the turn of generator at step 0 (seed 0) gave a loss of")
    )
    assert run(f"sample exact:ring8 --count {10**14} --out {tmp_path / 's.npz'}") == 1
    assert capsys.readouterr().err.startswith("limbeck: out of memory")

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    assert cli.main([*command[:3], str(tmp_path / "full"), *tiny_keys]) == 1
    assert capsys.readouterr().err.strip() == "limbeck: [Errno 28] No space left on device"


def test_defects_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of Limbeck's own keeps its traceback."""

    def defect(*args: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("limbeck.teachers.load", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        run("sample exact:ring8 --out never.png")


# Looking at what there is


def test_show(distilled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(distilled)]) == 0
    told = capsys.readouterr().out
    for text in ("finished, step 6 of 6", "teacher: exact:ring8", "method: name pid", "ckpt-000000006", "log_density"):
        assert text in told
    assert cli.main(["show", str(distilled), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["finished"], facts["step"], facts["steps"]) == (True, 6, 6)
    assert facts["report"]["student"]["nfe"] == 1 and facts["recipe"]["teacher"] == "exact:ring8"


def test_show_a_file(distilled: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(distilled / "generator.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "a generator, made by Limbeck" in told and "teacher: exact:ring8" in told and "images: 48" in told
    assert cli.main(["show", str(place / "low.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["card"]["sigma_max"] == 10.0


def test_show_an_unfinished_run(distilled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (distilled / "report.json").unlink()
    shutil.rmtree(distilled / "checkpoints" / "ckpt-000000006")
    log = (distilled / "log.jsonl").read_text().splitlines()
    (distilled / "log.jsonl").write_text("\n".join(log[:4]) + '\n{"step": 5, "ima')
    assert cli.main(["show", str(distilled)]) == 0
    told = capsys.readouterr().out
    assert "unfinished, step 5 of 6" in told and "last log row: step 4" in told
    (distilled / "log.jsonl").unlink()
    shutil.rmtree(distilled / "checkpoints")
    assert cli.main(["show", str(distilled)]) == 0
    assert "unfinished, step 0 of 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"),
    [("report.json", "{"), ("report.json", "[]"), ("report.json", "{}"), ("recipe.toml", "x = ["), ("recipe.toml", "")],
)
def test_show_a_damaged_run(distilled: Path, capsys: pytest.CaptureFixture[str], name: str, content: str) -> None:
    (distilled / name).write_text(content)
    assert cli.main(["show", str(distilled)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"limbeck: {distilled / name}: ") and told.count("\n") == 1


# Samples


def samples(source: str, tmp_path: Path, *arguments: str) -> dict[str, np.ndarray]:
    out = tmp_path / "deep" / "samples.npz"
    assert cli.main(["sample", source, "--out", str(out), *arguments]) == 0
    with np.load(out, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("source", ["exact:ring8", "run", "student.safetensors"])
def test_a_sample_depends_on_its_number_alone(source: str, tmp_path: Path, distilled: Path, place: Path) -> None:
    source = {"run": str(distilled), "student.safetensors": str(place / source)}.get(source, source)
    steps = ["--steps", "4"] if source == "exact:ring8" else []
    four, eight = (samples(source, tmp_path, "--count", n, *steps)["x"] for n in ("4", "8"))
    assert four.shape == (4, 2) and four.dtype == np.float32
    np.testing.assert_allclose(four, eight[:4], rtol=1e-5, atol=1e-6)
    assert len(np.unique(eight, axis=0)) == 8
    assert not np.allclose(samples(source, tmp_path, "--count", "4", *steps, "--seed", "1")["x"], four)
    np.testing.assert_array_equal(samples(source, tmp_path, "--count", "4", *steps)["x"], four)


def test_labelled_images(tmp_path: Path) -> None:
    arguments = ["--steps", "2", "--count"]
    drawn = samples("digits", tmp_path, *arguments, "30")
    assert drawn["x"].shape == (30, 8, 8, 1) and drawn["x"].dtype == np.uint8
    assert drawn["y"].shape == (30,) and set(drawn["y"]) <= set(range(10)) and len(set(drawn["y"])) > 3
    threes = samples("digits", tmp_path, *arguments, "5", "--class", "3")
    assert set(threes["y"]) == {3}
    # equal noise, other labels: row j is the same where the label was 3 already
    for row in range(5):
        gap = np.abs(threes["x"][row].astype(int) - drawn["x"][row].astype(int)).max()
        assert gap <= 1 if drawn["y"][row] == 3 else gap > 1


@pytest.mark.parametrize(("source", "mode"), [("exact:ring8", "L"), ("digits", "L")])
def test_pictures(source: str, mode: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "samples.png"
    assert cli.main(["sample", source, "--count", "9", "--steps", "2", "--out", str(out)]) == 0
    with Image.open(out) as image:
        image.load()
        assert image.format == "PNG" and image.mode == mode and min(image.size) >= 100
    assert [p.name for p in out.parent.iterdir()] == ["samples.png"]


def test_samples_that_are_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "line.toml").write_text("weights = [1]\nmeans = [[0, 0, 0]]\nstds = 1")
    assert run(f"sample exact:{tmp_path / 'line.toml'} --count 2 --out {tmp_path / 'new' / 's.png'}") == 2
    assert "out: samples of shape (3,) cannot be a picture" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# Scores


def test_evaluate_repeats_the_report(distilled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads((distilled / "report.json").read_text())
    for source in (distilled, distilled / "generator.safetensors"):
        assert cli.main(["evaluate", str(source), "--samples", "200", "--teacher_steps", "4", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        row, teacher = result["rows"]
        assert teacher["name"] == "exact:ring8"
        assert row["metrics"] == pytest.approx(told["student"]["metrics"], rel=1e-6, abs=1e-9)
        assert (row["name"], row["nfe"], row["parameters"]) == (str(source), 1, told["parameters"])
        assert result["floor"]["metrics"] == told["floor"]["metrics"] and result["settings"]["samples"] == 200


def test_evaluate_a_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate exact:ring8 --samples 100 --teacher_steps 6 --draws 2 --json") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["nfe"] == 11 and row["spread"]["mmd"] > 0
    assert run("evaluate exact:ring8 --samples 100 --teacher_steps 6") == 0
    told = capsys.readouterr().out
    assert "network calls" in told and "log_density" in told and "floor" in told


def test_evaluate_against(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for against in ("exact:gaussian", "exact:mog40"):
        assert (
            run(f"evaluate {place / 'low.safetensors'} --against {against} --samples 50 --teacher_steps 3 --json") == 0
        )
        assert "mmd" in json.loads(capsys.readouterr().out)["rows"][0]["metrics"]


def test_evaluate_side_by_side(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns keep the order of the command line; the same call again reads the stored scores."""
    names = ["exact:ring8", "exact:ring8@6", str(place / "student.safetensors")]
    settings = ["--samples", "50", "--teacher_steps", "3", "--out", str(tmp_path / "c"), "--json"]
    told = []
    for _ in range(2):
        assert cli.main(["evaluate", *names, *settings]) == 0
        told.append(json.loads(capsys.readouterr().out)["rows"])
    assert [row["name"] for row in told[0]] == names and [row["nfe"] for row in told[0]] == [5, 11, 1]
    assert told[0] == told[1]  # times included


def test_stored_scores_belong_to_their_law(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"evaluate {place / 'student.safetensors'} --samples 50 --out {tmp_path / 'c'} --json --against"
    told = []
    for law in ("exact:ring8", "exact:gaussian"):
        assert run(f"{line} {law}") == 0
        told.append(json.loads(capsys.readouterr().out)["rows"][0]["metrics"]["mmd"])
    assert told[0] != told[1]


def test_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.npz"
    assert run(f"reference digits --features digits --out {out}") == 0
    with np.load(out, allow_pickle=False) as file:
        assert {"mean_pixel", "cov_pixel", "mean_feature", "cov_feature", "count"} <= set(file.files)


# The process


def spent(action: Callable[[], subprocess.CompletedProcess[str]]) -> tuple[float, subprocess.CompletedProcess[str]]:
    """CPU seconds of a child process, and what it returned."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = action()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def limbeck_process(arguments: list[str], **keys: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "limbeck", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **keys)


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["--version"], ["frobnicate"]])
def test_light_commands_are_fast(arguments: list[str]) -> None:
    seconds, done = spent(lambda: limbeck_process(arguments))
    assert done.returncode == (2 if arguments == ["frobnicate"] else 0)
    assert seconds < 0.5
    script = (
        "import sys; from limbeck.cli import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'pydantic', 'tyro', 'rich', 'PIL', 'safetensors'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, timeout=60)


def test_import_is_cheap() -> None:
    script = (
        "import sys, time, torch; before = set(sys.modules); start = time.process_time(); import limbeck; "
        "print(len(set(sys.modules) - before), time.process_time() - start)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120)
    added, seconds = done.stdout.split()
    assert int(added) < 60 and float(seconds) < 1


def test_a_full_disk(tmp_path: Path, tiny_keys: list[str], distilled: Path, weights: Any, equal: Any) -> None:
    """No file may exceed 4,000 bytes: one line, exit code 1; without the limit the same command ends equal."""
    out = tmp_path / "limited"
    command = ["distill", "exact:ring8", "--out", str(out), *tiny_keys]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    done = limbeck_process(command, preexec_fn=limit)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == "limbeck: [Errno 27] File too large"
    assert list((out / "checkpoints").iterdir()) == []
    assert cli.main(command) == 0
    assert equal(weights(out), weights(distilled))


def test_sigterm_to_the_process(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = (
        f"{FAST.replace('--steps 2', '--steps 1000000')} --every.log 1 --every.save 0 --every.sample 0 --out {out}"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "limbeck", "distill", "exact:ring8", *command.split()],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while not ((out / "log.jsonl").is_file() and (out / "log.jsonl").read_text().count("\n") > 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143 and told[0] == ""
    *progress, last = told[1].splitlines()
    assert last.startswith("limbeck: stopped at step ") and all(line.endswith(" to go") for line in progress)
    (saved,) = (out / "checkpoints").iterdir()
    assert int(saved.name[5:]) == (out / "log.jsonl").read_text().count("\n")


def test_a_reader_that_has_seen_enough() -> None:
    """`limbeck --help | head -0` is no error to talk about."""
    for verb in ("--help", "methods"):
        command = [sys.executable, "-m", "limbeck", verb]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 1


def test_arguments_of_generators_are_numbers_as_in_files() -> None:
    keys: dict[str, Any] = {"generator.network": "perceptron", "generator.noise": "1", "generator.width": "64"}
    table = cli._table("exact:ring8", keys, "teacher", "vardiu")
    assert table["generator"] == {"network": "perceptron", "noise": 1, "width": 64}
    # a file's name stays one
    assert cli._table("exact:ring8", {"generator.file": "2026"}, "teacher", "sid")["generator"] == {"file": "2026"}
