"""The anisotropic Langevin step, fused: one pass over score and chains, noise drawn in registers.

The definition is fastanila.ops.reference.anisotropic_step. Per element, with b the threshold, eps the step size and
sigma the noise scale,

    root = rsqrt(max(1, |s| / b))                                     the square root of gamma
    z'   = z + eps/2 clip(s, -b, b) + sigma sqrt(eps) root noise

which needs neither a division nor a square root an element, and moves infinite scores by eps b / 2.
Memory bound by construction: z and score are read once, z' written once, 16 bytes an access.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .common import LANGEVIN_STREAM, element_gain, is_tensor, moved, scalar
from .launching import Launcher, programs
from .philox import four_normals, interleave


class Configuration(NamedTuple):
    block: int  #: elements a program
    warps: int


#: What `launch` takes: 8 elements a thread. With 16 a thread needs a sixth fewer instructions an element, but three
#: times the registers, so that fewer threads hide what the others wait for. On an H200 bfloat16 reaches 0.90 of the
#: speed of a copy with 8 and 0.84 with 16; float32 all of it with either (bench/RESULTS.md, "The step's launch").
CONFIGURATION = Configuration(1024, 4)


@triton.jit
def block_normals(seed, step, quad, LANE: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr):
    """BLOCK consecutive normals from element 4 quad + LANE on, laid out so that a thread holds LANES in a row."""
    q = quad + tl.arange(0, BLOCK // LANES).to(tl.int64) * (LANES // 4)
    lanes = four_normals(seed, step, LANGEVIN_STREAM, q, FAST)
    if LANES == 8:
        lanes = lanes + four_normals(seed, step, LANGEVIN_STREAM, q + 1, FAST)
    if LANE > 0:  # the elements straddle the counters: draw one quad more and shift
        lanes = (lanes + four_normals(seed, step, LANGEVIN_STREAM, q + LANES // 4, FAST))[LANE : LANE + LANES]
    return interleave(lanes, LANES)


@triton.jit
def block_mask(mask_ptr, begin, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """The BLOCK bools from ``begin`` on, read LANES at a time into the threads that hold those elements.

    Read as bytes, Triton would let a thread load 16 in a row and exchange them through shared memory.
    """
    WORD: tl.constexpr = tl.int32 if LANES == 4 else tl.int64
    at = begin // LANES + tl.arange(0, BLOCK // LANES)
    word = tl.load(mask_ptr.to(tl.pointer_type(WORD)) + at)
    if LANES == 4:
        lanes = (word & 0x1, word & 0x100, word & 0x10000, word & 0x1000000)
    else:
        low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
        lows = (low & 0x1, low & 0x100, low & 0x10000, low & 0x1000000)
        lanes = lows + (high & 0x1, high & 0x100, high & 0x10000, high & 0x1000000)  # noqa: RUF005
    return interleave(lanes, LANES) != 0


@triton.jit
def step_block(
    z_ptr, score_ptr, gamma_ptr, mask_ptr, out_ptr, begin, n, first_quad,
    threshold, step_size, noise_scale, seed, step, low, high,
    LANE: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BOUNDS: tl.constexpr,
    FAST: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    at = begin + tl.arange(0, BLOCK)
    inside = at < n if RAGGED else None
    z = tl.load(z_ptr + at, mask=inside).to(tl.float32)
    score = tl.load(score_ptr + at, mask=inside).to(tl.float32)
    LANES: tl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    noise = block_normals(seed, step, first_quad + begin // 4, LANE, LANES, BLOCK, FAST)

    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr + at, mask=inside).to(tl.float32)
        root, drift = tl.sqrt(gamma), gamma * score
    else:
        _, root, drift = element_gain(score, threshold)
    out = moved(z, drift, root, noise, step_size, noise_scale, low, high, HAS_BOUNDS)
    if HAS_MASK:
        chosen = tl.load(mask_ptr + at, mask=inside) if RAGGED else block_mask(mask_ptr, begin, LANES, BLOCK)
        out = tl.where(chosen, out, z)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


# mask_ptr: if Triton knew that it is aligned, a thread would load four words in a row, and the threads would exchange
# them through shared memory.
@triton.jit(do_not_specialize=["n", "first_quad", "seed", "step"], do_not_specialize_on_alignment=["mask_ptr"])
def anisotropic_step_kernel(
    z_ptr, score_ptr, gamma_ptr, mask_ptr, out_ptr, n: tl.int64, first_quad: tl.int64,
    threshold, step_size, noise_scale, seed, step, low: tl.float32, high: tl.float32,
    THRESHOLD_PTR: tl.constexpr, STEP_SIZE_PTR: tl.constexpr, NOISE_SCALE_PTR: tl.constexpr,
    SEED_PTR: tl.constexpr, STEP_PTR: tl.constexpr, LANE: tl.constexpr,
    HAS_GAMMA: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BOUNDS: tl.constexpr,
    FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements 0 .. n of a contiguous chain batch whose element 0 is element 4 first_quad + LANE of the stream."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    threshold = scalar(threshold, THRESHOLD_PTR, tl.float32)
    step_size = scalar(step_size, STEP_SIZE_PTR, tl.float32)
    noise_scale = scalar(noise_scale, NOISE_SCALE_PTR, tl.float32)
    seed = scalar(seed, SEED_PTR, tl.int64)
    step = scalar(step, STEP_PTR, tl.int64)
    # Masked accesses are scalar where n is not a multiple of 16, so only the last block is masked.
    if begin + BLOCK <= n:
        step_block(
            z_ptr, score_ptr, gamma_ptr, mask_ptr, out_ptr, begin, n, first_quad,
            threshold, step_size, noise_scale, seed, step, low, high,
            LANE, HAS_GAMMA, HAS_MASK, HAS_BOUNDS, FAST, BLOCK, RAGGED=False,
        )  # fmt: skip
    else:
        step_block(
            z_ptr, score_ptr, gamma_ptr, mask_ptr, out_ptr, begin, n, first_quad,
            threshold, step_size, noise_scale, seed, step, low, high,
            LANE, HAS_GAMMA, HAS_MASK, HAS_BOUNDS, FAST, BLOCK, RAGGED=True,
        )  # fmt: skip


def launch(z, score, out, *, gamma, mask, threshold, step_size, noise_scale, seed, step, first, bounds, fast):
    """Launch over contiguous tensors of one dtype and shape; ``first`` is the stream's element of z's element 0.

    threshold, step_size and noise_scale are floats, seed and step int64-valued ints, or any of them a 0-dim tensor.
    """
    n = z.numel()
    low, high = bounds if bounds is not None else (0.0, 0.0)
    block, warps = CONFIGURATION
    _launch_step(
        programs(n, block),
        (z, score, gamma, mask, out, n, first // 4, threshold, step_size, noise_scale, seed, step, low, high),
        dict(
            THRESHOLD_PTR=is_tensor(threshold), STEP_SIZE_PTR=is_tensor(step_size),
            NOISE_SCALE_PTR=is_tensor(noise_scale), SEED_PTR=is_tensor(seed), STEP_PTR=is_tensor(step), LANE=first % 4,
            HAS_GAMMA=gamma is not None, HAS_MASK=mask is not None, HAS_BOUNDS=bounds is not None,
            FAST=fast, BLOCK=block,
        ),
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip


_launch_step = Launcher(anisotropic_step_kernel)
