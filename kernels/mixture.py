"""K transitions of the chains of a Gaussian mixture in one launch."""

import functools

import triton
import triton.language as tl

from .common import LANGEVIN_STREAM, LARGEST
from .launching import Launcher, programs
from .philox import box_muller, element_normals, joined_normals, words
from .whole_chain import (
    adjusted_transition,
    launch_constants,
    launch_numbers,
    places,
    read_numbers,
    store_acceptance,
    store_statistics,
    transition,
)


@triton.jit
def chain_normals(seed, step, chain, DIM: tl.constexpr, DIM_P2: tl.constexpr, FAST: tl.constexpr):
    """The normals of whole chains, (ROWS,) int64 global indices -> (ROWS, DIM_P2), where a thread holds a chain."""
    if DIM == 2:  # half a counter a chain
        r0, r1, r2, r3 = words(seed, step, LANGEVIN_STREAM, chain >> 1, FAST)
        second = (chain & 1) != 0
        n0, n1 = box_muller(tl.where(second, r2, r0), tl.where(second, r3, r1), FAST)
        return tl.join(n0, n1)
    elif DIM % 4 == 0:
        quads = chain[:, None] * (DIM // 4) + tl.arange(0, DIM // 4)[None, :]
        return joined_normals(seed, step, LANGEVIN_STREAM, quads, 4, FAST)
    else:
        k = chain[:, None] * DIM + tl.arange(0, DIM_P2)[None, :]
        return element_normals(seed, step, LANGEVIN_STREAM, k, FAST)


@triton.jit
def components(
    means_ptr, sd_ptr, log_scale_ptr, first, count, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
):  # fmt: skip
    """CHUNK components from ``first`` on, in tuples: mean (ROWS, DIM_P2), and the rate and constant of its log2 density

        constant + rate |x - mean|^2,      rate = -log2(e) / (2 sd^2)

    A component beyond ``count`` has no weight. Means are read for every row, so that they lie as z does.
    """
    column = tl.arange(0, DIM_P2)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    means, rates, constants = (), (), ()
    for m in tl.static_range(CHUNK):
        at = first + m
        inside = (column < DIM) & (column * 0 + at < count)
        means += (tl.load(means_ptr + at * DIM + column, mask=inside, other=0.0),)
        sd = tl.load(sd_ptr + at, mask=at < count, other=1.0)
        rates += (-0.7213475204444817 / (sd * sd),)
        log_scale = tl.load(log_scale_ptr + at, mask=at < count, other=-float("inf"))
        constants += (log_scale * 1.4426950408889634,)
    return means, rates, constants


@triton.jit
def accumulate(z, top, total, pull, means, rates, constants, CHUNK: tl.constexpr):
    """Add CHUNK components to the density, total 2^top, and to the sum of rate (mean - z) times density, pull 2^top."""
    logs, offsets = (), ()
    highest = top
    for m in tl.static_range(CHUNK):
        offset = means[m] - z
        log = tl.fma(tl.sum(offset * offset, axis=1), rates[m] + tl.zeros_like(top), constants[m] + tl.zeros_like(top))
        highest = tl.maximum(highest, log)
        logs += (log,)
        offsets += (offset,)
    rescale = tl.exp2(top - highest)
    total, pull = total * rescale, pull * rescale[:, None]
    for m in tl.static_range(CHUNK):
        p = tl.exp2(logs[m] - highest)
        total += p
        pull += (p * rates[m])[:, None] * offsets[m]
    return highest, total, pull


@triton.jit
def mixture_energy(top, total):
    return (top + tl.log2(total)) * -0.6931471805599453


@triton.jit(do_not_specialize=["chains", "components_", "steps", "seed", "step", "offset"])
def mixture_kernel(
    z_ptr, means_ptr, sd_ptr, log_scale_ptr, out_ptr, statistics_ptr, chains: tl.int64, components_: tl.int32,
    steps: tl.int32, threshold, step_size, noise_scale, seed, step, offset: tl.int64, low: tl.float32, high: tl.float32,
    THRESHOLD_PTR: tl.constexpr, STEP_SIZE_PTR: tl.constexpr, NOISE_SCALE_PTR: tl.constexpr,
    SEED_PTR: tl.constexpr, STEP_PTR: tl.constexpr, ADJUSTED: tl.constexpr, CHAIN_NORM: tl.constexpr,
    FROZEN: tl.constexpr, HAS_BOUNDS: tl.constexpr, FAST: tl.constexpr, DIM: tl.constexpr, DIM_P2: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """``steps`` transitions of chains z (chains, DIM) on a mixture of ``components_`` isotropic Gaussians.

    HELD: CHUNK is the number of components, and they stay in registers; else they are read CHUNK at a time. ADJUSTED
    has no noise scale, bounds or frozen gain.
    """
    threshold, step_size, noise_scale, seed, step = read_numbers(
        threshold, step_size, noise_scale, seed, step,
        THRESHOLD_PTR, STEP_SIZE_PTR, NOISE_SCALE_PTR, SEED_PTR, STEP_PTR,
    )  # fmt: skip
    rows, at, inside = places(chains, ROWS, DIM, DIM_P2)
    x = tl.load(z_ptr + at, mask=inside, other=0.0)
    stretch = tl.full((ROWS, 1 if ADJUSTED and CHAIN_NORM else DIM_P2), 1.0, tl.float32)
    if ADJUSTED:
        z, score, drift, energy = x, x, x, tl.zeros((ROWS,), tl.float32)
    if HELD:
        means, rates, constants = components(means_ptr, sd_ptr, log_scale_ptr, 0, components_, CHUNK, ROWS, DIM, DIM_P2)
    for j in range(steps + 1 if ADJUSTED else steps):
        top = tl.full((ROWS,), -LARGEST, tl.float32)  # finite, so that a chain far from everything has an energy
        total = tl.zeros((ROWS,), tl.float32)
        pull = tl.zeros((ROWS, DIM_P2), tl.float32)
        if HELD:
            top, total, pull = accumulate(x, top, total, pull, means, rates, constants, CHUNK)
        else:
            for first in range(0, components_, CHUNK):
                chunk = components(means_ptr, sd_ptr, log_scale_ptr, first, components_, CHUNK, ROWS, DIM, DIM_P2)
                top, total, pull = accumulate(x, top, total, pull, chunk[0], chunk[1], chunk[2], CHUNK)
        x_score = pull * (-1.3862943611198906 / total)[:, None]  # -2 ln 2, which turns rates into 1 / sd^2
        noise = chain_normals(seed, step + j, offset + rows, DIM, DIM_P2, FAST)
        if ADJUSTED:
            x, z, energy, score, stretch, drift = adjusted_transition(
                x, mixture_energy(top, total), x_score, z, energy, score, stretch, drift, j, steps, noise,
                statistics_ptr, rows, chains, threshold, step_size, seed, step, offset, CHAIN_NORM, FAST, DIM,
            )  # fmt: skip
        else:
            x, stretch = transition(
                x, x_score, stretch, j, noise, threshold, step_size, noise_scale, low, high,
                CHAIN_NORM, FROZEN, HAS_BOUNDS, DIM,
            )  # fmt: skip
            if j + 1 == steps:
                store_statistics(statistics_ptr, rows, chains, mixture_energy(top, total), stretch, x_score, DIM)
    if ADJUSTED:
        tl.store(out_ptr + at, z, mask=inside)
    else:
        tl.store(out_ptr + at, x, mask=inside)
        store_acceptance(statistics_ptr, rows, chains, 1.0)


#: Chains a program of one warp: a chain a thread, and so few that ten thousand reach every multiprocessor.
MIXTURE_ROWS = 32

#: Numbers that a thread holds at most of the components, and of the state that an adjusted chain keeps beside its
#: proposal; beyond, components are read from the first-level cache.
MIXTURE_HELD = 104

MIXTURE_CHUNK = 8


def mixture_constants(dim: int, components: int, adjusted: bool = False) -> dict:
    """The sizes a launch is compiled for."""
    return dict(_mixture_constants(dim, components, adjusted))  # a copy, which the caller may add to


@functools.lru_cache(maxsize=64)
def _mixture_constants(dim: int, components: int, adjusted: bool) -> dict:
    dim_p2 = triton.next_power_of_2(dim)
    held = components * (dim_p2 + 2) + (4 * dim_p2 if adjusted else 0) <= MIXTURE_HELD
    chunk = components if held else MIXTURE_CHUNK
    return dict(DIM=dim, DIM_P2=dim_p2, ROWS=MIXTURE_ROWS, CHUNK=chunk, HELD=held)


def launch_mixture(z, means, sd, log_scale, out, statistics, *, adjusted, bounds, frozen, chain_norm, fast, **numbers):
    """Launch over contiguous float32 tensors: z and out (B, D), means (M, D), sd and log_scale (M,), statistics (5, B).

    ``numbers``: threshold, step_size, noise_scale, seed and step, each a number or a 0-dim tensor; steps and offset.
    """
    chains, dim = z.shape
    _launch_mixture(
        programs(chains, MIXTURE_ROWS),
        (z, means, sd, log_scale, out, statistics, chains, len(means), *launch_numbers(bounds, **numbers)),
        launch_constants(adjusted, bounds, frozen, chain_norm, fast, **numbers)
        | mixture_constants(dim, len(means), adjusted),
        num_warps=1, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


_launch_mixture = Launcher(mixture_kernel)
