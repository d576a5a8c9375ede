"""K transitions of a sampler in a single launch, on plain tensors (`samplers.whole_chain`: for which energies).

`mixture` and `mlp` take the chains, what describes their energy, and the settings as `prepare` has checked them. Both
return the chains after the last transition, and a (5, B) float32 buffer: the energy, mean gain, root mean square of the
score and clipped fraction of each chain where that transition started, and the probability of its acceptance. Neither
has a plain definition: they are for where `dispatch.fused`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, graphs
from . import dispatch, reference
from .arguments import as_noise_scale, as_seed, as_step, as_step_size, as_threshold
from .schemas import WholeChainArguments


def prepare(
    z: Tensor, *, threshold, step_size, noise_scale, norm: str, refresh: str, bounds, adjusted: bool, seed, step,
    steps: int, offset: int,
) -> WholeChainArguments:  # fmt: skip
    """The settings of `samplers.whole_chain.run`, checked, as the operators take them.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what was expected.
    """
    if norm not in reference.NORMS:
        raise ValueError(f"norm must be one of {', '.join(reference.NORMS)}, got {norm!r}")
    if refresh not in reference.REFRESHES:
        raise ValueError(f"refresh must be one of {', '.join(reference.REFRESHES)}, got {refresh!r}")
    if bounds is not None:
        bounds = checks.bounds("bounds", bounds)
    if adjusted:
        _check_adjusted(noise_scale, bounds, refresh)
    checks.count("steps", steps)
    checks.count("offset", offset, least=0)
    return WholeChainArguments(
        *as_threshold(threshold, z), *as_step_size(step_size, z), *as_noise_scale(noise_scale, z),
        *as_seed(seed, z), *as_step(step, z, steps), steps, offset,
        norm != "element", refresh == "update", bounds, bool(adjusted),
    )  # fmt: skip


def _check_adjusted(noise_scale, bounds, refresh: str) -> None:
    """Raise ValueError for what has no place beside a correction (why not: `samplers.metropolis.REFUSALS`)."""
    if isinstance(noise_scale, Tensor) or noise_scale != 1:
        raise ValueError(f"noise_scale must be 1, a number, where adjusted is True, got {noise_scale!r}")
    if bounds is not None:
        raise ValueError(f"bounds must be None where adjusted is True, got {bounds!r}")
    if refresh != "transition":
        raise ValueError(f"refresh must be 'transition' where adjusted is True, got {refresh!r}")


def mixture(
    z: Tensor, means: Tensor, sd: Tensor, log_scale: Tensor, arguments: WholeChainArguments
) -> tuple[Tensor, Tensor]:
    """Chains z (B, D) on -log sum_m exp(log_scale_m - |z - means_m|^2 / (2 sd_m^2)): means (M, D), sd, log_scale (M,).

    All float32; z contiguous and detached.
    """
    if dispatch.direct(z):
        return _mixture_kernel(z, means, sd, log_scale, arguments)
    return _MIXTURE(z, means, sd, log_scale, *arguments)


def mlp(
    z: Tensor, weights: list[Tensor], biases: list[Tensor], head: Tensor, head_bias: Tensor, projections: Tensor,
    confinement: float, leak: float | None, arguments: WholeChainArguments,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chains z (B, D) on a network of equally wide layers, its weights (out, in) as torch stores them.

    head and head_bias are its last layer, to one output; projections (F, D) the frequencies of its features, F = 0
    without. Its energy has confinement / 2 |z|^2 added. leak is the slope of the leaky ReLU, None for SiLU. All
    float32; z contiguous and detached. Whether such a network fits: `mlp_fits`.
    """
    if dispatch.direct(z):
        return _mlp_kernel(z, weights, biases, head, head_bias, projections, confinement, leak, arguments)
    return _MLP(z, weights, biases, head, head_bias, projections, confinement, leak, *arguments)


def mlp_fits(z: Tensor, weights: list[Tensor], projections: Tensor) -> bool:
    """Whether the device of z has the shared memory for `mlp`."""
    sizes = z.shape[1], len(weights[0]), len(weights), len(projections), len(z)
    return dispatch.kernels.mlp.mlp_constants(*sizes, shared_memory(z)) is not None


def shared_memory(z: Tensor) -> int:
    """Bytes of shared memory that one program may take on z's device."""
    return _device_shared_memory(z.device.index) if z.is_cuda else _INTERPRETERS_SHARED_MEMORY


_INTERPRETERS_SHARED_MEMORY = 232448  # an H100's, in bytes

graphs.prepare(compiling=False)  # which this decorator imports


@torch.compiler.assume_constant_result  # Dynamo does not trace what asks the driver
def _device_shared_memory(index: int) -> int:
    return dispatch.kernels.mlp.shared_memory(index)


# ------------------------------------------------------------------------------------------------------- the operators


def _mixture_kernel(z, means, sd, log_scale, arguments):
    def launch(out, statistics, options):
        tensors = (x.contiguous() for x in (means, sd, log_scale))
        dispatch.kernels.mixture.launch_mixture(z, *tensors, out, statistics, **options)

    return _launched(z, launch, arguments)


def _mlp_kernel(z, weights, biases, head, head_bias, projections, confinement, leak, arguments):
    def launch(out, statistics, options):
        dispatch.kernels.mlp.launch_mlp(
            z, [w.contiguous() for w in weights], [b.contiguous() for b in biases], head.contiguous(), head_bias,
            projections.contiguous(),
            out, statistics, confinement=confinement, leak=leak, shared=shared_memory(z), **options,
        )  # fmt: skip

    return _launched(z, launch, arguments)


def _launched(z: Tensor, launch, arguments: WholeChainArguments) -> tuple[Tensor, Tensor]:
    out, statistics = _outputs(z)
    options = dict(
        steps=arguments.steps, offset=arguments.offset, chain_norm=arguments.chain_norm, frozen=arguments.frozen,
        bounds=arguments.bounds, adjusted=arguments.adjusted, fast=z.is_cuda and torch.version.hip is None,
        **arguments.numbers(),
    )  # fmt: skip
    if z.numel():
        with dispatch.launching_on(z.device):
            launch(out, statistics, options)
    return out, statistics


def _outputs(z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z, memory_format=torch.contiguous_format), z.new_empty((5, z.shape[0]))


_MIXTURE = dispatch.register(
    "mixture_trajectory",
    ("Tensor z", "Tensor means", "Tensor sd", "Tensor log_scale"),
    WholeChainArguments,
    "(Tensor, Tensor)",
    kernel=_mixture_kernel,
    plain=None,
    fake=lambda z, *rest: _outputs(z),
)
_MLP = dispatch.register(
    "mlp_trajectory",
    (
        "Tensor z", "Tensor[] weights", "Tensor[] biases", "Tensor head", "Tensor head_bias", "Tensor projections",
        "float confinement", "float? leak",
    ),
    WholeChainArguments,
    "(Tensor, Tensor)",
    kernel=_mlp_kernel,
    plain=None,
    fake=lambda z, *rest: _outputs(z),
)  # fmt: skip
