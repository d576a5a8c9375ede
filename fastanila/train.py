"""Train an energy-based model: `python -m fastanila.train --fused`."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from . import config
from .config import Settings

DONE, BAD_ARGUMENTS, DIVERGED = 0, 2, 3

EXTRA = {
    "config": (str, "TOML file of settings, or a run's config.json; flags win over it."),
    "resume": (str, "Run directory to go on with: its settings hold, and only flags that change no number may differ."),
    "changed_data": (bool, "With --resume: go on although the images are not those that the run was trained on."),
    "dry_run": (bool, "Check everything, print the resolved settings, and stop."),
}


def parse(argv: list[str] | None) -> tuple[Settings, str | None, bool, bool]:
    """(settings, not yet resolved; --resume; --dry-run; --changed-data): flags over the file or the resumed run."""
    import argparse

    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "resume", "data", "sampler", "init", "task"):
        ahead.add_argument(f"--{name}")
    files, _ = ahead.parse_known_args(argv)
    if files.config is not None and files.resume is not None:
        raise ValueError("config cannot be given with resume: a run goes on with its own settings")
    under: dict[str, Any] = {}
    if files.config is not None:
        under = config.read(files.config)
        if files.config.endswith("config.json"):  # to start the same run again, somewhere else
            under.pop("out", None)
    elif files.resume is not None:
        from . import runs

        under = dataclasses.asdict(runs.read_settings(files.resume))
    dataset = files.data if files.data is not None else under.get("data", Settings.data)
    sampler = files.sampler if files.sampler in config.names_of("sampler") else under.get("sampler")
    init = files.init if files.init is not None else under.get("init")
    task = files.task if files.task is not None else under.get("task")
    values = vars(cli(argv, config.defaults(dataset, sampler, init, task) | under))
    resume, dry_run, _ = values.pop("resume"), values.pop("dry_run"), values.pop("config")
    changed_data = values.pop("changed_data")
    if changed_data and resume is None:
        raise ValueError("changed_data can be given with resume only: a new run has no other data")
    return Settings(**values), resume, dry_run, changed_data


def cli(argv: list[str] | None, defaults: dict[str, Any]):
    """The flags, one a setting, whose --help shows the defaults of the data set and sampler that are asked for."""
    from typing import Annotated, get_type_hints

    import tyro

    hints = get_type_hints(Settings)
    fields: list[Any] = []
    for f in dataclasses.fields(Settings):
        default = defaults.get(f.name, f.default)
        hint = hints[f.name] if default is None else config.without_none(hints[f.name])
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


def main(argv: list[str] | None = None) -> int:
    if "--help" in (sys.argv[1:] if argv is None else argv):
        parse(argv)  # exits; ahead of the imports, which take torch seconds
    import torch

    from . import capture, checkpoint, training

    try:
        settings, resume, dry_run, changed_data = parse(argv)
        job = training.prepare(settings, resume, changed_data=changed_data)
    except (ValueError, TypeError, OSError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    if dry_run:
        print(training.path(job))
        print(config.dump(job.settings), end="")
        return DONE
    try:
        training.run(job, lambda line: print(line, flush=True))
    except training.Diverged as stop:
        print(f"error: {stop}", file=sys.stderr)
        return DIVERGED
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = capture.first_line(error)
        print(f"error: compiling failed; --no-fused runs without a compiler ({reason})", file=sys.stderr)
        return BAD_ARGUMENTS
    except training.Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.number
    return DONE


if __name__ == "__main__":
    sys.exit(main())
