"""Pictures, written atomically: sample grids for images; data, chains and learned density for two dimensions; how
chains mix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..data.images import to_pixels
from . import quadrature


def image_grid(images: Tensor, box: tuple[float, float], columns: int = 8, scale: int = 2) -> np.ndarray:
    """(N, C, H, W) in the box -> (height, width, 3) uint8, row by row with a line between, each pixel scale x scale."""
    pixels = to_pixels(images.detach().cpu(), box)
    pixels = pixels.expand(-1, 3, -1, -1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = torch.full((3, rows * (height + 2) + 2, columns * (width + 2) + 2), 255, dtype=torch.uint8, device="cpu")
    for i, image in enumerate(pixels):
        top, left = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        sheet[:, top : top + height, left : left + width] = image
    return sheet.permute(1, 2, 0).numpy()


def save_images(path: str | Path, images: Tensor, box: tuple[float, float], columns: int = 8) -> None:
    """A PNG grid of images (N, C, H, W), enlarged so that small ones can be seen."""
    from PIL import Image

    picture = Image.fromarray(image_grid(images, box, columns, scale=max(1, 96 // images.shape[-1])))
    files.write_by(path, lambda file: picture.save(file, format="png"))


def save_under(path: str | Path, sets: Sequence[Tensor], box: tuple[float, float], columns: int = 16) -> None:
    """A PNG grid of equally many images each, (N, C, H, W): a row of the first, under it the same of the second, ...;
    a last row that they do not fill is filled up in white."""
    columns = min(columns, len(sets[0]))
    left = -len(sets[0]) % columns
    full = [torch.cat((images, images.new_full((left, *images.shape[1:]), box[1]))) for images in sets]
    rows = zip(*(images.split(columns) for images in full), strict=True)
    save_images(path, torch.cat([row for group in rows for row in group]), box, columns)


def save_plane(
    path: str | Path, energy: Callable[[Tensor], Tensor], density, chains: Tensor, title: str = "",
    *, proposals: Tensor | None = None, names: tuple[str, str] | None = None,
) -> None:  # fmt: skip
    """Data, where the chains started if ``proposals`` says so, chains and learned density, in the data's box.

    ``names``: what proposals and chains are called."""
    from matplotlib.figure import Figure

    low, high = density.box
    cells = quadrature.grid(density.box, 200, chains.device)
    learned = quadrature.model_log_density(energy, cells).exp().reshape(cells.n, cells.n).cpu()
    points = density.draw(4096, seed=0, step=0, purpose="held-out", device="cpu")
    above, below = names or ("proposals", f"{len(chains)} chains")
    panels = [("data", points, "black"), (above, proposals, "tab:blue"), (below, chains, "tab:red")]
    panels = [panel for panel in panels if panel[1] is not None]
    figure = Figure(figsize=(4 * len(panels) + 4, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels) + 1)
    for axis, (name, states, color) in zip(axes, panels, strict=False):
        axis.scatter(*states.detach().float().cpu().T.numpy(), s=1 if name == "data" else 2, color=color, linewidths=0)
        axis.set_title(name)
    axes[-1].imshow(learned.T.numpy(), origin="lower", extent=(low, high, low, high), cmap="magma")
    axes[-1].set_title("learned density")
    for axis in axes:
        axis.set(xlim=(low, high), ylim=(low, high), aspect="equal", xticks=[], yticks=[])
    if title:
        figure.suptitle(title)
    save_figure(path, figure)


def save_chains(path: str | Path, rho: Tensor, states: Tensor, names: Sequence[str], title: str = "") -> None:
    """The autocorrelation ``rho`` (lags, S), and the traces of the first of the summaries (draws, chains, S): of eight
    chains, and the mean and the middle nine tenths of all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for curve, name in zip(rho.T.numpy(), names, strict=True):
        left.plot(curve, label=name, linewidth=1)
    left.axhline(0, color="black", linewidth=0.5)
    left.set(xlabel="lag (transitions)", ylabel="autocorrelation", title="all chains")
    left.legend(fontsize="small")
    first = states[..., 0]
    draws = range(1, len(first) + 1)
    low, high = np.quantile(first.numpy(), [0.05, 0.95], axis=1)
    right.fill_between(draws, low, high, color="black", alpha=0.1, linewidth=0)
    right.plot(draws, first[:, :8].numpy(), linewidth=0.5)
    right.plot(draws, first.mean(1).numpy(), color="black", linewidth=1.5)
    right.set(xlabel="transitions", title=f"{names[0]}: 8 chains; mean and 5 % to 95 % of {first.shape[1]}")
    if title:
        figure.suptitle(title)
    save_figure(path, figure)


def save_comparison(path: str | Path, rows: Sequence[dict], label: str) -> None:
    """Each sampler's number in `comparison.summary` against the threshold: a point a seed, a line through the medians.

    ``label``: what the number is. The axis is logarithmic unless a number is not positive, as KID near the data's own.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, sampler in enumerate(dict.fromkeys(row["sampler"] for row in rows)):
        own = [row for row in rows if row["sampler"] == sampler and row["each"]]
        color = f"C{number}"
        levels = [row["threshold"] for row in own]
        for row in own:
            if row["threshold"] is None:
                name = f"{sampler} (no threshold)"
                axis.axhline(row[row["of"]], color=color, linewidth=1, linestyle="--", label=name)
            else:
                axis.scatter([row["threshold"]] * len(row["each"]), row["each"], color=color, s=10)
        if own and levels[0] is not None:
            axis.plot(levels, [row[row["of"]] for row in own], color=color, linewidth=1, label=sampler)
            axis.set_xscale("log")
            axis.set_xticks(levels, [f"{level:g}" for level in levels], minor=False)
            axis.minorticks_off()
    positive = all(number > 0 for row in rows for number in row["each"])
    axis.set(xlabel="threshold", ylabel=label, yscale="log" if positive else "linear")
    axis.legend(fontsize="small")
    save_figure(path, figure)


def save_figure(path: str | Path, figure) -> None:
    """A PNG of a matplotlib figure."""
    files.write_by(path, lambda file: figure.savefig(file, format="png", dpi=110))
