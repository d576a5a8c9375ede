"""Which law a sampler has, and how fast it forgets its start: its transition kernel on a grid (`fastanila.markov`).

    python -m fastanila.ergodicity --target normal --sampler anila --threshold 1 --step-size 0.5 --out DIR
    python -m fastanila.ergodicity --run RUN --out DIR                  the energy and the sampler of a trained run
    python -m fastanila.ergodicity --table                              the biases of the samplers, as Markdown

Several step sizes, thresholds or parameters of the target make a family, for which the suprema of the rates and of the
drift condition's constants, and the infimum of the minorisation's, are given as well, on one ball. The ball is the
least that holds 95 % of every target, and where the drift condition needs a larger one, 1.1 times the radius it needs,
if the box has room to judge it there. DIR gets ergodicity.json and ergodicity.png.
"""

from __future__ import annotations

if __name__ == "__main__":  # ahead of torch, which takes seconds to import
    from .command import end_at_once_on_interrupt

    end_at_once_on_interrupt()

import argparse
import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import checkpoint, checks, command, config, markov, needs, plots, run_directory, runs, targets
from .reference import NORMS
from .samplers import SAMPLERS, Sampler
from .targets import Target

_DOUBLED = 2500  #: states up to which powers of the kernel are computed
_TROUBLE = 1e-3  #: the share of a stationary law that is lost or coarse above which a warning says so


class Member(NamedTuple):
    """One of a family: a sampler on a target."""

    target: Target
    parameter: float | None
    sampler: Sampler

    @property
    def label(self) -> str:
        names = ("threshold", "step_size")
        numbers = [f"{name} {getattr(self.sampler, name):g}" for name in names if name in self.sampler.numbers]
        return ", ".join(([] if self.parameter is None else [f"parameter {self.parameter:g}"]) + numbers)


class Result(NamedTuple):
    report: dict  #: what ergodicity.json has of a member
    grid: markov.Cells
    kernel: markov.Kernel
    law: np.ndarray  #: (N,) the stationary law
    distances: np.ndarray  #: (K + 1,) its total variation from the chain's after k transitions


def analyse(member: Member, resolution: int) -> Result:
    """The law of one member, its distance to the target, and the rate at which it is approached."""
    grid = markov.cells(member.target.box, resolution)
    kernel = markov.transition_kernel(member.sampler, member.target, grid)
    law, rate = markov.stationary(kernel.matrix), markov.geometric_rate(kernel.matrix)
    start = markov.tail_cell(kernel.target)
    distances = markov.distances(kernel.matrix, start, law)
    small = markov.small_step_law(member.sampler, kernel)
    settings = dataclasses.asdict(member.sampler)
    return Result(
        {
            "label": member.label,
            "parameter": member.parameter,
            "box": member.target.box,
            "settings": {k: _plain(v) for k, v in settings.items()},
            "tv_to_target": markov.total_variation(law, kernel.target),
            "tv_to_small_step_law": None if small is None else markov.total_variation(law, small),
            "variance_ratio": (variance(law, grid) / variance(kernel.target, grid)).tolist(),
            "rate": rate,
            "bound_constant": markov.bound_constant(distances, rate),
            "start": grid.centres[start].tolist(),
            "lost": float(law @ kernel.lost),
            "coarse": float(law @ kernel.coarse),
        },
        grid,
        kernel,
        law,
        distances,
    )


def variance(law: np.ndarray, grid: markov.Cells) -> np.ndarray:
    """(d,) by axis."""
    return law @ (grid.centres - law @ grid.centres) ** 2


def common_ball(results: list[Result], beta: float, radius: float | None) -> markov.Ball:
    """The ball for all members, about the mean of the first one's target; ``radius`` overrides what the module says."""
    first = results[0]
    centre = first.kernel.target @ first.grid.centres
    if radius is not None:
        ball = markov.Ball(centre, radius)
        if not all(ball.holds(r.grid.centres).any() for r in results):
            raise ValueError(f"radius must be large enough for the ball to hold a cell of the grid, got {radius}")
        return ball
    least = [markov.mass_ball(r.kernel.target, r.grid.centres, centre).radius for r in results]
    ball = markov.Ball(centre, max(least))
    found = [markov.drift(r.kernel, r.grid, ball, beta) for r in results]
    needed = [1.1 * d.least_radius for d in found if d is not None and d.rate >= 1 and d.least_radius is not None]
    wider = markov.Ball(centre, max([ball.radius, *needed]))
    judged = all(markov.drift(r.kernel, r.grid, wider, beta) is not None for r in results)
    return wider if judged else ball


def family(
    members: list[Member], resolution: int, beta: float, radius: float | None = None
) -> tuple[dict, list[Result]]:
    """(report, results): every member by itself, the conditions on one ball, and the constants that hold for all."""
    results = [analyse(member, resolution) for member in members]
    ball = common_ball(results, beta, radius)
    for result in results:
        doublings = 8 if len(result.law) <= _DOUBLED else 0
        within = ball.holds(result.grid.centres)
        found = markov.drift(result.kernel, result.grid, ball, beta)
        result.report["drift"] = None if found is None else found._asdict()
        result.report["minorisation"] = markov.minorisation(result.kernel.matrix, within, doublings)
    reports = [result.report for result in results]
    report = {
        "target": members[0].target.name,
        "sampler": type(members[0].sampler).__name__,
        "is_exact": members[0].sampler.is_exact,
        "resolution": resolution,
        "ball": {"centre": ball.centre.tolist(), "radius": ball.radius},
        "members": reports,
        "uniform": uniform(reports),
    }
    return report, results


def uniform(reports: list[dict]) -> dict:
    """The constants that hold for every member: suprema of rate, lambda and kappa, infima of the minorisation's."""
    drifts = [r["drift"] for r in reports]
    return {
        "rate": max(r["rate"] for r in reports),
        "bound_constant": max(r["bound_constant"] for r in reports),
        "drift": None if None in drifts else {k: max(d[k] for d in drifts) for k in ("rate", "kappa")},
        "minorisation": {m: min(r["minorisation"][m] for r in reports) for m in reports[0]["minorisation"]},
    }


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
    return [f"{report['label']}: {report[k]:.1%} of the law {advice[k]}" for k in advice if report[k] > _TROUBLE]


# ------------------------------------------------------------------------------------------------ the table of biases

_BOXES = {"normal": ((-24.0, 24.0),), "skewed": ((-72.0, 12.0),)}  # room for the tails of clipped drifts


def table(step_sizes=(1.0, 0.3, 0.1, 0.01), thresholds=(0.5, 1.0, 2.0), resolution: int = 2000) -> str:
    """Markdown: the samplers' stationary laws on the normal and the skewed target, by step size and threshold.

    Each as its total variation to the target and, in brackets, its variance over the target's; a star where more than
    0.1 % of the law leaves the box or has proposals narrower than half a cell. The last column is the small-step law.
    """
    lines = [
        "| target | sampler | b | " + " | ".join(f"eps = {eps:g}" for eps in step_sizes) + " | eps -> 0 |",
        "| --- " * (len(step_sizes) + 4) + "|",
    ]
    for name, box in _BOXES.items():
        target = dataclasses.replace(targets.load(name), box=box)
        grid = markov.cells(box, resolution)
        for kind in ("langevin", "anila", "tamed", "mala", "anila-mh"):
            for b in thresholds if "threshold" in SAMPLERS[kind].numbers else (None,):
                own = {} if b is None else {"threshold": b}
                row = []
                for eps in step_sizes:
                    sampler = SAMPLERS[kind](step_size=eps, **own)
                    kernel = markov.transition_kernel(sampler, target, grid)
                    law = markov.stationary(kernel.matrix)
                    row.append(_bias(law, kernel, grid))
                row.append(_bias(markov.small_step_law(sampler, kernel), kernel, grid))
                lines.append(f"| {name} | {kind} | {'-' if b is None else f'{b:g}'} | {' | '.join(row)} |")
    return "\n".join(lines)


def _bias(law: np.ndarray, kernel: markov.Kernel, grid: markov.Cells) -> str:
    ratio = (variance(law, grid) / variance(kernel.target, grid)).item()
    mark = "*" if max(law @ kernel.lost, law @ kernel.coarse) > _TROUBLE else ""
    return f"{markov.total_variation(law, kernel.target):.3f} ({ratio:.3f}){mark}"


# --------------------------------------------------------------------------------------------------------- the figure


def save_figure(path: Path, results: list[Result], title: str) -> None:
    """Total variation against k with the geometric bound, for up to eight members, and the first one's law against
    its target: two curves in one dimension, two maps in two."""
    from matplotlib.figure import Figure

    first = results[0]
    plane = len(first.grid.shape) == 2
    figure = Figure(figsize=(14 if plane else 10, 4.2), layout="constrained")
    left, *others = figure.subplots(1, 3 if plane else 2)
    for number, result in enumerate(results[:8]):
        k = np.arange(len(result.distances))
        bound = result.report["bound_constant"] * result.report["rate"] ** k
        left.semilogy(k, result.distances, color=f"C{number}", linewidth=1.2, label=result.report["label"])
        left.semilogy(k, bound, color=f"C{number}", linewidth=0.8, linestyle="--")
    left.set(xlabel="transitions k", ylabel="total variation to the stationary law", ylim=(1e-6, None))
    left.set_title("from a start in the tail; dashed: C rate^k")
    left.legend(fontsize="small")
    laws = {"target": first.kernel.target, "stationary law": first.law}
    volume = first.grid.volume
    if plane:
        (x0, *_, x1), (y0, *_, y1) = first.grid.edges
        highest = max(law.max() for law in laws.values()) / volume
        for axis, (name, law) in zip(others, laws.items(), strict=True):
            axis.imshow((law / volume).reshape(first.grid.shape).T, origin="lower", extent=(x0, x1, y0, y1),
                        aspect="auto", cmap="magma", vmin=0, vmax=highest)  # fmt: skip
            axis.set_title(name)
    else:
        for (name, law), style in zip(laws.items(), ("--", "-"), strict=True):
            others[0].plot(first.grid.centres[:, 0], law / volume, style, linewidth=1.2, label=name)
        likely = first.grid.centres[np.maximum(*laws.values()) > 1e-7]
        others[0].set(xlim=(likely.min(), likely.max()), xlabel="x", ylabel="density", title=first.report["label"])
        others[0].legend(fontsize="small")
    figure.suptitle(title)
    plots.save_figure(path, figure)


# -------------------------------------------------------------------------------------------------------- the command


def members_of(arguments: argparse.Namespace) -> list[Member]:
    """The family that the arguments ask for. Raises ValueError where they do not fit together."""
    run = None if arguments.run is None else runs.load(arguments.run, "cpu")
    if run is not None and arguments.parameter is not None:
        raise ValueError("parameter shapes a named target, and a run's energy has none")
    if run is not None and arguments.sampler is not None:
        run = runs.with_sampler(run, arguments.sampler)  # of the same law: at the run's temperature
    found = []
    for parameter in arguments.parameter or (None,):
        target = targets.load(arguments.target, parameter) if run is None else targets.learned(run)
        if arguments.box is not None:
            target = dataclasses.replace(target, box=(tuple(arguments.box),) * len(target.box))
        for sampler in _samplers(arguments, run):
            found.append(Member(target, parameter, sampler))
    return found


def _samplers(arguments: argparse.Namespace, run: runs.Run | None) -> list[Sampler]:
    base = run.sampler if run is not None else SAMPLERS[arguments.sampler or "anila"]()
    norms = None if arguments.norm is None else [arguments.norm]
    given = {"step_size": arguments.step_size, "threshold": arguments.threshold, "norm": norms}
    given = {name: values for name, values in given.items() if values is not None}
    own = {field.name for field in dataclasses.fields(base)}
    for name in given.keys() - own:
        raise ValueError(f"{name.replace('_', '-')} is not a setting of {type(base).__name__}")
    every = itertools.product(*given.values())
    return [dataclasses.replace(base, **dict(zip(given, values, strict=True))) for values in every]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastanila.ergodicity", description="A sampler's law and how fast it is reached, on a grid."
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--target", choices=targets.NAMES, default="normal", help="named density (default normal)")
    target.add_argument("--run", help="run directory: the energy it learned, in two dimensions")
    target.add_argument("--table", action="store_true", help="print the table of biases, and nothing else")
    parser.add_argument("--parameter", type=float, nargs="+", help="of the named target; several make a family")
    parser.add_argument("--sampler", choices=[n for n in SAMPLERS if n not in ("hmc", "gd")],
                        help="default: anila, or the run's own")  # fmt: skip
    parser.add_argument("--threshold", type=float, nargs="+", help="the sampler's b; several make a family")
    parser.add_argument("--step-size", type=float, nargs="+", help="the sampler's eps; several make a family")
    parser.add_argument("--norm", choices=NORMS, help="whose magnitude |s| is")
    parser.add_argument("--resolution", type=int, help="cells along an axis (default 800, or 48 in two dimensions)")
    parser.add_argument("--box", type=float, nargs=2, metavar=("LOW", "HIGH"), help="box along every axis")
    parser.add_argument("--beta", type=float, default=0.25, help="of V = pi^-beta (default 0.25)")
    parser.add_argument("--radius", type=float, help="of the ball, in place of the one described in the module")
    parser.add_argument("--out", help="directory for ergodicity.json and ergodicity.png")

    def work() -> int:
        arguments = parser.parse_args(argv)
        return analysed(arguments, needs.given(parser, argv, arguments))

    return command.exit_code(work)


def analysed(arguments: argparse.Namespace, given: set[str]) -> int:
    """Print, and write, what the arguments ask for; the exit code. ``given``: those that the command line has."""
    if arguments.table:
        with command.refusing(ValueError):
            needs.refuse(given - {"table"}, sorted(given), "with table, which is one of given targets and samplers")
        command.say(table())
        return command.DONE
    with command.refusing(ValueError, RuntimeError, checkpoint.CheckpointError):
        checks.positive("beta", arguments.beta, finite=True)
        if arguments.radius is not None:
            checks.positive("radius", arguments.radius, finite=True)
        out = None if arguments.out is None else config.path_of("out", arguments.out)
        if out is not None:
            run_directory.check_writable(out)
        members = members_of(arguments)
        resolution = arguments.resolution or (800 if len(members[0].target.box) == 1 else 48)
        report, results = family(members, resolution, arguments.beta, arguments.radius)
    command.say(f"{report['target']}, {report['sampler']}, {resolution} cells an axis, ball of radius "
                f"{report['ball']['radius']:.3g}, V = pi^-{arguments.beta:g}")  # fmt: skip
    for own in report["members"]:
        command.say(summary(own))
    if len(members) > 1:
        command.say(summary(report["uniform"]))
    for line in itertools.chain.from_iterable(map(warnings, report["members"])):
        command.complain(f"warning: {line}")
    if out is not None:
        write(out, report, results)
        command.say(f"ergodicity.json and ergodicity.png in {out}")
    return command.DONE


def write(directory: Path, report: dict, results: list[Result]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(directory / "ergodicity.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    save_figure(directory / "ergodicity.png", results, f"{report['target']}, {report['sampler']}")


def _plain(value):
    """A setting as JSON has it: infinity as text."""
    return "inf" if value == math.inf else value


if __name__ == "__main__":
    sys.exit(main())
