"""A network in training: its Adam, its moving average, its learning rate, and what a checkpoint holds of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint
from .config import Settings

_ADAM_BETAS = (0.9, 0.999)


@dataclasses.dataclass
class Learner:
    """A network in training."""

    module: nn.Module
    optimizer: torch.optim.Optimizer  #: of its parameters alone
    average: nn.Module | None  #: the moving average of the parameters
    rate: Callable[[int | Tensor], float | Tensor]  #: the learning rate of an update

    @property
    def model(self) -> nn.Module:
        """What sampling and evaluation use."""
        return self.module if self.average is None else self.average


def build(
    network: nn.Module, settings: Settings, lr: float, decay: str, device: torch.device, first: int = 0
) -> Learner:
    """The network on the device, with its Adam and, where the settings want one, its moving average; it stands still
    ahead of update ``first``."""
    network = network.to(device)
    optimizer = torch.optim.Adam(
        network.parameters(),
        lr=torch.tensor(lr, device=device),  # a tensor, fused and capturable: it can be part of a graph
        betas=_ADAM_BETAS,
        fused=True,
        capturable=device.type == "cuda",
    )
    rate = functools.partial(learning_rate, lr, decay, settings.iterations, first=first)
    return Learner(network, optimizer, averaged(network) if settings.ema else None, rate)


def learning_rate(lr: float, decay: str, iterations: int, iteration: int | Tensor, *, first: int = 0) -> float | Tensor:
    """A learning rate that falls to zero over the iterations, or (decay="none") stays; zero ahead of the ``first``."""
    left = 1 - iteration / iterations if decay == "linear" else 1.0
    return lr * left * (iteration >= first) if first else lr * left


def averaged(energy: nn.Module) -> nn.Module:
    return copy.deepcopy(energy).requires_grad_(False).eval()


# ----------------------------------------------------------------------------------------------------- an update's step


def gradient_norm(learner: Learner, clip: float) -> Tensor:
    """The norm of the gradient, which is then clipped to ``clip``, unless that is 0."""
    parameters = list(learner.module.parameters())
    if clip:
        return nn.utils.clip_grad_norm_(parameters, clip).detach()
    return nn.utils.get_total_norm([p.grad for p in parameters])


def move(learner: Learner, rate: Tensor, decay: Tensor, broken: Tensor) -> None:
    """A step of the optimizer and of the moving average, unless ``broken`` (0-dim bool) says no."""
    learner.optimizer.found_inf = broken.float()  # what a gradient scaler sets: 1 skips the step
    for group in learner.optimizer.param_groups:
        group["lr"].copy_(rate)
    learner.optimizer.step()
    del learner.optimizer.found_inf
    if learner.average is not None:
        follow(learner.average, learner.module, torch.where(broken, 1.0, decay))


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, decay: Tensor) -> None:
    """Move the average's parameters by 1 - decay (0-dim) of the way towards the module's."""
    averages = list(average.parameters())
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, torch._foreach_mul([p.detach() for p in module.parameters()], 1 - decay))


# ---------------------------------------------------------------------------------------------------- saving, resuming


def tensors(learner: Learner, name: str) -> dict[str, Tensor]:
    """What a checkpoint holds of a network in training."""
    found = checkpoint.prefixed(name, learner.module.state_dict())
    if learner.average is not None:
        found |= checkpoint.prefixed("ema", learner.average.state_dict())
    return found | checkpoint.optimizer_tensors(learner.optimizer, _names(learner))


def restore(learner: Learner, name: str, found: dict[str, Tensor], where: Path) -> None:
    """The inverse of `tensors`."""
    load_parameters(learner.module, checkpoint.subset(found, name), where)
    if learner.average is not None:
        load_parameters(learner.average, checkpoint.subset(found, "ema"), where)
    checkpoint.restore_optimizer(learner.optimizer, _names(learner), found)


def _names(learner: Learner) -> list[str]:
    return [name for name, _ in learner.module.named_parameters()]


def load_parameters(energy: nn.Module, tensors: dict[str, Tensor], where) -> None:
    try:
        energy.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        message = f"{where}: the checkpoint does not fit the settings' network ({reason})"
        raise checkpoint.CheckpointError(message) from None
