"""Timing several ways of one work side by side, so that their ratios hold whatever else the machine does."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

_SAMPLE = 2e-3  # seconds: a sample of a quick work makes it several times over
_MOST_CALLS = 1000
_MOST_QUEUED = 100  # of up to eight launches each: beyond some 1,000 that wait, a launch holds the host up


#: What fastanila says where it takes a slower path than the row is named for.
_FALLBACK = ".*(uncaptured|does not compile as one graph)"


@contextlib.contextmanager
def fallbacks_are_errors() -> Iterator[None]:
    """Such warnings raise, lest a fallback's time stand in the place of the captured or compiled one's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=_FALLBACK)
        yield


class Timing(NamedTuple):
    """Seconds a call."""

    median: float
    low: float  #: lower quartile
    high: float  #: upper quartile
    rounds: int


def measure(
    ways: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 15,
    least: int = 3,
    seconds: float = 10.0,
    host: bool = False,
    queued: bool = False,
    once: bool = False,
    until: float = math.inf,
) -> dict[str, Timing]:
    """Time the ways in turn, round after round, and take each one's median and quartiles over the rounds.

    Every way has been called before, so that it is compiled. Makes ``rounds`` rounds, or fewer once ``seconds`` have
    passed, but ``least``; after ``until`` of ``time.monotonic()`` no other round begins, though there be one only.
    ``host``: the time a call takes to return, its work on the device perhaps still ahead. ``queued``: on CUDA the
    device begins when the host has made all calls of a sample, so that it never waits for the host.
    ``once``: a sample is one call, however quick.
    """
    queued = queued and device.type == "cuda"
    most = _MOST_QUEUED if queued else _MOST_CALLS
    calls = {
        name: 1 if once else _calls_a_sample(_sample(way, 1, device, host, 1e-3 * queued), most)
        for name, way in ways.items()
    }
    ahead = {name: 1.5 * _enqueuing(way, calls[name], device) if queued else 0.0 for name, way in ways.items()}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - began > seconds:
            break
        if done and time.monotonic() > until:
            break
        for name, way in ways.items():
            samples[name].append(_sample(way, calls[name], device, host, ahead[name]))
    return {name: _timing(found) for name, found in samples.items()}


def _calls_a_sample(seconds: float, most: int) -> int:
    return max(1, min(most, math.ceil(_SAMPLE / seconds)))


def _sample(way: Callable[[], object], calls: int, device: torch.device, host: bool, ahead: float = 0.0) -> float:
    """Seconds a call over so many: of the device on CUDA, unless the host's time is wanted.

    The device idles for ``ahead`` seconds first, while the host makes the calls.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if host or device.type != "cuda":
        return _host_seconds(way, calls) / calls
    if ahead:
        torch.cuda._sleep(int(ahead * _cycles_a_second(device)))
    return _device_seconds(way, calls, device) / calls


def _host_seconds(way: Callable[[], object], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        way()
    return time.perf_counter() - began


def _device_seconds(way: Callable[[], object], calls: int, device: torch.device) -> float:
    """By events, which the device stamps."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        way()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def _enqueuing(way: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds the host takes to make the calls: the longer of two trials."""
    trials = []
    for _ in range(2):
        torch.cuda.synchronize(device)
        trials.append(_host_seconds(way, calls))
    torch.cuda.synchronize(device)
    return max(trials)


@functools.cache
def _cycles_a_second(device: torch.device) -> float:
    """The clock by which torch.cuda._sleep counts: taken twice, because the first time raises it."""
    cycles = 20_000_000
    _, seconds = (_device_seconds(lambda: torch.cuda._sleep(cycles), 1, device) for _ in range(2))
    return cycles / seconds


def _timing(samples: list[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(statistics.median(samples), low, high, len(samples))
