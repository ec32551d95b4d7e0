"""What `limbeck teach` trains: denoisers by EDM's loss, classifiers whose features evaluation uses, and small GANs.

All are objectives like any distillation method, so that the trainer, checkpoints, resuming and schedules are the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.critic import R1_STEP, critic_loss, generator_loss, r1_penalty
from limbeck.denoiser import Denoiser
from limbeck.features import Classifier
from limbeck.generator import Generator
from limbeck.given import Given
from limbeck.losses import denoising
from limbeck.networks.gan import Decoder, Discriminator
from limbeck.noise import LogNormal
from limbeck.objective import Batch, Turn, perturb
from limbeck.optimizer import Optimizer


@dataclass(frozen=True)
class Denoising:
    """Denoising score matching in EDM's form (Karras et al. 2022, arXiv:2206.00364).

    Attributes:
        levels: training law of the noise, in units of sigma_data / 0.5.
        label_dropout: share of samples trained without their label, for guidance and unconditional sampling.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "denoiser"
    needs_real: ClassVar[bool] = False

    levels: LogNormal = field(default_factory=LogNormal)
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        _share("label_dropout", self.label_dropout)

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        return {"denoiser": copy.deepcopy(template)}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"denoiser": Optimizer("adam", lr=1e-3, betas=(0.9, 0.99), schedule="cosine", warmup=200)}

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        yield Turn(("denoiser",), self.loss)

    def loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        """EDM's weighted squared error per sample (B,)."""
        denoiser = cast(Denoiser, nets["denoiser"])
        assert batch.real is not None
        sigma = self.levels.scaled(denoiser.unit).quantile(batch.u)
        estimate = denoiser(perturb(batch.real, sigma, batch.eps), sigma, batch.cond)
        return denoising(estimate, batch.real, sigma, denoiser.sigma_data)


@dataclass(frozen=True)
class Imitation:
    """Regression of a denoiser on a teacher's estimates, on noised samples of the teacher.

    What it learns is the teacher in another network: where distillation methods start that copy their teacher.

    Attributes:
        levels: law of the noise, in units of sigma_data / 0.5; wider than EDM's, because generators start high and
            noise laws reach far.
        unlabelled: share of samples whose label is dropped, for both: where estimates without one will be read.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "denoiser"
    needs_real: ClassVar[bool] = True

    levels: LogNormal = field(default_factory=lambda: LogNormal(-0.6, 1.8))
    unlabelled: float = 0.0

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        return {"denoiser": copy.deepcopy(template)}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"denoiser": Optimizer("adam", lr=2e-3, betas=(0.9, 0.99), schedule="cosine", warmup=100)}

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        yield Turn(("denoiser",), self.loss)

    def loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        """EDM's weighted squared distance of the two estimates per sample (B,)."""
        denoiser = cast(Denoiser, nets["denoiser"])
        assert batch.real is not None
        sigma = self.levels.scaled(teacher.unit).quantile(batch.u)
        noisy, cond = perturb(batch.real, sigma, batch.eps), batch.cond
        if cond is not None and batch.coin is not None:
            cond = cond * (batch.coin >= self.unlabelled)[:, None]
        with torch.no_grad():
            target = teacher(noisy, sigma, cond)
        return denoising(denoiser(noisy, sigma, cond), target, sigma, denoiser.sigma_data)


@dataclass(frozen=True)
class Classification:
    """Cross-entropy with label smoothing, on slightly noised images.

    Attributes:
        width: channels at full resolution.
        features: size of the last hidden layer.
        dropout: probability at which features are dropped.
        smoothing: mass that label smoothing moves to the other classes.
        noise: standard deviation of noise added to the images, in units of sigma_data / 0.5.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "classifier"
    needs_real: ClassVar[bool] = False

    width: int = 32
    features: int = 64
    dropout: float = 0.3
    smoothing: float = 0.05
    noise: float = 0.1

    def __post_init__(self) -> None:
        for name in ("dropout", "smoothing"):
            _share(name, getattr(self, name))
        for name in ("width", "features"):
            _size(name, getattr(self, name))
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise: must not be negative, got {self.noise}")

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        return {"classifier": Classifier(template.shape, template.classes, self.width, self.features, self.dropout)}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"classifier": Optimizer("adamw", lr=1e-3, weight_decay=0.02, schedule="cosine", warmup=100)}

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        yield Turn(("classifier",), self.loss)

    def loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        """Cross-entropy per sample (B,)."""
        assert batch.real is not None and batch.cond is not None
        logits = cast(Classifier, nets["classifier"]).logits(batch.real + self.noise * teacher.unit * batch.eps)
        return functional.cross_entropy(logits, batch.cond.argmax(1), reduction="none", label_smoothing=self.smoothing)


@dataclass(frozen=True)
class GAN:
    """A small generative adversarial network for images: the non-saturating loss (Goodfellow et al. 2014,
    arXiv:1406.2661), with R1 at real samples (Mescheder et al. 2018, arXiv:1801.04406).

    Attributes:
        latent: size of the generator's latent, a vector.
        width: channels of the generator before its last layer.
        discriminator_width: channels of the discriminator after its first layer.
        r1: weight of the squared gradient of the logit at real samples, by finite differences.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    needs_real: ClassVar[bool] = False

    latent: int = 64
    width: int = 64
    discriminator_width: int = 32
    r1: float = 0.05

    def __post_init__(self) -> None:
        for name in ("latent", "width", "discriminator_width"):
            _size(name, getattr(self, name))
        if not 0 <= self.r1 < math.inf:
            raise ValueError(f"r1: must be finite and not negative, got {self.r1}")

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        shape, classes = template.shape, template.classes
        decoder = Decoder(shape, classes, self.latent, self.width)
        return {
            "generator": Given(decoder, (self.latent,), shape, classes),
            "discriminator": Discriminator(shape, classes, self.discriminator_width),
        }

    def optimizers(self) -> dict[str, Optimizer]:
        return dict.fromkeys(("generator", "discriminator"), Optimizer("adam", lr=5e-4, betas=(0.0, 0.99)))

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        yield Turn(("discriminator",), self.discriminator_loss)
        yield Turn(("generator",), self.loss)

    def discriminator_loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        """The discriminator's loss per pair of a real and a generated sample (B,)."""
        assert batch.real is not None
        discriminator, cond = nets["discriminator"], batch.cond
        with torch.no_grad():
            x = nets["generator"](batch.z, cond)
        on_real = discriminator(batch.real, cond)
        near = discriminator(batch.real + R1_STEP * batch.eps, cond)
        return critic_loss(on_real, discriminator(x, cond), "softplus") + self.r1 * r1_penalty(on_real, near)

    def loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        """The generator's loss per sample (B,): softplus(-logit)."""
        x = nets["generator"](batch.z, batch.cond)
        return generator_loss(nets["discriminator"](x, batch.cond), "softplus")


def _size(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: must be at least 1, got {value}")


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: must lie in [0, 1), got {value}")
