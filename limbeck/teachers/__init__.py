"""Teachers by name: bundled denoisers, exact laws, files, diffusers folders, a caller's own networks."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from limbeck import artifact, data, importer
from limbeck.denoiser import Denoiser
from limbeck.exact import Empirical, Gaussian, Mixture, Policy
from limbeck.teachers import own


def ring8() -> Mixture:
    """Eight equal Gaussians of std 0.1 on a circle of radius 2."""
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    means = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    return Mixture([1.0] * 8, means.tolist(), 0.1)


def mog40() -> Mixture:
    """Forty equal Gaussians of std softplus(1), means uniform in [-40, 40]^2 from seed 0 (arXiv:2508.20646)."""
    means = (torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) - 0.5) * 2 * 40
    return Mixture([1.0] * 40, means.tolist(), functional.softplus(torch.ones(())).item())


def mixture8() -> Mixture:
    """Eight equal Gaussians of std 0.5 on a circle of radius 2, each close to its neighbours (arXiv:2406.12538)."""
    return Mixture([1.0] * 8, ring8().means.tolist(), 0.5)


def policy4() -> Policy:
    """Four equal Gaussians of std 0.3 on a circle of radius 2, turned by the context: c radians, c in [0, 1]."""
    return Policy(Mixture([1.0] * 4, [[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0]], 0.3))


def gaussian() -> Gaussian:
    """A Gaussian in the plane of std 0.5, the scale that EDM assumes of data."""
    return Gaussian([0.0, 0.0], 0.5)


EXACT: dict[str, Callable[[], Denoiser]] = {
    "ring8": ring8, "mog40": mog40, "gaussian": gaussian, "mixture8": mixture8, "policy4": policy4,
}  # fmt: skip


def load(source: str, network: type[nn.Module] | None = None) -> Denoiser:
    """A teacher, in eval mode.

    Args:
        source: "exact:ring8", "exact:mog40", "exact:mixture8", "exact:policy4", "exact:gaussian"; "exact:FILE.toml", a
            mixture with `weights`, `means` and `stds`; "exact:FILE.npz", a point set `x`; the name of a bundled teacher
            ("digits"); "edm:FILE.pkl", a pickle of EDM, read without running it; "diffusers:DIR", a pipeline folder
            (see `pipeline`); or a denoiser's safetensors file or folder, with or without "file:" in front. A file
            without Limbeck's card is read by the JSON card beside it (see `own.Card`).
        network: the caller's own class, for a file whose network is none of Limbeck's.

    Raises:
        ValueError: naming what is wrong.
    """
    kind, _, rest = source.partition(":")
    if kind == "exact" and rest:
        return _exact(rest).eval()
    if kind == "edm" and rest:
        teacher = importer.load(Path(rest), "teacher")[0]
        assert isinstance(teacher, Denoiser)
        return teacher
    if kind == "diffusers" and rest:
        from limbeck.teachers import pipeline

        return pipeline.load(Path(rest))
    try:
        path = artifact.locate(rest if kind == "file" and rest else source, "denoiser")
    except ValueError:
        raise ValueError(
            f"teacher: no file or bundled teacher {source!r}; expected digits, fashion, exact:{'|'.join(EXACT)}, "
            "exact:FILE.toml, exact:FILE.npz, edm:FILE.pkl, diffusers:DIR or file:PATH"
        ) from None
    card = own.card_of(path)
    if card is not None:
        return own.load(path, card, network)
    denoiser: Denoiser = artifact.load(path, "denoiser", network)
    return denoiser


def _exact(name: str) -> Denoiser:
    if name in EXACT:
        return EXACT[name]()
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"teacher: no exact law {name!r}; expected {', '.join(EXACT)} or a .toml or .npz file")
    if path.suffix == ".toml":
        return read_mixture(path)
    if path.suffix == ".npz":
        try:
            return Empirical(data.read_npz(path, path.name).x)
        except ValueError as error:
            raise ValueError(str(error) if path.name in str(error) else f"{path}: {error}") from None
    raise ValueError(f"teacher: {name}: an exact law is a .toml file (mixture) or an .npz file (points)")


def read_mixture(path: Path) -> Mixture:
    """A TOML file with `weights` (K), `means` (K rows) and `stds` (a number or K).

    Raises:
        ValueError: naming the file and the key.
    """
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from None
    keys = ("weights", "means", "stds")
    for key in keys:
        if key not in table:
            raise ValueError(f"{path}: {key} is missing; a mixture has {', '.join(keys)}")
    for key in table:
        if key not in keys:
            raise ValueError(f"{path}: {key} is not a key of a mixture; it has {', '.join(keys)}")
    try:
        return Mixture(table["weights"], table["means"], table["stds"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from None
