"""Samples as pictures: grids of images, point clouds of 2-D samples."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from torch import Tensor


def to_bytes(x: Tensor) -> np.ndarray:
    """Images (n, C, H, W) in [-1, 1] to uint8 (n, H, W, C)."""
    return (127.5 * x.detach().float() + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def grid(x: Tensor, columns: int, gap: int = 1) -> Image.Image:
    """Images (n, C, H, W) in rows of `columns`, enlarged without smoothing when they are tiny."""
    images = to_bytes(x)
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for k, image in enumerate(images):
        top, left = k // columns * (height + gap), k % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet[..., :3])
    scale = max(1, 32 // height)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def cloud(x: Tensor, extent: float, side: int = 320) -> Image.Image:
    """Points (n, 2) within [-extent, extent]^2 as a density picture, dark where many points are."""
    points = x.detach().double().numpy()
    counts, _, _ = np.histogram2d(-points[:, 1], points[:, 0], bins=side // 2, range=[[-extent, extent]] * 2)
    shade = 255 - 255 * np.minimum(1, counts / max(1.0, np.quantile(counts[counts > 0], 0.9) if counts.any() else 1))
    return Image.fromarray(shade.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)


def overview(x: Tensor, columns: int, extent: float) -> Image.Image | None:
    """A picture of samples (n, *shape): a grid of images, a cloud of 2-D points, None for anything else."""
    if x.ndim == 4 and x.shape[1] in (1, 3, 4):
        return grid(x, columns)
    if x.ndim == 2 and x.shape[1] == 2:
        return cloud(x, extent)
    return None


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
