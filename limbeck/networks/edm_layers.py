"""Layers shared by the U-Nets of EDM: resampling convolutions, noise embeddings and the residual block.

Parameters are cast to the dtype of the input at use, so that a float32 network runs on float16 images without a second
copy of its weights. They are drawn in the order of the state dict, so that one torch seed gives one network.

The residual block maps features x and a noise embedding e to

    h = W0 silu(norm0(x))
    h = silu((1 + a(e)) norm1(h) + b(e))    or    silu(norm1(h + b(e)))
    y = s (W1 dropout(h) + skip(x))

with any resampling inside W0 and the skip, and then optionally to y = s (y + P attention(norm2(y))).

References: Karras et al. (2022), arXiv:2206.00364, appendix F; Song et al. (2021), arXiv:2011.13456, appendix H;
Dhariwal & Nichol (2021), arXiv:2105.05233, section 3.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rule = Callable[[Sequence[int], int, int], Tensor]


def xavier_uniform(shape: Sequence[int], fan_in: int, fan_out: int) -> Tensor:
    """Uniform tensor of the given shape with variance 2 / (fan_in + fan_out)."""
    return math.sqrt(6 / (fan_in + fan_out)) * (torch.rand(*shape) * 2 - 1)


def kaiming_uniform(shape: Sequence[int], fan_in: int, fan_out: int) -> Tensor:
    """Uniform tensor of the given shape with variance 1 / fan_in."""
    return math.sqrt(3 / fan_in) * (torch.rand(*shape) * 2 - 1)


def kaiming_normal(shape: Sequence[int], fan_in: int, fan_out: int) -> Tensor:
    """Normal tensor of the given shape with variance 1 / fan_in."""
    return math.sqrt(1 / fan_in) * torch.randn(*shape)


@dataclass(frozen=True)
class Init:
    """How a Linear or Conv2d is initialised.

    Args:
        rule: Draws a tensor from (shape, fan_in, fan_out).
        weight: Gain of the weight.
        bias: Gain of the bias, which is drawn by the same rule with the fans of the layer.
    """

    rule: Rule
    weight: float = 1.0
    bias: float = 0.0

    def parameters(
        self, shape: Sequence[int], fan_in: int, fan_out: int, bias: bool
    ) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weight of the given shape and bias (shape[0],), or None without one."""
        # A gain of zero still draws, so that changing a gain leaves all later layers as they were.
        weight = nn.Parameter(self.rule(shape, fan_in, fan_out) * self.weight)
        return weight, nn.Parameter(self.rule(shape[:1], fan_in, fan_out) * self.bias) if bias else None


class Linear(nn.Module):
    """Affine map (B, in_features) -> (B, out_features), computed in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int, *, init: Init, bias: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = init.parameters((out_features, in_features), in_features, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """Convolution with zero padding that can double or halve the resolution.

    The taps f make the low-pass kernel f f^T / sum(f)^2; the image is zero outside its frame. Doubling is the
    transposed convolution with 4 times that kernel. Taps (1, 1) repeat pixels going up and average 2 x 2 going down.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Odd side of the kernel; 0 for a layer that only resamples.
        init: Initialisation; None is allowed only when `kernel` is 0.
        up: Double the resolution before the convolution.
        down: Halve the resolution before the convolution.
        filter_last: Halve it after the convolution instead; the frame between the two is as wide as the filter needs.
        resample_filter: The taps of f, of even number.

    Raises:
        ValueError: If both directions are asked for, or the filter has an odd number of taps or zero sum.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        init: Init | None,
        up: bool = False,
        down: bool = False,
        filter_last: bool = False,
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        if (up and down) or (filter_last and not down):
            raise ValueError("up, down: choose one direction; filter_last goes with down only")
        if kernel == 0 and in_channels != out_channels:
            raise ValueError(f"kernel=0 keeps the channels, but in_channels={in_channels}, out_channels={out_channels}")
        self.out_channels = out_channels
        self.up, self.down, self.filter_last = up, down, filter_last
        self.padding = kernel // 2
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            assert init is not None
            area = kernel * kernel
            shape = (out_channels, in_channels, kernel, kernel)
            self.weight, self.bias = init.parameters(shape, in_channels * area, out_channels * area, bias=True)
        if up or down:
            if len(resample_filter) % 2 or sum(resample_filter) == 0:
                raise ValueError(f"resample_filter={list(resample_filter)}: give an even number of taps with sum > 0")
            taps = torch.tensor(resample_filter, dtype=torch.float32)
            self.register_buffer("resample_filter", taps.outer(taps)[None, None] / taps.sum().square())
            self.filter_padding = (len(resample_filter) - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) -> (B, out_channels, H', W'), H' = 2 H, H / 2 or H."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.filter_last and weight is not None:
            x = F.conv2d(x, weight, padding=self.padding + self.filter_padding)
            return self._halve(x, padding=0, bias=bias)
        if self.up:
            taps = 4 * self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
            x = F.conv_transpose2d(x, taps, stride=2, padding=self.filter_padding, groups=x.shape[1])
        if self.down:
            x = self._halve(x, padding=self.filter_padding)
        return x if weight is None else F.conv2d(x, weight, bias, padding=self.padding)

    def _halve(self, x: Tensor, padding: int, bias: Tensor | None = None) -> Tensor:
        taps = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, taps, bias, stride=2, padding=padding, groups=x.shape[1])


class GroupNorm(nn.Module):
    """Group normalisation with min(32, channels // 4) groups.

    Raises:
        ValueError: If the groups do not divide the channels.
    """

    def __init__(self, channels: int, *, eps: float) -> None:
        super().__init__()
        self.groups = min(32, channels // 4)
        if self.groups == 0 or channels % self.groups:
            raise ValueError(
                f"a layer of {channels} channels cannot be normalised in {self.groups} groups: choose model_channels "
                "and channel_mult such that all widths and their sums are multiples of 4, and of 32 above 128"
            )
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, channels, H, W) -> the same shape."""
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PositionalEmbedding(nn.Module):
    """Sinusoids of the frequencies 10^(-4 i / n), i = 0, ..., channels / 2 - 1, cosines first.

    Args:
        channels: Even number of outputs.
        endpoint: Take n = channels / 2 - 1, so that the lowest frequency is 1e-4; else n = channels / 2.
    """

    def __init__(self, channels: int, *, endpoint: bool) -> None:
        super().__init__()
        self.channels, self.endpoint = channels, endpoint

    def forward(self, c: Tensor) -> Tensor:
        """Noise conditions (B,) -> (B, channels), in the dtype of c."""
        half = self.channels // 2
        exponents = torch.arange(half, dtype=c.dtype, device=c.device) / (half - int(self.endpoint))
        angles = c.outer((1 / 10000) ** exponents)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Sinusoids of 2 pi times fixed random frequencies, 16 times a standard normal, cosines first.

    Args:
        channels: Even number of outputs.
    """

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, c: Tensor) -> Tensor:
        """Noise conditions (B,) -> (B, channels), in the dtype of c."""
        # The phases reach hundreds of radians: another order of the products moves float32 results by 1e-4.
        angles = c.outer(2 * math.pi * self.freqs.to(c.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def interleaved_attention(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention over pixels, softmax(q k^T / sqrt(d)) v in each head.

    Channel 3 (head d + c) + s of `qkv` holds component c of query (s = 0), key (1) or value (2).

    For derivatives beyond reverse mode (`torch.func.jvp`, double backward) run the network under
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`: the fused kernels have no such rules.

    Args:
        qkv: Projections (B, 3 C, H, W).
        heads: Number of heads, a divisor of C; d = C / heads.

    Returns:
        Attended values (B, C, H, W), channel head d + c.
    """
    batch, channels, height, width = qkv.shape
    # One copy to (3, B, heads, pixels, d): fused kernels want components adjacent in memory.
    parts = qkv.reshape(batch, heads, -1, 3, height * width).permute(3, 0, 1, 4, 2).contiguous()
    query, key, value = parts.unbind(0)
    out = F.scaled_dot_product_attention(query, key, value)
    return out.transpose(2, 3).reshape(batch, channels // 3, height, width)


@dataclass(frozen=True)
class BlockStyle:
    """What all residual blocks of one network have in common.

    Args:
        emb_channels: Channels of the noise embedding.
        dropout: Probability of dropout between the two convolutions, in training mode.
        eps: Added to the variances of the norms.
        skip_scale: Factor of the sum of a branch and its skip.
        adaptive_scale: The embedding scales and shifts the second norm; else it is added before that norm.
        resample_proj: The skip of a resampling block has a 1 x 1 convolution even where the channels do not change.
        resample_filter: Taps of the filter of up- and downsampling.
        channels_per_head: Attention has as many heads as this fits into the block's channels, possibly none;
            None for one head of all channels.
        init: Initialisation of most layers.
        init_zero: Initialisation of the layers that close a branch, zero or nearly so.
        init_qkv: Initialisation of the projections to query, key and value.
    """

    emb_channels: int
    dropout: float
    eps: float
    skip_scale: float
    adaptive_scale: bool
    resample_proj: bool
    resample_filter: tuple[float, ...]
    channels_per_head: int | None
    init: Init
    init_zero: Init
    init_qkv: Init


class UNetBlock(nn.Module):
    """Residual block with noise embedding, resampling and self-attention (identity in the module docstring).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        style: What the block shares with the other blocks of its network.
        up: Double the resolution.
        down: Halve the resolution.
        attention: Append self-attention, unless `style.channels_per_head` exceeds `out_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.dropout, self.skip_scale, self.adaptive_scale = style.dropout, style.skip_scale, style.adaptive_scale
        per_head = out_channels if style.channels_per_head is None else style.channels_per_head
        self.heads = out_channels // per_head if attention else 0
        if self.heads and out_channels % self.heads:
            raise ValueError(f"{out_channels} channels do not split into {self.heads} attention heads")

        def conv(channels: int, kernel: int, resample: bool, init: Init) -> Conv2d:
            return Conv2d(
                channels,
                out_channels,
                kernel,
                init=init,
                up=up and resample,
                down=down and resample,
                resample_filter=style.resample_filter,
            )

        self.norm0 = GroupNorm(in_channels, eps=style.eps)
        self.conv0 = conv(in_channels, 3, True, style.init)
        self.affine = Linear(style.emb_channels, out_channels * (1 + style.adaptive_scale), init=style.init)
        self.norm1 = GroupNorm(out_channels, eps=style.eps)
        self.conv1 = conv(out_channels, 3, False, style.init_zero)
        self.skip: Conv2d | None = None
        if in_channels != out_channels or up or down:
            project = style.resample_proj or in_channels != out_channels
            self.skip = conv(in_channels, 1 if project else 0, True, style.init)
        if self.heads:
            self.norm2 = GroupNorm(out_channels, eps=style.eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, init=style.init_qkv)
            self.proj = Conv2d(out_channels, out_channels, 1, init=style.init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Features (B, in_channels, H, W) and embedding (B or 1, emb_channels) -> (B, out_channels, H', W')."""
        h = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb).to(x.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            h = F.silu(self.norm1(h) * (scale + 1) + shift)
        else:
            h = F.silu(self.norm1(h + modulation))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.heads:
            h = self.proj(interleaved_attention(self.qkv(self.norm2(x)), self.heads))
            # x comes first because a sum takes the memory layout of its first term and h may be channels-last.
            x = (x + h) * self.skip_scale
        return x


def check_sizes(
    img_resolution: int,
    channel_mult: Sequence[int],
    embedding_channels: int,
    num_blocks: int,
    dropout: float,
    label_dropout: float,
) -> None:
    """Raise ValueError unless the sizes give a U-Net whose levels halve the resolution exactly."""
    if not channel_mult or min(channel_mult) < 1:
        raise ValueError(f"channel_mult={list(channel_mult)}: give one positive multiplier per level")
    factor = 2 ** (len(channel_mult) - 1)
    if img_resolution < 1 or img_resolution % factor:
        raise ValueError(
            f"img_resolution={img_resolution}: {len(channel_mult)} levels of channel_mult need a multiple of {factor}"
        )
    if embedding_channels < 4 or embedding_channels % 2:
        raise ValueError(
            f"model_channels: the noise embedding would have {embedding_channels} channels, choose an even number >= 4"
        )
    if num_blocks < 0:
        raise ValueError(f"num_blocks={num_blocks}: must not be negative")
    for field, probability in (("dropout", dropout), ("label_dropout", label_dropout)):
        if not 0 <= probability <= 1:
            raise ValueError(f"{field}={probability}: a probability lies between 0 and 1")


def condition_rows(rows: Tensor, width: int, field: str, dtype: torch.dtype) -> Tensor:
    """Condition rows (B, width) in the given dtype; ValueError names `field` if they are of another width."""
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"{field}: expected rows of shape (B, {width}), got {tuple(rows.shape)}")
    return rows.to(dtype)


def drop_rows(rows: Tensor, batch: int, probability: float) -> Tensor:
    """Rows (B or 1, n) -> (batch, n), each zeroed with the given probability."""
    keep = torch.rand(batch, 1, device=rows.device) >= probability
    return rows * keep.to(rows.dtype)
