"""A kernel's stationary law, its rate, and the constants of a drift and of a minorisation condition."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from scipy import linalg, sparse
from scipy.sparse.linalg import ArpackNoConvergence, eigs

from .markov import Cells, Kernel

_DENSE = 1000  #: states up to which all eigenvalues are computed, and above which only the largest are

_SOLVED = 4096  #: states up to which the stationary law is the solution of a dense system

_RESIDUAL = 1e-9

_INSIDE = 1e-6  #: a proposal is inside the box if it leaves it with less than this probability

_LARGEST_LOG = 600.0


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half the sum of |p - q|, between 0 and 1."""
    return 0.5 * float(np.abs(p - q).sum())


def stationary(matrix: sparse.csr_array) -> np.ndarray:
    """(N,) the law that one transition leaves as it is. Raises RuntimeError where it is not found to 1e-9 in sum: a
    chain with several, or that takes longer than floating point can tell from for ever."""
    # an adjusted chain far out, all of whose proposals are rejected, is stuck for ever in double precision
    live = np.flatnonzero(matrix.diagonal() < 1 - 1e-12)
    law = np.zeros(matrix.shape[0])
    if len(live) <= _SOLVED:
        # pi (I - P + 1 u^T) = u^T for every u: a regular system where pi is unique (Paige, Styan and Wachter 1975)
        system = np.eye(len(live)) - matrix[live][:, live].toarray() + 1 / len(live)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", linalg.LinAlgWarning)
                law[live] = linalg.solve(system.T, np.full(len(live), 1 / len(live)), overwrite_a=True)
        except (linalg.LinAlgError, linalg.LinAlgWarning) as error:
            raise RuntimeError(f"the stationary law is not unique in double precision: {error}") from None
    else:
        law[live] = _largest(matrix[live][:, live].T, 1, vectors=True)[1][:, 0].real
    law = np.maximum(law / law.sum(), 0)
    law /= law.sum()
    residual = np.abs(law @ matrix - law).sum()
    if not residual < _RESIDUAL:
        raise RuntimeError(f"the stationary law was not found: one transition moves {residual:.1e} of it")
    return law


def geometric_rate(matrix: sparse.csr_array) -> float:
    """The modulus of the second eigenvalue: what the distance to the stationary law shrinks by, a transition, at last.

    Of all eigenvalues on up to 1,000 states, and beyond that by Arnoldi's method.
    """
    values = linalg.eigvals(matrix.toarray()) if matrix.shape[0] <= _DENSE else _largest(matrix, 2)
    return min(1.0, float(np.sort(np.abs(values))[-2]))


def _largest(matrix, count: int, *, vectors: bool = False):
    start = np.random.default_rng(0).random(matrix.shape[0])  # ARPACK's own would change from run to run
    try:
        return eigs(matrix, count, which="LM", v0=start, ncv=80, maxiter=2000, return_eigenvectors=vectors)
    except ArpackNoConvergence as error:
        raise RuntimeError(f"the largest eigenvalues did not converge: {error}") from None


def distances(matrix: sparse.csr_array, start: int, law: np.ndarray, *, least: float = 1e-6, most: int = 3000):
    """(K + 1,): the total variation between ``law`` and the chain's after 0, 1, ... transitions from cell ``start``,
    until it is below ``least``, and for ``most`` transitions at most."""
    now, transposed = np.zeros(len(law)), matrix.T.tocsr()
    now[start] = 1.0
    found = [total_variation(now, law)]
    while found[-1] > least and len(found) <= most:
        now = transposed @ now
        found.append(total_variation(now, law))
    return np.array(found)


def bound_constant(found: np.ndarray, rate: float) -> float:
    """The least C with found[k] <= C rate^k for all of these k."""
    return float((found / rate ** np.arange(len(found))).max())


def tail_cell(target: np.ndarray, mass: float = 1e-4) -> int:
    """A start in the tail: the least likely cell among the likeliest that hold all but ``mass`` of the target."""
    order = np.argsort(-target, kind="stable")
    return int(order[np.searchsorted(target[order].cumsum(), 1 - mass)])


class Ball(NamedTuple):
    centre: np.ndarray  #: (d,)
    radius: float

    def holds(self, centres: np.ndarray) -> np.ndarray:
        """(N,) bool: which points are in the ball."""
        return np.linalg.norm(centres - self.centre, axis=1) <= self.radius


def mass_ball(target: np.ndarray, centres: np.ndarray, centre: np.ndarray, mass: float = 0.95) -> Ball:
    """The least ball about ``centre`` that holds this much of the target."""
    distance = np.linalg.norm(centres - centre, axis=1)
    order = np.argsort(distance, kind="stable")
    last = np.searchsorted(target[order].cumsum(), mass)
    return Ball(centre, float(distance[order[min(last, len(order) - 1)]]))


class Drift(NamedTuple):
    """P V <= rate V + kappa 1_ball on the cells that can be judged, with V = pi^-beta and pi at most 1.

    The condition holds where rate < 1. ``worst`` is where outside the ball P V / V is largest. ``least_radius``
    is the radius from which on P V < V (None: from none); cells are judged out to ``judged_to``.
    """

    beta: float
    rate: float
    kappa: float
    worst: tuple[float, ...]
    least_radius: float | None
    judged_to: float


def drift(kernel: Kernel, grid: Cells, ball: Ball, beta: float) -> Drift | None:
    """The least constants of the drift condition outside and on the ball.

    A cell is judged if its proposal is not coarse and stays within the box, and if the border cells give no more than
    1e-6 of its P V: where they give much, P V depends on how far the box goes. (It is infinite where V grows faster
    than the proposal's density falls.) None if no cell outside the ball can be judged, or not all within. Raises
    ValueError if V overflows.
    """
    log_v = -beta * kernel.log_target
    if log_v.max() > _LARGEST_LOG:
        raise ValueError(f"beta must be smaller: V reaches exp({log_v.max():.0f}) on the grid at {beta}")
    v = np.exp(log_v)
    after = kernel.matrix @ v
    ratio = after / v
    from_border = kernel.matrix @ np.where(grid.border, v, 0.0)
    judged = ~kernel.coarse & (kernel.lost < _INSIDE) & (from_border < _INSIDE * after)
    within = ball.holds(grid.centres)
    outside = judged & ~within
    if not outside.any() or (within & ~judged).any():
        return None
    worst = int(np.flatnonzero(outside)[ratio[outside].argmax()])
    rate = float(ratio[worst])
    distance = np.linalg.norm(grid.centres - ball.centre, axis=1)
    least = float(distance[judged & (ratio >= 1)].max(initial=0.0))
    judged_to = float(distance[judged].max())
    return Drift(
        beta, rate, max(0.0, float((after - rate * v)[within].max())), tuple(grid.centres[worst].tolist()),
        least if least < judged_to else None, judged_to,
    )  # fmt: skip


def minorisation(matrix: sparse.csr_array, within: np.ndarray, doublings: int = 8) -> dict[int, float]:
    """{m: eps_m} for m = 1, 2, 4, ..., 2^doublings: P^m(x, .) >= eps_m nu(.) for all x among ``within``, with nu a
    probability. eps_m is the largest there is, the sum over y of the least P^m(x, y). The powers are dense."""
    found = {1: float(matrix[within].toarray().min(0).sum())}
    power = matrix.toarray() if doublings else None
    for doubling in range(1, doublings + 1):
        power = power @ power
        found[2**doubling] = float(power[within].min(0).sum())
    return found
