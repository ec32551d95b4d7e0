"""The U-Nets of score-based models, DDPM++ and NCSN++.

One class covers both. DDPM++ embeds the noise condition by sinusoids of fixed frequencies and resamples by 2 x 2 boxes.
NCSN++ uses random Fourier features and a four-tap filter, and feeds a pyramid of the input into its encoder: at each
level the running image a is convolved and halved, then x = a = (x + W a) / sqrt(2). Both add the embedding before the
second norm of a block and scale every residual sum by sqrt(1/2).

    architecture  embedding_type  channel_mult_noise  encoder_type  decoder_type  resample_filter
    DDPM++        positional      1                   standard      standard      (1, 1)
    NCSN++        fourier         2                   residual      standard      (1, 3, 3, 1)

References: Song et al. (2021), arXiv:2011.13456, appendix H; Karras et al. (2022), arXiv:2206.00364, appendix F,
whose layout, parameter names and initialisation are followed.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.networks.edm_layers import (
    BlockStyle,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    check_sizes,
    condition_rows,
    drop_rows,
    xavier_uniform,
)


class SongUNet(nn.Module):
    """DDPM++ or NCSN++ for square images.

    Level l has the resolution img_resolution / 2^l and model_channels * channel_mult[l] channels. Attention follows
    the encoder blocks and the last decoder block of the levels in `attn_resolutions`, and the first block of the
    decoder always.

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
        embedding_type: Frequencies of the noise embedding, "positional" or "fourier".
        channel_mult_noise: Width multiplier of the noise embedding.
        encoder_type: "standard", "skip" (the halved input is added at each level) or "residual" (module docstring).
        decoder_type: "standard" or "skip" (each level adds its own output image to the doubled one from below).
        resample_filter: Taps of the filter of up- and downsampling, of even number.

    Raises:
        ValueError: If the sizes do not fit together or a type is unknown.
    """

    name: ClassVar[str] = "songunet"

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        encoder_type: Literal["standard", "skip", "residual"] = "standard",
        decoder_type: Literal["standard", "skip"] = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        noise_channels = model_channels * channel_mult_noise
        emb_channels = model_channels * channel_mult_emb
        check_sizes(img_resolution, channel_mult, noise_channels, num_blocks, dropout, label_dropout)
        for field, value, known in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "skip", "residual")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ):
            if value not in known:
                raise ValueError(f"{field}={value!r}: choose one of {', '.join(known)}")
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
            "embedding_type": embedding_type,
            "channel_mult_noise": channel_mult_noise,
            "encoder_type": encoder_type,
            "decoder_type": decoder_type,
            "resample_filter": list(resample_filter),
        }
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout

        init = Init(xavier_uniform)
        init_zero = Init(xavier_uniform, weight=1e-5)
        style = BlockStyle(
            emb_channels=emb_channels,
            dropout=dropout,
            eps=1e-6,
            skip_scale=math.sqrt(0.5),
            adaptive_scale=False,
            resample_proj=True,
            resample_filter=tuple(resample_filter),
            channels_per_head=None,
            init=init,
            init_zero=init_zero,
            init_qkv=Init(xavier_uniform, weight=math.sqrt(0.2)),
        )

        self.map_noise = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, init=init, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)

        self.enc = nn.ModuleDict()
        width, aux_width = in_channels, in_channels
        widths: list[int] = []  # channels of the features that the decoder takes back, last first
        for level, multiplier in enumerate(channel_mult):
            side = img_resolution >> level
            at = f"{side}x{side}"
            if level == 0:
                self.enc[f"{at}_conv"] = Conv2d(in_channels, model_channels, 3, init=init)
                width = model_channels
            else:
                self.enc[f"{at}_down"] = UNetBlock(width, width, style, down=True)
                if encoder_type == "skip":
                    self.enc[f"{at}_aux_down"] = Conv2d(
                        aux_width, aux_width, 0, init=None, down=True, resample_filter=resample_filter
                    )
                    self.enc[f"{at}_aux_skip"] = Conv2d(aux_width, width, 1, init=init)
                if encoder_type == "residual":
                    self.enc[f"{at}_aux_residual"] = Conv2d(
                        aux_width, width, 3, init=init, down=True, filter_last=True, resample_filter=resample_filter
                    )
                    aux_width = width
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
            lowest = level == len(channel_mult) - 1
            if lowest:
                self.dec[f"{at}_in0"] = UNetBlock(width, width, style, attention=True)
                self.dec[f"{at}_in1"] = UNetBlock(width, width, style)
            else:
                self.dec[f"{at}_up"] = UNetBlock(width, width, style, up=True)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and side in attn_resolutions
                self.dec[f"{at}_block{i}"] = UNetBlock(
                    width + widths.pop(), model_channels * multiplier, style, attention=attention
                )
                width = model_channels * multiplier
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and not lowest:
                    self.dec[f"{at}_aux_up"] = Conv2d(
                        out_channels, out_channels, 0, init=None, up=True, resample_filter=resample_filter
                    )
                self.dec[f"{at}_aux_norm"] = GroupNorm(width, eps=style.eps)
                self.dec[f"{at}_aux_conv"] = Conv2d(width, out_channels, 3, init=init_zero)

    def embed(self, noise: Tensor, cond: Tensor | None, augment: Tensor | None, batch: int) -> Tensor:
        """Embedding (B or 1, emb_channels) of noise and conditions, in float32 or the parameters' wider dtype."""
        dtype = torch.promote_types(self.map_layer0.weight.dtype, torch.float32)
        cos, sin = self.map_noise(noise.to(dtype)).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)
        if cond is not None:
            cond = condition_rows(cond, self.label_dim, "cond", dtype)
        if self.map_label is not None:
            rows = noise.new_zeros(1, self.label_dim, dtype=dtype) if cond is None else cond
            if self.training and self.label_dropout:
                rows = drop_rows(rows, batch, self.label_dropout)
            # One-hot rows have mean square 1 / label_dim: bring them to the scale of the embedding.
            emb = emb + self.map_label(rows * math.sqrt(self.label_dim))
        if augment is not None:
            augment = condition_rows(augment, self.augment_dim, "augment", dtype)
            if self.map_augment is not None:
                emb = emb + self.map_augment(augment)
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))

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
        image: Tensor | None = None
        for name, layer in self.dec.items():
            match name.partition("_")[2]:
                case "in0" | "in1" | "up":
                    x = layer(x, emb)
                case "aux_up":
                    image = layer(image)
                case "aux_norm":
                    head = F.silu(layer(x))
                case "aux_conv":
                    image = layer(head) if image is None else layer(head) + image
                case _:
                    x = layer(torch.cat([x, skips.pop()], dim=1), emb)
        assert image is not None
        return image, features

    def features(self, x: Tensor, noise: Tensor, cond: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """The second of what `trace` returns, without the decoder's cost."""
        return self._encode(x, self.embed(noise, cond, augment, batch=x.shape[0]))[-1].mean((2, 3))

    def _encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Activations that the decoder takes back, last first to be taken."""
        aux = x
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            match name.partition("_")[2]:
                case "conv":
                    x = layer(x)
                    skips.append(x)
                case "aux_down":
                    aux = layer(aux)
                case "aux_skip":
                    skips[-1] = x = x + layer(aux)
                case "aux_residual":
                    skips[-1] = aux = x = (x + layer(aux)) / math.sqrt(2)
                case _:
                    x = layer(x, emb)
                    skips.append(x)
        return skips
