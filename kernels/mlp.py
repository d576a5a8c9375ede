"""Whole chains on the energy of a multilayer perceptron, one launch: forward pass, gradient and transition on chip.

The network is models/energies.py's MLP: x or the sines and cosines of its random projections, then DEPTH hidden layers
of WIDTH units, then one output, plus c/2 |x|^2. A program moves ROWS chains together, so that a weight read serves them
all. Weight matrices lie in shared memory, both ways round, for the whole launch (``HELD``), as far as they fit; the
rest is read from the caches at every transition. Products are tl.dot in full float32, which NVIDIA GPUs do by fused
multiply-adds, not on tensor cores.
"""

import functools

import triton
import triton.language as tl

from .common import LANGEVIN_STREAM
from .launching import Launcher, programs
from .layers import (
    activated,
    backward_matrix,
    forward_matrix,
    head_matrix,
    network_energy,
    product,
    sine_cosine,
    through,
    vector,
)
from .philox import element_normals
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


@triton.jit(do_not_specialize=["chains", "steps", "seed", "step", "offset"])
def mlp_kernel(
    z_ptr, w0_ptr, b0_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, head_ptr, head_bias_ptr, projections_ptr,
    out_ptr, statistics_ptr, confinement: tl.float32, leak: tl.float32, chains: tl.int64,
    steps: tl.int32, threshold, step_size, noise_scale, seed, step, offset: tl.int64, low: tl.float32, high: tl.float32,
    THRESHOLD_PTR: tl.constexpr, STEP_SIZE_PTR: tl.constexpr, NOISE_SCALE_PTR: tl.constexpr,
    SEED_PTR: tl.constexpr, STEP_PTR: tl.constexpr, ADJUSTED: tl.constexpr, CHAIN_NORM: tl.constexpr,
    FROZEN: tl.constexpr, HAS_BOUNDS: tl.constexpr, FAST: tl.constexpr, SILU: tl.constexpr, DIM: tl.constexpr,
    DIM_P2: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P2: tl.constexpr, DEPTH: tl.constexpr, FEATURES: tl.constexpr,
    FEATURES_P2: tl.constexpr, ROWS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """``steps`` transitions of chains z (chains, DIM).

    w0 (WIDTH, DIM or 2 FEATURES), w1 and w2 (WIDTH, WIDTH), b0..b2 and head (WIDTH,), projections (FEATURES, DIM), all
    as torch stores them. HELD counts the matrices that stay on chip, in the order in which they appear below. ADJUSTED
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
    k = (offset + rows)[:, None] * DIM + tl.arange(0, DIM_P2)[None, :]

    bias0, head = vector(b0_ptr, WIDTH, WIDTH_P2), vector(head_ptr, WIDTH, WIDTH_P2)
    head_bias = tl.load(head_bias_ptr)
    if ADJUSTED:
        head_column = head_matrix(head_ptr, WIDTH, WIDTH_P2, DIM_P2)
    if DEPTH > 1:
        bias1 = vector(b1_ptr, WIDTH, WIDTH_P2)
        if HELD > 0:
            backward1 = backward_matrix(w1_ptr, WIDTH, WIDTH, WIDTH, WIDTH_P2, WIDTH_P2)
        if HELD > 1:
            forward1 = forward_matrix(w1_ptr, WIDTH, WIDTH, WIDTH, WIDTH_P2, WIDTH_P2)
    if DEPTH > 2:
        bias2 = vector(b2_ptr, WIDTH, WIDTH_P2)
        if HELD > 2:
            backward2 = backward_matrix(w2_ptr, WIDTH, WIDTH, WIDTH, WIDTH_P2, WIDTH_P2)
        if HELD > 3:
            forward2 = forward_matrix(w2_ptr, WIDTH, WIDTH, WIDTH, WIDTH_P2, WIDTH_P2)
    F: tl.constexpr = 2 * FEATURES  # w0 reads the sines, then the cosines
    HIDDEN: tl.constexpr = 2 * (DEPTH - 1)
    if FEATURES > 0:
        inward = forward_matrix(projections_ptr, DIM, FEATURES, DIM, FEATURES_P2, DIM_P2)
        outward = backward_matrix(projections_ptr, DIM, FEATURES, DIM, FEATURES_P2, DIM_P2)
        if HELD > HIDDEN:
            to_sine = backward_matrix(w0_ptr, F, WIDTH, FEATURES, WIDTH_P2, FEATURES_P2)
        if HELD > HIDDEN + 1:
            to_cosine = backward_matrix(w0_ptr + FEATURES, F, WIDTH, FEATURES, WIDTH_P2, FEATURES_P2)
        if HELD > HIDDEN + 2:
            of_sine = forward_matrix(w0_ptr, F, WIDTH, FEATURES, WIDTH_P2, FEATURES_P2)
        if HELD > HIDDEN + 3:
            of_cosine = forward_matrix(w0_ptr + FEATURES, F, WIDTH, FEATURES, WIDTH_P2, FEATURES_P2)
    else:
        inward = forward_matrix(w0_ptr, DIM, WIDTH, DIM, WIDTH_P2, DIM_P2)
        outward = backward_matrix(w0_ptr, DIM, WIDTH, DIM, WIDTH_P2, DIM_P2)

    for j in range(steps + 1 if ADJUSTED else steps):
        # The network, keeping the derivatives of its activations.
        y = through(x, inward)
        if FEATURES > 0:
            sine, cosine = sine_cosine(y, FAST)
            if HELD <= HIDDEN + 2:
                of_sine = forward_matrix(w0_ptr, F, WIDTH, FEATURES, WIDTH_P2, FEATURES_P2)
            y = product(sine, of_sine)
            if HELD <= HIDDEN + 3:  # not before the product, so that the two take turns in shared memory
                of_cosine = forward_matrix(w0_ptr + FEATURES, F, WIDTH, FEATURES, WIDTH_P2, FEATURES_P2)
            y += product(cosine, of_cosine)
        h, slope0 = activated(y + bias0, leak, SILU, WIDTH)
        if DEPTH > 1:
            if HELD <= 1:
                forward1 = forward_matrix(w1_ptr, WIDTH, WIDTH, WIDTH, WIDTH_P2, WIDTH_P2)
            h, slope1 = activated(product(h, forward1) + bias1, leak, SILU, WIDTH)
        if DEPTH > 2:
            if HELD <= 3:
                forward2 = forward_matrix(w2_ptr, WIDTH, WIDTH, WIDTH, WIDTH_P2, WIDTH_P2)
            h, slope2 = activated(product(h, forward2) + bias2, leak, SILU, WIDTH)

        # Its gradient, from the output back.
        back = head
        if DEPTH > 2:
            if HELD <= 2:
                backward2 = backward_matrix(w2_ptr, WIDTH, WIDTH, WIDTH, WIDTH_P2, WIDTH_P2)
            back = product(back * slope2, backward2)
        if DEPTH > 1:
            if HELD <= 0:
                backward1 = backward_matrix(w1_ptr, WIDTH, WIDTH, WIDTH, WIDTH_P2, WIDTH_P2)
            back = product(back * slope1, backward1)
        back = back * slope0
        if FEATURES > 0:
            if HELD <= HIDDEN:
                to_sine = backward_matrix(w0_ptr, F, WIDTH, FEATURES, WIDTH_P2, FEATURES_P2)
            along = product(back, to_sine) * cosine
            if HELD <= HIDDEN + 1:
                to_cosine = backward_matrix(w0_ptr + FEATURES, F, WIDTH, FEATURES, WIDTH_P2, FEATURES_P2)
            back = along - product(back, to_cosine) * sine
        x_score = -(through(back, outward) + confinement * x)

        noise = element_normals(seed, step + j, LANGEVIN_STREAM, k, FAST)
        if ADJUSTED:
            x, z, energy, score, stretch, drift = adjusted_transition(
                x, network_energy(h, head_column, head_bias, x, confinement), x_score, z, energy, score, stretch, drift,
                j, steps, noise, statistics_ptr, rows, chains, threshold, step_size, seed, step, offset,
                CHAIN_NORM, FAST, DIM,
            )  # fmt: skip
        else:
            before = x
            x, stretch = transition(
                x, x_score, stretch, j, noise, threshold, step_size, noise_scale, low, high,
                CHAIN_NORM, FROZEN, HAS_BOUNDS, DIM,
            )  # fmt: skip
            if j + 1 == steps:
                head_column = head_matrix(head_ptr, WIDTH, WIDTH_P2, DIM_P2)
                seen = network_energy(h, head_column, head_bias, before, confinement)
                store_statistics(statistics_ptr, rows, chains, seen, stretch, x_score, DIM)
    if ADJUSTED:
        tl.store(out_ptr + at, z, mask=inside)
    else:
        tl.store(out_ptr + at, x, mask=inside)
        store_acceptance(statistics_ptr, rows, chains, 1.0)


# ----------------------------------------------------------------------------------------------------------- launching


#: Programs that fill a large GPU (an H100 has 132 multiprocessors); beyond them, programs take more rows.
PROGRAMS = 132


def mlp_constants(dim: int, width: int, depth: int, features: int, chains: int, shared: int) -> tuple[dict, int] | None:
    """The sizes a launch is compiled for, and its warps: a function of shapes and of the machine's shared memory.

    Few chains want few rows a program, for latency. Many want as many as registers bear without spilling: fewer with
    features, and where matrices pass through registers at every transition. None where not one matrix fits.
    """
    found = _mlp_constants(dim, width, depth, features, chains, shared)
    return found and (dict(found[0]), found[1])  # a copy, which the caller may add to


@functools.lru_cache(maxsize=64)
def _mlp_constants(dim, width, depth, features, chains, shared):
    width_p2 = max(16, triton.next_power_of_2(width))  # tl.dot's smallest
    features_p2 = max(16, triton.next_power_of_2(features)) if features else 0
    hidden, first = width_p2 * width_p2, features_p2 * width_p2
    matrices = [4 * hidden] * (2 * (depth - 1)) + [4 * first] * (4 if features else 0)
    rows = min(8 if features else 16, triton.next_power_of_2(triton.cdiv(max(chains, 1), PROGRAMS)))
    held = _held(matrices, shared - _scratch(rows, width_p2, features_p2))
    if held < len(matrices):
        rows = min(4, rows)
        held = _held(matrices, shared - _scratch(rows, width_p2, features_p2))
    if held < 0:
        return None
    # layers of 64 units: on an H200 8 warps take 1.05 to 1.2 times as long as 4
    warps = 8 if rows > 2 and max(width_p2, features_p2) > 64 else 4
    constants = dict(
        DIM=dim, DIM_P2=triton.next_power_of_2(dim), WIDTH=width, WIDTH_P2=width_p2, DEPTH=depth,
        FEATURES=features, FEATURES_P2=features_p2, ROWS=rows, HELD=held,
    )  # fmt: skip
    return constants, warps


def _held(matrices: list[int], room: int) -> int:
    """How many of the matrices, sizes in bytes, fit beside the largest of the others; -1 if that one does not fit."""
    for held in range(len(matrices), -1, -1):
        if sum(matrices[:held]) + max(matrices[held:], default=0) <= room:
            return held
    return -1


def _scratch(rows: int, width_p2: int, features_p2: int) -> int:
    """Bytes through which the operands of products and reductions pass."""
    return 4 * rows * (width_p2 + 2 * features_p2) + 8192


def launch_mlp(
    z, weights, biases, head, head_bias, projections, out, statistics,
    *, confinement, leak, adjusted, bounds, frozen, chain_norm, fast, shared, **numbers,
):  # fmt: skip
    """Launch over contiguous float32 tensors: z and out (B, D), statistics (5, B), the network's as torch stores them.

    ``leak``: the slope of a leaky ReLU, None for SiLU. ``shared``: bytes of shared memory that a program may take.
    ``numbers`` as for `launch_mixture`.
    """
    chains, dim = z.shape
    depth = len(weights)
    sizes = mlp_constants(dim, len(weights[0]), depth, len(projections), chains, shared)
    if sizes is None:
        raise ValueError(f"weights must fit {shared} bytes of shared memory, got layers of {len(weights[0])} units")
    constants, warps = sizes
    layers = [x for pair in zip(weights, biases, strict=True) for x in pair] + [None] * (6 - 2 * depth)
    _launch(
        programs(chains, constants["ROWS"]),
        (
            z, *layers, head, head_bias, projections if len(projections) else None, out, statistics,
            confinement, 0.0 if leak is None else leak, chains, *launch_numbers(bounds, **numbers),
        ),
        dict(
            **launch_constants(adjusted, bounds, frozen, chain_norm, fast, **numbers), SILU=leak is None, **constants,
        ),
        num_warps=warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


_launch = Launcher(mlp_kernel)


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory that one program may take on that device."""
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
