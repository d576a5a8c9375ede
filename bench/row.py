"""A row of the table: one work, the ways to do it, and the goals that are set for it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch

from .workloads import Way

#: Seconds that a row of each group takes at the least on a GPU; one that would end too late is skipped. By group in the
#: table's order. None of them is measured yet.
SECONDS = {"step": 4.0, "noise": 6.0, "chains": 8.0, "convnet": 20.0, "update": 20.0, "host": 5.0, "startup": 15.0}
GROUPS = tuple(SECONDS)

OURS = "fastanila"
CAPTURED = "fastanila, captured"  #: transitions captured as a CUDA graph, where OURS makes them all in one kernel
UNADJUSTED = "fastanila, unadjusted"
PLAIN = "fastanila, --no-fused"  #: the plain definition, eagerly
MALA_BY_HAND = "eager, MALA"  #: the exact sampler that is nearest, by hand at its best
COPY = "copy of the same bytes"
COMPILED = "torch.compile"
AUTHORS = "the authors' form"

Builders = dict[str, Callable[[], Way]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One work and the ways to do it."""

    group: str  #: of GROUPS
    work: str
    shape: tuple[int, ...]
    dtype: str
    #: (device, what is closed after the row) -> the ways by name; each is built when it is its turn
    build: Callable[[torch.device, contextlib.ExitStack], Builders]
    #: one of our ways -> what a rival's time must be over its own, at least, by rival
    at_least: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    at_most: dict[str, float] = dataclasses.field(default_factory=dict)  #: a way's time in seconds
    bytes_moved: int | None = None  #: by every way that moves z, score and z'
    host: bool = False  #: the host's time is meant
    queued: bool = False  #: the device's time alone is meant, though its work be shorter than the host's call
    once: bool = False  #: slow ways, of which a sample is one call
    rounds: int = 15  #: at most

    @property
    def seconds(self) -> float:
        """What it is taken to need."""
        return SECONDS[self.group]
