"""The `UNet2DModel` of the diffusers library as one of Limbeck's networks (extra `hub`)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn


class ClassRows(nn.Embedding):
    """A class embedding that also reads condition rows (B, classes): rows @ weight, a zero row adds nothing."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight if input.is_floating_point() else super().forward(input)


class UNet2D(nn.Module):
    """A UNet2DModel called at time `time_scale` times Limbeck's noise input.

    In `Preconditioned` with noise_unit 1 the default scale gives it the times 1000 ln(sigma) / 4 of diffusers'
    consistency models. In `Rescaled` with a discrete schedule, whose time counts steps, the scale is 1.

    Args:
        config: the arguments of UNet2DModel, as its config.json has them.
        time_scale: factor on the noise input.

    Attributes:
        unet: the UNet2DModel.
    """

    name: ClassVar[str] = "unet2d"

    def __init__(self, config: Mapping[str, Any], time_scale: float = 1000.0) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError:
            raise ValueError("network: unet2d needs diffusers; pip install 'limbeck[hub]'") from None
        known = list(inspect.signature(UNet2DModel.__init__).parameters)[1:]
        for key in config:
            if key not in known:
                raise ValueError(
                    f"template.{key}: UNet2DModel has no such argument, expected one of {', '.join(known)}"
                )
        if config.get("class_embed_type") is not None:
            raise ValueError(f"template.class_embed_type: {config['class_embed_type']} is not supported, only None")
        self.arguments: dict[str, Any] = {"config": dict(config), "time_scale": float(time_scale)}
        self.time_scale = float(time_scale)
        unet: Any = UNet2DModel(**config)
        if unet.class_embedding is not None:
            unet.class_embedding = ClassRows(*unet.class_embedding.weight.shape)
        self.feature_width = int(unet.conv_norm_out.num_channels)
        self.unet = unet

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """Raw output (B, C, H, W) for x of that shape, noise (B,) and condition rows (B, classes) or None."""
        time = self.time_scale * noise
        if self.unet.config.time_embedding_type == "learned":  # a table of whole steps
            time = time.round().long().clamp(0, self.unet.time_proj.num_embeddings - 1)
        out: Tensor = self.unet(x, time, class_labels=cond, return_dict=False)[0]
        return out

    def trace(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward`'s output, and the last hidden activations, mean over pixels (B, feature_width)."""
        seen: list[Tensor] = []
        hook = self.unet.conv_act.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            out = self.forward(x, noise, cond)
        finally:
            hook.remove()
        return out, seen[0].mean((2, 3))
