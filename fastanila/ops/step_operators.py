"""The anisotropic step as torch.ops.fastanila.anisotropic_step, in place with a trailing underscore, and both with
statistics: registered, and launched.

The statistics of B chains are one (3, B) float32 buffer, in the order of reference.Statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import noise
from . import reference
from .dispatch import aligned, kernels, launching_on, register
from .reference import Statistics
from .schemas import StepArguments

# ------------------------------------------------------------------------------------------------- the plain definition


def plain_step(z: Tensor, score: Tensor, arguments: StepArguments) -> Tensor:
    if z.numel() == 0:
        return _empty(z)
    numbers = arguments.numbers()
    xi = noise.normal(
        z.shape,
        seed=numbers.pop("seed"),
        step=numbers.pop("step"),
        stream=noise.Stream.LANGEVIN,
        offset=arguments.offset,
        device=z.device,
    )
    return reference.anisotropic_step(
        z, score, norm=arguments.norm, gamma=arguments.gamma, mask=arguments.mask, bounds=arguments.bounds, noise=xi,
        **numbers,
    ).contiguous()  # fmt: skip


def plain_statistics(score: Tensor, arguments: StepArguments) -> Statistics:
    return reference.statistics(score, arguments.numbers()["threshold"], arguments.norm, arguments.gamma)


def _plain_step_(z, score, arguments) -> None:
    z.copy_(plain_step(z, score, arguments))


def _plain_with_statistics(z, score, arguments) -> tuple[Tensor, Tensor]:
    return plain_step(z, score, arguments), torch.stack(plain_statistics(score, arguments))


def _plain_with_statistics_(z, score, arguments) -> Tensor:
    moved, seen = _plain_with_statistics(z, score, arguments)
    z.copy_(moved)
    return seen


# ----------------------------------------------------------------------------------------------------------- the kernel


def kernel_step(z: Tensor, score: Tensor, arguments: StepArguments) -> Tensor:
    if not _has_kernel(z, arguments):
        return plain_step(z, score, arguments)
    with launching_on(z.device):
        z = z.contiguous()
        out = torch.empty_like(z)
        _launch(z, score, out, None, arguments)
    return out


def kernel_statistics(z: Tensor, score: Tensor, arguments: StepArguments) -> tuple[Tensor, Tensor]:
    """`kernel_step` and the statistics' buffer."""
    if not _has_kernel(z, arguments):
        return _plain_with_statistics(z, score, arguments)
    with launching_on(z.device):
        z = z.contiguous()
        out, seen = torch.empty_like(z), _buffer(z)
        _launch(z, score, out, seen, arguments)
    return out, seen


def _kernel_step_(z, score, arguments) -> None:
    if _goes_in_place(z, score, arguments):
        with launching_on(z.device):
            _launch(z, score, z, None, arguments)
    else:
        z.copy_(kernel_step(z, score, arguments))


def _kernel_statistics_(z, score, arguments) -> Tensor:
    if _goes_in_place(z, score, arguments):
        seen = _buffer(z)
        with launching_on(z.device):
            _launch(z, score, z, seen, arguments)
    else:
        out, seen = kernel_statistics(z, score, arguments)
        z.copy_(out)
    return seen


def _launch(z: Tensor, score: Tensor, out: Tensor, seen: Tensor | None, arguments: StepArguments) -> None:
    """Run the kernel that the shapes select: z and out contiguous, ``seen`` the statistics' buffer or None."""
    gamma, mask = arguments.gamma, arguments.mask
    norm = "element" if gamma is not None else arguments.norm
    view = kernels.step_rows.view(z.shape, norm)
    by_rows = seen is not None or view.norm != "element"
    common = dict(
        gamma=None if gamma is None else gamma.expand_as(z).contiguous(),
        mask=None if mask is None else aligned(mask.expand_as(z).contiguous()),
        first=arguments.offset * (z.numel() // z.shape[0]),
        bounds=arguments.bounds,
        fast=z.is_cuda and torch.version.hip is None,
        **arguments.numbers(),
    )
    if not by_rows:
        kernels.step.launch(z, score.contiguous(), out, **common)
        return
    if gamma is not None:
        common["gamma"] = aligned(common["gamma"])
    score = aligned(score.contiguous())
    kernels.step_rows.launch(aligned(z), score, out, seen, chains=len(z), **view._asdict(), **common)


def _has_kernel(z: Tensor, arguments: StepArguments) -> bool:
    return z.numel() > 0 and kernels.step_rows.fits(z.shape, arguments.norm)


def _goes_in_place(z: Tensor, score: Tensor, arguments: StepArguments) -> bool:
    in_order = z.is_contiguous() and z.data_ptr() % 16 == 0
    return in_order and _has_kernel(z, arguments) and not _shares(z, (score, *arguments))


def _shares(z: Tensor, others: tuple) -> bool:
    """Whether one of them lies in z's memory: a block must not write what another has yet to read."""
    storage = z.untyped_storage().data_ptr()
    return any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() == storage for x in others)


def _buffer(z: Tensor) -> Tensor:
    return torch.empty((len(Statistics._fields), z.shape[0]), dtype=torch.float32, device=z.device)


def _empty(z: Tensor) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


# -------------------------------------------------------------------------------------------------------- the operators

_NEW, _IN_PLACE = ("Tensor z", "Tensor score"), ("Tensor(a!) z", "Tensor score")

STEP = register(
    "anisotropic_step", _NEW, StepArguments, "Tensor",
    kernel=kernel_step, plain=plain_step, fake=lambda z, score, arguments: _empty(z),
)  # fmt: skip
STEP_ = register(
    "anisotropic_step_", _IN_PLACE, StepArguments, "()",
    kernel=_kernel_step_, plain=_plain_step_, fake=lambda z, score, arguments: None,
)  # fmt: skip
STATISTICS = register(
    "anisotropic_step_statistics", _NEW, StepArguments, "(Tensor, Tensor)",
    kernel=kernel_statistics, plain=_plain_with_statistics,
    fake=lambda z, score, arguments: (_empty(z), _buffer(z)),
)  # fmt: skip
STATISTICS_ = register(
    "anisotropic_step_statistics_", _IN_PLACE, StepArguments, "Tensor",
    kernel=_kernel_statistics_, plain=_plain_with_statistics_, fake=lambda z, score, arguments: _buffer(z),
)  # fmt: skip
