"""Presets: the papers' experiments, as TOML files that the package ships in `training/presets/`.

A file holds the settings of a run, and says of each where it is from: `[papers]` names those that are the papers' own,
`[chosen]` those that are not, with the reason. What it does not name is the library's default. `[compare]` says which
forms of the sampler are set side by side, and how each is tuned. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..samplers import EXACT
from . import config, defaults
from .settings import Settings

FOLDER = Path(__file__).with_name("presets")


class Form(NamedTuple):
    """What a comparison sets side by side: a sampler with settings of its own."""

    label: str
    settings: Mapping[str, Any]


#: By the name that `compare --samplers` knows them by. Threshold and step size are tuned.
FORMS: dict[str, Form] = {
    "langevin": Form("Langevin", {"sampler": "langevin"}),
    "anila": Form("AniLA, by element", {"sampler": "anila"}),
    "anila-channel": Form("AniLA, by channel", {"sampler": "anila", "norm": "channel"}),
    "anila-printed": Form("AniLA (as printed)", {"sampler": "anila", "refresh": "update", "clamp": False}),
    "anila-coded": Form("AniLA (as coded)", {"sampler": "anila-coded", "norm": "channel", "clamp": False}),
    "tamed": Form("drift clipped alone", {"sampler": "tamed"}),
    "shrunk-noise": Form("noise shrunk alone", {"sampler": "shrunk-noise"}),
    "langevin-effective": Form("Langevin at AniLA's mean step", {"sampler": "langevin"}),
    "anila-mh": Form("adjusted AniLA", {"sampler": "anila-mh"}),
    "mala": Form("MALA", {"sampler": "mala"}),
    "hmc": Form("HMC", {"sampler": "hmc"}),
    "gd": Form("gradient descent", {"sampler": "gd"}),
}
#: Not tuned: its step size is that of AniLA, tuned, times the mean gain of AniLA's runs.
EFFECTIVE, ITS_SOURCE = "langevin-effective", "anila"


class Pilots(NamedTuple):
    """The short trainings that tune a form: at most so many as there are factors, less one."""

    seed: int
    iterations: int
    step_sizes: tuple[float, ...]  #: factors of the form's own start; 1 among them
    thresholds: tuple[float, ...]  #: the same


class Comparison(NamedTuple):
    forms: tuple[str, ...]  #: keys of `FORMS`
    seeds: tuple[int, ...]
    pilots: Pilots
    own: Mapping[str, Mapping[str, Any]]  #: by form: settings where it starts otherwise than the others


class Preset(NamedTuple):
    name: str
    title: str
    settings: dict[str, Any]  #: of `Settings`; threshold and step size are in AniLA's units
    papers: dict[str, str]  #: by setting: where the papers have its value
    chosen: dict[str, str]  #: by setting: why it is not the papers'
    comparison: Comparison | None


def names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def read(name: str) -> Preset:
    """The preset of that name. Raises ValueError for an unknown one, and for a file that does not say what it must."""
    if name not in names():
        raise ValueError(f"preset must be one of {', '.join(names())}, got {name!r}")
    return parsed(name, (FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def parsed(name: str, text: str) -> Preset:
    values = config.tomllib.loads(text)
    where = f"preset {name}"
    _known(where, values, ("title", "settings", "papers", "chosen", "compare"))
    settings = config.checked(values["settings"], where)
    papers, chosen = values["papers"], values["chosen"]
    if both := papers.keys() & chosen.keys():
        raise ValueError(f"{where} has {', '.join(sorted(both))} both as the papers' and as chosen")
    if unsaid := settings.keys() ^ (papers.keys() | chosen.keys()):
        raise ValueError(f"{where} must say of its settings, and of no others, where each is from: {sorted(unsaid)}")
    return Preset(name, values["title"], settings, papers, chosen, _comparison(where, values.get("compare")))


def _comparison(where: str, values: dict[str, Any] | None) -> Comparison | None:
    if values is None:
        return None
    _known(where, values, ("forms", "seeds", "pilots", "own"))
    forms, own = tuple(values["forms"]), values.get("own", {})
    if unknown := (set(forms) - FORMS.keys()) | (own.keys() - set(forms)):
        raise ValueError(f"{where} has forms that it does not compare, or that are none: {sorted(unknown)}")
    for form in own:
        own[form] = config.checked(own[form], f"{where}, {form}")
    given = values["pilots"]
    _known(f"{where}, pilots,", given, Pilots._fields)
    pilots = Pilots(given["seed"], given["iterations"], tuple(given["step_sizes"]), tuple(given["thresholds"]))
    if 1 not in pilots.step_sizes or 1 not in pilots.thresholds:
        raise ValueError(f"{where} must have 1 among the factors of its pilots, got {pilots}")
    return Comparison(forms, tuple(values["seeds"]), pilots, own)


def _known(where: str, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := set(values) - set(known):
        raise ValueError(f"{where} has an unknown key {min(unknown)!r}; known are {', '.join(known)}")


def for_training(preset: Preset, sampler: str | None = None) -> dict[str, Any]:
    """The settings of one run of the preset; with another ``sampler`` threshold and step size are put in its units."""
    if sampler in (None, preset.settings.get("sampler")):
        return dict(preset.settings)
    base = _base(preset.settings)
    return preset.settings | {"sampler": sampler} | _translated(vars(base), str(sampler))


def _translated(levels: Mapping[str, Any], sampler: str) -> dict[str, Any]:
    """AniLA's numbers as the sampler's. An exact one has no noise scale, but an energy at that temperature."""
    own = defaults.translated(levels, "anila", sampler)
    return own | {"temperature": levels["noise_scale"] ** 2} if sampler in EXACT else own


class Choice(NamedTuple):
    """A form with factors of its start's step size and threshold."""

    form: str
    step_size: float = 1.0
    threshold: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.form}-step{self.step_size:g}-b{self.threshold:g}"


def settings_of(preset: Preset, choice: Choice, *, seed: int, common: Mapping[str, Any] | None = None) -> Settings:
    """A run of the form, resolved: as many gradients of the energy an update as the preset's AniLA takes, at most.

    An exact sampler takes one more than its transitions. ``common``: settings that win over the preset's. Raises
    ValueError for settings that cannot be.
    """
    assert preset.comparison is not None
    own = dict(FORMS[choice.form].settings) | dict(preset.comparison.own.get(choice.form, {}))
    values = preset.settings | dict(common or {}) | {"seed": seed, "sample_every": 0}
    base = _base(values)
    levels = {k: own.get(k, getattr(base, k)) for k in ("threshold", "step_size", "noise_scale", "clamp")}
    levels["threshold"] *= choice.threshold
    levels["step_size"] *= choice.step_size
    sampler = own["sampler"]
    own |= _translated(levels, sampler)
    gradients = own.get("leapfrog_steps", base.leapfrog_steps) if sampler == "hmc" else 1
    own["steps"] = max(1, (vars(base)["steps"] - (sampler in EXACT)) // gradients)
    return config.resolve(Settings(**values | own))


def _base(values: Mapping[str, Any]) -> Settings:
    """The preset's AniLA, resolved."""
    return config.resolve(Settings(**dict(values) | {"sampler": "anila"}))


def described(settings: Settings) -> dict[str, Any]:
    """What tells the forms of a comparison apart."""
    named = ("sampler", "norm", "refresh", "steps", "step_size", "threshold", "noise_scale")
    return {name: getattr(settings, name) for name in named}


def changed(preset: Preset, **settings: Any) -> Preset:
    """The preset with some of its comparison's parts exchanged: forms, seeds, pilots."""
    assert preset.comparison is not None
    return preset._replace(comparison=preset.comparison._replace(**settings))
