"""Where annealing starts: laws whose log Z is known, and energies that are confined to a box.

A base maps states (B, ...) to its energies (B,), with their constant, so that its Z is 1, and its scores (B, ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import checks, noise
from ..noise import Stream


class Uniform:
    """The uniform law on a box [low, high]^D, of states of the given shape; (B, *shape) -> energies, scores."""

    def __init__(self, shape: tuple[int, ...], box: tuple[float, float], device=None):
        low, high = checks.bounds("box", box)
        self.shape, self.box = tuple(shape), (low, high)
        self.constant = torch.full((), math.prod(shape) * math.log(high - low), dtype=torch.float64, device=device)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.constant.expand(len(z)), torch.zeros_like(z)

    def draw(self, count: int, *, seed: int, step: int) -> Tensor:
        (low, high), device = self.box, self.constant.device
        u = noise.uniform((count, *self.shape), seed=seed, step=step, stream=Stream.ANNEALING, device=device)
        return low + (high - low) * u


class Gaussian:
    """The Gaussian law of a mean (D,) and a covariance (D, D), of states of the given shape."""

    def __init__(self, shape: tuple[int, ...], mean: Tensor, covariance: Tensor):
        self.shape = tuple(shape)
        root = torch.linalg.cholesky(covariance.double())
        self.root, self.mean = root.float(), mean.float()
        self.inverse = torch.linalg.solve_triangular(root, torch.eye(len(root)).to(root), upper=False).float()
        self.constant = root.diagonal().log().sum() + 0.5 * len(root) * math.log(2 * math.pi)

    @classmethod
    def fitted(cls, data: Tensor, ridge: float = 1e-3, floor: float = 0.0) -> Gaussian:
        """With the mean and covariance of data (N, ...), and each variance larger by ``ridge`` of the mean variance and
        by ``floor``. An element that hardly varies needs one of them: it would hold the step size down."""
        rows = data.flatten(1).double()
        if len(rows) < 2:
            raise ValueError(f"data must have at least 2 rows for a covariance, got {len(rows)}")
        centred = rows - rows.mean(0)
        covariance = centred.T @ centred / (len(rows) - 1)
        extra = ridge * covariance.diagonal().mean().clamp(min=1e-12) + floor
        return cls(tuple(data.shape[1:]), rows.mean(0), covariance + extra * torch.eye(rows.shape[1]).to(covariance))

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        white = (z.flatten(1) - self.mean) @ self.inverse.T
        return 0.5 * white.square().sum(1) + self.constant, -(white @ self.inverse).view(z.shape)

    def draw(self, count: int, *, seed: int, step: int) -> Tensor:
        shape, device = (count, len(self.mean)), self.mean.device
        xi = noise.normal(shape, seed=seed, step=step, stream=Stream.ANNEALING, device=device)
        return (self.mean + xi @ self.root.T).view(count, *self.shape)


class Folded(nn.Module):
    """An energy of states in a box, for states anywhere: those outside are reflected into it, as often as it takes.

    Chains that no wall stops then have a law on the box: what is folded from the law of exact transitions is exp(-U)
    restricted to it. A proposal that leaves the box comes back as its mirror image, and is judged there.
    """

    def __init__(self, energy: Callable[[Tensor], Tensor], box: tuple[float, float]):
        super().__init__()
        self.energy, self.box = energy, checks.bounds("box", box)

    def forward(self, z: Tensor) -> Tensor:
        return self.energy(fold(z, self.box))


def fold(z: Tensor, box: tuple[float, float]) -> Tensor:
    """z reflected into the box (low, high), elementwise."""
    low, high = box
    return high - ((z - low).remainder(2 * (high - low)) - (high - low)).abs()
