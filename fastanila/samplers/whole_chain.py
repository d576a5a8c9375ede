"""All transitions of a chain in one kernel: for which energies, and how.

The samplers are those whose transition is the anisotropic step, as it is (`samplers.AniLA`, `Langevin`) or accepted or
rejected (`AdjustedAniLA`, `MALA`).

The state stays in registers, the network on chip, and the noise is the stream of `fastanila.noise`, so that `run` gives
what the transitions would give one by one, to rounding. It exists for `models.GaussianMixture` and `models.MLP` of
limited size, float32, on CUDA (or in Triton's interpreter); `supports` says for which, and there is no fallback here.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.energies import MLP, GaussianMixture
from ..ops import dispatch
from ..ops import whole_chain as operators

#: Limits of the kernels: elements of a state, units of a layer, hidden layers, Fourier features.
MAX_DIM, MAX_WIDTH, MAX_DEPTH, MAX_FEATURES = 8, 128, 3, 128


class Trajectory(NamedTuple):
    """The chains after a run, and what its last transition saw of each at the state it started from."""

    z: Tensor  #: (B, D)
    energy: Tensor  #: (B,) float32, as are the next four
    gamma_mean: Tensor  #: mean of the gain over the elements, in (0, 1]
    score_rms: Tensor  #: root mean square of the score's elements, 1 / unit of z
    clip_fraction: Tensor  #: fraction of elements whose gain is below 1
    acceptance: Tensor  #: probability of acceptance; 1 without correction


def supports(energy, z: Tensor, *, mask: Tensor | None = None) -> bool:
    """Whether `run` takes this energy and these chains: decided by settings, shapes and the machine alone."""
    return refusal(energy, z, mask=mask) is None


def refusal(energy, z: Tensor, *, mask: Tensor | None = None) -> str | None:
    """Why `run` does not take them, as a phrase; None where it does."""
    found = _fitting(energy, z, mask)
    return found if isinstance(found, str) else None


def run(
    energy: GaussianMixture | MLP,
    z: Tensor,
    *,
    threshold: float | Tensor,
    step_size: float | Tensor,
    noise_scale: float | Tensor = 1.0,
    norm: str = "element",
    refresh: str = "transition",
    bounds: tuple[float, float] | None = None,
    adjusted: bool = False,
    seed: int | Tensor,
    step: int | Tensor,
    steps: int,
    offset: int = 0,
) -> Trajectory:
    """Transitions step, step + 1, ..., step + steps - 1 of the chains z, in one launch.

    Args:
        energy: a GaussianMixture or MLP, whose parameters are read as they are at the launch.
        z: chains, (B, D), float32. Not changed. D is at most 8.
        threshold: b > 0, or inf for plain Langevin. step_size: eps > 0. noise_scale: sigma >= 0.
        norm: "element", or "chain" ("channel" is the same here). refresh: "transition", or "update", which takes the
            gain at the chains' start and keeps it for all transitions; the drift is then gamma * s.
        bounds: (low, high), to which the chains are clamped after each transition.
        adjusted: accept or reject each move, as `ops.metropolis_step` does. The noise scale is then 1,
            and there are no bounds and no gain held for the update.
        seed, step: name the noise: seed is taken mod 2^64, and 0 <= step < 2^56. offset: global index of chain 0.
        steps: at least 1.

    threshold, step_size, noise_scale (floating) and seed, step (int64) may each be a 0-dim tensor on z's device, which
    a captured graph's replays read anew. Values inside tensors are not checked.

    Law and source: those of `samplers.AniLA` (STANLEY, Algorithm 1), or of `samplers.Langevin` where b = inf. Adjusted:
    exp(-U), up to float32's rounding of energies and states (Metropolis et al. 1953, Hastings 1970; Roberts and Tweedie
    1996 where b = inf). Transition t makes its proposal with the normals of step t and judges it by the acceptance
    uniform of step t, so that runs one after the other make the decisions of one long run.

    Returns:
        A Trajectory of new, detached tensors. A NaN score gives NaN; infinite ones move an element by eps * b / 2.
        Adjusted: a proposal whose acceptance ratio is not finite is rejected, with acceptance 0.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what was expected; also where `supports` is False.
    """
    made = attempt(
        energy, z, threshold=threshold, step_size=step_size, noise_scale=noise_scale, norm=norm, refresh=refresh,
        bounds=bounds, adjusted=adjusted, seed=seed, step=step, steps=steps, offset=offset,
    )  # fmt: skip
    if isinstance(made, str):
        raise ValueError(f"energy and z must be what fastanila.samplers.whole_chain supports, but {made}")
    out, statistics = made
    return Trajectory(out, *statistics.unbind())


def attempt(
    energy, z: Tensor, *, threshold, step_size, noise_scale, norm: str, refresh: str, bounds, adjusted: bool,
    seed, step, steps: int, offset: int, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor] | str:  # fmt: skip
    """`run` as (z, statistics (5, B)), or, as a phrase, why no kernel makes it."""
    parts = _fitting(energy, z, mask)
    if isinstance(parts, str):
        return parts
    arguments = operators.prepare(
        z, threshold=threshold, step_size=step_size, noise_scale=noise_scale, norm=norm, refresh=refresh,
        bounds=bounds, adjusted=adjusted, seed=seed, step=step, steps=steps, offset=offset,
    )  # fmt: skip
    z = z.detach().contiguous()
    if isinstance(energy, GaussianMixture):
        return operators.mixture(z, *parts.tensors, arguments)
    return operators.mlp(z, *parts.tensors, float(energy.confinement), parts.leak, arguments)


def _fitting(energy, z: Tensor, mask: Tensor | None) -> _Parts | str:
    """What a launch reads of the energy; or, as a phrase, what no kernel takes. Traced by torch.compile."""
    if type(energy) not in (GaussianMixture, MLP):
        return f"energy is a {type(energy).__name__}, not a GaussianMixture or MLP"
    if z.device.type not in ("cuda", "cpu") or not dispatch.fused(z.device):
        return f"no Triton kernel runs on z's device {z.device}, or ops.plain() is in force"
    if mask is not None:
        return "there is a mask"
    if z.dim() != 2:
        return f"z has shape {tuple(z.shape)}, not (B, D)"
    if z.dtype != torch.float32:
        return f"z is {z.dtype}, not float32"
    if not 1 <= z.shape[1] <= MAX_DIM:
        return f"a state has {z.shape[1]} elements, not 1 to {MAX_DIM}"
    if torch.is_autocast_enabled(z.device.type):
        return "autocast is on"
    parts = _parts(energy)
    if parts.unfit is not None:
        return parts.unfit
    if parts.device != z.device:
        return f"the energy's parameters are on {parts.device}, and z on {z.device}"
    if parts.dim != z.shape[1]:
        return f"the energy is of {parts.dim} elements, and z has {z.shape[1]}"
    if isinstance(energy, MLP):
        weights, *_, projections = parts.tensors
        if not operators.mlp_fits(z, weights, projections):
            return "a layer of the energy exceeds the device's shared memory"
    return parts


class _Parts(NamedTuple):
    """What a launch reads of an energy, and what of its structure, if anything, no kernel takes."""

    unfit: str | None
    device: torch.device | None = None
    dim: int = 0  #: elements of a state
    leak: float | None = None  #: the slope of the leaky ReLU, None for SiLU
    #: of an MLP weights, biases, the head's weight and bias, projections; of a mixture means, sd, log_scale. Detached:
    #: they share the parameters' memory
    tensors: tuple = ()


def _parts(energy: GaussianMixture | MLP) -> _Parts:
    """Looked up once for each energy, and again whenever a part of it was exchanged or moved."""
    if torch.compiler.is_compiling():
        return _parts_of(energy)
    known = _known.get(energy)
    if known is None or _fingerprint((energy, *known.below)) != known.fingerprint:
        modules = tuple(energy.modules())
        known = _known[energy] = _Known(modules[1:], _fingerprint(modules), _parts_of(energy))
    return known.parts


class _Known(NamedTuple):
    below: tuple[nn.Module, ...]  #: all modules but the energy itself, with whose life this knowledge ends
    fingerprint: tuple
    parts: _Parts


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def _fingerprint(modules: Sequence[nn.Module]) -> tuple:
    """Equal while every part is the same object, every tensor lies where it lay, and hooks and slopes are the same."""
    found: list[float | None] = []
    for m in modules:
        found += map(id, m._modules.values())
        for t in (*m._parameters.values(), *m._buffers.values()):
            if t is not None:
                found += (id(t), t.data_ptr())
        found += (len(m._forward_hooks) + len(m._forward_pre_hooks), m.__dict__.get("negative_slope"))
    return tuple(found)


def _parts_of(energy: GaussianMixture | MLP) -> _Parts:
    tensors = [*energy.parameters(), *energy.buffers()]
    if any(t.dtype != torch.float32 or t.device != tensors[0].device for t in tensors):
        return _Parts("the energy's parameters are not all float32 on z's device")
    if any(m._forward_hooks or m._forward_pre_hooks for m in energy.modules()):
        return _Parts("the energy has forward hooks")
    if isinstance(energy, GaussianMixture):
        return _Parts(
            None, energy.means.device, energy.means.shape[1], None, (energy.means, energy.sd, energy.log_scale)
        )
    unfit = _unfit_network(energy)
    if unfit is not None:
        return _Parts(unfit)
    layers, activation = _linears(energy), energy.layers[1]
    features = len(energy.projections)
    return _Parts(
        None,
        energy.head.weight.device,
        energy.projections.shape[1] if features else layers[0].in_features,
        activation.negative_slope if isinstance(activation, nn.LeakyReLU) else None,
        (
            [layer.weight.detach() for layer in layers],
            [layer.bias.detach() for layer in layers],
            energy.head.weight.detach(),
            energy.head.bias.detach(),
            energy.projections,
        ),
    )


def _unfit_network(energy: MLP) -> str | None:
    layers, activations = _linears(energy), list(energy.layers)[1::2]
    features = len(energy.projections)
    if any(type(layer) is not nn.Linear or layer.bias is None for layer in [*layers, energy.head]):
        return "a layer of the energy is not a plain Linear with a bias"
    if len({type(a) for a in activations}) != 1 or type(activations[0]) not in (nn.SiLU, nn.LeakyReLU):
        return "the energy's activations are not all SiLU or all LeakyReLU"
    if len({getattr(a, "negative_slope", None) for a in activations}) != 1:
        return "the energy's activations differ"
    width = layers[0].out_features
    inputs = [2 * features or layers[0].in_features] + [width] * (len(layers) - 1)
    if [layer.in_features for layer in layers] != inputs:
        return "the energy's layers differ in width"
    if any(layer.out_features != width for layer in layers) or energy.head.in_features != width:
        return "the energy's layers differ in width"
    if not 1 <= len(layers) <= MAX_DEPTH or width > MAX_WIDTH or features > MAX_FEATURES:
        return (
            f"the energy has {len(layers)} hidden layers of {width} units on {features} features, more than "
            f"{MAX_DEPTH}, {MAX_WIDTH} and {MAX_FEATURES}"
        )
    return None


def _linears(energy: MLP) -> list[nn.Module]:
    return list(energy.layers)[::2]
