"""A sampler's transition kernel on a grid: its stationary law, how fast it forgets its start, and the constants of a
drift and of a minorisation condition.

The grid's chain is the sampler's own, with its state rounded to the centre of its cell after every transition:

    Q_ij = P(N(mean_i, sd_i**2) falls in cell j),       mean_i, sd_i: the sampler's proposal at the centre of cell i

by differences of the normal's distribution function, so that Q is a stochastic matrix whatever the grid. Rounding adds
width**2 / 12 to a variance; that much is taken off sd_i**2 first (Sheppard's correction), which leaves an error of
order (width / sd)**4. A proposal narrower than half a cell is widened to half a cell: `Kernel.coarse` says where, and
no result is to be trusted where that is much of the stationary law.

What leaves the box is put into the border cell nearest to it: the kernel is that of the sampler clamped to the box. A
Metropolis-adjusted sampler rejects it instead, and its kernel is

    P_ij = Q_ij min(1, alpha_ij) off the diagonal,      P_ii = what is left of one,

with alpha the sampler's own ratio (`fastanila.reference.log_accept`) at the centres. Q_ij stands for the density of the
proposal at centre j times the cell's volume, from which it differs by a share of order (width / sd)**4; that is by how
much detailed balance fails on the grid, and what the stationary law shows of a ratio that is right.
"""

from __future__ import annotations

import math
import warnings
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from scipy import linalg, sparse
from scipy.sparse.linalg import ArpackNoConvergence, eigs
from scipy.special import ndtr
from torch import Tensor

from . import reference
from .energies import evaluator, sampling
from .samplers import HMC, AniLA, Sampler
from .targets import Box, Target

_NEGLIGIBLE = 1e-30  #: a probability that is left out of the matrix: beyond 11 standard deviations
_PAIRS = 1 << 18  #: moves whose acceptance is computed at a time
_DENSE = 1000  #: states up to which all eigenvalues are computed, and above which only the largest are
_SOLVED = 4096  #: states up to which the stationary law is the solution of a dense system
_RESIDUAL = 1e-9
_INSIDE = 1e-6  #: a proposal is inside the box if it leaves it with less than this probability
_LARGEST_LOG = 600.0


class Cells(NamedTuple):
    """A box cut into cells, those of the last axis adjacent."""

    centres: np.ndarray  #: (N, d) float64
    edges: tuple[np.ndarray, ...]  #: by axis, (n + 1,)
    volume: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(e) - 1 for e in self.edges)

    @property
    def border(self) -> np.ndarray:
        """(N,) bool: which cells touch the border of the box."""
        inner = np.zeros(self.shape, bool)
        inner[(slice(1, -1),) * len(self.shape)] = True
        return ~inner.ravel()


def cells(box: Box, resolution: int) -> Cells:
    """``resolution`` cells along every axis of the box, (low, high) by axis."""
    if resolution < 2 or not all(low < high for low, high in box):
        raise ValueError(f"box must be (low, high) by axis and resolution at least 2, got {box} and {resolution}")
    edges = tuple(np.linspace(low, high, resolution + 1) for low, high in box)
    middles = np.meshgrid(*((e[1:] + e[:-1]) / 2 for e in edges), indexing="ij")
    volume = math.prod((high - low) / resolution for low, high in box)
    return Cells(np.stack([m.ravel() for m in middles], 1), edges, volume)


class Kernel(NamedTuple):
    """The chain on N cells; for an adjusted sampler, with its acceptance."""

    matrix: sparse.csr_array  #: (N, N), rows sum to 1
    target: np.ndarray  #: (N,) the target's mass, sums to 1
    log_target: np.ndarray  #: (N,) its log density, 0 at its highest
    score: np.ndarray  #: (N, d) at the centres
    lost: np.ndarray  #: (N,) the probability that a proposal leaves the box
    coarse: np.ndarray  #: (N,) bool: a proposal is narrower than half a cell


def transition_kernel(sampler: Sampler, target: Target, grid: Cells) -> Kernel:
    """The kernel of one transition. The target is exp(-U / sigma**2), sigma the sampler's noise scale.

    Raises ValueError for a sampler whose transition is no draw from normals (HMC, gradient descent), or that remembers
    more than its state (refresh="update"), and for a target whose score is not finite on the grid.
    """
    if isinstance(sampler, HMC):
        raise ValueError("sampler must draw its proposals from normals about a mean, which HMC does not")
    if sampler.refresh != "transition":
        raise ValueError("sampler must be a Markov chain in its state alone, which refresh='update' is not")
    z = torch.from_numpy(grid.centres)
    with torch.no_grad(), sampling(target.energy):
        energy, score = evaluator(target.energy)(z)
    if not (energy.isfinite().all() and score.isfinite().all()):
        raise ValueError(f"target must have a finite energy and score on its box, which {target.name} has not")
    mean, sd = (x.numpy() for x in sampler.proposal(z, score))
    if not (sd > 0).all():
        raise ValueError(f"sampler must have noise, which {type(sampler).__name__} has not: its law is a point mass")
    masses, lost, coarse = _cell_masses(mean, sd, grid.edges, clamped=not sampler.is_exact)
    log_density = -energy.numpy() / float(sampler.noise_scale) ** 2
    log_density -= log_density.max()
    matrix = _metropolised(masses, sampler, z, score, energy) if sampler.is_exact else masses
    return Kernel(matrix, normalised(log_density), log_density, score.numpy(), lost, coarse)


def _cell_masses(mean, sd, edges, *, clamped: bool) -> tuple[sparse.csr_array, np.ndarray, np.ndarray]:
    """(Q, lost, coarse) of independent normals, (N, d) each; ``clamped`` adds what is lost to the border cells."""
    factors, inside, coarse = [], np.ones(len(mean)), np.zeros(len(mean), bool)
    for axis, edge in enumerate(edges):
        width = edge[1] - edge[0]
        coarse |= sd[:, axis] < width / 2
        corrected = np.sqrt(np.maximum(sd[:, axis] ** 2, width**2 / 4) - width**2 / 12)
        place = (edge - mean[:, axis, None]) / corrected[:, None]
        left, right = place[:, :-1], place[:, 1:]
        # each from the tail it is nearer to, whose probabilities keep their digits
        factor = np.where(left > 0, ndtr(-left) - ndtr(-right), ndtr(right) - ndtr(left))
        below, above = ndtr(place[:, 0]), ndtr(-place[:, -1])
        inside *= 1 - below - above
        if clamped:
            factor[:, 0] += below
            factor[:, -1] += above
        factors.append(factor)
    blocks = []
    for rows in np.array_split(np.arange(len(mean)), -(-len(mean) // 256)):
        block = reduce(lambda a, b: (a[:, :, None] * b[:, None, :]).reshape(len(a), -1), [f[rows] for f in factors])
        block[block < _NEGLIGIBLE] = 0
        blocks.append(sparse.csr_array(block))
    return sparse.vstack(blocks, format="csr"), 1 - inside, coarse


def _metropolised(proposals: sparse.csr_array, sampler: Sampler, z: Tensor, score: Tensor, energy: Tensor):
    """The kernel of an adjusted sampler with these masses of its proposals, which are rejected as it rejects them."""
    moves = proposals.tocoo()
    i, j = (torch.from_numpy(index.astype(np.int64)) for index in (moves.row, moves.col))
    accepted = []
    for a, b in zip(i.split(_PAIRS), j.split(_PAIRS), strict=True):
        log_alpha = reference.log_accept(
            z[a], score[a], energy[a], z[b], score[b], energy[b], sampler.threshold, step_size=sampler.step_size,
            norm=sampler.norm,
        )  # fmt: skip
        accepted.append(reference.acceptance(log_alpha))
    moves.data *= torch.cat(accepted).numpy()
    return (moves + sparse.diags_array(np.maximum(1 - moves.sum(1), 0))).tocsr()


def normalised(log_density: np.ndarray) -> np.ndarray:
    mass = np.exp(log_density - log_density.max())
    return mass / mass.sum()


def small_step_law(sampler: Sampler, kernel: Kernel) -> np.ndarray | None:
    """(N,) the mass of the sampler's stationary law as eps -> 0, None where it has no closed form.

    AniLA's is exp(-U) / gamma (`fastanila.samplers.AniLA`), with the product of all gammas for norm="element", whose
    condition, that U is separable, is checked by neither this nor the grid: it is taken to hold in one dimension only.
    The others' is the target.
    """
    if not isinstance(sampler, AniLA):
        return kernel.target
    if sampler.norm == "element" and kernel.score.shape[1] > 1:
        return None
    return normalised(kernel.log_target + log_inverse_gain(kernel.score, sampler.threshold, sampler.norm))


def log_inverse_gain(score: np.ndarray, threshold: float, norm: str) -> np.ndarray:
    """(N,): the sum of -log gamma over a state's gains: one by element, or one for the state."""
    gamma = reference.clipped(torch.from_numpy(score), threshold, norm)[0]
    return -gamma.log().sum(1).numpy()


# ------------------------------------------------------------------------------------------- long runs, and how soon


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
    """The least C with found[k] <= C rate**k for all of these k."""
    return float((found / rate ** np.arange(len(found))).max())


def tail_cell(target: np.ndarray, mass: float = 1e-4) -> int:
    """A start in the tail: the least likely cell among the likeliest that hold all but ``mass`` of the target."""
    order = np.argsort(-target, kind="stable")
    return int(order[np.searchsorted(target[order].cumsum(), 1 - mass)])


# --------------------------------------------------------------------------------------- the conditions of a theorem


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
    """P V <= rate V + kappa 1_ball on the cells that can be judged, with V = pi**-beta and pi at most 1.

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
    """{m: eps_m} for m = 1, 2, 4, ..., 2**doublings: P^m(x, .) >= eps_m nu(.) for all x among ``within``, with nu a
    probability. eps_m is the largest there is, the sum over y of the least P^m(x, y). The powers are dense."""
    found = {1: float(matrix[within].toarray().min(0).sum())}
    power = matrix.toarray() if doublings else None
    for doubling in range(1, doublings + 1):
        power = power @ power
        found[2**doubling] = float(power[within].min(0).sum())
    return found
