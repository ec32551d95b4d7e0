"""Folders for diffusers and for the Hugging Face Hub.

A one-step generator x = D(sigma z; sigma) in EDM's preconditioning *is* diffusers' ConsistencyModelPipeline: with
sigma_min = 0 and sigma_max = sigma, CMStochasticIterativeScheduler scales, skips and adds exactly as
`denoiser.Preconditioned` does, and its time is 1000 ln(sigma) / 4. So a student on a diffusers `UNet2DModel` becomes a
folder of nothing but the library's own parts.

Which students these are: `OneStep` over a `Preconditioned` denoiser with noise_unit 1, whose network keeps the
UNet2DModel in an attribute `unet` and calls it as unet(x, 1000 c_noise, label). All others, Limbeck's own networks
among them, get a folder with `pipeline.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.denoiser import Preconditioned
from limbeck.export.check import Probe, compare
from limbeck.generator import Generator, OneStep, calls_of

OPENING = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- one-step-generation
- diffusion-distillation
---

# A one-step generator

{about}

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this folder or repository"{trust})
images = pipeline(batch_size=4{label}).images
```

Images are {height} x {width} pixels. Made with Limbeck; `limbeck.json` says from what.
"""
PLAIN = (
    "diffusers' own ConsistencyModelPipeline with a UNet2DModel and one network call per image. It needs diffusers "
    "alone, and is made for one step: more would be a mistake."
)
CUSTOM = (
    "{calls} per image, by `pipeline.py` in this folder: it needs `limbeck` installed, and "
    "`trust_remote_code=True` lets diffusers run that file: read it first, it is short. The weights in `generator/` "
    'are read by Limbeck and cannot run code; `limbeck.load("generator/model.safetensors")` opens them without it.'
)


def write_hub(generator: Generator, card: Mapping[str, Any], folder: Path) -> tuple[float, int]:
    """Fill `folder` with the native format; returns what `compare` returns."""
    from limbeck.hub import HubGenerator, facts_of

    HubGenerator(generator, facts_of(card)).save_pretrained(folder)
    back = HubGenerator.from_pretrained(folder)
    return compare("hub", generator, lambda probe: back(probe.z, probe.cond))


def write_diffusers(generator: Generator, card: Mapping[str, Any], folder: Path) -> tuple[float, int]:
    """Fill `folder` with a pipeline that DiffusionPipeline.from_pretrained opens; returns what `compare` returns.

    Raises:
        ValueError: if the samples are no images, or the pipeline's images are not PyTorch's.
    """
    if len(generator.shape) != 3 or generator.shape[0] not in (1, 3, 4):
        raise ValueError(f"to: diffusers draws images (C, H, W) with 1, 3 or 4 channels, not {generator.shape}")
    plain = unet_of(generator)
    if plain is not None:
        checked = _write_consistency(generator, plain, folder)
    else:
        checked = _write_custom(generator, card, folder)
    _, height, width = generator.shape
    (folder / "README.md").write_text(
        OPENING.format(
            about=CUSTOM.format(calls=calls_of(generator).capitalize()) if plain is None else PLAIN,
            trust=", trust_remote_code=True" if plain is None else "",
            label=", class_labels=[0, 0, 0, 0]" if generator.classes else "",
            height=height,
            width=width,
        )
    )
    (folder / "limbeck.json").write_text(json.dumps(card, indent=1) + "\n")
    return checked


def unet_of(generator: Generator) -> Any:
    """The UNet2DModel of a generator that is a ConsistencyModelPipeline (rule in the module docstring), else None."""
    from diffusers import UNet2DModel

    if not isinstance(generator, OneStep) or not isinstance(generator.denoiser, Preconditioned):
        return None
    unet = getattr(generator.denoiser.network, "unet", None)
    times = getattr(generator.denoiser.network, "time_scale", 1000.0)  # of limbeck.networks.UNet2D
    plain = generator.denoiser.noise_unit == 1 and times == 1000
    return unet if isinstance(unet, UNet2DModel) and plain else None


def _write_consistency(generator: Any, unet: Any, folder: Path) -> tuple[float, int]:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DiffusionPipeline
    from diffusers.utils import logging

    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=2,
        sigma_min=0.0,
        sigma_max=generator.sigma,
        sigma_data=generator.denoiser.sigma_data,
        clip_denoised=False,
    )
    ConsistencyModelPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    finally:
        logging.enable_progress_bar()
    pipeline.set_progress_bar_config(disable=True)

    def run(probe: Probe) -> Tensor:
        # the pipeline takes ready noise for three channels only; from equal seeds it draws equal noise
        labels = None if probe.labels is None else probe.labels.tolist()
        source = torch.Generator().manual_seed(probe.seed)
        images: Tensor = pipeline(len(probe.z), labels, generator=source, output_type="pt").images
        return images

    return compare("diffusers", generator, run, unlabelled=False, seen=_seen)


def _write_custom(generator: Generator, card: Mapping[str, Any], folder: Path) -> tuple[float, int]:
    import diffusers

    from limbeck.export import pipeline as code
    from limbeck.hub import HubGenerator, facts_of

    parts = folder / "generator"
    HubGenerator(generator, facts_of(card)).save_pretrained(parts)
    (parts / "README.md").unlink()  # the folder's own is enough
    # diffusers looks for the class of a part in a file of the part's folder
    (parts / "part.py").write_text('from limbeck.hub import HubGenerator\n\n__all__ = ["HubGenerator"]\n')
    shutil.copyfile(str(code.__file__), folder / "pipeline.py")
    index = {
        "_class_name": ["pipeline", code.OneStepPipeline.__name__],
        "_diffusers_version": diffusers.__version__,
        "generator": ["part", HubGenerator.__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    pipeline: Any = code.OneStepPipeline(HubGenerator.from_pretrained(parts))

    def run(probe: Probe) -> Tensor:
        images: Tensor = pipeline(latents=probe.z, class_labels=probe.labels, output_type="pt").images
        return images

    return compare("diffusers", generator, run, seen=_seen)


def _seen(x: Tensor) -> Tensor:
    """Images in [-1, 1] as pipelines give them."""
    return (x / 2 + 0.5).clamp(0, 1)
