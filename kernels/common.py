"""What several kernels share: numbers that may be pointers, norms and gains, the move, and the ratio of two moves.

With b the threshold, stretch = max(1, |s| / b) is 1 / gamma, root the square root of gamma, and drift gamma s, which is
written so that it stays finite however large the score. Every minimum and maximum lets NaN through: a broken energy
must show.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

LANGEVIN_STREAM = tl.constexpr(0)
ACCEPTANCE_STREAM = tl.constexpr(1)

#: What |s| is: of each element, of a pixel's channels, of the whole chain.
ELEMENT, CHANNEL, CHAIN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NORMS = {"element": 0, "channel": 1, "chain": 2}

INF = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)  #: a finite float32


@triton.jit
def scalar(x, IS_POINTER: tl.constexpr, dtype: tl.constexpr):
    """A number (a constant of the launch) or a pointer to one (free to change under a captured graph)."""
    if IS_POINTER:
        return tl.load(x).to(dtype)
    else:
        return tl.full((), x, dtype)


def is_tensor(x) -> bool:
    return hasattr(x, "data_ptr")


# ---------------------------------------------------------------------------------------------------- norms and gains


@triton.jit
def scaling(largest):
    """(scale, 1 / scale): dividing by the scale brings the largest element to 4, so that neither number underflows."""
    scale = tl.maximum(0.25 * largest, 1.1754943508222875e-38)
    return scale, 1.0 / scale


@triton.jit
def scaled(score, inverse):
    # infinite elements are taken for equally large ones, beside which the finite ones vanish: their inverse is 0
    return tl.where(tl.abs(score) == INF, tl.clamp(score, -1.0, 1.0), score * inverse)


@triton.jit
def norm_over(score):
    """(largest |s|, sum of squares over its scale**2) along axis 1, which keeps a size of 1.

    |s| itself, whose square may be too large or too small for a float, is left to `shared_gain`.
    """
    largest = tl.max(tl.abs(score), 1, keep_dims=True)
    _, inverse = scaling(largest)
    unit = scaled(score, inverse)
    return largest, tl.sum(unit * unit, 1, keep_dims=True)


@triton.jit
def accumulate(largest, squares, score):
    """Take a tile (ROWS, N, M) into what `norm_over` would find along all of a chain, (ROWS, 1, 1).

    Scaled by the largest so far. With `norm_over` of each tile, joined after, a chain takes a tenth more instructions.
    """
    before, _ = scaling(largest)
    here = tl.maximum(tl.max(by_chain(tl.abs(score)), 1)[:, None, None], largest)
    _, inverse = scaling(here)
    unit = scaled(score, inverse)
    change = tl.where(here > largest, before * inverse, 1.0)
    return here, squares * change * change + chain_sum(unit * unit)


@triton.jit
def by_chain(x):
    """(ROWS, N, M) -> (ROWS, N * M)"""
    return tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2]))


@triton.jit
def chain_sum(x):
    """(ROWS, N, M) -> (ROWS, 1, 1)"""
    return tl.sum(by_chain(x), 1)[:, None, None]


@triton.jit
def element_gain(score, threshold):
    """(stretch, root, drift) where each element stands for itself."""
    ratio = tl.abs(score) * tl.minimum(1.0 / threshold, LARGEST)  # finite, or a score of 0 is NaN
    stretch = tl.maximum(ratio, 1.0, propagate_nan=tl.PropagateNan.ALL)
    drift = tl.clamp(score, -threshold, threshold, propagate_nan=tl.PropagateNan.ALL)
    return stretch, tl.rsqrt(stretch), drift


@triton.jit
def shared_gain(score, largest, squares, threshold):
    """(stretch, root, drift) from what `norm_over` or `accumulate` found; the first two have its shape."""
    scale, inverse = scaling(largest)
    length = tl.sqrt(squares)
    ratio = scale * tl.minimum(1.0 / threshold, LARGEST) * length
    stretch = tl.maximum(ratio, 1.0, propagate_nan=tl.PropagateNan.ALL)
    root = tl.rsqrt(stretch)
    return stretch, root, tl.where(ratio <= 1.0, score, scaled(score, inverse) * (threshold / length))


# ----------------------------------------------------------------------------------------------------------- the move


@triton.jit
def moved(z, drift, root, noise, step_size, noise_scale, low, high, HAS_BOUNDS: tl.constexpr):
    out = z + (0.5 * step_size) * drift + (noise_scale * tl.sqrt(step_size)) * root * noise
    if HAS_BOUNDS:
        out = tl.clamp(out, low, high, propagate_nan=tl.PropagateNan.ALL)
    return out


@triton.jit
def log_ratio_terms(
    change, stretch, drift, stretch_back, drift_back, step_size, SHARED: tl.constexpr, FAST: tl.constexpr
):
    """Each element's term of log q(z | z') - log q(z' | z), with change = z' - z, and back at z':

        stretch (change - eps/2 drift)^2 / (2 eps) - stretch' (change + eps/2 drift')^2 / (2 eps)
            + (log stretch' - log stretch) / 2

    SHARED: several elements have one stretch.
    """
    forth = change - (0.5 * step_size) * drift
    back = change + (0.5 * step_size) * drift_back
    # Both are positive anyway. Without the magnitudes the compiler fuses one product into the difference, where it is
    # not rounded: then equal terms no longer cancel, and the way back is no longer the exact negative.
    squared = tl.abs(stretch * forth * forth) - tl.abs(stretch_back * back * back)
    ROUGH: tl.constexpr = FAST and not SHARED  # the logarithm's error counts once for each element that shares it
    logs = 0.34657359027997264 * (log2(stretch_back, ROUGH) - log2(stretch, ROUGH))  # ln 2 / 2
    return (0.5 / step_size) * squared + logs


@triton.jit
def log2(x, FAST: tl.constexpr):
    if FAST:
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)
