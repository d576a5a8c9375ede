"""Targets with exact draws and known distribution functions, for tests of what samplers leave invariant."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch

FALSE_ALARM = 1e-6  #: the rate of each statistical test, whose seeds are fixed


class Target(NamedTuple):
    energy: Callable  #: U, of torch tensors (B, d) -> (B,)
    draw: Callable  #: a numpy generator and a count -> (count, d) float64 exact draws, by the inverse cdf
    marks: Callable  #: (B, d) float64 -> (B, m): numbers whose law is ``cdf`` where the draws are exact
    cdf: Callable  #: the distribution function of each mark

    def start(self, count: int, seed: int = 0) -> torch.Tensor:
        return torch.from_numpy(self.draw(np.random.default_rng(seed), count)).float()

    def p_value(self, z: torch.Tensor) -> float:
        """Of the chains z (B, d) being exact draws: the least of the marks' Kolmogorov-Smirnov, by Bonferroni."""
        marks = self.marks(z.double().numpy())
        return marks.shape[1] * min(scipy.stats.kstest(column, self.cdf).pvalue for column in marks.T)


def _normals(rng, count, dim):
    return scipy.stats.norm.ppf(rng.random((count, dim)))


def _straightened(z):
    """Of the banana: two independent standard normals, and what they are along a diagonal."""
    a, b = z[:, 0], z[:, 1] - 0.5 * (z[:, 0] ** 2 - 1)
    return np.stack([a, b, (a + b) / np.sqrt(2), (a - b) / np.sqrt(2)], 1)


def _bent(rng, count):
    a, b = _normals(rng, count, 2).T
    return np.stack([a, b + 0.5 * (a**2 - 1)], 1)


NORMAL = Target(
    lambda x: 0.5 * x.square().sum(1), lambda rng, count: _normals(rng, count, 1), lambda z: z, scipy.stats.norm.cdf
)
#: density exp(y - exp(y)), the law of log E for E standard exponential: no symmetry that could hide a wrong sign
SKEWED = Target(
    lambda x: (x.exp() - x).sum(1),
    lambda rng, count: np.log(-np.log1p(-rng.random((count, 1)))),
    lambda z: z,
    lambda y: -np.expm1(-np.exp(y)),
)
#: x ~ N(0, 1), y | x ~ N((x**2 - 1) / 2, 1): neither separable nor symmetric
BANANA = Target(
    lambda x: 0.5 * (x[:, 0].square() + (x[:, 1] - 0.5 * (x[:, 0].square() - 1)).square()),
    _bent,
    _straightened,
    scipy.stats.norm.cdf,
)
