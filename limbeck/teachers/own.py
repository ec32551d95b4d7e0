"""A caller's own network as a teacher: weights as safetensors, the facts about them in a JSON card beside the file.

The card says what the network is to Limbeck; the class comes from the caller alone, in Python or with --network.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from limbeck import artifact, config
from limbeck.denoiser import Denoiser, Output
from limbeck.networks import OWN


@dataclass(frozen=True)
class Card:
    """What `WEIGHTS.json` says of `WEIGHTS.safetensors`.

    Attributes:
        shape: shape of one sample, e.g. [3, 32, 32].
        classes: width of a condition row; 0 = unconditional.
        contexts: condition rows are points of [0, 1]^classes instead of one-hot labels.
        preconditioning: edm: the network is called as network(c_in x, ln(sigma / noise_unit) / 4, cond) in EDM's
            preconditioning; rescaled: as network(x_t, t, cond) in the time of `schedule`, and predicts `output`.
        schedule: vp, cosine, flow, or a table such as {"name": "vp", "beta_d": 19.9, "beta_min": 0.1} or
            {"name": "alphas", "alphas_cumprod": [...]} with t counting steps (for rescaled).
        output: eps, v, x0 or flow (for rescaled).
        sigma_data: root mean square of the data per coordinate.
        sigma_min, sigma_max: noise levels on which the network was trained; left out: all.
        noise_unit: level at which an EDM network's noise input is 0.
        network: one of Limbeck's own networks by name, if the caller gives no class.
        arguments: the network's constructor arguments.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    shape: list[int]
    classes: int = 0
    contexts: bool = False
    preconditioning: Literal["edm", "rescaled"] = "edm"
    schedule: str | dict[str, Any] | None = None
    output: Output | None = None
    sigma_data: float = 0.5
    sigma_min: float = 0.0
    sigma_max: float | None = None
    noise_unit: float = 1.0
    network: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape: must be positive sizes, got {self.shape}")
        for name in ("schedule", "output"):
            if (getattr(self, name) is None) != (self.preconditioning == "edm"):
                raise ValueError(f"{name}: belongs to preconditioning rescaled, which needs it, and not to edm")
        if isinstance(self.schedule, str) and self.schedule == "alphas":
            raise ValueError('schedule: alphas needs its numbers, {"name": "alphas", "alphas_cumprod": [...]}')


def card_of(weights: Path) -> Path | None:
    """The JSON card beside a file of plain weights; None if there is none, or the file carries Limbeck's own."""
    path = weights.with_suffix(".json")
    return path if path.is_file() and not artifact.is_carded(weights) else None


def read_json(card: Path) -> dict[str, Any]:
    """The table of a card.

    Raises:
        ValueError: naming the file.
    """
    try:
        table = json.loads(card.read_text())
        if not isinstance(table, dict):
            raise ValueError("is not a table")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{card}: not a readable JSON file ({error})") from None
    return table


def validated(kind: type, table: dict[str, Any], card: Path) -> Any:
    """An instance of the dataclass `kind` from the table of `card`.

    Raises:
        ValueError: naming the file and the field.
    """
    try:
        return config.validate(kind, table)
    except ValueError as error:
        raise ValueError(f"{card}: {error}") from None


def load(weights: Path, card: Path, network: type[nn.Module] | None = None) -> Denoiser:
    """The teacher of `weights` and `card`, in float32 and eval mode.

    Raises:
        ValueError: naming the file, and the field of the card or the tensor that is wrong.
    """
    facts: Card = validated(Card, read_json(card), card)
    if facts.network is None and network is None:
        raise ValueError(f"{card}: the network is the caller's own class; give it with --network pkg.mod:Class")
    described = asdict(facts)
    described["network"] = facts.network if network is None else OWN + network.__name__
    place = "network" if facts.preconditioning == "edm" else "model"
    placed = {f"{place}.{name}": tensor for name, tensor in artifact.read_tensors(weights).items()}
    denoiser: Denoiser = artifact.rebuild(weights, "denoiser", described, placed, network)
    return denoiser
