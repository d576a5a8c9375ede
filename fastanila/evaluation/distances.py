"""Distances between sets of images, or of any vectors: one row each, reshaped to a line, in float64.

Sets of different sizes are comparable only where the distance has no bias in the size. `frechet` and
`sliced_wasserstein` have one (more rows look closer), so report them beside the same number for as many exact draws.
A set that holds a NaN or an infinity is at distance NaN from everything.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import noise

_BATCH = 4096  # rows in float64 at a time
_MMD_ROWS = 2000  # the most that evaluate_images compares pairwise


class Features(NamedTuple):
    """Coordinates along the k leading principal axes, with the variances of the k summing to one over the data."""

    mean: Tensor  #: (D,)
    components: Tensor  #: (D, k), orthonormal, by falling variance
    scale: Tensor  #: (), the root of the variance that the k components hold


def pca(data: Tensor, components: int = 32) -> Features:
    """The principal axes of ``data`` (N, ...), in float64 on its device: O(D^2) memory, O(N D^2 + D^3) time.

    At most min(D, N - 1) components, of which the data has no more; the sign of each is arbitrary.
    """
    rows = data.flatten(1)
    mean = torch.stack([part.double().sum(0) for part in rows.split(_BATCH)]).sum(0) / len(rows)
    scatter = sum(centred.T @ centred for centred in (part.double() - mean for part in rows.split(_BATCH)))
    if not 0 < scatter.trace() < math.inf:
        raise ValueError("data must vary and be finite to have principal axes")
    variances, axes = torch.linalg.eigh(scatter / (len(rows) - 1))
    k = min(components, rows.shape[1], len(rows) - 1)
    return Features(mean, axes[:, -k:].flip(1), variances[-k:].sum().sqrt())


def project(features: Features, x: Tensor) -> Tensor:
    """(N, ...) to (N, k) float64, on the features' device."""
    rows = x.flatten(1).to(features.mean.device)
    axes = features.components / features.scale
    return torch.cat([(part.double() - features.mean) @ axes for part in rows.split(_BATCH)])


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of (N, k) and (M, k), N, M >= 2.

    Heusel et al., "GANs trained by a two time-scale update rule", NeurIPS 2017. The root's trace is the sum of the
    singular values of R_a R_b' with C = R' R, which needs no root of a matrix and keeps full precision where the
    covariances are singular; R is the triangle of the centred rows' QR.
    """
    if not _finite(a, b):
        return math.nan
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    traces = root_a.square().sum() + root_b.square().sum() - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()
    return ((mean_a - mean_b).square().sum() + traces).clamp(min=0).item()


def gaussian_pixels(data: Tensor, count: int, *, seed: int) -> Tensor:
    """``count`` draws of the Gaussian with each pixel's own mean and variance and no correlation: the baseline.

    Of the data's shape and device, and its dtype where that is floating (float32 where not).
    """
    rows = data.double() if data.dtype == torch.float64 else data.float()
    shape = (count, *data.shape[1:])
    xi = noise.normal(shape, seed=seed, step=0, stream=noise.Stream.BASELINE, device=data.device, dtype=rows.dtype)
    draws = rows.mean(0) + rows.std(0) * xi
    return draws.to(data.dtype) if data.is_floating_point() else draws


def mmd(a: Tensor, b: Tensor) -> float:
    """The squared maximum mean discrepancy of (N, k) and (M, k), N, M >= 2, unbiased: for equal laws its mean is 0.

    The kernel is exp(-|x - y|^2 / (2 m^2)) with m the median distance within the pooled rows (Gretton et al., JMLR
    2012). O((N + M)^2) memory: for a few thousand rows. NaN for a set of one row, which has no such estimate.
    """
    if not _finite(a, b):
        return math.nan
    n, m = len(a), len(b)
    pooled = torch.cat([a, b]).double()
    distances = torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist")
    median = torch.pdist(pooled).median().clamp(min=1e-100)  # most rows alike: the kernel tells equal from unequal
    kernel = torch.exp(-0.5 * (distances / median).square())
    within_a = (kernel[:n, :n].sum() - n) / (n * (n - 1))
    within_b = (kernel[n:, n:].sum() - m) / (m * (m - 1))
    return (within_a + within_b - 2 * kernel[:n, n:].mean()).item()


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 128, seed: int = 0) -> float:
    """The root mean square, over random directions, of the 2-Wasserstein distance of (N, k) and (M, k) projected."""
    if not _finite(a, b):
        return math.nan
    shape = (projections, a.shape[1])
    directions = noise.normal(shape, seed=seed, step=0, stream=noise.Stream.BASELINE, device=a.device).double()
    directions = directions / directions.norm(dim=1, keepdim=True)
    lines_a, lines_b = ((directions @ x.double().T).sort(1).values for x in (a, b))
    # Both quantile functions are constant between multiples of 1/n and 1/m; in units of 1/(n m) those are integers.
    n, m = len(a), len(b)
    steps = torch.arange(1, n + 1, device=a.device) * m, torch.arange(1, m + 1, device=a.device) * n
    ends = torch.cat(steps).unique()
    widths = ends.diff(prepend=ends.new_zeros(1))
    starts = ends - widths
    squares = (lines_a[:, starts // m] - lines_b[:, starts // n]).square().mean(0)
    return (squares @ widths.double() / (n * m)).sqrt().item()


def evaluate_images(
    chains: Tensor, held_out: Tensor, train: Tensor, start: Tensor, *, components: int = 32, seed: int = 0
) -> dict[str, float]:
    """How far images are from held-out ones, each (N, ...) with N >= 2, in the same range.

    In principal components of the training images, ``components`` of them (or as many as the data has), in units of
    the variance they hold: a set that is the training mean alone, or held-out images moved by one standard
    deviation, is at about 1. Squared distances to ``held_out``:

    frechet of the chains; frechet_start of where the chains began; frechet_gaussian of as many draws of
    `gaussian_pixels`, which a model of images must beat; frechet_train of as many training images, evenly spaced,
    the floor at this count; mmd of the chains, and mmd_start (at most 2000 rows a side).
    """
    for name, images in (("chains", chains), ("held_out", held_out), ("train", train), ("start", start)):
        if len(images) < 2:
            raise ValueError(f"{name} must be at least 2 images, which have a covariance, got {len(images)}")
    features = pca(train, components)
    count = len(chains)
    spaced = torch.arange(min(count, len(train)), device=train.device) * len(train) // min(count, len(train))
    truth, sampled, started = (project(features, x) for x in (held_out, chains, start))
    return {
        "frechet": frechet(sampled, truth),
        "frechet_start": frechet(started, truth),
        "frechet_gaussian": frechet(project(features, gaussian_pixels(train, count, seed=seed)), truth),
        "frechet_train": frechet(project(features, train[spaced]), truth),
        "mmd": mmd(sampled[:_MMD_ROWS], truth[:_MMD_ROWS]),
        "mmd_start": mmd(started[:_MMD_ROWS], truth[:_MMD_ROWS]),
        "components": features.components.shape[1],
    }


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and R with R' R the unbiased covariance."""
    if len(x) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, got {len(x)}")
    rows = x.double()
    mean = rows.mean(0)
    return mean, torch.linalg.qr(rows - mean, mode="r").R / math.sqrt(len(x) - 1)


def _finite(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isfinite(a).all() and torch.isfinite(b).all())


def errors(truth: Tensor, missing: Tensor, completions: Tensor, box: tuple[float, float]) -> tuple[float, float]:
    """(mean squared error, PSNR in dB) in the regions, of completions (N, M, C, H, W): means over all of them.

    PSNR is 10 log10((high - low)^2 / mse) of each completion's own error, averaged; the box's width is the peak.
    """
    inside = missing[:, None].expand_as(completions)
    squares = torch.where(inside, (completions - truth[:, None]).double().square(), 0.0)
    each = squares.flatten(2).sum(2) / inside.flatten(2).sum(2)
    psnr = 10 * (math.log10((box[1] - box[0]) ** 2) - each.clamp(min=1e-12).log10())
    return each.mean().item(), psnr.mean().item()
