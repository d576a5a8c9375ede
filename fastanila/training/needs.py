"""Which setting of a run needs which other: one table, by which commands tell of settings that would change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ..data import images
from ..samplers import EXACT, SAMPLERS
from ..samplers.metropolis import REFUSALS
from .defaults import ENERGIES
from .settings import Settings


class Need(NamedTuple):
    """These settings change something only where ``fits`` what ``on``, another setting, is."""

    settings: tuple[str, ...]
    on: str
    fits: Callable[[Any], bool]
    wanted: str


def _one_of(settings: tuple[str, ...], on: str, *values: Any, also: tuple[str, ...] = ()) -> Need:
    """``also``: values with which nothing is said of the settings."""
    *others, last = values
    wanted = f"{on}={', '.join(others)} or {last}" if others else f"{on}={last}"
    return Need(settings, on, lambda value: value in values + also, wanted)


def _of_samplers() -> Iterator[Need]:
    """Of each setting that reaches some samplers and not all: those that have the field."""
    fields = {name: {f.name for f in dataclasses.fields(kind)} for name, kind in SAMPLERS.items()}
    for setting in (f.name for f in dataclasses.fields(Settings)):
        field = "bounds" if setting == "clamp" else setting
        having = [name for name, own in fields.items() if field in own]
        if 0 < len(having) < len(fields):
            # the exact ones refuse every value but the one that says what they do: see `config.check`
            also = EXACT if field in REFUSALS else ()
            yield _one_of((setting,), "sampler", *having, also=also)


def _of_images(settings: tuple[str, ...], option: str) -> Need:
    """Settings that reach the images whose loader takes the option."""
    return _one_of(settings, "data", *(name for name in images.LOADERS if option in images.options(name)))


NEEDS = (
    _of_images(("data_dir",), "root"),
    _of_images(("download",), "download"),
    _of_images(("image_size", "channels"), "size"),
    _one_of(("mask",), "task", "completion"),
    _one_of(("class_weight",), "classes", True),
    _one_of(("width", "confinement", "reference_sd"), "energy", *ENERGIES),
    _one_of(("depth", "features", "feature_scale"), "energy", "mlp"),
    _one_of(("activation",), "energy", "convnet"),
    Need(("matching_lr",), "matching", lambda matching: matching > 0, "matching above 0"),
    Need(("feature_scale",), "features", lambda features: features > 0, "features above 0"),
    *_of_samplers(),
    Need(("highest",), "replicas", lambda replicas: replicas > 1, "replicas above 1"),
    _one_of(("reinit",), "init", "persistent"),
    _one_of(("witnesses",), "init", "weighted"),
    _one_of(("rollbacks",), "on_divergence", "rollback"),
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
