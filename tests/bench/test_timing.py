"""The clock of the table: ways take turns, and on a GPU the device's time is not the host's."""

import itertools

import pytest
import torch

from bench import timing

CPU = torch.device("cpu")


def test_ways_take_turns_and_quick_ones_are_repeated(monkeypatch):
    # a clock that a call moves by a microsecond: the real one counts whatever else the machine does
    calls = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 1e-6 * len(calls))
    clock = timing.measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, rounds=3, once=True)
    assert calls == ["a", "b"] * 3
    assert {name: t.rounds for name, t in clock.items()} == {"a": 3, "b": 3}
    calls.clear()
    timing.measure({"a": lambda: calls.append("a")}, CPU, rounds=2)
    assert len(calls) == 1 + 2 * 1000  # once to see how quick it is


def test_time_limits_the_rounds_but_not_below_the_least():
    assert timing.measure({"a": lambda: None}, CPU, rounds=50, least=4, seconds=0.0)["a"].rounds == 4


def test_no_round_begins_after_the_deadline_but_one_is_made():
    assert timing.measure({"a": lambda: None}, CPU, rounds=50, until=0.0)["a"].rounds == 1


class Simulated:
    """A GPU with a clock of its own: a call costs the host one time, and the device another once it is free."""

    def __init__(self, host: float, device: float):
        self.now = self.free = 0.0  # the host's clock, and when the device has nothing left to do
        self.host, self.device = host, device

    def call(self, host=None, device=None):
        self.now += self.host if host is None else host
        self.free = max(self.free, self.now) + (self.device if device is None else device)

    def synchronize(self, device=None):
        self.now = max(self.now, self.free)

    def sleep(self, cycles):
        self.call(device=cycles / 1e9)

    def event(self, enable_timing):
        class Event:
            def record(event):
                event.at = max(self.free, self.now)

            def elapsed_time(event, other):
                return 1e3 * (other.at - event.at)

        return Event()


@pytest.mark.parametrize(("host", "device"), [(50e-6, 20e-6), (5e-6, 300e-6), (8e-6, 2e-6)])
def test_a_queued_sample_does_not_wait_for_the_host(host, device, monkeypatch):
    simulated = Simulated(host, device)
    for name, value in (
        ("synchronize", simulated.synchronize),
        ("_sleep", simulated.sleep),
        ("Event", simulated.event),
    ):
        monkeypatch.setattr(timing.torch.cuda, name, value)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: simulated.now)
    timing._cycles_a_second.cache_clear()
    cuda, ways = torch.device("cuda"), {"a": simulated.call}
    assert timing.measure(ways, cuda, queued=True)["a"].median == pytest.approx(device, rel=1e-3)
    assert timing.measure(ways, cuda)["a"].median == pytest.approx(max(host, device), rel=0.2)
    timing._cycles_a_second.cache_clear()


def test_the_median_is_a_calls_time(monkeypatch):
    now = iter([0.0, *itertools.accumulate([0.0, 5.0, 0.0, 1.0, 0.0, 9.0, 0.0, 5.0, 0.0, 5.0])])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    found = timing.measure({"a": lambda: None}, CPU, rounds=5, least=5, once=True)["a"]
    assert found == timing.Timing(5.0, 5.0, 5.0, 5)
