"""Forms of AniLA for comparisons only: the step as its authors coded it, and the step without its clipped drift.

`AniLA` multiplies the drift by the gain and the noise by its root. Here other powers stand in both places, so that a
comparison can tell which of the two does the work. Neither form samples exp(-U): train with another.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..ops import reference
from ..ops.reference import Proposal
from .sampler import Sampler, check_settings
from .state import Info, State


@dataclasses.dataclass(frozen=True)
class _Powers(Sampler):
    """z' = z + eps/2 gamma^(q - 1) s + sigma sqrt(eps gamma^q) xi, gamma = 1 / max(1, |s| / b). A subclass says q."""

    threshold: float | Tensor = 1.0
    step_size: float | Tensor = 0.01
    noise_scale: float | Tensor = 1.0
    norm: str = "element"
    bounds: tuple[float, float] | None = None

    is_exact: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ("threshold", "step_size", "noise_scale")
    power: ClassVar[int]  #: q

    def __post_init__(self):
        check_settings(self)
        if self.bounds is not None:
            object.__setattr__(self, "bounds", checks.bounds("bounds", self.bounds))

    def _scaled(self, score: Tensor) -> tuple[Tensor, Tensor]:
        """(gamma^q, s / gamma): the anisotropic step with this frozen gain and this score is the transition."""
        wide = score if score.dtype == torch.float64 else score.float()
        excess = torch.clamp(reference.magnitude(wide, self.norm) / self.threshold, min=1.0)
        return excess**-self.power, excess * wide

    def proposal(self, z: Tensor, score: Tensor) -> Proposal:
        gain, scaled = self._scaled(score)
        # the gain of the drift is that of the noise, as in any step whose gain is given: s / gamma makes up for it
        return Proposal(
            z.to(scaled.dtype) + 0.5 * self.step_size * (gain * scaled),
            (self.noise_scale * (self.step_size * gain) ** 0.5).expand_as(scaled),
        )

    def transition(self, evaluate, state, *, seed, step, offset=0, mask=None, statistics=True):
        energy, score = evaluate(state.z)
        gain, scaled = self._scaled(score)
        z = ops.anisotropic_step(
            state.z,
            scaled.to(score.dtype),
            None,
            step_size=self.step_size,
            noise_scale=self.noise_scale,
            seed=seed,
            step=step,
            offset=offset,
            gamma=gain,
            mask=mask,
            bounds=self.bounds,
        )
        if not statistics:
            return State(z), None
        return State(z), Info.of(energy, reference.statistics(score, self.threshold, self.norm))


@dataclasses.dataclass(frozen=True)
class CodedAniLA(_Powers):
    """AniLA as its authors coded it: the gain itself, and not its root, in the noise. For comparison only.

        z' = z + eps/2 gamma s(z) + sigma sqrt(eps) gamma xi,      gamma = 1 / max(1, |s(z)| / b)

    Their code (github.com/BelhalK/baiduresearch, run_test_anisotropic.py for CIFAR-10) has z + gamma s + e gamma xi,
    |s| over the channels: ``norm="channel"``, ``step_size=2`` (no half in the drift), ``noise_scale=e / sqrt(2)``.

    Law: not exp(-U), however small the step. As eps -> 0 it is, in one dimension and for sigma = 1, proportional to
    max(1, |s| / b)^2 exp(integral of s max(1, |s| / b)): tails far lighter than the model's.

    An element whose score is infinite becomes NaN.

    Args:
        threshold: as for `AniLA`, and so are the others.
        step_size: eps, squared units of z.
        noise_scale: sigma.
        norm: "element", "channel" or "chain", what |s| is.
        bounds: (low, high), to which the chains are clamped.
    """

    power: ClassVar[int] = 2


@dataclasses.dataclass(frozen=True)
class ShrunkNoise(_Powers):
    """AniLA's noise with Langevin's drift, to tell what the noise does from what the clip does. For comparison only.

        z' = z + eps/2 s(z) + sigma sqrt(eps gamma) xi,      gamma = 1 / max(1, |s(z)| / b)

    `TamedLangevin` is the other half: the drift clipped, and the noise as it is.

    Law: not exp(-U), however small the step. As eps -> 0 it is, in one dimension and for sigma = 1, proportional to
    max(1, |s| / b) exp(integral of s max(1, |s| / b)): tails far lighter than the model's.

    Args:
        threshold: as for `AniLA`, and so are the others.
        step_size: eps, squared units of z.
        noise_scale: sigma.
        norm: "element", "channel" or "chain", what |s| is.
        bounds: (low, high), to which the chains are clamped.
    """

    power: ClassVar[int] = 1
