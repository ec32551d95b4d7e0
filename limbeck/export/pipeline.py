"""A Limbeck generator as a diffusers pipeline. `limbeck export --to diffusers` puts this file into its folder.

It needs torch, diffusers and limbeck. The weights lie in generator/, in Limbeck's own format, which cannot run code.
"""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class OneStepPipeline(DiffusionPipeline):
    """Images with one network call.

    Args:
        generator: called as generator(z, cond) with z ~ N(0, I) and one-hot rows cond.
    """

    def __init__(self, generator: torch.nn.Module) -> None:
        super().__init__()
        self.register_modules(generator=generator)

    def save_pretrained(self, *arguments: object, **keys: object) -> None:
        """Refused: diffusers would leave the weights out. Copy the folder, or call generator.save_pretrained."""
        raise NotImplementedError("copy the folder that this pipeline came from; diffusers cannot store its generator")

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: torch.Tensor | list[int] | int | None = None,
        num_inference_steps: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[object]:
        """Draw images.

        Args:
            batch_size: how many; `latents`, if given, decides.
            class_labels: a class for each image or for all, -1 for none; by default drawn at random.
            num_inference_steps: 1.
            generator: source of the noise.
            latents: the noise z ~ N(0, I) itself.
            output_type: "pil", "np" (n, H, W, C) in [0, 1] or "pt" (n, C, H, W) in [0, 1].

        Raises:
            ValueError: for other steps, classes or output types.
        """
        if num_inference_steps != 1:
            raise ValueError(f"num_inference_steps: this generator takes 1 step, got {num_inference_steps}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type: must be pil, np or pt, got {output_type!r}")
        net = self.generator
        if latents is None:
            latents = randn_tensor((batch_size, *net.latent_shape), generator, net.device, net.dtype)
        cond = self._rows(class_labels, len(latents), generator) if net.classes else None
        images = (net(latents.to(net.device, net.dtype), cond) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _rows(
        self,
        labels: torch.Tensor | list[int] | int | None,
        n: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """One-hot rows (n, classes); zeros for label -1."""
        classes, device, dtype = self.generator.classes, self.generator.device, self.generator.dtype
        if labels is None:
            source = generator[0] if isinstance(generator, list) else generator
            place = "cpu" if source is None else source.device
            labels = torch.randint(classes, (n,), generator=source, device=place)
        labels = torch.as_tensor(labels, device="cpu").reshape(-1)
        if len(labels) not in (1, n) or labels.min() < -1 or labels.max() >= classes:
            raise ValueError(f"class_labels: expected 1 or {n} of the classes 0 to {classes - 1} (-1: none)")
        return torch.eye(classes + 1, classes)[labels.expand(n)].to(device, dtype)
