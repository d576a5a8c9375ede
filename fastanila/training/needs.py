"""Which setting of a run needs which other: one table, by which commands tell of settings that would change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ..samplers import SAMPLERS
from .defaults import ENERGIES, EXACT
from .settings import Settings


class Need(NamedTuple):
    """These settings change something only where ``fits`` what ``on``, another setting, is."""

    settings: tuple[str, ...]
    on: str
    fits: Callable[[Any], bool]
    wanted: str


def _one_of(settings: tuple[str, ...], on: str, *values: str, also: tuple[str, ...] = ()) -> Need:
    """``also``: values with which nothing is said of the settings."""
    *others, last = values
    wanted = f"{on}={', '.join(others)} or {last}" if others else f"{on}={last}"
    return Need(settings, on, lambda value: value in values + also, wanted)


def _of_samplers(setting: str, field: str, *, also: tuple[str, ...] = ()) -> Need:
    """A setting that reaches the samplers that have the field."""
    having = (name for name, kind in SAMPLERS.items() if field in {f.name for f in dataclasses.fields(kind)})
    return _one_of((setting,), "sampler", *having, also=also)


NEEDS = (
    _one_of(("data_dir",), "data", "image-folder", "cifar10", "flowers102"),
    _one_of(("download",), "data", "cifar10", "flowers102"),
    _one_of(("image_size", "channels"), "data", "image-folder", "flowers102"),
    _one_of(("mask",), "task", "completion"),
    _one_of(("width", "confinement", "reference_sd"), "energy", *ENERGIES),
    _one_of(("depth", "features", "feature_scale"), "energy", "mlp"),
    Need(("feature_scale",), "features", lambda features: features > 0, "features above 0"),
    *(_of_samplers(name, name) for name in ("threshold", "leapfrog_steps", "norm")),
    # the exact ones refuse every value but the one that says what they do: see `config.check`
    *(_of_samplers(name, field, also=EXACT) for name, field in
      (("noise_scale", "noise_scale"), ("clamp", "bounds"), ("refresh", "refresh"))),
    _one_of(("reinit",), "init", "persistent"),
    _one_of(("latent", "vae_width", "kl_weight", "vae_warm_up", "vae_lr", "vae_lr_decay"), "init", "vae"),
)  # fmt: skip


def idle(settings: Settings, names: Iterable[str]) -> dict[str, str]:
    """Of the settings called ``names`` those that change nothing in a run as ``settings``, resolved, have it: why."""
    names, found = set(names), {}
    for need in NEEDS:
        got = getattr(settings, need.on)
        if not need.fits(got):
            reason = f"has no effect with {need.on}={got}: it needs {need.wanted}"
            found |= {name: f"{name} {reason}" for name in need.settings if name in names and name not in found}
    return found
