"""Whole chains in one launch, the state in registers: what the kernels of all energies share (mixture.py, mlp.py).

A kernel owns ROWS chains, z (ROWS, DIM_P2) with columns beyond DIM zero. For each of ``steps`` transitions it computes
the energy's score and then, with common.py's stretch and drift, eps the step size and sigma the noise scale,

    z' = z + eps/2 drift + sigma sqrt(eps / stretch) noise

ADJUSTED makes Metropolis transitions of it, as ops/reference.py's metropolis_step defines them, with sigma = 1. The
energy and score are then those of x, the proposal; they judge it, and those of the place that is chosen make the next.
That takes one pass of the loop more than there are transitions: in pass 0, x is where the chains start, and is taken as
it is.

The last transition also writes what it saw of each chain at the state it started from: energy, mean gamma, RMS score
and clipped fraction, and the probability of acceptance, which is 1 where nothing is judged.
"""

import triton
import triton.language as tl

from .common import (
    ACCEPTANCE_STREAM,
    INF,
    element_gain,
    is_tensor,
    log_ratio_terms,
    moved,
    norm_over,
    scalar,
    scaling,
    shared_gain,
)
from .philox import element_uniforms

# ------------------------------------------------------------------------------------------------ what a launch reads


@triton.jit
def read_numbers(
    threshold, step_size, noise_scale, seed, step, THRESHOLD_PTR: tl.constexpr, STEP_SIZE_PTR: tl.constexpr,
    NOISE_SCALE_PTR: tl.constexpr, SEED_PTR: tl.constexpr, STEP_PTR: tl.constexpr,
):  # fmt: skip
    """The number-valued arguments, those of them that are pointers read."""
    return (
        scalar(threshold, THRESHOLD_PTR, tl.float32),
        scalar(step_size, STEP_SIZE_PTR, tl.float32),
        scalar(noise_scale, NOISE_SCALE_PTR, tl.float32),
        scalar(seed, SEED_PTR, tl.int64),
        scalar(step, STEP_PTR, tl.int64),
    )


@triton.jit
def places(chains, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr):
    """This program's chains, (ROWS,) int64, and where their elements lie and whether they exist, (ROWS, DIM_P2)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM_P2)[None, :]
    return rows, rows[:, None] * DIM + column, (rows < chains)[:, None] & (column < DIM)


# ------------------------------------------------------------------------------------------------------- a transition


@triton.jit
def stretch_and_drift(score, threshold, CHAIN_NORM: tl.constexpr):
    """(stretch, drift) of a state: of score's shape, or (ROWS, 1) and score's shape for the chain norm."""
    if CHAIN_NORM:
        largest, squares = norm_over(score)
        stretch, _, drift = shared_gain(score, largest, squares, threshold)
    else:
        stretch, _, drift = element_gain(score, threshold)
    return stretch, drift


@triton.jit
def transition(
    z, score, held, j, noise, threshold, step_size, noise_scale, low, high,
    CHAIN_NORM: tl.constexpr, FROZEN: tl.constexpr, HAS_BOUNDS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Transition j of this launch: the new z, and the stretch it used, of z's shape. FROZEN keeps that of j = 0."""
    stretch, drift = stretch_and_drift(score, threshold, CHAIN_NORM)
    stretch = tl.broadcast_to(stretch, z.shape)
    if FROZEN:
        stretch = tl.where(j == 0, stretch, held)
        drift = score / stretch
    out = moved(z, drift, tl.rsqrt(stretch), noise, step_size, noise_scale, low, high, HAS_BOUNDS)
    if z.shape[1] != DIM:
        out = tl.where(tl.arange(0, z.shape[1])[None, :] < DIM, out, 0.0)
    return out, stretch


@triton.jit
def log_ratio(
    change, stretch, drift, stretch_back, drift_back, step_size,
    CHAIN_NORM: tl.constexpr, FAST: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """log q(z | x) - log q(x | z) of each row, (ROWS,), where x = z + change."""
    terms = log_ratio_terms(change, stretch, drift, stretch_back, drift_back, step_size, CHAIN_NORM, FAST)
    if change.shape[1] != DIM:
        terms = tl.where(tl.arange(0, change.shape[1])[None, :] < DIM, terms, 0.0)
    return tl.sum(terms, axis=1)


@triton.jit
def by_sum(x, z):
    """x (ROWS,), as the sum over rows of z's shape that hold x and zeros.

    Without it Triton computes x twice, with all that x follows from: once where it lies, once where the store wants it.
    """
    return tl.sum(tl.where(tl.arange(0, z.shape[1])[None, :] == 0, x[:, None], 0.0), axis=1)


@triton.jit
def adjusted_transition(
    x, x_energy, x_score, z, energy, score, stretch, drift, j, steps, noise, statistics_ptr, rows, chains,
    threshold, step_size, seed, step, offset,
    CHAIN_NORM: tl.constexpr, FAST: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Pass j of this launch: (x, z, energy, score, stretch, drift), the next proposal and the state that it leaves.

    x is the proposal of transition j - 1 with its energy and score, z the state that it starts from with its own, and
    with its score's stretch and drift, of the shapes of `stretch_and_drift`. In pass 0 the state counts for nothing.
    """
    x_stretch, x_drift = stretch_and_drift(x_score, threshold, CHAIN_NORM)
    log_q = log_ratio(x - z, stretch, drift, x_stretch, x_drift, step_size, CHAIN_NORM, FAST, DIM)
    log_alpha = energy - x_energy + log_q
    finite = tl.abs(log_alpha) < INF  # which NaN is not
    if j == steps:
        acceptance = tl.where(finite, tl.exp(tl.minimum(log_alpha, 0.0)), 0.0)
        seen = by_sum(energy, z)
        store_statistics(statistics_ptr, rows, chains, seen, stretch, score, DIM)
        store_acceptance(statistics_ptr, rows, chains, by_sum(acceptance, z))
    uniform = element_uniforms(seed, step + j - 1, ACCEPTANCE_STREAM, offset + rows, FAST)
    accepted = (j == 0) | (finite & (tl.log(uniform) < log_alpha))
    energy = tl.where(accepted, x_energy, energy)
    taken = accepted[:, None]
    z, score = tl.where(taken, x, z), tl.where(taken, x_score, score)
    stretch, drift = tl.where(taken, x_stretch, stretch), tl.where(taken, x_drift, drift)
    x = moved(z, drift, tl.rsqrt(stretch), noise, step_size, 1.0, 0.0, 0.0, False)
    if z.shape[1] != DIM:
        x = tl.where(tl.arange(0, z.shape[1])[None, :] < DIM, x, 0.0)
    return x, z, energy, score, stretch, drift


@triton.jit
def store_acceptance(out_ptr, rows, count, acceptance):
    """The last row of what `store_statistics` begins."""
    tl.store(out_ptr + 4 * count + rows, acceptance, mask=rows < count)


@triton.jit
def store_statistics(out_ptr, rows, count, energy, stretch, score, DIM: tl.constexpr):
    """Of (5, count) float32 the first four: energy, mean gamma, RMS score and clipped fraction of each row."""
    inside = rows < count
    own = tl.arange(0, score.shape[1])[None, :] < DIM
    tl.store(out_ptr + rows, energy, mask=inside)
    tl.store(out_ptr + count + rows, tl.sum(tl.where(own, 1.0 / stretch, 0.0), axis=1) / DIM, mask=inside)
    largest, squares = norm_over(score)
    scale, _ = scaling(largest)
    rms = tl.sum(scale * tl.sqrt(squares / DIM), axis=1)  # of one element
    tl.store(out_ptr + 2 * count + rows, rms, mask=inside)
    tl.store(out_ptr + 3 * count + rows, tl.sum(tl.where(own & (stretch > 1.0), 1.0, 0.0), axis=1) / DIM, mask=inside)


# ----------------------------------------------------------------------------------------------- what launches share


def launch_numbers(bounds, *, threshold, step_size, noise_scale, seed, step, steps, offset) -> tuple:
    low, high = bounds if bounds is not None else (0.0, 0.0)
    return steps, threshold, step_size, noise_scale, seed, step, offset, low, high


def launch_constants(
    adjusted, bounds, frozen, chain_norm, fast, *, threshold, step_size, noise_scale, seed, step, **_
) -> dict:
    pointers = dict(
        THRESHOLD_PTR=threshold, STEP_SIZE_PTR=step_size, NOISE_SCALE_PTR=noise_scale, SEED_PTR=seed, STEP_PTR=step
    )
    return {name: is_tensor(x) for name, x in pointers.items()} | dict(
        ADJUSTED=adjusted, CHAIN_NORM=chain_norm, FROZEN=frozen, HAS_BOUNDS=bounds is not None, FAST=fast
    )
