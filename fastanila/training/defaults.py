"""The defaults of a run's settings, by data set, sampler, chain start and task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..samplers import EXACT

# 2-D: an exact sampler, because a model makes up for the bias of others by being too sharp (README, the numbers).
# For anila, threshold 10 leaves about 7 % of the elements clipped at the end. At 5 it was half of them: the bias then
# grows as the model sharpens, and training ended 0.29 nats off in one setting and diverged in another.
_PLANE: dict[str, Any] = dict(
    sampler="anila-mh",
    energy="mlp", width=64, depth=2, features=64, feature_scale=1.5, confinement=0.5,
    threshold=10.0, step_size=0.005, noise_scale=1.0, clamp=False,
    steps=60, chains=512, batch_size=512, reinit=0.005,
    activation="silu", matching=0, matching_lr=1e-3, matching_weight=0.0, flips=False,
    iterations=4000, lr=5e-4, energy_l2=0.0, data_noise=0.0, clip_grad=0.0, ema=0.995,
    latent=2, vae_width=128, kl_weight=0.1, vae_lr=3e-3,
    log_every=20, sample_every=500, save_every=1000,
)  # fmt: skip

#: A step of which nine in ten are accepted; without the correction its bias would be large, and training may diverge.
#: It is four times as long, so that fewer of them do: 40 learn rings as well as 60.
_EXACT_PLANE: dict[str, Any] = dict(step_size=0.02, steps=40)

#: Proposals give modes and rings somewhat wrong shares, which chains cannot put right where they do not cross from one
#: to another: an energy that is not held near zero then tilts without end.
_AMORTIZED_PLANE: dict[str, Any] = dict(energy_l2=0.1)

#: The first law is a Gaussian fitted to the data (`build.fitted`), and the energy is relative to it.
_WEIGHTED: dict[str, Any] = dict(confinement=0.0)

# Images: energies of order one, so chains at a low temperature (noise_scale^2), as all deep image EBMs have it: a
# transition adds noise of 0.01 to a pixel in [-1, 1] and moves it by at most step_size threshold / 2.
_IMAGES: dict[str, Any] = dict(
    sampler="anila",
    energy="convnet", width=32, depth=0, features=0, feature_scale=0.0, confinement=0.0,
    threshold=0.02, step_size=4.0, noise_scale=0.005, clamp=True,
    steps=30, chains=256, batch_size=64, reinit=0.02,
    activation="leaky-relu", matching=0, matching_lr=1e-3, matching_weight=0.0, flips=False,
    iterations=2000, lr=1e-4, energy_l2=0.0, data_noise=0.03, clip_grad=0.0, ema=0.99,
    latent=64, vae_width=32, kl_weight=0.1, vae_lr=1e-3,
    log_every=10, sample_every=100, save_every=100,
)  # fmt: skip

# Vectors of any dimension, of which every element varies by about 1. A gain for each element makes the acceptance fall
# with the dimension, so plain steps with a correction; Fourier features are for the detail of two dimensions.
_VECTORS: dict[str, Any] = _PLANE | dict(
    sampler="mala", width=128, features=0, feature_scale=0.0, latent=8, sample_every=500
)

_DIGITS = _IMAGES | dict(threshold=0.05, step_size=1.0, noise_scale=0.01, steps=40, chains=1024, iterations=1000)

#: What is known leaves little open: a decoder with as much noise as that of whole images would ignore its latents.
_COMPLETION: dict[str, Any] = dict(kl_weight=0.01)

PLANES = ("rings", "8gaussians", "25gaussians", "pinwheel", "two-moons", "swiss-roll", "checkerboard")

IMAGES = ("digits", "image-folder", "cifar10", "flowers102")

DEFAULTS: dict[str, dict[str, Any]] = {
    **{name: _PLANE for name in PLANES},
    **{name: _IMAGES for name in IMAGES},
    "digits": _DIGITS,
}

#: Networks by the shape of what they take: vectors, or images.
VECTOR_ENERGIES, IMAGE_ENERGIES = ("mlp",), ("convnet", "unet")
ENERGIES = VECTOR_ENERGIES + IMAGE_ENERGIES


def of_data(name: str, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The table of a named data set, or by its shape that of one's own; {} where neither is known."""
    if name in DEFAULTS or shape is None:
        return DEFAULTS.get(name, {})
    return {(2,): _PLANE}.get(tuple(shape), _VECTORS) if len(shape) == 1 else _IMAGES


def defaults(
    name: str, sampler: str | None = None, init: str | None = None, task: str | None = None,
    shape: tuple[int, ...] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The data set's defaults, for that sampler, chain start and task; {} if there is no such set.

    Less the number of chains, which follows batch size and init. ``shape``: of one datum, of data of one's own.
    """
    table = of_data(name, shape)
    own = {k: v for k, v in table.items() if k != "chains"}
    if not own:
        return own
    own["sampler"] = sampler or own["sampler"]
    own |= translated(own, "anila", own["sampler"])
    if table["energy"] == "mlp":
        own |= (_EXACT_PLANE if own["sampler"] in EXACT else {}) | (_AMORTIZED_PLANE if init == "vae" else {})
    own |= _WEIGHTED if init == "weighted" else {}
    return own | (_COMPLETION if task == "completion" else {})


def translated(values: Mapping[str, Any], before: str, after: str, step_size: float | None = None) -> dict[str, Any]:
    """threshold, step_size, noise_scale and clamp of one sampler as those of another that moves alike.

    Exact samplers have no noise scale sigma: U at temperature sigma^2 with step eps and threshold b is U / sigma^2
    with eps sigma^2 and b / sigma^2. The tamed sampler's threshold is in units of its step's noise. ``step_size``:
    what the other is to have instead. Raises ValueError for an exact sampler of a law of temperature 0.
    """
    threshold, length, noise_scale, clamp = (values[k] for k in ("threshold", "step_size", "noise_scale", "clamp"))
    if before == "tamed":
        threshold /= math.sqrt(length)
    if after in EXACT:
        heat = noise_scale**2
        if not heat:
            raise ValueError(f"noise_scale must be positive for sampler={after}, got {noise_scale}")
        threshold, length, noise_scale, clamp = threshold / heat, length * heat, 1.0, False
    length = length if step_size is None else step_size
    if after == "tamed":
        threshold *= math.sqrt(length)
    return dict(threshold=threshold, step_size=length, noise_scale=noise_scale, clamp=clamp)
