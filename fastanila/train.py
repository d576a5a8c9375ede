"""Train an energy-based model: `python -m fastanila.train --fused`."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from typing import Any, NamedTuple

from .cli import exits
from .training import config, defaults, own, presets
from .training.settings import Settings, names_of, without_none

EXTRA = {
    "config": (str, "TOML file of settings, or a run's config.json; flags win over it."),
    "preset": (str, f"An experiment of the papers; flags win over it. One of {', '.join(presets.names())}."),
    "resume": (str, "Run directory to go on with: its settings hold, and only flags that change no number may differ."),
    "changed_data": (bool, "With --resume: go on although the images are not those that the run was trained on."),
    "minutes": (float, "Stop cleanly after so many minutes of training, with a checkpoint; --resume RUN goes on."),
    "dry_run": (bool, "Check everything, print the resolved settings, and stop."),
}


class Asked(NamedTuple):
    settings: Settings  #: flags over the file or the resumed run, not yet resolved
    resume: str | None
    dry_run: bool
    changed_data: bool
    minutes: float = math.inf  #: of wall time, after which training stops
    data: Any = None  #: what --data has read, where it is package.module:function; on the CPU


def parse(argv: list[str] | None) -> Asked:
    """What the flags ask for. Raises ValueError."""
    import argparse

    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "preset", "resume", "data", "sampler", "init", "task"):
        ahead.add_argument(f"--{name}")
    files, _ = ahead.parse_known_args(argv)
    for name in ("config", "preset"):
        if getattr(files, name) is not None and files.resume is not None:
            raise ValueError(f"{name} cannot be given with resume: a run goes on with its own settings")
    if files.config is not None and files.preset is not None:
        raise ValueError("preset cannot be given with config: one of them has the settings")
    under: dict[str, Any] = {}
    source = f"config {files.config}" if files.config is not None else None
    if files.config is not None:
        under = config.read(files.config)
        if config.is_of_a_run(files.config):  # to start the same run again, somewhere else
            under.pop("out", None)
    elif files.preset is not None:
        preset = presets.read(files.preset)
        under = presets.for_training(preset, files.sampler if files.sampler in names_of("sampler") else None)
        source = f"preset {preset.name}"
    elif files.resume is not None:
        from .training.run import read_settings

        under = dataclasses.asdict(read_settings(files.resume))
    dataset = files.data if files.data is not None else under.get("data", Settings.data)
    sampler = files.sampler if files.sampler in names_of("sampler") else under.get("sampler")
    init = files.init if files.init is not None else under.get("init")
    task = files.task if files.task is not None else under.get("task")
    data, shape = None, None
    if own.is_reference(dataset) and not _asks_for_help(argv):  # its shape says which defaults are for it
        from .training import build

        data = build.own_data(Settings(data=dataset))
        shape = data.shape
    values = vars(cli(argv, defaults.defaults(dataset, sampler, init, task, shape) | under))
    resume, dry_run = values.pop("resume"), values.pop("dry_run")
    values.pop("config"), values.pop("preset")
    changed_data, minutes = values.pop("changed_data"), values.pop("minutes")
    if changed_data and resume is None:
        raise ValueError("changed_data can be given with resume only: a new run has no other data")
    settings = Settings(**values)
    check_effects(settings, argv, resume=resume, source=source, under=under, shape=shape)
    minutes = math.inf if minutes is None else minutes
    from . import checks  # imports torch, for which --help need not wait

    checks.positive("minutes", minutes)
    return Asked(settings, resume, dry_run, changed_data, minutes, data)


def check_effects(
    settings: Settings,
    argv: list[str] | None,
    *,
    resume: str | None,
    source: str | None,
    under: dict[str, Any],
    shape: tuple[int, ...] | None = None,
) -> None:
    """Refuse flags that would change nothing (ValueError), and warn of settings of the config file or preset
    (``source``) that do not: it may be shared by runs of several kinds, and hold what is as it would be without it."""
    from .cli.flags import flags
    from .training import needs

    resolved = config.resolve(settings, shape)
    given = flags(sys.argv[1:] if argv is None else argv, under.keys() | vars(settings).keys())
    if resume is not None and "out" in given:
        raise ValueError("out has no effect with resume: the run stays in its folder")
    idle = needs.idle(resolved, given)
    if idle:
        raise ValueError("; ".join(idle.values()))
    if source is not None:
        idle = needs.idle(resolved, under.keys() - given)
        bare = config.resolve(dataclasses.replace(settings, **{name: getattr(Settings, name) for name in idle}), shape)
        for name, reason in idle.items():
            if getattr(bare, name) != getattr(resolved, name):
                exits.complain(f"warning: {source}: {reason}")


def cli(argv: list[str] | None, defaults: dict[str, Any]):
    """The flags, one a setting, whose --help shows the defaults of the data set and sampler that are asked for."""
    from typing import Annotated, get_type_hints

    import tyro

    hints = get_type_hints(Settings)
    fields: list[Any] = []
    for f in dataclasses.fields(Settings):
        default = defaults.get(f.name, f.default)
        hint = hints[f.name] if default is None else without_none(hints[f.name])
        fields.append((f.name, Annotated[hint, tyro.conf.arg(help=f.metadata["help"])], default))
    for name, (kind, text) in EXTRA.items():
        hint, default = (bool, False) if kind is bool else (kind | None, None)
        fields.append((name, Annotated[hint, tyro.conf.arg(help=text)], default))
    flags = dataclasses.make_dataclass("Flags", fields)
    return tyro.cli(
        flags,
        args=argv,
        prog="python -m fastanila.train",
        description="Train an energy-based model with Langevin chains.",
    )


def _asks_for_help(argv: list[str] | None) -> bool:
    return bool({"--help", "-h"} & set(sys.argv[1:] if argv is None else argv))


def main(argv: list[str] | None = None) -> int:
    if _asks_for_help(argv):
        return exits.exit_code(lambda: parse(argv) and exits.DONE)  # exits; ahead of torch, which takes seconds
    importlib.import_module(".training.loop", __package__)  # ahead of `exit_code`, under which Ctrl-C is an exception
    return exits.exit_code(lambda: trained(argv))


def trained(argv: list[str] | None) -> int:
    """Do what the flags say; the exit code."""
    import torch

    from . import graphs
    from .training import checkpoint, loop, run_directory
    from .training.job import Diverged, describe, notes, prepare

    with exits.refusing(ValueError, TypeError, checkpoint.CheckpointError):
        asked = parse(argv)
        job = prepare(asked.settings, asked.resume, changed_data=asked.changed_data, data=asked.data)
    if asked.dry_run:
        for line in notes(job):
            exits.complain(line)
        exits.say(describe(job))
        exits.say(config.dump(job.settings).rstrip())
        return exits.DONE
    try:
        with exits.refusing(run_directory.Taken):
            loop.run(job, exits.say, minutes=asked.minutes)
    except Diverged as stop:
        exits.complain(f"error: {stop}")
        return exits.DIVERGED
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = graphs.first_line(error)
        exits.complain(f"error: compiling failed; --no-fused runs without a compiler ({reason})")
        return exits.FAILED
    except loop.Interrupted as stop:
        exits.complain(str(stop))
        return 128 + stop.number
    return exits.DONE


if __name__ == "__main__":
    exits.end_at_once_on_interrupt()
    sys.exit(main())
