"""One update of the parameters: Algorithm 1 of Karimi, Xie and Li, as a function of what lies on the device.

An update draws data, starts chains, moves them K transitions of the sampler, and takes an Adam step along
mean grad U(data) - mean grad U(chains). It reads nothing back: the number of updates made and whether they are still
finite are tensors too, so that on CUDA the whole of it is one graph, captured once and replayed.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import data, noise, runs, samplers
from .capture import compiled, cuda_graph, first_line
from .config import Settings
from .energies import sampling
from .noise import Stream
from .objectives import likelihood
from .transitions import Info, State, chain_of

#: An energy beyond this has left everything that training could bring back.
_LARGEST_ENERGY = 1e8
#: Updates that run as they are ahead of the capture: they compile, and give every library its workspace.
_WARM_UP = 3


@dataclasses.dataclass
class Job:
    """A run in progress: its settings, its parts and where it stands."""

    settings: Settings
    directory: Path
    device: torch.device
    data: data.Density | data.Images
    energy: nn.Module
    average: nn.Module | None  #: the moving average of the parameters
    optimizer: torch.optim.Optimizer
    sampler: samplers.Sampler
    start: Any  #: one of fastanila.chains
    chains: Tensor  #: (B, ...) where the last update left them
    made: Tensor  #: updates made, 0-dim int64 on the device
    broken: Tensor  #: 0-dim bool on the device: an update was not finite, and none was made since
    iteration: int = 0  #: updates asked for
    seconds: float = 0.0  #: spent in updates

    @property
    def model(self) -> nn.Module:
        """What sampling and evaluation use."""
        return self.energy if self.average is None else self.average


class Update(NamedTuple):
    """What one update did; on CUDA the next overwrites it."""

    energy_data: Tensor  #: 0-dim, as are the next two
    energy_chains: Tensor
    grad_norm: Tensor  #: ahead of clipping
    info: Info  #: the chains' last transition


def build_update(job: Job) -> Callable[[], Update]:
    """update(), which draws, samples and moves the parameters, unless something is not finite: then ``job.broken`` is
    set and nothing else changes, in this call and in all that follow."""
    s, device = job.settings, job.device
    energy = runs.at_precision(job.energy, s.precision)
    parameters = list(job.energy.parameters())
    chain = chain_of(job.sampler, energy, z=job.chains, compile=s.fused, capture=False, strict=True)
    numbers = job.sampler.numbers_on(device)
    seed = noise.as_word64(s.seed, device)

    def begin(iteration: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones((), device=device)
        decay = one * s.ema if job.average is None else torch.clamp((1 + iteration) / (10 + iteration), max=s.ema)
        return draw_data(job, iteration, seed), job.start.draw(iteration), learning_rate(s, iteration) * one, decay

    def objective(batch: Tensor, chains: Tensor):
        result = likelihood(energy, batch, chains, s.energy_l2)
        energies = torch.stack((result.energy_data, result.energy_chains))
        return result, (energies.abs() < _LARGEST_ENERGY).all() & torch.isfinite(chains).all()

    begin_of, loss_of = (compiled(begin), compiled(objective)) if s.fused else (begin, objective)

    def update() -> Update:
        job.energy.train()
        with torch.no_grad(), sampling(energy):
            batch, z, lr, decay = begin_of(job.made)
            # A chain's index is its place in this update's batch: transitions never share a step, so none repeats.
            state, info = chain(s.steps, numbers, State(z), seed, job.made * s.steps)
        result, finite = loss_of(batch, state.z)
        job.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        if s.clip_grad:
            grad_norm = nn.utils.clip_grad_norm_(parameters, s.clip_grad)
        else:
            grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
        with torch.no_grad():
            job.broken.logical_or_(~(finite & torch.isfinite(grad_norm)))
            job.optimizer.found_inf = job.broken.float()  # what a gradient scaler sets: 1 skips the step
            for group in job.optimizer.param_groups:
                group["lr"].copy_(lr)
            job.optimizer.step()
            del job.optimizer.found_inf
            if job.average is not None:
                follow(job.average, job.energy, torch.where(job.broken, 1.0, decay))
            job.start.keep(job.made, state.z, unless=job.broken)
            job.chains.copy_(torch.where(job.broken, job.chains, state.z))
            job.made.add_((~job.broken).long())
        return Update(result.energy_data, result.energy_chains, grad_norm.detach(), info)

    return _captured(update, device) if s.fused and device.type == "cuda" else update


def _captured(update: Callable[[], Update], device: torch.device) -> Callable[[], Update]:
    """``update``, the first few calls as it is, the others replayed from one CUDA graph."""
    calls, replay = 0, None

    def run() -> Update:
        nonlocal calls, replay
        calls += 1
        if calls == _WARM_UP + 1:
            try:
                replay = cuda_graph(update, device)
            except RuntimeError as error:
                warnings.warn(f"the update runs uncaptured: {first_line(error)}", stacklevel=2)
        if replay is not None:
            return replay()
        if calls > _WARM_UP:
            return update()
        # on a stream of its own, because autograd would go on to use the stream of the first backward
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            made = update()
        torch.cuda.current_stream(device).wait_stream(side)
        return made

    return run


def draw_data(job: Job, iteration: int | Tensor, seed: int | Tensor) -> Tensor:
    s = job.settings
    batch = job.data.draw(s.batch_size, seed=seed, step=iteration, device=job.device)
    if s.data_noise:
        batch = batch + s.data_noise * noise.normal(
            batch.shape, seed=seed, step=iteration, stream=Stream.DATA_NOISE, device=job.device
        )
    return batch


def learning_rate(settings: Settings, iteration: int | Tensor) -> float | Tensor:
    left = 1 - iteration / settings.iterations if settings.lr_decay == "linear" else 1.0
    return settings.lr * left


@torch.no_grad()
def follow(average: nn.Module, energy: nn.Module, decay: Tensor) -> None:
    """Move the average's parameters by 1 - decay (0-dim) of the way towards the energy's."""
    averages = list(average.parameters())
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, torch._foreach_mul([p.detach() for p in energy.parameters()], 1 - decay))
