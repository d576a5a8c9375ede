"""Effective samples per gradient, beside the error of their law: `python -m bench.studies.efficiency [--write]`.

An effective sample size is of the chain's own law. An unadjusted sampler's law is not the target's, so its number means
little without the error next to it. How each is measured is in `ABOUT`, which stands above the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import scipy.stats
import torch
from torch import Tensor

from fastanila import HMC, MALA, AdjustedAniLA, AniLA, Langevin, Preconditioned, TamedLangevin, data
from fastanila.evaluation import diagnostics, quadrature
from fastanila.models.score import sampling
from fastanila.samplers.calibration import calibrate
from fastanila.samplers.sampler import Sampler
from fastanila.theory import study, targets
from fastanila.training import loop
from fastanila.training.run import Run, load
from fastanila.training.settings import Settings

from .. import markdown

CLIPPED = 0.1  #: fraction of exact draws' scores beyond the threshold
STABILITIES = (0.1, 0.01)  #: of `calibrate`, for the unadjusted samplers
LONGEST = 50  #: leapfrog steps
KINDS = ("unadjusted", "exact", "metric")
ADAPTING = 150  #: transitions in which an exact sampler adapts
_DIM, _FUNNEL_DIM, _FUNNEL_SD = 50, 10, 3.0
_REFERENCE = 100_000  #: exact draws that the chains are compared with
_COMPARED = 20_000  #: states, about, evenly spaced in time, that are compared with them

ABOUT = (
    "{chains} chains start at exact draws and make transitions of {gradients:,} gradients each, of which the first "
    "fifth is left out (hmc counts its leapfrog steps; the one gradient at an adjusted chain's start is not counted)."
    " ESS: rank-normalised bulk effective sample size of all chains together (arviz), the least over the coordinates "
    "and the energy, per 1,000 gradients of one chain; near {floor:.2g} it counts the independent starts only. "
    "Variance: the largest relative error of a coordinate's variance. KS: the largest Kolmogorov-Smirnov distance of "
    "a coordinate or the energy from 100,000 exact draws. What the exact samplers show there is chance. Thresholds "
    "let a tenth of the scores of exact draws clip; tamed's is 1. Step sizes: exact samplers by adapt to an "
    "acceptance of 0.574 (hmc 0.8, with leapfrog steps that cover pi / 2 times the widest coordinate's spread, up to "
    "50); the others by calibrate at stability 0.1 and 0.01, which is in brackets. A coordinate that needs more "
    "transitions than these to forget its start shows part of its bias only. A metric is what adapt(metric=True) of "
    "mala learns in {adapting} transitions; step sizes and thresholds are then those of z over its scale."
)


@dataclasses.dataclass(frozen=True)
class Target:
    name: str
    energy: Callable[[Tensor], Tensor]
    draws: Tensor  #: (N, D) exact
    variance: Tensor  #: (D,) exact, or of the draws; NaN where it is not compared


@dataclasses.dataclass(frozen=True)
class Result:
    target: str
    sampler: str
    step_size: float
    threshold: float
    acceptance: float
    ess: float  #: per 1,000 gradients
    variance: float  #: the largest relative error
    ks: float


# --------------------------------------------------------------------------------------------------------- targets


def gaussian(condition: float, dim: int = _DIM) -> Target:
    """Independent normals whose variances go from 1 / condition to 1, evenly in their logarithms."""
    variance = torch.logspace(-math.log10(condition), 0, dim)
    name = f"Gaussian, {dim}-D, condition {condition:g}"
    return Target(name, lambda x: 0.5 * (x.square() / variance).sum(1), variance.sqrt() * _normals(dim), variance)


def funnel(dim: int = _FUNNEL_DIM) -> Target:
    """Neal's (2003): v ~ N(0, 9), the others N(0, exp v). Their variance is a moment of rare events: not compared."""

    def energy(x: Tensor) -> Tensor:
        v, others = x[:, 0], x[:, 1:]
        return 0.5 * (v / _FUNNEL_SD).square() + 0.5 * (others.square().sum(1) * (-v).exp() + (dim - 1) * v)

    v, others = _normals(dim).split((1, dim - 1), 1)
    draws = torch.cat((_FUNNEL_SD * v, (_FUNNEL_SD * v / 2).exp() * others), 1)
    variance = torch.full((dim,), math.nan)
    variance[0] = _FUNNEL_SD**2
    return Target(f"funnel, {dim}-D", energy, draws, variance)


def eight_gaussians() -> Target:
    density = data.load("8gaussians")
    draws = density.draw(_REFERENCE, seed=0, step=0, purpose="held-out")
    return Target("8 gaussians", targets.density("8gaussians").energy, draws, draws.var(0))


def learned(run: Run) -> Target:
    """The energy of a run in the plane, drawn from on a grid."""
    found = study.learned(run)
    cells = quadrature.grid(found.box[0])
    draws = quadrature.draw(quadrature.model_log_density(run.energy, cells), cells, _REFERENCE, seed=0, step=0)
    name = f"learned energy, {run.settings.data}, {run.iteration:,} updates"
    return Target(name, run.energy, draws, draws.var(0))


def trained(folder: str, iterations: int = 400) -> Run:
    settings = Settings(data="rings", iterations=iterations, sample_every=0, device="cpu", out=f"{folder}/run")
    return loop.train(settings, say=lambda text: None)


def _normals(dim: int) -> Tensor:
    return torch.randn(_REFERENCE, dim, generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------------------------- samplers


def samplers(
    target: Target, chains: int, adapting: int, *, kinds: Sequence[str] = KINDS
) -> Iterator[tuple[str, Sampler]]:
    """Each sampler of these kinds by name, its numbers chosen as ABOUT says."""
    start, how = target.draws[:chains], dict(steps=adapting, seed=1, compile=False)
    if "unadjusted" in kinds:
        yield from unadjusted(target)
    if "exact" in kinds:
        yield from adjusted(target, start, how)
    if "metric" in kinds:
        yield from with_metric(target, start, how)


def unadjusted(target: Target) -> Iterator[tuple[str, Sampler]]:
    calibrating = target.draws[:4096]
    for stability in STABILITIES:
        for name, sampler in (
            ("langevin", Langevin()),
            ("tamed", TamedLangevin()),
            ("anila, element", AniLA()),
            ("anila, chain", AniLA(norm="chain")),
        ):
            chosen = sampler.calibrate(target.energy, calibrating, clip_fraction=CLIPPED, stability=stability)
            if name == "tamed":  # its b without unit is kept as the step shrinks, which lets its bias vanish
                chosen = dataclasses.replace(chosen, threshold=TamedLangevin().threshold)
            yield f"{name} ({stability:g})", chosen


def adjusted(target: Target, start: Tensor, how: dict) -> Iterator[tuple[str, Sampler]]:
    calibrating = target.draws[:4096]
    step_size = calibrate(target.energy, calibrating).step_size
    yield "mala", MALA(step_size=step_size).adapt(target.energy, start, **how).sampler
    for norm in ("element", "chain"):
        chosen = AdjustedAniLA(norm=norm).calibrate(target.energy, calibrating, clip_fraction=CLIPPED)
        yield f"anila-mh, {norm}", chosen.adapt(target.energy, start, **how).sampler
    yield "hmc", hmc(target, HMC(step_size=step_size), start, how)


def with_metric(target: Target, start: Tensor, how: dict) -> Iterator[tuple[str, Sampler]]:
    calibrating = target.draws[:4096]
    mala = MALA().calibrate(target.energy, calibrating).adapt(target.energy, start, metric=True, **how).sampler
    yield "mala, metric", mala
    for norm in ("element", "chain"):
        chosen = Preconditioned(AdjustedAniLA(norm=norm), mala.scale)
        chosen = chosen.calibrate(target.energy, calibrating, clip_fraction=CLIPPED)
        yield f"anila-mh, {norm}, metric", chosen.adapt(target.energy, start, **how).sampler
    yield "hmc, metric", hmc(target, Preconditioned(HMC(step_size=mala.step_size), mala.scale), start, how)


def hmc(target: Target, sampler: HMC | Preconditioned, start: Tensor, how: dict) -> HMC | Preconditioned:
    """Adapted twice: the number of leapfrog steps follows from their length, and that from their number."""
    low, high = torch.quantile(target.draws, torch.tensor([0.25, 0.75]), 0)
    spread = (high - low) / 1.349  # a standard deviation, if normal
    if isinstance(sampler, Preconditioned):
        spread = spread / sampler.scale
    sampler = sampler.adapt(target.energy, start, **how).sampler
    count = round(math.pi / 2 * spread.max().item() / math.sqrt(sampler.step_size))
    changed = dict(leapfrog_steps=min(max(count, 1), LONGEST))
    if isinstance(sampler, Preconditioned):
        sampler = dataclasses.replace(sampler, sampler=dataclasses.replace(sampler.sampler, **changed))
    else:
        sampler = dataclasses.replace(sampler, **changed)
    return sampler.adapt(target.energy, start, **how).sampler


# --------------------------------------------------------------------------------------------------------- results


def result(target: Target, name: str, sampler: Sampler, chains: int, gradients: int) -> Result:
    # not compiled: some forty transitions would be, each for a second's run
    transitions = max(gradients // sampler.gradients, 5)
    accepted: list[Tensor] = []
    states = sampler.run(
        target.energy, target.draws[:chains], steps=transitions, seed=2, keep_every=1, compile=False,
        callback=lambda info: accepted.append(info.acceptance.mean()),
    )[transitions // 5 :]  # fmt: skip
    values = with_energy(target.energy, states)
    ess = diagnostics.ess_bulk(values).min().item()
    moving = sampler.sampler if isinstance(sampler, Preconditioned) else sampler
    return Result(
        target=target.name,
        sampler=name if not isinstance(moving, HMC) else f"{name}, {moving.leapfrog_steps} leapfrog steps",
        step_size=float(sampler.step_size),
        threshold=float(getattr(sampler, "threshold", math.inf)),
        acceptance=torch.stack(accepted).mean().item() if sampler.is_exact else math.nan,
        ess=1000 * ess / (values.shape[0] * values.shape[1] * sampler.gradients),
        variance=variance_error(states.flatten(0, 1), target.variance),
        ks=ks(
            values[:: max(1, values[..., 0].numel() // _COMPARED)].flatten(0, 1),
            with_energy(target.energy, target.draws[None])[0],
        ),
    )


def with_energy(energy: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """states (draws, chains, D), the energy put to them: (draws, chains, D + 1) float64."""
    with torch.no_grad(), sampling(energy):
        u = energy(states.flatten(0, 1)).view(states.shape[:2])
    return torch.cat((states, u[..., None]), 2).double()


def variance_error(rows: Tensor, variance: Tensor) -> float:
    """The largest relative error of the columns of rows (N, D), of those whose variance is not NaN."""
    errors = (rows.double().var(0) / variance - 1).abs()
    return errors[~variance.isnan()].max().item()


def ks(rows: Tensor, reference: Tensor) -> float:
    """The largest two-sample distance sup |F - G| of a column; NaN where a row is not finite."""
    if not rows.isfinite().all():
        return math.nan
    columns = zip(rows.T.numpy(), reference.T.numpy(), strict=True)
    return max(scipy.stats.ks_2samp(a, b, method="asymp").statistic for a, b in columns)


def cells(r: Result) -> list[str]:
    def number(x: float, form: str) -> str:
        return format(x, form) if math.isfinite(x) else "-"

    found = [f"{r.ess:.3g}", f"{r.variance:.1%}", f"{r.ks:.3f}"] if math.isfinite(r.ess) else ["diverged", "-", "-"]
    settings = [f"{r.step_size:.3g}", number(r.threshold, ".3g"), number(r.acceptance, ".2f")]
    return [r.target, r.sampler, *settings, *found]


def report(results: Sequence[Result], chains: int, gradients: int) -> str:
    about = ABOUT.format(chains=chains, gradients=gradients, floor=1000 / (0.8 * gradients), adapting=ADAPTING)
    columns = ["step size", "threshold", "acceptance", "ESS / 1,000 gradients", "variance", "KS"]
    return f"{about}\n\n" + markdown.table(["target", "sampler", *columns], "ll" + "r" * 6, map(cells, results))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a trained run in two dimensions; default: a short one is trained")
    parser.add_argument("--target", default="", help="only targets whose name has this in it")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of samplers")
    parser.add_argument("--chains", type=int, default=128)
    parser.add_argument("--gradients", type=int, default=2000, help="of each chain")
    parser.add_argument("--write", action="store_true", help="put the table into bench/RESULTS.md")
    arguments = parser.parse_args(argv)
    if arguments.write and (arguments.target or set(arguments.kinds) != set(KINDS)):
        parser.error("--write is for the whole table, without --target and --kinds")
    diagnostics.arviz()  # or fail now, and not after the training
    chosen = [t for t in (gaussian(1.0), gaussian(100.0), funnel(), eight_gaussians()) if arguments.target in t.name]
    if arguments.target in "learned energy":
        with tempfile.TemporaryDirectory() as folder:
            chosen.append(learned(load(arguments.run, "cpu") if arguments.run else trained(folder)))
    if not chosen:
        parser.error(f"--target: no target has {arguments.target!r} in its name")
    results = []
    for target in chosen:
        began = time.monotonic()
        for name, sampler in samplers(target, arguments.chains, ADAPTING, kinds=arguments.kinds):
            results.append(result(target, name, sampler, arguments.chains, arguments.gradients))
            print(*cells(results[-1]), sep=", ", file=sys.stderr, flush=True)
        print(f"{target.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    text = report(results, arguments.chains, arguments.gradients)
    print(text)
    if arguments.write:
        markdown.write(text, "efficiency")
    return 0


if __name__ == "__main__":
    sys.exit(main())
