"""K transitions of a sampler in a single launch, on plain tensors (`samplers.whole_chain`: for which energies)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, graphs
from . import dispatch
from .arguments import as_noise_scale, as_seed, as_step, as_step_size, as_threshold

if dispatch.TRITON:
    from ..kernels import mixture as _mixture
    from ..kernels import mlp as _mlp


_INTERPRETERS_SHARED_MEMORY = 232448  # an H100's, in bytes


# --------------------------------------------------------------------------------------------------- what is supported


def _shared_memory(z: Tensor) -> int:
    return _device_shared_memory(z.device.index) if z.is_cuda else _INTERPRETERS_SHARED_MEMORY


graphs.prepare(compiling=False)  # which this decorator imports


@torch.compiler.assume_constant_result  # Dynamo does not trace what asks the driver
def _device_shared_memory(index: int) -> int:
    return _mlp.shared_memory(index)


def _check_adjusted(noise_scale, bounds, refresh: str) -> None:
    """Raise ValueError for what has no place beside a correction (why not: `samplers.metropolis.REFUSALS`)."""
    if isinstance(noise_scale, Tensor) or noise_scale != 1:
        raise ValueError(f"noise_scale must be 1, a number, where adjusted is True, got {noise_scale!r}")
    if bounds is not None:
        raise ValueError(f"bounds must be None where adjusted is True, got {bounds!r}")
    if refresh != "transition":
        raise ValueError(f"refresh must be 'transition' where adjusted is True, got {refresh!r}")


def _numbers(z, threshold, step_size, noise_scale, seed, step, steps, offset) -> tuple:
    """The number-valued arguments, checked, as the operators take them."""
    checks.count("steps", steps)
    checks.count("offset", offset, least=0)
    return (
        *as_threshold(threshold, z), *as_step_size(step_size, z), *as_noise_scale(noise_scale, z),
        *as_seed(seed, z), *as_step(step, z, steps), steps, offset,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the operators

_ARGUMENTS = (
    "float threshold, Tensor? threshold_t, float step_size, Tensor? step_size_t, float noise_scale, "
    "Tensor? noise_scale_t, SymInt seed, Tensor? seed_t, SymInt step, Tensor? step_t, SymInt steps, SymInt offset, "
    "bool chain_norm, bool frozen, float[]? bounds, bool adjusted"
)
_library = torch.library.Library("fastanila", "FRAGMENT")
_library.define(
    f"mixture_trajectory(Tensor z, Tensor means, Tensor sd, Tensor log_scale, {_ARGUMENTS}) -> (Tensor, Tensor)"
)
_library.define(
    "mlp_trajectory(Tensor z, Tensor[] weights, Tensor[] biases, Tensor head, Tensor head_bias, Tensor projections, "
    f"float confinement, float? leak, {_ARGUMENTS}) -> (Tensor, Tensor)"
)


def _mixture_triton(z, means, sd, log_scale, *arguments):
    def launch(out, statistics, options):
        tensors = (x.contiguous() for x in (means, sd, log_scale))
        _mixture.launch_mixture(z, *tensors, out, statistics, **options)

    return _launched(z, launch, *arguments)


def _mlp_triton(z, weights, biases, head, head_bias, projections, confinement, leak, *arguments):
    def launch(out, statistics, options):
        _mlp.launch_mlp(
            z, [w.contiguous() for w in weights], [b.contiguous() for b in biases], head.contiguous(), head_bias,
            projections.contiguous(),
            out, statistics, confinement=confinement, leak=leak, shared=_shared_memory(z), **options,
        )  # fmt: skip

    return _launched(z, launch, *arguments)


def _launched(
    z, launch, threshold, threshold_t, step_size, step_size_t, noise_scale, noise_scale_t, seed, seed_t, step, step_t,
    steps, offset, chain_norm, frozen, bounds, adjusted,
):  # fmt: skip
    """(z after the steps, statistics (5, B)) of a kernel; z is contiguous."""
    out, statistics = _outputs(z)
    options = dict(
        threshold=threshold if threshold_t is None else threshold_t,
        step_size=step_size if step_size_t is None else step_size_t,
        noise_scale=noise_scale if noise_scale_t is None else noise_scale_t,
        seed=seed if seed_t is None else seed_t, step=step if step_t is None else step_t, steps=steps, offset=offset,
        adjusted=adjusted, bounds=bounds, chain_norm=chain_norm, frozen=frozen,
        fast=z.is_cuda and torch.version.hip is None,
    )  # fmt: skip
    if z.numel():
        with dispatch.launching_on(z.device):
            launch(out, statistics, options)
    return out, statistics


def _outputs(z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z, memory_format=torch.contiguous_format), z.new_empty((5, z.shape[0]))


for _device in (["CUDA"] if dispatch.TRITON else []) + (["CPU"] if dispatch.INTERPRETED else []):
    _library.impl("mixture_trajectory", _mixture_triton, _device)
    _library.impl("mlp_trajectory", _mlp_triton, _device)


@torch.library.register_fake("fastanila::mixture_trajectory")
def _(z, *arguments):
    return _outputs(z)


@torch.library.register_fake("fastanila::mlp_trajectory")
def _(z, *arguments):
    return _outputs(z)
