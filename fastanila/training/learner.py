"""A network in training: its Adam, its moving average, its learning rate, and what a checkpoint holds of them."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint
from .checkpoint import load_parameters
from .contents import Network
from .settings import Settings

_ADAM_BETAS = (0.9, 0.999)


@dataclasses.dataclass
class Learner:
    """A network in training."""

    module: nn.Module
    optimizer: torch.optim.Optimizer  #: of its parameters alone
    average: nn.Module | None  #: the moving average of the parameters
    rate: Schedule

    @property
    def model(self) -> nn.Module:
        """What sampling and evaluation use."""
        return self.module if self.average is None else self.average


def build(
    network: nn.Module, settings: Settings, lr: float, decay: str, device: torch.device, first: int = 0,
    matching: bool = False,
) -> Learner:  # fmt: skip
    """The network on the device, with its Adam and, where the settings want one, its moving average; it stands still
    ahead of update ``first``. ``matching``: it has a warm-up by matching, if the settings do."""
    network = network.to(device)
    optimizer = torch.optim.Adam(
        [p for _, p in trained(network)],
        # a tensor, fused and capturable: it can be part of a graph
        lr=torch.tensor(lr, dtype=torch.float32, device=device),
        betas=_ADAM_BETAS,
        fused=True,
        capturable=device.type == "cuda",
    )
    rate = Schedule(lr, decay, settings.iterations, first)
    if matching:
        rate = rate._replace(matching=settings.matching, matching_lr=settings.matching_lr)
    keeps = settings.ema or settings.init == "weighted"  # whose witnesses follow the average, also one of decay 0
    return Learner(network, optimizer, averaged(network) if keeps else None, rate)


class Schedule(NamedTuple):
    """A learning rate that falls to zero over the iterations, or (decay="none") stays; zero ahead of the ``first``.

    In a warm-up of ``matching`` updates it falls from ``matching_lr`` to zero, and then begins anew at ``lr``."""

    lr: float | Tensor
    decay: str
    iterations: int | Tensor
    first: int | Tensor = 0
    matching: int | Tensor = 0
    matching_lr: float | Tensor = 0.0

    def at(self, iteration: int | Tensor) -> float | Tensor:
        made, all_of = iteration - self.matching, self.iterations - self.matching
        left = 1 - made / all_of if self.decay == "linear" else 1.0
        # 1 / matching without a warm-up divides by none
        warm = -made / (self.matching + (self.matching == 0)) * (made < 0)
        return self.lr * left * (iteration >= self.first) * (made >= 0) + self.matching_lr * warm

    def on(self, device: torch.device) -> Schedule:
        """The same with 0-dim tensors for its numbers, which are then no constants of what is compiled with it."""
        numbers = {name: x for name, x in self._asdict().items() if name != "decay"}
        return self._replace(**{name: as_number(x, device) for name, x in numbers.items()})


def as_number(x: float, device: torch.device) -> Tensor:
    """A 0-dim tensor, int64 or float32."""
    return torch.tensor(x, dtype=torch.int64 if isinstance(x, int) else torch.float32, device=device)


def trained(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that learn, by name; a user's own network may have others, which are frozen."""
    return [(name, p) for name, p in network.named_parameters() if p.requires_grad]


def averaged(energy: nn.Module) -> nn.Module:
    """A copy whose parameters will follow the energy's. Buffers, such as the statistics of a batch norm, it shares."""
    shared = {id(buffer): buffer for buffer in energy.buffers()}
    return copy.deepcopy(energy, shared).requires_grad_(False).eval()


# ----------------------------------------------------------------------------------------------------- an update's step


def gradients(learner: Learner) -> list[Tensor]:
    """The parameters' gradients; zero where the loss does not depend on one, as no score does on a level."""
    parameters = [p for _, p in trained(learner.module)]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in parameters]


def clipped_norm(norms: list[Tensor], grads: list[Tensor], clip: float | Tensor | None) -> Tensor:
    """The norm of the gradient, 0-dim, from each parameter's; with ``clip`` the gradient is then scaled in place to a
    norm of at most that, as `torch.nn.utils.clip_grad_norm_` does."""
    total = torch.linalg.vector_norm(torch.stack(norms))
    if clip is not None:
        torch._foreach_mul_(grads, torch.clamp(clip / (total + 1e-6), max=1.0))
    return total


def move(learner: Learner, unless: Tensor) -> None:
    """A step of the optimizer at the learning rate it holds, unless the 0-dim float tensor is 1."""
    learner.optimizer.found_inf = unless  # what a gradient scaler sets
    learner.optimizer.step()
    del learner.optimizer.found_inf


def averaged_parameters(learners: list[Learner]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """By learner, the moving averages of its parameters and the parameters, detached."""
    parameters = [dict(trained(learner.module)) for learner in learners]
    by_name = [dict(learner.average.named_parameters()) for learner in learners]
    averages = [[of[name] for name in learning] for of, learning in zip(by_name, parameters, strict=True)]
    return averages, [[p.detach() for p in learning.values()] for learning in parameters]


@torch.no_grad()
def follow(averages: list[list[Tensor]], parameters: list[list[Tensor]], decays: list[Tensor]) -> None:
    """Move each learner's moving average by 1 - decay (0-dim) of the way towards its parameters."""
    for average, now, decay in zip(averages, parameters, decays, strict=True):
        torch._foreach_mul_(average, decay)
        torch._foreach_add_(average, torch._foreach_mul(now, 1 - decay))


# ---------------------------------------------------------------------------------------------------- saving, resuming


def contents(learner: Learner) -> Network:
    """What a checkpoint holds of a network in training."""
    average = None if learner.average is None else learner.average.state_dict()
    optimizer = checkpoint.optimizer_tensors(learner.optimizer, _names(learner))
    return Network(learner.module.state_dict(), average, optimizer)


def restore(learner: Learner, found: Network, where: Path) -> None:
    """The inverse of `contents`. Tensors of a network that has learned stay where they are, for a captured update reads
    them there."""
    load_parameters(learner.module, found.parameters, where)
    if learner.average is not None:
        load_parameters(learner.average, found.average or {}, where)
    before = dict(learner.optimizer.state)
    checkpoint.restore_optimizer(learner.optimizer, _names(learner), found.optimizer)
    for parameter, held in before.items():
        state = learner.optimizer.state.get(parameter, {})
        for kind, tensor in held.items():  # of Adam, whose state begins at zero
            tensor.copy_(state[kind] if kind in state else torch.zeros_like(tensor))
        learner.optimizer.state[parameter] = held


def _names(learner: Learner) -> list[str]:
    return [name for name, _ in trained(learner.module)]
