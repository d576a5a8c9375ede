"""The Metropolis transition, fused: judge the last proposal and make the next, in one launch.

The definition is ops/reference.py's metropolis_step. A state is viewed as in step_rows.py, one program owns ROWS
whole chains, and the sum of a chain's terms (common.log_ratio_terms) never leaves it.

A chain that fits one tile is read once and stays in registers. Of a larger one, the state that was chosen is read again
after the decision, from L2. Where the whole chain shares one norm, its scores are read once more, before the ratio.
"""

import functools

import triton
import triton.language as tl

from . import step_rows
from .common import (
    ACCEPTANCE_STREAM,
    CHAIN,
    CHANNEL,
    ELEMENT,
    INF,
    accumulate,
    chain_sum,
    element_gain,
    is_tensor,
    log_ratio_terms,
    norm_over,
    scalar,
    shared_gain,
)
from .launching import Launcher, programs
from .philox import element_uniforms
from .step_rows import store_moved, tile_normals


@functools.lru_cache(maxsize=64)
def tile_of(channels: int, size: int, norm: str) -> step_rows.Tile:
    """As `step_rows.tile_of`, but chains that share a norm get no larger tile: four tensors are held, not two."""
    tile = step_rows.tile_of(channels, size, "element" if norm == "chain" else norm)
    if size > tile.cols > 4 and (size % 4 or norm == "channel"):
        # Quads that straddle rows, or a norm a pixel, need more registers than 16 warps leave: the loop would spill.
        return tile._replace(cols=tile.cols // 2, num_warps=max(tile.num_warps // 2, 4))
    return tile


@triton.jit
def read(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def gain(score, largest, squares, threshold, NORM: tl.constexpr):
    """(stretch, root, drift) of a tile. largest, squares: what `accumulate` found of whole chains, for that norm."""
    if NORM == ELEMENT:
        stretch, root, drift = element_gain(score, threshold)
    else:
        if NORM == CHANNEL:
            largest, squares = norm_over(score)
        stretch, root, drift = shared_gain(score, largest, squares, threshold)
    return stretch, root, drift


@triton.jit
def log_ratio(
    z, score, proposal, proposal_score, largest, squares, proposal_largest, proposal_squares, counts,
    threshold, step_size, NORM: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """log q(z | z') - log q(z' | z) of a tile, (ROWS, 1, 1), over the elements that count."""
    stretch, _, drift = gain(score, largest, squares, threshold, NORM)
    stretch_back, _, drift_back = gain(proposal_score, proposal_largest, proposal_squares, threshold, NORM)
    change = proposal - z  # of the states as stored: no rounded mean comes between them
    SHARED: tl.constexpr = NORM != ELEMENT
    terms = log_ratio_terms(change, stretch, drift, stretch_back, drift_back, step_size, SHARED, FAST)
    return chain_sum(tl.where(counts, terms, 0.0))


@triton.jit(do_not_specialize=["chains", "channels", "units", "offset", "seed", "step"])
def metropolis_kernel(
    z_ptr, score_ptr, energy_ptr, proposal_ptr, proposal_score_ptr, proposal_energy_ptr, mask_ptr,
    z_out_ptr, score_out_ptr, energy_out_ptr, next_ptr, acceptance_ptr,
    chains: tl.int64, channels: tl.int64, units: tl.int64, offset: tl.int64, threshold, step_size, seed, step,
    THRESHOLD_PTR: tl.constexpr, STEP_SIZE_PTR: tl.constexpr, SEED_PTR: tl.constexpr, STEP_PTR: tl.constexpr,
    NORM: tl.constexpr, HAS_MASK: tl.constexpr, ALIGN: tl.constexpr, SINGLE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, COLS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Contiguous states (chains, channels, units * ALIGN) and float32 energies (chains,); chain 0 is the stream's
    chain ``offset``. ALIGN and SINGLE are as in `step_rows.rows_kernel`."""
    threshold = scalar(threshold, THRESHOLD_PTR, tl.float32)
    step_size = scalar(step_size, STEP_SIZE_PTR, tl.float32)
    seed = scalar(seed, SEED_PTR, tl.int64)
    step = scalar(step, STEP_PTR, tl.int64)
    LANES: tl.constexpr = 8 if next_ptr.dtype.element_ty.primitive_bitwidth == 16 and ALIGN >= 8 and COLS >= 8 else 4

    size = units * ALIGN
    first = offset.to(tl.int64) * (channels * size)  # the interpreter takes small arguments for 32-bit integers
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    channel = tl.arange(0, CHANNELS)[None, :, None]
    base = (row * channels + channel) * size
    exists = row < chains
    present = exists & (channel < channels)
    column = tl.arange(0, COLS)[None, None, :]

    largest = tl.zeros((ROWS, 1, 1), tl.float32)
    squares = tl.zeros((ROWS, 1, 1), tl.float32)
    proposal_largest = tl.zeros((ROWS, 1, 1), tl.float32)
    proposal_squares = tl.zeros((ROWS, 1, 1), tl.float32)
    log_q = tl.zeros((ROWS, 1, 1), tl.float32)

    if SINGLE:
        at, inside = base + column, present & (column < size)
        z, score = read(z_ptr, at, inside), read(score_ptr, at, inside)
        proposal, proposal_score = read(proposal_ptr, at, inside), read(proposal_score_ptr, at, inside)
        if NORM == CHAIN:
            largest, squares = accumulate(largest, squares, score)
            proposal_largest, proposal_squares = accumulate(proposal_largest, proposal_squares, proposal_score)
        counts = inside & tl.load(mask_ptr + at, mask=inside, other=0) if HAS_MASK else inside
        log_q = log_ratio(
            z, score, proposal, proposal_score, largest, squares, proposal_largest, proposal_squares, counts,
            threshold, step_size, NORM, FAST,
        )  # fmt: skip
    else:
        if NORM == CHAIN:
            for begin in range(0, size, COLS):
                at, inside = base + begin + column, present & (begin + column < size)
                score, proposal_score = read(score_ptr, at, inside), read(proposal_score_ptr, at, inside)
                largest, squares = accumulate(largest, squares, score)
                proposal_largest, proposal_squares = accumulate(proposal_largest, proposal_squares, proposal_score)
        for begin in range(0, size, COLS):
            at, inside = base + begin + column, present & (begin + column < size)
            z, score = read(z_ptr, at, inside), read(score_ptr, at, inside)
            proposal, proposal_score = read(proposal_ptr, at, inside), read(proposal_score_ptr, at, inside)
            counts = inside & tl.load(mask_ptr + at, mask=inside, other=0) if HAS_MASK else inside
            log_q += log_ratio(
                z, score, proposal, proposal_score, largest, squares, proposal_largest, proposal_squares, counts,
                threshold, step_size, NORM, FAST,
            )  # fmt: skip

    energy = tl.load(energy_ptr + row, mask=exists, other=0.0)
    proposal_energy = tl.load(proposal_energy_ptr + row, mask=exists, other=0.0)
    uniform = element_uniforms(seed, step, ACCEPTANCE_STREAM, offset + row, FAST)
    log_alpha = energy - proposal_energy + log_q
    finite = tl.abs(log_alpha) < INF  # which NaN is not
    accepted = finite & (tl.log(uniform) < log_alpha)
    tl.store(energy_out_ptr + row, tl.where(accepted, proposal_energy, energy), mask=exists)
    tl.store(acceptance_ptr + row, tl.where(finite, tl.exp(tl.minimum(log_alpha, 0.0)), 0.0), mask=exists)
    largest = tl.where(accepted, proposal_largest, largest)
    squares = tl.where(accepted, proposal_squares, squares)

    for begin in range(0, COLS if SINGLE else size, COLS):
        at, inside = base + begin + column, present & (begin + column < size)
        if SINGLE:
            new_z, new_score = tl.where(accepted, proposal, z), tl.where(accepted, proposal_score, score)
        else:
            new, old = inside & accepted, inside & (accepted == 0)
            new_z = tl.where(accepted, read(proposal_ptr, at, new), read(z_ptr, at, old))
            new_score = tl.where(accepted, read(proposal_score_ptr, at, new), read(score_ptr, at, old))
        tl.store(z_out_ptr + at, new_z.to(z_out_ptr.dtype.element_ty), mask=inside)
        tl.store(score_out_ptr + at, new_score.to(score_out_ptr.dtype.element_ty), mask=inside)
        _, root, drift = gain(new_score, largest, squares, threshold, NORM)
        noise = tile_normals(seed, step + 1, first, base, begin, ALIGN, LANES, COLS, FAST)
        store_moved(
            next_ptr, mask_ptr, at, inside, new_z, drift, root, noise, step_size, 1.0, 0.0, 0.0, HAS_MASK, False
        )


def launch(
    z, score, energy, proposal, proposal_score, proposal_energy, out, *, chains, channels, size, norm, mask, threshold,
    step_size, seed, step, offset, fast,
):  # fmt: skip
    """Launch over contiguous tensors, states of one dtype (chains, channels, size) and float32 energies (chains,).

    out: the tensors to fill, as reference.Metropolis has them. norm: "channel"; or "element", "chain" with channels 1.
    threshold and step_size are floats, seed and step int64-valued ints, or any of them a 0-dim tensor.
    """
    tile = tile_of(channels, size, norm)
    _launch_metropolis(
        programs(chains, tile.rows),
        (
            z, score, energy, proposal, proposal_score, proposal_energy, mask, *out,
            chains, channels, size // step_rows.alignment(size), offset, threshold, step_size, seed, step,
        ),
        dict(
            THRESHOLD_PTR=is_tensor(threshold), STEP_SIZE_PTR=is_tensor(step_size),
            SEED_PTR=is_tensor(seed), STEP_PTR=is_tensor(step),
            HAS_MASK=mask is not None, FAST=fast, **step_rows.constants(tile, size, norm),
        ),
        num_warps=tile.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


_launch_metropolis = Launcher(metropolis_kernel)
