"""Data sets: every kind of file gives the values that it holds, and every bad file is named in one line."""

from __future__ import annotations

import dataclasses
import gzip
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

import limbeck
from limbeck import config, data, summary
from limbeck.data import Data
from limbeck.methods import METHODS

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def scaled(values: np.ndarray) -> np.ndarray:
    """The convention: bytes / 127.5 - 1."""
    return values.astype(np.float32) / 127.5 - 1


def refusal(source: Path | str, size: int | None = None) -> str:
    """The one line by which a source is refused."""
    with pytest.raises(ValueError) as caught:
        data.load(str(source), size)
    line = str(caught.value)
    assert "\n" not in line
    return line


# --- IDX folders --------------------------------------------------------------------------------------------------


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


IMAGES, LABELS = pixels(7, 4, 3), np.array([3, 0, 1, 1, 2, 0, 3], np.uint8)
GOOD = {"train-images-idx3-ubyte": idx(IMAGES), "train-labels-idx1-ubyte": idx(LABELS)}


def folder_of(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
def test_idx(tmp_path: Path, zipped: bool) -> None:
    files = {f"{name}.gz": gzip.compress(content) for name, content in GOOD.items()} if zipped else GOOD
    loaded = data.load(str(folder_of(files, tmp_path)))
    assert loaded.x.dtype == torch.float32 and loaded.shape == (1, 4, 3)
    np.testing.assert_array_equal(loaded.x.numpy(), scaled(IMAGES)[:, None])
    assert loaded.y is not None and loaded.y.dtype == torch.int64 and loaded.y.tolist() == LABELS.tolist()
    assert loaded.classes == 4


BAD_IDX: dict[str, tuple[dict[str, bytes | None], str]] = {
    "floats": ({"train-images-idx3-ubyte": b"\0\0\x0d\3" + GOOD["train-images-idx3-ubyte"][4:]}, "is not an IDX file"),
    "little-endian": ({"train-images-idx3-ubyte": b"\3\x08\0\0" + idx(IMAGES)[4:]}, "is not an IDX file"),
    "labels as images": ({"train-images-idx3-ubyte": idx(LABELS)}, "is not an IDX file of 3-dimensional"),
    "images as labels": ({"train-labels-idx1-ubyte": idx(IMAGES)}, "is not an IDX file of 1-dimensional"),
    "empty file": ({"train-images-idx3-ubyte": b""}, "is not an IDX file"),
    "header only": ({"train-images-idx3-ubyte": idx(IMAGES)[:10]}, "is not an IDX file"),
    "truncated": ({"train-images-idx3-ubyte": idx(IMAGES)[:-1]}, "declares 84 values and holds 83"),
    "too long": ({"train-labels-idx1-ubyte": idx(LABELS) + b"\0"}, "declares 7 values and holds 8"),
    "huge claim": ({"train-images-idx3-ubyte": b"\0\0\x08\3" + b"\xff" * 12}, "values and holds 0"),
    "no images": ({"train-images-idx3-ubyte": idx(IMAGES[:0])}, "declares 0 values"),
    "no pixels": ({"train-images-idx3-ubyte": idx(IMAGES[:, :0])}, "declares 0 values"),
    "missing labels": ({"train-labels-idx1-ubyte": None}, "is missing"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx(tmp_path: Path, case: str) -> None:
    changed, says = BAD_IDX[case]
    folder_of({name: content for name, content in (GOOD | changed).items() if content is not None}, tmp_path)
    (name,) = changed
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path / name}: ") and says in line


def test_idx_counts_differ(tmp_path: Path) -> None:
    folder_of(GOOD | {"train-labels-idx1-ubyte": idx(LABELS[:5])}, tmp_path)
    assert refusal(tmp_path) == f"{tmp_path}: 7 images but 5 labels"


@pytest.mark.parametrize("damage", ["no gzip", "truncated", "flipped"])
def test_bad_gzip(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(GOOD["train-images-idx3-ubyte"])
    content = {"no gzip": b"hello", "truncated": whole[:-12], "flipped": whole[:12] + b"\xff\xff\xff" + whole[15:]}
    folder_of({"train-images-idx3-ubyte.gz": content[damage]}, tmp_path)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'train-images-idx3-ubyte'}: ")


def test_gzip_bomb_is_read_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LIMIT", 50)
    folder_of({"train-images-idx3-ubyte.gz": gzip.compress(idx(np.zeros((10, 100, 100), np.uint8)))}, tmp_path)
    assert refusal(tmp_path).endswith("declares 100,000 values and holds 34")


# --- npz files ----------------------------------------------------------------------------------------------------


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_of_bytes(tmp_path: Path, channels: int) -> None:
    x, y = pixels(6, 5, 4, channels), np.array([0, 2, 1, 0, 0, 1], np.uint8)
    loaded = data.load(str(npz(tmp_path / "a.npz", x=x, y=y)))
    assert loaded.shape == (channels, 5, 4) and loaded.classes == 3 and loaded.x.is_contiguous()
    np.testing.assert_array_equal(loaded.x.numpy(), scaled(x).transpose(0, 3, 1, 2))
    assert loaded.y is not None and loaded.y.dtype == torch.int64 and loaded.y.tolist() == y.tolist()
    assert loaded.sigma_data == pytest.approx(float(np.sqrt((scaled(x).astype(np.float64) ** 2).mean())), rel=1e-7)


@pytest.mark.parametrize("kind", ["<f4", "<f8", "<f2", ">f4", ">f8"])
def test_npz_of_floats(tmp_path: Path, kind: str) -> None:
    x = RNG.normal(size=(6, 2, 3)).astype(kind)
    loaded = data.load(str(npz(tmp_path / "a.npz", x=x, other=np.zeros(3))))
    np.testing.assert_array_equal(loaded.x.numpy(), x.astype(np.float32))
    assert loaded.x.dtype == torch.float32 and loaded.y is None and loaded.classes == 0


X = np.zeros((4, 2))
BAD_NPZ: dict[str, tuple[dict[str, Any], str]] = {
    "no x": ({"z": X, "w": X}, "has no array x, only z, w"),
    "no rows": ({"x": np.zeros((0, 2))}, "got (0, 2)"),
    "no values": ({"x": np.zeros((4, 0))}, "got (4, 0)"),
    "no pixels": ({"x": np.zeros((4, 0, 8, 1), np.uint8)}, "got (4, 0, 8, 1)"),
    "one dimension": ({"x": np.zeros(4)}, "got (4,)"),
    "scalar": ({"x": np.zeros(())}, "got ()"),
    "bytes without channels": ({"x": np.zeros((4, 8, 8), np.uint8)}, "(n, H, W, C), got (4, 8, 8)"),
    "integers": ({"x": np.zeros((4, 8, 8, 1), np.int64)}, "uint8 or floating point, got int64"),
    "bits": ({"x": np.zeros((4, 2), bool)}, "got bool"),
    "complex": ({"x": np.zeros((4, 2), complex)}, "got complex128"),
    "text": ({"x": np.full((4, 2), "a")}, "got <U1"),
    "NaN": ({"x": np.array([[0, np.nan]])}, "x contains NaN or Inf"),
    "infinite": ({"x": np.array([[0, np.inf]])}, "x contains NaN or Inf"),
    "beyond float32": ({"x": np.array([[0, 1e39]])}, "x contains NaN or Inf"),
    "too few labels": ({"x": X, "y": np.zeros(3, int)}, "4 class numbers from 0, got int64 of shape (3,)"),
    "one-hot labels": ({"x": X, "y": np.eye(4, dtype=int)}, "4 class numbers from 0, got int64 of shape (4, 4)"),
    "fractional labels": ({"x": X, "y": np.zeros(4)}, "class numbers from 0, got float64"),
    "negative labels": ({"x": X, "y": np.array([0, 1, -1, 0])}, "class numbers from 0"),
    "huge labels": ({"x": X, "y": np.array([0, 1, 2**40, 0])}, "class numbers from 0"),
    "objects": ({"x": np.array([[print]], object)}, "not a readable .npz file"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz(tmp_path: Path, case: str) -> None:
    arrays, says = BAD_NPZ[case]
    line = refusal(npz(tmp_path / "a.npz", **arrays))
    assert line.startswith(f"{tmp_path / 'a.npz'}: ") and says in line


def test_npz_that_declares_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((100, 1000)))
    assert (tmp_path / "a.npz").stat().st_size < 10_000
    monkeypatch.setattr(data, "LIMIT", 10_000)
    assert refusal(tmp_path / "a.npz").endswith("(x.npy declares 800,128 bytes, the limit is 10,000)")


def test_npz_whose_header_claims_petabytes(tmp_path: Path) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": (2**47, 2)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", head.getvalue() + bytes(16))
    assert refusal(tmp_path / "a.npz").startswith(f"{tmp_path / 'a.npz'}: not a readable .npz file")


def test_damaged_npz_is_named_whatever_the_damage(tmp_path: Path) -> None:
    rng, wholes = np.random.default_rng(1), []
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", x=rng.normal(size=(30, 2)), y=np.arange(30))
        wholes.append((tmp_path / "a.npz").read_bytes())
    refused = 0
    for whole in wholes:
        for _ in range(150):
            content = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.2 else whole)
            for at in rng.integers(0, len(content), 3):
                content[at] = rng.integers(256)
            (tmp_path / "a.npz").write_bytes(content)
            try:
                loaded = data.load(str(tmp_path / "a.npz"))
                assert torch.isfinite(loaded.x).all()
            except ValueError as error:
                assert str(error).startswith(f"{tmp_path / 'a.npz'}: ")
                refused += 1
    assert refused > 100


# --- folders of pictures --------------------------------------------------------------------------------------------


def picture(path: Path, values: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    """Write (H, W) or (H, W, C) bytes, converted to `mode`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp"])
def test_pictures_keep_their_values(tmp_path: Path, suffix: str) -> None:
    x = pixels(3, 6, 5, 3)
    for name, values in zip("bca", x, strict=True):
        picture(tmp_path / (name + suffix), values, lossless=True)
    (tmp_path / "notes.txt").write_text("hello")
    loaded = data.load(str(tmp_path))
    assert loaded.shape == (3, 6, 5) and loaded.y is None and loaded.name == tmp_path.name
    np.testing.assert_array_equal(loaded.x.numpy(), scaled(x[[2, 0, 1]]).transpose(0, 3, 1, 2))


def test_jpeg(tmp_path: Path) -> None:
    values = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    for suffix in (".jpg", ".jpeg"):
        picture(tmp_path / f"a{suffix}", values, quality=95)
    loaded = data.load(str(tmp_path))
    assert len(loaded.x) == 2
    np.testing.assert_allclose(loaded.x[1].numpy(), scaled(values).transpose(2, 0, 1), atol=3 / 127.5)


GREY = pixels(6, 5)
COLOUR = pixels(6, 5, 3)
COLOUR[:, :, 1:] //= 64  # few colours, so that a palette holds them all


@pytest.mark.parametrize(
    ("mode", "values", "wanted"),
    [
        ("L", GREY, GREY[:, :, None]),
        ("1", GREY // 128 * 255, GREY[:, :, None] // 128 * 255),
        ("RGB", COLOUR, COLOUR),
        ("LA", np.stack([GREY, pixels(6, 5)], 2), GREY[:, :, None].repeat(3, 2)),
        ("RGBA", np.concatenate([COLOUR, pixels(6, 5, 1)], 2), COLOUR),
    ],
)
def test_modes(tmp_path: Path, mode: str, values: np.ndarray, wanted: np.ndarray) -> None:
    """Grey stays one channel, transparency is dropped."""
    picture(tmp_path / "a.png", values, mode)
    with Image.open(tmp_path / "a.png") as file:
        assert file.mode == mode
    np.testing.assert_array_equal(data.load(str(tmp_path)).x[0].numpy(), scaled(wanted).transpose(2, 0, 1))


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes(tmp_path: Path, transparent: bool) -> None:
    options = {"transparency": bytes(range(100, 130))} if transparent else {}
    image = Image.fromarray(COLOUR).quantize(30)
    image.save(tmp_path / "a.png", **options)
    wanted = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(data.load(str(tmp_path)).x[0].numpy(), scaled(wanted).transpose(2, 0, 1))


def test_sixteen_bits_become_their_upper_eight(tmp_path: Path) -> None:
    values = RNG.integers(0, 2**16, (6, 5)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(data.load(str(tmp_path)).x[0, 0].numpy(), scaled((values >> 8).astype(np.uint8)))


def test_grey_among_colour_becomes_rgb(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", GREY)
    picture(tmp_path / "b.png", COLOUR)
    loaded = data.load(str(tmp_path))
    assert loaded.shape == (3, 6, 5)
    np.testing.assert_array_equal(loaded.x[0].numpy(), scaled(GREY)[None].repeat(3, 0))
    np.testing.assert_array_equal(loaded.x[1].numpy(), scaled(COLOUR).transpose(2, 0, 1))


def test_folders_are_classes_by_name(tmp_path: Path) -> None:
    for k, kind in enumerate(["zebra", "10", "9", "ape"]):
        for name in "ab"[: 1 + k % 2]:
            picture(tmp_path / kind / f"{name}.png", np.full((2, 2), k, np.uint8))
    (tmp_path / ".cache").mkdir()
    loaded = data.load(str(tmp_path))
    values = ((loaded.x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert values == [1, 1, 2, 3, 3, 0]  # 10, 9, ape, zebra
    assert loaded.y is not None and loaded.y.tolist() == [0, 0, 1, 2, 2, 3] and loaded.classes == 4


def test_size_takes_the_centre_square(tmp_path: Path) -> None:
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200
    picture(tmp_path / "a.png", wide)
    picture(tmp_path / "b.png", wide.T)
    for size in (4, 10, 25):
        loaded = data.load(str(tmp_path), size)
        assert loaded.shape == (1, size, size)
        assert (loaded.x == torch.tensor(200 / 127.5 - 1)).all()
    exact = pixels(10, 10, 3)
    (tmp_path / "c").mkdir()
    picture(tmp_path / "c" / "c.png", exact)
    np.testing.assert_array_equal(data.load(str(tmp_path / "c"), 10).x[0].numpy(), scaled(exact).transpose(2, 0, 1))


def test_resizing_averages(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", np.tile(np.array([[0, 200], [200, 0]], np.uint8), (16, 16)))
    loaded = data.load(str(tmp_path), 4)
    np.testing.assert_allclose(loaded.x.numpy(), 100 / 127.5 - 1, atol=3 / 127.5)


def test_mixed_sizes(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", pixels(6, 5))
    picture(tmp_path / "b.png", pixels(5, 6))
    line = refusal(tmp_path)
    assert line == f"{tmp_path / 'b.png'}: has 5 x 6 pixels, the others 6 x 5; give one size, e.g. --size 32"
    assert data.load(str(tmp_path), 3).x.shape == (2, 1, 3, 3)


@pytest.mark.parametrize("size", [0, -3])
def test_impossible_size(tmp_path: Path, size: int) -> None:
    picture(tmp_path / "a.png", GREY)
    assert refusal(tmp_path, size) == f"size: must be at least 1, got {size}"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("damage", ["text", "empty", "truncated"])
def test_corrupt_pictures_are_named(tmp_path: Path, suffix: str, damage: str) -> None:
    picture(tmp_path / f"a{suffix}", pixels(40, 40, 3))
    path = picture(tmp_path / f"b{suffix}", pixels(40, 40, 3))
    whole = path.read_bytes()
    path.write_bytes({"text": b"hello", "empty": b"", "truncated": whole[: len(whole) // 2]}[damage])
    assert refusal(tmp_path).startswith(f"{path}: not a readable picture (")


def test_damaged_png_is_named_whatever_the_damage(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", pixels(12, 12, 3))
    whole, rng, refused = path.read_bytes(), np.random.default_rng(2), 0
    for _ in range(150):
        content = bytearray(whole)
        for at in rng.integers(8, 70 if rng.random() < 0.5 else len(whole), 2):
            content[at] = rng.integers(256)
        path.write_bytes(content)
        try:
            data.load(str(tmp_path), 4)
        except ValueError as error:
            assert str(error).startswith(f"{path}: not a readable picture (")
            refused += 1
    assert refused > 75


def header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few bytes."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(100))))
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_decompression_bomb(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(header(60_000, 60_000))
    line = refusal(tmp_path, 32)
    assert line.startswith(f"{tmp_path / 'a.png'}: not a readable picture (Image size (3600000000 pixels) exceeds")


def test_a_large_picture_is_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png", pixels(9, 9))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow warns from here, and refuses from twice that
    assert data.load(str(tmp_path), 3).shape == (1, 3, 3)


def test_a_runs_folder_stands_for_the_data_it_was_taught_on(tmp_path: Path) -> None:
    """Not for the pictures of samples that it holds."""
    for name, taught in (("digits", 'data = "digits"'), ("again", f'data = "{tmp_path}/digits"'), ("none", "")):
        (tmp_path / name / "samples").mkdir(parents=True)
        (tmp_path / name / "recipe.toml").write_text(taught)
        Image.new("L", (8, 8)).save(tmp_path / name / "samples" / "step-1.png")
    found = data.load(str(tmp_path / "digits"))
    assert found.fingerprint() == data.load("digits").fingerprint()
    for name in ("again", "none"):
        with pytest.raises(ValueError, match=r"^data: .* is the folder of a run that read none; name the data"):
            data.load(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"^size: resizes folders of pictures only"):
        data.check_size(16, str(tmp_path / "digits"))


def test_a_critic_and_the_page_see_the_data_of_a_taught_teacher(tmp_path: Path) -> None:
    teacher, quick = str(tmp_path / "t"), {"batch": 4, "tell": lambda line: None}
    network = {"network": "songunet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    keys: dict[str, Any] = {"evaluate": {"samples": 20, "teacher_steps": 2}, "steps": 2}
    limbeck.teach("digits", out=teacher, template=network, **quick, **keys)
    keys["evaluate"] |= {"data": "digits", "features": "digits"}
    limbeck.distill(teacher, "dmd2", out=tmp_path / "r", **quick, **keys)
    recipe = config.resolve(config.read_toml(tmp_path / "r" / "recipe.toml"), METHODS)
    panel = summary._real(dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, data=None)))
    assert panel == summary._real(recipe) and "one class per row" in cast(Any, panel).caption


def test_folders_without_pictures(tmp_path: Path) -> None:
    says = "holds no pictures (.png, .jpg, .jpeg, .webp) and is not an IDX folder"
    assert refusal(tmp_path) == f"{tmp_path}: {says}"
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert refusal(tmp_path) == f"{tmp_path}: {says}"
    picture(tmp_path / "a" / "b" / "deep.png", GREY)
    assert refusal(tmp_path) == f"{tmp_path}: {says}"


def test_pictures_beside_classes(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png", GREY)
    path = picture(tmp_path / "0.png", GREY)
    assert refusal(tmp_path).startswith(f"{path}: lies beside sub-folders")


# --- names --------------------------------------------------------------------------------------------------------


def test_digits() -> None:
    loaded = data.load("digits")
    assert loaded.shape == (1, 8, 8) and loaded.classes == 10 and len(loaded.x) == 1797
    assert float(loaded.x.min()) == -1 and float(loaded.x.max()) <= 1


def test_fashion() -> None:
    if not data.FASHION.is_dir():
        pytest.skip(f"{data.FASHION} is missing (Debian's dataset-fashion-mnist): the real IDX files were not read")
    loaded = data.load("fashion")
    assert loaded.x.shape == (60_000, 1, 28, 28) and loaded.classes == 10 and loaded.name == "fashion"
    assert float(loaded.x.min()) == -1 and float(loaded.x.max()) == 1
    assert loaded.y is not None and loaded.y.bincount().tolist() == [6000] * 10
    test = data.read_idx(data.FASHION, "fashion", "t10k")
    assert test.x.shape == (10_000, 1, 28, 28)


def test_unknown_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("nowhere") == "data: no file or folder 'nowhere' (bundled: digits)"
    monkeypatch.setattr(data, "FASHION", tmp_path / "gone")
    assert "Debian's package dataset-fashion-mnist puts it there" in refusal("fashion")


# --- Data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "every"), [(23, 5), (10, 2), (3, 5), (7, 7)])
def test_split_is_disjoint_and_complete(n: int, every: int) -> None:
    whole = Data("a", torch.arange(n * 2.0).reshape(n, 2), torch.arange(n))
    train, held_out = whole.split(every)
    assert train.y is not None and held_out.y is not None
    assert sorted(train.y.tolist() + held_out.y.tolist()) == list(range(n))
    assert len(held_out.x) == -(-n // every)
    for part in (train, held_out):
        assert part.y is not None and torch.equal(part.x, whole.x[part.y])
    assert Data("a", whole.x, None).split(every)[0].y is None


def test_fingerprint_changes_with_one_value() -> None:
    def print_of(x: torch.Tensor, y: torch.Tensor | None, name: str = "a") -> str:
        return Data(name, x, y).fingerprint()

    x, y = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    other_x, other_y = x.clone(), y.clone()
    other_x[3, 1] = torch.nextafter(x[3, 1], torch.tensor(9.0))
    other_y[4] = 0
    prints = [print_of(x, y), print_of(other_x, y), print_of(x, other_y), print_of(x, None), print_of(x.flip(0), y)]
    assert len(set(prints)) == 5
    assert print_of(x.clone(), y.clone(), "b") == prints[0]
