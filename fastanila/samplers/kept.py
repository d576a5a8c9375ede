"""The one cache of the samplers: what was compiled and captured for an energy, kept from run to run.

By energy, the `ENERGIES` used last; what is kept of one ends with the energy, and no part of it refers to the energy.
Below that, by kind of sampler and the settings that are built in, its compiled transitions, all of them. Below each, by
the tensors that the energy was given (`SHAPES` of them), its captured graphs, by shape (`SHAPES`), then length
(`GRAPHS`).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from ..models import callables

ENERGIES, SHAPES, GRAPHS = 32, 4, 6

V = TypeVar("V")


class Latest(OrderedDict, Generic[V]):
    """A dict of the ``size`` entries used last."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def use(self, key, make: Callable[[], V]) -> V:
        """The entry, made if there is none."""
        value = self.pop(key, None)
        self[key] = value = make() if value is None else value  # the latest last
        if len(self) > self.size:
            self.popitem(last=False)
        return value


class Replays:
    """The graphs of one transition, by what `captured.Held` are told apart by; and the lock of those who use them."""

    def __init__(self):
        self.held: Latest = Latest(SHAPES)
        self.lock = threading.Lock()


class Transition(NamedTuple):
    """A compiled transition, and its graphs."""

    advance: Callable
    replays: Latest[Replays]  #: by the tensors that the energy was given


class Kept:
    """What is kept of an energy (or score)."""

    def __init__(self):
        self.transitions: dict[tuple, Transition] = {}  #: by kind of sampler and what else they have built in
        self.refusal: str | None = None  #: why it did not compile, where it did not
        self.ends: list[weakref.finalize] = []  #: which forget it when the energy is gone


energies: OrderedDict[tuple, Kept] = OrderedDict()


def kept_of(energy, score=None) -> Kept:
    """Of the same energy always the same; also of another function with the same code and contents."""
    who = callables.identity((energy, score))
    kept = energies.get(who.key)
    if kept is None:
        kept = energies.setdefault(who.key, Kept())
        for owner in who.owners:
            with contextlib.suppress(TypeError):  # no weak reference to it
                kept.ends.append(weakref.finalize(owner, energies.pop, who.key, None))
                kept.ends[-1].atexit = False
    with contextlib.suppress(KeyError):  # another thread was faster
        energies.move_to_end(who.key)
    if len(energies) > ENERGIES:
        for end in energies.popitem(last=False)[1].ends:
            end.detach()
    return kept
