"""PID trained: short forms of what `make accept` checks at full length."""

import torch

from limbeck.denoiser import Preconditioned
from limbeck.evaluate import ExactJudge, measure
from limbeck.exact import Mixture
from limbeck.generator import Generator
from limbeck.methods.pid import PID
from limbeck.networks.mlp import MLP
from limbeck.noise import Karras
from limbeck.optimizer import Optimizer
from limbeck.sample import euler
from limbeck.source import NoiseSource
from limbeck.teachers import ring8
from limbeck.train import Trainer


def trained(method: PID, teacher: Mixture, steps: int, lr: float, seed: int = 0) -> Generator:
    torch.manual_seed(seed)
    template = Preconditioned(MLP(teacher.shape), teacher.shape, 0, teacher.sigma_data)
    settings = {"generator": Optimizer("adam", lr=lr, betas=(0.9, 0.99), schedule="cosine")}
    trainer = Trainer(method, teacher, template, settings, steps=steps, seed=seed)
    source = NoiseSource(teacher.shape, teacher.shape, 128, seed, stratified=True)
    for _ in range(steps):
        trainer.advance(source)
    student = trainer.ema.module
    assert isinstance(student, Generator)
    return student


def test_the_trained_student_is_the_euler_solution_not_the_ode():
    # at N = 10 the two differ by 0.166 rms on this mixture, far more than the error of a short training
    teacher = Mixture([0.4, 0.6], [[-1.0], [0.5]], [0.2, 0.3])
    student = trained(PID(N=10), teacher, 1000, 4e-3)
    z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1))
    levels = Karras().scaled(teacher.unit)
    with torch.no_grad():
        x = student(z)
    coarse = euler(teacher, z, sigmas=levels.grid(10)[:-1])
    fine = euler(teacher, z, sigmas=levels.grid(4000)[:-1])
    to_euler, to_ode = (x - coarse).pow(2).mean().sqrt(), (x - fine).pow(2).mean().sqrt()
    assert (coarse - fine).pow(2).mean().sqrt() > 0.12
    assert to_euler < 0.3 * to_ode, (to_euler, to_ode)


def test_ring8_in_a_short_run():
    teacher = ring8()
    # an eighth of the default run's samples on a coarser grid; `make accept` has the full bounds
    student = trained(PID(N=35), teacher, 1200, 4e-3)
    scores = measure(student, 1, ExactJudge(teacher), (2,), 0, samples=5000).metrics
    shares = [scores[f"share_{k}"] for k in range(8)]
    assert scores["mmd"] < 0.08, scores
    assert 0.03 < min(shares) <= max(shares) < 0.2, shares
