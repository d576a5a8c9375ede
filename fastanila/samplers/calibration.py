"""Settings found from the chains: a threshold and a step size from their scores, a step size from their acceptance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..models.score import evaluator, sampling
from ..ops import reference
from ..ops.arguments import check_chains, check_norm


class Calibration(NamedTuple):
    threshold: float  #: b at which the wanted fraction of elements would clip
    step_size: float  #: eps at which the drift of an unclipped element is small beside its noise
    score_rms: float  #: over all chains and elements


def calibrate(
    energy: Callable[[Tensor], Tensor] | None,
    z: Tensor,
    *,
    score: Callable[[Tensor], Tensor] | None = None,
    clip_fraction: float = 0.05,
    norm: str = "element",
    stability: float = 0.1,
    noise_scale: float = 1.0,
) -> Calibration:
    """Propose a threshold and a step size from the scores of the chains z, (B, ...), one gradient.

    The threshold is the (1 - clip_fraction) quantile of |s| under ``norm``. The step size makes the score's own
    change over a step small: eps = 4 stability sigma^2 / rms(s)^2, at which a typical drift eps/2 rms(s) is
    sqrt(stability) times the noise sigma sqrt(eps). On a Gaussian the unadjusted chain's variance is then too large
    by a fraction ``stability``; where the energy's curvature is uneven its stiffest directions suffer more.
    Take z from data or from settled chains.

    Raises ValueError if the scores are not finite or all zero, ValueError, TypeError for an argument that cannot be.
    """
    check_chains(z)
    check_norm(norm, z)
    checks.callables(energy=energy, score=score)
    if not 0 < clip_fraction < 1:
        raise ValueError(f"clip_fraction must be between 0 and 1, got {clip_fraction}")
    checks.positive("stability", stability, finite=True)
    checks.positive("noise_scale", noise_scale, finite=True)
    with torch.no_grad(), sampling(energy if score is None else score):
        _, s = evaluator(energy, score)(z.detach())
    size = reference.magnitude(s.double(), norm).flatten()
    rms = s.double().square().mean().sqrt().item()
    if not 0 < rms < math.inf:
        raise ValueError(f"the scores at z must be finite and not all zero, got a root mean square of {rms}")
    # kthvalue, because torch.quantile refuses more than 2**24 elements
    rank = min(size.numel(), max(1, math.ceil((1 - clip_fraction) * size.numel())))
    threshold = size.kthvalue(rank).values.item()
    if threshold == 0:
        raise ValueError(f"clip_fraction must be larger: {clip_fraction} leaves a threshold of 0, most scores being 0")
    return Calibration(threshold, 4 * stability * (noise_scale / rms) ** 2, rms)


# ------------------------------------------------------------------------------------------------ dual averaging

#: Of Hoffman and Gelman (2014, section 3.2): how strongly, how early and how long the step size is moved.
_SHRINKAGE, _DELAY, _DECAY = 0.05, 10.0, 0.75


class DualAveraging(NamedTuple):
    """A step size on its way to an acceptance rate: 0-dim float32 tensors, h = sqrt(eps) being the length adapted."""

    log_h: Tensor  #: what the next transition is to use
    log_h_mean: Tensor  #: its average, later values weighing more: what to keep
    shortfall: Tensor  #: sum of target - acceptance so far
    count: Tensor  #: transitions so far
    centre: Tensor  #: log_h shrinks towards it

    @property
    def step_size(self) -> Tensor:
        return (2 * self.log_h).exp()

    @property
    def kept(self) -> Tensor:
        return (2 * self.log_h_mean).exp()


def dual_averaging(step_size: float | Tensor, device=None) -> DualAveraging:
    """The start: it first tries ten times that length, which costs little if it is too long."""
    log_h = 0.5 * torch.as_tensor(step_size, dtype=torch.float32, device=device).log()
    zero = torch.zeros_like(log_h)
    return DualAveraging(log_h, log_h, zero, zero, log_h + math.log(10))


def averaged(before: DualAveraging, acceptance: Tensor, target: float) -> DualAveraging:
    """After a transition whose mean acceptance probability was ``acceptance``, a 0-dim tensor (Hoffman and Gelman 2014,
    equation 6): log h moves against the mean shortfall, ever less, and is averaged."""
    count = before.count + 1
    shortfall = before.shortfall + target - acceptance
    log_h = before.centre - count.sqrt() / (_SHRINKAGE * (count + _DELAY)) * shortfall
    weight = count**-_DECAY
    return DualAveraging(log_h, torch.lerp(before.log_h_mean, log_h, weight), shortfall, count, before.centre)
