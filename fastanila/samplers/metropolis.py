"""Samplers made exact by a Metropolis correction: `MALA`, `AdjustedAniLA`, `HMC`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..models.score import Evaluate
from ..ops import reference
from ..ops.metropolis import metropolis_step
from ..ops.reference import Proposal
from . import adaptation
from .sampler import Sampler, check_settings
from .state import Info, State

#: Settings of the unadjusted samplers that these have not, and why.
REFUSALS = {
    "noise_scale": "the law is exp(-U) however loud the proposals; for a temperature T give the energy U / T",
    "bounds": "a clamped proposal has no density, and the correction would be wrong; let the energy rise towards them",
    "refresh": "a gain held from the chain's start would make the reverse move unlike the one proposed",
}

ABOVE_ALL = 1e30  #: an energy that no state has


class Adapted(NamedTuple):
    sampler: Any  #: of the same type, or a `Preconditioned` of it, with what was found, which stays as it is
    z: Tensor  #: (B, ...) the chains, which went on meanwhile


@dataclasses.dataclass(frozen=True)
class Adjusted(Sampler):
    """Samplers with a Metropolis correction. Use a subclass.

    Law: exp(-U), exactly, at any step size, up to float32's rounding of the energies and states. What is not so is how
    fast it forgets its start: watch Info.acceptance. A proposal whose acceptance ratio is not finite is rejected, so a
    chain that starts where the energy is not finite stays there. An energy that depends on the other chains (batch
    normalisation) or on chance (dropout) has no such law.

    They have no noise scale, bounds or frozen gain. Raises ValueError for one that is given, with the reason.
    """

    is_exact: ClassVar[bool] = True
    noise_scale: ClassVar[float] = 1.0
    bounds: ClassVar[None] = None
    #: acceptance rate that `adapt` aims at
    target_acceptance: ClassVar[float]

    def __new__(cls, *_, **settings):
        for name, reason in REFUSALS.items():
            if name in settings:
                raise ValueError(f"{name} must be left out of {cls.__name__}, got {settings[name]!r}: {reason}")
        return super().__new__(cls)

    def __post_init__(self):
        check_settings(self)

    def init(self, evaluate: Evaluate, z: Tensor) -> State:
        energy, score = evaluate(z)
        if energy is None:
            raise ValueError(f"energy must be given, for {type(self).__name__} compares energies, got a score only")
        return State(z, energy=energy.float(), score=score)

    def proposed(self, state: State, *, seed, step, offset: int = 0, mask: Tensor | None = None) -> State:
        """The state with the proposal that transition ``step`` judges, of samplers that make it ahead."""
        return state

    def adapt(
        self,
        energy: Callable[[Tensor], Tensor],
        z: Tensor,
        *,
        steps: int,
        seed: int,
        step: int = 0,
        offset: int = 0,
        mask: Tensor | None = None,
        target_acceptance: float | None = None,
        metric: bool = False,
        compile: bool = True,
    ) -> Adapted:
        """Move the step size, by dual averaging (Hoffman and Gelman 2014), to a mean acceptance over all chains.

        Makes ``steps`` transitions from z with a step size that follows their acceptance, and returns the sampler with
        the average found, frozen, and the chains. Transitions made meanwhile do not have the law: count them as
        warm-up. A few hundred chains settle within some 100 transitions; few chains take longer.

        Args:
            energy: as for `run`, with z, seed, step, offset, mask and compile.
            steps: transitions to make, at least one.
            target_acceptance: in (0, 1), default 0.574 (Roberts and Rosenthal 1998), HMC 0.8.
            metric: learn a diagonal metric too, and return a `Preconditioned` of this sampler: see its `adapt`.

        Raises:
            ValueError, TypeError: naming the argument, as `run` does.
        """
        settings = dict(
            steps=steps, seed=seed, step=step, offset=offset, mask=mask, target_acceptance=target_acceptance,
            compile=compile,
        )  # fmt: skip
        if metric:
            from .metric import Preconditioned  # whose file knows this one

            return Preconditioned(self).adapt(energy, z, metric=True, **settings)
        found = adaptation.warm_up(self, energy, z, metric=False, **settings)
        return Adapted(dataclasses.replace(self, step_size=found.step_size), found.z)


@dataclasses.dataclass(frozen=True)
class _AdjustedStep(Adjusted):
    """The Metropolis-adjusted anisotropic step: judges the last proposal and makes the next, one gradient for both.

    A chain in one kernel (`ops.whole_chain`) carries its place only: a run in pieces takes the energy and score
    there anew and makes the same proposal again, with the same noise, so that it makes the same decisions.
    """

    whole_chain: ClassVar[bool] = True
    target_acceptance: ClassVar[float] = 0.574

    def proposal(self, z: Tensor, score: Tensor) -> Proposal:
        return reference.proposal(z, score, self.threshold, step_size=self.step_size, norm=self.norm)

    def init_by(self, advance, state, *, seed, step, offset, mask):
        """By a transition ahead of the first, from an energy above all others to z itself. Since that is accepted, it
        leads to z, its energy, its score and the proposal of ``step``."""
        if state.score is None:
            z = state.z
            above = torch.full((len(z),), ABOVE_ALL, dtype=torch.float32, device=z.device)
            before = State(z, energy=above, score=torch.zeros_like(z), proposal=z.clone())
            state = advance(before, seed, step - 1, offset, mask)
            # rejected: energy or score at z is not finite. From an infinite energy nothing is accepted: the chain stays
            return state._replace(energy=torch.where(state.energy == ABOVE_ALL, math.inf, state.energy))
        return (
            state
            if state.proposal is not None
            else self.proposed(state, seed=seed, step=step, offset=offset, mask=mask)
        )

    def proposed(self, state, *, seed, step, offset=0, mask=None):
        settings = dict(step_size=self.step_size, norm=self.norm, seed=seed, step=step, offset=offset, mask=mask)
        return state._replace(proposal=ops.anisotropic_step(state.z, state.score, self.threshold, **settings))

    def transition(self, evaluate, state, *, seed, step, offset=0, mask=None, statistics=True):
        settings = dict(step_size=self.step_size, norm=self.norm, seed=seed, offset=offset, mask=mask)
        if state.score is None:
            state = self.init(evaluate, state.z)
        if state.proposal is None:
            state = self.proposed(state, seed=seed, step=step, offset=offset, mask=mask)
        proposal_energy, proposal_score = evaluate(state.proposal)
        moved = metropolis_step(
            state.z,
            state.score,
            state.energy,
            state.proposal,
            proposal_score,
            proposal_energy.float(),
            self.threshold,
            step=step,
            **settings,
        )
        after = State(moved.z, energy=moved.energy, score=moved.score, proposal=moved.proposal)
        if not statistics:
            return after, None
        seen = reference.statistics(state.score, self.threshold, self.norm)
        return after, Info.of(state.energy, seen, moved.acceptance)


@dataclasses.dataclass(frozen=True)
class MALA(_AdjustedStep):
    """Metropolis-adjusted Langevin (Roberts and Tweedie 1996): `Langevin`'s step, accepted or rejected.

    Law: exp(-U).

    Args:
        step_size: eps, squared units of z; the acceptance rate falls as it grows (`adapt` finds 0.574).
    """

    step_size: float | Tensor = 0.01

    threshold: ClassVar[float] = math.inf
    numbers: ClassVar[tuple[str, ...]] = ("step_size",)


@dataclasses.dataclass(frozen=True)
class AdjustedAniLA(_AdjustedStep):
    """Metropolis-adjusted anisotropic Langevin: `AniLA`'s step, accepted or rejected, with the densities of its
    position-dependent noise in the ratio (`fastanila.ops.reference.log_accept`).

    Law: exp(-U). In high dimension use norm="chain": with a gain an element the step size at a fixed acceptance falls
    as 1/D, with one a chain as D^(-1/3), as MALA's does.

    Args:
        threshold: b, in the score's unit; inf is `MALA`. With norm="chain" it scales with the root of the dimension.
        step_size: eps, squared units of z.
        norm: "element", "channel" or "chain", what |s| is.
    """

    threshold: float | Tensor = 1.0
    step_size: float | Tensor = 0.01
    norm: str = "element"

    numbers: ClassVar[tuple[str, ...]] = ("threshold", "step_size")
