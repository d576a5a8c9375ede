"""The noise stream: every random number of fastanila is a function of (seed, step, stream, element).

There is no hidden generator, so nothing has to be saved to resume, and a CPU, a GPU, an eager, a compiled and a
captured run draw the same numbers. This module is the definition; ``kernels/philox.py`` is its Triton twin.

    key     = the 64-bit seed, low word then high word
    counter = (q & 0xffffffff, q >> 32, t & 0xffffffff, stream + 256 * (t >> 32)),   q = k // 4
    r0..r3  = Philox4x32-10(counter, key)                    (Salmon et al., SC 2011)

Element k (the row's global index times the row's size, plus the place in the row) takes lane k % 4. A word r becomes
the uniform u = (r + 0.5) / 2^32; words (r0, r1) become the normals rho cos(theta), rho sin(theta) of lanes 0 and 1
with rho = sqrt(-2 ln u(r0)), theta = int32(r1) * 2 pi / 2^32, and (r2, r3) likewise those of lanes 2 and 3.

Numbers are drawn for a ``shape`` whose first dimension counts rows (chains, images); ``offset`` is the global index
of the first row, so a slice of a batch draws exactly what the whole batch would have drawn there.
``seed`` (mod 2^64) and ``step`` (0 <= step < 2^56) are ints or 0-dim int64 tensors on ``device``.
"""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# Philox's multipliers less 2**32. With a < 2**32 the product a * (M - 2**32) fits a signed 64-bit integer, so no
# implementation has to define overflow; adding a to its high half gives the high half of a * M.
_M0 = 0xD2511F53 - (1 << 32)
_M1 = 0xCD9E8D57 - (1 << 32)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
MAX_STEP = 1 << 56


class Stream(enum.IntEnum):
    """What a draw is for. No two purposes share a stream; the value is part of the contract, so only append."""

    LANGEVIN = 0  #: the transition's normals; step = transitions made so far in the run
    ACCEPTANCE = 1  #: Metropolis uniforms, one a chain; step as above
    RESTART = 2  #: which persistent chains restart; step = update
    START = 3  #: where a chain starts from noise; step = update
    START_DATA = 4  #: which data a chain starts from, as DATA; step = update
    DATA = 5  #: which data an update sees; the uniforms of a 2-D density's draw; step = update
    DATA_NORMALS = 6  #: the normals of a 2-D density's draw; step = update
    DATA_NOISE = 7  #: noise added to the data; step = update
    LATENT = 8  #: the latents that the VAE's decoder proposes from; step = update
    INITIAL = 9  #: parameters drawn once, such as random Fourier features
    EVALUATION = 10  #: held-out draws: which images, and the uniforms of a 2-D density's draw
    EVALUATION_NORMALS = 11  #: held-out draws: the normals of a 2-D density's draw
    START_DATA_NORMALS = 12  #: the normals of the 2-D data a chain starts from; step = update
    BASELINE = 13  #: what a model is compared with, and the directions of sliced distances
    POSTERIOR = 14  #: the VAE's reparametrised draws; step = update
    MASKS = 15  #: which regions of images are missing; step = update, as the data's
    LABELS = 16  #: which class a chain that starts from noise is of; step = update, as START's
    OUTLIERS = 17  #: images unlike any data, from which energies are to tell them
    SUBSETS = 18  #: which rows a distance is taken of; step = which of its sets
    MATCHING = 19  #: the noise that the way to the data begins in; step = update
    TIMES = 20  #: how far on that way; step = update
    FLIPS = 21  #: which images of the data are mirrored; step = update
    ANNEALING = 22  #: draws of the base that annealing starts from, its data's noise, what its pilot resamples
    SWAPS = 23  #: which replicas trade places, one a row; step = transitions made so far in the run
    RESAMPLING = 24  #: where the resampling of weighted walkers begins to count; step = updates made
    COUPLING = 25  #: what coupled chains share; of transition t the steps 4 t and 4 t + 1


def words(
    count: int, *, seed: int | Tensor, step: int | Tensor, stream: int = 0, start: int = 0, device=None
) -> Tensor:
    """The 32-bit words of elements ``start`` to ``start + count``: (count,) int64, each in [0, 2^32)."""
    if _by_element(count, device):
        k, (r0, r1, r2, r3) = _elements(count, seed, step, stream, start, device)
        second = (k & 2) != 0
        return torch.where((k & 1) != 0, torch.where(second, r3, r1), torch.where(second, r2, r0))
    lanes = _quads(count, seed, step, stream, start, device)
    return _interleave(lanes, count, start)


def uniform(
    shape, *, seed: int | Tensor, step: int | Tensor, stream: int, offset: int = 0, device=None, dtype=torch.float32
) -> Tensor:
    """Uniforms on (0, 1] of the given shape and dtype: (word + 0.5) / 2^32, rounded to float32."""
    count, start = _extent(shape, offset)
    r = words(count, seed=seed, step=step, stream=stream, start=start, device=device)
    return _unit(r).to(dtype).reshape(shape)


def integers(
    high: int, shape, *, seed: int | Tensor, step: int | Tensor, stream: int, offset: int = 0, device=None
) -> Tensor:
    """Uniform integers in [0, high), int64, for high <= 2^31: the high half of word * high."""
    if not 1 <= high <= 1 << 31:
        raise ValueError(f"high must be between 1 and 2**31, got {high}")
    count, start = _extent(shape, offset)
    r = words(count, seed=seed, step=step, stream=stream, start=start, device=device)
    return ((r * high) >> 32).reshape(shape)


def normal(
    shape, *, seed: int | Tensor, step: int | Tensor, stream: int = 0, offset: int = 0, device=None, dtype=torch.float32
) -> Tensor:
    """Standard normals of the given shape and dtype, |x| < 6.77.

    The arithmetic is float32 and the result is rounded to ``dtype``; for float64 it is float64 from the same
    float32 uniform on, which makes ``dtype=torch.float64`` the oracle for every other implementation.
    """
    count, start = _extent(shape, offset)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if _by_element(count, device):
        k, (r0, r1, r2, r3) = _elements(count, seed, step, stream, start, device)
        second = (k & 2) != 0
        even, odd = _box_muller(torch.where(second, r2, r0), torch.where(second, r3, r1), wide)
        return torch.where((k & 1) != 0, odd, even).to(dtype).reshape(shape)
    r0, r1, r2, r3 = _quads(count, seed, step, stream, start, device)
    lanes = (*_box_muller(r0, r1, wide), *_box_muller(r2, r3, wide))
    return _interleave(lanes, count, start).to(dtype).reshape(shape)


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words; shapes broadcast."""
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) + c2) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) + c0) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def as_word64(value: int | Tensor, device=None) -> Tensor:
    """A seed or step as a 0-dim int64 tensor; an int is taken mod 2^64 and keeps its bits."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, float):
        raise TypeError(f"seed and step must be ints or 0-dim int64 tensors, got {value}")
    if value >= 1 << 63 or value < -(1 << 63):  # only then, because a compiler's symbolic int knows no big modulus
        value = (value + (1 << 63)) % (1 << 64) - (1 << 63)
    if torch.compiler.is_compiling():
        return torch.ops.fastanila.word(value, torch.device("cpu" if device is None else device))
    return _word(value, device)


def _word(value: int, device) -> Tensor:
    return torch.full((), value, dtype=torch.int64, device=device)


# Opaque to compilers, which else carry a constant or symbolic seed through ten rounds of Philox, for many minutes.
_library = torch.library.Library("fastanila", "FRAGMENT")
_library.define("word(SymInt value, Device device) -> Tensor")
_library.impl("word", _word, "CompositeExplicitAutograd")


@torch.library.register_fake("fastanila::word")
def _(value, device):
    return torch.empty((), dtype=torch.int64, device=device)


#: Draws up to this size are compiled for a GPU as one kernel, a Philox call an element. Larger ones, whose arithmetic
#: counts, take a call for four elements, and a second kernel that lays them side by side.
_SMALL = 1 << 20


def _by_element(count: int, device) -> bool:
    if device is None or not torch.compiler.is_compiling():
        return False
    return torch.device(device).type == "cuda" and count <= _SMALL


def _quads(count: int, seed, step, stream: int, start: int, device) -> tuple[Tensor, ...]:
    """The four words of each Philox counter that touches elements start .. start + count."""
    q = torch.arange(start // 4, (start + count + 3) // 4, dtype=torch.int64, device=device)
    return _counters(q, seed, step, stream, start)


def _elements(count: int, seed, step, stream: int, start: int, device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The elements k = start .. start + count, and the four words of each one's counter k // 4."""
    k = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return k, _counters(k >> 2, seed, step, stream, start)


def _counters(q: Tensor, seed, step, stream: int, start: int) -> tuple[Tensor, ...]:
    if not isinstance(stream, Stream) and not 0 <= stream < 256:
        raise ValueError(f"stream must be in [0, 256), got {stream}")
    if start < 0:
        raise ValueError(f"offset must be at least 0, got the element {start}")
    if not isinstance(step, Tensor) and not 0 <= step < MAX_STEP:
        raise ValueError(f"step must be in [0, 2**56), got {step}")
    seed, step = as_word64(seed, q.device), as_word64(step, q.device)
    zero = torch.zeros_like(q)
    return philox(
        q & _MASK,
        q >> 32,
        zero + (step & _MASK),
        zero + ((stream + 256 * (step >> 32)) & _MASK),  # of a step tensor, mod 2**56: -1 is the one ahead of 0
        seed & _MASK,
        (seed >> 32) & _MASK,
    )


def _interleave(lanes: tuple[Tensor, ...], count: int, start: int) -> Tensor:
    return torch.stack(lanes, dim=-1).reshape(-1)[start % 4 : start % 4 + count]


def _unit(r: Tensor) -> Tensor:
    return (r.to(torch.float32) + 0.5) * 2.0**-32


def _box_muller(r_even: Tensor, r_odd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    signed = (r_odd ^ 0x80000000) - 0x80000000
    # the angle's product is rounded to float32 in every implementation's float32 path, and to nothing in the oracle's
    theta = signed.to(dtype) * (2 * math.pi / 2**32)
    rho = torch.sqrt(-2 * torch.log(_unit(r_even).to(dtype)))
    return rho * torch.cos(theta), rho * torch.sin(theta)


def _extent(shape, offset: int) -> tuple[int, int]:
    count = math.prod(shape)
    row = math.prod(shape[1:])
    return count, offset * row
