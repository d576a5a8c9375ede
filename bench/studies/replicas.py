"""Whether chains cross between modes, at equal gradients: `python -m bench.studies.replicas`.

A fixed mixture of 25 Gaussians, two apart and 0.15 wide, with shares from 1 to 5 in 75. All chains start in the middle
mode. The table has how many modes the chains end in, and the total variation between the modes' shares among them and
the right ones, beside that of as many exact draws.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor

from fastanila import MALA, ReplicaExchange, noise
from fastanila.models import GaussianMixture

from .. import markdown

_SD, _EXACT = 0.15, 100  #: sets of exact draws, whose mean distance is the measure


class Shares(NamedTuple):
    modes: int  #: in which a chain ends
    tv: float


def mixture() -> GaussianMixture:
    side = 2 * torch.arange(-2.0, 3.0)
    return GaussianMixture(torch.cartesian_prod(side, side), _SD, 1.0 + torch.arange(25) % 5)


def shares(energy: GaussianMixture, z: Tensor) -> Shares:
    counts = torch.cdist(z, energy.means).argmin(1).bincount(minlength=len(energy.means))
    tv = 0.5 * (counts / len(z) - energy.log_weights.exp()).abs().sum().item()
    return Shares(int((counts > 0).sum()), tv)


def start(energy: GaussianMixture, chains: int, seed: int) -> Tensor:
    xi = noise.normal((chains, 2), seed=seed, step=0, stream=noise.Stream.EVALUATION_NORMALS)
    return energy.means[len(energy.means) // 2] + _SD * xi


def by_replicas(
    energy: GaussianMixture, z: Tensor, seed: int, *, replicas: int, highest: float, warm_up: int, steps: int
) -> tuple[Shares, ReplicaExchange]:
    exchange = ReplicaExchange.of(MALA(step_size=0.02), replicas=replicas, highest=highest)
    exchange, rows = exchange.adapt(energy, exchange.start(z), steps=warm_up, seed=seed)
    rows = exchange.run(energy, rows, steps=steps, seed=seed, step=warm_up)
    return shares(energy, exchange.cold(rows)), exchange


def by_one(energy: GaussianMixture, z: Tensor, seed: int, *, warm_up: int, steps: int) -> Shares:
    sampler, z = MALA(step_size=0.02).adapt(energy, z, steps=warm_up, seed=seed)
    return shares(energy, sampler.run(energy, z, steps=steps, seed=seed, step=warm_up))


def row(name: str, gradients: int, found: Sequence[Shares]) -> list[str]:
    tvs = [x.tv for x in found]
    spread = f" ± {stdev(tvs):.3f}" if len(tvs) > 1 else ""
    modes = sorted({x.modes for x in found})
    return [name, f"{gradients:,}", " to ".join(str(m) for m in dict.fromkeys((modes[0], modes[-1]))),
            f"{mean(tvs):.3f}{spread}"]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=800)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--highest", type=float, default=60.0)
    parser.add_argument("--warm-up", type=int, default=100)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 200, 400], help="after the warm-up")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    a = parser.parse_args(argv)
    energy = mixture()
    starts = {seed: start(energy, a.chains, seed) for seed in a.seeds}
    exact = [shares(energy, energy.sample(a.chains, seed=seed)) for seed in range(_EXACT)]
    rows = [row("exact draws", 0, exact)]
    for steps in a.steps:
        made = [
            by_replicas(energy, z, seed, replicas=a.replicas, highest=a.highest, warm_up=a.warm_up, steps=steps)
            for seed, z in starts.items()
        ]
        gradients = a.replicas * (a.warm_up + steps)
        rows.append(row(f"{a.replicas} replicas, {steps} transitions", gradients, [found for found, _ in made]))
        print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    ladder, exchange = made[-1][1].temperatures, made[-1][1]
    print(f"temperatures {', '.join(f'{t:.3g}' for t in ladder)}", file=sys.stderr)
    print(f"scales {', '.join(f'{s:.3g}' for s in exchange.scales)}", file=sys.stderr)
    steps = a.replicas * (a.warm_up + a.steps[-1]) - a.warm_up
    stayed = [by_one(energy, z, seed, warm_up=a.warm_up, steps=steps) for seed, z in starts.items()]
    rows.append(row("MALA alone", a.replicas * (a.warm_up + a.steps[-1]), stayed))
    about = (
        f"{a.chains:,} chains of a mixture of 25 modes with shares of 1 to 5 in 75, all started in one; "
        f"{len(a.seeds)} seeds, mean and standard deviation, of exact draws {_EXACT}. The gradients are those of a "
        f"chain with all its replicas, {a.warm_up} transitions of warm-up included."
    )
    print(f"{about}\n\n{markdown.table(['', 'gradients', 'modes', 'TV of the shares'], 'lrrr', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
