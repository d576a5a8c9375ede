"""What several kernels share: numbers that may be pointers, gains, and norms."""

import triton
import triton.language as tl

LANGEVIN_STREAM = tl.constexpr(0)


@triton.jit
def scalar(x, IS_POINTER: tl.constexpr, dtype: tl.constexpr):
    """A number (a constant of the launch) or a pointer to one (free to change under a captured graph)."""
    if IS_POINTER:
        return tl.load(x).to(dtype)
    else:
        return tl.full((), x, dtype)


@triton.jit
def element_gain(score, threshold):
    """(sqrt(gamma), gamma * score) where each element stands for itself."""
    ratio = tl.abs(score) * tl.minimum(1.0 / threshold, 3.4028234663852886e38)  # finite, or a score of 0 is NaN
    root = tl.rsqrt(tl.maximum(ratio, 1.0, propagate_nan=tl.PropagateNan.ALL))
    return root, tl.clamp(score, -threshold, threshold, propagate_nan=tl.PropagateNan.ALL)


def is_tensor(x) -> bool:
    return hasattr(x, "data_ptr")


ELEMENT, CHANNEL, CHAIN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

NORMS = {"element": 0, "channel": 1, "chain": 2}

INF = tl.constexpr(float("inf"))


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
def accumulate(largest, squares, score, NORM: tl.constexpr):
    """Take a tile into (largest |score|, sum of squares over scale**2), over channels or over whole chains."""
    size = tl.abs(score)
    here = tl.max(size, 1, keep_dims=True) if NORM == CHANNEL else tl.max(by_chain(size), 1)[:, None, None]
    before, _ = scaling(largest)
    here = tl.maximum(here, largest)
    _, inverse = scaling(here)
    unit = scaled(score, inverse)
    added = tl.sum(unit * unit, 1, keep_dims=True) if NORM == CHANNEL else chain_sum(unit * unit)
    change = tl.where(here > largest, before * inverse, 1.0)
    return here, squares * change * change + added


@triton.jit
def by_chain(x):
    """(ROWS, N, M) -> (ROWS, N * M)"""
    return tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2]))


@triton.jit
def chain_sum(x):
    """(ROWS, N, M) -> (ROWS, 1, 1)"""
    return tl.sum(by_chain(x), 1)[:, None, None]


@triton.jit
def shared_gain(score, largest, squares, threshold):
    """(|s| / b, sqrt(gamma), gamma * score) from what `accumulate` found; the first two have its shape."""
    scale, inverse = scaling(largest)
    length = tl.sqrt(squares)
    ratio = scale * tl.minimum(1.0 / threshold, 3.4028234663852886e38) * length
    root = tl.rsqrt(tl.maximum(ratio, 1.0, propagate_nan=tl.PropagateNan.ALL))
    return ratio, root, tl.where(ratio <= 1.0, score, scaled(score, inverse) * (threshold / length))
