"""Two dimensions by quadrature: normalising constants, likelihoods and distances, exact but for the grid.

Integrals are midpoint sums over the n * n cells of a square, in float64. For a density that is smooth over a few
cells and vanishes towards the border the error falls faster than any power of n; at a kink (a ReLU) or a jump (a
uniform's edge) it falls as 1 / n^2 or 1 / n. Everything outside the square counts as nothing. `evaluate` reports
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

from .. import noise

_DRAW = 500_000  # rows drawn at a time


class Grid(NamedTuple):
    """A square cut into n * n cells; ``points.view(n, n, 2)[i, j]`` is (x_i, y_j)."""

    points: Tensor  #: (n*n, 2) float64 cell centres
    cell_area: float
    n: int
    box: tuple[float, float]


def grid(box: tuple[float, float], resolution: int = 400, device=None) -> Grid:
    """The cells of the square [low, high]^2, ``resolution`` a side."""
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
    return normalised(-energy_on_grid(energy, grid), grid)


def data_log_density(density, grid: Grid, *, samples: int = 4_000_000, seed: int = 0) -> Tensor:
    """log p of the data, (n*n,) float64: the closed form where there is one, else estimated from held-out draws.

    The estimate shares each draw bilinearly among the four nearest cell centres, so an expectation under it is
    the draws' mean of the bilinear interpolant. With C occupied cells the estimate's noise is a total variation of
    at most sqrt(2 C / (pi samples)) / 3 (0.05 for all cells of 400 * 400) and takes up to 2 C / (9 samples) from its
    entropy (0.009 nats there); and it is blurred over a cell. Draws within half a cell of the border are left out.
    """
    if density.log_density is not None:
        return normalised(density.log_density(grid.points).double(), grid)
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
    return normalised(mass.log(), grid)


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


def widened(box: tuple[float, float], factor: float) -> tuple[float, float]:
    """The box about the same centre, ``factor`` times as wide."""
    low, high = box
    margin = (factor - 1) * (high - low) / 2
    return low - margin, high + margin


def normalised(log_p: Tensor, grid: Grid) -> Tensor:
    """A log density, (n*n,), less the logarithm of its integral over the grid's square."""
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
