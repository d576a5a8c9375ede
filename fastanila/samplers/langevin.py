"""The samplers: each a frozen dataclass with the shape of `fastanila.samplers.sampler`, and its law in its docstring.

Unadjusted: `Langevin`, `AniLA`, `TamedLangevin`, `GradientDescent`. Exact, by a Metropolis correction: `MALA`,
`AdjustedAniLA`, `HMC` of `fastanila.samplers.metropolis`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..ops import reference
from ..ops.reference import Proposal
from .sampler import Sampler, check_settings
from .state import Info, State


@dataclasses.dataclass(frozen=True)
class Unadjusted(Sampler):
    """Samplers whose transition is `fastanila.ops.anisotropic_step` and nothing else. Use a subclass."""

    is_exact: ClassVar[bool] = False
    whole_chain: ClassVar[bool] = True

    def __post_init__(self):
        _check(self)

    def proposal(self, z: Tensor, score: Tensor) -> Proposal:
        return reference.proposal(
            z, score, self.threshold, step_size=self.step_size, noise_scale=self.noise_scale, norm=self.norm
        )

    def transition(self, evaluate, state, *, seed, step, offset=0, mask=None, statistics=True):
        energy, score = evaluate(state.z)
        gamma = state.gamma
        if gamma is None and self.refresh == "update":  # the chain starts: this gain is its gain
            gamma = reference.gain(score, self.threshold, self.norm)
        out = ops.anisotropic_step(
            state.z,
            score,
            self.threshold if gamma is None else None,
            step_size=self.step_size,
            noise_scale=self.noise_scale,
            norm=self.norm,
            seed=seed,
            step=step,
            offset=offset,
            gamma=gamma,
            mask=mask,
            bounds=self.bounds,
            statistics=statistics,
        )
        if not statistics:
            return State(out, gamma), None
        z, seen = out
        return State(z, gamma), Info.of(energy, seen)


@dataclasses.dataclass(frozen=True)
class Langevin(Unadjusted):
    """Unadjusted Langevin dynamics: z' = z + eps/2 s(z) + sigma sqrt(eps) xi.

    Law: exp(-U / sigma^2) up to a bias that vanishes with the step size, of order eps (the unadjusted Langevin
    algorithm: Roberts and Tweedie 1996).

    Args:
        step_size: eps, squared units of z.
        noise_scale: sigma.
        bounds: (low, high), to which the chains are clamped.
    """

    step_size: float | Tensor = 0.01
    noise_scale: float | Tensor = 1.0
    bounds: tuple[float, float] | None = None

    threshold: ClassVar[float] = math.inf
    numbers: ClassVar[tuple[str, ...]] = ("step_size", "noise_scale")


@dataclasses.dataclass(frozen=True)
class AniLA(Unadjusted):
    """Anisotropic Langevin dynamics (STANLEY: Karimi, Xie and Li, Algorithm 1).

        z' = z + eps/2 gamma s(z) + sigma sqrt(eps gamma) xi,      gamma = 1 / max(1, |s(z)| / b)

    Law: NOT exp(-U), however small the step. As eps -> 0 it is, with sigma = 1, exp(-U) prod_i max(1, |s_i| / b) for
    norm="element" when U is separable and exp(-U) max(1, |s| / b) for norm="chain": mass moves off the modes to the
    slopes. The bias grows with the fraction of elements that clip, so choose the threshold for few of them (a tenth,
    say), or use `AdjustedAniLA`, which is exact. With sigma, exp(-U / sigma^2) replaces exp(-U); the factors stay.

    Args:
        threshold: b, in the score's unit; inf is `Langevin`.
        step_size: eps, squared units of z.
        noise_scale: sigma.
        norm: "element", "channel" or "chain", what |s| is.
        bounds: (low, high), to which the chains are clamped.
        refresh: "transition" takes the gain gamma from every transition's own score. "update" takes it once, from the
            score where the chain starts (each `run`, each update of a training), and holds it, as the papers'
            Algorithm 1 is printed: a fixed preconditioner, whose drift gamma * s is no longer bounded. Within one long
            run its small-step law is exp(-U); chains that take a new gain every few transitions have a law between
            that and the one above.
    """

    threshold: float | Tensor = 1.0
    step_size: float | Tensor = 0.01
    noise_scale: float | Tensor = 1.0
    norm: str = "element"
    bounds: tuple[float, float] | None = None
    refresh: str = "transition"

    numbers: ClassVar[tuple[str, ...]] = ("threshold", "step_size", "noise_scale")


@dataclasses.dataclass(frozen=True)
class TamedLangevin(Sampler):
    """Tamed unadjusted Langevin dynamics: the drift clipped, the noise isotropic.

        z' = z + eps/2 gamma s(z) + sigma sqrt(eps) xi,      gamma = 1 / max(1, |s(z)| sqrt(eps) / b)

    so that a drift is at most b/2 standard deviations of the noise at sigma = 1, and no score can throw a chain away.
    The level b / sqrt(eps) at which |s| is clipped grows as the step shrinks, and so the bias does vanish with it:

    Law: exp(-U / sigma^2) up to a bias of order eps. (Were the level held fixed, it would be the law of the clipped
    score instead, whatever the step.) A truncated form of the coordinatewise tamed algorithm TULAc (Brosse, Durmus,
    Moulines and Sabanis 2019), whose level is 1 / eps; Atchade (2006) clips by the norm.

    Args:
        threshold: b, without unit; inf is `Langevin`.
        step_size: as for `AniLA`.
        noise_scale: as for `AniLA`.
        norm: as for `AniLA`.
        bounds: as for `AniLA`.

    Raises:
        ValueError, TypeError: for settings that cannot be.
    """

    threshold: float | Tensor = 1.0
    step_size: float | Tensor = 0.01
    noise_scale: float | Tensor = 1.0
    norm: str = "element"
    bounds: tuple[float, float] | None = None

    is_exact: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ("threshold", "step_size", "noise_scale")

    def __post_init__(self):
        _check(self)

    def proposal(self, z: Tensor, score: Tensor) -> Proposal:
        drift = self._tamed(score)
        return reference.proposal(z, drift, math.inf, step_size=self.step_size, noise_scale=self.noise_scale)

    def transition(self, evaluate, state, *, seed, step, offset=0, mask=None, statistics=True):
        energy, score = evaluate(state.z)
        z = ops.anisotropic_step(
            state.z,
            self._tamed(score),
            math.inf,
            step_size=self.step_size,
            noise_scale=self.noise_scale,
            seed=seed,
            step=step,
            offset=offset,
            mask=mask,
            bounds=self.bounds,
        )
        if not statistics:
            return State(z), None
        return State(z), Info.of(energy, reference.statistics(score, self._level, self.norm))

    @property
    def _level(self) -> float | Tensor:
        return self.threshold / self.step_size**0.5

    def _tamed(self, score: Tensor) -> Tensor:
        wide = score if score.dtype == torch.float64 else score.float()
        return reference.clipped(wide, self._level, self.norm)[1].to(score.dtype)

    def calibrate(self, energy, z, **options) -> TamedLangevin:
        """As `Sampler.calibrate`; the threshold is put in units of the proposed step."""
        found = super().calibrate(energy, z, **options)
        return dataclasses.replace(found, threshold=found.threshold * found.step_size**0.5)


@dataclasses.dataclass(frozen=True)
class GradientDescent(Unadjusted):
    """Gradient descent without noise, z' = z + eps/2 s(z): the comparison of the papers, not a sampler.

    Law: a point mass at whichever local minimum of U the chain's start falls to.

    Args:
        step_size: eps, squared units of z; the learning rate is half of it.
        bounds: (low, high), to which the chains are clamped.
    """

    step_size: float | Tensor = 0.01
    bounds: tuple[float, float] | None = None

    threshold: ClassVar[float] = math.inf
    noise_scale: ClassVar[float] = 0.0
    numbers: ClassVar[tuple[str, ...]] = ("step_size",)

    def calibrate(self, energy, z, **options) -> GradientDescent:
        """The step size that `Langevin` is given: there is no noise here to measure a drift against."""
        return dataclasses.replace(self, step_size=Langevin().calibrate(energy, z, **options).step_size)


def _check(sampler: Sampler) -> None:
    check_settings(sampler)
    if sampler.bounds is not None:
        object.__setattr__(sampler, "bounds", checks.bounds("bounds", sampler.bounds))
