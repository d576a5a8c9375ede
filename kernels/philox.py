"""The noise stream in Triton: the twin of fastanila.noise, where it is defined (Philox4x32-10 and Box-Muller).

``FAST`` picks the GPU's approximate log2, sin and cos (NVIDIA only); without it the same algebra runs on Triton's
own, which the interpreter and AMD have as well. The integers are bit for bit those of fastanila.noise either way.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def mulhilo(a, b: tl.constexpr):
    # One 64-bit product gives both halves in one IMAD.WIDE; umulhi and a second multiply would take two.
    product = a.to(tl.uint64) * tl.full((), b, tl.uint64)
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011): c0 (N,) and c1..c3, k0, k1 broadcastable uint32 -> four (N,) uint32."""
    for _ in tl.static_range(10):
        hi0, lo0 = mulhilo(c0, 0xD2511F53)
        hi1, lo1 = mulhilo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def halves(x, FAST: tl.constexpr):
    """The low and the high word of an int64, as uint32."""
    if FAST:
        # Opaque to LLVM, which else carries truncated 64-bit values through two rounds, an addition of 0 a product.
        return tl.inline_asm_elementwise(
            "mov.b64 {$0, $1}, $2;", "=r,=r,l", [x], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
    else:
        bits = x.to(tl.uint64, bitcast=True)
        return bits.to(tl.uint32), (bits >> 32).to(tl.uint32)


@triton.jit
def words(seed, step, stream: tl.constexpr, quad, FAST: tl.constexpr = False):
    """The four words of counter ``quad`` (int64 of any shape): seed and step are int64 scalars."""
    k0, k1 = halves(seed, FAST)
    t0, t1 = halves(step, FAST)
    q0, q1 = halves(quad, FAST)
    zero = q0 * 0
    c3 = t1 * 256 + stream  # this order: a constexpr swallows a tensor on its right
    return philox(q0, q1, t0 + zero, c3 + zero, k0, k1)


@triton.jit
def box_muller(r_even, r_odd, FAST: tl.constexpr):
    u = tl.fma(r_even.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # (r + 0.5) / 2**32
    theta = r_odd.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2**32
    if FAST:
        # lg2.approx may round to a tiny positive number just below u = 1, of which the root would be NaN
        rho = tl.sqrt(tl.maximum(libdevice.fast_log2f(u) * -1.3862943611198906, 0.0))
        return rho * libdevice.fast_cosf(theta), rho * libdevice.fast_sinf(theta)
    else:
        rho = tl.sqrt(tl.log2(u) * -1.3862943611198906)  # -2 ln 2
        return rho * tl.cos(theta), rho * tl.sin(theta)


@triton.jit
def four_normals(seed, step, stream: tl.constexpr, quad, FAST: tl.constexpr):
    """The normals of elements 4 quad .. 4 quad + 3: quad (N,) int64 -> four (N,) float32."""
    r0, r1, r2, r3 = words(seed, step, stream, quad, FAST)
    n0, n1 = box_muller(r0, r1, FAST)
    n2, n3 = box_muller(r2, r3, FAST)
    return n0, n1, n2, n3


@triton.jit
def joined_normals(seed, step, stream: tl.constexpr, quad, LANES: tl.constexpr, FAST: tl.constexpr):
    """LANES (4 or 8) consecutive normals from element 4 quad on: quad (..., N) int64 -> (..., N * LANES) float32.

    A thread then holds LANES in a row, which costs nothing where they fill a 16-byte access: 4 of float32, 8 of the
    2-byte types.
    """
    lanes = four_normals(seed, step, stream, quad, FAST)
    if LANES == 8:
        lanes = lanes + four_normals(seed, step, stream, quad + 1, FAST)
    return interleave(lanes, LANES)


@triton.jit
def interleave(lanes, LANES: tl.constexpr):
    """A tuple of LANES (4 or 8) tensors (..., N) -> (..., N * LANES), the lanes of each place in a row."""
    if LANES == 4:
        joined = tl.join(tl.join(lanes[0], lanes[2]), tl.join(lanes[1], lanes[3]))
    else:
        even = tl.join(tl.join(lanes[0], lanes[4]), tl.join(lanes[2], lanes[6]))
        odd = tl.join(tl.join(lanes[1], lanes[5]), tl.join(lanes[3], lanes[7]))
        joined = tl.join(even, odd)
    SHAPE: tl.constexpr = lanes[0].shape[:-1] + [lanes[0].shape[-1] * LANES]  # noqa: RUF005
    return tl.reshape(joined, SHAPE)


@triton.jit
def element_normals(seed, step, stream: tl.constexpr, k, FAST: tl.constexpr):
    """The normals of elements k, int64 of any shape -> float32: four_normals' bits, at one Philox call an element."""
    r0, r1, r2, r3 = words(seed, step, stream, k >> 2, FAST)
    second = (k & 2) != 0
    even, odd = box_muller(tl.where(second, r2, r0), tl.where(second, r3, r1), FAST)
    return tl.where((k & 1) != 0, odd, even)


@triton.jit
def element_uniforms(seed, step, stream: tl.constexpr, k, FAST: tl.constexpr):
    """The uniforms on (0, 1] of elements k, int64 of any shape -> float32, at one Philox call an element."""
    r0, r1, r2, r3 = words(seed, step, stream, k >> 2, FAST)
    second, odd = (k & 2) != 0, (k & 1) != 0
    word = tl.where(odd, tl.where(second, r3, r1), tl.where(second, r2, r0))
    return tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # (r + 0.5) / 2**32
