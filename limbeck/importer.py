"""Checkpoints of other projects as Limbeck's own files.

EDM, SiD and Diff-Instruct pickle whole networks: `ema` is EDM's network, and in the other two the generator. PID saves
the state dictionary of a bare U-Net. Here these are read as inert data (`pickles`), the architecture is looked up in
`networks`, and names, shapes and types must match a freshly built network exactly. What comes out is a denoiser or
generator that `artifact` stores; nothing in a file is ever imported, executed or copied but numbers.

References: EDM (Karras et al. 2022, arXiv:2206.00364); SiD (Zhou et al. 2024, arXiv:2404.04057); Diff-Instruct
(Luo et al. 2023, arXiv:2305.18455); PID (Tee et al. 2024, arXiv:2411.08378).
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor

import limbeck
from limbeck import artifact, networks, pickles
from limbeck.denoiser import Denoiser
from limbeck.files import check_folder, sha256, write_atomically
from limbeck.generator import Generator, OneStep, Trajectory
from limbeck.noise import Karras
from limbeck.pickles import Instance, View

Role = Literal["teacher", "generator"]
FORMS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
U_NETS = {"SongUNet": "songunet", "DhariwalUNet": "adm"}
# ranges of noise levels and schedules of EDM's constructors, for bare weights that say nothing
SCHEDULE = {"steps": 1000, "beta_d": 19.9, "beta_min": 0.1}
RANGES = {"edm": (0.0, math.inf), "vp": (2**-10, 152.16697692871094), "ve": (0.02, 100.0)}
MODULES = 5_000  # of one network; the largest of these has 300
LICENCE = (
    "Weights stay under the licence of whoever published them, also in this form, and it may extend to students made "
    "from them. NVIDIA publishes EDM's networks under CC BY-NC-SA 4.0: not for commercial use."
)


OWN = "a denoiser of Limbeck's"


@dataclass(frozen=True)
class Found:
    """A network that a checkpoint holds.

    Attributes:
        holds: what the file is, for people.
        role: what the network must be; None if the file does not say.
        card: of the denoiser; None for bare weights.
        tensors: the network's state by the checkpoint's own names.
        facts: what else the file says.
    """

    holds: str
    role: Role | None
    card: dict[str, Any] | None
    tensors: Mapping[str, View] | Mapping[str, Tensor]
    facts: dict[str, Any]


def load(
    path: str | os.PathLike[str],
    role: Role | None = None,
    sigma_init: float | None = None,
    preconditioning: str | None = None,
) -> tuple[Denoiser | Generator, dict[str, Any]]:
    """The model of a checkpoint, and what its own file should say of where it comes from.

    Args:
        path: an EDM, SiD or Diff-Instruct pickle, a state dictionary of `torch.save`, or a safetensors file.
        role: teacher (a denoiser) or generator; None takes what the file is, if it says so.
        sigma_init: level of a one-step generator's noise; by default SiD trains at 2.5, Diff-Instruct at 1.0.
        preconditioning: edm, vp or ve, for bare weights that are no PID student.

    Raises:
        ValueError: naming the file or the option and what is wrong.
    """
    if sigma_init is not None and not 0 < sigma_init < math.inf:
        raise ValueError(f"sigma_init: must be positive and finite, got {sigma_init}")
    path = Path(path)
    found, digest = _look(path)
    role = role or found.role or ("generator" if sigma_init is not None else None)
    if role == "teacher" and sigma_init is not None:
        raise ValueError(f"sigma_init: belongs to a generator, and {path} is read as a teacher (--as generator)")
    if role is None:
        raise ValueError(f"{path}: {found.holds}; say which with --as teacher, or --as generator --sigma-init S")
    if found.role == "generator" and role == "teacher" and found.card is not None:
        raise ValueError(f"{path}: {found.holds}, which is no teacher")
    trajectory = role == "generator" and sigma_init is None
    if trajectory and found.card is not None:
        raise ValueError("sigma_init: is missing; a one-step generator needs the level of its training (SiD: 2.5)")
    if preconditioning is not None and (trajectory or found.card is not None):
        raise ValueError(
            f"preconditioning: {path} needs none; it is for weights alone, as a teacher or with sigma_init"
        )
    card = found.card or _card_of_weights(path, found.tensors, "edm" if trajectory else preconditioning)
    state: Any = found.tensors if found.holds == OWN else _named(path, card, found.tensors)
    denoiser: Denoiser = artifact.rebuild(path, "denoiser", card, state)
    facts = {
        "source": {"file": path.name, "sha256": digest, "holds": found.holds, **found.facts},
        "licence": LICENCE,
        "made_by": limbeck.__version__,
    }
    if role == "teacher":
        return denoiser, facts
    if sigma_init is None:
        return Trajectory(denoiser, Karras(0.002, 80.0)).eval(), facts
    return OneStep(denoiser, sigma_init).eval(), facts


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    role: Role | None = None,
    sigma_init: float | None = None,
    preconditioning: str | None = None,
) -> Path:
    """`load` a checkpoint and write it to a folder as denoiser.safetensors or generator.safetensors; returns that file.

    card.json beside it is a copy for people of the card in the file's metadata.

    Raises:
        ValueError: as `load`, or if the folder holds a model already.
    """
    out = Path(out)
    for kind in ("denoiser", "generator"):
        if (out / f"{kind}.safetensors").exists():
            raise ValueError(f"out: {out} already holds a {kind}; give another folder")
    check_folder(out)
    model, facts = load(path, role, sigma_init, preconditioning)
    kind = "generator" if isinstance(model, Generator) else "denoiser"
    target = out / f"{kind}.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    artifact.save(target, kind, model, facts)
    write_atomically(out / "card.json", json.dumps(artifact.read_card(target), indent=1, sort_keys=True) + "\n")
    return target


# Recognition ----------------------------------------------------------------------------------------------------------


def _look(path: Path) -> tuple[Found, str]:
    """What a file holds, and its SHA-256."""
    try:
        with pickles.open_regular(path) as file:
            head = file.read(9)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if head[8:] == b"{":  # the header of a safetensors file follows its length
        return _look_at_safetensors(path), sha256(path)
    content = pickles.read(path)
    try:
        found = _recognise(content.value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if content.sources:
        found.facts["code_sha256"] = list(content.sources)
    return found, content.sha256()


def _look_at_safetensors(path: Path) -> Found:
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            own = "limbeck" in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    if not own:
        return Found("bare weights of a U-Net", None, None, artifact.read_tensors(path), {})
    kind = artifact.read_card(path)["kind"]
    if kind != "denoiser":
        raise ValueError(f"{path}: is a {kind} of Limbeck's already; use it as it is")
    denoiser = artifact.load(path, "denoiser")
    return Found(OWN, "teacher", artifact.describe(denoiser), denoiser.state_dict(), {})


def _recognise(value: Any) -> Found:
    """What the value of a pickle is."""
    if type(value) is not dict or not value:
        raise ValueError("not a checkpoint that Limbeck knows: it holds no dictionary")
    if all(type(item) is View for item in value.values()) and all(type(key) is str for key in value):
        if "input_blocks.0.0.weight" in value:
            raise ValueError("a U-Net of OpenAI's guided-diffusion or consistency models: not supported")
        return Found("a state dictionary, of a PID student if nothing else is said", "generator", None, value, {})
    if "ema" not in value:
        if any("optimizer" in str(key) for key in value if type(key) is str):
            raise ValueError("a training state: not supported; import the network snapshot (.pkl) saved beside it")
        raise ValueError("not a checkpoint that Limbeck knows: it has no network `ema`")
    network = value["ema"]
    if type(network) is not Instance:
        raise ValueError("not a checkpoint that Limbeck knows: its `ema` is no pickled network")
    card, tensors, facts = _read_network(network)
    if "Sg" in value:
        return Found("the generator of Diff-Instruct", "generator", card, tensors, facts)
    if "loss_fn" in value:
        return Found("a network of EDM", "teacher", card, tensors, facts)
    return Found("`ema` alone: a generator of SiD, or a copy of EDM's network", None, card, tensors, facts)


def _read_network(network: Instance) -> tuple[dict[str, Any], dict[str, View], dict[str, Any]]:
    """Card, state and facts of a pickled, preconditioned network."""
    if network.name not in FORMS:
        raise ValueError(f"its network is of class {network.name[:80]!r}, expected one of {', '.join(FORMS)}")
    form = FORMS[network.name]
    numbers = _attributes(network)
    modules = numbers.get("_modules")
    model = modules.get("model") if type(modules) is dict else None
    if type(model) is not Instance or model.name not in U_NETS:
        raise ValueError(f"its inner network is not of a class that Limbeck knows: {', '.join(U_NETS)}")
    side, channels, classes = (_integer(numbers, name) for name in ("img_resolution", "img_channels", "label_dim"))
    card: dict[str, Any] = {
        "preconditioning": form,
        "network": U_NETS[model.name],
        "arguments": _arguments(model, side, channels, classes, 2 * channels if form == "iddpm" else channels),
        "shape": [channels, side, side],
        "classes": classes,
        "sigma_data": _number(numbers, "sigma_data") if form == "edm" else 0.5,
        "sigma_min": _number(numbers, "sigma_min"),
        "sigma_max": _number(numbers, "sigma_max"),
    }
    if math.isinf(card["sigma_max"]):
        card["sigma_max"] = None
    if form == "edm":
        card["noise_unit"] = 1.0
    else:
        card |= SCHEDULE
        if form != "ve":
            card["steps"] = _integer(numbers, "M")
        if form == "vp":
            card |= {name: _number(numbers, name) for name in ("beta_d", "beta_min")}
    facts = {"class": network.name, "network_class": model.name, "use_fp16": numbers.get("use_fp16") is True}
    return card, _state(network), facts


def _attributes(instance: Instance) -> dict[str, Any]:
    if type(instance.state) is not dict:
        raise ValueError(f"its {instance.name[:80]!r} has no attributes")
    return instance.state


def _integer(numbers: Mapping[str, Any], name: str) -> int:
    value = numbers.get(name)
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"its {name} is no whole number")
    return value


def _number(numbers: Mapping[str, Any], name: str) -> float:
    value = numbers.get(name)
    if not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"its {name} is no number")
    return float(value)


def _arguments(model: Instance, side: int, channels: int, classes: int, outputs: int) -> dict[str, Any]:
    """The constructor's arguments that a pickled U-Net remembers."""
    state = _attributes(model)
    given = state.get("_init_kwargs")
    if type(given) is not dict or state.get("_init_args") not in ((), None):
        raise ValueError(f"its {model.name} does not say how it was built")
    known = inspect.signature(networks.NETWORKS[U_NETS[model.name]]).parameters
    arguments: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"its {model.name} was built with {str(name)[:80]!r}, which Limbeck does not know")
        values = value if type(value) in (list, tuple) else [value]
        if len(values) > 64 or not all(type(v) in (bool, int, float, str) for v in values):
            raise ValueError(f"its {model.name} was built with a {name} that is neither a number nor a short list")
        arguments[name] = list(values) if type(value) is tuple else value
    sized = {"img_resolution": side, "in_channels": channels, "out_channels": outputs, "label_dim": classes}
    for name, value in sized.items():
        if arguments.setdefault(name, value) != value:
            raise ValueError(f"its {model.name} has {name} {arguments[name]}, its preconditioning {value}")
    return arguments


def _state(network: Instance) -> dict[str, View]:
    """Parameters and persistent buffers of nested modules under torch's dotted names."""
    tensors: dict[str, View] = {}
    pending, seen = [("", network)], 0
    while pending:
        prefix, module = pending.pop()
        seen += 1
        state = _attributes(module)
        groups = [state.get(name, {}) for name in ("_parameters", "_buffers", "_modules")]
        if seen > MODULES or prefix.count(".") > 8 or not all(type(group) is dict for group in groups):
            raise ValueError("its modules are not nested like those of a network")
        hidden = state.get("_non_persistent_buffers_set")
        for name, value in (item for group in groups for item in group.items()):
            full = f"{prefix}{name}"
            if type(value) is View and not (type(hidden) is set and name in hidden):
                tensors[full] = value
            elif type(value) is Instance:
                pending.append((f"{full}.", value))
            elif value is not None and type(value) is not View:
                raise ValueError(f"its {full[:80]!r} is a {type(value).__name__}, expected a tensor")
        if len(tensors) > artifact.TENSORS or len(pending) > MODULES:
            raise ValueError("it has more tensors or modules than any network here")
    return tensors


# Weights --------------------------------------------------------------------------------------------------------------


def _named(
    path: Path, card: Mapping[str, Any], tensors: Mapping[str, View] | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state of the denoiser of `card` from a checkpoint's names: `model.X`, or bare X, and iDDPM's table `u`."""
    views = [value for value in tensors.values() if isinstance(value, View)]
    if sum(view.count * view.storage.dtype.itemsize for view in views) > path.stat().st_size:
        raise ValueError(f"{path}: its tensors share their numbers")
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not re.fullmatch(r"[\w.]{1,200}", name):
            raise ValueError(f"{path}: {name[:80]!r} is no name of a tensor")
        tensor = value.tensor() if isinstance(value, View) else value
        if tensor.dtype != torch.float32:
            raise ValueError(f"{path}: {name} is of type {str(tensor.dtype)[6:]}, expected float32")
        is_table = card["preconditioning"] == "iddpm" and name in ("u", "levels")
        named["levels" if is_table else f"network.{name.removeprefix('model.')}"] = tensor
    if len(named) != len(tensors):
        raise ValueError(f"{path}: two of its tensors have one name")
    return named


def _card_of_weights(
    path: Path, tensors: Mapping[str, View] | Mapping[str, Tensor], preconditioning: str | None
) -> dict[str, Any]:
    """The card of weights without one: architecture from names and shapes, preconditioning from the caller."""
    if preconditioning is None:
        raise ValueError(
            "preconditioning: is missing; weights alone do not say it, give --preconditioning edm, vp or ve"
        )
    if preconditioning not in RANGES:
        raise ValueError(f"preconditioning: must be edm, vp or ve, got {preconditioning!r}")
    shapes = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        network, arguments = infer(shapes)
    except (LookupError, ArithmeticError, TypeError, ValueError):
        raise ValueError(f"{path}: its tensors are not those of one of EDM's U-Nets") from None
    sigma_min, sigma_max = RANGES[preconditioning]
    return {
        "preconditioning": preconditioning,
        "network": network,
        "arguments": arguments,
        "shape": [arguments["in_channels"], arguments["img_resolution"], arguments["img_resolution"]],
        "classes": arguments["label_dim"],
        "sigma_data": 0.5,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max if math.isfinite(sigma_max) else None,
        **({"noise_unit": 1.0} if preconditioning == "edm" else SCHEDULE),
    }


def infer(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the EDM U-Net whose state has these names and shapes; dropout leaves no trace and is 0.

    Raises:
        LookupError, ArithmeticError, TypeError, ValueError: if there is none.
    """
    places = (re.match(r"dec\.(\d{1,5})x\1_block(\d{1,3})\.conv0\.weight$", name) for name in shapes)
    blocks = [(int(place[1]), int(place[2])) for place in places if place]
    sides = sorted({side for side, _ in blocks}, reverse=True)
    last = max(index for _, index in blocks)
    adm = "out_conv.weight" in shapes
    first = shapes[f"enc.{sides[0]}x{sides[0]}_conv.weight"]
    head = shapes["out_conv.weight" if adm else f"dec.{sides[0]}x{sides[0]}_aux_conv.weight"]
    embedding, noise = shapes["map_layer0.weight"]
    base = noise if adm else first[0]
    widths = [shapes[f"dec.{side}x{side}_block0.conv0.weight"][0] for side in sides]
    if any(width % base for width in (*widths, embedding, noise)):
        raise ValueError("widths are not multiples of the first one")
    arguments: dict[str, Any] = {
        "img_resolution": sides[0],
        "in_channels": first[1],
        "out_channels": head[0],
        "label_dim": shapes["map_label.weight"][1] if "map_label.weight" in shapes else 0,
        "augment_dim": shapes["map_augment.weight"][1] if "map_augment.weight" in shapes else 0,
        "model_channels": base,
        "channel_mult": [width // base for width in widths],
        "channel_mult_emb": embedding // base,
        "num_blocks": last,
        "attn_resolutions": [side for side in sides if f"dec.{side}x{side}_block{last}.qkv.weight" in shapes],
        "dropout": 0.0,
    }
    if adm:
        return "adm", arguments

    def has(ending: str) -> bool:
        return any(name.endswith(ending) for name in shapes)

    encoders = [kind for kind in ("residual", "skip") if has(f"_aux_{kind}.weight")]
    taps = next((shape[-1] for name, shape in shapes.items() if name.endswith("resample_filter")), 2)
    return "songunet", arguments | {
        "embedding_type": "fourier" if "map_noise.freqs" in shapes else "positional",
        "channel_mult_noise": noise // base,
        "encoder_type": encoders[0] if encoders else "standard",
        "decoder_type": "skip" if has("_aux_up.resample_filter") else "standard",
        "resample_filter": {2: [1, 1], 4: [1, 3, 3, 1]}[taps],
    }
