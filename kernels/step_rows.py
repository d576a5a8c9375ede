"""The anisotropic Langevin step where elements of a chain share something: a norm, or the chain's statistics.

The definition is ops/reference.py's anisotropic_step and statistics. A state is viewed as (chains, channels, size),
with channels = 1 where the norm runs over no channels. One program owns ROWS whole chains and walks over their columns
in tiles of (ROWS, CHANNELS, COLS), so that a norm or a statistic never leaves it: one launch, no atomics, the same bits
at every run, whatever the number of chains.

    gamma per element    one pass over the columns
    gamma per pixel      one pass, the norm reduced over the tile's channels
    gamma per chain      a chain that fits one tile stays in registers; beyond that two passes, the second score from L2
"""

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl

from .common import (
    CHAIN,
    CHANNEL,
    ELEMENT,
    LANGEVIN_STREAM,
    NORMS,
    accumulate,
    chain_sum,
    element_gain,
    is_tensor,
    moved,
    norm_over,
    scalar,
    scaling,
    shared_gain,
)
from .launching import Launcher, programs
from .philox import element_normals, joined_normals

#: Elements of a tile: what several small chains share, what a loop over columns takes at a time, and the most that one
#: tile holds, at which nothing spills.
SMALL, CHUNK, LARGEST = 1024, 4096, 8192
#: A pixel's channels must fit one tile, four columns wide.
MOST_CHANNELS = LARGEST // 4


class View(NamedTuple):
    """A state as (chains, channels, size), and what |s| then is: the norm over no, the middle or both other axes."""

    norm: str
    channels: int
    size: int


def view(shape, norm: str) -> View:
    size = math.prod(shape[1:])
    if norm == "channel" and shape[1] > 1:
        return View("channel", shape[1], size // shape[1]) if size > shape[1] else View("chain", 1, size)
    return View("chain" if norm == "chain" and size > 1 else "element", 1, size)


def fits(shape, norm: str) -> bool:
    """Whether a tile holds what the norm runs over: always, except for more than MOST_CHANNELS channels."""
    return norm != "channel" or view(shape, norm).channels <= MOST_CHANNELS


class Tile(NamedTuple):
    rows: int
    channels: int
    cols: int
    num_warps: int


@functools.lru_cache(maxsize=64)
def tile_of(channels: int, size: int, norm: str) -> Tile:
    """The tile for chains of (channels, size). The number of chains has no say, so that it cannot change a sum."""
    across = triton.next_power_of_2(channels)
    most = max(CHUNK // across, 4)
    # Not where quads straddle rows: there the noise takes as many registers as a second score would.
    if norm == "chain" and size % 4 == 0:
        most = LARGEST
    cols = triton.next_power_of_2(size)
    if cols > most:
        cols = CHUNK if norm == "chain" else most
    rows = max(SMALL // (across * cols), 1)
    thread = 16 if norm == "channel" else 8  # so that a thread holds all of a few channels
    return Tile(rows, across, cols, min(max(rows * across * cols // (32 * thread), 4), 16))


@triton.jit
def tile_normals(
    seed, step, first, base, begin,
    ALIGN: tl.constexpr, LANES: tl.constexpr, COLS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The normals of a tile whose rows start at elements ``base + begin`` (ROWS, CHANNELS, 1) of the batch."""
    if ALIGN >= 4:  # rows start at multiples of four, so the counters' quads lie in them
        quad = (first + base + begin) // 4 + (LANES // 4) * tl.arange(0, COLS // LANES)[None, None, :]
        return joined_normals(seed, step, LANGEVIN_STREAM, quad, LANES, FAST)
    else:
        k = first + base + begin + tl.arange(0, COLS)[None, None, :]
        return element_normals(seed, step, LANGEVIN_STREAM, k, FAST)


@triton.jit
def store_moved(
    out_ptr, mask_ptr, at, inside, z, drift, root, noise, step_size, noise_scale, low, high,
    HAS_MASK: tl.constexpr, HAS_BOUNDS: tl.constexpr,
):  # fmt: skip
    out = moved(z, drift, root, noise, step_size, noise_scale, low, high, HAS_BOUNDS)
    if HAS_MASK:
        out = tl.where(tl.load(mask_ptr + at, mask=inside, other=0), out, z)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


# The statistics are parts of one buffer, whose alignment depends on the number of chains. Triton would compile the
# kernel once more for each alignment.
@triton.jit(
    do_not_specialize=["chains", "channels", "units", "first", "seed", "step"],
    do_not_specialize_on_alignment=["gamma_mean_ptr", "score_rms_ptr", "clip_fraction_ptr"],
)
def rows_kernel(
    z_ptr, score_ptr, gamma_ptr, mask_ptr, out_ptr, gamma_mean_ptr, score_rms_ptr, clip_fraction_ptr,
    chains: tl.int64, channels: tl.int64, units: tl.int64, first: tl.int64,
    threshold, step_size, noise_scale, seed, step, low: tl.float32, high: tl.float32,
    THRESHOLD_PTR: tl.constexpr, STEP_SIZE_PTR: tl.constexpr, NOISE_SCALE_PTR: tl.constexpr,
    SEED_PTR: tl.constexpr, STEP_PTR: tl.constexpr,
    NORM: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BOUNDS: tl.constexpr,
    STATISTICS: tl.constexpr, ALIGN: tl.constexpr, SINGLE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, COLS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Contiguous (chains, channels, units * ALIGN), whose element 0 is element ``first`` of the stream.

    ALIGN, a power of two up to 16, is a constant that divides the chain's last extent: accesses are as wide as it
    lets them be. SINGLE: one tile holds whole chains. Statistics go to three (chains,) float32 buffers.
    """
    threshold = scalar(threshold, THRESHOLD_PTR, tl.float32)
    step_size = scalar(step_size, STEP_SIZE_PTR, tl.float32)
    noise_scale = scalar(noise_scale, NOISE_SCALE_PTR, tl.float32)
    seed = scalar(seed, SEED_PTR, tl.int64)
    step = scalar(step, STEP_PTR, tl.int64)
    LANES: tl.constexpr = 8 if out_ptr.dtype.element_ty.primitive_bitwidth == 16 and ALIGN >= 8 and COLS >= 8 else 4

    size = units * ALIGN
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    channel = tl.arange(0, CHANNELS)[None, :, None]
    base = (row * channels + channel) * size
    present = (row < chains) & (channel < channels)
    column = tl.arange(0, COLS)[None, None, :]
    end = COLS if SINGLE else size

    largest = tl.zeros((ROWS, 1, 1), tl.float32)
    squares = tl.zeros((ROWS, 1, 1), tl.float32)
    gammas = tl.zeros((ROWS, 1, 1), tl.float32)
    clipped = tl.zeros((ROWS, 1, 1), tl.float32)

    if NORM == CHAIN and not SINGLE:
        for begin in range(0, end, COLS):
            at = base + begin + column
            score = tl.load(score_ptr + at, mask=present & (begin + column < size), other=0.0).to(tl.float32)
            largest, squares = accumulate(largest, squares, score)

    for begin in range(0, end, COLS):
        at = base + begin + column
        inside = present & (begin + column < size)
        score = tl.load(score_ptr + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        noise = tile_normals(seed, step, first, base, begin, ALIGN, LANES, COLS, FAST)
        if SINGLE if NORM == CHAIN else STATISTICS:
            largest, squares = accumulate(largest, squares, score)

        if HAS_GAMMA:
            gamma = tl.load(gamma_ptr + at, mask=inside, other=1.0).to(tl.float32)
            root, drift, clips = tl.sqrt(gamma), gamma * score, gamma < 1.0
        elif NORM == ELEMENT:
            _, root, drift = element_gain(score, threshold)
            gamma, clips = root * root, tl.abs(score) > threshold
        elif NORM == CHANNEL:
            pixel_largest, pixel_squares = norm_over(score)
            stretch, root, drift = shared_gain(score, pixel_largest, pixel_squares, threshold)
            gamma, clips = root * root, stretch > 1.0
        else:
            stretch, root, drift = shared_gain(score, largest, squares, threshold)
            gamma, clips = root * root, stretch > 1.0

        store_moved(
            out_ptr, mask_ptr, at, inside, z, drift, root, noise, step_size, noise_scale, low, high,
            HAS_MASK, HAS_BOUNDS,
        )  # fmt: skip
        if STATISTICS:
            if NORM == ELEMENT:
                gammas += chain_sum(tl.where(inside, gamma, 0.0))
                clipped += chain_sum(clips.to(tl.float32))  # where nothing is loaded, nothing clips
            elif NORM == CHANNEL:
                gammas += chain_sum(tl.where(begin + column < size, gamma, 0.0))
                clipped += chain_sum(clips.to(tl.float32))
            else:
                gammas, clipped = gamma, clips.to(tl.float32)

    if STATISTICS:
        # as many gains as elements, or as pixels, or one
        gains = (channels * size if NORM == ELEMENT else size).to(tl.float32) if NORM != CHAIN else 1.0
        scale, _ = scaling(largest)
        rms = scale * tl.sqrt(squares / (channels * size).to(tl.float32))
        tl.store(gamma_mean_ptr + row, gammas / gains, mask=row < chains)
        tl.store(score_rms_ptr + row, rms, mask=row < chains)
        tl.store(clip_fraction_ptr + row, clipped / gains, mask=row < chains)


def launch(
    z, score, out, statistics=None, *, chains, channels, size, norm, gamma, mask, threshold, step_size, noise_scale,
    seed, step, first, bounds, fast,
):  # fmt: skip
    """Launch over contiguous tensors of one dtype, (chains, channels, size); ``first`` is the stream's element of z's.

    statistics: the three (chains,) float32 buffers to fill. norm: "channel"; or "element", "chain" with channels 1.
    threshold, step_size and noise_scale are floats, seed and step int64-valued ints, or any of them a 0-dim tensor.
    """
    tile = tile_of(channels, size, norm)
    low, high = bounds if bounds is not None else (0.0, 0.0)
    gamma_mean, score_rms, clip_fraction = statistics if statistics is not None else (None, None, None)
    _launch_rows(
        programs(chains, tile.rows),
        (
            z, score, gamma, mask, out, gamma_mean, score_rms, clip_fraction,
            chains, channels, size // alignment(size), first, threshold, step_size, noise_scale, seed, step, low, high,
        ),
        dict(
            THRESHOLD_PTR=is_tensor(threshold), STEP_SIZE_PTR=is_tensor(step_size),
            NOISE_SCALE_PTR=is_tensor(noise_scale), SEED_PTR=is_tensor(seed), STEP_PTR=is_tensor(step),
            HAS_GAMMA=gamma is not None, HAS_MASK=mask is not None, HAS_BOUNDS=bounds is not None,
            STATISTICS=statistics is not None, FAST=fast, **constants(tile, size, norm),
        ),
        num_warps=tile.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


_launch_rows = Launcher(rows_kernel)


def constants(tile: Tile, size: int, norm: str) -> dict:
    return dict(
        NORM=NORMS[norm], ALIGN=alignment(size), SINGLE=size <= tile.cols,
        ROWS=tile.rows, CHANNELS=tile.channels, COLS=tile.cols,
    )  # fmt: skip


def alignment(size: int) -> int:
    """The largest power of two, up to 16, of which every row of ``size`` elements starts at a multiple."""
    return math.gcd(size, 16)
