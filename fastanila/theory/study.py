"""A family of samplers and targets: their laws, how fast they are reached, as a table and as figures."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..evaluation import plots, quadrature
from ..samplers import SAMPLERS
from ..samplers.sampler import Sampler
from ..training.run import Run, box_of
from . import conditions, markov, targets
from .targets import ROOM, Target


def learned(run: Run) -> Target:
    """The energy that a run learned in the plane, on the data's box widened, or where its sampler clamps, there.

    Raises ValueError for a run on images.
    """
    if run.chains.shape[1:] != (2,):
        raise ValueError(f"the run must be one in two dimensions, got chains of shape {tuple(run.chains.shape[1:])}")
    side = run.sampler.bounds or quadrature.widened(box_of(run), ROOM)
    # the network computes in its own float32; the grid around it is float64
    return Target(f"{run.settings.data} (learned)", lambda x: run.energy(x.float()).to(x.dtype), (tuple(side),) * 2)


_DOUBLED = 2500  #: states up to which powers of the kernel are computed

TROUBLE = 1e-3  #: the share of a stationary law that is lost or coarse above which a warning says so


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
    law, rate = conditions.stationary(kernel.matrix), conditions.geometric_rate(kernel.matrix)
    start = conditions.tail_cell(kernel.target)
    distances = conditions.distances(kernel.matrix, start, law)
    small = markov.small_step_law(member.sampler, kernel)
    settings = dataclasses.asdict(member.sampler)
    return Result(
        {
            "label": member.label,
            "parameter": member.parameter,
            "box": member.target.box,
            "settings": {k: _plain(v) for k, v in settings.items()},
            "tv_to_target": conditions.total_variation(law, kernel.target),
            "tv_to_small_step_law": None if small is None else conditions.total_variation(law, small),
            "variance_ratio": (variance(law, grid) / variance(kernel.target, grid)).tolist(),
            "rate": rate,
            "bound_constant": conditions.bound_constant(distances, rate),
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


def common_ball(results: list[Result], beta: float, radius: float | None) -> conditions.Ball:
    """The ball for all members, about the mean of the first one's target; ``radius`` overrides what the module says."""
    first = results[0]
    centre = first.kernel.target @ first.grid.centres
    if radius is not None:
        ball = conditions.Ball(centre, radius)
        if not all(ball.holds(r.grid.centres).any() for r in results):
            raise ValueError(f"radius must be large enough for the ball to hold a cell of the grid, got {radius}")
        return ball
    least = [conditions.mass_ball(r.kernel.target, r.grid.centres, centre).radius for r in results]
    ball = conditions.Ball(centre, max(least))
    found = [conditions.drift(r.kernel, r.grid, ball, beta) for r in results]
    needed = [1.1 * d.least_radius for d in found if d is not None and d.rate >= 1 and d.least_radius is not None]
    wider = conditions.Ball(centre, max([ball.radius, *needed]))
    judged = all(conditions.drift(r.kernel, r.grid, wider, beta) is not None for r in results)
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
        found = conditions.drift(result.kernel, result.grid, ball, beta)
        result.report["drift"] = None if found is None else found._asdict()
        result.report["minorisation"] = conditions.minorisation(result.kernel.matrix, within, doublings)
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
                    law = conditions.stationary(kernel.matrix)
                    row.append(_bias(law, kernel, grid))
                row.append(_bias(markov.small_step_law(sampler, kernel), kernel, grid))
                lines.append(f"| {name} | {kind} | {'-' if b is None else f'{b:g}'} | {' | '.join(row)} |")
    return "\n".join(lines)


def _bias(law: np.ndarray, kernel: markov.Kernel, grid: markov.Cells) -> str:
    ratio = (variance(law, grid) / variance(kernel.target, grid)).item()
    mark = "*" if max(law @ kernel.lost, law @ kernel.coarse) > TROUBLE else ""
    return f"{conditions.total_variation(law, kernel.target):.3f} ({ratio:.3f}){mark}"


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


def _plain(value):
    """A setting as JSON has it: infinity as text."""
    return "inf" if value == math.inf else value
