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

from . import ROOT

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

    def __str__(self) -> str:
        if self.stopped:
            return f"stopped after {self.seconds:.0f} s"
        return {0: "passed", 1: "failed"}.get(self.code, f"ended with {self.code}")


def run(command: Command, seconds: float) -> Ended:
    return run_together([command], seconds)[0]


def run_together(commands: Sequence[Command], seconds: float) -> list[Ended]:
    """Run them side by side. Those still running when the time is over are stopped, as by Ctrl-C, and killed if they go
    on; of each, all the processes that it started end with it."""
    began = time.monotonic()
    processes: list[subprocess.Popen] = []
    ended: dict[int, Ended] = {}

    def wait(limit: float, stopped: bool) -> None:
        for i, process in enumerate(processes):
            if i not in ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(max(limit - time.monotonic(), 0.0))
                    ended[i] = Ended(code, time.monotonic() - began, stopped)

    try:
        for command in commands:
            processes.append(_started(command))
        wait(began + seconds, stopped=False)
        for i, process in enumerate(processes):
            if i not in ended:
                process.send_signal(signal.SIGINT)
        wait(time.monotonic() + _GRACE, stopped=True)
    finally:
        for process in processes:  # what is left of its session: compilers' workers outlive a process that is killed
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    killed = time.monotonic() - began
    return [ended.get(i) or Ended(process.returncode, killed, True) for i, process in enumerate(processes)]


def _started(command: Command) -> subprocess.Popen:
    with contextlib.ExitStack() as files:
        output = files.enter_context(command.output.open("a"))
        errors = output if command.errors is None else files.enter_context(command.errors.open("a"))
        return subprocess.Popen(
            command.argv, cwd=ROOT, env=os.environ | command.environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=errors, start_new_session=True,
        )  # fmt: skip
