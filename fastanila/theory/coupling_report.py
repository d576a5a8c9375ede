"""What coupled chains say of a sampler on an energy: when pairs meet, and how soon a chain is close to its law."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, noise
from ..evaluation import plots
from ..noise import Stream
from ..samplers.sampler import Sampler
from ..training.run import Run, box_of
from .coupling import Bound, Exact, Meetings, check_sampler, meetings, tv_bound
from .targets import Box, Target
from .unbiased import likelihood_gradient, single, weighted

LEVELS = (0.25, 0.05, 0.01)  #: of total variation, whose times are told
_SHARE = 0.9  #: of a pilot's pairs have met at lag 1 within the lag that is then taken
_PILOT = 64  #: pairs of a pilot
_WARM = 256  #: chains that adapt a step size
_STARTS = 3  #: past a transition's own steps of `Stream.COUPLING`, which are 4 t and 4 t + 1
_PILOT_STEP, _GRADIENT_STEP = 1 << 50, 1 << 51  #: where the randomness of each begins
_TIMES = 20  #: the l's of an unbiased mean


class Subject(NamedTuple):
    """A sampler on an energy, and where its chains start: uniformly on a box."""

    name: str
    energy: Callable[[Tensor], Tensor]
    sampler: Exact
    shape: tuple[int, ...]  #: of a state
    box: Box  #: (low, high) of every element, or one for all
    dtype: torch.dtype
    device: torch.device
    steps: int | None = None  #: transitions that a run's chains make for an update
    network: nn.Module | None = None  #: what a run learned: has parameters


def of_target(target: Target, sampler: Sampler, box: tuple[float, float] | None = None) -> Subject:
    """A named target, from the uniform law on its box, or on ``box`` along every axis, in float64.

    Raises ValueError for a sampler that is not to be coupled.
    """
    exact = check_sampler(sampler)
    sides = target.box if box is None else (box,) * len(target.box)
    return Subject(target.name, target.energy, exact, (len(sides),), sides, torch.float64, torch.device("cpu"))


def of_run(run: Run, bounds: tuple[float, float] | None = None, box: tuple[float, float] | None = None) -> Subject:
    """A trained energy and the run's sampler, from uniform noise on its data's box, or on ``box``.

    bounds: to which the chains of its training were clamped, so that the energy beyond means nothing: the law is then
    that on the box alone. Raises ValueError for a run of several laws, or with a sampler that is not to be coupled.
    """
    exact = check_sampler(run.sampler)
    if run.settings.task == "completion" or run.classes is not None:
        raise ValueError(
            "the run must have one law for its chains to meet, and one with classes or completions has not"
        )
    energy = run.energy if bounds is None else confined(run.energy, bounds)
    low, high = box or box_of(run)
    return Subject(f"{run.settings.data} (learned)", energy, exact, tuple(run.chains.shape[1:]),
                   ((low, high),), run.chains.dtype, run.chains.device, run.settings.steps, run.energy)  # fmt: skip


def confined(energy: Callable[[Tensor], Tensor], bounds: tuple[float, float]) -> Callable[[Tensor], Tensor]:
    """The energy within ``bounds`` (low, high) of every element, infinite outside: its law on that box."""
    low, high = checks.bounds("bounds", bounds)

    def within(z: Tensor) -> Tensor:
        inside = ((z >= low) & (z <= high)).flatten(1).all(1)
        return torch.where(inside, energy(z), math.inf)

    return within


def warmed_up(subject: Subject, chains: Tensor | None, *, steps: int, seed: int) -> Subject:
    """The subject with its sampler's step size adapted (`Adjusted.adapt`) in so many transitions of 256 chains: of the
    first of ``chains`` (B, ...), or from where pairs start."""
    if not steps:
        return subject
    z = starts(subject, _WARM, seed=seed)[0] if chains is None else chains[:_WARM]
    found = subject.sampler.adapt(subject.energy, z.float(), steps=steps, seed=seed, compile=False)
    return subject._replace(sampler=found.sampler)


def starts(subject: Subject, pairs: int, *, seed: int, step: int = 0) -> tuple[Tensor, Tensor]:
    """(x, y), (pairs, ...) each: independent uniform draws on the subject's box, named as `lagged` names its draws."""
    low, high = (
        torch.tensor(side, dtype=subject.dtype, device=subject.device) for side in zip(*subject.box, strict=True)
    )
    where: dict[str, Any] = dict(
        seed=seed, step=4 * step + _STARTS, stream=Stream.COUPLING, device=subject.device, dtype=subject.dtype
    )
    z = low + (high - low) * noise.uniform((2 * pairs, *subject.shape), **where)
    return z[:pairs], z[pairs:]


class Found(NamedTuple):
    report: dict[str, Any]  #: what coupling.json has
    meetings: Meetings
    bound: Bound | None  #: None where pairs have not met


def examine(subject: Subject, *, pairs: int = 256, lag: int | None = None, budget: int = 2000, seed: int = 0) -> Found:
    """Meeting times, and the bound on the total variation if all pairs met within ``budget`` transitions.

    lag: by default the time within which nine tenths of 64 pairs of other randomness have met at lag 1. A longer one
    makes the bound tighter, and each pair dearer by as many transitions. Where a pair of those does not meet, no lag is
    found, and the report is of them. Raises ValueError naming an argument that cannot be.
    """
    checks.count("pairs", pairs, least=2)
    checks.count("budget", budget)
    pilot = None
    if lag is None:
        named: dict[str, Any] = dict(seed=seed, step=_PILOT_STEP)
        pilot = meetings(subject.sampler, subject.energy, *starts(subject, min(pairs, _PILOT), **named), lag=1,
                         budget=budget + 1, **named)  # fmt: skip
        if not pilot.all_met:
            return Found(_report(subject, pilot, None, pilot.gradients), pilot, None)
        lag = max(1, int(pilot.times.double().quantile(_SHARE).ceil()))
    found = meetings(subject.sampler, subject.energy, *starts(subject, pairs, seed=seed), lag=lag, budget=budget + lag,
                     seed=seed)  # fmt: skip
    bound = tv_bound(found) if found.all_met else None
    spent = found.gradients + (0 if pilot is None else pilot.gradients)
    return Found(_report(subject, found, bound, spent), found, bound)


def gradient(subject: Subject, found: Meetings, *, pairs: int, seed: int = 0) -> dict[str, Any]:
    """The unbiased estimate of E grad U in the parameters by so many new pairs (`theory.unbiased`): its l's, cost and
    variance, beside the variance of one state of the law. ``found``: when pairs meet. Raises ValueError for a subject
    without parameters, an odd number of pairs, and where a pair does not meet."""
    if subject.network is None:
        raise ValueError("gradient needs a run, whose energy has parameters")
    if pairs < 2 or pairs % 2:
        raise ValueError(f"gradient must be an even number of pairs, got {pairs}")
    first = max(1, int((found.times - found.lag).double().quantile(_SHARE)))
    at = sorted({first + round(i * 2 * first / (_TIMES - 1)) for i in range(_TIMES)})
    named: dict[str, Any] = dict(seed=seed, step=_GRADIENT_STEP)
    made = weighted(subject.sampler, subject.energy, *starts(subject, pairs, **named), at=at, lag=found.lag,
                    budget=found.budget + at[-1], **named)  # fmt: skip
    groups = next(g for g in (16, 8, 4, 2) if pairs % g == 0)
    whole, one = (likelihood_gradient(subject.network, None, w, groups=groups) for w in (made, single(made)))
    cost = made.gradients / pairs
    return {"pairs": pairs, "first": at[0], "last": at[-1], "times": len(at), "norm": float(whole.mean.norm()),
            "error": float(whole.error.norm()), "gradients_a_pair": cost, "variance_a_pair": whole.variance,
            "variance_of_a_draw": one.variance, "gradients_a_draw": cost * whole.variance / one.variance}  # fmt: skip


def _report(subject: Subject, found: Meetings, bound: Bound | None, gradients: int) -> dict[str, Any]:
    met = found.times[found.times >= 0] - found.lag
    quantiles = {f"{q:g}": float(met.double().quantile(q)) for q in (0.5, 0.9, 1.0)} if len(met) else {}
    settings = dataclasses.asdict(subject.sampler)
    return {
        "target": subject.name,
        "sampler": type(subject.sampler).__name__,
        "settings": {k: "inf" if v == math.inf else v for k, v in settings.items()},
        "box": subject.box,
        "pairs": len(found.times),
        "met": len(met),
        "lag": found.lag,
        "budget": found.budget - found.lag,
        "meeting_times": quantiles,
        "acceptance": found.acceptance,
        "gradients": gradients,
        "close": None if bound is None else {f"{level:g}": close_from(bound, level) for level in LEVELS},
        "steps": None if bound is None or subject.steps is None else at(bound, subject.steps),
        "bound": None if bound is None else [list(pair) for pair in zip(*(x.tolist() for x in bound), strict=True)],
    }


def close_from(bound: Bound, level: float) -> int:
    """The first t from which on the bound is at most ``level``."""
    above = (bound.value > level).nonzero()
    return int(above[-1]) + 1 if len(above) else 0


def at(bound: Bound, t: int) -> dict[str, float]:
    beyond = t >= len(bound.value)
    return {
        "t": t,
        "bound": 0.0 if beyond else float(bound.value[t]),
        "error": 0.0 if beyond else float(bound.error[t]),
    }


def sentences(report: dict[str, Any]) -> list[str]:
    """The report in words, a line each."""
    pairs, met, budget = report["pairs"], report["met"], report["budget"]
    lines = [f"{report['target']}, {report['sampler']}: {met} of {pairs} pairs met within {budget} transitions"]
    if report["meeting_times"]:
        half, most, last = (report["meeting_times"][q] for q in ("0.5", "0.9", "1"))
        lines[0] += f", half of these by {half:.0f}, nine tenths by {most:.0f}, the last at {last:.0f}"
    lines[0] += f"; acceptance {report['acceptance']:.3f}"
    if report["bound"] is None:
        lines.append(f"no bound: {pairs - met} pairs had not met when the budget ended, and theirs are the largest "
                     "terms. The chains may take longer, or never pass from one mode to another")  # fmt: skip
        return lines
    close = ", ".join(f"{level} from t = {t}" for level, t in report["close"].items())
    lines.append(f"total variation to the law, from uniform noise, lag {report['lag']}: at most {close}")
    if report["steps"] is not None:
        own = report["steps"]
        lines.append(f"after the {own['t']} transitions of an update: at most {own['bound']:.3g} +- {own['error']:.2g}"
                     + (", which says nothing" if own["bound"] >= 1 else ""))  # fmt: skip
    if "gradient" in report:
        own = report["gradient"]
        ratio = own["variance_a_pair"] / own["variance_of_a_draw"]
        lines.append(f"unbiased gradient, {own['pairs']} pairs: {own['gradients_a_pair']:.0f} gradients a pair, whose "
                     f"variance is {ratio:.2g} times that of an exact draw; "
                     f"{own['gradients_a_draw']:.0f} gradients for what an exact draw tells")  # fmt: skip
    return lines


def save_figure(path: Path, found: Found, title: str) -> None:
    """How many pairs have not met, and the bound with two standard errors, against t."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    times = found.meetings.times
    beyond = torch.where(times < 0, found.meetings.budget, times - found.meetings.lag)
    last = int(beyond.max())
    t = torch.arange(last + 1)
    axis.step(t, (beyond[None] > t[:, None]).double().mean(1), where="post", label="pairs that have not met")
    if found.bound is not None:
        value, error = found.bound
        axis.plot(value, label="bound on the total variation")
        axis.fill_between(range(len(value)), (value - 2 * error).clamp(min=0), value + 2 * error, alpha=0.3)
    axis.set(xlabel="transitions t", ylim=(0, 1.05), title=title)
    axis.legend(fontsize="small")
    plots.save_figure(path, figure)
