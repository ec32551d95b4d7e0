"""The trainer plays an objective's turns. It owns the players, their optimisers, the moving average and the counters.

It does not log, evaluate or save, and it knows no method by name:

    trainer = Trainer(PID(), teacher, template, seed=0, steps=1000)
    for _ in range(1000):
        losses = trainer.advance(source)

`source(step, turn)` yields the micro-batches of one turn. A turn's gradient is the mean over all their samples, so that
k micro-batches are one batch. Under `torchrun` every process plays its own micro-batches, and gradients, losses and
states are summed before anything is updated: k processes are one batch too, and their weights stay equal.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.denoiser import Denoiser
from limbeck.device import CPU, is_out_of_memory
from limbeck.distributed import Exchange, alive, local, rank_and_world, total, total_of_all
from limbeck.ema import EMA, Average
from limbeck.generator import Generator
from limbeck.objective import Batch, Objective, State, Turn
from limbeck.optimizer import Optimizer
from limbeck.passes import Overflow, Passes, Precision, Scaler
from limbeck.randomness import reseed

Source = Callable[[int, int], Iterable[Batch]]
ALL_OPEN = 10**12  # images after which the gate of every turn is open


class NonFinite(ArithmeticError):
    """A loss or gradient was NaN or Inf. The update was not applied: weights are those of the turn before.

    Attributes:
        turn: index of the turn in its step.
        losses: per sample (B,).
    """

    def __init__(self, message: str, turn: int, losses: Tensor) -> None:
        super().__init__(message, turn, losses)  # as it is, so that it can come from another process
        self.turn, self.losses = turn, losses

    def __str__(self) -> str:
        return str(self.args[0])


class Trainer:
    """Players, optimisers, moving average and counters of one run.

    Args:
        objective: the method.
        teacher: a denoiser, in eval mode, never trained.
        template: the denoiser from whose copies the players are made.
        optimizer: settings by player; a player that is missing keeps the objective's default.
        steps: length of the run, for learning-rate schedules.
        ema: the moving average of the objective's product.
        clip: largest gradient norm per player; None = no clipping.
        seed: key of dropout and of fresh networks' weights.
        generator: a given generator (GAN refinement) in place of the one that the objective builds.
        split: splits a player's weights over the processes (`shards.split`); None = each holds all of them.
        precision: of the network passes, by player or "teacher"; float32 where it is missing (see `limbeck.passes`).
        checkpointing: players, or "teacher", whose activations are made again in the backward pass.
        device: where all of them compute; elsewhere than on the CPU, `teacher` is a copy of the given one.

    Attributes:
        sharded: whether the players' weights are split.
        scalers: of losses whose gradients pass through float16, by the players of the turn.
        step: steps taken.
        images: samples of the product's turns so far; of a step in which it rests, those of the last turn.
        rate_factor: on all learning rates; below 1 once a run has gone back to an earlier step.
    """

    def __init__(
        self,
        objective: Objective,
        teacher: Denoiser,
        template: Denoiser,
        optimizer: Mapping[str, Optimizer] | None = None,
        *,
        steps: int,
        ema: Average | None = None,
        clip: float | None = None,
        seed: int = 0,
        generator: Generator | None = None,
        split: Callable[[nn.Module], None] | None = None,
        precision: Mapping[str, Precision] | None = None,
        checkpointing: Sequence[str] = (),
        device: torch.device = CPU,
    ) -> None:
        self.objective, self.seed, self.steps, self.clip, self.device = objective, seed, steps, clip, device
        self.teacher = teacher.eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            reseed(seed, "players")
            self.nets = nn.ModuleDict(objective.players(template, generator))
        self.nets.eval().requires_grad_(False)
        if device != CPU:
            self.teacher = copy.deepcopy(self.teacher).to(device)
            self.nets.to(device)
        settings = {**objective.optimizers(), **(optimizer or {})}
        for name in settings:
            if name not in self.nets:
                raise ValueError(f"optimizer.{name}: no such player, this method has {', '.join(self.nets)}")
        self.settings = settings
        self.ema = EMA(self.nets[objective.product], ema or Average())
        self.sharded = split is not None
        if split is not None:
            for net in self.nets.values():
                split(net)
            self.ema.split(self.nets[objective.product])
        # lists, because walking through modules several times a turn costs small networks as much as a pass
        self.weights = {name: list(net.parameters()) for name, net in self.nets.items()}
        self.optimizers = {name: s.build(_groups(self.weights[name])) for name, s in settings.items()}
        self.exchanges = {name: Exchange(self.weights[name]) for name in settings}
        self.passes = Passes({"teacher": self.teacher, **self.nets}, precision or {}, checkpointing)
        self.scalers: dict[str, Scaler] = {}
        self.step = self.images = 0
        self.rate_factor = 1.0

    def advance(self, source: Source) -> dict[str, Tensor]:
        """One step: all turns of the objective.

        Returns:
            0-d tensors: loss/TURN, grad_norm/PLAYER, lr/PLAYER.

        Raises:
            NonFinite: before the update of the turn concerned.
        """
        told: dict[str, Tensor] = {}
        images = count = 0
        for index, turn in enumerate(self.objective.turns(self.step, self.images)):
            if turn.when is not None and not turn.when(self.nets):
                continue
            count = self.play(index, turn, source(self.step, index), told)
            if self.objective.product in turn.players:
                images += count
        if images:
            self.ema.update(self.images, images)
        for name, net in self.nets.items():
            if isinstance(net, State):
                told |= {f"{name}/{key}": value for key, value in net.told().items()}
        self.step += 1
        self.images += images or count
        return told

    def play(self, index: int, turn: Turn, batches: Iterable[Batch], told: dict[str, Tensor]) -> int:
        """One turn, the `index`-th of this step, on its micro-batches: how many samples it had, on all processes.

        Args:
            told: receives what `advance` returns of this turn.

        Raises:
            NonFinite, Overflow: before the update.
        """
        self._wake(turn.players)
        micro = list(batches)
        own = sum(len(batch.z) for batch in micro)
        count = micro[0].total or own
        states = {name: net for name, net in self.nets.items() if isinstance(net, State)}
        alone = rank_and_world()[1] == 1
        compiled = alone and self.passes.compiled
        kept = states if compiled or not alone else {}
        before = {name: [b.clone() for b in net.buffers()] for name, net in kept.items()}
        key = "+".join(turn.players)
        scaler = self.scalers.setdefault(key, Scaler()) if self.passes.scaled else None
        losses: list[Tensor] | None = None
        try:
            losses = self._differentiate(index, turn, micro, count, scaler)
        except Exception as error:
            if not compiled or is_out_of_memory(error):
                raise
            # compiled code that fails in a backward pass, whatever by: the turn begins again without it
            self.passes.give_up(error)
        if losses is None:  # out of the handler, which holds the graph that has failed
            for name, buffers in before.items():
                for buffer, old in zip(states[name].buffers(), buffers, strict=True):
                    buffer.copy_(old)
            self._rest(turn.players)
            self._wake(turn.players)
            losses = self._differentiate(index, turn, micro, count, scaler)
        loss = sum((each.sum() / count for each in losses), micro[0].z.new_zeros(()))
        loss = self._exchange(turn, loss, states, before)
        if scaler is not None:
            for name in turn.players:
                torch._foreach_mul_(_gradients(self.weights[name]), 1 / scaler.scale)
        norms = {name: _gradient_norm(self.weights[name]) for name in turn.players}
        # one look at the numbers, so that a device is waited for once
        finite = torch.isfinite(torch.stack([loss.double(), *(norm.double() for norm in norms.values())])).tolist()
        skipped = scaler is not None and finite[0] and not all(finite)
        if not all(finite) and not skipped:
            self._rest(turn.players)
            bad = torch.nonzero(~torch.isfinite(torch.cat(losses)))[:, 0].tolist()
            where = f" (the first bad sample: {bad[0]} of {own})" if bad else ""
            raise NonFinite(
                f"the turn of {key} at step {self.step} (seed {self.seed}) gave a loss of {loss.item():g}{where} and "
                f"gradient norms of {', '.join(f'{norm.item():g}' for norm in norms.values())}; "
                "the update was not applied",
                index,
                torch.cat(losses),
            )
        if not skipped:  # by all players of the turn, on all processes
            told |= self._update(norms)
        if scaler is not None:
            told |= self._judge(scaler, key, not skipped)
        for state in states.values():
            state.commit()
        told[f"loss/{key}"] = loss
        self._rest(turn.players)
        return count

    def _differentiate(
        self, index: int, turn: Turn, micro: Sequence[Batch], count: int, scaler: Scaler | None
    ) -> list[Tensor]:
        """Put the gradients of a turn's mean loss in their place. Returns its losses (b,) by micro-batch."""
        losses: list[Tensor] = []
        # split networks are put together in their passes
        exchanges = alive(passes=True) if self.sharded else contextlib.nullcontext()
        # dropout is the only user of global generators; it gets a stream of its own, and gives the CPU's old one back
        with exchanges, torch.random.fork_rng(devices=[]), self.passes():
            for number, batch in enumerate(micro, start=rank_and_world()[0] * len(micro)):
                reseed(self.seed, "dropout", self.step, index, number)
                each = turn.loss(self.nets, self.teacher, batch)
                mean = each.sum() / count
                last = len(losses) == len(micro) - 1
                self._backward(mean if scaler is None else scaler.scale * mean, turn, last)
                losses.append(each.detach())
        return losses

    def _update(self, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the step of the players whose gradients have these norms. Returns what the log tells of it."""
        told: dict[str, Tensor] = {}
        for name, norm in norms.items():
            if self.clip is not None:
                torch._foreach_mul_(_gradients(self.weights[name]), (self.clip / norm).clamp(max=1))
            rate = self.rate_factor * self.settings[name].rate(self.step, self.steps)
            for group in self.optimizers[name].param_groups:
                group["lr"] = rate
            self.optimizers[name].step()
            told |= {f"grad_norm/{name}": norm, f"lr/{name}": torch.tensor(rate)}
        return told

    def _backward(self, loss: Tensor, turn: Turn, last: bool) -> None:
        if last:
            for name in turn.players:
                self.exchanges[name].begin()
        loss.backward()

    def _exchange(
        self, turn: Turn, loss: Tensor, states: Mapping[str, State], before: Mapping[str, list[Tensor]]
    ) -> Tensor:
        """Sum gradients, the loss, and what was added to states over all processes. Returns the loss."""
        for name in turn.players:
            self.exchanges[name].finish()
        if rank_and_world()[1] == 1:
            return loss
        buffers = [buffer for net in states.values() for buffer in net.buffers()]
        olds = [old for name in states for old in before[name]]
        # infinite values, of which there is no difference, have not changed
        changes = [torch.where(new == old, 0, new - old) for new, old in zip(buffers, olds, strict=True)]
        loss, *added = total_of_all([loss, *changes])
        for buffer, old, more in zip(buffers, olds, added, strict=True):
            buffer.copy_(old + more)
        return loss

    def _judge(self, scaler: Scaler, key: str, finite: bool) -> dict[str, Tensor]:
        """Count an update under a scaler. Returns what the log tells of it."""
        scaler.add(finite)
        if scaler.failing:
            self._rest(key.split("+"))
            raise Overflow(
                f"{scaler.skipped} of {scaler.updates} updates of {key} were skipped, because float16 cannot hold "
                f"their gradients; set precision to bf16 or fp32, or lower the learning rate"
            )
        return {f"scale/{key}": torch.tensor(scaler.scale), f"skipped/{key}": torch.tensor(float(scaler.skipped))}

    @contextlib.contextmanager
    def rehearsal(self, players: Sequence[str]) -> Iterator[None]:
        """A turn of these players may be computed within, as it will be when it is played; nothing of it stays."""
        before = {name: buffer.clone() for name, buffer in self.nets.named_buffers()}
        self._wake(players)
        try:
            with torch.random.fork_rng(devices=[]), self.passes():
                yield
        finally:
            self._rest(players)
            for name, buffer in self.nets.named_buffers():
                buffer.copy_(before[name])

    def compile(self, source: Source, tell: Callable[[str], None]) -> None:
        """Compile the networks, by a rehearsal of every turn, with gates as they are and open.

        If that fails, or a pass later on, one line says so, and they stay plain.
        """
        if self.sharded:
            tell("compile: not for players that are split; the networks run uncompiled")
            return
        self.passes.compiled, self.passes.tell = True, tell
        try:
            for images in (self.images, ALL_OPEN):
                for index, turn in enumerate(self.objective.turns(self.step, images)):
                    if not self.passes.compiled:
                        return
                    with self.rehearsal(turn.players):
                        turn.loss(self.nets, self.teacher, next(iter(source(self.step, index)))).sum().backward()
        except Exception as error:  # in a backward pass; what is wrong without a compiler too, the first turn will say
            self.passes.give_up(error)

    def _wake(self, players: Iterable[str]) -> None:
        for name in players:
            self.nets[name].train()
            for weight in self.weights[name]:
                weight.requires_grad_(True)

    def _rest(self, players: Iterable[str]) -> None:
        for name in players:
            self.nets[name].eval()
            for weight in self.weights[name]:
                weight.grad = None
                weight.requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser states by parameter name, moving average and counters."""
        return {
            "step": self.step,
            "images": self.images,
            "rate_factor": self.rate_factor,
            "nets": {name: net.state_dict() for name, net in self.nets.items()},
            "ema": self.ema.state_dict(),
            "optimizers": {name: _moments(self.nets[name], optimizer) for name, optimizer in self.optimizers.items()},
            "scalers": {key: dataclasses.asdict(scaler) for key, scaler in self.scalers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, strictly."""
        for name, net in self.nets.items():
            net.load_state_dict(state["nets"][name])
        self.ema.load_state_dict(state["ema"])
        for name, optimizer in self.optimizers.items():
            _restore(name, self.nets[name], optimizer, state["optimizers"][name])
        self.step, self.images = int(state["step"]), int(state["images"])
        self.rate_factor = float(state.get("rate_factor", 1.0))  # runs begun before it was there go on
        self.scalers = {key: Scaler(**values) for key, values in state.get("scalers", {}).items()}


def _groups(weights: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """The weights as an optimiser's groups: whole ones and split ones are not updated in one call."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for weight in weights:
        groups.setdefault(local(weight) is weight, []).append(weight)
    return [{"params": group} for group in groups.values()]


def _gradient_norm(weights: Sequence[nn.Parameter]) -> Tensor:
    for weight in weights:
        if weight.grad is None:  # a weight that the loss did not reach moves as if its gradient were 0
            weight.grad = torch.zeros_like(weight)
    norms = torch.stack(torch._foreach_norm(_gradients(weights)))
    split = [local(weight) is not weight for weight in weights]
    if any(split):
        apart = torch.tensor(split)
        return (total((norms[apart] ** 2).sum()) + (norms[~apart] ** 2).sum()).sqrt()
    return torch.linalg.vector_norm(norms)


def _gradients(weights: Iterable[nn.Parameter]) -> list[Tensor]:
    """Gradients of the weights, or pieces of weights, that this process holds."""
    return [local(weight.grad) for weight in weights if weight.grad is not None]


def _moments(player: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Optimiser state by parameter name: torch's own state_dict counts parameters instead."""
    return {name: dict(optimizer.state[p]) for name, p in player.named_parameters() if p in optimizer.state}


def _restore(
    player: str, module: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Mapping[str, Tensor]]
) -> None:
    parameters = dict(module.named_parameters())
    if moments and moments.keys() != parameters.keys():
        raise ValueError(f"the optimiser state of {player} does not fit its parameters")
    optimizer.state.clear()
    for name, values in moments.items():  # none before the player's first turn
        # a number of steps stays where it is, but for the updates that are fused
        beside, fused = local(parameters[name]).device, optimizer.defaults.get("fused")
        optimizer.state[parameters[name]] = {
            key: value.to(beside if value.ndim or fused else value.device, copy=True) for key, value in values.items()
        }
