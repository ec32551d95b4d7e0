"""Generators that the caller brings: any differentiable network of a latent, such as a GAN's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from limbeck import networks
from limbeck.generator import Generator


class Given(Generator):
    """x = network(z), or network(z, cond), with a latent of its own.

    With classes the network is called with condition rows (B, classes), zero rows for no label.

    Args:
        network: one of `networks.DECODERS`, or a network of the caller's own class.
        latent_shape: of one latent.
        shape: of one sample.
        classes: width of a condition row; 0 = unconditional.
        arguments: what the network's class was built with, so that a file can say it; left out: the network's
            attribute `arguments`, if it has one, else none.
        contexts: condition rows are points of [0, 1]^classes instead of one-hot labels.
    """

    def __init__(
        self,
        network: nn.Module,
        latent_shape: Sequence[int],
        shape: Sequence[int],
        classes: int = 0,
        arguments: Mapping[str, Any] | None = None,
        contexts: bool = False,
    ) -> None:
        super().__init__()
        for name, sizes in (("latent_shape", latent_shape), ("shape", shape)):
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{name}: must be positive sizes, got {tuple(sizes)}")
        if classes < 0:
            raise ValueError(f"classes: must not be negative, got {classes}")
        self.network, self.classes, self.contexts = network, classes, contexts
        self.latent_shape, self.shape = tuple(latent_shape), tuple(shape)
        self.arguments = dict(getattr(network, "arguments", {}) if arguments is None else arguments)

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.classes and cond is None:
            cond = z.new_zeros(len(z), self.classes)
        x: Tensor = self.network(z, cond) if self.classes else self.network(z)
        if x.shape[1:] != self.shape:
            raise ValueError(f"shape: the network makes samples of shape {tuple(x.shape[1:])}, not {self.shape}")
        return x

    def card(self) -> dict[str, Any]:
        """Everything but the weights, as JSON-able values."""
        own = type(self.network)
        names = {known: name for name, known in networks.DECODERS.items()}
        return {
            "generator": "given",
            "network": names.get(own, networks.OWN + own.__name__),
            "arguments": self.arguments,
            "latent_shape": list(self.latent_shape),
            "shape": list(self.shape),
            "classes": self.classes,
            **({"contexts": True} if self.contexts else {}),
        }
