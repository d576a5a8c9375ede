"""A diagonal metric: an exact sampler that moves each element on a scale of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..models.score import Evaluate
from ..ops.arguments import check_chains
from ..ops.reference import Proposal
from . import adaptation
from .metropolis import Adapted, Adjusted
from .sampler import Sampler
from .state import State


class Scaled(NamedTuple):
    """What a chain of `Preconditioned` carries from transition to transition."""

    inner: State  #: of y = z / scale: y in the place of z, U, its score by y, the proposal for y
    scale: Tensor  #: of y's shape, or one that broadcasts to it

    @property
    def z(self) -> Tensor:
        return (self.inner.z * self.scale).to(self.inner.z.dtype)

    def unproposed(self) -> Scaled:
        """As `State.unproposed`."""
        return self._replace(inner=self.inner.unproposed())


@dataclasses.dataclass(frozen=True, eq=False)  # a tensor of many elements is no part of an equality or of a hash
class Preconditioned(Sampler):
    """An exact sampler with a diagonal metric (Roberts and Stramer 2002; Girolami and Calderhead 2011, whose metric
    here depends on no state): ``sampler`` moves y = z / scale with the energy U(scale y), by its own transition.

    Law: exp(-U), exactly, for any scale that stays as it is. With the standard deviations of z as the scale, a Gaussian
    of independent elements is as easy as one of equal variances. `adapt` learns such a scale.

    z moves by step_size scale^2. AdjustedAniLA's threshold is on the score of y, which is scale times that of z; so are
    score_rms, clip_fraction and gamma_mean of the `Info`. No kernel makes whole chains of it.

    Args:
        sampler: `MALA`, `AdjustedAniLA` or `HMC`.
        scale: positive floats that broadcast to a state, (...); None is 1. Elements that a mask holds have scale 1.
    """

    sampler: Any  #: an `Adjusted`
    scale: Tensor | None = None

    is_exact: ClassVar[bool] = True
    noise_scale: ClassVar[float] = 1.0
    bounds: ClassVar[None] = None

    def __post_init__(self):
        if not isinstance(self.sampler, Adjusted):
            raise TypeError(f"sampler must be MALA, AdjustedAniLA or HMC, got {type(self.sampler).__name__}")
        if not (self.scale is None or (isinstance(self.scale, Tensor) and self.scale.is_floating_point())):
            raise TypeError(f"scale must be a tensor of floats or None, got {self.scale!r}")

    @property
    def threshold(self) -> float | Tensor:
        return self.sampler.threshold

    @property
    def step_size(self) -> float | Tensor:
        return self.sampler.step_size

    @property
    def norm(self) -> str:  # type: ignore[override]
        return self.sampler.norm

    @property
    def is_one_graph(self) -> bool:  # type: ignore[override]
        return self.sampler.is_one_graph

    @property
    def target_acceptance(self) -> float:
        return self.sampler.target_acceptance

    @property
    def gradients(self) -> int:
        return self.sampler.gradients

    def scale_on(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The scale, float32 on z's device, 1 where ``mask`` is False: such elements keep every bit."""
        scale = 1.0 if self.scale is None else self.scale
        scale = torch.as_tensor(scale, dtype=torch.float32, device=z.device)
        return scale if mask is None else torch.where(mask, scale, 1.0)

    # ----------------------------------------------------------------------------------------------------- transitions

    def init(self, evaluate: Evaluate, z: Tensor, mask: Tensor | None = None) -> Scaled:  # type: ignore[override]
        started = self._started(State(z), mask)
        return started._replace(inner=self.sampler.init(scaled(evaluate, started.scale), started.inner.z))

    def init_by(self, advance, state, *, seed, step, offset, mask):
        before = self._started(state, mask)

        def moved(inner, seed, step, offset, mask):
            return advance(before._replace(inner=inner), seed, step, offset, mask).inner

        return before._replace(
            inner=self.sampler.init_by(moved, before.inner, seed=seed, step=step, offset=offset, mask=mask)
        )

    def proposal(self, z: Tensor, score: Tensor) -> Proposal:
        scale = self.scale_on(z)
        mean, sd = self.sampler.proposal(z / scale, score * scale)
        return Proposal(mean * scale, sd * scale)

    def transition(self, evaluate, state, *, seed, step, offset=0, mask=None, statistics=True):
        inner, scale = self._started(state, mask)
        after, info = self.sampler.transition(
            scaled(evaluate, scale), inner, seed=seed, step=step, offset=offset, mask=mask, statistics=statistics
        )
        return Scaled(after, scale), info

    def _started(self, state: State | Scaled, mask: Tensor | None) -> Scaled:
        if isinstance(state, Scaled):
            return state
        scale = self.scale_on(state.z, mask)
        return Scaled(State((state.z / scale).to(state.z.dtype)), scale)

    # ------------------------------------------------------------------------------------------------ runs and warm-up

    def run(self, energy, z, **settings):
        """As for `Sampler`. Raises ValueError, TypeError for a scale that does not fit z or is not positive."""
        self._check(z)
        return super().run(energy, z, **settings)

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
        """As `Adjusted.adapt`: the step size and, with ``metric``, the scale; then both are frozen.

        The scale is learned as in Stan, in short. The first eighth of the transitions moves the step size only. Windows
        follow, to a quarter, a half and three quarters of them. Each ends with the standard deviations of z over all
        chains and the window, over their geometric mean, for scale, and the step size goes on from there. The last
        quarter is the step size's.

        steps: with ``metric`` at least 16. Raises ValueError where chains are not finite, or none moves.
        """
        self._check(z)
        found = adaptation.warm_up(
            self, energy, z, steps=steps, seed=seed, step=step, offset=offset, mask=mask,
            target_acceptance=target_acceptance, metric=metric, compile=compile,
        )  # fmt: skip
        scale = self.scale if found.scale is None else found.scale
        return Adapted(Preconditioned(dataclasses.replace(self.sampler, step_size=found.step_size), scale), found.z)

    def _check(self, z) -> None:
        check_chains(z)
        if self.scale is None:
            return
        shape = tuple(z.shape[1:])
        fits = self.scale.dim() <= len(shape) and all(
            have in (1, want) for have, want in zip(self.scale.shape[::-1], shape[::-1], strict=False)
        )
        if not fits:
            raise ValueError(f"scale must broadcast to a state's shape {shape}, got {tuple(self.scale.shape)}")
        if not ((self.scale > 0) & (self.scale < math.inf)).all():
            low, high = self.scale.aminmax()
            raise ValueError(f"scale must be positive and finite, got values from {low:g} to {high:g}")

    def calibrate(self, energy, z, *, score=None, **settings):
        """This sampler with the inner one's step size, and threshold, as `Sampler.calibrate` proposes them at y."""
        self._check(z)
        scale = self.scale_on(z)
        found = self.sampler.calibrate(
            None if energy is None else lambda y: energy((y * scale).to(y.dtype)),
            (z / scale).to(z.dtype),
            score=None if score is None else lambda y: score((y * scale).to(y.dtype)) * scale,
            **settings,
        )
        return dataclasses.replace(self, sampler=found)

    # ------------------------------------------------------------------------------------------- what changes freely

    @property
    def numbers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.sampler.numbers, "scale")

    def numbers_on(self, device):
        scale = torch.ones(()) if self.scale is None else self.scale
        return (*self.sampler.numbers_on(device), scale.to(device=device, dtype=torch.float32))

    def placed_on(self, device):
        return self

    def with_numbers(self, numbers):
        *inner, scale = numbers
        return Preconditioned(self.sampler.with_numbers(tuple(inner)), scale)

    def built_in(self):
        kind, settings = self.sampler.built_in()
        return Preconditioned, (("sampler", kind(**dict(settings))),)


def scaled(evaluate: Evaluate, scale: Tensor) -> Evaluate:
    """y -> U(scale y) and its score by y, of z -> U(z) and its score."""

    def evaluate_y(y: Tensor) -> tuple[Tensor | None, Tensor]:
        energy, score = evaluate((y * scale).to(y.dtype))
        return energy, (score * scale).to(score.dtype)

    return evaluate_y
