"""What a goal can be: times that follow from bytes, products and launches, counted from the shapes.

A goal that no program can reach says nothing, and one that is set by what there is says nothing either. So the goals of
the table that depend on a limit of the machine are computed here from what both sides have to do. The machine is an
H100 (SXM): 3.0 TB/s of memory as a copy reaches it, 132 multiprocessors of 128 float32 lanes at 1.755 GHz.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

BANDWIDTH = 3.0e12  #: bytes a second
LANES = 132 * 128 * 1.755e9  #: instructions of single threads a second, one product each
#: Seconds from one small kernel of a CUDA graph to the next, whatever it does.
NODE = 1.3e-6
#: Seconds of the host to launch one kernel: what `torch.add` takes.
LAUNCH = 4.7e-6
#: Seconds of such a host that a transition of an eager loop takes, of a small network with its gradient.
EAGER = 650e-6
#: Seconds of such a host that one `run` on a whole-chain kernel may take: 32 launches, for one that it needs.
RUN = 150e-6
#: Instructions that the whole-chain kernel of an MLP takes for one product of its matrices: `bench.sass` counts 6,812
#: and 7,640 for the 4,288 products an element of mlp-64 in two dimensions, 26,176 for the 16,768 of mlp-128.
INSTRUCTIONS_A_PRODUCT = 1.7
#: The share of a copy's speed that the step has to reach.
OF_A_COPY = 0.92
#: Tensors of z's size that the fused step reads and writes: z, score; z'.
OUR_PASSES = 3
#: `rivals.eager_step`, kernel by kernel: abs, mul_, clamp_, rsqrt_ and clamp read one and write one, add reads two and
#: writes one, randn_like writes one, addcmul_ reads three and writes one.
EAGER_PASSES = 5 * 2 + 3 + 1 + 4


def eager_over_step() -> float:
    """How many times the step's time the eager one takes, if its kernels are as fast as a copy and ours reaches the
    share of a copy that it has to: by their bytes, 18 / 3 * 0.92."""
    return EAGER_PASSES / OUR_PASSES * OF_A_COPY


# ------------------------------------------------------------------------------------------------------------- chains


class Least(NamedTuple):
    """How many times our run's time other ways take at the least."""

    eager: float  #: the loop by hand
    launched: float  #: torch.compile, its kernels launched one by one by the host
    captured: float  #: torch.compile, all transitions captured as one CUDA graph


class Kernels(NamedTuple):
    """What a transition of an MLP's chain takes beside its four products, two forward and two back."""

    hidden: int  #: that pass over a hidden layer: activations, their derivatives, the head
    small: int  #: over states and energies


COMPILED = Kernels(hidden=5, small=3)  #: by torch.compile
OURS = Kernels(hidden=3, small=1)  #: where the step is one of them and takes the gradient as it is
MIXTURE_NODES = 3  #: of the mixture by torch.compile, all of them small


def over_mixture(steps: int) -> Least:
    """Of a mixture all kernels are small, and our one launch is bound by the host."""
    return Least(*(steps * each / RUN for each in (EAGER, MIXTURE_NODES * LAUNCH, MIXTURE_NODES * NODE)))


def over_mlp(chains: int, dim: int, width: int, steps: int, *, whole: bool) -> Least:
    """``whole``: our time is that of the whole-chain kernel, else of transitions captured as one CUDA graph."""
    sizes = (chains, dim, width, steps)
    ours = whole_mlp_run(*sizes) if whole else captured_mlp_run(OURS, *sizes)
    captured = captured_mlp_run(COMPILED, *sizes)
    launched = max(captured, steps * (4 + sum(COMPILED)) * LAUNCH)
    return Least(max(captured, steps * EAGER) / ours, launched / ours, captured / ours)


def whole_mlp_run(chains: int, dim: int, width: int, steps: int) -> float:
    """Seconds of one run on the whole-chain kernel: what issuing its instructions takes, or the host, the longer."""
    products = 2 * (dim * width + width * width + width)  # of an energy and its gradient
    return max(RUN, steps * (chains * products * INSTRUCTIONS_A_PRODUCT / LANES))


def captured_mlp_run(kernels: Kernels, chains: int, dim: int, width: int, steps: int) -> float:
    """Seconds of the same captured as one CUDA graph of such kernels, two hidden layers deep.

    Each takes a node's time, or what its products or its bytes (every tensor read or written once) take.
    """
    hidden, state = 4 * chains * width, 4 * chains * dim

    def node(moved: int, products: int = 0) -> float:
        return max(NODE, moved / BANDWIDTH, products / LANES)

    outer = node(hidden + state, chains * dim * width)
    inner = node(2 * hidden, chains * width * width)
    return steps * (2 * outer + 2 * inner + kernels.hidden * node(2 * hidden) + kernels.small * node(3 * state))


def pointwise_bytes(shape: Sequence[int], width: int, itemsize: int) -> list[int]:
    """Bytes that one transition of a ConvNet's chain has to move besides its convolutions, kernel by kernel; for images
    of that shape (B, C, size, size).

    For each convolution but the head, a kernel forward (what it put out, read; the activation, written) and one back
    (the gradient and the activation, read; the gradient through it, written); then the step (z and score, read; z',
    written), in float32 always. The head, which is a sum, and the bias are part of the last kernel forward.
    """
    batch, _, size, _ = shape
    activations = [itemsize * batch * (width << i) * (size >> i) ** 2 for i in range(4)]
    return [2 * a for a in activations] + [3 * a for a in activations] + [OUR_PASSES * 4 * math.prod(shape)]
