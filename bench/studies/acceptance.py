"""Acceptance against step size on a trained image energy: `python -m bench.studies.acceptance RUN [--out FILE]`.

On a product Gaussian of dimension D the step size that keeps a Metropolis-adjusted sampler's acceptance falls as
D**(-1/3) with one gain a chain, as MALA's does, but as 1/D with one an element. Whether a network does so too is seen
by the same measurement on both: a run's energy, and the product Gaussian of the same shape. The numbers that compare
are step sizes over MALA's, which have no unit.

The law is exp(-U / sigma**2), sigma the run's noise_scale. Train the run without a clamp and with --confinement, so
that this has an integral. Adjusted samplers refuse a clamp, and a network trained with one has no law beyond the box:
its chains leave, and U falls without end. There a soft wall stands in for the clamp, x beyond the box by d costing
d**2 / (2 WALL**2); but then the wall, which is a product of normals, can be what limits the step size: compare MALA's
with WALL**2, and see how many elements are outside.

The run's chains are settled by MALA, adapted to 0.574. Each norm's threshold lets the same fraction clip of the scores
there, of that norm's magnitudes. Every step size starts anew from the settled chains and makes a few transitions, whose
acceptance probabilities are averaged. Writes the figure, and JSON of the same name beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastanila import MALA, AdjustedAniLA, data
from fastanila.evaluation import plots
from fastanila.files import write_text
from fastanila.samplers.sampler import Sampler
from fastanila.training import run as run_training

from .. import markdown

WALL = 0.02  #: standard deviation of the wall's normal, units of data; a training transition's noise has 0.01
TARGET = MALA.target_acceptance
FRACTIONS = (0.1, 0.5)  #: of scores that clip
NORMS = ("element", "channel", "chain")


class Curve(NamedTuple):
    on: str
    sampler: str
    fraction: float | None  #: of scores that clip; None of MALA
    threshold: float
    step_sizes: list[float]
    acceptance: list[float]
    at_target: float | None  #: the step size at TARGET; None where the curve does not cross it


def curves(
    on: str, energy: Callable[[Tensor], Tensor], z: Tensor, step_sizes: Sequence[float], transitions: int
) -> list[Curve]:
    """Of MALA, and of each norm and fraction, from the chains z (B, C, H, W)."""
    norms = [norm for norm in NORMS if norm != "channel" or z.shape[1] > 1]  # of one channel it is the element

    def curve(name: str, fraction: float | None, sampler: Sampler) -> Curve:
        found = [acceptance(sampler, energy, z, eps, transitions) for eps in step_sizes]
        print(f"{on}: {name} {fraction}: {[round(a, 3) for a in found]}", file=sys.stderr, flush=True)
        at = crossing(step_sizes, found)
        return Curve(on, name, fraction, float(sampler.threshold), list(step_sizes), found, at)

    return [curve("mala", None, MALA())] + [
        curve(norm, fraction, AdjustedAniLA(norm=norm).calibrate(energy, z, clip_fraction=fraction))
        for fraction in FRACTIONS
        for norm in norms
    ]


def acceptance(sampler: Sampler, energy, z: Tensor, step_size: float, transitions: int) -> float:
    """Mean probability over the chains and so many transitions from z."""
    seen: list[Tensor] = []
    numbers = tuple(step_size if name == "step_size" else getattr(sampler, name) for name in sampler.numbers)
    sampler.with_numbers(numbers).run(
        energy, z, steps=transitions, seed=3, compile=False, callback=lambda info: seen.append(info.acceptance.mean())
    )
    return torch.stack(seen).mean().item()


def crossing(step_sizes: Sequence[float], acceptances: Sequence[float], target: float = TARGET) -> float | None:
    """The largest step size at which the acceptance falls through the target, linear in the step size's logarithm."""
    pairs = list(zip(step_sizes, acceptances, strict=True))
    for (a, high), (b, low) in reversed(list(itertools.pairwise(pairs))):
        if high >= target > low:
            return math.exp(math.log(a) + (high - target) / (high - low) * math.log(b / a))
    return None


def around(step_size: float, per_decade: int) -> list[float]:
    """From 1e-4 to 10 times the step size."""
    count = 5 * per_decade
    return [step_size * 10 ** (-4 + i / per_decade) for i in range(count + 1)]


class Settled(NamedTuple):
    z: Tensor
    step_size: float  #: MALA's
    energy: tuple[float, float, float]  #: mean over the chains: at the start, half way, in the end


def settled(energy, z: Tensor, steps: int) -> Settled:
    """The chains after so many transitions of MALA, half of them while its step size adapts."""
    sampler, half = MALA().adapt(energy, z, steps=steps // 2, seed=1, compile=False)
    end = sampler.run(energy, half, steps=steps - steps // 2, seed=1, step=steps // 2, compile=False)
    with torch.no_grad():
        means = tuple(energy(x).mean().item() for x in (z, half, end))
    return Settled(end, sampler.step_size, means)


class Walled(nn.Module):
    """An energy over a temperature, with soft walls about a box."""

    def __init__(self, energy: nn.Module, temperature: float, box: tuple[float, float], wall: float = WALL):
        super().__init__()
        self.energy, self.temperature, self.box, self.wall = energy, temperature, box, wall

    def forward(self, x: Tensor) -> Tensor:
        beyond = (x - x.clamp(*self.box)) / self.wall
        return self.energy(x) / self.temperature + half_square(beyond)


def half_square(x: Tensor) -> Tensor:
    """The product Gaussian's energy."""
    return 0.5 * x.square().flatten(1).sum(1)


def measured(run: run_training.Run, chains: int, settling: int, transitions: int, per_decade: int) -> dict:
    """The curves on the run's energy and on the product Gaussian, and how the chains settled."""
    temperature = run.settings.noise_scale**2
    box = data.box_of(run.settings.data) if run.settings.clamp else (-math.inf, math.inf)
    energy = Walled(run.energy, temperature, box).eval()
    start = settled(energy, run.chains[:chains], settling)
    print(f"settled: {start.energy}, step size {start.step_size:.3g}", file=sys.stderr, flush=True)
    gaussian = torch.randn(start.z.shape, generator=torch.Generator().manual_seed(0))
    adapted = MALA().adapt(half_square, gaussian, steps=200, seed=1, compile=False).sampler
    found = curves("network", energy, start.z, around(start.step_size, per_decade), transitions)
    found += curves("Gaussian", half_square, gaussian, around(adapted.step_size, per_decade), transitions)
    return {
        "data": run.settings.data, "updates": run.iteration, "temperature": temperature,
        "shape": list(start.z.shape), "settling": settling, "transitions": transitions,
        "mean_energy": start.energy, "rms": start.z.square().mean().sqrt().item(),
        "wall": WALL if run.settings.clamp else None, "outside": (start.z.abs() > 1).float().mean().item(),
        "curves": [curve._asdict() for curve in found],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- what it shows


def report(found: dict) -> str:
    """The step sizes at TARGET, and over MALA's on the same energy."""
    mine = {(c["on"], c["sampler"], c["fraction"]): c["at_target"] for c in found["curves"]}

    def cells(on: str, sampler: str, fraction: float | None) -> list[str]:
        at, mala = mine[on, sampler, fraction], mine[on, "mala", None]
        return [f"{at:.3g}" if at else "-", f"{at / mala:.3g}" if at and mala else "-"]

    rows = [
        [name, f"{fraction:.0%}" if fraction else "-", *cells(on, name, fraction), *cells("Gaussian", name, fraction)]
        for on, name, fraction in mine
        if on == "network"
    ]
    chains, *shape = found["shape"]
    start, half, end = found["mean_energy"]
    about = (
        f"Step size at {TARGET:.1%} acceptance: {found['data']}, {found['updates']:,} updates, temperature "
        f"{found['temperature']:g}, D = {math.prod(shape):,}; {chains} chains x {found['transitions']} transitions "
        f"a point. Settled by {found['settling']} transitions of MALA: mean U / T {start:.1f}, half way "
        f"{half:.1f}, then {end:.1f}; {found['outside']:.1%} of the elements are outside [-1, 1], "
        + (f"where a wall of {found['wall']:g} holds them." if found["wall"] else "and there is no wall.")
    )
    columns = ["gain", "clipped", "network", "over MALA's", "product Gaussian", "over MALA's"]
    return f"{about}\n\n" + markdown.table(columns, "llrrrr", rows)


def save(path: Path, found: dict) -> None:
    """The figure, and the JSON beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    colors = dict(zip(("mala", *NORMS), ("black", "C3", "C1", "C0"), strict=True))
    titles = {"network": f"energy of {found['data']}", "Gaussian": "Gaussian"}
    panels = dict(zip(titles, figure.subplots(1, 2, sharey=True), strict=True))
    for c in found["curves"]:
        label = c["sampler"] + (f", {c['fraction']:.0%} clipped" if c["fraction"] else "")
        style = "--" if c["fraction"] == FRACTIONS[1] else "-"
        panels[c["on"]].plot(c["step_sizes"], c["acceptance"], style, color=colors[c["sampler"]], label=label)
    for on, axis in panels.items():
        axis.axhline(TARGET, color="grey", linewidth=0.5)
        axis.set(xscale="log", xlabel="step size", title=f"{titles[on]}, D = {math.prod(found['shape'][1:]):,}")
    panels["network"].set_ylabel("acceptance")
    panels["network"].legend(fontsize="small")
    plots.save_figure(path, figure)
    write_text(path.with_suffix(".json"), json.dumps(found, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a trained run on images")
    parser.add_argument("--out", type=Path, default=Path("docs/acceptance.png"))
    parser.add_argument("--chains", type=int, default=64)
    parser.add_argument("--settling", type=int, default=1000, help="transitions of MALA ahead of the measurement")
    parser.add_argument("--transitions", type=int, default=4, help="for each step size")
    parser.add_argument("--per-decade", type=int, default=4, help="step sizes")
    arguments = parser.parse_args(argv)
    run = run_training.load(arguments.run, "cpu")
    if run.chains.dim() != 4:
        parser.error(f"RUN must be one on images, got chains of shape {tuple(run.chains.shape)}")
    found = measured(run, arguments.chains, arguments.settling, arguments.transitions, arguments.per_decade)
    save(arguments.out, found)
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
