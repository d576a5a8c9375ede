"""Commands in processes of their own, each against a clock, so that one that dies or hangs takes nothing with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .checkout import ROOT

_GRACE = 15.0  #: seconds that a process has, once it is asked to stop, before it is killed


class Command(NamedTuple):
    argv: Sequence[str]
    output: Path  #: to which its stdout is appended
    errors: Path | None = None  #: to which its stderr is appended; None is ``output``
    environment: Mapping[str, str] = {}  #: beside this process's own


class Ended(NamedTuple):
    code: int
    seconds: float
    stopped: bool  #: its time was over


def run(command: Command, seconds: float) -> Ended:
    return run_together([command], seconds)[0]


def run_together(commands: Sequence[Command], seconds: float) -> list[Ended]:
    """Run them side by side. Those still running when the time is over are stopped, as by Ctrl-C, and killed if they go
    on; of each, all the processes that it started end with it."""
    began = time.monotonic()
    processes: list[subprocess.Popen] = []
    try:
        for command in commands:
            processes.append(_started(command))
        ended = [_ended(process, began, seconds) for process in processes]
        late = [process for process, found in zip(processes, ended, strict=True) if found is None]
        for process in late:
            process.send_signal(signal.SIGINT)
        limit = time.monotonic() + _GRACE
        for process in late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(limit - time.monotonic(), 0.0))
    finally:
        for process in processes:
            _end_all_of(process)
    return [
        found or Ended(process.wait(), time.monotonic() - began, True)
        for process, found in zip(processes, ended, strict=True)
    ]


def _started(command: Command) -> subprocess.Popen:
    with contextlib.ExitStack() as files:
        output = files.enter_context(command.output.open("a"))
        errors = output if command.errors is None else files.enter_context(command.errors.open("a"))
        return subprocess.Popen(
            command.argv, cwd=ROOT, env=os.environ | command.environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=errors, start_new_session=True,
        )  # fmt: skip


def _ended(process: subprocess.Popen, began: float, seconds: float) -> Ended | None:
    """How it ended, None if it has not in that time since it began."""
    try:
        code = process.wait(max(began + seconds - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return None
    return Ended(code, time.monotonic() - began, False)


def _end_all_of(process: subprocess.Popen) -> None:
    """Kill what is left of its session, which is its own: compilers' workers outlive a process that is killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
