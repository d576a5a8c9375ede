"""Which settings can be: every rule that refuses some, in one line that names the setting."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..samplers import EXACT
from . import own
from .defaults import ENERGIES, IMAGE_ENERGIES, IMAGES, PLANES, VECTOR_ENERGIES, of_data
from .settings import Settings, without_none


def check(settings: Settings, shape: tuple[int, ...] | None = None) -> None:
    """Raise ValueError naming the first setting that cannot be, what it was and what was expected.

    ``shape``: of one datum, of data of one's own; without it nothing is said of what goes with such data.
    """
    from .. import checks  # imports torch, for which --help need not wait

    for name, hint in get_type_hints(Settings).items():
        check_type(name, getattr(settings, name), hint)
    for name in (
        "image_size",
        "channels",
        "width",
        "latent",
        "vae_width",
        "steps",
        "leapfrog_steps",
        "batch_size",
        "iterations",
        "replicas",
    ):
        checks.count(name, getattr(settings, name))
    for name in ("log_every", "save_every"):
        checks.count(name, getattr(settings, name))
    checks.count("chains", settings.chains)
    for name in ("depth", "features", "sample_every", "vae_warm_up", "matching", "seed", "rollbacks", "witnesses"):
        checks.count(name, getattr(settings, name), least=0)
    if settings.seed >= 1 << 63:
        raise ValueError(f"seed must be below 2**63, got {settings.seed}")
    for name in ("threshold", "reference_sd"):
        checks.positive(name, getattr(settings, name))
    for name in ("step_size", "lr", "matching_lr", "vae_lr", "temperature"):
        checks.positive(name, getattr(settings, name), finite=True)
    for name in (
        "noise_scale", "confinement", "feature_scale", "energy_l2", "matching_weight", "kl_weight", "data_noise",
        "clip_grad", "class_weight",
    ):  # fmt: skip
        checks.nonnegative(name, getattr(settings, name))
    for name in ("reinit", "ema"):
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {getattr(settings, name)}")
    if settings.sampler in EXACT:
        _check_exact(settings)
    _check_replicas(settings)
    persistent = settings.init == "persistent"
    if settings.chains % settings.batch_size or not (persistent or settings.chains == settings.batch_size):
        wanted = "a multiple of" if persistent else f"with init={settings.init} equal to"
        raise ValueError(f"chains must be {wanted} batch_size ({settings.batch_size}), got {settings.chains}")
    _check_energy(settings, shape)
    if settings.init == "vae" and settings.vae_warm_up >= settings.iterations:
        wanted = f"below iterations ({settings.iterations}), or the energy never learns"
        raise ValueError(f"vae_warm_up must be {wanted}, got {settings.vae_warm_up}")
    if settings.matching >= settings.iterations:
        wanted = f"below iterations ({settings.iterations}), or chains never take over"
        raise ValueError(f"matching must be {wanted}, got {settings.matching}")
    weighted = settings.init == "weighted"
    for wanted, given in (
        ("init=vae", settings.init == "vae"),
        ("classes", settings.classes),
        ("init=weighted", weighted),
    ):
        if given and (settings.matching or settings.matching_weight):
            raise ValueError(f"matching and matching_weight must be 0 with {wanted}, got {settings.matching}")
    if settings.flips and (len(shape) != 3 if shape else settings.data in PLANES):
        raise ValueError(f"flips must be false for {settings.data}, which has no images to mirror")
    if settings.flips and settings.task == "completion":
        raise ValueError("flips must be false with task=completion, whose regions have their place")
    for wanted, given in (("task=completion", settings.task == "completion"), ("classes", settings.classes)):
        own_images = own.is_own(settings.data) and (shape is None or len(shape) == 3)
        if given and settings.data not in IMAGES and not own_images:
            raise ValueError(f"data must be images with {wanted} ({', '.join(IMAGES)}), got {settings.data}")
    if settings.task == "completion" and settings.init != "vae":
        raise ValueError(f"init must be vae with task=completion, got {settings.init}")
    if settings.classes and settings.task != "generation":
        raise ValueError(f"task must be generation with classes, got {settings.task}")
    if settings.classes and settings.init in ("vae", "weighted"):
        raise ValueError(f"init must be persistent, data or noise with classes, got {settings.init}")
    if weighted:
        _check_weighted(settings)


def _check_energy(settings: Settings, shape: tuple[int, ...] | None) -> None:
    """Raise ValueError where the network is unknown, or is none for the data."""
    if own.is_own(settings.energy):
        return
    if settings.energy not in ENERGIES:
        wanted = f"one of {', '.join(ENERGIES)}, or package.module:function"
        raise ValueError(f"energy must be {wanted}; got {settings.energy!r}")
    table = of_data(settings.data, shape)
    fitting = VECTOR_ENERGIES if table.get("energy") in VECTOR_ENERGIES else IMAGE_ENERGIES
    if table and settings.energy not in fitting:
        what = settings.data if shape is None else f"data of shape {tuple(shape)}"
        raise ValueError(f"energy must be {' or '.join(fitting)} for {what}, got {settings.energy}")
    if shape is not None and len(shape) == 3 and shape[1] != shape[2]:
        raise ValueError(f"data must be square images for energy={settings.energy}, got {tuple(shape)}")


def _check_weighted(settings: Settings) -> None:
    from ..samplers.weighted import BLOCKS

    if settings.sampler not in EXACT:
        raise ValueError(
            f"sampler must be one of {', '.join(EXACT)} with init=weighted, got {settings.sampler}: its transitions "
            "change the law of the walkers, which their weights cannot follow"
        )
    if settings.witnesses % BLOCKS:
        raise ValueError(f"witnesses must be a multiple of {BLOCKS}, got {settings.witnesses}")


def _check_exact(settings: Settings) -> None:
    from ..samplers.metropolis import REFUSALS

    refused = (("noise_scale", "noise_scale", 1.0), ("clamp", "bounds", False), ("refresh", "refresh", "transition"))
    for name, why, needed in refused:
        got = getattr(settings, name)
        if got != needed:
            raise ValueError(f"{name} must be {needed} with sampler={settings.sampler}, got {got}: {REFUSALS[why]}")


def _check_replicas(settings: Settings) -> None:
    if not 1 < settings.highest < float("inf"):
        raise ValueError(f"highest must be above 1, the temperature of the cold chains, got {settings.highest}")
    if settings.replicas == 1:
        return
    if settings.sampler not in EXACT:
        wanted = f"1 with sampler={settings.sampler}: an exchange is of laws, and only {', '.join(EXACT)} have them"
        raise ValueError(f"replicas must be {wanted}, got {settings.replicas}")
    needed = (("init", "persistent"), ("task", "generation"), ("classes", False))
    for name, wanted in needed:
        if (got := getattr(settings, name)) != wanted:
            raise ValueError(f"replicas must be 1 with {name}={got}, got {settings.replicas}: they need {wanted}")


def check_type(name: str, value: Any, hint: Any) -> None:
    kind = without_none(hint)
    if value is None and kind is not hint:
        return
    if get_origin(kind) is Literal:
        fits, wanted = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
    elif kind is float:
        fits, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    else:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        wanted = {bool: "true or false", int: "an integer", str: "a string"}[kind]
    if not fits:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
