"""Annealed importance sampling: log Z of an energy, from a base whose Z is known, by chains of an exact sampler.

The path is exp(-(1 - beta) U_0 - beta U), of inverse temperatures beta from 0, the base, to 1, the model. `Annealer`
takes chains along it in either direction and weighs them (Neal, "Annealed importance sampling", 2001). Up from draws of
the base the mean weight is Z, and its logarithm a stochastic lower bound of log Z. Down from draws of the model the
mean is 1 / Z, and minus its logarithm an upper one (Burda, Grosse and Salakhutdinov 2015; Grosse, Ghahramani and Adams
2015). A pilot places the temperatures and finds the step sizes, which are then frozen: the chains that count have not
seen them adapt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import noise
from ..models.score import evaluator, sampling
from ..noise import Stream
from ..samplers import weighted
from ..samplers.chain import chain_of
from ..samplers.sampler import Sampler
from ..samplers.state import State
from .bases import Gaussian, Uniform

_CESS = 0.8  # the relative effective sample size from one temperature of the pilot to the next
_PILOT_MOVES = 10  # transitions that the pilot makes at each of its temperatures
_PILOT_FIRST = 60  # at its first one, where the step size is still a guess
_PILOT_MOST = 2000  # temperatures of the pilot, of which a path that leads to a law needs far fewer
_GAIN = 1.0  # how far the logarithm of the step size follows the acceptance


class AnnealedState(NamedTuple):
    z: Tensor  #: (B, ...)
    log_weight: Tensor  #: (B,) float64
    energy: Tensor  #: (B,) the model's U at z, whatever the temperature
    score: Tensor  #: (B, ...) -grad U


@dataclasses.dataclass(frozen=True)
class Annealed(Sampler):
    """An exact sampler's transition at an inverse temperature, ahead of which a chain is weighed for the way there.

    The log weight grows by -change (U(z) - U_0(z)), where ``change`` is how far beta moved to where it is. Energy and
    score of the base are in closed form and those of the model are carried, so a temperature takes no more gradients
    than a transition. It starts from an `AnnealedState`.
    """

    inner: Sampler  #: an exact one
    base: Any  #: `Uniform` or `Gaussian`
    beta: float | Tensor = 0.0
    change: float | Tensor = 0.0
    step_size: float | Tensor = 0.01

    is_exact: ClassVar[bool] = True
    threshold: ClassVar[float] = math.inf
    noise_scale: ClassVar[float] = 1.0
    numbers: ClassVar[tuple[str, ...]] = ("beta", "change", "step_size")

    def transition(self, evaluate, state, *, seed, step, offset=0, mask=None, statistics=True):
        beta = self.beta
        seen = []

        def mixed(z, u, s):
            u0, s0 = self.base(z)
            return ((1 - beta) * u0 + beta * u).float(), (1 - beta) * s0 + beta * s

        def along(z):
            u, s = evaluate(z)
            seen.append((z, u.float(), s))
            return mixed(z, u, s)

        log_weight = state.log_weight - self.change * (state.energy - self.base(state.z)[0].double())
        energy, score = mixed(state.z, state.energy, state.score)
        sampler = dataclasses.replace(self.inner, step_size=self.step_size)
        after, info = sampler.transition(
            along,
            State(state.z, energy=energy, score=score),
            seed=seed,
            step=step,
            offset=offset,
            statistics=statistics,
        )
        z, u, s = seen[-1]  # what was proposed; accepted, where the chain is there now
        there = (after.z == z).flatten(1).all(1)
        wide = there.view(-1, *[1] * (z.dim() - 1))
        return AnnealedState(
            after.z, log_weight, torch.where(there, u, state.energy), torch.where(wide, s, state.score)
        ), info


class _AnnealedInPieces(Annealed):
    """With the energy alone compiled: on a CPU a graph of the whole takes longer to compile than it saves."""

    is_one_graph: ClassVar[bool] = False


class Schedule(NamedTuple):
    """Where chains stop on the way, and with what step size they move there; frozen."""

    betas: Tensor  #: (N + 1,) float64, from 0 to 1, each a float32 number
    step_sizes: Tensor  #: (N + 1,) float64


class Paths(NamedTuple):
    """What chains that were taken along the path weigh, and where they are."""

    log_weights: Tensor  #: (B,) float64; their mean exponential estimates Z of the end over Z of the start
    z: Tensor  #: (B, ...)
    acceptance: float  #: the mean over chains and temperatures


class Annealer:
    """Takes chains along the path from a base to an energy, by a sampler; all is compiled once.

    Args:
        energy: the model's, (B, ...) -> (B,), with what its states are confined to (`Folded`).
        base: `Uniform` or `Gaussian`, which covers the energy's law.
        sampler: an exact one; its step size is where the pilot begins.
        seed: of the noise.
        step: its transitions take the steps from there on, no step twice.

    Raises ValueError for a sampler that is not exact: its weights would be of no law.
    """

    def __init__(
        self, energy: Callable[[Tensor], Tensor], base: Uniform | Gaussian, sampler: Any, *, seed: int, step: int = 0,
        compile: bool = True,
    ):  # fmt: skip
        if not sampler.is_exact:
            raise ValueError(f"sampler must be exact for annealing, got {type(sampler).__name__}: see Sampler.is_exact")
        kind = Annealed if sampler.is_one_graph and base.constant.is_cuda else _AnnealedInPieces
        self.energy, self.base, self.seed, self.step, self.compile = energy, base, seed, step, compile
        self.first_step_size, self.target = float(sampler.step_size), sampler.target_acceptance
        self.sampler = kind(dataclasses.replace(sampler, step_size=1.0), base)  # a number a temperature, not its own
        self.draws = 0

    def drawn(self) -> int:
        """A step of the stream of annealing that no draw has had."""
        self.draws += 1
        return self.draws - 1

    def begin(self, z: Tensor) -> AnnealedState:
        u, s = evaluator(self.energy)(z)
        assert u is not None
        if (u.isnan() | (u == -math.inf)).any():
            raise ValueError(f"energy must be a number at every state that chains start from, got {u.tolist()[:8]}...")
        return AnnealedState(
            z.detach().clone(), torch.zeros(len(z), dtype=torch.float64, device=z.device), u.float(), s
        )

    def move(
        self, state: AnnealedState, betas: Tensor, changes: Tensor, step_sizes: Tensor
    ) -> tuple[AnnealedState, Tensor]:
        """A transition at each beta, (N,) float64, weighed for the ``changes`` ahead of it: (state, acceptances)."""
        device = state.z.device
        columns = (betas.float(), changes.double(), step_sizes.float())
        # each number aligned as compiled code has it, lest it copy every one
        numbers = zip(*(x.to(device)[:, None].expand(-1, 4).contiguous()[:, 0].unbind() for x in columns), strict=True)
        chain = chain_of(self.sampler, self.energy, z=state.z, compile=self.compile)
        seed, start = noise.as_word64(self.seed, device), noise.as_word64(self.step, device)
        accepted: list[Tensor] = []
        carried: Any = state
        for t, now in enumerate(numbers):
            carried, info = chain(1, now, carried, seed, start + t, 0, None)
            accepted.append(info.acceptance.mean())
        self.step += len(betas)
        return carried, torch.stack(accepted)

    def anneal(self, z: Tensor, schedule: Schedule, *, up: bool) -> Paths:
        """Chains from z, draws of the base (``up``) or of the model, to the other end of the path."""
        betas, step_sizes = schedule if up else (x.flip(0) for x in schedule)
        changes = betas.diff()
        with torch.no_grad(), sampling(self.energy):
            state, accepted = self.move(self.begin(z), betas[1:-1], changes[:-1], step_sizes[1:-1])
            difference = state.energy.double() - self.base(state.z)[0].double()
        # the last change is weighed where the chains are: no transition at the end could alter a weight
        return Paths(state.log_weight - changes[-1].to(state.z.device) * difference, state.z, accepted.mean().item())

    def settle(self, z: Tensor, schedule: Schedule, transitions: int) -> Tensor:
        """Chains from z after so many transitions at the model's own law."""
        if not transitions:
            return z
        at = torch.full((transitions,), 1.0, dtype=torch.float64)
        with torch.no_grad(), sampling(self.energy):
            return self.move(self.begin(z), at, 0 * at, schedule.step_sizes[-1] * at)[0].z

    def pilot(self, chains: int, temperatures: int) -> Schedule:
        """A schedule of N = ``temperatures`` steps at equal standard deviations of the weights' changes.

        A population goes from the base to the model, each time as far as leaves its relative effective sample size at
        0.8, is resampled there, and moves with a step size that follows its acceptance (Zhou, Johansen and Aston
        2016). The changes of all these ways are equally hard; the schedule cuts each into equally many parts.
        """
        betas, hardness, step_sizes = [0.0], [0.0], []
        length = self.first_step_size
        with torch.no_grad(), sampling(self.energy):
            state = self.begin(self.base.draw(chains, seed=self.seed, step=self.drawn()))
            state, length = self._adapted(state, 0.0, length, _PILOT_FIRST)
            step_sizes.append(length)
            while betas[-1] < 1.0:
                difference = state.energy.double() - self.base(state.z)[0].double()
                change, hard = _change(difference, 1.0 - betas[-1])
                betas.append(1.0 if change >= 1.0 - betas[-1] else betas[-1] + change)
                hardness.append(hardness[-1] + hard)
                u = noise.uniform(
                    (), seed=self.seed, step=self.drawn(), stream=Stream.ANNEALING, device=difference.device
                )
                rows = weighted.systematic(-change * difference, u)
                state = AnnealedState(*(x[rows] for x in state))
                state, length = self._adapted(state, betas[-1], length, _PILOT_MOVES)
                step_sizes.append(length)
                if len(betas) > _PILOT_MOST or not math.isfinite(hard):
                    raise ValueError(
                        "energy must have a law that a path from the base leads to; the pilot is at beta "
                        f"{betas[-1]:.3g} after {len(betas)} temperatures, as where exp(-U) cannot be normalised"
                    )
        at, nodes = torch.tensor(hardness, dtype=torch.float64), torch.tensor(betas, dtype=torch.float64)
        wanted = torch.linspace(0, at[-1].item(), temperatures + 1, dtype=torch.float64)
        placed = interpolated(wanted, at, nodes).float().double()
        placed[0], placed[-1] = 0.0, 1.0
        lengths = torch.tensor(step_sizes, dtype=torch.float64).log()
        return Schedule(placed, interpolated(wanted, at, lengths).exp())

    def _adapted(self, state: AnnealedState, beta: float, length: float, moves: int) -> tuple[AnnealedState, float]:
        """The chains after ``moves`` transitions, and the step size that their acceptance led to."""
        one = torch.ones(1, dtype=torch.float64)
        logs = [math.log(length)]
        for _ in range(moves):
            state, accepted = self.move(state, beta * one, 0 * one, math.exp(logs[-1]) * one)
            logs.append(logs[-1] + _GAIN * (accepted.item() - self.target))
        half = logs[len(logs) // 2 :]
        return state, math.exp(sum(half) / len(half))


def interpolated(x: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """The values (M,) at the rising places ``at`` (M,), interpolated linearly at x."""
    right = torch.searchsorted(at, x).clamp(1, len(at) - 1)
    share = (x - at[right - 1]) / (at[right] - at[right - 1])
    return values[right - 1].lerp(values[right], share.clamp(0, 1))


def _change(difference: Tensor, most: float) -> tuple[float, float]:
    """How far beta can go, at most so far, for weights exp(-change difference) to keep the relative effective sample
    size, and how hard the way is: the standard deviation of weights that are log-normal and keep as much."""

    def kept(change: float) -> float:
        return weighted.ess(-change * difference).item()

    change = most
    if not kept(most) >= _CESS:
        low, high = math.log(1e-30), math.log(most)
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if kept(math.exp(middle)) >= _CESS else (low, middle)
        change = math.exp(low)
    return change, math.sqrt(max(-math.log(max(kept(change), 1e-300)), 1e-12))
