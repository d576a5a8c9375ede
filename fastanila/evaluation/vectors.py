"""How good a model and its chains are on vectors of which there are points only, and no density."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import distances, plots, quadrature

_ROWS = 2000  #: the most that are compared pairwise
_WIDEN, _RESOLUTION = 1.25, 400  #: of the square that a plane's model is normalised on, times the data's box
_PANELS, _POINTS = 6, 2048  #: of a picture
_BATCH = 65536


def evaluate(energy: Callable[[Tensor], Tensor], data, chains: Tensor) -> dict[str, float]:
    """A model of vectors against held-out ones, ``data.held_out`` (M, D).

    sw_chains: `distances.sliced_wasserstein` of the chains, in units of the data; mmd_chains: `distances.mmd`, squared
    and unbiased, of at most 2000 rows a side; each with its _floor, the same of as many training vectors, where there
    are as many. In two dimensions nll, the held-out points', and boundary_mass, as `plane.evaluate` has them. Raises
    ValueError where there are fewer than two vectors to compare.
    """
    held_out, train = data.held_out.to(chains.device), data.train.to(chains.device)
    for name, rows in (("held-out", held_out), ("training", train), ("chain", chains)):
        if len(rows) < 2:
            raise ValueError(f"evaluation needs at least 2 {name} vectors, and there is {len(rows)}")
    some = _spaced(train, len(chains))
    report = {}
    for name, x in (("_chains", chains), ("_chains_floor", some)):
        report[f"sw{name}"] = distances.sliced_wasserstein(x, held_out)
        report[f"mmd{name}"] = distances.mmd(_spaced(x, _ROWS), _spaced(held_out, _ROWS))
    if data.shape == (2,):
        log_q, cells = _law(energy, data, chains.device)
        border = log_q.exp().reshape(cells.n, cells.n) * cells.cell_area
        border[1:-1, 1:-1] = 0
        report |= {"nll": held_out_nll(energy, data, chains.device), "boundary_mass": border.sum().item()}
    return report


def held_out_nll(energy: Callable[[Tensor], Tensor], data, device) -> float:
    """The mean of U + log Z over held-out points (M, 2), in nats; Z by quadrature on the data's box, widened by a
    quarter. A model that puts mass outside is told by `evaluate`'s boundary_mass."""
    cells = quadrature.grid(quadrature.widened(data.box, _WIDEN), _RESOLUTION, device)
    with torch.no_grad():
        energies = torch.cat([energy(part).double() for part in data.held_out.to(device).split(_BATCH)])
    return energies.mean().item() + quadrature.log_normalizer(energy, cells)


def _law(energy, data, device) -> tuple[Tensor, quadrature.Grid]:
    cells = quadrature.grid(quadrature.widened(data.box, _WIDEN), _RESOLUTION, device)
    return quadrature.model_log_density(energy, cells), cells


def _spaced(rows: Tensor, most: int) -> Tensor:
    count = min(len(rows), most)
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]


def save_pairs(
    path: str | Path, data, chains: Tensor, title: str = "", proposals: Tensor | None = None
) -> None:  # fmt: skip
    """A PNG of chains (N, D) over held-out data: elements against one another, the first six pairs; of one element the
    two histograms."""
    from matplotlib.figure import Figure

    sets = [("data", data.held_out, "black"), ("proposals", proposals, "tab:blue"), ("chains", chains, "tab:red")]
    shown = [(n, x[:_POINTS].detach().float().cpu().numpy(), color) for n, x, color in sets if x is not None]
    pairs = list(itertools.islice(itertools.combinations(range(chains.shape[1]), 2), _PANELS)) or [(0, 0)]
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(4 * columns, 4 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (i, j) in zip(axes, pairs, strict=False):
        for name, x, color in shown:
            if i == j:
                axis.hist(x[:, 0], bins=60, range=data.box, density=True, histtype="step", color=color, label=name)
            else:
                axis.scatter(x[:, i], x[:, j], s=2, color=color, linewidths=0, label=name, alpha=0.6)
                axis.set(xlim=data.box, ylim=data.box, xlabel=f"element {i}", ylabel=f"element {j}")
    axes[0].legend(fontsize="small")
    for axis in itertools.islice(axes, len(pairs), None):
        axis.set_visible(False)
    if title:
        figure.suptitle(title)
    plots.save_figure(path, figure)
