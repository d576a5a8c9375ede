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
def words(seed, step, stream: tl.constexpr, quad):
    """The four words of counter ``quad`` (int64): seed and step are int64 scalars."""
    key, t, q = seed.to(tl.uint64, bitcast=True), step.to(tl.uint64, bitcast=True), quad.to(tl.uint64, bitcast=True)
    zero = q.to(tl.uint32) * 0
    c2 = t.to(tl.uint32) + zero
    c3 = ((t >> 32) * 256 + stream).to(tl.uint32) + zero  # this order: a constexpr swallows a tensor on its right
    return philox(q.to(tl.uint32), (q >> 32).to(tl.uint32), c2, c3, key.to(tl.uint32), (key >> 32).to(tl.uint32))


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
    r0, r1, r2, r3 = words(seed, step, stream, quad)
    n0, n1 = box_muller(r0, r1, FAST)
    n2, n3 = box_muller(r2, r3, FAST)
    return n0, n1, n2, n3
