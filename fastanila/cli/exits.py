"""How a command ends: its exit codes, its errors of one line, and Ctrl-C at any time.

A command's module calls `begin` ahead of its other imports, of which torch takes seconds, and its ``main(argv)`` is
`run`. So this imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from .flags import given

DONE = 0
FAILED = 2  #: bad arguments, or a file that cannot be read or written
DIVERGED = 3
_CLOSED = 128 + getattr(signal, "SIGPIPE", 13)  #: whoever read the output has gone (| head)
_NO_MEMORY = ("out of memory", "can't allocate memory", "Unable to allocate")


class Refused(Exception):
    """What was asked for cannot be done; the message says why, in one line."""


def begin(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> None:
    """The start of a command's process: --help, and a command line that does not parse, end it here, without torch;
    Ctrl-C ends it at once while the rest is imported."""
    end_at_once_on_interrupt()

    def parsed() -> int:
        parser.parse_args(argv)
        return DONE

    if code := exit_code(parsed):
        sys.exit(code)
    end_at_once_on_interrupt()


def run(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    work: Callable[[argparse.Namespace, set[str]], int],
    *refused: type[Exception],
) -> int:
    """The exit code of a command, as `exit_code` has it, whose ``work`` gets the arguments and the names of those that
    the command line gives. ``refused``: errors of the work that say what is wrong with what was asked for."""

    def parsed_and_done() -> int:
        arguments = parser.parse_args(argv)
        with refusing(*refused):
            return work(arguments, given(parser, argv, arguments))

    return exit_code(parsed_and_done)


def end_at_once_on_interrupt() -> None:
    """Ctrl-C ends the process, without a traceback, until `exit_code` takes over: while modules are imported there is
    nothing to save, and an exception could be lost in them."""

    def end(number, frame):
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n")
        os._exit(128 + number)

    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


@contextlib.contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """These errors are what was asked for, and no fault of the program: `exit_code` reports them in one line."""
    try:
        yield
    except errors as error:
        raise Refused(str(error)) from error


def exit_code(work: Callable[[], int]) -> int:
    """What ``work`` returns, or the exit code for what it raises, of which one line goes to stderr.

    `Refused`, OSError and a lack of memory are 2; KeyboardInterrupt is 130, and an output that nobody reads any more
    141, as a shell has it for the signals. Whatever else it raises is a fault of the program, and keeps its traceback.
    """
    if getattr(signal.getsignal(signal.SIGINT), "__module__", None) == __name__:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            code = work()
        except SystemExit:  # --help, and what does not parse
            _flush()
            raise
        _flush()
        return code
    except KeyboardInterrupt:
        complain("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return _CLOSED
    except OSError as error:
        complain(f"error: {described(error)}")
        return FAILED
    except Refused as error:
        complain(f"error: {error}")
        return FAILED
    except (MemoryError, RuntimeError) as error:
        line = str(error).strip().split("\n", 1)[0]
        if not isinstance(error, MemoryError) and not any(words in line for words in _NO_MEMORY):
            raise
        complain(f"error: there is not enough memory{f' ({line})' if line else ''}")
        return FAILED
    finally:
        _drop_output()


def described(error: OSError) -> str:
    """Which file, and what is wrong with it."""
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def say(line: str) -> None:
    """A line on stdout, at once. Raises OSError naming it if it cannot be written."""
    try:
        print(line, flush=True)
    except OSError as error:
        error.filename = "standard output"
        raise


def complain(line: str) -> None:
    """A line on stderr; if that is closed, nobody is there to read it."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _flush() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        error.filename = "standard output"
        raise


def _drop_output() -> None:
    """What cannot be written goes nowhere, lest the interpreter fail on it once more when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
