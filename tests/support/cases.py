"""Sizes and options that the parity tests run on a GPU, and that tests without one compile for it; which are slow."""

import itertools

import pytest


def with_slow(always, slow):
    """The cases, and those that are slow."""
    return [*always, *(pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in slow)]


def one_in(every: int, **axes):
    """Parametrises by the product of the axes, of which one case in ``every`` is run always and the others are slow.

    Run always are those whose places along the axes sum to a multiple of ``every``. Each value of a longer axis then
    meets each of the others in some case, where one axis has ``every`` values or more, as in a Latin square.
    """
    cases = []
    for places in itertools.product(*(range(len(values)) for values in axes.values())):
        case = [values[place] for values, place in zip(axes.values(), places, strict=True)]
        marks = [pytest.mark.slow] if sum(places) % every else []
        cases.append(pytest.param(*case, marks=marks, id="-".join(map(str, case))))
    return pytest.mark.parametrize(tuple(axes), cases)


#: Batches for the norms and statistics: (B, ...).
SHAPES = [
    (1,), (3,), (5, 1), (2, 1023), (1, 4097), (33, 31), (3, 3, 2, 2), (2, 5, 3, 3), (3, 1, 4, 4), (5, 4, 2), (2, 2),
    (1, 3, 257), (300, 8),
]  # fmt: skip
LAUNCHED = [(9, 3, 5), (2, 3, 3000)]  #: whose launches are counted
#: Chains that outgrow the largest tile: with channels, and without.
LARGE = {"channel": (1, 2, 4104), "element": (1, 8200), "chain": (1, 8200)}
#: Tiles of fastanila.kernels.rows that short chains outgrow, and batches of such chains.
SMALL_TILES = {"SMALL": 8, "CHUNK": 16, "LARGEST": 32}
OUTGROWN = [(3, 50), (5, 48), (3, 3, 40), (3, 5, 7, 3), (1, 16, 6)]

MIXTURES = [(1, 1), (1, 36), (2, 3), (2, 27), (3, 3), (4, 2), (6, 1), (8, 3), (8, 13)]  # dim, components
NETWORKS = [  # dim, width, depth, features, activation
    (1, 5, 1, 0, "silu"),
    (2, 5, 2, 3, "leaky-relu"),
    (3, 64, 1, 64, "silu"),
    (8, 64, 2, 0, "silu"),
    (2, 64, 2, 64, "silu"),
    (8, 100, 3, 0, "leaky-relu"),
    (2, 100, 2, 3, "silu"),
    (5, 128, 2, 0, "silu"),
    (2, 128, 3, 64, "silu"),
]
BATCHES = [(1, 1), (33, 16)]  # chains, and rows of a program that they are given where its matrices allow
ADJUSTED_MIXTURES = [  # dim, components, norm
    (1, 1, "chain"), (2, 3, "element"), (2, 3, "channel"), (3, 2, "chain"), (8, 3, "element"), (4, 15, "element"),
    (6, 1, "element"),
]  # fmt: skip
SLOW_ADJUSTED_MIXTURES = [(8, 13, "chain"), (5, 27, "chain")]  #: in the interpreter, as are the next
ADJUSTED_NETWORKS = [  # dim, width, depth, features, activation, norm, chains, rows of a program
    (1, 5, 1, 0, "silu", "element", 1, 1),
    (2, 5, 2, 3, "leaky-relu", "chain", 7, 4),
    (3, 20, 1, 3, "silu", "channel", 5, 8),
    (2, 64, 2, 64, "silu", "element", 9, 8),
    (8, 20, 3, 0, "leaky-relu", "element", 13, 16),
    (5, 20, 2, 20, "silu", "chain", 7, 8),
]
SLOW_ADJUSTED_NETWORKS = [
    (8, 100, 3, 0, "leaky-relu", "chain", 33, 16),
    (2, 128, 3, 64, "silu", "element", 9, 4),
    (2, 64, 2, 64, "silu", "chain", 33, 8),
]
SAMPLERS = [  # norm, refresh, bounds
    ("element", "transition", (-0.7, 1.2)),
    ("element", "update", None),
    ("channel", "transition", None),
    ("chain", "transition", None),
    ("chain", "update", (-0.7, 1.2)),
]
DIMS = [1, 2, 3, 4, 5, 8]  # of every chain's noise
#: dim, width, depth, features of a network of which fewer and fewer matrices fit, and the shared memory it is given.
SQUEEZED, SHARED_MEMORIES = (2, 32, 3, 20), range(14000, 48000, 4096)
