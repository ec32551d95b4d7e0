r"""DMD2 (Yin et al. 2024, arXiv:2405.14867): distribution matching with two time scales and a critic, no regression.

The generator descends the reverse KL divergence at noised levels with DMD's normaliser,

    E_p[w (D_fake - D_real) dx],   w = 1 / mean |x - D_real|,

and the softplus loss of a critic that reads the fake score's features at the same noised samples. The fake score takes
several turns for each of the generator.

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``game.fake_steps``    5, as the paper                             1: the paper without two time scales
``game.adversarial``   softplus, weight 3e-3, critic 1e-2, on      ``features = "teacher"``: one public port; the code's
                       features of the fake score                  weights are the same
``game.sigma_init``    2.5, as SiD                                 the code: 80 times the latent, whose first estimate
                                                                   is the data's mean
``levels``             log-normal, as the fake score's             the code: steps 2% to 98% of EDM's sampling levels,
                                                                   about ``levels = {stop = 0.98}``
fake score's loss      EDM's weight                                the code: 1 / sigma^2 + 1 / sd^2, which is the same
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from limbeck.critic import Adversarial
from limbeck.denoiser import Denoiser
from limbeck.game import Game
from limbeck.generator import Generator
from limbeck.losses import l1_scale, matching
from limbeck.noise import Law, LogNormal
from limbeck.objective import Batch, Turn
from limbeck.optimizer import Optimizer


@dataclass(frozen=True)
class DMD2:
    """Hyper-parameters of DMD2. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        levels: law of the noise in the generator's turn.
        game: what methods with a fake score share.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    warm_start: ClassVar[bool] = True
    steps: ClassVar[int] = 1000  # of six turns each

    levels: Law = field(default_factory=LogNormal)
    game: Game = field(default_factory=lambda: Game(fake_steps=5, adversarial=Adversarial(weight=3e-3)))

    @property
    def needs_real(self) -> bool:
        return self.game.adversarial is not None

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        return self.game.players(template, generator)

    def optimizers(self) -> dict[str, Optimizer]:
        return self.game.optimizers()

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        return self.game.turns(self.loss, step, images)

    def loss(
        self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch, call: int | None = None, judged: bool = True
    ) -> Tensor:
        """Distribution matching surrogate plus the adversarial loss, per sample (B,)."""
        view = self.game.view(nets, teacher, batch, self.levels, call, judged, graph=False)
        weight = l1_scale(view.x / teacher.unit, view.real / teacher.unit)
        return matching(view.x, view.fake, view.real, weight) / teacher.unit**2 + self.game.adversarial_loss(view)

    def health(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> dict[str, Tensor]:
        return self.game.health(nets, teacher, batch, self.levels)
