"""`limbeck replay`: play the turn again that met NaN or Inf, with a witness at every module.

A run that meets one keeps the turn: all weights as they were before it, its batches, its losses. Replayed, it gives the
same losses bit for bit (on the same build and number of threads), and the first module that makes something infinite of
finite inputs is named; or, where all losses are finite, the operation whose gradient is not.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import checkpoint, config, loop, methods, run
from limbeck.denoiser import Denoiser
from limbeck.folder import Tell
from limbeck.generator import Generator
from limbeck.machine import versions
from limbeck.objective import Batch, Pairs
from limbeck.train import NonFinite, Trainer

SHOWN = 5  # names in one line


@dataclass(frozen=True)
class Found:
    """What a replay has found.

    Attributes:
        step, turn, players: which turn.
        reproduced: are the losses those of the run, bit for bit?
        samples: rows of the batch whose loss is not finite, of `count`.
        weights: tensors that were not finite before the turn, as PLAYER.NAME.
        inputs: fields of the batch that are not finite.
        origin: the module that first made something infinite of finite inputs, "" if none did.
        gradients: parameters with a gradient that is not finite, as PLAYER.NAME.
        operation: what autograd says of the first such gradient, where all losses are finite.
    """

    step: int
    turn: int
    players: tuple[str, ...]
    reproduced: bool
    samples: list[int]
    count: int
    weights: list[str]
    inputs: list[str]
    origin: str
    gradients: list[str]
    operation: str

    def table(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        told = [
            f"step {self.step}, turn {self.turn} of {'+'.join(self.players)}: "
            f"{'the same losses, bit for bit' if self.reproduced else 'OTHER losses than in the run'}",
            f"losses that are not finite: {len(self.samples)} of {self.count}{_some(self.samples)}",
        ]
        for what, names in (
            ("weights that were not finite before", self.weights), ("inputs that are not finite", self.inputs),
            ("parameters whose gradient is not finite", self.gradients),
        ):  # fmt: skip
            if names:
                told.append(f"{what}: {len(names)}{_some(names)}")
        if self.origin:
            told.append(f"where it begins: {self.origin}")
        if self.operation:
            told.append(f"where it begins: {self.operation}")
        return told


def _some(names: list[Any]) -> str:
    shown = ", ".join(str(name) for name in names[:SHOWN])
    return f" ({shown}{', ...' if len(names) > SHOWN else ''})" if names else ""


def replay(
    out: Path,
    tell: Tell,
    teacher: Denoiser | None = None,
    network: type[nn.Module] | None = None,
    generator: Generator | None = None,
    place: str | None = None,
    method: str | None = None,
) -> Found:
    """Play the kept turn of the run in `out` again. Nothing is written.

    Args:
        tell: receives warnings.
        teacher: the denoiser that the run was given, if it was none that a name or file says.
        network: the caller's own class, as in `run.distill`.
        generator: the generator that the run was given, likewise.
        place: the device, if not that of the recipe.
        method: the caller's own method, "package.module:Class", if the run had one: a recipe's word runs no code.

    Raises:
        ValueError: if there is no turn to replay, or it is that of another teacher, data set or generator.
    """
    if not (out / "recipe.toml").is_file():
        raise ValueError(f"{out}: not a run folder, it has no recipe.toml")
    if not (out / loop.NONFINITE).is_dir():
        raise ValueError(f"{out}: no turn to replay; a run keeps one when it meets NaN or Inf")
    table = config.read_toml(out / "recipe.toml") | ({} if place is None else {"device": place})
    table.pop("evaluate", None)  # nothing is scored, and no feature network run that the folder's maker names
    named = table["method"]["name"] if isinstance(table.get("method"), dict) else None
    if method not in (None, named):
        raise ValueError(f"method: the run in {out} has {named}")
    if "data" in table:
        job = run.teaching(config.resolve(table, config.TEACHING), out, network)
    else:
        recipe = config.resolve(table, methods.METHODS, foreign=method is not None)
        job = run.distillation(recipe, out, tell, teacher, network, generator=generator)
    state = checkpoint.load_newest(out / loop.NONFINITE, tell, partial(loop.load_state, job))
    if state is None:
        raise ValueError(f"{out}: no turn to replay; a run keeps one when it meets NaN or Inf")
    if not job.began_with(state["identity"]):
        raise ValueError(f"{out}: the turn was played with another teacher, data set or generator of the same name")
    torch.set_num_threads(int(state["threads"]))
    if state["versions"] != versions():
        tell(f"versions: {state['versions']} in the run, {versions()} now; losses may differ in the last bits")
    trainer: Trainer = job.trainer
    if state.get("device", trainer.device.type) != trainer.device.type:
        tell(f"device: {state['device']} in the run, {trainer.device.type} now; losses may differ in the last bits")
    loop.restore(job, state)
    index = int(state["turn"])
    turn = list(trainer.objective.turns(trainer.step, trainer.images))[index]
    batches = [_batch(state["batches"][str(k)]).to(trainer.device) for k in range(len(state["batches"]))]
    everyone: dict[str, nn.Module] = {**trainer.nets, "teacher": trainer.teacher}
    broken = [
        f"{player}.{name}"
        for player, net in everyone.items()
        for name, tensor in net.state_dict().items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    inputs = {f.name for b in batches for f in dataclasses.fields(b) if _is_bad(getattr(b, f.name))}
    witness = Witness()
    with witness.at(everyone, turn.players):
        losses = _play(trainer, index, turn, batches)
    bad = [] if losses is None else torch.nonzero(~losses.isfinite())[:, 0].tolist()
    return Found(
        trainer.step, index, turn.players,
        losses is not None and torch.equal(losses.view(torch.uint8), state["losses"].view(torch.uint8)),
        bad, sum(len(b.z) for b in batches), broken, sorted(inputs), witness.origin, sorted(witness.gradients),
        "" if bad or losses is None else _operation(trainer, index, turn, batches),
    )  # fmt: skip


def _batch(tensors: Mapping[str, Tensor]) -> Batch:
    plain: dict[str, Any] = {name: value for name, value in tensors.items() if not name.startswith("pairs.")}
    pairs = None
    if "pairs.z" in tensors:
        pairs = Pairs(tensors["pairs.z"], tensors["pairs.x"], tensors.get("pairs.cond"))
    return Batch(**plain, pairs=pairs)


def _play(trainer: Trainer, index: int, turn: Any, batches: list[Batch]) -> Tensor | None:
    """The losses (B,) of the turn; None if all is finite now."""
    try:
        trainer.play(index, turn, batches, {})
    except NonFinite as error:
        return error.losses.cpu()
    return None


def _operation(trainer: Trainer, index: int, turn: Any, batches: list[Batch]) -> str:
    """What autograd's own search says."""
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("ignore")
        try:
            trainer.play(index, turn, batches, {})
        except NonFinite:
            return "the sum of finite gradients is not finite"
        except RuntimeError as error:
            return str(error)
    return ""


@dataclass
class Witness:
    """Sees what goes into modules and comes out of them, and gradients of parameters."""

    origin: str = ""
    gradients: set[str] = field(default_factory=set)

    @contextmanager
    def at(self, nets: Mapping[str, nn.Module], players: tuple[str, ...]) -> Iterator[None]:
        """Stand beside all modules of `nets`, and the parameters of `players`."""
        with ExitStack() as stack:
            for player, net in nets.items():
                for name, module in net.named_modules():
                    hook = module.register_forward_hook(self._seen(f"{player}.{name}".rstrip(".")))
                    stack.callback(hook.remove)
            for player in players:
                for name, parameter in nets[player].named_parameters():
                    parameter.requires_grad_(True)  # a hook needs it; the turn sets it anyway
                    hook = parameter.register_hook(self._descended(f"{player}.{name}"))
                    stack.callback(hook.remove)
            yield

    def _seen(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self.origin or not _is_bad(output) or any(map(_is_bad, inputs)):
                return
            rows = ~output.flatten(1).isfinite().all(1) if isinstance(output, Tensor) and output.ndim > 1 else None
            where = f", rows {rows.nonzero()[:, 0].tolist()[:SHOWN]} of {len(rows)}" if rows is not None else ""
            level = ""
            if isinstance(module, Denoiser) and rows is not None and isinstance(inputs[1], Tensor):
                levels = inputs[1].expand(len(rows))[rows]
                level = f", at sigma {float(levels.min()):.3g} to {float(levels.max()):.3g}"
            weights = [n for n, p in module.named_parameters() if _is_bad(p)]
            why = f", its weights {', '.join(weights[:SHOWN])} are not finite" if weights else ""
            self.origin = f"{name} ({type(module).__name__}): finite inputs, output not{where}{level}{why}"

        return hook

    def _descended(self, name: str) -> Any:
        def hook(gradient: Tensor) -> None:
            if not gradient.isfinite().all():
                self.gradients.add(name)

        return hook


def _is_bad(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_is_bad, value))
    return isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all())
