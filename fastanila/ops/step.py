"""Operators: argument checks, schema, and the choice of implementation by device.

``torch.ops.fastanila.anisotropic_step`` and its in-place twin run the Triton kernel on CUDA tensors and the plain
definition of fastanila.ops.reference on CPU tensors. The Python functions of the same names are the public face.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks, noise
from . import reference
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
from .dispatch import INTERPRETED, TRITON, aligned, direct, fused, launching_on
from .reference import Statistics

if TRITON:
    from ..kernels import step as _kernel
    from ..kernels import step_rows as _rows

# A number becomes a constant of a compiled graph, a 0-dim tensor stays free to change: hence the pairs.
_ARGUMENTS = (
    "Tensor score, float threshold, Tensor? threshold_t, float step_size, Tensor? step_size_t, float noise_scale, "
    "Tensor? noise_scale_t, str norm, SymInt seed, Tensor? seed_t, SymInt step, Tensor? step_t, SymInt offset, "
    "Tensor? gamma, Tensor? mask, float[]? bounds"
)
_library = torch.library.Library("fastanila", "DEF")
_library.define(f"anisotropic_step(Tensor z, {_ARGUMENTS}) -> Tensor")
_library.define(f"anisotropic_step_(Tensor(a!) z, {_ARGUMENTS}) -> ()")
# the statistics come as one (3, B) buffer, in the order of reference.Statistics
_library.define(f"anisotropic_step_statistics(Tensor z, {_ARGUMENTS}) -> (Tensor, Tensor)")
_library.define(f"anisotropic_step_statistics_(Tensor(a!) z, {_ARGUMENTS}) -> Tensor")


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
) -> Tensor | tuple[Tensor, Statistics]:
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
    z, arguments = _prepare(z, score, threshold, step_size, noise_scale, norm, seed, step, offset, gamma, mask, bounds)
    if not fused(z, arguments[_NORM]):
        return _plainly(z, arguments, statistics)  # not the operator, so that Inductor fuses it
    arguments = _contiguous_score(arguments)
    step, with_statistics = (_step_triton, _statistics_triton) if direct(z, arguments[0]) else (_op, _op_statistics)
    if not statistics:
        return step(z, *arguments)
    z, seen = with_statistics(z, *arguments)
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
) -> Tensor | tuple[Tensor, Statistics]:
    """`anisotropic_step`, written into z, which is returned. z may have any layout and may require grad."""
    target, arguments = _prepare(
        z, score, threshold, step_size, noise_scale, norm, seed, step, offset, gamma, mask, bounds
    )
    if not fused(target, arguments[_NORM]):
        made = _plainly(target, arguments, statistics)
        target.copy_(made[0] if statistics else made)
        return (z, made[1]) if statistics else z
    arguments = _contiguous_score(arguments)
    if not statistics:
        torch.ops.fastanila.anisotropic_step_(target, *arguments)
        return z
    seen = torch.ops.fastanila.anisotropic_step_statistics_(target, *arguments)
    return z, Statistics(*seen.unbind())


_op = torch.ops.fastanila.anisotropic_step
_op_statistics = torch.ops.fastanila.anisotropic_step_statistics


# ------------------------------------------------------------------------------------------------ implementations


def _reference(
    z, score, threshold, threshold_t, step_size, step_size_t, noise_scale, noise_scale_t, norm,
    seed, seed_t, step, step_t, offset, gamma, mask, bounds,
):  # fmt: skip
    if z.numel() == 0:
        return torch.empty_like(z, memory_format=torch.contiguous_format)
    xi = noise.normal(
        z.shape,
        seed=seed if seed_t is None else seed_t,
        step=step if step_t is None else step_t,
        stream=noise.Stream.LANGEVIN,
        offset=offset,
        device=z.device,
    )
    return reference.anisotropic_step(
        z,
        score,
        threshold if threshold_t is None else threshold_t,
        step_size=step_size if step_size_t is None else step_size_t,
        noise_scale=noise_scale if noise_scale_t is None else noise_scale_t,
        norm=norm,
        gamma=gamma,
        mask=mask,
        bounds=bounds,
        noise=xi,
    ).contiguous()


def _plainly(z, arguments, statistics: bool):
    moved = _reference(z, *arguments)
    return (moved, _seen(*arguments)) if statistics else moved


def _seen(
    score, threshold, threshold_t, step_size, step_size_t, noise_scale, noise_scale_t, norm,
    seed, seed_t, step, step_t, offset, gamma, mask, bounds,
) -> Statistics:  # fmt: skip
    return reference.statistics(score, threshold if threshold_t is None else threshold_t, norm, gamma)


def _contiguous_score(arguments: tuple) -> tuple:
    # Here and not in the operator: under torch.compile the conversion of a network's channels_last gradient then fuses
    # with the negation that makes a score of it, where inside it would be a kernel of its own.
    return arguments[0].contiguous(), *arguments[1:]


def _launch(
    z, out, seen, score, threshold, threshold_t, step_size, step_size_t, noise_scale, noise_scale_t, norm,
    seed, seed_t, step, step_t, offset, gamma, mask, bounds,
):  # fmt: skip
    """Run the kernel that the shapes select: z and out contiguous, ``seen`` a (3, B) float32 buffer or None."""
    norm = "element" if gamma is not None else norm
    common = dict(
        gamma=None if gamma is None else gamma.expand_as(z).contiguous(),
        mask=None if mask is None else aligned(mask.expand_as(z).contiguous()),
        threshold=threshold if threshold_t is None else threshold_t,
        step_size=step_size if step_size_t is None else step_size_t,
        noise_scale=noise_scale if noise_scale_t is None else noise_scale_t,
        seed=seed if seed_t is None else seed_t,
        step=step if step_t is None else step_t,
        first=offset * (z.numel() // z.shape[0]),
        bounds=bounds,
        fast=z.is_cuda and torch.version.hip is None,
    )
    if seen is None and (norm == "element" or _rows.view(z.shape, norm).norm == "element"):
        _kernel.launch(z, score.contiguous(), out, **common)
    else:
        common["gamma"] = None if gamma is None else aligned(common["gamma"])
        view = _rows.view(z.shape, norm)._asdict()
        _rows.launch(aligned(z), aligned(score.contiguous()), out, seen, chains=len(z), **view, **common)


def _has_kernel(z, arguments: tuple) -> bool:
    return z.numel() > 0 and _rows.fits(z.shape, arguments[_NORM])


_NORM = 7  # its place among the operators' arguments


def _step_triton(z, *arguments):
    if not _has_kernel(z, arguments):
        return _reference(z, *arguments)
    with launching_on(z.device):
        z = z.contiguous()
        out = torch.empty_like(z)
        _launch(z, out, None, *arguments)
    return out


def _statistics_triton(z, *arguments):
    if not _has_kernel(z, arguments):
        return _statistics_reference(z, *arguments)
    with launching_on(z.device):
        z = z.contiguous()
        out, seen = torch.empty_like(z), _buffer(z)
        _launch(z, out, seen, *arguments)
    return out, seen


def _step_triton_(z, *arguments):
    if _goes_in_place(z, arguments):
        with launching_on(z.device):
            _launch(z, z, None, *arguments)
    else:
        z.copy_(_step_triton(z, *arguments))


def _statistics_triton_(z, *arguments):
    if _goes_in_place(z, arguments):
        seen = _buffer(z)
        with launching_on(z.device):
            _launch(z, z, seen, *arguments)
    else:
        out, seen = _statistics_triton(z, *arguments)
        z.copy_(out)
    return seen


def _goes_in_place(z: Tensor, arguments: tuple) -> bool:
    in_order = z.is_contiguous() and z.data_ptr() % 16 == 0
    return in_order and _has_kernel(z, arguments) and not _shares(z, arguments)


def _shares(z: Tensor, arguments: tuple) -> bool:
    """Whether an argument lies in z's memory: a block must not write what another has yet to read."""
    storage = z.untyped_storage().data_ptr()
    return any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() == storage for x in arguments)


def _buffer(z: Tensor) -> Tensor:
    return torch.empty((len(Statistics._fields), z.shape[0]), dtype=torch.float32, device=z.device)


def _step_reference_(z, *arguments):
    z.copy_(_reference(z, *arguments))


def _statistics_reference(z, *arguments):
    moved, seen = _plainly(z, arguments, statistics=True)
    return moved, torch.stack(seen)


def _statistics_reference_(z, *arguments):
    moved, seen = _statistics_reference(z, *arguments)
    z.copy_(moved)
    return seen


def _register(device: str, kernels: bool) -> None:
    _library.impl("anisotropic_step", _step_triton if kernels else _reference, device)
    _library.impl("anisotropic_step_", _step_triton_ if kernels else _step_reference_, device)
    _library.impl("anisotropic_step_statistics", _statistics_triton if kernels else _statistics_reference, device)
    _library.impl("anisotropic_step_statistics_", _statistics_triton_ if kernels else _statistics_reference_, device)


_register("CPU", kernels=INTERPRETED)
_register("CUDA", kernels=TRITON)


@torch.library.register_fake("fastanila::anisotropic_step")
def _(z, *arguments):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastanila::anisotropic_step_")
def _(z, *arguments):
    return None


@torch.library.register_fake("fastanila::anisotropic_step_statistics")
def _(z, *arguments):
    return torch.empty_like(z, memory_format=torch.contiguous_format), _buffer(z)


@torch.library.register_fake("fastanila::anisotropic_step_statistics_")
def _(z, *arguments):
    return _buffer(z)


# --------------------------------------------------------------------------------------------------------- checks


def _prepare(z, score, threshold, step_size, noise_scale, norm, seed, step, offset, gamma, mask, bounds):
    """Check every argument and lay them out as the operators take them, detached; returns (z, the rest)."""
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
    return z.detach(), (
        score.detach(), *as_threshold(threshold, z), *as_step_size(step_size, z),
        *as_noise_scale(noise_scale, z), norm, *as_seed(seed, z), *as_step(step, z), offset,
        None if gamma is None else gamma.detach(), mask, bounds,
    )  # fmt: skip
