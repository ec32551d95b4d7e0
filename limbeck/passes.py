"""How the networks of each role compute: in reduced precision, with graphs that are made twice, compiled.

A role is a player's name, or "teacher". While a turn is played, `Passes` stands in for the calls of every role's
networks (`forward`, `trace`, `features`); a method asks for its passes as ever and knows nothing of it. Outside of
turns the networks are what they are: scores, monitors, averages and files see float32.

    precision      the role's passes run under `torch.autocast`; weights, moments and gradients stay float32, and so
                   does all that a loss does with what comes out, which is cast back. Float64 networks stay as they are
    checkpointing  activations are not kept for the backward pass but made again in it (Chen et al. 2016,
                   arXiv:1604.06174), block by block where a network has blocks, else for whole passes; dropout repeats
    compiled       by torch.compile, whole passes

Gradients that pass through float16 underflow, so the loss is multiplied by a `Scaler`'s factor first.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.denoiser import Networked, Rescaled

Precision = Literal["fp32", "bf16", "fp16"]
Call = Callable[..., Any]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CALLS = ("forward", "trace", "features")


WITHIN = (Networked, Rescaled)  # denoisers that have a network


def networks(module: nn.Module) -> list[nn.Module]:
    """The networks whose passes are a role's cost: those of its denoisers, or itself if it has none."""
    found = [m.network if isinstance(m, Networked) else m.model for m in module.modules() if isinstance(m, WITHIN)]
    return found or [module]


def blocks(network: nn.Module) -> list[nn.Module]:
    """A network's blocks: members of its lists that consist of layers themselves."""
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList | nn.ModuleDict)]
    return [block for each in lists for block in each.children() if any(True for _ in block.children())]


class Passes:
    """The calls of all roles' networks, as a context in which they compute as the settings say.

    Args:
        roles: players, and the teacher, by name.
        precision: by role; float32 where it is missing.
        checkpointing: roles.

    Attributes:
        compiled: whether calls are compiled: off until `Trainer.compile` has tried it.
        tell: is told in one line that, and why, compiling has failed.
        around: put around every call of a network, given its role: for meters.

    Raises:
        ValueError: for a role that there is not, or one without weights.
    """

    def __init__(
        self, roles: Mapping[str, nn.Module], precision: Mapping[str, Precision], checkpointing: Sequence[str]
    ) -> None:
        for key, names in (("precision.", list(precision)), ("checkpointing: ", list(checkpointing))):
            for name in names:
                if name not in roles:
                    raise ValueError(f"{key}{name}: no such role, this method has {', '.join(roles)}")
                if next(roles[name].parameters(), None) is None:
                    raise ValueError(f"{key}{name}: this role has no weights to compute with; leave it out")
        self.roles, self.checkpointing = dict(roles), tuple(checkpointing)
        self.precision = {role: kind for role, kind in precision.items() if kind != "fp32"}
        self.compiled = False
        self.tell: Callable[[str], None] = lambda line: None
        self.around: Callable[[str, Call], Call] | None = None
        self._made: dict[tuple[nn.Module, str], Call] = {}
        self._inside: set[nn.Module] = set()

    @property
    def scaled(self) -> bool:
        """Is there a role in float16? Gradients may pass through it, whoever is trained."""
        return "fp16" in self.precision.values()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Within, the networks compute as they should in a turn; its backward passes belong into it too."""
        if not (self.checkpointing or self.compiled or self.around or self.precision):
            yield
            return
        replaced: list[tuple[nn.Module, str, Any]] = []

        def put(owner: nn.Module, name: str, call: Call) -> None:
            replaced.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, call)

        try:
            for role, module in self.roles.items():
                for network in networks(module):
                    parts = blocks(network) if role in self.checkpointing else []
                    for part in parts:
                        put(part, "forward", _made_twice(part.forward))
                    whole = role in self.checkpointing and not parts
                    if whole or self.compiled or self.around is not None or role in self.precision:
                        for name in CALLS:
                            if callable(getattr(type(network), name, None)):  # a part may have such a name
                                put(network, name, self._call(role, network, name, whole))
            yield
        finally:
            for owner, name, before in reversed(replaced):
                if before is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)

    def _call(self, role: str, network: nn.Module, name: str, twice: bool) -> Call:
        """What stands in for one call of a network."""
        plain: Call = getattr(network, name)
        call = self._tried(network, name, plain)

        def outer(*args: Any) -> Any:
            self._inside.add(network)
            try:
                return call(*args)
            finally:
                self._inside.discard(network)

        made = outer
        if role in self.precision:
            made = _reduced(made, DTYPES[self.precision[role]])
        if twice:
            made = _made_twice(made)
        if self.around is not None:
            made = self.around(role, made)
        # `forward` may go by way of `trace`, which is the same pass
        return lambda *args: plain(*args) if network in self._inside else made(*args)

    def _tried(self, network: nn.Module, name: str, plain: Call) -> Call:
        """The compiled call; a plain one as soon as compiling has failed."""
        if not self.compiled:
            return plain
        if (network, name) not in self._made:
            self._made[network, name] = torch.compile(plain)
        made = self._made[network, name]

        def call(*args: Any) -> Any:
            if self.compiled:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of what the compiler's own tracing does
                        return made(*args)
                except Exception as error:  # whatever a compiler fails by
                    result = plain(*args)  # what is wrong without it too is raised here
                    self.give_up(error)
                    return result
            return plain(*args)

        return call

    def give_up(self, error: Exception) -> None:
        """Run uncompiled from now on."""
        self.compiled = False
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self.tell(f"compile: failed ({why}); the networks run uncompiled")


def _reduced(call: Call, dtype: torch.dtype) -> Call:
    def reduced(x: Tensor, *args: Any) -> Any:
        if x.dtype != torch.float32:
            return call(x, *args)
        with torch.autocast(x.device.type, dtype):
            out = call(x, *args)
        return tuple(part.to(x.dtype) for part in out) if isinstance(out, tuple) else out.to(x.dtype)

    return reduced


def _made_twice(call: Call) -> Call:
    from torch.utils.checkpoint import checkpoint

    def twice(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        return checkpoint(call, *args, use_reentrant=False, **kwargs)

    return twice


class Overflow(ArithmeticError):
    """Too many updates had gradients that float16 could not hold."""


@dataclass
class Scaler:
    """The factor on the losses of one turn whose gradients pass through float16.

    A gradient that overflows makes its update a skipped one and halves the factor; a long time without doubles it. The
    factor is a power of two, so that scaling alone changes no bit. Whether an update is skipped is decided on the sums
    over all processes, on every process alike; torch's GradScaler asks each process, and only for whole weights.

    Attributes:
        scale: the factor.
        calm: updates since it has changed.
        updates, skipped: so far.
    """

    scale: float = 2.0**16
    calm: int = 0
    updates: int = 0
    skipped: int = 0

    def add(self, finite: bool) -> None:
        """Take in whether the gradients of an update were finite."""
        self.updates += 1
        self.calm += 1
        if not finite:
            self.skipped += 1
            self.scale, self.calm = self.scale / 2, 0
        elif self.calm == CALM:
            self.scale, self.calm = 2 * self.scale, 0

    @property
    def failing(self) -> bool:
        """Are more than 1% of all updates skipped? The first few are the search for the factor."""
        return self.skipped > max(SEARCH, 0.01 * self.updates)


CALM = 2000  # updates without an overflow, after which a larger factor is tried: 0.05% are skipped by that alone
SEARCH = 10  # skipped updates that are always allowed: they bring the factor from 2^16 to 2^6
