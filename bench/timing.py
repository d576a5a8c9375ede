"""Timing several ways of one work side by side, so that their ratios hold whatever else the machine does."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

_SAMPLE = 2e-3  # seconds: a sample of a quick work makes it several times over
_MOST_CALLS = 1000


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
    once: bool = False,
) -> dict[str, Timing]:
    """Time the ways in turn, round after round, and take each one's median and quartiles over the rounds.

    Every way has been called before, so that it is compiled. Makes ``rounds`` rounds, or fewer once ``seconds`` have
    passed, but ``least``. ``host``: the time a call takes to return, its work on the device perhaps still ahead.
    ``once``: a sample is one call, however quick.
    """
    calls = {name: 1 if once else _calls_a_sample(_sample(way, 1, device, host)) for name, way in ways.items()}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - began > seconds:
            break
        for name, way in ways.items():
            samples[name].append(_sample(way, calls[name], device, host))
    return {name: _timing(found) for name, found in samples.items()}


def _calls_a_sample(seconds: float) -> int:
    return max(1, min(_MOST_CALLS, math.ceil(_SAMPLE / seconds)))


def _sample(way: Callable[[], object], calls: int, device: torch.device, host: bool) -> float:
    """Seconds a call over so many: on CUDA by events, which the device stamps, unless the host's time is wanted."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    if cuda and not host:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            way()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3 / calls
    began = time.perf_counter()
    for _ in range(calls):
        way()
    return (time.perf_counter() - began) / calls


def _timing(samples: list[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(statistics.median(samples), low, high, len(samples))
