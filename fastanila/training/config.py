"""Settings resolved, read and written; `check`, of `checking`, refuses what cannot be."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_type_hints

from . import own
from .checking import check as check
from .checking import check_type
from .defaults import DEFAULTS, defaults, of_data
from .settings import Settings

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
        check_type(key, values[key], hints[key])
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
