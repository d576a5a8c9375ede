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

_BLOCK = 512  # rows of a set whose pairs with another's are in memory at a time


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


class Kid(NamedTuple):
    """A kernel distance, times 1000."""

    mean: float
    sd: float  #: between the subsets, of which each has its own estimate


def kid(a: Tensor, b: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> Kid:
    """1000 times the squared MMD of (N, k) and (M, k), N, M >= 2, by the kernel (x'y / k + 1)^3.

    The mean and standard deviation over ``subsets`` random subsets of ``size`` rows of each set, or of half the smaller
    set where that is less, drawn without replacement by ``seed``. Each estimate is unbiased: equal laws have mean 0,
    at every N and M. Binkowski, Sutherland, Arbel and Gretton, "Demystifying MMD GANs", ICLR 2018, whose features are
    Inception's. NaN for a set of one row.
    """
    if not _finite(a, b) or min(len(a), len(b)) < 2:
        return Kid(math.nan, math.nan)
    a, b = a.double(), b.double()
    rows = max(2, min(size, len(a) // 2, len(b) // 2))
    in_a, in_b = (_subsets(len(x), rows, subsets, seed=seed, step=step, like=x) for step, x in enumerate((a, b)))
    within = sum(_sums(x, x, chosen, chosen) - chosen @ _cubic_diagonal(x) for x, chosen in ((a, in_a), (b, in_b)))
    estimates = 1000 * (within / (rows * (rows - 1)) - 2 * _sums(a, b, in_a, in_b) / rows**2)
    return Kid(estimates.mean().item(), estimates.std().item() if subsets > 1 else math.nan)


def _subsets(count: int, rows: int, subsets: int, *, seed: int, step: int, like: Tensor) -> Tensor:
    """(subsets, count) of 0 and 1, ``rows`` of them 1 in each."""
    shape, stream = (subsets, count), noise.Stream.SUBSETS
    chosen = noise.uniform(shape, seed=seed, step=step, stream=stream, device=like.device).argsort(1)[:, :rows]
    return like.new_zeros(shape).scatter_(1, chosen, 1.0)


def _sums(a: Tensor, b: Tensor, in_a: Tensor, in_b: Tensor) -> Tensor:
    """(subsets,): the kernel summed over the pairs of each subset, from one pass over all pairs of rows."""
    parts = zip(a.split(_BLOCK), in_a.split(_BLOCK, 1), strict=True)
    return sum(((chosen @ (part @ b.T / a.shape[1] + 1) ** 3) * in_b).sum(1) for part, chosen in parts)


def _cubic_diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


class Neighbours(NamedTuple):
    """Shares, of samples or of true rows; density is a mean count, in units of k, and can exceed 1."""

    precision: float  #: samples that lie in a ball of the truth
    recall: float  #: true rows that lie in a ball of the samples
    density: float  #: how many balls of the truth a sample lies in
    coverage: float  #: true rows in whose ball a sample lies


def neighbours(samples: Tensor, truth: Tensor, *, k: int = 3, k_density: int = 5) -> Neighbours:
    """How far (N, d) samples and (M, d) true rows lie in each other's balls: about each row, out to its k-th neighbour
    in its own set.

    precision and recall with ``k``: Kynkaanniemi et al., "Improved precision and recall metric for assessing generative
    models", NeurIPS 2019. density and coverage with ``k_density``: Naeem et al., "Reliable fidelity and diversity
    metrics for generative models", ICML 2020. Balls hold their boundary. recall and coverage grow with N, so compare
    sets of one size. NaN where a set has no such neighbour.
    """
    if not _finite(samples, truth) or len(samples) <= k or len(truth) <= max(k, k_density):
        return Neighbours(*[math.nan] * 4)
    samples, truth = samples.double(), truth.double()
    gaps, of_samples, of_truth = torch.cdist(samples, truth), _radii(samples, k), _radii(truth, k)
    wide = _radii(truth, k_density)
    return Neighbours(
        precision=_share((gaps <= of_truth).any(1)),
        recall=_share((gaps <= of_samples[:, None]).any(0)),
        density=_share((gaps <= wide).sum(1)) / k_density,
        coverage=_share((gaps <= wide).any(0)),
    )


class Nearest(NamedTuple):
    """Of each row, the nearest of a pool."""

    which: Tensor  #: (N,) int64, its index
    distance: Tensor  #: (N,) float64, Euclidean
    ratio: Tensor  #: (N,) float64, the distance over the mean distance of the k nearest: near 0 for a copy


def nearest(rows: Tensor, pool: Tensor, *, k: int = 50) -> Nearest:
    """The nearest of ``pool`` (M, d) to each of ``rows`` (N, d): searched in float32, its distance in float64.

    The ratio tells copies from rows that are close to everything, as a smooth image is: Carlini et al., "Extracting
    training data from diffusion models", USENIX Security 2023 (section 5.1). Over fewer than ``k`` where M is less.
    """
    rows, pool = rows.float(), pool.float()
    squares, k = pool.square().sum(1), min(k, len(pool))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in rows.split(_BLOCK):
        gaps = torch.addmm(squares, part, pool.T, alpha=-2) + part.square().sum(1, keepdim=True)
        close = gaps.topk(k, dim=1, largest=False)
        index = close.indices[:, 0]
        distance = (part.double() - pool[index].double()).norm(dim=1)
        others = close.values[:, 1:].double().clamp(min=0).sqrt().sum(1)
        mean = ((others + distance) / k).clamp(min=1e-100)  # all of them copies: 0 over 0 is a copy too
        found.append((index, distance, distance / mean))
    return Nearest(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _radii(x: Tensor, k: int) -> Tensor:
    """(N,): how far the k-th neighbour of each row is among the others."""
    return torch.cdist(x, x).fill_diagonal_(math.inf).kthvalue(k, dim=1).values


def _share(values: Tensor) -> float:
    return values.double().mean().item()


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
