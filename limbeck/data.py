"""Data sets in memory: the bundled digits, `.npz` files, IDX folders (MNIST's format) and folders of pictures.

Values are floating point in [-1, 1] for images (bytes / 127.5 - 1, the field's convention).
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limbeck import artifact, config

FASHION = Path("/usr/share/datasets/fashion-mnist")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LIMIT = 2**32  # bytes that one array of an npz file may declare


@dataclass(frozen=True)
class Data:
    """Samples x (n, *shape) in float32, and labels y (n,) in int64, contexts (n, k) in float32 or neither."""

    name: str
    x: Tensor
    y: Tensor | None
    contexts: Tensor | None = None

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
        for rows in (self.y, self.contexts):
            digest.update(b"" if rows is None else rows.numpy().tobytes())
        return digest.hexdigest()

    def split(self, every: int = 5) -> tuple[Data, Data]:
        """Two parts, (training, held out): every `every`-th sample is held out."""
        held_out = torch.arange(len(self.x)) % every == 0
        return self._rows(~held_out), self._rows(held_out)

    def _rows(self, mask: Tensor) -> Data:
        y, contexts = (None if rows is None else rows[mask] for rows in (self.y, self.contexts))
        return Data(self.name, self.x[mask], y, contexts)


def load(source: str, size: int | None = None) -> Data:
    """A data set by name or path.

    Args:
        source: "digits"; "fashion", Debian's package dataset-fashion-mnist; an .npz file with uint8 images `x`
            (n, H, W, C) or floating-point samples `x` (n, ...), and labels `y` (n,), contexts `y` (n, k) in [0, 1]
            or none; an IDX folder (train-images-idx3-ubyte and train-labels-idx1-ubyte, or their .gz); a folder of
            PNG, JPEG or WebP pictures, whose sub-folders, if any, are classes; or the folder of a run of `limbeck
            teach`, for the data that it was taught on.
        size: side to which pictures of a folder are cropped (centre square) and resized; None = they all have one size.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if size is not None and size < 1:
        raise ValueError(f"size: must be at least 1, got {size}")
    if source == "digits":
        return read_npz(artifact.bundled("digits-data.npz"), "digits")
    path = FASHION if source == "fashion" else Path(source)
    if not path.exists():
        hint = "; Debian's package dataset-fashion-mnist puts it there" if source == "fashion" else ""
        raise ValueError(f"data: no file or folder {str(path)!r}{hint} (bundled: digits)")
    if _is_run(path):  # its pictures are of samples
        recipe = config.read_toml(path / "recipe.toml")
        taught = recipe.get("data")
        if not isinstance(taught, str) or _is_run(Path(taught)):
            raise ValueError(f"data: {path} is the folder of a run that read none; name the data themselves")
        return load(taught, recipe.get("size"))
    if not path.is_dir():
        return read_npz(path, path.name)
    is_idx = any(path.glob("train-images-idx3-ubyte*"))
    return read_idx(path, source) if is_idx else read_pictures(path, size)


def is_pictures(source: str | None) -> bool:
    """Is `source` a folder of pictures, which can be resized?"""
    path = Path(source or "")
    return bool(source) and path.is_dir() and not _is_run(path) and not any(path.glob("train-images-idx3-ubyte*"))


def _is_run(path: Path) -> bool:
    return (path / "recipe.toml").is_file()


def check_size(size: int | None, *sources: str | None) -> None:
    """Raise ValueError if a size is given and none of the sources is a folder of pictures."""
    if size is not None and not any(map(is_pictures, sources)):
        named = ", ".join(source for source in sources if source)
        raise ValueError(f"size: resizes folders of pictures only{f', not {named}' if named else ''}; leave it out")


def check_range(samples: Data) -> None:
    """Images (C, H, W) must lie in [-1, 1].

    Raises:
        ValueError: naming the data, also for floating-point values in [0, 1], the other convention.
    """
    if len(samples.shape) != 3:
        return
    low, high = float(samples.x.min()), float(samples.x.max())
    hint = f"{samples.name}: its values span [{low:.4g}, {high:.4g}], images must lie in [-1, 1]"
    if max(-low, high) > 1 + 1 / 255:  # half a grey level of overshoot rounds to the ends
        raise ValueError(f"{hint}; clip or rescale them, or give uint8 of shape (n, H, W, C)")
    grey = (samples.x + 1) * 127.5
    if low >= 0 and low < high and float((grey - grey.round()).abs().max()) > 1e-3:
        raise ValueError(f"{hint} and these look like [0, 1]; give 2 x - 1, or uint8 of shape (n, H, W, C)")


def read_pictures(folder: Path, size: int | None) -> Data:
    """PNG, JPEG and WebP files of a folder, in order of their names; sub-folders are classes 0, 1, ... by name.

    Grey pictures among coloured ones become RGB.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    kinds = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    loose = next((path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES), None)
    if kinds and loose is not None:
        raise ValueError(f"{loose}: lies beside sub-folders, which are classes; a picture must be in one of them")
    labelled = [(path, k) for k, kind in enumerate(kinds or [folder]) for path in sorted(kind.iterdir())]
    found = [(path, k) for path, k in labelled if path.suffix.lower() in PICTURES]
    if not found:
        raise ValueError(f"{folder}: holds no pictures ({', '.join(PICTURES)}) and is not an IDX folder")
    images: list[np.ndarray] = []
    for path, _ in found:
        image = _read_picture(path, size)
        if images and image.shape[:2] != images[0].shape[:2]:
            sides = [f"{height} x {width}" for height, width, _ in (image.shape, images[0].shape)]
            raise ValueError(f"{path}: has {sides[0]} pixels, the others {sides[1]}; give one size, e.g. --size 32")
        images.append(image)
    channels = max(image.shape[2] for image in images)
    pixels = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])
    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    return Data(folder.name, x.contiguous(), torch.tensor([k for _, k in found]) if kinds else None)


def _read_picture(path: Path, size: int | None) -> np.ndarray:
    """One picture as uint8 (H, W, C); grey stays one channel, everything else becomes RGB."""
    try:
        # a large picture may be meant, and a palette's transparency is dropped like any other
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            if file.mode.startswith("I"):  # 16-bit grey, which convert() would clip to 255
                picture = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
            else:
                picture = file.convert("L" if file.mode in ("1", "L") else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from None
    if size is not None:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        picture = square.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def read_idx(folder: Path, name: str, part: str = "train") -> Data:
    """Images and labels of an IDX folder: `part`-images-idx3-ubyte and `part`-labels-idx1-ubyte, plain or gzipped.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    images = _read_idx_file(folder / f"{part}-images-idx3-ubyte", 3)
    labels = _read_idx_file(folder / f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels")
    x = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)[:, None]
    return Data(name, x, torch.from_numpy(labels.astype(np.int64)))


def _read_idx_file(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of an IDX file (magic 0x0000 0x08 dimensions, big-endian sizes, values) as an array."""
    zipped = path.with_name(path.name + ".gz")
    try:
        if path.is_file():
            content = path.read_bytes()
        elif zipped.is_file():
            with gzip.open(zipped) as file:
                content = file.read(LIMIT)
        else:
            raise ValueError("is missing")
        head = 4 + 4 * dimensions
        if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < head:
            raise ValueError(f"is not an IDX file of {dimensions}-dimensional bytes")
        shape = struct.unpack(f">{dimensions}I", content[4:head])
        if len(content) - head != math.prod(shape) or not math.prod(shape):
            raise ValueError(f"declares {math.prod(shape):,} values and holds {len(content) - head:,}")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def read_npz(path: Path, name: str) -> Data:
    """The arrays `x` and `y` of an .npz file as `Data`; see `load`."""
    arrays = open_npz(path)
    if "x" not in arrays:
        raise ValueError(f"{path}: has no array x, only {', '.join(arrays) or 'nothing'}")
    x, y = arrays["x"], arrays.get("y")
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"{path}: x must have shape (n, ...) with n >= 1, got {x.shape}")
    if x.dtype == np.uint8:
        if x.ndim != 4:
            raise ValueError(f"{path}: uint8 images x must have shape (n, H, W, C), got {x.shape}")
        samples = torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    elif np.issubdtype(x.dtype, np.floating):
        with np.errstate(over="ignore"):  # what float32 cannot hold is reported as Inf below
            samples = torch.from_numpy(x.astype(np.float32))
    else:
        raise ValueError(f"{path}: x must be uint8 or floating point, got {x.dtype}")
    if not torch.isfinite(samples).all():
        raise ValueError(f"{path}: x contains NaN or Inf")
    labels = contexts = None
    if y is not None and y.ndim == 2 and np.issubdtype(y.dtype, np.floating):
        if len(y) != len(x) or y.shape[1] == 0 or not ((y >= 0) & (y <= 1)).all():
            raise ValueError(f"{path}: contexts y must be {len(x)} rows of numbers in [0, 1], got shape {y.shape}")
        contexts = torch.from_numpy(y.astype(np.float32))
    elif y is not None:
        if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() > 100_000:
            raise ValueError(f"{path}: y must be {len(x)} class numbers from 0, got {y.dtype} of shape {y.shape}")
        labels = torch.from_numpy(y.astype(np.int64))
    return Data(name, samples.contiguous(), labels, contexts)


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
    # a damaged archive raises whatever its decoder meets: zlib.error, EOFError, RuntimeError, NotImplementedError, ...
    except Exception as error:
        raise ValueError(f"{path}: not a readable .npz file ({error})") from None
