"""The U-Net of guided diffusion, ADM.

Residual blocks whose second norm is scaled and shifted by the noise embedding, attention with 64 channels per head at
the lower resolutions, and 2 x 2 box resampling inside the blocks. Condition rows enter after the noise layers:
emb = silu(W1 silu(W0 sinusoids(noise)) + V cond).

References: Dhariwal & Nichol (2021), arXiv:2105.05233, section 3; Karras et al. (2022), arXiv:2206.00364, appendix F,
whose layout, parameter names and initialisation are followed.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.networks.edm_layers import (
    BlockStyle,
    Conv2d,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    check_sizes,
    condition_rows,
    drop_rows,
    kaiming_normal,
    kaiming_uniform,
)


class ADM(nn.Module):
    """ADM for square images.

    Level l has the resolution img_resolution / 2^l and model_channels * channel_mult[l] channels. Attention follows
    all blocks of the levels in `attn_resolutions` except those that resample, and the first block of the decoder;
    blocks narrower than 64 channels have none.

    Args:
        img_resolution: Side of the images in pixels, a multiple of 2^(levels - 1).
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        label_dim: Width of the condition rows; 0 for an unconditional network.
        augment_dim: Width of the augmentation rows; 0 without.
        model_channels: Width that the multipliers refer to.
        channel_mult: Width multiplier of each level.
        channel_mult_emb: Width multiplier of the embedding.
        num_blocks: Residual blocks per level of the encoder; the decoder has one more.
        attn_resolutions: Resolutions with self-attention.
        dropout: Dropout probability inside the blocks.
        label_dropout: Probability of zeroing a condition row in training mode.

    Raises:
        ValueError: If the sizes do not fit together.
    """

    name: ClassVar[str] = "adm"

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(img_resolution, channel_mult, model_channels, num_blocks, dropout, label_dropout)
        self.feature_width = model_channels * channel_mult[-1]
        self.arguments: dict[str, Any] = {
            "img_resolution": img_resolution,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "label_dim": label_dim,
            "augment_dim": augment_dim,
            "model_channels": model_channels,
            "channel_mult": list(channel_mult),
            "channel_mult_emb": channel_mult_emb,
            "num_blocks": num_blocks,
            "attn_resolutions": list(attn_resolutions),
            "dropout": dropout,
            "label_dropout": label_dropout,
        }
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout

        emb_channels = model_channels * channel_mult_emb
        init = Init(kaiming_uniform, weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
        init_zero = Init(kaiming_uniform, weight=0.0)
        style = BlockStyle(
            emb_channels=emb_channels,
            dropout=dropout,
            eps=1e-5,
            skip_scale=1.0,
            adaptive_scale=True,
            resample_proj=False,
            resample_filter=(1, 1),
            channels_per_head=64,
            init=init,
            init_zero=init_zero,
            init_qkv=init,
        )

        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = Linear(augment_dim, model_channels, init=init_zero, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        unit_normal = Init(kaiming_normal, weight=math.sqrt(label_dim))
        self.map_label = Linear(label_dim, emb_channels, init=unit_normal, bias=False) if label_dim else None

        self.enc = nn.ModuleDict()
        width = in_channels
        widths: list[int] = []  # channels of the features that the decoder takes back, last first
        for level, multiplier in enumerate(channel_mult):
            side = img_resolution >> level
            at = f"{side}x{side}"
            if level == 0:
                self.enc[f"{at}_conv"] = Conv2d(in_channels, model_channels * multiplier, 3, init=init)
                width = model_channels * multiplier
            else:
                self.enc[f"{at}_down"] = UNetBlock(width, width, style, down=True)
            widths.append(width)
            for i in range(num_blocks):
                attention = side in attn_resolutions
                self.enc[f"{at}_block{i}"] = UNetBlock(width, model_channels * multiplier, style, attention=attention)
                width = model_channels * multiplier
                widths.append(width)

        self.dec = nn.ModuleDict()
        for level, multiplier in reversed(list(enumerate(channel_mult))):
            side = img_resolution >> level
            at = f"{side}x{side}"
            if level == len(channel_mult) - 1:
                self.dec[f"{at}_in0"] = UNetBlock(width, width, style, attention=True)
                self.dec[f"{at}_in1"] = UNetBlock(width, width, style)
            else:
                self.dec[f"{at}_up"] = UNetBlock(width, width, style, up=True)
            for i in range(num_blocks + 1):
                attention = side in attn_resolutions
                self.dec[f"{at}_block{i}"] = UNetBlock(
                    width + widths.pop(), model_channels * multiplier, style, attention=attention
                )
                width = model_channels * multiplier

        self.out_norm = GroupNorm(width, eps=style.eps)
        self.out_conv = Conv2d(width, out_channels, 3, init=init_zero)

    def embed(self, noise: Tensor, cond: Tensor | None, augment: Tensor | None, batch: int) -> Tensor:
        """Embedding (B or 1, emb_channels) of noise and conditions, in float32 or the parameters' wider dtype."""
        dtype = torch.promote_types(self.map_layer0.weight.dtype, torch.float32)
        emb = self.map_noise(noise.to(dtype))
        if augment is not None:
            augment = condition_rows(augment, self.augment_dim, "augment", dtype)
            if self.map_augment is not None:
                emb = emb + self.map_augment(augment)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        # Without a bias zero rows add nothing, so None needs no rows.
        if cond is not None:
            rows = condition_rows(cond, self.label_dim, "cond", dtype)
            if self.map_label is not None:
                if self.training and self.label_dropout:
                    rows = drop_rows(rows, batch, self.label_dropout)
                emb = emb + self.map_label(rows)
        return F.silu(emb)

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Raw network output.

        Args:
            x: Images (B, in_channels, H, W), H = W = img_resolution; their dtype is the working dtype.
            noise: Noise condition (B,) or (1,).
            cond: Condition rows (B, label_dim); None for zero rows.
            augment: Augmentation rows (B, augment_dim); None for zero rows.

        Returns:
            Images (B, out_channels, H, W) in the dtype of x.

        Raises:
            ValueError: If the rows are of another width than the network's.
        """
        return self.trace(x, noise, cond, augment)[0]

    def trace(
        self, x: Tensor, noise: Tensor, cond: Tensor | None = None, augment: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward`'s output, and the encoder's last activations, mean over pixels (B, feature_width)."""
        emb = self.embed(noise, cond, augment, batch=x.shape[0])
        skips = self._encode(x, emb)
        x = skips[-1]
        features = x.mean((2, 3))
        for name, block in self.dec.items():
            x = block(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return self.out_conv(F.silu(self.out_norm(x))), features

    def features(self, x: Tensor, noise: Tensor, cond: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """The second of what `trace` returns, without the decoder's cost."""
        return self._encode(x, self.embed(noise, cond, augment, batch=x.shape[0]))[-1].mean((2, 3))

    def _encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Activations that the decoder takes back, last first to be taken."""
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        return skips
