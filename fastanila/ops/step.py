"""The anisotropic step for your own loop, new or in place: the checks of its arguments, and which path it takes.

What runs is `step_operators`: a Triton kernel on CUDA tensors, the plain definition on CPU tensors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import step_operators
from .arguments import (
    as_noise_scale,
    as_seed,
    as_step,
    as_step_size,
    as_threshold,
    check_alike,
    check_broadcast,
    check_chains,
    check_mask,
    check_norm,
    check_offset,
)
from .dispatch import direct, fused
from .reference import Statistics
from .schemas import StepArguments


def anisotropic_step(
    z: Tensor,
    score: Tensor,
    threshold: float | Tensor | None,
    *,
    step_size: float | Tensor = 1.0,
    noise_scale: float | Tensor = 1.0,
    norm: str = "element",
    seed: int | Tensor | None = None,
    step: int | Tensor | None = None,
    offset: int = 0,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    statistics: bool = False,
) -> Tensor | Any:
    """One anisotropic Langevin transition of a batch of chains (STANLEY: Karimi, Xie and Li, Algorithm 1).

        gamma_i = b / max(b, |s_i|)
        z_i'    = z_i + eps/2 * gamma_i * s_i + sigma * sqrt(eps * gamma_i) * xi_i,      xi ~ N(0, I)

    With b = inf it is the unadjusted Langevin step. The papers' step has eps = sigma = 1.

    Args:
        z: chains, (B, ...), float32, bfloat16 or float16, any memory layout.
        score: gradient of the log density f at z, of the same shape, dtype and device.
        threshold: b > 0, or inf, in the score's unit (1 / unit of z). None when gamma is given.
        step_size: eps > 0, in squared units of z.
        noise_scale: sigma >= 0, without unit.
        norm: what |s_i| is: "element", "channel" (L2 over dim 1, as in the authors' image code) or "chain" (L2 over
            all but dim 0; b then scales with the root of the dimension). On CUDA each is one kernel; more than 2,048
            channels run the plain definition with the same noise.
        seed: names the noise with ``step`` (see `fastanila.noise`), and is taken mod 2^64. Where both are left out, a
            fresh seed is drawn from torch's generator at each call.
        step: the transition's number, 0 <= step < 2^56.
        offset: the global index of the first chain, so that a slice of a batch gets the noise of its place.
        gamma: a frozen gain in (0, 1], broadcastable to z; the drift is then gamma * s.
        mask: bool, broadcastable to z; where False, z stays.
        bounds: (low, high); the result is clamped to them.
        statistics: return (z', `Statistics`) instead, of the score and gain that made the step, from the same kernel.

    threshold, step_size, noise_scale (any float dtype), seed and step (int64) may each be a 0-dim tensor on z's
    device, which may change without recompilation. Values inside tensors are not checked: that would stall the device.
    Compiled code should take seed and step as arguments: tensors made inside it from constants compile for minutes.

    Returns:
        The new state: contiguous, detached, of z's shape and dtype. Arithmetic is float32 whatever the storage;
        infinite scores move an element by eps * b / 2
        (norm="element"; with the others they share it), NaN scores give NaN to all that share their norm.

    Law: repeated with the score of f, it does not sample exp(f) unless b = inf and eps -> 0; see `fastanila.AniLA`.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what was expected.
    """
    z, score, arguments = prepare(
        z, score, threshold, step_size, noise_scale, norm, seed, step, offset, gamma, mask, bounds
    )
    if not fused(z, arguments.norm):
        return _plainly(z, score, arguments, statistics)
    # Here and not in the operator: under torch.compile the conversion of a network's channels_last gradient then fuses
    # with the negation that makes a score of it, where inside it would be a kernel of its own.
    score = score.contiguous()
    past_dispatcher = direct(z, score)
    if not statistics:
        if past_dispatcher:
            return step_operators.kernel_step(z, score, arguments)
        return step_operators.STEP(z, score, *arguments)
    if past_dispatcher:
        z, seen = step_operators.kernel_statistics(z, score, arguments)
    else:
        z, seen = step_operators.STATISTICS(z, score, *arguments)
    return z, Statistics(*seen.unbind())


def anisotropic_step_(
    z: Tensor,
    score: Tensor,
    threshold: float | Tensor | None,
    *,
    step_size: float | Tensor = 1.0,
    noise_scale: float | Tensor = 1.0,
    norm: str = "element",
    seed: int | Tensor | None = None,
    step: int | Tensor | None = None,
    offset: int = 0,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    statistics: bool = False,
) -> Tensor | Any:
    """`anisotropic_step`, written into z, which is returned. z may have any layout and may require grad."""
    target, score, arguments = prepare(
        z, score, threshold, step_size, noise_scale, norm, seed, step, offset, gamma, mask, bounds
    )
    if not fused(target, arguments.norm):
        made = _plainly(target, score, arguments, statistics)
        target.copy_(made[0] if statistics else made)
        return (z, made[1]) if statistics else z
    score = score.contiguous()
    if not statistics:
        step_operators.STEP_(target, score, *arguments)
        return z
    seen = step_operators.STATISTICS_(target, score, *arguments)
    return z, Statistics(*seen.unbind())


def _plainly(z, score, arguments: StepArguments, statistics: bool):
    """By the definition, and not by the operator that runs it, so that Inductor can fuse it."""
    moved = step_operators.plain_step(z, score, arguments)
    return (moved, step_operators.plain_statistics(score, arguments)) if statistics else moved


def prepare(
    z, score, threshold, step_size, noise_scale, norm, seed, step, offset, gamma, mask, bounds
) -> tuple[Tensor, Tensor, StepArguments]:
    """(z, score, the rest) as the operators take them: every argument checked, tensors detached."""
    check_chains(z)
    check_alike("score", score, z)
    check_norm(norm, z)
    if gamma is not None:
        if threshold is not None:
            raise ValueError(f"threshold must be None when gamma is given, got {threshold}")
        check_broadcast("gamma", gamma, z)
        if not gamma.is_floating_point():
            raise TypeError(f"gamma must be of a floating dtype, got {gamma.dtype}")
        threshold, norm = math.inf, "element"  # unused
    elif threshold is None:
        raise ValueError("threshold must be a positive number, inf or a 0-dim tensor unless gamma is given, got None")
    check_mask(mask, z)
    if bounds is not None:
        bounds = checks.bounds("bounds", bounds)
    if (seed is None) != (step is None):
        given, missing = ("step", "seed") if seed is None else ("seed", "step")
        raise ValueError(f"seed and step name the noise together: {given} was given, {missing} was not")
    if seed is None:
        seed, step = torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=z.device), 0
    check_offset(offset)
    arguments = StepArguments(
        *as_threshold(threshold, z), *as_step_size(step_size, z), *as_noise_scale(noise_scale, z), norm,
        *as_seed(seed, z), *as_step(step, z), offset, None if gamma is None else gamma.detach(), mask, bounds,
    )  # fmt: skip
    return z.detach(), score.detach(), arguments
