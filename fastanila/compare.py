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
import dataclasses
import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import files
from .cli import exits, flags, parsers
from .data import Images, registry
from .evaluate import evaluate
from .evaluation import features, plots
from .evaluation.comparison import MEASURES, summary, table
from .samplers import EXACT, SAMPLERS
from .training import (
    build,
    checkpoint,
    config,
    defaults,
    loop,
    needs,
    presets,
    run_directory,
    several,
    side_by_side,
    tuning,
)
from .training.metrics import read_rows
from .training.run import load
from .training.settings import Settings

#: Settings of all runs that are flags.
COMMON = ("data", "data_dir", "image_size", "iterations", "step_size", "fused", "replicas", "highest")


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
    """The trial's settings: at most as many gradients of the energy an update as AniLA takes, by ``common`` or by its
    default.

    An exact sampler takes one more than its transitions, where its chains start. All replicas of a chain share its
    gradients; the samplers that are not exact have none.
    """
    if trial.sampler not in EXACT:
        common = {k: v for k, v in common.items() if k not in ("replicas", "highest")}
    settings = config.resolve(Settings(**common, sampler=trial.sampler, seed=trial.seed))
    anila = vars(config.resolve(Settings(data=settings.data, sampler="anila")))
    steps = common.get("steps", anila["steps"]) // settings.replicas - (trial.sampler in EXACT)
    gradients = build.build_sampler(settings, registry.box_of(settings.data)).gradients
    own: dict[str, Any] = {"steps": max(steps // gradients, 1)}
    if trial.threshold is not None:
        level = anila | {"threshold": trial.threshold, "step_size": settings.step_size}
        own["threshold"] = defaults.translated(level, "anila", trial.sampler)["threshold"]
    settings = dataclasses.replace(settings, **own)
    config.check(settings)
    return settings


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
    common = {k: v for k in COMMON if (v := getattr(arguments, k)) is not None}
    with exits.refusing(ValueError):
        out = config.path_of("out", arguments.out)
        if arguments.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {arguments.jobs}")
        for name in ("samplers", "thresholds", "seeds"):
            if len(set(values := getattr(arguments, name))) < len(values):
                raise ValueError(f"{name} must differ from one another, got {' '.join(map(str, values))}")
        if arguments.preset is not None:
            flags.refuse(given, ("thresholds", "step_size"), "with preset, which tunes them")
            flags.refuse(given, ("replicas", "highest"), "with preset, whose forms have one temperature")
            experiment = preset_of(arguments, given)
            more = others(arguments.settings, [name for name in COMMON if name != "step_size"])
            own = {k: v for k, v in common.items() if k in given} | more
            return compared_forms(experiment, arguments, own, out)
        flags.refuse(given, ("pilots",), "without preset, whose forms they tune")
        more = others(arguments.settings, ["threshold", *COMMON])
        if other := set(arguments.samplers) - set(SAMPLERS):
            raise ValueError(
                f"samplers must be of {', '.join(SAMPLERS)} without preset, got {', '.join(sorted(other))}"
            )
    common |= {"sample_every": 0} | more
    with exits.refusing(ValueError, ModuleNotFoundError):
        thresholds = arguments.thresholds or [defaults.defaults(arguments.data, "anila").get("threshold", 1.0)]
        by_name = {trial.name: trial for trial in trials(arguments.samplers, thresholds, arguments.seeds)}
        if arguments.thresholds and all(trial.threshold is None for trial in by_name.values()):
            raise ValueError(f"thresholds has no effect with samplers={' '.join(arguments.samplers)}, which have none")
        if not set(arguments.samplers) & set(EXACT):
            flags.refuse(given, ("replicas", "highest"), f"without one of the exact samplers ({', '.join(EXACT)})")
        if arguments.replicas == 1:
            flags.refuse(given, ("highest",), "without replicas: it needs replicas above 1")
        resolved = {name: settings_of(trial, common) for name, trial in by_name.items()}
        refuse_idle(resolved.values(), given & {"data_dir", "image_size"} | more.keys())
        check_images(next(iter(resolved.values())))
        out.mkdir(parents=True, exist_ok=True)
        run_directory.check_writable(out)

    def measure(name: str, directory: Path, finished: bool) -> dict[str, Any]:
        return measured(dataclasses.asdict(by_name[name]), directory, finished, arguments.data_dir, arguments.fused)

    lines = made(lambda: several.train_all(resolved, out / "compare.json", arguments.jobs, measure, exits.say))
    rows = summary(lines)
    of = next((row["of"] for row in rows if row["each"]), "gap")
    plots.save_comparison(out / "compare.png", rows, MEASURES[of])
    exits.say(table(rows))
    exits.say(f"everything is in {out}")
    return exits.DONE


def others(texts: Sequence[str], also: Sequence[str]) -> dict[str, Any]:
    """The settings that --settings gives. Raises ValueError for one that the comparison itself gives its runs (``also``
    among them), or that has a flag of its own."""
    values = config.assigned(texts, "settings")
    own = ("sampler", "seed", "out", "sample_every", *also)
    if taken := [name for name in own if name in values]:
        raise ValueError(f"settings cannot have {taken[0]}, which the comparison or a flag of its own gives")
    return values


def check_images(settings: Settings) -> None:
    """Raise ahead of the trainings what measuring the first would raise: FileNotFoundError where there are no images,
    ModuleNotFoundError without the network whose features compare them."""
    data = build.load_data(settings, "cpu")
    if isinstance(data, Images):
        labels = data.train_labels, data.held_out_labels
        features.extractor_of(data.train, labels[0], data.held_out, labels[1])


def refuse_idle(runs: Iterable[Settings], names: Iterable[str]) -> None:
    """Raise ValueError for a setting that has no effect in any of the runs."""
    names = set(names)
    reasons = [needs.idle(run, names) for run in runs]
    for name in reasons[0]:
        if all(name in of_run for of_run in reasons):
            raise ValueError(reasons[0][name])


def made(work: Callable[[], Any]) -> Any:
    """What the work returns. What is wrong with the runs is `Refused`. A signal ends the process with its exit code,
    and a line that says what goes on."""
    try:
        with exits.refusing(ValueError, ModuleNotFoundError, checkpoint.CheckpointError, several.Failed):
            return work()
    except KeyboardInterrupt:
        number = signal.SIGINT
    except loop.Interrupted as stop:
        number = signal.Signals(stop.number)
    exits.complain("stopped; the same command goes on")
    raise SystemExit(128 + number)


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
    if "pilots" in given:
        if arguments.pilots < 0:
            raise ValueError(f"pilots must be at least 0, got {arguments.pilots}")
        preset = presets.changed(preset, pilots=pilots._replace(iterations=arguments.pilots))
    elif "iterations" in given and arguments.iterations < pilots.iterations:  # a first look
        preset = presets.changed(preset, pilots=pilots._replace(iterations=arguments.iterations))
    return preset


def compared_forms(preset: presets.Preset, arguments: argparse.Namespace, common: dict[str, Any], out: Path) -> int:
    """Tune every form, train it with every seed, and write compare.json, compare.md and compare.png; the exit code.

    ``common``: settings that win over the preset's. Raises ValueError ahead of the work for what cannot be.
    """
    assert preset.comparison is not None
    forms, seeds = preset.comparison.forms, preset.comparison.seeds
    first = [presets.settings_of(preset, presets.Choice(form), seed=seeds[0], common=common) for form in forms]
    refuse_idle(first, common.keys() - {"data", "iterations", "fused"})
    with exits.refusing(ModuleNotFoundError):
        check_images(first[0])
    out.mkdir(parents=True, exist_ok=True)
    run_directory.check_writable(out)

    def make(resolved: Mapping[str, Settings], folder: str) -> list[dict[str, Any]]:
        (out / folder).mkdir(parents=True, exist_ok=True)

        def measure(name: str, directory: Path, finished: bool) -> dict[str, Any]:
            trial = presets.described(resolved[name]) | {"seed": resolved[name].seed}
            return measured(trial, directory, finished, arguments.data_dir, arguments.fused)

        return several.train_all(resolved, out / folder / "runs.json", arguments.jobs, measure, exits.say)

    def work() -> dict[str, Any]:
        tuned, pilots = tuning.tune(preset, common, lambda resolved, folder: make(resolved, f"pilots/{folder}"))

        def runs(of: Sequence[str], folder: str) -> list[dict[str, Any]]:
            keys = list(itertools.product(of, seeds))
            chosen = {(f, s): presets.settings_of(preset, tuned[f].choice, seed=s, common=common) for f, s in keys}
            lines = make({f"{f}-seed{s}": settings for (f, s), settings in chosen.items()}, folder)
            return [line | {"form": form} for (form, _), line in zip(keys, lines, strict=True)]

        lines = runs(list(tuned), "runs")
        if presets.EFFECTIVE in forms:
            tuned[presets.EFFECTIVE] = tuning.effective(tuned[presets.ITS_SOURCE], lines)
            lines += runs([presets.EFFECTIVE], "effective")
        return side_by_side.document(preset, common, tuned, pilots, lines)

    document = made(work)
    files.write_text(out / "compare.json", json.dumps(side_by_side.finite(document), indent=2) + "\n")
    files.write_text(out / "compare.md", text := side_by_side.markdown(preset, document))
    side_by_side.picture(out / "compare.png", document, arguments.data_dir)
    exits.say(text)
    exits.say(f"everything is in {out}")
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
