"""Data sets in memory: the bundled digits and `.npz` files.

Values are floating point in [-1, 1] for images (bytes / 127.5 - 1, the field's convention).
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from limbeck import artifact

LIMIT = 2**32  # bytes that one array of an npz file may declare


@dataclass(frozen=True)
class Data:
    """Samples x (n, *shape) in float32 and labels y (n,) in int64 or None."""

    name: str
    x: Tensor
    y: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    @property
    def classes(self) -> int:
        return 0 if self.y is None else int(self.y.max()) + 1

    @property
    def sigma_data(self) -> float:
        """Root mean square per coordinate."""
        return float(self.x.double().pow(2).mean().sqrt())

    def fingerprint(self) -> str:
        """SHA-256 over values and labels."""
        digest = hashlib.sha256(self.x.numpy().tobytes())
        digest.update(b"" if self.y is None else self.y.numpy().tobytes())
        return digest.hexdigest()

    def split(self, every: int = 5) -> tuple[Data, Data]:
        """Two parts, (training, held out): every `every`-th sample is held out."""
        held_out = torch.arange(len(self.x)) % every == 0
        return self._rows(~held_out), self._rows(held_out)

    def _rows(self, mask: Tensor) -> Data:
        return Data(self.name, self.x[mask], None if self.y is None else self.y[mask])


def load(source: str) -> Data:
    """A data set by name or path.

    Args:
        source: "digits"; or an .npz file with uint8 images `x` (n, H, W, C) or floating-point samples `x` (n, ...), and
            labels `y` (n,) or none.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if source == "digits":
        return read_npz(artifact.bundled("digits-data.npz"), "digits")
    path = Path(source)
    if not path.exists():
        raise ValueError(f"data: no file {source!r}, and no bundled data of that name (there is: digits)")
    return read_npz(path, path.name)


def read_npz(path: Path, name: str) -> Data:
    """The arrays `x` and `y` of an .npz file as `Data`; see `load`."""
    arrays = open_npz(path)
    if "x" not in arrays:
        raise ValueError(f"{path}: has no array x, only {', '.join(arrays) or 'nothing'}")
    x, y = arrays["x"], arrays.get("y")
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"{path}: x must have shape (n, ...) with n >= 1, got {x.shape}")
    if x.dtype == np.uint8:
        if x.ndim != 4:
            raise ValueError(f"{path}: uint8 images x must have shape (n, H, W, C), got {x.shape}")
        samples = torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    elif np.issubdtype(x.dtype, np.floating):
        samples = torch.from_numpy(x.astype(np.float32))
    else:
        raise ValueError(f"{path}: x must be uint8 or floating point, got {x.dtype}")
    if not torch.isfinite(samples).all():
        raise ValueError(f"{path}: x contains NaN or Inf")
    labels = None
    if y is not None:
        if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() > 100_000:
            raise ValueError(f"{path}: y must be {len(x)} class numbers from 0, got {y.dtype} of shape {y.shape}")
        labels = torch.from_numpy(y.astype(np.int64))
    return Data(name, samples.contiguous(), labels)


def open_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, without pickles and with a cap on declared sizes.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.file_size > LIMIT:
                    raise ValueError(f"{member.filename} declares {member.file_size:,} bytes, the limit is {LIMIT:,}")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error})") from None
