"""Settings resolved, checked, read and written."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..samplers import EXACT
from . import own
from .defaults import DEFAULTS, ENERGIES, IMAGE_ENERGIES, IMAGES, PLANES, VECTOR_ENERGIES, defaults, of_data
from .settings import Settings, without_none

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


# Threshold and step size are those of sampler="anila", which `defaults` translates for the others.


#: What may differ when a run is resumed. Of these only iterations changes numbers: it stretches a linear lr decay. In a
#: run that rolls back, log_every, sample_every and save_every say when it does, and to where.
RESUMABLE = frozenset({
    "data_dir", "download", "iterations", "device", "fused", "log_every", "sample_every", "save_every", "tensorboard",
    "on_divergence", "rollbacks",
})  # fmt: skip


def resolve(settings: Settings, shape: tuple[int, ...] | None = None) -> Settings:
    """The settings with every default of the data set and the task filled in, checked.

    ``shape``: of one datum, by which data of one's own get their defaults; a run's config.json needs none. Raises
    ValueError naming the setting.
    """
    if settings.data not in DEFAULTS and not own.is_own(settings.data):
        raise ValueError(
            f"data must be one of {', '.join(DEFAULTS)}, or package.module:function; got {settings.data!r}"
        )
    written = {name: value for name in ("data_dir", "out") if isinstance(value := getattr(settings, name), str)}
    settings = dataclasses.replace(settings, **{name: str(path_of(name, value)) for name, value in written.items()})
    if settings.init is None:
        settings = dataclasses.replace(settings, init="vae" if settings.task == "completion" else "persistent")
    if settings.replicas != 1 and settings.reinit is None:  # they lead to other modes as restarts do, without a bias
        settings = dataclasses.replace(settings, reinit=0.0)
    usual = defaults(settings.data, settings.sampler, settings.init, settings.task, shape)
    settings = dataclasses.replace(settings, **{k: v for k, v in usual.items() if getattr(settings, k) is None})
    if not usual and any(getattr(settings, name) is None for name in DEFAULTS["rings"].keys() - {"chains"}):
        raise ValueError(f"data {settings.data!r} has no defaults here: only training takes data of one's own")
    if settings.vae_warm_up is None:
        warm_up = settings.iterations // 4 if settings.init == "vae" else 0
        settings = dataclasses.replace(settings, vae_warm_up=warm_up)
    if settings.witnesses is None:
        from ..samplers.weighted import BLOCKS

        count = -(-settings.batch_size // BLOCKS) * BLOCKS if settings.init == "weighted" else 0
        settings = dataclasses.replace(settings, witnesses=count)
    if settings.chains is None:
        batches = of_data(settings.data, shape)["chains"] // settings.batch_size if settings.init == "persistent" else 1
        settings = dataclasses.replace(settings, chains=max(1, batches) * settings.batch_size)
    check(settings, shape)
    return settings


def check(settings: Settings, shape: tuple[int, ...] | None = None) -> None:
    """Raise ValueError naming the first setting that cannot be, what it was and what was expected.

    ``shape``: of one datum, of data of one's own; without it nothing is said of what goes with such data.
    """
    from .. import checks  # imports torch, for which --help need not wait

    for name, hint in get_type_hints(Settings).items():
        _check_type(name, getattr(settings, name), hint)
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


def _check_type(name: str, value: Any, hint: Any) -> None:
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


def path_of(name: str, written: str | Path) -> Path:
    """A path as people write it: ~ and ~user are home folders, also where no shell has put them in.

    Raises ValueError naming the setting where it is empty, or there is no such home folder.
    """
    if not os.fspath(written):
        raise ValueError(f"{name} must be a path, got ''")
    text = os.path.expanduser(os.fspath(written))
    if isinstance(written, str) and text.startswith("~"):
        raise ValueError(f"{name}: there is no such home folder, got {written!r}; a name that begins with ~ is ./~...")
    path = Path(text)
    return path.absolute() if str(path).startswith("~") else path  # ./~x, which pathlib shortens to ~x


def read(path: str | Path) -> dict[str, Any]:
    """The settings of a TOML config file, or of a run's config.json, as a dict.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong in it: unreadable, an unknown key, or a
    setting that it has twice.
    """
    path = path_of("config", path)
    if not path.is_file():
        raise FileNotFoundError(f"config: no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            values = json.loads(text, object_pairs_hook=lambda pairs: _by_name(pairs, path))
        else:
            values = tomllib.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"config {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config {path} must hold settings by name, got a {type(values).__name__}")
    return checked(_by_name(values.items(), path), f"config {path}")


def checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Settings by name, "inf" as a number. Raises ValueError naming the key that is none, or whose type cannot be."""
    hints = get_type_hints(Settings)
    for key in values:
        if key not in hints:
            raise ValueError(f"{where} has an unknown key {key!r}; known are {', '.join(sorted(hints))}")
        values[key] = float("inf") if values[key] == "inf" else values[key]
        _check_type(key, values[key], hints[key])
    return values


def assigned(texts: Iterable[str], where: str) -> dict[str, Any]:
    """Settings from texts of NAME=VALUE, the value as JSON writes it; other texts stand for themselves. Raises
    ValueError for what is none, comes twice, or has another type."""
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise ValueError(f"{where} must be of NAME=VALUE, got {text!r}")
        if name in values:
            raise ValueError(f"{where} has {name} twice")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return checked(values, where)


def _by_name(pairs: Iterable[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """The settings of a file, whose names it may write with - for _. Raises ValueError where it has one twice."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        name = key.replace("-", "_")
        if name in values:
            raise ValueError(f"config {path} has {name} twice: {values[name]!r} and {value!r}")
        values[name] = value
    return values


def is_of_a_run(path: str | Path) -> bool:
    """Whether a config file is the config.json of a run, in the run's folder."""
    path = path_of("config", path)
    return path.name == "config.json" and (path.parent / "checkpoints").is_dir()


def dump(settings: Settings) -> str:
    """config.json. An infinite threshold is the string "inf", because JSON has no infinity."""
    values = {k: "inf" if v == float("inf") else v for k, v in dataclasses.asdict(settings).items()}
    return json.dumps(values, indent=2) + "\n"


def tensorboard_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard is not installed: pip install fastanila[tensorboard]") from None
    return SummaryWriter
