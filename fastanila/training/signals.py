"""The signals that end a run between two updates."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

#: Those that end a run between two updates, as far as the system has them: Ctrl-C, kill, and a terminal that closes.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def heard(say: Callable[[str], None], caught: list[int]) -> Callable[[str], None]:
    """``say``, where a reader that has gone (| head) ends the run as a signal does. A terminal that has gone does not:
    who closes it on a run that is to go on has nobody to tell."""

    def told(line: str) -> None:
        try:
            say(line)
        except BrokenPipeError:
            caught.append(getattr(signal, "SIGPIPE", signal.SIGTERM))
        except OSError as error:
            if error.errno != errno.EIO:
                raise

    return told


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP are noted, to be acted on between updates; a second one acts at once. One that is
    ignored stays so: a run in the background, or under nohup, goes on."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def note(number, frame):
        caught.append(number)
        for n, handler in before.items():
            signal.signal(n, handler)
        if number == signal.SIGINT:  # by os.write, because a handler may have interrupted a print
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this update; Ctrl-C again stops at once\n")

    try:
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: whoever runs this thread handles signals
        pass
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
