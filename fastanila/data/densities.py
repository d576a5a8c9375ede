"""Densities on the plane: draws of them, and their values where these are known.

Their shapes are those of FFJORD's toy data (Grathwohl et al., 2019, lib/toy_data.py) unless a comment says otherwise.
Nothing here looks a table up, so a draw can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import noise
from ..noise import Stream


class Modes(NamedTuple):
    """Equally likely round modes, well apart."""

    centres: Tensor  #: (M, 2)
    sd: float  #: of each


#: what a draw, also of images, is for -> the streams of its uniforms (or indices) and of its normals
STREAMS = {
    "train": (Stream.DATA, Stream.DATA_NORMALS),
    "start": (Stream.START_DATA, Stream.START_DATA_NORMALS),
    "held-out": (Stream.EVALUATION, Stream.EVALUATION_NORMALS),
}


@dataclass(frozen=True)
class Density:
    """A probability density on the plane: draws of it, and its value where that is known."""

    name: str
    box: tuple[float, float]  #: the square [low, high]^2 outside which less than 1e-8 of the mass lies
    #: Turns uniforms (N, 3) on (0, 1] and standard normals (N, 2) into points (N, 2): the first uniform chooses the
    #: part of the density, the others the place in it, and the normals blur it.
    points: Callable[[Tensor, Tensor], Tensor]
    #: The natural logarithm of the normalised density, (N, 2) -> (N,) of the same dtype; None where it is not known.
    log_density: Callable[[Tensor], Tensor] | None = None
    is_smooth: bool = True  #: whether the logarithm, where it is known, has a gradient everywhere: the score
    entropy: float | None = None  #: in nats, where it has a closed form
    modes: Modes | None = None  #: where they are well apart
    fingerprint = None  #: of `Images`; a density needs none, since its draws follow from its name

    @property
    def shape(self) -> tuple[int]:
        return (2,)

    def draw(
        self, count: int, *, seed: int | Tensor, step: int | Tensor, purpose="train", offset: int = 0, device=None
    ) -> Tensor:
        """Points (count, 2), float32, on ``device``."""
        which, blur = STREAMS[purpose]
        uniforms = noise.uniform((count, 3), seed=seed, step=step, stream=which, offset=offset, device=device)
        normals = noise.normal((count, 2), seed=seed, step=step, stream=blur, offset=offset, device=device)
        return self.points(uniforms, normals)


def _pick(uniform: Tensor, parts: int) -> Tensor:
    """Which of ``parts`` equally likely parts: integers below ``parts``, as floats. A uniform may be 1."""
    return (uniform * parts).floor().clamp(max=parts - 1)


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)


def _log_mixture(x: Tensor, centres: Tensor, weights: Tensor, sd: float) -> Tensor:
    """log sum_m weights_m N(x; centres_m, sd^2 I) for x (N, 2), centres (M, 2) and weights (M,)."""
    logs = []
    for part in x.split(1 << 12):  # bounds the memory that N * M terms take
        squares = (part[:, :1] - centres[:, 0]).square() + (part[:, 1:] - centres[:, 1]).square()
        logs.append(torch.logsumexp(weights.log() - squares / (2 * sd**2), dim=1))
    return torch.cat(logs) - math.log(2 * math.pi * sd**2)


def _gaussians(name: str, centre: Callable[[Tensor], Tensor], parts: int, sd: float) -> Density:
    """Equally likely Gaussians about ``centre`` of 0 to parts - 1, (M,) -> (M, 2)."""

    def points(u: Tensor, n: Tensor) -> Tensor:
        return centre(_pick(u[:, 0], parts)) + sd * n

    def log_density(x: Tensor) -> Tensor:
        part = torch.arange(parts, dtype=x.dtype, device=x.device)
        return _log_mixture(x, centre(part), torch.full_like(part, 1 / parts), sd)

    centres = centre(torch.arange(parts, dtype=torch.float32, device="cpu"))
    return Density(name, (-5.0, 5.0), points, log_density, modes=Modes(centres, sd))


def _circle(part: Tensor) -> Tensor:
    return _polar(4 / math.sqrt(2), part * (math.pi / 4))


def _grid(part: Tensor) -> Tensor:
    row = torch.floor((part + 0.5) / 5)  # half a part off the edge, lest a rounded quotient fall short of it
    return 2 * torch.stack([row - 2, part - 5 * row - 2], dim=-1)


def _around_curve(name: str, curve: Callable[[Tensor, Tensor], Tensor], parts: int, sd: float) -> Density:
    """Points of ``curve``, (part (M,), u (M,)) -> (M, 2), at an equally likely part and a uniform u, plus N(0, sd^2 I).

    A Gaussian is so smooth that 320 nodes of Gauss and Legendre's rule for the integral over u are exact to 1e-10.
    """

    def points(u: Tensor, n: Tensor) -> Tensor:
        return curve(_pick(u[:, 0], parts), u[:, 1]) + sd * n

    def log_density(x: Tensor) -> Tensor:
        u, weights = (torch.as_tensor(values, dtype=x.dtype, device=x.device) for values in _unit_rule(320 // parts))
        centres = torch.cat([curve(torch.full_like(u, part), u) for part in range(parts)])
        return _log_mixture(x, centres, weights.repeat(parts) / parts, sd)

    return Density(name, (-4.5, 4.5), points, log_density)


@cache
def _unit_rule(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss and Legendre's rule on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2


def _moons(part: Tensor, u: Tensor) -> Tensor:
    # scikit-learn's moons, times 2 and moved by (-1, -0.2): each is the other, turned about (0, 0.3)
    sign, angle = 1 - 2 * part, math.pi * u
    return torch.stack([sign * (2 * torch.cos(angle) - 1), sign * (2 * torch.sin(angle) - 0.5) + 0.3], dim=-1)


def _roll(part: Tensor, u: Tensor) -> Tensor:
    angle = 1.5 * math.pi * (1 + 2 * u)  # scikit-learn's Swiss roll, over 5
    return _polar(angle / 5, angle)


# Four rings (ebm-anatomy's and STANLEY's toy): an equally likely radius of 1 to 4, blurred, at a uniform angle.
_RINGS, _RING_SD = 4, 0.15


def _ring_points(u: Tensor, n: Tensor) -> Tensor:
    return _polar(1 + _pick(u[:, 0], _RINGS) + _RING_SD * n[:, 0], 2 * math.pi * u[:, 1])


def _ring_log_density(x: Tensor) -> Tensor:
    # The density has a pole at the origin, near which there is no mass: hold it at its value at radius 0.001. (A
    # blurred radius below zero, one draw in 1e11, is left out too.)
    radius = torch.linalg.vector_norm(x, dim=1).clamp(min=1e-3)
    rings = torch.arange(1, _RINGS + 1, dtype=x.dtype, device=x.device)
    exponents = -0.5 * ((radius[:, None] - rings) / _RING_SD).square()
    scale = _RINGS * _RING_SD * math.sqrt(2 * math.pi)
    return torch.logsumexp(exponents, dim=1) - math.log(scale) - torch.log(2 * math.pi * radius)


def _pinwheel_points(u: Tensor, n: Tensor) -> Tensor:
    # five Gaussian blobs, long along the radius, every point turned the further the more it lies out
    along, across = 1 + 0.3 * n[:, 0], 0.1 * n[:, 1]
    angle = 2 * math.pi / 5 * _pick(u[:, 0], 5) + 0.25 * torch.exp(along)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return 2 * torch.stack([along * cos + across * sin, across * cos - along * sin], dim=-1)


# A board of 4x4 squares of side 2 on [-4, 4]^2, uniform on the eight whose column and row are both even or both odd.
_BOARD_AREA = 32


def _board_points(u: Tensor, n: Tensor) -> Tensor:
    square = _pick(u[:, 0], 8)
    column = torch.floor(square / 2)
    row = 2 * (square % 2) + column % 2
    within = u[:, 1:].clamp(1e-6, 1 - 1e-6)  # so that rounding to float32 moves no point across an edge
    return 2 * (torch.stack([column, row], dim=-1) + within) - 4


def _board_log_density(x: Tensor) -> Tensor:
    column, row = torch.floor(x / 2).unbind(dim=1)
    inside = ((column + row) % 2 == 0) & (x >= -4).all(dim=1) & (x < 4).all(dim=1)
    return torch.where(inside, torch.full_like(column, -math.log(_BOARD_AREA)), -math.inf)


DENSITIES = (
    Density("rings", (-5.0, 5.0), _ring_points, _ring_log_density),
    _gaussians("8gaussians", _circle, parts=8, sd=0.5 / math.sqrt(2)),
    # The grid that GANs are tried on (Gulrajani et al., 2017), with Gaussians three times as wide for their spacing:
    # between theirs there is so little mass that a sampler that moves in small steps all but never crosses.
    _gaussians("25gaussians", _grid, parts=25, sd=0.15),
    Density("pinwheel", (-6.0, 6.0), _pinwheel_points),
    _around_curve("two-moons", _moons, parts=2, sd=0.2),
    _around_curve("swiss-roll", _roll, parts=1, sd=0.2),
    Density(
        "checkerboard", (-4.0, 4.0), _board_points, _board_log_density, is_smooth=False, entropy=math.log(_BOARD_AREA)
    ),
)
