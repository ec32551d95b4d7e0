"""Model files: they come back as they went, and no file, however strange, does more than raise one line."""

from __future__ import annotations

import copy
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from watch import WATCH

from limbeck import artifact, features, networks
from limbeck.denoiser import Guided, Preconditioned
from limbeck.generator import OneStep, Trajectory
from limbeck.noise import Karras


def mlp(classes: int = 0, shape: tuple[int, ...] = (2,)) -> Preconditioned:
    network = networks.build("mlp", {"shape": list(shape), "classes": classes, "width": 8, "depth": 2})
    return Preconditioned(network, shape, classes, 1.5, 0.01, 90.0)


def dit() -> Preconditioned:
    arguments = {"shape": [1, 8, 8], "classes": 3, "width": 8, "depth": 1, "heads": 2, "patch": 4}
    return Preconditioned(networks.build("dit", arguments), (1, 8, 8), 3)


def songunet() -> Preconditioned:
    arguments = {
        "img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 2, "model_channels": 8,
        "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
    }  # fmt: skip
    return Preconditioned(networks.build("songunet", arguments), (1, 8, 8), 2, noise_unit=1.0)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one step": lambda: OneStep(mlp(), 2.5),
    "one step with labels": lambda: OneStep(mlp(classes=4), 80.0),
    "trajectory": lambda: Trajectory(mlp(shape=(1, 4, 4)), Karras(0.01, 60.0, 5.0)),
    "trajectory of a transformer": lambda: Trajectory(dit(), Karras()),
    "mlp": mlp,
    "dit": dit,
    "songunet": songunet,
    "classifier": lambda: features.Classifier((1, 8, 8), 3, width=4, features=5),
}


def kind_of(module: nn.Module) -> str:
    if isinstance(module, OneStep | Trajectory):
        return "generator"
    return "denoiser" if isinstance(module, Preconditioned) else "classifier"


def shaken(module: nn.Module) -> nn.Module:
    """The module with all weights random: fresh networks hold many zeros."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / 2)
    return module.eval()


@torch.no_grad()
def output(module: Any) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(3, *module.shape, generator=rng)
    if isinstance(module, features.Classifier):
        return module.logits(x)
    cond = torch.eye(3, module.classes) if module.classes else None
    return module(x, torch.tensor([0.1, 1.0, 50.0]), cond) if isinstance(module, Preconditioned) else module(x, cond)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path: Path, name: str) -> None:
    module, path = shaken(MODELS[name]()), tmp_path / "m.safetensors"
    kind = kind_of(module)
    artifact.save(path, kind, module, {"recipe": {"teacher": "x"}, "made_by": "test"})
    back = artifact.load(path, kind)
    assert type(back) is type(module) and not back.training
    assert artifact.fingerprint(back) == artifact.fingerprint(module)
    assert artifact.describe(back) == artifact.describe(module)
    assert torch.equal(output(back), output(module))
    assert artifact.read_card(path)["recipe"] == {"teacher": "x"}
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    module, path = shaken(MODELS["one step with labels"]()), tmp_path / "m.safetensors"
    artifact.save(path, "generator", module, {}, dtype)
    assert {t.dtype for t in safetensors.torch.load_file(path).values()} == {dtype}
    back = artifact.load(path, "generator").state_dict()
    for key, tensor in module.state_dict().items():
        assert back[key].dtype == torch.float32 and torch.equal(back[key], tensor.to(dtype).float())
    artifact.save(tmp_path / "full.safetensors", "generator", module, {})
    assert path.stat().st_size < (tmp_path / "full.safetensors").stat().st_size


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    artifact.save(tmp_path / "m.safetensors", "denoiser", mlp(), {})
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    artifact.load(tmp_path / "m.safetensors", "denoiser")
    assert torch.equal(torch.rand(4), expected)


def test_load_generator_takes_a_file_or_a_run_folder(tmp_path: Path) -> None:
    import limbeck

    module = shaken(MODELS["trajectory"]())
    artifact.save(tmp_path / "generator.safetensors", "generator", module, {})
    for place in (tmp_path, tmp_path / "generator.safetensors", str(tmp_path)):
        assert torch.equal(output(limbeck.load(place)), output(module))
    with pytest.raises(ValueError, match=r"no file .*nothing"):
        limbeck.load(tmp_path / "nothing")


def test_a_module_that_cannot_be_described(tmp_path: Path) -> None:
    for module in (nn.Linear(2, 2), Guided(mlp(classes=2), 2.0)):
        with pytest.raises(ValueError, match=f"{type(module).__name__}: cannot be stored"):
            artifact.save(tmp_path / "m.safetensors", "denoiser", module, {})
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    artifact.save(path, "denoiser", mlp(), {})
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        artifact.save(path, "denoiser", shaken(mlp()), {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_fingerprint_sees_names_shapes_and_values() -> None:
    first, second = mlp(), mlp()
    second.load_state_dict(first.state_dict())
    assert artifact.fingerprint(first) == artifact.fingerprint(second)
    with torch.no_grad():
        second.network.first.bias[0] = torch.nextafter(second.network.first.bias[0], torch.tensor(9.0))
    assert artifact.fingerprint(first) != artifact.fingerprint(second)


# Hostile files. `good` is a generator; each case changes its card or its tensors.

GOOD = MODELS["trajectory"]
ABSENT = object()


def card_of(module: nn.Module) -> dict[str, Any]:
    return {"format": 1, "kind": kind_of(module), "card": artifact.describe(module)}


def changed(card: dict[str, Any], place: str, value: object) -> dict[str, Any]:
    card = copy.deepcopy(card)
    *parents, leaf = place.split(".")
    inner = card
    for parent in parents:
        inner = inner[parent]
    if value is ABSENT:
        del inner[leaf]
    else:
        inner[leaf] = value
    return card


def write(path: Path, module: nn.Module, card: object, tensors: dict[str, Tensor] | None = None) -> None:
    text = card if isinstance(card, str) else json.dumps(card)
    tensors = module.state_dict() if tensors is None else tensors
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, {"limbeck": text})


def refused(path: Path, kind: str = "generator", match: str | None = None) -> None:
    """Loading ends in one line that names the file, and executes, imports and writes nothing."""
    with pytest.raises(ValueError, match=match) as caught, WATCH:
        artifact.load(path, kind)
    line = str(caught.value)
    assert WATCH.seen == []
    assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < 500


@pytest.fixture(autouse=True, scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Load one file of each kind, so that imports which torch and Limbeck postpone are over."""
    path = tmp_path_factory.mktemp("warm") / "m.safetensors"
    for maker in MODELS.values():
        module = maker()
        artifact.save(path, kind_of(module), module, {})
        artifact.load(path, kind_of(module))
    with pytest.raises(ValueError):
        artifact.load(path, "generator")


def test_the_watch_sees(tmp_path: Path) -> None:
    with WATCH:
        eval("1 + 1")
        (tmp_path / "x").write_text("x")
    assert [line.split()[0] for line in WATCH.seen] == ["compile", "exec", "open"]


BAD_CARDS: dict[str, tuple[str, object]] = {
    "network os:system": ("card.denoiser.network", "os:system"),
    "network __import__": ("card.denoiser.network", "__import__('os').system('true')"),
    "network antigravity": ("card.denoiser.network", "antigravity:geohash"),
    "network list": ("card.denoiser.network", ["mlp"]),
    "network missing": ("card.denoiser.network", ABSENT),
    "generator os:system": ("card.generator", "os:system"),
    "generator missing": ("card.generator", ABSENT),
    "arguments text": ("card.denoiser.arguments", "os:system"),
    "arguments unknown": ("card.denoiser.arguments.hook", "os:system"),
    "arguments dunder": ("card.denoiser.arguments.__class__", "os:system"),
    "kind unknown": ("kind", "pickle"),
    "kind list": ("kind", ["generator"]),
    "kind missing": ("kind", ABSENT),
    "format newer": ("format", 3),
    "format without its hash": ("format", 2),
    "format older": ("format", 0),
    "format text": ("format", "1"),
    "format missing": ("format", ABSENT),
    "card missing": ("card", ABSENT),
    "card list": ("card", []),
    "card none": ("card", None),
    "recipe number": ("recipe", 3),
    "width zero": ("card.denoiser.arguments.width", 0),
    "width text": ("card.denoiser.arguments.width", "8"),
    "width other": ("card.denoiser.arguments.width", 16),
    "width huge": ("card.denoiser.arguments.width", 60_000),
    "width beyond the file": ("card.denoiser.arguments.width", 10**9),
    "width beyond 64 bits": ("card.denoiser.arguments.width", 10**400),
    "depth beyond the file": ("card.denoiser.arguments.depth", 10**12),
    "depth negative": ("card.denoiser.arguments.depth", -1),
    "dropout text": ("card.denoiser.arguments.dropout", "os:system"),
    "dropout 2": ("card.denoiser.arguments.dropout", 2.0),
    "dropout NaN": ("card.denoiser.arguments.dropout", float("nan")),
    "shape other": ("card.denoiser.shape", [1, 5, 5]),
    "shape text": ("card.denoiser.shape", ["a"]),
    "shape nested": ("card.denoiser.shape", [[1], 4, 4]),
    "shape huge": ("card.denoiser.shape", [10**30]),
    "shape missing": ("card.denoiser.shape", ABSENT),
    "classes negative": ("card.denoiser.classes", -1),
    "classes text": ("card.denoiser.classes", "3"),
    "classes none": ("card.denoiser.classes", None),
    "sigma_data negative": ("card.denoiser.sigma_data", -1.0),
    "sigma_data NaN": ("card.denoiser.sigma_data", float("nan")),
    "sigma_data text": ("card.denoiser.sigma_data", "1"),
    "sigma_min above sigma_max": ("card.denoiser.sigma_min", 1e9),
    "noise_unit zero": ("card.denoiser.noise_unit", 0.0),
    "noise_unit negative": ("card.denoiser.noise_unit", -1.0),
    "noise_unit NaN": ("card.denoiser.noise_unit", float("nan")),
    "levels reversed": ("card.levels", {"sigma_min": 80.0, "sigma_max": 0.002, "rho": 7.0}),
    "levels unknown": ("card.levels.hook", "os:system"),
    "levels NaN": ("card.levels.sigma_max", float("nan")),
    "levels text": ("card.levels.rho", "7"),
}


@pytest.mark.parametrize("case", BAD_CARDS)
def test_bad_card(tmp_path: Path, case: str) -> None:
    module, path = GOOD(), tmp_path / "m.safetensors"
    write(path, module, changed(card_of(module), *BAD_CARDS[case]))
    refused(path)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "3", "null", '"text"', "\x00", "NaN", "[" * 100_000, '{"format":' * 50_000, '{"format": 1}'],
    ids=lambda text: text[:10],
)
def test_damaged_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.safetensors"
    write(path, GOOD(), text)
    refused(path, match="card is damaged")


def test_newer_format_says_so(tmp_path: Path) -> None:
    module = GOOD()
    write(tmp_path / "m.safetensors", module, changed(card_of(module), "format", 9))
    refused(tmp_path / "m.safetensors", match="format 9, this version of Limbeck reads formats up to 2")


def test_unknown_network_lists_the_known_ones(tmp_path: Path) -> None:
    module = GOOD()
    write(tmp_path / "m.safetensors", module, changed(card_of(module), "card.denoiser.network", "os:system"))
    refused(tmp_path / "m.safetensors", match=r"unknown name 'os:system', expected one of mlp, dit")


@pytest.mark.parametrize("case", ["missing", "extra", "shape", "transposed", "NaN", "Inf", "renamed", "none"])
def test_bad_weights(tmp_path: Path, case: str) -> None:
    module, path = GOOD(), tmp_path / "m.safetensors"
    tensors = dict(module.state_dict())
    name = "denoiser.network.last.weight"
    match case:
        case "missing":
            del tensors[name]
            pattern = f"{name} is missing"
        case "extra":
            tensors["denoiser.hook"] = torch.zeros(3)
            pattern = "denoiser.hook is not part of the network"
        case "shape":
            tensors[name] = torch.zeros(1, 1)
            pattern = rf"{name} has shape \(1, 1\), expected \(16, 8\)"
        case "transposed":
            tensors[name] = tensors[name].T
            pattern = rf"{name} has shape \(8, 16\)"
        case "NaN" | "Inf":
            tensors[name] = torch.full_like(tensors[name], float(case))
            pattern = f"{name} contains NaN or Inf"
        case "renamed":
            tensors["denoiser.network.last.weights"] = tensors.pop(name)
            pattern = "weight"
        case _:
            tensors = {}
            pattern = "is missing"
    write(path, module, card_of(module), tensors)
    refused(path, match=pattern)


def test_sizes_are_compared_before_memory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that claims 60,000 x 60,000 weights (14 GB) is refused without building them."""
    module, path = GOOD(), tmp_path / "m.safetensors"
    write(path, module, changed(card_of(module), "card.denoiser.arguments.width", 60_000))
    real, built = networks.build, []

    def build(name: str, arguments: dict[str, Any], own: type[nn.Module] | None = None) -> nn.Module:
        network = real(name, arguments, own)
        built.append({p.device.type for p in network.parameters()})
        return network

    monkeypatch.setattr(networks, "build", build)
    refused(path, match=r"has shape .*60000")
    assert built == [{"meta"}]


def test_other_kinds_are_named(tmp_path: Path) -> None:
    for name, wrong in (("trajectory", "denoiser"), ("mlp", "generator"), ("classifier", "denoiser")):
        module, path = MODELS[name](), tmp_path / "m.safetensors"
        artifact.save(path, kind_of(module), module, {})
        refused(path, wrong, f"holds a {kind_of(module)}, expected a {wrong}")


def test_classifier_cards(tmp_path: Path) -> None:
    module, path = MODELS["classifier"](), tmp_path / "m.safetensors"
    for place, value in (
        ("card.network", "os:system"), ("card.arguments", [1]), ("card.arguments.classes", 1),
        ("card.arguments.width", -1), ("card.arguments.shape", [8, 8]), ("card.arguments.hook", 1),
        ("card.arguments.features", "5"), ("card.arguments.dropout", "x"),
    ):  # fmt: skip
        write(path, module, changed(card_of(module), place, value))
        refused(path, "classifier")


def test_a_plain_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata)
        refused(path, match="without Limbeck's card")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x00", b"\x00" * 8, b"\xff" * 64, b"PK\x03\x04" + b"\x00" * 60, b"not a model\n",
        b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04\x95", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"null", struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)  # fmt: skip
def test_not_a_safetensors_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    refused(path, match="not a readable safetensors file|without Limbeck's card")


def test_truncated_and_flipped(tmp_path: Path) -> None:
    """No prefix of a file loads, and no flipped bit of its header does more than raise one line."""
    module, path = shaken(GOOD()), tmp_path / "m.safetensors"
    artifact.save(path, "generator", module, {})
    whole = path.read_bytes()
    for end in [*range(0, 200, 21), *range(200, len(whole), 511), len(whole) - 1]:
        path.write_bytes(whole[:end])
        refused(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in range(0, header, 11):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            with WATCH:
                artifact.load(path, "generator")
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        assert WATCH.seen == []


@pytest.mark.parametrize("source", ["missing.safetensors", ".", "../", "os:system", ""])
def test_no_such_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no file .*no bundled denoiser") as caught:
        artifact.locate(source, "denoiser")
    assert "digits" in str(caught.value)
