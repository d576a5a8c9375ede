"""Densities on the line and the plane by name, for experiments with known answers: each an energy, a box, no data.

Energies map (N, d) to (N,) at the dtype they get and are not normalised. Less than 1e-6 of the density lies outside the
box, at the default parameters. One number shapes each of those in closed form, its parameter; the densities of
`fastanila.data` have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from .. import checks
from ..data import densities, registry
from ..evaluation import quadrature

ROOM = 1.25  #: by how much a data set's box is widened, for the proposals of chains, and what a sampler puts outside
Box = tuple[tuple[float, float], ...]  #: (low, high) by axis


@dataclass(frozen=True)
class Target:
    name: str
    energy: Callable[[Tensor], Tensor]  #: U: (N, d) -> (N,)
    box: Box


def normal(sd: float = 1.0) -> Target:
    """N(0, sd^2)."""
    return Target("normal", lambda x: 0.5 * (x[:, 0] / sd).square(), ((-10 * sd, 10 * sd),))


def skewed(scale: float = 1.0) -> Target:
    """f = y - exp(y), y = x / scale: the log of an exponential variable. Mean -0.5772, variance pi^2 / 6 at scale 1.
    Its left tail is exponential and its right tail so light that the score is unbounded by any power of y."""
    return Target("skewed", lambda x: (x[:, 0] / scale).exp() - x[:, 0] / scale, ((-20 * scale, 6 * scale),))


def logistic(scale: float = 1.0) -> Target:
    """Variance (pi * scale)^2 / 3; tails exp(-|x| / scale), in which the score is constant."""
    return Target("logistic", lambda x: (x + 2 * scale * functional.softplus(-x / scale))[:, 0] / scale,
                  ((-22 * scale, 22 * scale),))  # fmt: skip


def double_well(barrier: float = 1.0) -> Target:
    """U = barrier (x^2 - 1)^2: modes at -1 and 1, ``barrier`` nats between them."""
    high = math.sqrt(1 + math.sqrt(32 / barrier))
    return Target("double-well", lambda x: barrier * (x[:, 0].square() - 1).square(), ((-high, high),))


def gaussian(condition: float = 1.0) -> Target:
    """Two independent normals of variances 1 and 1 / condition."""
    high = 8 / math.sqrt(condition)
    return Target("gaussian", lambda x: 0.5 * (x[:, 0].square() + condition * x[:, 1].square()),
                  ((-8.0, 8.0), (-high, high)))  # fmt: skip


def correlated(correlation: float = 0.8) -> Target:
    """Two normals of variance 1 with this correlation: the simplest target that is not separable."""
    if not -1 < correlation < 1:
        raise ValueError(f"parameter must be a correlation between -1 and 1, got {correlation}")

    def energy(x: Tensor) -> Tensor:
        a, b = x.unbind(1)
        return (a.square() - 2 * correlation * a * b + b.square()) / (2 * (1 - correlation**2))

    return Target("correlated", energy, ((-8.0, 8.0),) * 2)


def banana(curvature: float = 0.5) -> Target:
    """x ~ N(0, 1) and y | x ~ N(curvature (x^2 - 1), 1) (Haario, Saksman and Tamminen 1999)."""

    def energy(x: Tensor) -> Tensor:
        a, b = x.unbind(1)
        return 0.5 * (a.square() + (b - curvature * (a.square() - 1)).square())

    return Target("banana", energy, ((-5.5, 5.5), (-curvature - 5.5, 16 * curvature + 5.5)))


def density(name: str) -> Target:
    """The density of `fastanila.data` called ``name``, on its box widened."""
    found = registry.load(name)
    return Target(name, lambda x: -found.log_density(x), (quadrature.widened(found.box, ROOM),) * 2)


#: those shaped by a parameter
SHAPED: dict[str, Callable[..., Target]] = {
    "normal": normal,
    "skewed": skewed,
    "logistic": logistic,
    "double-well": double_well,
    "gaussian": gaussian,
    "correlated": correlated,
    "banana": banana,
}
#: those of fastanila.data that have a score
PLAIN = tuple(d.name for d in densities.DENSITIES if d.log_density is not None and d.is_smooth)
NAMES = (*SHAPED, *PLAIN)


def load(name: str, parameter: float | None = None) -> Target:
    """The target called ``name``, with its parameter, or with the parameter's default. Raises ValueError if there is
    none of that name, or it cannot have that parameter."""
    if name in PLAIN:
        if parameter is not None:
            raise ValueError(f"{name} has no parameter, got {parameter}")
        return density(name)
    if name not in SHAPED:
        raise ValueError(f"target must be one of {', '.join(NAMES)}, got {name!r}")
    if parameter is None:
        return SHAPED[name]()
    if name != "correlated":
        checks.positive("parameter", parameter, finite=True)
    return SHAPED[name](parameter)
