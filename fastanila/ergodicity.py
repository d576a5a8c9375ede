"""Which law a sampler has, and how fast it forgets its start: its transition kernel on a grid (`theory.markov`).

    python -m fastanila.ergodicity --target normal --sampler anila --threshold 1 --step-size 0.5 --out DIR
    python -m fastanila.ergodicity --run RUN --out DIR                  the energy and the sampler of a trained run
    python -m fastanila.ergodicity --table                              the biases of the samplers, as Markdown
    python -m fastanila.ergodicity --run RUN --coupling --out DIR       pairs of chains that meet, in any dimension

Several step sizes, thresholds or parameters of the target make a family, for which the suprema of the rates and of the
drift condition's constants, and the infimum of the minorisation's, are given as well, on one ball. The ball is the
least that holds 95 % of every target, and where the drift condition needs a larger one, 1.1 times the radius it needs,
if the box has room to judge it there. DIR gets ergodicity.json and ergodicity.png.

--coupling needs no grid (`theory.coupling`): pairs of chains of MALA or adjusted AniLA, from uniform noise on the box,
which meet. DIR gets coupling.json and coupling.png. The energy of a run whose chains were clamped is taken within those
bounds.
"""

from __future__ import annotations

if __name__ == "__main__":  # ahead of torch, which takes seconds to import
    from .cli import exits, parsers

    exits.begin(parsers.ergodicity())

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
from pathlib import Path

from . import checks, files
from .cli import exits, parsers
from .cli.flags import refuse
from .samplers import SAMPLERS
from .samplers.sampler import Sampler
from .theory import coupling_report, study, targets
from .theory.study import TROUBLE, Member, Result, family, save_figure, table
from .training import build, checkpoint, config, run_directory
from .training.run import Run, load, with_sampler


def summary(report: dict) -> str:
    """One line of a member's numbers, or of those that hold for all."""
    parts = [f"rate {report['rate']:.5f}"]
    if "tv_to_target" in report:
        ratio = "/".join(f"{r:.3f}" for r in report["variance_ratio"])
        parts = [f"TV to target {report['tv_to_target']:.4f}", f"variance ratio {ratio}", *parts]
    condition = report["drift"]
    if condition is None:
        parts.append("drift cannot be judged on this grid")
    else:
        holds = "" if condition["rate"] < 1 else "fails: "
        parts.append(f"drift {holds}lambda {condition['rate']:.4f} kappa {condition['kappa']:.3f}")
    steps, constant = shown_minorisation(report["minorisation"])
    return f"{report.get('label', 'all')}: {', '.join(parts)}, minorisation {constant:.2g} at m = {steps}"


def shown_minorisation(constants: dict[int, float]) -> tuple[int, float]:
    """(m, eps_m) of the first m of which eps_m is a tenth, or else of the last."""
    return next(((m, constant) for m, constant in constants.items() if constant >= 0.1), list(constants.items())[-1])


def warnings(report: dict) -> list[str]:
    advice = {"lost": "leaves the box: widen it with --box", "coarse": "has proposals narrower than half a cell: "
              "raise --resolution"}  # fmt: skip
    return [f"{report['label']}: {report[k]:.1%} of the law {advice[k]}" for k in advice if report[k] > TROUBLE]


def members_of(arguments: argparse.Namespace) -> list[Member]:
    """The family that the arguments ask for. Raises ValueError where they do not fit together."""
    run = None if arguments.run is None else load(arguments.run, "cpu")
    if run is not None and arguments.parameter is not None:
        raise ValueError("parameter shapes a named target, and a run's energy has none")
    if run is not None and arguments.sampler is not None:
        run = with_sampler(run, arguments.sampler)  # of the same law: at the run's temperature
    found = []
    for parameter in arguments.parameter or (None,):
        target = targets.load(arguments.target, parameter) if run is None else study.learned(run)
        if arguments.box is not None:
            target = dataclasses.replace(target, box=(tuple(arguments.box),) * len(target.box))
        for sampler in _samplers(arguments, run):
            found.append(Member(target, parameter, sampler))
    return found


def _samplers(arguments: argparse.Namespace, run: Run | None, default: str = "anila") -> list[Sampler]:
    base = run.sampler if run is not None else SAMPLERS[arguments.sampler or default]()
    norms = None if arguments.norm is None else [arguments.norm]
    given = {"step_size": arguments.step_size, "threshold": arguments.threshold, "norm": norms}
    given = {name: values for name, values in given.items() if values is not None}
    own = {field.name for field in dataclasses.fields(base)}
    for name in given.keys() - own:
        raise ValueError(f"{name.replace('_', '-')} is not a setting of {type(base).__name__}")
    every = itertools.product(*given.values())
    return [dataclasses.replace(base, **dict(zip(given, values, strict=True))) for values in every]


def main(argv: list[str] | None = None) -> int:
    return exits.run(parsers.ergodicity(), argv, analysed)


def analysed(arguments: argparse.Namespace, given: set[str]) -> int:
    """Print, and write, what the arguments ask for; the exit code. ``given``: those that the command line has."""
    if arguments.table:
        with exits.refusing(ValueError):
            refuse(given - {"table"}, sorted(given), "with table, which is one of given targets and samplers")
        exits.say(table())
        return exits.DONE
    if arguments.coupling:
        return coupled(arguments, given)
    with exits.refusing(ValueError, RuntimeError, checkpoint.CheckpointError):
        refuse(given, ["pairs", "lag", "budget", "warm_up", "gradient", "seed"], "without coupling, which they are of")
        checks.positive("beta", arguments.beta, finite=True)
        if arguments.radius is not None:
            checks.positive("radius", arguments.radius, finite=True)
        out = None if arguments.out is None else config.path_of("out", arguments.out)
        if out is not None:
            run_directory.check_writable(out)
        members = members_of(arguments)
        resolution = arguments.resolution or (800 if len(members[0].target.box) == 1 else 48)
        report, results = family(members, resolution, arguments.beta, arguments.radius)
    exits.say(f"{report['target']}, {report['sampler']}, {resolution} cells an axis, ball of radius "
                f"{report['ball']['radius']:.3g}, V = pi^-{arguments.beta:g}")  # fmt: skip
    for own in report["members"]:
        exits.say(summary(own))
    if len(members) > 1:
        exits.say(summary(report["uniform"]))
    for line in itertools.chain.from_iterable(map(warnings, report["members"])):
        exits.complain(f"warning: {line}")
    if out is not None:
        write(out, report, results)
        exits.say(f"ergodicity.json and ergodicity.png in {out}")
    return exits.DONE


def coupled(arguments: argparse.Namespace, given: set[str]) -> int:
    """`analysed` with --coupling."""
    with exits.refusing(ValueError, TypeError, RuntimeError, checkpoint.CheckpointError):
        refuse(given, ["resolution", "beta", "radius"], "with coupling, which needs no grid")
        if arguments.run is None:
            refuse(given, ["gradient"], "without a run, whose energy has parameters")
        out = None if arguments.out is None else config.path_of("out", arguments.out)
        if out is not None:
            run_directory.check_writable(out)
        checks.count("warm_up", arguments.warm_up, least=0)
        run = None if arguments.run is None else load(arguments.run, "cpu")
        with contextlib.nullcontext() if run is None else build.arithmetic(run.settings.precision):
            subject = subject_of(arguments, run)
            found = coupling_report.examine(
                subject, pairs=arguments.pairs, lag=arguments.lag, budget=arguments.budget, seed=arguments.seed
            )
            if arguments.gradient and found.bound is not None:
                found.report["gradient"] = coupling_report.gradient(
                    subject, found.meetings, pairs=arguments.gradient, seed=arguments.seed
                )
    for line in coupling_report.sentences(found.report):
        exits.say(line)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        files.write_text(out / "coupling.json", json.dumps(found.report, indent=2, allow_nan=False) + "\n")
        coupling_report.save_figure(out / "coupling.png", found, f"{subject.name}, {type(subject.sampler).__name__}")
        exits.say(f"coupling.json and coupling.png in {out}")
    return exits.DONE


def subject_of(arguments: argparse.Namespace, run: Run | None) -> coupling_report.Subject:
    """What --coupling is of, its step size adapted in --warm-up transitions. Raises ValueError where it cannot be."""
    box = None if arguments.box is None else tuple(arguments.box)
    (parameter,) = _one("parameter", arguments.parameter or [None])
    if run is None:
        (sampler,) = _one("sampler", _samplers(arguments, None, "anila-mh"))
        target = targets.load(arguments.target, parameter)
        subject = coupling_report.of_target(target, sampler, box)
        chains = None
    else:
        if parameter is not None:
            raise ValueError("parameter shapes a named target, and a run's energy has none")
        bounds, chains = getattr(run.sampler, "bounds", None), run.chains
        if arguments.sampler is not None:
            run = with_sampler(run, arguments.sampler)
        (sampler,) = _one("sampler", _samplers(arguments, run))
        subject = coupling_report.of_run(run._replace(sampler=sampler), bounds, box)
    return coupling_report.warmed_up(subject, chains, steps=arguments.warm_up, seed=arguments.seed)


def _one(name: str, values: list) -> list:
    if len(values) != 1:
        raise ValueError(f"{name} must be one for coupling, got {len(values)}")
    return values


def write(directory: Path, report: dict, results: list[Result]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    files.write_text(directory / "ergodicity.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    save_figure(directory / "ergodicity.png", results, f"{report['target']}, {report['sampler']}")


if __name__ == "__main__":
    sys.exit(main())
