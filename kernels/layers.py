"""A network's layers on chip: weights as tiles, products, activations and features. mlp.py puts them together."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def backward_matrix(
    ptr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS_P2: tl.constexpr, COLUMNS_P2: tl.constexpr,
):  # fmt: skip
    """A layer's weight as torch stores it, (ROWS, COLUMNS) = (out, in) with rows STRIDE apart, zeros beyond."""
    i, j = tl.arange(0, ROWS_P2)[:, None], tl.arange(0, COLUMNS_P2)[None, :]
    if ROWS == ROWS_P2 and COLUMNS == COLUMNS_P2:
        return tl.load(ptr + i * STRIDE + j)
    else:
        return tl.load(ptr + i * STRIDE + j, mask=(i < ROWS) & (j < COLUMNS), other=0.0)


@triton.jit
def forward_matrix(
    ptr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS_P2: tl.constexpr, COLUMNS_P2: tl.constexpr,
):  # fmt: skip
    """The same weight transposed, (COLUMNS_P2, ROWS_P2) = (in, out)."""
    i, j = tl.arange(0, COLUMNS_P2)[:, None], tl.arange(0, ROWS_P2)[None, :]
    if ROWS == ROWS_P2 and COLUMNS == COLUMNS_P2:
        return tl.load(ptr + j * STRIDE + i)
    else:
        return tl.load(ptr + j * STRIDE + i, mask=(i < COLUMNS) & (j < ROWS), other=0.0)


@triton.jit
def vector(ptr, SIZE: tl.constexpr, SIZE_P2: tl.constexpr):
    """ptr (SIZE,) -> (1, SIZE_P2), zeros beyond."""
    j = tl.arange(0, SIZE_P2)
    return tl.load(ptr + j, mask=j < SIZE, other=0.0)[None, :]


@triton.jit
def product(h, w):
    return tl.dot(h, w, input_precision="ieee")


@triton.jit
def sine_cosine(phase, FAST: tl.constexpr):
    """Of phases up to many thousands, to 1e-6: reduced to [-pi, pi] exactly, since the fast ones err far from 0."""
    turns = tl.floor(phase * 0.15915494309189535 + 0.5)
    angle = tl.fma(turns, -6.28125, phase)  # 2 pi in three parts, of which the first two have few bits
    angle = tl.fma(turns, -0.0019350051879882812, angle)
    angle = tl.fma(turns, -3.0199159819567725e-07, angle)
    if FAST:
        return libdevice.fast_sinf(angle), libdevice.fast_cosf(angle)
    else:
        return tl.sin(angle), tl.cos(angle)


@triton.jit
def activated(y, leak, SILU: tl.constexpr, WIDTH: tl.constexpr):
    """The activation of y (ROWS, WIDTH_P2) and its derivative. Units beyond WIDTH are 0, also beside infinite ones."""
    if SILU:
        gate = tl.sigmoid(y)
        h, slope = y * gate, gate * (1.0 + y * (1.0 - gate))
    else:
        h, slope = tl.where(y > 0.0, y, leak * y), tl.where(y > 0.0, 1.0, leak)
    if y.shape[1] != WIDTH:
        own = tl.arange(0, y.shape[1])[None, :] < WIDTH
        h, slope = tl.where(own, h, 0.0), tl.where(own, slope, 0.0)
    return h, slope


@triton.jit
def head_matrix(ptr, SIZE: tl.constexpr, SIZE_P2: tl.constexpr, DIM_P2: tl.constexpr):
    """ptr (SIZE,) -> (SIZE_P2, DIM_P2), its first column; zeros beyond."""
    i, j = tl.arange(0, SIZE_P2)[:, None], tl.arange(0, DIM_P2)[None, :]
    return tl.load(ptr + i + j, mask=(i < SIZE) & (j == 0), other=0.0)


@triton.jit
def through(h, w):
    """h @ w, of (ROWS, N) and (N, DIM_P2). Threads of a warp hold different chains and columns; warps share the sum.

    The sum is over the first axis: of one over the middle axis Triton 3.6 makes a tl.dot in TF32, with 10 bits.
    """
    return tl.sum(tl.trans(h)[:, :, None] * w[:, None, :], axis=0)


@triton.jit
def network_energy(h, head, head_bias, x, confinement):
    """(ROWS,), of the last layer's units h (ROWS, WIDTH_P2) at x (ROWS, DIM_P2), head as `head_matrix` has it.

    A product like the score's, so that energies lie in the same threads as scores. Summed where h lies, Triton would
    keep the state there as well, and draw all noise twice.
    """
    return tl.sum(through(h, head) + 0.5 * confinement * (x * x), axis=1) + head_bias
