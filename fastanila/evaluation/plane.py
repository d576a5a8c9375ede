"""How good a model and its chains are in two dimensions, against exact integrals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.densities import Modes
from . import distances
from .quadrature import (
    Grid,
    cross_entropy,
    data_log_density,
    draw,
    energy_on_grid,
    entropy,
    grid,
    kl,
    model_log_density,
    normalised,
    total_variation,
    widened,
)

_WIDEN, _WIDEN_MORE = 1.25, 1.5  # the squares that `evaluate` integrates over, times the data's box

_FLOOR_DRAWS = 8  # sets of exact draws whose distance is the floor

_REFERENCE = 10_000  # exact draws to which sliced distances are taken

_PROJECTIONS = 32  # directions of a sliced distance, plenty in a plane

_MMD_ROWS = 1000  # the most that are compared pairwise


def histogram(samples: Tensor, box: tuple[float, float], bins: int) -> Tensor:
    """The fractions of ``samples`` (N, 2) in each cell of the closed box, (bins, bins) float64.

    Samples outside, and NaNs, count in N, so the fractions then sum to less than 1.
    """
    if samples.dim() != 2 or samples.shape[1] != 2 or not len(samples):
        raise ValueError(f"samples must be (N, 2) with N > 0, got {tuple(samples.shape)}")
    low, high = box
    inside = samples[((samples >= low) & (samples <= high)).all(1)].double()
    i, j = ((inside - low) * (bins / (high - low))).long().clamp(0, bins - 1).unbind(1)
    return torch.bincount(i * bins + j, minlength=bins**2).reshape(bins, bins).double() / len(samples)


def histogram_tv(a: Tensor, b: Tensor) -> float:
    """Total variation of two histograms, with what each lost outside the box as one more cell."""
    return 0.5 * ((a - b).abs().sum() + (a.sum() - b.sum()).abs()).item()


def bin_masses(log_p: Tensor, grid: Grid, box: tuple[float, float], bins: int) -> Tensor:
    """The masses of ``bins`` * ``bins`` cells of a box under a density on the grid, (bins, bins) float64.

    The density counts as constant over a grid cell, which a bin's edge may cut; error O(1 / n^2) where it is smooth.
    """
    edges = torch.linspace(*grid.box, grid.n + 1, dtype=torch.float64, device=log_p.device)
    cuts = torch.linspace(*box, bins + 1, dtype=torch.float64, device=log_p.device)[:, None]
    overlap = torch.minimum(cuts[1:], edges[1:]) - torch.maximum(cuts[:-1], edges[:-1])  # (bins, n)
    share = overlap.clamp(min=0) / math.sqrt(grid.cell_area)
    return share @ (log_p.exp().view(grid.n, grid.n) * grid.cell_area) @ share.T


def law_tv(
    energy: Callable[[Tensor], Tensor], density, states: Tensor, *, resolution: int = 200, bins: int = 24
) -> float:
    """The total variation between states' histogram (N, 2) and the model's own law exp(-U) / Z, by ``bins`` * ``bins``
    cells of the density's box and one for what is outside."""
    cells = grid(widened(density.box, _WIDEN), resolution, states.device)
    truth = bin_masses(model_log_density(energy, cells), cells, density.box, bins)
    return histogram_tv(histogram(states, density.box, bins), truth)


def modes_covered(points: Tensor, masses: Tensor, modes: Modes) -> int:
    """How many modes have at least a quarter of their due, an equal share, within four standard deviations of their
    centre; of points (N, 2) with masses (N,) that sum to 1."""
    near = torch.cdist(points.double(), modes.centres.to(points.device).double()) <= 4 * modes.sd
    return int((masses.double() @ near.double() >= 0.25 / len(modes.centres)).sum())


class Distance(NamedTuple):
    value: float  #: of the chains
    floor: float  #: the same for as many exact draws in place of the chains: what chance alone gives


def chain_distances(
    chains: Tensor, log_p: Tensor, grid: Grid, draws: Callable[[int], Tensor], *, box: tuple[float, float], bins: int
) -> dict[str, Distance]:
    """How far chains (N, 2), N >= 2, are from a law, given on the grid and by ``draws``: count -> (count, 2) of it.

    tv: the total variation between the chains' histogram, ``bins`` * ``bins`` cells of the box and one for what is
    outside, and the law's masses. sw: `distances.sliced_wasserstein` to 10,000 draws of the law, in the plane's unit.
    mmd: `distances.mmd` of at most 1000 evenly spaced chains to as many draws, which is squared and unbiased: about 0.
    Each floor is the mean of the same number over 8 sets of N exact draws (mmd: the root mean square, the mean being
    0): where value and floor agree, the chains are as good as independent draws, as far as N of them can tell.
    """
    count = len(chains)
    *exact, reference = draws(_FLOOR_DRAWS * count + _REFERENCE).split([count] * _FLOOR_DRAWS + [_REFERENCE])
    truth = bin_masses(log_p, grid, box, bins)
    few = spaced(reference, _MMD_ROWS)
    sets = (chains, *exact)
    tv, *tv_floors = (histogram_tv(histogram(x, box, bins), truth) for x in sets)
    sw, *sw_floors = (distances.sliced_wasserstein(x, reference, _PROJECTIONS) for x in sets)
    mmd, *mmd_floors = (distances.mmd(spaced(x, _MMD_ROWS), few) for x in sets)
    return {
        "tv": Distance(tv, sum(tv_floors) / _FLOOR_DRAWS),
        "sw": Distance(sw, sum(sw_floors) / _FLOOR_DRAWS),
        "mmd": Distance(mmd, math.hypot(*mmd_floors) / math.sqrt(_FLOOR_DRAWS)),
    }


def evaluate(
    energy: Callable[[Tensor], Tensor],
    density,
    chains: Tensor | None = None,
    *,
    resolution: int = 400,
    bins: int = 24,
    seed: int = 0,
    device=None,
) -> dict[str, float]:
    """A model against the data it was trained on; all numbers are floats, in nats or total variation.

    nll (the data's, under the model), entropy (the data's, the least nll there is), gap = nll - entropy, kl (the gap
    by one quadrature), tv, boundary_mass, quadrature_error.

    With ``chains`` (N, 2), N >= 2, also `chain_distances`: tv_chains, sw_chains, mmd_chains to the data, and
    tv_chains_model, sw_chains_model, mmd_chains_model to the model, exp(-U) / Z, each with its _floor. The second
    three show what the sampler did, whatever the model is; the first three what both did.

    Of a density with ``modes``, also modes, how many it has, and `modes_covered` of the model and of the chains.

    The model is normalised on the data's box widened by a quarter. What it puts outside is not counted; the mass in
    the outermost ring of cells, boundary_mass, shows whether there can be any. quadrature_error is the most that log Z,
    nll, entropy, kl and tv move (log Z and nll, where the data's density has to be estimated) with cells twice as
    wide, on the box widened by a half: larger than the error of a sum that converges. ``device`` is the energy's, by
    default the chains'.
    """
    if device is None and chains is not None:
        device = chains.device
    cells = grid(widened(density.box, _WIDEN), resolution, device)
    coarse = grid(widened(density.box, _WIDEN_MORE), math.ceil(resolution * _WIDEN_MORE / _WIDEN / 2), device)
    log_p, log_q, log_z, report = _by_quadrature(energy, density, cells, seed)
    _, _, coarse_log_z, other = _by_quadrature(energy, density, coarse, seed)
    compared = ("nll",) if density.log_density is None else ("nll", "entropy", "kl", "tv")
    # log Z too, because nll is it plus E[U], and the errors of the two can cancel
    moves = [log_z - coarse_log_z, *(report[key] - other[key] for key in compared)]
    moved = torch.tensor(moves, dtype=torch.float64, device="cpu")
    border = log_q.exp().reshape(cells.n, cells.n) * cells.cell_area
    border[1:-1, 1:-1] = 0
    # a tensor's maximum, because Python's forgets a NaN
    report |= {"boundary_mass": border.sum().item(), "quadrature_error": moved.abs().max().item()}
    if density.modes is not None:
        masses = log_q.exp() * cells.cell_area
        report |= {"modes": len(density.modes.centres)}
        report |= {"modes_covered_model": modes_covered(cells.points, masses, density.modes)}
    if chains is None:
        return report
    if density.modes is not None:
        even = torch.full((len(chains),), 1 / len(chains), dtype=torch.float64, device=chains.device)
        report |= {"modes_covered_chains": modes_covered(chains, even, density.modes)}

    def data_draws(count: int) -> Tensor:
        return density.draw(count, seed=seed, step=1, purpose="held-out", device=device)

    def model_draws(count: int) -> Tensor:
        return draw(log_q, cells, count, seed=seed, step=2)

    for of, log_density, draws in (("", log_p, data_draws), ("_model", log_q, model_draws)):
        for name, found in chain_distances(chains, log_density, cells, draws, box=density.box, bins=bins).items():
            report |= {f"{name}_chains{of}": found.value, f"{name}_chains{of}_floor": found.floor}
    return report


def _by_quadrature(energy, density, cells: Grid, seed: int) -> tuple[Tensor, Tensor, float, dict[str, float]]:
    """log p of the data, log q of the model, the model's log Z, and what the two say of each other."""
    u = energy_on_grid(energy, cells)
    log_p, log_q = data_log_density(density, cells, seed=seed), normalised(-u, cells)
    log_z = (torch.logsumexp(-u, 0) + math.log(cells.cell_area)).item()
    nll = cross_entropy(log_p, log_q, cells)
    least = entropy(log_p, cells) if density.entropy is None else float(density.entropy)
    kl_, tv = kl(log_p, log_q, cells), total_variation(log_p, log_q, cells)
    return log_p, log_q, log_z, {"nll": nll, "entropy": least, "gap": nll - least, "kl": kl_, "tv": tv}


def spaced(rows: Tensor, most: int) -> Tensor:
    """At most that many of the rows (N, ...), evenly spaced."""
    count = min(len(rows), most)
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]
