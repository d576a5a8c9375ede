"""Runs side by side: the measure that ranks them, means and standard deviations over seeds, a table, a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor

from . import plots, quadrature

#: Which number of `evaluate` ranks runs, the first that all have, and its name; the smaller, the better.
MEASURES = {
    "gap": "NLL - entropy, nats",
    "mse_revised": "MSE in the region",
    "kid": "KID",
    "frechet": "Frechet distance",
}
#: Of the others those that a table shows.
SHOWN = (
    "tv", "tv_chains", "kid_sd", "frechet", "precision", "recall", "density", "coverage", "mse_vae", "psnr_revised",
    "clip_fraction", "gamma_mean", "acceptance", "seconds",
)  # fmt: skip


def measure_of(lines: Sequence[Mapping[str, Any]]) -> str:
    """The key of `MEASURES` by which these runs are ranked. Raises ValueError where no run reports one."""
    well = [line for line in lines if not line["diverged"]]
    for key in MEASURES:
        if well and all(key in line for line in well):
            return key
    raise ValueError(
        f"no run reports any of {', '.join(MEASURES)}: {len(lines)} runs, {len(lines) - len(well)} diverged"
    )


def score(line: Mapping[str, Any], measure: str) -> float:
    """What ranks a run; inf where it diverged, or where the number is not finite."""
    value = math.inf if line["diverged"] else line[measure]
    return value if value is not None and math.isfinite(value) else math.inf


def best(lines: Sequence[dict[str, Any]], measure: str) -> dict[str, Any] | None:
    """The first of the runs with the smallest number; None where all have failed."""
    ranked = min(lines, key=lambda line: score(line, measure))
    return ranked if score(ranked, measure) < math.inf else None


def summary(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By sampler and threshold: medians over the seeds that did not diverge, and of the first number each seed's."""
    rows = []
    for (sampler, threshold), several in itertools.groupby(lines, lambda line: (line["sampler"], line["threshold"])):
        group = list(several)
        well = [line for line in group if not line["diverged"]]
        first = measure_of(group) if well else "gap"
        wanted = (first, "tv", "tv_chains", "clip_fraction", "acceptance", "seconds")
        numbers = [k for k in wanted if well and k in well[0]]
        rows.append(
            {"sampler": sampler, "threshold": threshold, "diverged": len(group) - len(well), "seeds": len(group)}
            | {"each": [line[first] for line in well], "of": first}
            | {k: median(line[k] for line in well) for k in numbers}
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    names = list(dict.fromkeys(k for row in rows for k in row if isinstance(row[k], float) and k != "threshold"))
    lines = [
        f"| {' | '.join(['sampler', 'threshold', *names, 'by seed', 'diverged'])} |",
        "| --- " * (len(names) + 4) + "|",
    ]
    for row in rows:
        cells = [row["sampler"], "-" if row["threshold"] is None else f"{row['threshold']:g}"]
        cells += [f"{row[k]:.3f}" if k in row else "-" for k in names]
        cells += [", ".join(f"{x:.3f}" for x in row["each"]) or "-", f"{row['diverged']} of {row['seeds']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ forms, with a rival


def by_form(lines: Sequence[dict[str, Any]], rival: str) -> list[dict[str, Any]]:
    """A row for each form, of runs by several seeds, in the order in which they come.

    ``each`` is the measure of every seed whose run did not diverge, ``mean`` and ``sd`` are over them (sd: None for
    one), ``less`` is how much less it is than that of the form ``rival``, seed by seed, with ``less_sd``. ``wins``
    counts the seeds where it is less at all, of ``pairs``. The others are means. Raises ValueError where no run reports
    a measure.
    """
    measure = measure_of(lines)
    of_rival = {line["seed"]: score(line, measure) for line in lines if line["form"] == rival}
    rows = []
    for form in dict.fromkeys(line["form"] for line in lines):
        group = [line for line in lines if line["form"] == form]
        well = [line for line in group if score(line, measure) < math.inf]
        each = [score(line, measure) for line in well]
        less = [of_rival.get(line["seed"], math.inf) - score(line, measure) for line in well]
        less = [x for x in less if math.isfinite(x)] if form != rival else []
        rows.append(
            {"form": form, "of": measure, "seeds": len(group), "failed": len(group) - len(well), "each": each}
            | {"mean": fmean(each) if each else None, "sd": stdev(each) if len(each) > 1 else None}
            | {"less": fmean(less) if less else None, "less_sd": stdev(less) if len(less) > 1 else None}
            | {"wins": sum(x > 0 for x in less), "pairs": len(less)}
            | {k: fmean(line[k] for line in well) for k in SHOWN if k != measure and well and all(k in x for x in well)}
        )
    return rows


def form_table(rows: Sequence[dict[str, Any]], labels: Mapping[str, str], tuned: Mapping[str, str], rival: str) -> str:
    """The rows of `by_form` as Markdown. ``tuned``: of each form the numbers that it was given, in words."""
    shown = [k for k in SHOWN if any(k in row for row in rows)]
    head = ["sampler", "tuned", MEASURES[rows[0]["of"]], f"less than {labels[rival]}", *shown, "failed"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in rows:
        cells = [labels[row["form"]], tuned[row["form"]]]
        wins = f" ({row['wins']} of {row['pairs']})" if row["pairs"] else ""
        cells += [_spread(row["mean"], row["sd"]), _spread(row["less"], row["less_sd"]) + wins]
        cells += [f"{row[k]:.3g}" if k in row else "-" for k in shown] + [f"{row['failed']} of {row['seeds']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4g}" if sd is None else f"{mean:.4g} ± {sd:.2g}"


# ------------------------------------------------------------------------------------------------------------ pictures


def save_grids(path: str | Path, sets: Mapping[str, Tensor], box: tuple[float, float]) -> None:
    """Images by name, (N, C, H, W) in the box, each a grid of eight columns with its name above, four in a row."""
    from matplotlib.figure import Figure

    columns = min(4, len(sets))
    rows = -(-len(sets) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, images) in zip(axes, sets.items(), strict=False):
        axis.imshow(plots.image_grid(images, box), interpolation="nearest")
        axis.set_title(name, fontsize="small")
    for axis in axes:
        axis.set_axis_off()
    plots.save_figure(path, figure)


def save_planes(path: str | Path, density, models: Mapping[str, tuple[Callable[[Tensor], Tensor], Tensor]]) -> None:
    """The data, and by name each model's density with its chains (N, 2) under it, in the data's box, six in a row.

    All densities have one scale, which ends at the greatest of the data's density.
    ``models``: by name (energy, chains).
    """
    from matplotlib.figure import Figure

    low, high = density.box
    columns = min(6, len(models) + 1)
    rows = -(-(len(models) + 1) // columns)
    figure = Figure(figsize=(2.1 * columns, 4.4 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    pairs = [(axes[2 * row, column], axes[2 * row + 1, column]) for row in range(rows) for column in range(columns)]
    for axis in axes.flatten():
        axis.set(xlim=(low, high), ylim=(low, high), aspect="equal", xticks=[], yticks=[])
    points = density.draw(4096, seed=0, step=0, purpose="held-out", device="cpu")
    pairs[0][0].scatter(*points.T.numpy(), s=0.3, color="black", linewidths=0)
    pairs[0][0].set_title("data", fontsize="small")
    most = quadrature.data_log_density(density, quadrature.grid(density.box, 150, "cpu")).max().exp().item()
    for (top, bottom), (name, (energy, chains)) in zip(pairs[1:], models.items(), strict=False):
        cells = quadrature.grid(density.box, 150, chains.device)
        with torch.no_grad():
            learned = quadrature.model_log_density(energy, cells).exp().reshape(cells.n, cells.n).cpu()
        box = (low, high, low, high)
        top.imshow(learned.T.numpy(), origin="lower", extent=box, cmap="magma", vmin=0.0, vmax=most)
        top.set_title(name, fontsize="small")
        bottom.scatter(*chains.detach().float().cpu().T.numpy(), s=1, color="tab:red", linewidths=0)
    for axis in (pairs[0][1], *(axis for pair in pairs[len(models) + 1 :] for axis in pair)):
        axis.set_axis_off()
    plots.save_figure(path, figure)
