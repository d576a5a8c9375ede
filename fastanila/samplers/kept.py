"""What is kept of an energy from run to run: its compiled transitions, and their captured graphs."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from ..models import callables

#: Captured shapes kept by a chain, and graphs by a shape.
_SHAPES, _GRAPHS = 4, 6


class _Made(NamedTuple):
    advance: Callable
    replays: dict[tuple, Replays]  #: by the tensors that the energy was given


class _Kept:
    """What is kept of an energy (or score) from run to run, which is none of it: no part of this refers to it."""

    def __init__(self):
        self.transitions: dict[tuple, _Made] = {}  #: compiled, by kind of sampler and what else they have built in
        self.refusal: str | None = None  #: why it did not compile, where it did not
        self.ends: list[weakref.finalize] = []  #: which forget it when the energy is gone


_kept: OrderedDict[tuple, _Kept] = OrderedDict()

_ENERGIES = 32  #: of which something is kept, at most


def _kept_of(energy, score=None) -> _Kept:
    """Of the same energy always the same; also of another function with the same code and contents."""
    who = callables.identity((energy, score))
    kept = _kept.get(who.key)
    if kept is None:
        kept = _kept.setdefault(who.key, _Kept())
        for owner in who.owners:
            with contextlib.suppress(TypeError):  # no weak reference to it
                kept.ends.append(weakref.finalize(owner, _kept.pop, who.key, None))
                kept.ends[-1].atexit = False
    with contextlib.suppress(KeyError):  # another thread was faster
        _kept.move_to_end(who.key)
    if len(_kept) > _ENERGIES:
        for end in _kept.popitem(last=False)[1].ends:
            end.detach()
    return kept


class Replays:
    """The graphs of one transition, by what `_Held` are told apart by; and the lock of those who use them."""

    def __init__(self):
        self.held: dict = {}
        self.lock = threading.Lock()
