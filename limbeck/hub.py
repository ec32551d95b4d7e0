"""Generators on the Hugging Face Hub, in Limbeck's own format.

A folder holds model.safetensors, one of Limbeck's files with its card, config.json, the same card to read, and
README.md. Only model.safetensors is opened, by `artifact`: no file of the folder is ever executed, and a folder from a
stranger can do no more than any other file.

>>> from limbeck.hub import HubGenerator                                            # doctest: +SKIP
>>> HubGenerator(limbeck.load("runs/first")).push_to_hub("me/digits")               # doctest: +SKIP
>>> generator = HubGenerator.from_pretrained("me/digits")                           # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck import artifact
from limbeck.generator import Generator, calls_of

try:
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"limbeck.hub needs {error.name}: pip install 'limbeck[hub]'") from None

README = """---
library_name: limbeck
tags:
- one-step-generation
- diffusion-distillation
- model_hub_mixin
- pytorch_model_hub_mixin
---

# A one-step generator

Made with Limbeck: samples of shape {shape} from noise with {calls}. `config.json` says where it comes from.

```python
import torch
from limbeck.hub import HubGenerator

generator = HubGenerator.from_pretrained("this folder or repository")
x = generator(torch.randn(16, *generator.latent_shape))
```

`limbeck.load("model.safetensors")` opens the file without the Hub's packages. Nothing here is executed.
"""


class HubGenerator(Generator, PyTorchModelHubMixin, library_name="limbeck"):
    """A generator with the Hub's `save_pretrained`, `push_to_hub` and `from_pretrained`.

    Args:
        generator: any generator that Limbeck can store.
        facts: what its file shall say beside the card (recipe, scores).
    """

    def __init__(self, generator: Generator, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.generator, self.facts = generator, dict(facts or {})
        self.shape, self.latent_shape = generator.shape, generator.latent_shape
        self.classes, self.contexts, self.nfe = generator.classes, generator.contexts, generator.nfe

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.generator(z, cond)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return next(self.parameters()).dtype

    def _save_pretrained(self, save_directory: Path) -> None:
        file = save_directory / "model.safetensors"
        artifact.save(file, "generator", self.generator, self.facts)
        (save_directory / "config.json").write_text(json.dumps(artifact.read_card(file), indent=1) + "\n")
        (save_directory / "README.md").write_text(README.format(shape=self.shape, calls=calls_of(self)))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **download: Any) -> HubGenerator:
        path = Path(model_id) / "model.safetensors"
        if not Path(model_id).is_dir():
            keys = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            path = Path(hf_hub_download(model_id, path.name, **{key: download[key] for key in keys}))
        generator = artifact.load(path, "generator")
        return cls(generator, facts_of(artifact.read_card(path))).eval()


def facts_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a file's card says beside the format and the network."""
    return {key: value for key, value in card.items() if key not in ("format", "kind", "card", "sha256")}
