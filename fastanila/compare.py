"""Train the same energy with several samplers, at equal gradients, and compare the models that come out.

    python -m fastanila.compare --data rings --samplers langevin anila --thresholds 5 10 --seeds 0 1 --out DIR

makes one run in DIR for each sampler, threshold (of those that have one) and seed, evaluates each, and writes
DIR/compare.json and DIR/compare.png and prints a table. A second call makes the runs that are missing and goes on with
those that were cut short.

    python -m fastanila.compare --preset rings --out DIR

makes an experiment of the papers instead (`training.presets`): every form of the sampler that the preset names, each
tuned by one rule (`training.tuning`), with pilots in DIR/pilots, by several seeds; the table is in DIR/compare.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # ahead of torch, which takes seconds to import
    from .cli import exits, parsers

    exits.begin(parsers.compare())

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import files
from .cli import exits, flags, parsers
from .data import registry
from .evaluate import evaluate
from .evaluation import plots
from .evaluation.comparison import MEASURES, summary, table
from .samplers import EXACT, SAMPLERS
from .training import build, checkpoint, config, defaults, needs, presets, run_directory, side_by_side, tuning
from .training.metrics import read_rows
from .training.run import load, read_settings
from .training.settings import Settings


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training: what differs between the runs of a comparison."""

    sampler: str
    threshold: float | None  #: the level at which scores clip, 1 / unit of data; None where the sampler has none
    seed: int

    @property
    def name(self) -> str:
        level = "" if self.threshold is None else f"-b{self.threshold:g}"
        return f"{self.sampler}{level}-seed{self.seed}"


def trials(samplers: Sequence[str], thresholds: Sequence[float], seeds: Sequence[int]) -> Iterator[Trial]:
    for sampler in samplers:
        levels = thresholds if "threshold" in SAMPLERS[sampler].numbers else (None,)
        yield from (Trial(sampler, level, seed) for level, seed in itertools.product(levels, seeds))


def settings_of(trial: Trial, common: dict[str, Any]) -> Settings:
    """The trial's settings: at most as many gradients of the energy an update as AniLA takes by its default.

    An exact sampler takes one more than its transitions, where its chains start. All replicas of a chain share its
    gradients; the samplers that are not exact have none.
    """
    if trial.sampler not in EXACT:
        common = {k: v for k, v in common.items() if k not in ("replicas", "highest")}
    settings = config.resolve(Settings(**common, sampler=trial.sampler, seed=trial.seed))
    anila = vars(config.resolve(Settings(data=settings.data, sampler="anila")))
    steps = anila["steps"] // settings.replicas - (trial.sampler in EXACT)
    gradients = build.build_sampler(settings, registry.box_of(settings.data)).gradients
    own: dict[str, Any] = {"steps": max(steps // gradients, 1)}
    if trial.threshold is not None:
        level = anila | {"threshold": trial.threshold, "step_size": settings.step_size}
        own["threshold"] = defaults.translated(level, "anila", trial.sampler)["threshold"]
    settings = dataclasses.replace(settings, **own)
    config.check(settings)
    return settings


def train(settings: Settings, directory: Path, threads: int) -> bool:
    """Make the run, in a process of its own, or what is left of it; whether it ended well rather than diverged.

    Raises ValueError if the folder holds a run with other settings, RuntimeError with what the process said if it
    failed in any other way.
    """
    if (directory / "config.json").exists():
        before = dataclasses.replace(read_settings(directory), out=None)
        others = [k for k, v in vars(before).items() if v != getattr(settings, k)]
        if others:
            raise ValueError(f"out holds a run with another {', '.join(others)}: {directory}")
    made = progress(directory)
    if made == settings.iterations:
        return True
    file = directory.with_name(f"{directory.name}.json")
    files.write_text(file, config.dump(settings))
    arguments = ["--resume", str(directory)] if made is not None else ["--config", str(file), "--out", str(directory)]
    result = subprocess.run(
        [sys.executable, "-m", "fastanila.train", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if result.returncode not in (exits.DONE, exits.DIVERGED):
        raise RuntimeError(f"{directory}: training failed: {(result.stderr or result.stdout).strip()[-2000:]}")
    return result.returncode == 0


def train_all(
    resolved: Mapping[str, Settings], file: Path, jobs: int, measure: Callable[[str, Path, bool], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Make the runs, in folders by their names beside ``file``, and measure each; their lines, in order.

    ``jobs`` at a time share the processor's cores. ``measure`` takes a run's name, its folder and whether it ended well
    rather than diverged, and is called for one run at a time. The file always holds the lines so far, as JSON. The same
    call again makes what is missing. Raises what `train` raises, and then no other run begins.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    lines: dict[str, dict[str, Any]] = {}
    turn = threading.Lock()  # a measurement uses torch's own threads, and the table is written by one at a time

    def make(name: str) -> None:
        directory = file.parent / name
        finished = train(resolved[name], directory, threads)
        with turn:
            lines[name] = measure(name, directory, finished)
            found = [lines[name] for name in resolved if name in lines]
            files.write_text(file, json.dumps(found, indent=2) + "\n")
            exits.say(f"{len(lines)} of {len(resolved)}: {name} {'done' if finished else 'diverged'}")

    torch.set_num_threads(threads)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            for done in [pool.submit(make, name) for name in resolved]:
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # one that fails, or Ctrl-C, ends all
    return [lines[name] for name in resolved]


def progress(directory: Path) -> int | None:
    """Updates that the run's last checkpoint has made; None if it has none, so that a run can begin there."""
    try:
        return load(directory, "cpu").iteration
    except FileNotFoundError:
        return None


def measured(
    trial: Mapping[str, Any], directory: Path, finished: bool, data_dir: str | None, fused: bool = True
) -> dict[str, Any]:
    """A line of compare.json: what the trial is, and the numbers of its run."""
    line = dict(trial) | {"run": str(directory), "diverged": not finished}
    if not finished:
        return line
    last = read_rows(directory / "metrics.jsonl")[-1]
    seen = {k: last[k] for k in ("clip_fraction", "gamma_mean", "acceptance", "seconds")}
    return line | seen | evaluate(load(directory), data_dir=data_dir, fused=fused)


def main(argv: list[str] | None = None) -> int:
    return exits.run(parsers.compare(), argv, compared)


def compared(arguments: argparse.Namespace, given: set[str]) -> int:
    """Make the comparison that the arguments ask for; the exit code. ``given``: those that the command line has."""
    names = ("data", "data_dir", "image_size", "iterations", "step_size", "fused", "replicas", "highest")
    common = {k: v for k in names if (v := getattr(arguments, k)) is not None}
    with exits.refusing(ValueError):
        out = config.path_of("out", arguments.out)
        if arguments.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {arguments.jobs}")
        if arguments.preset is not None:
            flags.refuse(given, ("thresholds", "step_size"), "with preset, which tunes them")
            flags.refuse(given, ("replicas", "highest"), "with preset, whose forms have one temperature")
            experiment = preset_of(arguments, given)
            return compared_forms(experiment, arguments, {k: v for k, v in common.items() if k in given}, out)
        if other := set(arguments.samplers) - set(SAMPLERS):
            raise ValueError(
                f"samplers must be of {', '.join(SAMPLERS)} without preset, got {', '.join(sorted(other))}"
            )
    common |= {"sample_every": 0}
    with exits.refusing(ValueError):
        thresholds = arguments.thresholds or [defaults.defaults(arguments.data, "anila").get("threshold", 1.0)]
        by_name = {trial.name: trial for trial in trials(arguments.samplers, thresholds, arguments.seeds)}
        if arguments.thresholds and all(trial.threshold is None for trial in by_name.values()):
            raise ValueError(f"thresholds has no effect with samplers={' '.join(arguments.samplers)}, which have none")
        if not set(arguments.samplers) & set(EXACT):
            flags.refuse(given, ("replicas", "highest"), f"without one of the exact samplers ({', '.join(EXACT)})")
        if arguments.replicas == 1:
            flags.refuse(given, ("highest",), "without replicas: it needs replicas above 1")
        resolved = {name: settings_of(trial, common) for name, trial in by_name.items()}
        for reason in needs.idle(next(iter(resolved.values())), given & {"data_dir", "image_size"}).values():
            raise ValueError(reason)
        out.mkdir(parents=True, exist_ok=True)
        run_directory.check_writable(out)

    def measure(name: str, directory: Path, finished: bool) -> dict[str, Any]:
        return measured(dataclasses.asdict(by_name[name]), directory, finished, arguments.data_dir)

    lines = made(lambda: train_all(resolved, out / "compare.json", arguments.jobs, measure))
    if lines is None:
        return 128 + signal.SIGINT
    rows = summary(lines)
    of = next((row["of"] for row in rows if row["each"]), "gap")
    plots.save_comparison(out / "compare.png", rows, MEASURES[of])
    exits.say(table(rows))
    exits.say(f"everything is in {out}")
    return exits.DONE


def made(work: Callable[[], Any]) -> Any:
    """What the work returns; None where Ctrl-C ended it, which is said. What is wrong with the runs is `Refused`."""
    try:
        with exits.refusing(RuntimeError, ValueError, ModuleNotFoundError, checkpoint.CheckpointError):
            return work()
    except KeyboardInterrupt:
        exits.complain("stopped; the same command goes on")
        return None


# ---------------------------------------------------------------------------------------------------------- presets


def preset_of(arguments: argparse.Namespace, given: set[str]) -> presets.Preset:
    """The preset, with what the command line gives in place of its forms, seeds and updates. Raises ValueError."""
    preset = presets.read(arguments.preset)
    if preset.comparison is None:
        raise ValueError(f"preset {preset.name} has no comparison: python -m fastanila.train --preset {preset.name}")
    forms, pilots = preset.comparison.forms, preset.comparison.pilots
    if "samplers" in given:
        if other := set(arguments.samplers) - set(forms):
            raise ValueError(
                f"samplers must be of {', '.join(forms)} with preset={preset.name}, got {', '.join(other)}"
            )
        preset = presets.changed(preset, forms=tuple(arguments.samplers))
    if "seeds" in given:
        preset = presets.changed(preset, seeds=tuple(arguments.seeds))
    if "iterations" in given and arguments.iterations < pilots.iterations:  # a first look
        preset = presets.changed(preset, pilots=pilots._replace(iterations=arguments.iterations))
    return preset


def compared_forms(preset: presets.Preset, arguments: argparse.Namespace, common: dict[str, Any], out: Path) -> int:
    """Tune every form, train it with every seed, and write compare.json, compare.md and compare.png; the exit code.

    ``common``: settings that win over the preset's. Raises ValueError ahead of the work for what cannot be.
    """
    assert preset.comparison is not None
    forms, seeds = preset.comparison.forms, preset.comparison.seeds
    first = [presets.settings_of(preset, presets.Choice(form), seed=seeds[0], common=common) for form in forms]
    for reason in needs.idle(first[0], common.keys() & {"data_dir", "image_size"}).values():
        raise ValueError(reason)
    out.mkdir(parents=True, exist_ok=True)
    run_directory.check_writable(out)

    def make(resolved: Mapping[str, Settings], folder: str) -> list[dict[str, Any]]:
        (out / folder).mkdir(parents=True, exist_ok=True)

        def measure(name: str, directory: Path, finished: bool) -> dict[str, Any]:
            trial = presets.described(resolved[name]) | {"seed": resolved[name].seed}
            return measured(trial, directory, finished, arguments.data_dir, arguments.fused)

        return train_all(resolved, out / folder / "runs.json", arguments.jobs, measure)

    def work() -> dict[str, Any]:
        tuned, pilots = tuning.tune(preset, common, lambda resolved, folder: make(resolved, f"pilots/{folder}"))
        keys = list(itertools.product(forms, seeds))
        chosen = {(f, s): presets.settings_of(preset, tuned[f].choice, seed=s, common=common) for f, s in keys}
        lines = make({f"{f}-seed{s}": settings for (f, s), settings in chosen.items()}, "runs")
        lines = [line | {"form": form} for (form, _), line in zip(keys, lines, strict=True)]
        return side_by_side.document(preset, tuned, pilots, lines)

    document = made(work)
    if document is None:
        return 128 + signal.SIGINT
    files.write_text(out / "compare.json", json.dumps(side_by_side.finite(document), indent=2) + "\n")
    files.write_text(out / "compare.md", text := side_by_side.markdown(preset, document))
    side_by_side.picture(out / "compare.png", document, arguments.data_dir)
    exits.say(text)
    exits.say(f"everything is in {out}")
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
