"""A sampler's transition kernel on a grid: its stationary law, how fast it forgets its start, and the constants of a
drift and of a minorisation condition.

The grid's chain is the sampler's own, with its state rounded to the centre of its cell after every transition:

    Q_ij = P(N(mean_i, sd_i^2) falls in cell j),       mean_i, sd_i: the sampler's proposal at the centre of cell i

by differences of the normal's distribution function, so that Q is a stochastic matrix whatever the grid. Rounding adds
width^2 / 12 to a variance; that much is taken off sd_i^2 first (Sheppard's correction), which leaves an error of
order (width / sd)^4. A proposal narrower than half a cell is widened to half a cell: `Kernel.coarse` says where, and
no result is to be trusted where that is much of the stationary law.

What leaves the box is put into the border cell nearest to it: the kernel is that of the sampler clamped to the box. A
Metropolis-adjusted sampler rejects it instead, and its kernel is

    P_ij = Q_ij min(1, alpha_ij) off the diagonal,      P_ii = what is left of one,

with alpha the sampler's own ratio (`ops.reference.log_accept`) at the centres. Q_ij stands for the density of the
proposal at centre j times the cell's volume, from which it differs by a share of order (width / sd)^4; that is by how
much detailed balance fails on the grid, and what the stationary law shows of a ratio that is right.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.special import ndtr
from torch import Tensor

from ..models.score import evaluator, sampling
from ..ops import reference
from ..samplers import SAMPLERS
from ..samplers.langevin import AniLA
from ..samplers.metric import Preconditioned
from ..samplers.sampler import Sampler
from .targets import Box, Target

#: The samplers that `transition_kernel` takes: those that draw a proposal from normals, with noise.
SAMPLER_NAMES = tuple(
    name
    for name, kind in SAMPLERS.items()
    if kind.proposal is not Sampler.proposal and getattr(kind, "noise_scale", 1.0) != 0
)

_NEGLIGIBLE = 1e-30  #: a probability that is left out of the matrix: beyond 11 standard deviations
_PAIRS = 1 << 18  #: moves whose acceptance is computed at a time


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
    """The kernel of one transition. The target is exp(-U / sigma^2), sigma the sampler's noise scale.

    Raises ValueError for a sampler whose transition is no draw from normals (HMC, gradient descent), or that remembers
    more than its state (refresh="update"), and for a target whose score is not finite on the grid.
    """
    if getattr(sampler.proposal, "__func__", None) is Sampler.proposal:
        raise ValueError(
            f"sampler must draw its proposals from normals about a mean, which {type(sampler).__name__} does not"
        )
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
    if isinstance(sampler, Preconditioned):  # which rejects as the sampler does that moves y = z / scale
        scale = sampler.scale_on(z)
        z, score, sampler = z / scale, score * scale, sampler.sampler
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


# --------------------------------------------------------------------------------------- the conditions of a theorem
