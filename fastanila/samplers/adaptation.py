"""The warm-up of an exact sampler: a step size by dual averaging and, if wanted, a diagonal metric from the chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from . import calibration
from .sampler import check_run
from .state import State

#: What part of a warm-up each window of the metric begins after; the last part is left to the step size, whose average
#: forgets most of what was before.
_WINDOWS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
#: Of Stan: the weight of the prior, in draws, and its variance, here as a part of the mean variance.
_PRIOR_DRAWS, _PRIOR_PART = 5, 1e-3
LEAST = 16  #: transitions in which a metric can be learned


class Found(NamedTuple):
    step_size: float
    scale: Tensor | None  #: of a state's shape, float32; None where no metric is learned
    z: Tensor  #: (B, ...) the chains, which went on meanwhile


def warm_up(
    sampler: Any,
    energy: Callable[[Tensor], Tensor] | None,
    z: Tensor,
    *,
    steps: int,
    seed: int,
    step: int,
    offset: int,
    mask: Tensor | None,
    target_acceptance: float | None,
    metric: bool,
    compile: bool,
) -> Found:
    """What `Adjusted.adapt` finds. ``metric``: of a `Preconditioned`, whose scale is learned too."""
    check(sampler, energy, z, steps, seed, step, offset, mask, least=LEAST if metric else 1)
    if metric and not len(z):
        raise ValueError("z must have chains to learn a metric from, got none")
    target = aim(sampler, target_acceptance)
    found = calibration.dual_averaging(sampler.step_size, z.device)
    place = sampler.numbers.index("step_size")
    begin, *ends = (int(part * steps) for part in _WINDOWS)
    free = None if mask is None else mask.to(z.device).expand(z.shape).any(0)
    moments = None

    with sampler._chain(energy, z, None, mask, seed, step, compile) as (chain, state, seed_t, step_t):
        numbers = list(sampler.numbers_on(z.device))
        if metric:
            numbers[-1] = numbers[-1].expand(z.shape[1:]).contiguous()
        for t in range(steps):
            numbers[place] = found.step_size
            state, info = chain(1, tuple(numbers), state, seed_t, step_t + t, offset, mask)
            state = state.unproposed()  # its proposal was made with a step size that changes
            found = calibration.averaged(found, info.acceptance.mean(), target)
            if not metric or not begin <= t < ends[-1]:
                continue
            moments = pooled(moments, state.z)
            if t + 1 in ends:
                numbers[-1], moments, state = scale_of(moments, free), None, State(state.z)
    return Found(found.kept.item(), numbers[-1] if metric else None, state.z)


def aim(sampler: Any, target_acceptance: float | None) -> float:
    """The acceptance rate to adapt to: the sampler's own by default. Raises ValueError for one that cannot be."""
    target = sampler.target_acceptance if target_acceptance is None else target_acceptance
    if not 0 < target < 1:
        raise ValueError(f"target_acceptance must be between 0 and 1, got {target}")
    return target


def check(sampler, energy, z, steps, seed, step, offset, mask, *, least: int = 1) -> None:
    """Raise ValueError, TypeError naming the argument of a warm-up that cannot be; ``least``: of its transitions."""
    check_run(sampler, z, steps, seed, step, offset, mask)
    checks.count("steps", steps, least=least)
    if energy is None:
        raise ValueError(f"energy must be given, for {type(sampler).__name__} compares energies, got None")
    checks.callables(energy=energy)


# ---------------------------------------------------------------------------------------------------------- the metric


class Moments(NamedTuple):
    """Of states of all chains and of some transitions."""

    draws: int
    mean: Tensor  #: of a state's shape, float32; so is the next
    squares: Tensor  #: sum of the squared deviations from the mean


def pooled(before: Moments | None, z: Tensor) -> Moments:
    """With the states z (B, ...) too (Welford's sums, joined as by Chan, Golub and LeVeque 1983)."""
    z, count = z.float(), len(z)
    mean = z.mean(0)
    squares = (z - mean).square().sum(0)
    if before is None:
        return Moments(count, mean, squares)
    total, apart = before.draws + count, mean - before.mean
    return Moments(
        total,
        before.mean + apart * (count / total),
        before.squares + squares + apart.square() * (before.draws * count / total),
    )


def scale_of(moments: Moments, free: Tensor | None = None) -> Tensor:
    """Standard deviations over their geometric mean: of a state's shape, float32.

    The variances are regularised as in Stan, by five draws more of a thousandth of the mean variance (Stan: of 0.001).
    ``free``: bool, of a state's shape: where False an element never moves, has scale 1 and counts for nothing.

    Raises ValueError if the variances are not finite, or all 0.
    """
    n, variance = moments.draws, moments.squares / max(moments.draws - 1, 1)
    of = variance.flatten() if free is None else variance[free]
    weight = _PRIOR_DRAWS / (n + _PRIOR_DRAWS)
    log_sd = 0.5 * ((1 - weight) * variance + weight * _PRIOR_PART * of.mean()).log()
    log_scale = log_sd - (log_sd.mean() if free is None else log_sd[free].mean())
    scale = (log_scale if free is None else torch.where(free, log_scale, 0.0)).exp()
    if not scale.isfinite().all():
        raise ValueError(
            f"z must be finite and move, for a metric to be learned, got variances from {variance.min():g} to "
            f"{variance.max():g}"
        )
    return scale
