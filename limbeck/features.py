"""Feature networks: where Fréchet distances and perceptual losses are measured."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck import artifact
from limbeck.device import from_cpu, home
from limbeck.files import sha256


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x)))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(max(1, channels // 8), channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        return x + self.conv2(functional.silu(self.norm2(h)))


class Classifier(nn.Module):
    """A small convolutional classifier; `forward` gives its features, not its logits.

    Samples are images (C, H, W) in the scale of the training data. Resolution halves until it is at most 4 pixels; the
    features are the last hidden layer's activations.

    Args:
        shape: (C, H, W).
        classes: number of classes.
        width: channels at full resolution.
        features: size of the last hidden layer.
        dropout: probability at which features are dropped in training.
    """

    name: ClassVar[str] = "classifier"

    def __init__(
        self, shape: Sequence[int], classes: int, width: int = 32, features: int = 64, dropout: float = 0.3
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"classifier: needs images (C, H, W), the samples have shape {tuple(shape)}")
        if classes < 2:
            raise ValueError(f"classifier: needs data of at least 2 classes, got {classes}")
        self.arguments: dict[str, Any] = {
            "shape": list(shape), "classes": classes, "width": width, "features": features, "dropout": dropout,
        }  # fmt: skip
        self.shape, self.classes, self.dropout = tuple(shape), classes, dropout
        channels, height, side = shape
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), Residual(width)]
        while max(height, side) > 4:
            layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), Residual(2 * width)]
            width, height, side = 2 * width, (height + 1) // 2, (side + 1) // 2
        self.body = nn.Sequential(*layers)
        self.norm = nn.GroupNorm(max(1, width // 8), width)
        self.hidden = nn.Linear(width * height * side, features)
        self.last = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, features) of samples (B, C, H, W)."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"features: this network reads samples of shape {self.shape}, got {tuple(x.shape[1:])}")
        body = functional.silu(self.norm(self.body(x))).flatten(1)
        return functional.silu(self.hidden(body))

    def head(self, features: Tensor) -> Tensor:
        """Class logits (B, classes) of features (B, features)."""
        return self.last(functional.dropout(features, self.dropout, self.training))

    def chances(self, x: Tensor, features: Tensor) -> Tensor:
        """Class probabilities (B, classes) of samples whose features are known."""
        return torch.softmax(self.head(features), 1)

    def logits(self, x: Tensor) -> Tensor:
        """Class logits (B, classes) of samples (B, C, H, W)."""
        return self.head(self(x))

    def card(self) -> dict[str, Any]:
        """Everything but the weights, as JSON-able values."""
        return {"network": self.name, "arguments": self.arguments}


class Scripted(nn.Module):
    """A TorchScript feature network that reads 8-bit RGB images, as NVIDIA's Inception file does: the way to EDM's FID.

    Samples in [-1, 1] become bytes, grey becomes three equal channels. The script is called with return_features=True,
    or without it if it takes no such argument. One that takes it is a classifier without it, and has `chances`.

    Attributes:
        classes: number of classes, known after `width`; 0 = no classifier.
    """

    classes = 0

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.script = script
        self.names = [argument.name for argument in cast(Any, script.forward).schema.arguments]

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, d) of samples (B, 1 or 3, H, W) in [-1, 1]."""
        return self._call(x, {"return_features": True} if "return_features" in self.names else {})

    def chances(self, x: Tensor, features: Tensor) -> Tensor:
        """Class probabilities (B, classes): a second call. Inception's file gives them, other scripts may give logits.

        The bias of the last layer is left out where that can be asked for, as the Inception Score does.
        """
        out = self._call(x, {"no_output_bias": True} if "no_output_bias" in self.names else {}).double()
        sums = out.sum(1)
        return out if bool((out >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all()) else torch.softmax(out, 1)

    def _call(self, x: Tensor, options: dict[str, bool]) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"features: this network reads images (B, 1 or 3, H, W), got {tuple(x.shape)}")
        images = (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
        try:
            found = self.script(images.expand(-1, 3, -1, -1), **options)
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"features: the script fails on images {tuple(x.shape[1:])} ({reason})") from None
        if not isinstance(found, Tensor):
            raise ValueError(f"features: the script returns a {type(found).__name__}, expected a tensor (B, d)")
        return found.flatten(1)


PIXELS = "pixels"  # the name of pixel space: each value a feature

_told: set[str] = set()  # programs of which the user has been told


def load(source: str | nn.Module) -> nn.Module:
    """A feature network, frozen and in eval mode.

    Args:
        source: the name of a bundled classifier; "pixels", whose features are the sample's own values; a classifier's
            safetensors file; a TorchScript file (.pt), which is a program and runs with your rights; or any module
            (B, *shape) -> (B, d).

    Raises:
        ValueError: for an unknown name or a file of another kind.
    """
    if isinstance(source, nn.Module):
        network = source
    elif source == PIXELS:
        network = nn.Flatten()
    elif source.endswith(".pt"):
        network = _script(source)
        digest_ = sha256(Path(source))
        if digest_ not in _told and int(os.environ.get("RANK", "0")) == 0:
            _told.add(digest_)
            line = f"features: {source} is a program that now runs with your rights (SHA-256 {digest_[:16]}...)"
            print(line, file=sys.stderr)
    else:
        network = artifact.load(artifact.locate(source, "classifier"), "classifier")
    return network.eval().requires_grad_(False)


def _script(path: str) -> Scripted:
    if not Path(path).is_file():
        raise ValueError(f"features: no file {path!r}")
    if not _is_script(path):
        raise ValueError(f"features: {path} is not a TorchScript file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is retired, but these files are what exists
            return Scripted(torch.jit.load(path, map_location="cpu"))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"features: {path} is not a readable TorchScript file ({str(error).splitlines()[0]})"
        ) from None
    except AttributeError:
        raise ValueError(f"features: {path} has no forward method") from None


def _is_script(path: str) -> bool:
    """Other .pt files are pickles, and are not opened."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def digest(source: str | nn.Module) -> str:
    """SHA-256 of a feature network: of its file, or of a given module's tensors."""
    if isinstance(source, nn.Module) or source == PIXELS:
        return artifact.fingerprint(load(source))
    return sha256(Path(source) if source.endswith(".pt") else artifact.locate(source, "classifier"))


def name(source: str | nn.Module) -> str:
    """What to call a feature network."""
    return source if isinstance(source, str) else type(source).__name__


@torch.no_grad()
def width(network: nn.Module, called: str, who: str, shape: tuple[int, ...]) -> int:
    """Number of features that `network` gives of a sample of `shape`, found on zeros.

    Raises:
        ValueError: if it gives none, naming the network and whose samples they are.
    """
    zeros = torch.zeros(2, *shape, device=home(network))
    try:
        found = network(zeros)
        if isinstance(network, Scripted) and "return_features" in network.names:
            with contextlib.suppress(ValueError):  # it may give features alone
                network.classes = network.chances(zeros, found).shape[1]
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{who}: its samples of shape {shape} do not suit the feature network {called} ({reason})"
        ) from None
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(f"{who}: the feature network {called} gives {got} for 2 samples, expected rows (2, d)")
    return found.shape[1]


@torch.no_grad()
def in_batches(function: Any, x: Tensor, size: int = 1000) -> Tensor:
    """function(x) computed `size` rows at a time, where the network is; rows on the CPU."""
    call = from_cpu(function, getattr(function, "__self__", function))
    return torch.cat([call(part) for part in x.split(size)])
