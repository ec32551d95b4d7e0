"""The EDM networks against recorded outputs, closed forms and published parameter counts.

The regression vectors in tests/data hold the weights, one input and the output of two tiny networks. Run this file as a
script to write them anew.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from limbeck.networks.adm import ADM
from limbeck.networks.edm_layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    PositionalEmbedding,
    interleaved_attention,
    xavier_uniform,
)
from limbeck.networks.songunet import SongUNet

DATA = Path(__file__).parent / "data"
GOLDEN = Path(os.environ.get("LIMBECK_GOLDEN", "golden")).absolute()  # tests change the folder
GOLDEN_NAMES = (
    "edm_adm_cond_multihead",
    "edm_adm_uncond_aug",
    "edm_ddpmpp_cond",
    "edm_ddpmpp_uncond_aug",
    "edm_ncsnpp_3level_gray",
    "edm_ncsnpp_cond_aug",
    "edm_song_skip_skip",
    "iddpm_adm_cond",
    "ve_ncsnpp_uncond",
    "vp_ddpmpp_uncond",
)
NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": (1, 3, 3, 1),
}
SMALL_SONG: dict[str, Any] = {
    "img_resolution": 8,
    "in_channels": 2,
    "out_channels": 3,
    "label_dim": 4,
    "augment_dim": 3,
    "model_channels": 8,
    "channel_mult": (1, 2, 1),
    "channel_mult_emb": 1,
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "dropout": 0.0,
}
SMALL_ADM: dict[str, Any] = SMALL_SONG | {"model_channels": 4, "channel_mult": (1, 16), "num_blocks": 0}
SMALL = {
    "ddpmpp": lambda **changes: SongUNet(**(SMALL_SONG | changes)),
    "ncsnpp": lambda **changes: SongUNet(**(SMALL_SONG | NCSNPP | changes)),
    "skip": lambda **changes: SongUNet(**(SMALL_SONG | {"encoder_type": "skip", "decoder_type": "skip"} | changes)),
    "adm": lambda **changes: ADM(**(SMALL_ADM | changes)),
}
CLASSES: dict[str, type[SongUNet] | type[ADM]] = {"songunet": SongUNet, "adm": ADM}


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of unit gain and unit-scale offsets, so that no layer is hidden by a zero initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        scale = 0.3 if p.ndim == 1 else math.prod(p.shape[1:]) ** -0.5
        p.data = (p.ndim == 1) * (p.data != 0) + scale * torch.randn(p.shape, generator=generator)
    return net


def inputs(net: nn.Module, batch: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    a = net.arguments
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, a["in_channels"], a["img_resolution"], a["img_resolution"], generator=generator)
    noise = torch.randn(batch, generator=generator)
    cond = torch.eye(a["label_dim"])[torch.randint(a["label_dim"], (batch,), generator=generator)]
    augment = torch.randn(batch, a["augment_dim"], generator=generator)
    return [tensor.to(dtype) for tensor in (x, noise, cond, augment)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Each sample agrees within `tolerance` of its own largest value."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1)
    assert error.max() <= tolerance


# Recorded outputs of the networks of Karras et al. (2022) -------------------------------------------------------------


def preconditioning(name: str, sigma: Tensor, state: dict[str, Tensor], sigma_data: float) -> tuple[Tensor, ...]:
    """c_skip, c_out, c_in, c_noise of Karras et al. (2022), table 1, each (B,)."""
    one = torch.ones_like(sigma)
    if name == "EDMPrecond":
        total = sigma_data**2 + sigma**2
        return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4
    if name == "VEPrecond":
        return one, sigma, one, (sigma / 2).log()
    c_in = 1 / (sigma**2 + 1).sqrt()
    if name == "VPPrecond":
        beta_d, beta_min = 19.9, 0.1
        time = ((beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt() - beta_min) / beta_d
        return one, -sigma, c_in, 999 * time
    assert name == "iDDPMPrecond"
    index = (sigma[:, None] - state["u"]).abs().argmin(dim=1)
    return one, -sigma, c_in, 999 - index.to(sigma.dtype)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@torch.no_grad()
def test_golden(name: str) -> None:
    path = GOLDEN / f"{name}.safetensors"
    if not GOLDEN.is_dir():
        pytest.skip("LIMBECK_GOLDEN does not name the folder of golden files of the EDM networks")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    arguments = json.loads(metadata["kwargs"])
    channels, sigma_data = arguments.pop("img_channels"), arguments.pop("sigma_data", 0.5)
    net_class = {"SongUNet": SongUNet, "DhariwalUNet": ADM}[arguments.pop("model_type")]
    outputs = 2 * channels if metadata["class"] == "iDDPMPrecond" else channels
    net = net_class(in_channels=channels, out_channels=outputs, **arguments).eval()
    weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    net.load_state_dict(weights)
    assert set(state) - {f"model.{key}" for key in weights} == ({"u"} if metadata["class"] == "iDDPMPrecond" else set())

    x, sigma, labels, augment = (tensors.get(key) for key in ("x", "sigma", "labels", "augment_labels"))
    assert x is not None and sigma is not None
    *scalings, c_noise = preconditioning(metadata["class"], sigma, state, sigma_data)
    c_skip, c_out, c_in = (c[:, None, None, None] for c in scalings)
    torch.testing.assert_close(c_noise, tensors["c_noise"], rtol=1e-6, atol=1e-6)
    assert_close(net(c_in * x, tensors["c_noise"], labels, augment), tensors["net_out"], 1e-5)

    for key, condition in {
        "y": (labels, augment),
        "y_no_label": (None, augment),
        "y_no_augment": (labels, None),
    }.items():
        if key in tensors:
            y = c_skip * x + c_out * net(c_in * x, c_noise, *condition)[:, :channels]
            assert_close(y, tensors[key], 1e-5)


# Structure ------------------------------------------------------------------------------------------------------------

CIFAR = {"img_resolution": 32, "channel_mult": (2, 2, 2), "augment_dim": 9, "dropout": 0.13}
FFHQ = CIFAR | {"img_resolution": 64, "channel_mult": (1, 2, 2, 2)}
TINY = {"img_resolution": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,), "augment_dim": 9}
COUNTS: list[tuple[type[SongUNet] | type[ADM], dict[str, Any], int, int | None]] = [
    (SongUNet, CIFAR, 55_733_891, 425),
    (SongUNet, CIFAR | {"label_dim": 10}, 55_735_299, 427),
    (SongUNet, CIFAR | NCSNPP, 56_397_827, 432),
    (SongUNet, CIFAR | NCSNPP | {"label_dim": 10}, 56_400_643, 434),
    (SongUNet, FFHQ, 61_805_571, 553),
    (SongUNet, FFHQ | NCSNPP, 62_761_091, 563),
    (ADM, {"img_resolution": 64, "label_dim": 1000}, 295_899_267, 553),
    (SongUNet, {"img_resolution": 32}, 61_804_419, None),
    (SongUNet, {"img_resolution": 32} | NCSNPP, 62_758_787, None),
    (ADM, {"img_resolution": 64, "label_dim": 1000, "out_channels": 6}, 295_904_454, None),
    (SongUNet, TINY | {"model_channels": 16}, 189_491, 147),
    (SongUNet, TINY | NCSNPP | {"model_channels": 16, "label_dim": 10}, 191_459, 153),
    (ADM, TINY | {"model_channels": 32, "label_dim": 7}, 828_675, 150),
]


@pytest.mark.parametrize(("net_class", "arguments", "parameters", "entries"), COUNTS)
def test_published_counts(
    net_class: type[SongUNet] | type[ADM], arguments: dict[str, Any], parameters: int, entries: int | None
) -> None:
    with torch.device("meta"):
        net = net_class(**({"in_channels": 3, "out_channels": 3} | arguments))
    assert sum(p.numel() for p in net.parameters()) == parameters
    if entries is not None:
        assert len(net.state_dict()) == entries


@pytest.mark.parametrize("kind", SMALL)
def test_arguments_rebuild_the_network(kind: str) -> None:
    net = SMALL[kind](label_dropout=0.25).eval()
    twin = CLASSES[net.name](**json.loads(json.dumps(net.arguments))).eval()
    assert twin.arguments == net.arguments
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(*inputs(net)), net(*inputs(net)))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("ddpmpp", {"img_resolution": 10}, "img_resolution=10.*multiple of 4"),
        ("ddpmpp", {"channel_mult": ()}, "channel_mult"),
        ("ddpmpp", {"model_channels": 14}, "14 channels cannot be normalised in 3 groups"),
        ("ddpmpp", {"model_channels": 2, "channel_mult_noise": 2}, "2 channels cannot be normalised"),
        ("ddpmpp", {"model_channels": 144}, "144 channels cannot be normalised in 32 groups"),
        ("ddpmpp", {"model_channels": 5}, "model_channels.*even"),
        ("ddpmpp", {"embedding_type": "zero"}, "embedding_type='zero'.*positional, fourier"),
        ("ddpmpp", {"encoder_type": "none"}, "encoder_type='none'"),
        ("ddpmpp", {"decoder_type": "residual"}, "decoder_type='residual'"),
        ("ddpmpp", {"resample_filter": (1, 2, 1)}, "resample_filter=.*even number"),
        ("ddpmpp", {"num_blocks": -1}, "num_blocks"),
        ("adm", {"dropout": 1.5}, "dropout=1.5"),
        ("adm", {"label_dropout": -0.1}, "label_dropout"),
        ("adm", {"img_resolution": 5}, "img_resolution=5"),
    ],
)
def test_bad_arguments(kind: str, changes: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        SMALL[kind](**changes)


@pytest.mark.parametrize("kind", ["ddpmpp", "adm"])
def test_bad_rows(kind: str) -> None:
    net = SMALL[kind]()
    x, noise, cond, augment = inputs(net)
    with pytest.raises(ValueError, match=r"cond: expected rows of shape \(B, 4\), got \(3, 3\)"):
        net(x, noise, cond[:, 1:], augment)
    with pytest.raises(ValueError, match="augment: expected rows"):
        net(x, noise, cond, augment[0])
    with pytest.raises(ValueError, match="cond: expected rows"):
        SMALL[kind](label_dim=0)(x, noise, cond)


# Initialisation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SMALL)
def test_one_seed_gives_one_network(kind: str) -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(SMALL[kind]().state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["enc.8x8_conv.weight"], states[2]["enc.8x8_conv.weight"])


def test_songunet_draws_in_state_dict_order() -> None:
    torch.manual_seed(5)
    net = SMALL["ncsnpp"]()
    torch.manual_seed(5)
    uniform = lambda *shape: torch.rand(*shape) * 2 - 1  # noqa: E731
    assert torch.equal(net.map_noise.freqs, torch.randn(8) * 16)
    assert torch.equal(net.map_label.weight, math.sqrt(6 / (4 + 16)) * uniform(16, 4))
    uniform(16)  # the bias is drawn although its gain is zero
    assert torch.equal(net.map_augment.weight, math.sqrt(6 / (3 + 16)) * uniform(16, 3))
    assert torch.equal(net.map_layer0.weight, math.sqrt(6 / (16 + 8)) * uniform(8, 16))


def test_adm_draws_in_state_dict_order() -> None:
    torch.manual_seed(5)
    net = SMALL["adm"]()
    torch.manual_seed(5)
    uniform = lambda *shape: torch.rand(*shape) * 2 - 1  # noqa: E731
    uniform(4, 3)  # map_augment is drawn although its gain is zero
    for layer in (net.map_layer0, net.map_layer1):
        torch.testing.assert_close(layer.weight.data, uniform(4, 4) / 2, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.bias.data, uniform(4) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(net.map_label.weight.data, torch.randn(4, 4), rtol=1e-6, atol=0)
    torch.testing.assert_close(net.enc["8x8_conv"].weight.data, uniform(4, 2, 3, 3) / math.sqrt(18), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", SMALL)
def test_zero_layers(kind: str) -> None:
    net = SMALL[kind]()
    for key, p in net.named_parameters():
        layer, field = key.split(".")[-2:]
        closing = layer in ("conv1", "proj", "out_conv") or layer.endswith("aux_conv")
        if layer.endswith(("norm0", "norm1", "norm2", "aux_norm", "out_norm")):
            assert torch.all(p == (field == "weight")), key
        elif net.name == "adm":
            zero = closing or layer == "map_augment"
            assert torch.all(p == 0) if zero else p.abs().min() > 0, key
        elif field == "bias":
            assert torch.all(p == 0), key
        else:
            fan_in, fan_out = (math.prod(p.shape[2:]) * n for n in (p.shape[1], p.shape[0]))
            gain = 1e-5 if closing else math.sqrt(0.2) if layer == "qkv" else 1
            bound = gain * math.sqrt(6 / (fan_in + fan_out))
            assert 0.7 * bound < p.abs().max() <= bound * (1 + 1e-6), key
    if net.name == "adm":
        assert torch.all(net(*inputs(net)) == 0)


# Layers ---------------------------------------------------------------------------------------------------------------


def test_box_filter_repeats_and_averages() -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    up = Conv2d(3, 3, 0, init=None, up=True)(x)
    assert torch.equal(up, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    torch.testing.assert_close(Conv2d(3, 3, 0, init=None, down=True)(x), F.avg_pool2d(x, 2), rtol=0, atol=1e-15)


def test_four_taps_attenuate_the_border() -> None:
    ones = torch.ones(1, 2, 6, 6, dtype=torch.float64)
    for direction, edge, side in (("up", 3 / 4, 12), ("down", 7 / 8, 3)):
        profile = torch.ones(side, dtype=torch.float64)
        profile[0] = profile[-1] = edge
        out = Conv2d(2, 2, 0, init=None, resample_filter=(1, 3, 3, 1), **{direction: True})(ones)
        assert torch.equal(out, profile.outer(profile).expand(1, 2, -1, -1))


def test_filter_last_differs_from_filter_first_by_the_frame() -> None:
    torch.manual_seed(0)
    first, last = (
        Conv2d(2, 2, 3, init=Init(xavier_uniform), down=True, filter_last=flag, resample_filter=(1, 3, 3, 1)).double()
        for flag in (False, True)
    )
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        last.bias.fill_(0.7)
        # Convolution in full, then the filter in full, then every second pixel: no frame cuts in between.
        kernel = last.weight.flip(2, 3).transpose(0, 1)
        full = F.conv_transpose2d(F.conv_transpose2d(x, kernel), last.resample_filter.expand(2, 1, -1, -1), groups=2)
        expected = full[:, :, 3:-3:2, 3:-3:2] + 0.7
        torch.testing.assert_close(last(x), expected, rtol=0, atol=1e-12)
        first.weight.zero_()
        first.weight[:, :, 1, 1] = torch.eye(2, dtype=torch.float64)
        last.weight.copy_(first.weight)
        torch.testing.assert_close(last(x) - 0.7, first(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_of_interleaved_heads(heads: int) -> None:
    d, pixels = 4, 6
    qkv = torch.randn(2, 3 * heads * d, 2, 3, dtype=torch.float64)
    flat = qkv.reshape(2, -1, pixels)
    out = interleaved_attention(qkv, heads).reshape(2, -1, pixels)
    for b in range(2):
        for h in range(heads):
            q, k, v = (torch.stack([flat[b, 3 * (h * d + c) + s] for c in range(d)]) for s in range(3))
            weights = (q.T @ k / math.sqrt(d)).softmax(dim=1)
            torch.testing.assert_close(out[b, h * d : (h + 1) * d], v @ weights.T, rtol=0, atol=1e-13)


def test_embeddings() -> None:
    c = torch.tensor([-1.7, 0.3, 950.0], dtype=torch.float64)
    for endpoint, n in ((True, 3), (False, 4)):
        angles = [[value * 10 ** (-4 * i / n) for i in range(4)] for value in c.tolist()]
        expected = torch.tensor([[*map(math.cos, row), *map(math.sin, row)] for row in angles], dtype=torch.float64)
        actual = PositionalEmbedding(8, endpoint=endpoint)(c)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    fourier = FourierEmbedding(8)
    angles = [[2 * math.pi * f * value for f in fourier.freqs.tolist()] for value in c.tolist()]
    expected = torch.tensor([[*map(math.cos, row), *map(math.sin, row)] for row in angles], dtype=torch.float64)
    torch.testing.assert_close(fourier(c), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (16, 4), (48, 12), (128, 32), (512, 32)])
def test_groups(channels: int, groups: int) -> None:
    assert GroupNorm(channels, eps=1e-6).groups == groups


def test_adm_blocks_below_64_channels_have_no_attention() -> None:
    net = SMALL["adm"](attn_resolutions=(8, 4))
    keys = net.state_dict()
    assert net.dec["4x4_in0"].heads == 0 and "dec.4x4_in0.qkv.weight" not in keys
    assert net.dec["4x4_block0"].heads == 1 and "dec.4x4_block0.qkv.weight" in keys


def test_first_layers() -> None:
    song, adm = SMALL["ddpmpp"](channel_mult=(2, 1)), SMALL["adm"](channel_mult=(2, 16))
    assert song.enc["8x8_conv"].out_channels == 8 and adm.enc["8x8_conv"].out_channels == 8  # B and 2 B
    assert song.map_noise.endpoint and not adm.map_noise.endpoint


# Behaviour of whole networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_regression(name: str) -> None:
    path = DATA / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        arguments = json.loads(file.metadata()["arguments"])
    tensors = load_file(path)
    net = CLASSES[name](**arguments).eval()
    net.load_state_dict({k.removeprefix("state."): v.float() for k, v in tensors.items() if k.startswith("state.")})
    out = net(*(tensors[key] for key in ("x", "noise", "cond", "augment")))
    assert_close(out, tensors["out"], 1e-5)


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_none_means_zero_rows(kind: str) -> None:
    net = randomise(SMALL[kind]()).eval()
    x, noise, cond, augment = inputs(net)
    given = net(x, noise, cond, augment)
    assert torch.equal(net(x, noise, None, augment), net(x, noise, torch.zeros_like(cond), augment))
    assert torch.equal(net(x, noise, cond, None), net(x, noise, cond, torch.zeros_like(augment)))
    assert (given - net(x, noise, None, augment)).abs().max() > 0.01
    assert (given - net(x, noise, cond, None)).abs().max() > 0.01


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_one_noise_level_serves_the_batch(kind: str) -> None:
    net = randomise(SMALL[kind]()).eval()
    x, noise, cond, _ = inputs(net)
    for rows in (None, cond):
        assert_close(net(x, noise[:1], rows), net(x, noise[:1].expand(3), rows), 1e-6)


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_label_dropout_acts_in_training_only(kind: str) -> None:
    net = randomise(SMALL[kind](label_dropout=0.5))
    x, noise, cond, augment = (tensor[:1].expand(64, *tensor.shape[1:]) for tensor in inputs(net))
    with_label, without = (net.eval()(x[:1], noise[:1], c, augment[:1]) for c in (cond[:1], None))
    assert_close(net(x, noise, cond, augment), with_label.expand(64, -1, -1, -1), 1e-5)
    torch.manual_seed(0)
    out = net.train()(x, noise, cond, augment)
    dropped = [
        (out[i] - without[0]).abs().max().item() < (out[i] - with_label[0]).abs().max().item() for i in range(64)
    ]
    expected = torch.where(torch.tensor(dropped)[:, None, None, None], without, with_label)
    assert_close(out, expected, 1e-5)
    torch.manual_seed(0)
    assert dropped == (torch.rand(64) < 0.5).tolist()


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_dropout_acts_in_training_only(kind: str) -> None:
    plain, dropping = randomise(SMALL[kind]()), randomise(SMALL[kind](dropout=0.5))
    dropping.load_state_dict(plain.state_dict())
    args = inputs(plain)
    assert torch.equal(dropping.eval()(*args), plain.train()(*args))
    assert not torch.equal(dropping.train()(*args), plain(*args))


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_float64_agrees_with_float32(kind: str) -> None:
    net = randomise(SMALL[kind]()).eval()
    args = inputs(net)
    single = net(*args)
    net.double()
    double = net(*(arg.double() for arg in args))
    assert double.dtype == torch.float64
    # Fourier phases of a few hundred radians carry the float32 round-off of c_noise times frequency.
    assert_close(single.double(), double, 1e-4 if kind == "ncsnpp" else 1e-5)
    assert torch.equal(net(args[0].double(), *args[1:]), double)


@pytest.mark.parametrize("kind", ["ncsnpp", "adm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_images_with_float32_weights(kind: str, dtype: torch.dtype) -> None:
    net = randomise(SMALL[kind]()).eval()
    x, *rest = inputs(net)
    assert net.embed(*rest, batch=3).dtype == torch.float32
    out = net(x.to(dtype), *rest)
    assert out.dtype == dtype
    assert_close(out.float(), net(x, *rest), 30 * torch.finfo(dtype).eps)
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("kind", SMALL)
def test_gradients(kind: str) -> None:
    net = randomise(SMALL[kind]()).double()
    x, *rest = inputs(net, dtype=torch.float64)
    x.requires_grad_()
    weight = torch.randn(net(x, *rest).shape, dtype=torch.float64)
    (net(x, *rest) * weight).sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, key

    # One random direction through the input and all parameters, against a central difference.
    leaves = [x, *net.parameters()]
    directions = [torch.randn_like(leaf) for leaf in leaves]
    slope = sum((leaf.grad * direction).sum().item() for leaf, direction in zip(leaves, directions, strict=True))
    h, values = 1e-5, []
    with torch.no_grad():
        for step in (h, -2 * h):
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf += step * direction
            values.append((net(x, *rest) * weight).sum().item())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(slope, rel=1e-5)


# torch.func compiles its decompositions with torch.jit on first use.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["ncsnpp", "adm"])
def test_forward_mode_and_double_backward_with_the_math_backend(kind: str) -> None:
    net = randomise(SMALL[kind]()).double().requires_grad_(False).eval()
    x, *rest = inputs(net, dtype=torch.float64)
    v = torch.randn_like(x)
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(lambda x: net(x, *rest), (x,), (v,))
        w = torch.randn_like(tangent)
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((net(y, *rest) * w).sum(), y, create_graph=True)
        (curvature,) = torch.autograd.grad((gradient * v).sum(), y)
    assert (tangent * w).sum().item() == pytest.approx((gradient * v).sum().item(), rel=1e-9)
    assert curvature.isfinite().all() and curvature.abs().max() > 0


if __name__ == "__main__":
    for kind, name in (("ncsnpp", "songunet"), ("adm", "adm")):
        net = randomise(SMALL[kind]()).eval()
        state = {f"state.{key}": value.half() for key, value in net.state_dict().items()}
        net.load_state_dict({key.removeprefix("state."): value.float() for key, value in state.items()})
        args = inputs(net)
        with torch.no_grad():
            record = dict(zip(("x", "noise", "cond", "augment"), args, strict=True)) | {"out": net(*args)}
        save_file(state | record, DATA / f"{name}.safetensors", {"arguments": json.dumps(net.arguments)})
