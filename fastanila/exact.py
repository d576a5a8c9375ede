"""Two dimensions by quadrature: normalising constants, likelihoods and distances, exact but for the grid.

Integrals are midpoint sums over the n * n cells of a square, in float64. For a density that is smooth over a few
cells and vanishes towards the border the error falls faster than any power of n; at a kink (a ReLU) or a jump (a
uniform's edge) it falls as 1 / n**2 or 1 / n. Everything outside the square counts as nothing. `evaluate` reports
how far its numbers move on coarser cells of a larger square, and the model's mass at its border. Log densities are in
nats, (n*n,) float64, and normalised on the grid.

A ``density`` is one of fastanila.data's: ``box`` = (low, high) of a square, ``log_density`` ((N, 2) -> (N,), or
None), ``entropy`` (float or None), ``modes`` (`Modes` or None) and ``draw(count, *, seed, step, purpose, offset,
device)`` -> (count, 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import distances, noise

_WIDEN, _WIDEN_MORE = 1.25, 1.5  # the squares that `evaluate` integrates over, times the data's box
_DRAW = 500_000  # rows drawn at a time
_FLOOR_DRAWS = 8  # sets of exact draws whose distance is the floor
_REFERENCE = 10_000  # exact draws to which sliced distances are taken
_PROJECTIONS = 32  # directions of a sliced distance, plenty in a plane
_MMD_ROWS = 1000  # the most that are compared pairwise


class Modes(NamedTuple):
    """Equally likely round modes, well apart."""

    centres: Tensor  #: (M, 2)
    sd: float  #: of each


class Grid(NamedTuple):
    """A square cut into n * n cells; ``points.view(n, n, 2)[i, j]`` is (x_i, y_j)."""

    points: Tensor  #: (n*n, 2) float64 cell centres
    cell_area: float
    n: int
    box: tuple[float, float]


def grid(box: tuple[float, float], resolution: int = 400, device=None) -> Grid:
    """The cells of the square [low, high]**2, ``resolution`` a side."""
    low, high = box
    if not low < high or resolution < 1:
        raise ValueError(f"box must be (low, high) with low < high and resolution at least 1, got {box}, {resolution}")
    side = (high - low) / resolution
    centres = low + side * (torch.arange(resolution, dtype=torch.float64, device=device) + 0.5)
    return Grid(torch.cartesian_prod(centres, centres), side**2, resolution, (float(low), float(high)))


def energy_on_grid(energy: Callable[[Tensor], Tensor], grid: Grid, batch: int = 65536) -> Tensor:
    """U at the cell centres, (n*n,) float64. ``energy`` sees (B, 2) float32 on the grid's device, B <= batch."""
    with torch.no_grad():
        return torch.cat([energy(points.float()).double() for points in grid.points.split(batch)])


def log_normalizer(energy: Callable[[Tensor], Tensor], grid: Grid) -> float:
    """log Z, the log of the integral of exp(-U) over the grid's square."""
    return (torch.logsumexp(-energy_on_grid(energy, grid), 0) + math.log(grid.cell_area)).item()


def model_log_density(energy: Callable[[Tensor], Tensor], grid: Grid) -> Tensor:
    """-U - log Z, (n*n,) float64."""
    return _normalised(-energy_on_grid(energy, grid), grid)


def data_log_density(density, grid: Grid, *, samples: int = 4_000_000, seed: int = 0) -> Tensor:
    """log p of the data, (n*n,) float64: the closed form where there is one, else estimated from held-out draws.

    The estimate shares each draw bilinearly among the four nearest cell centres, so an expectation under it is
    the draws' mean of the bilinear interpolant. With C occupied cells the estimate's noise is a total variation of
    at most sqrt(2 C / (pi samples)) / 3 (0.05 for all cells of 400 * 400) and takes up to 2 C / (9 samples) from its
    entropy (0.009 nats there); and it is blurred over a cell. Draws within half a cell of the border are left out.
    """
    if density.log_density is not None:
        return _normalised(density.log_density(grid.points).double(), grid)
    n, (low, high) = grid.n, grid.box
    mass = torch.zeros(n * n, dtype=torch.float64, device=grid.points.device)
    for draws in _held_out(density, samples, seed, grid.points.device):
        place = (draws - low) * (n / (high - low)) - 0.5  # in cells, from the first centre
        place = place[((place >= 0) & (place < n - 1)).all(1)]
        cell = place.floor()
        (right, up), (i, j) = (place - cell).unbind(1), cell.long().unbind(1)
        mass.index_add_(0, i * n + j, (1 - right) * (1 - up))
        mass.index_add_(0, i * n + j + 1, (1 - right) * up)
        mass.index_add_(0, (i + 1) * n + j, right * (1 - up))
        mass.index_add_(0, (i + 1) * n + j + 1, right * up)
    return _normalised(mass.log(), grid)


def entropy(log_p: Tensor, grid: Grid) -> float:
    """-E_p[log p]."""
    return cross_entropy(log_p, log_p, grid)


def cross_entropy(log_p: Tensor, log_q: Tensor, grid: Grid) -> float:
    """-E_p[log q], the NLL of q under p; cells without p contribute 0, and q = 0 under p gives inf."""
    return _expectation(log_p, -log_q, grid)


def kl(log_p: Tensor, log_q: Tensor, grid: Grid) -> float:
    """KL(p || q) = E_p[log p - log q]."""
    return _expectation(log_p, log_p - log_q, grid)


def total_variation(log_p: Tensor, log_q: Tensor, grid: Grid) -> float:
    """Half the integral of |p - q|, between 0 and 1."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum().item() * grid.cell_area


def held_out_nll(energy: Callable[[Tensor], Tensor], density, grid: Grid) -> float:
    """E_data[U] + log Z, the expectation as in `data_log_density`."""
    return cross_entropy(data_log_density(density, grid), model_log_density(energy, grid), grid)


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

    The density counts as constant over a grid cell, which a bin's edge may cut; error O(1 / n**2) where it is smooth.
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


def draw(log_p: Tensor, grid: Grid, count: int, *, seed: int, step: int) -> Tensor:
    """``count`` draws (count, 2), float32, of a density on the grid: its cells by the inverse of their distribution
    function, a uniform place within the cell; NaN where the density is not finite. A function of (seed, step).
    """
    mass = log_p.exp().cumsum(0)
    if not torch.isfinite(mass[-1]):
        return torch.full((count, 2), math.nan, dtype=torch.float32, device=log_p.device)
    # float64 of whole words: a float32 uniform near 1 has steps of 6e-8, a hundredth of a cell's mass
    stream = noise.Stream.EVALUATION
    words = noise.words(3 * count, seed=seed, step=step, stream=stream, device=log_p.device).view(count, 3)
    which, *place = ((words.double() + 0.5) / 2**32).unbind(1)
    cell = torch.searchsorted(mass, which * mass[-1])
    return (grid.points[cell] + (torch.stack(place, 1) - 0.5) * math.sqrt(grid.cell_area)).float()


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
    log_p, log_q = data_log_density(density, cells, seed=seed), _normalised(-u, cells)
    log_z = (torch.logsumexp(-u, 0) + math.log(cells.cell_area)).item()
    nll = cross_entropy(log_p, log_q, cells)
    least = entropy(log_p, cells) if density.entropy is None else float(density.entropy)
    kl_, tv = kl(log_p, log_q, cells), total_variation(log_p, log_q, cells)
    return log_p, log_q, log_z, {"nll": nll, "entropy": least, "gap": nll - least, "kl": kl_, "tv": tv}


def widened(box: tuple[float, float], factor: float) -> tuple[float, float]:
    """The box about the same centre, ``factor`` times as wide."""
    low, high = box
    margin = (factor - 1) * (high - low) / 2
    return low - margin, high + margin


def spaced(rows: Tensor, most: int) -> Tensor:
    """At most that many of the rows (N, ...), evenly spaced."""
    count = min(len(rows), most)
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]


def _normalised(log_p: Tensor, grid: Grid) -> Tensor:
    return log_p - torch.logsumexp(log_p, 0) - math.log(grid.cell_area)


def _expectation(log_p: Tensor, values: Tensor, grid: Grid) -> float:
    p = log_p.exp()
    # where p is 0 the values may be infinite or NaN and must not count; a p that is NaN must
    return torch.where(p == 0, 0.0, p * values).sum().item() * grid.cell_area


def _held_out(density, samples: int, seed: int, device):
    """Held-out draws, ``samples`` in all, (<= _DRAW, 2) float64 at a time."""
    for start in range(0, samples, _DRAW):
        count = min(_DRAW, samples - start)
        yield density.draw(count, seed=seed, step=0, purpose="held-out", offset=start, device=device).double()
