"""diffusers pipelines on disk as teachers: a `UNet2DModel` read by its scheduler's own numbers (extra `hub`).

A discrete model is trained on x_t = alpha_t x_0 + sigma_t eps at whole steps t with alpha_t^2 = alphas_cumprod[t]. It
becomes `Rescaled`: sigma = sigma_t / alpha_t picks the time, fractional between two steps (`schedule.Alphas`); a table
of time embeddings, which has whole steps only, takes the nearest. An EDM scheduler's model is `Preconditioned`.

Nothing is downloaded, and weights are read from safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.denoiser import Denoiser, Output, Preconditioned, Rescaled
from limbeck.networks.unet2d import UNet2D
from limbeck.schedule import Alphas

DISCRETE = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)  # fmt: skip
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
OUTPUTS: dict[str, Output] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def load(folder: Path) -> Denoiser:
    """The teacher of a pipeline folder (model_index.json, unet/, scheduler/), in eval mode.

    Labels are the one-hot rows of the model's classes. A zero row adds no class embedding: a model that was trained
    with a class of its own for "no label" has it among its classes.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    index = _json(folder / "model_index.json")
    parts = {key: part[1] for key, part in index.items() if isinstance(part, list) and len(part) == 2 and part[1]}
    if parts.get("unet") != "UNet2DModel" or set(parts) != {"unet", "scheduler"}:
        found = ", ".join(f"{key} {part}" for key, part in sorted(parts.items()))
        raise ValueError(f"teacher: {folder} must hold a UNet2DModel and a scheduler and nothing else, found {found}")
    network = _unet(folder / "unet")
    settings = _json(folder / "scheduler" / "scheduler_config.json")
    shape = _shape(network.arguments["config"], folder / "unet" / "config.json")
    try:
        teacher = denoiser(
            network, parts["scheduler"], settings, shape, network.arguments["config"]["num_class_embeds"]
        )
    except ValueError as error:
        raise ValueError(f"{folder / 'scheduler'}: {error}") from None
    return teacher.eval()


def denoiser(
    network: nn.Module, scheduler: Any, settings: Mapping[str, Any], shape: tuple[int, ...], classes: int | None = None
) -> Denoiser:
    """`network(x, time, cond)` as the denoiser that a diffusers scheduler makes of it.

    Args:
        scheduler: name of the scheduler's class.
        settings: its configuration.

    Raises:
        ValueError: for a scheduler or a kind of output that is not supported.
    """
    if scheduler not in DISCRETE + EDM:
        raise ValueError(f"{scheduler} is not supported, expected one of {', '.join(DISCRETE + EDM)}")
    predicts = settings.get("prediction_type", "epsilon")
    if scheduler in EDM:
        sigma_data, low, high = (float(settings.get(key, value)) for key, value in _EDM_DEFAULTS.items())
        if predicts != "epsilon":
            raise ValueError(f"prediction_type {predicts!r} of {scheduler} is not supported, only 'epsilon'")
        return Preconditioned(network, shape, classes or 0, sigma_data, low, high, noise_unit=1.0)
    if predicts not in OUTPUTS:
        raise ValueError(f"prediction_type {predicts!r} is not supported, expected one of {', '.join(OUTPUTS)}")
    import diffusers

    alphas = getattr(diffusers, scheduler).from_config(dict(settings)).alphas_cumprod
    steps = Alphas(tuple(alphas.tolist()))
    return Rescaled(network, steps, OUTPUTS[predicts], shape, classes or 0, 0.5, *steps.ratios)


_EDM_DEFAULTS = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}


def _unet(folder: Path) -> UNet2D:
    weights = folder / "diffusion_pytorch_model.safetensors"
    if not weights.is_file() and not (folder / f"{weights.name}.index.json").is_file():
        raise ValueError(
            f"{folder}: has no {weights.name}; Limbeck opens no .bin file, which can run code: save the pipeline again "
            "with safe_serialization=True"
        )
    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise ValueError("teacher: diffusers: needs the diffusers library; pip install 'limbeck[hub]'") from None
    try:
        found: Any = UNet2DModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # whatever the library and its parsers meet in a damaged folder
        raise ValueError(f"{folder}: not a readable UNet2DModel ({' '.join(str(error).split())})") from None
    unet, told = found
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[what]:
            raise ValueError(f"{folder}: {sorted(map(str, told[what]))[0]} is one of its {what.replace('_', ' ')}")
    for name, tensor in unet.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{folder}: {name} contains NaN or Inf")
    settings = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        network = UNet2D(settings, time_scale=1.0)
    network.unet.load_state_dict(unet.state_dict())
    return network


def _shape(settings: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    size, channels = settings["sample_size"], settings["in_channels"]
    if channels != settings["out_channels"]:
        raise ValueError(f"{path}: a learned variance (out_channels {settings['out_channels']}) is not supported")
    if not size:
        raise ValueError(f"{path}: sample_size is missing")
    height, width = (size, size) if isinstance(size, int) else size
    return channels, int(height), int(width)


def _json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
        if not isinstance(table, dict):
            raise ValueError("is not a table")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    return table
