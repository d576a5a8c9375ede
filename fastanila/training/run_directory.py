"""The folder of a run: its name, who may write in it, and what may be there before.

A name is taken by making the folder, which only one process can do, and a run holds a lock on its folder as long as it
trains: two trainings never write in one. The kernel gives the lock back when a process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import checkpoint, config
from .settings import Settings

try:
    import fcntl
except ModuleNotFoundError:  # Windows: names are taken as elsewhere, and nobody is kept from resuming a run twice
    fcntl = None

_LOCK = ".lock"
#: What is in a run's folders ahead of its first update, beside files of `files.write_bytes` that were cut short.
_BEGINNINGS = {
    "samples": (),
    "checkpoints": ("00000000.safetensors", "00000000-*-*.safetensors"),
    "tensorboard": ("events.out.tfevents.*",),
}
#: What a file system without locks says.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)


class Taken(ValueError):
    """A folder in which no run may begin, or where another process trains."""


def names(data: str) -> Iterator[Path]:
    """runs/DATA, runs/DATA-2, runs/DATA-3, ..."""
    yield Path("runs") / data
    for number in itertools.count(2):
        yield Path("runs") / f"{data}-{number}"


def check_new(path: Path) -> None:
    """Raise `Taken` unless a run may begin at ``path``: where nothing is, in an empty folder, or in one that holds
    nothing but what a run left behind which ended ahead of its first update."""
    if not path.exists():
        return
    if not path.is_dir():
        raise Taken(f"out must be a folder, but {path} is a file")
    others = [entry.name for entry in sorted(path.iterdir()) if not _is_of_a_beginning(entry)]
    if others:
        run = checkpoint.latest(path / "checkpoints") is not None
        held = "another run; --resume goes on" if run else f"other files ({others[0]})"
        raise Taken(f"out must be a new or empty folder, but {path} holds {held}")


def _is_of_a_beginning(entry: Path) -> bool:
    """Whether a run has written this ahead of its first update, so that the next loses nothing by writing it again."""
    if entry.name in _BEGINNINGS and entry.is_dir():
        allowed = (*_BEGINNINGS[entry.name], ".*.tmp")
        return all(any(inner.match(pattern) for pattern in allowed) for inner in entry.iterdir())
    if entry.name == "config.json":
        return _is_own_config(entry)
    return entry.match(".*.tmp") or (entry.name in (_LOCK, "metrics.jsonl") and not entry.stat().st_size)


def _is_own_config(path: Path) -> bool:
    """Whether it is what a run wrote of its own settings, and not a file of the same name that a user keeps there."""
    try:
        settings = Settings(**config.read(path))
        if settings.out is None or Path(settings.out).absolute() != path.parent.absolute():
            return False
        return path.read_text(encoding="utf-8") == config.dump(settings)
    except (OSError, ValueError):
        return False


def check_writable(path: Path) -> None:
    """Raise OSError naming the folder ``path`` if nothing could be written there; leaves everything as it was."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".fastanila-"):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot be written ({error.strerror})", str(path)) from None


def make(names: Iterable[Path]) -> Path:
    """Make the first of the folders that does not exist: of several processes each gets one of its own."""
    for path in names:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise ValueError("names must hold a folder that does not exist")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else trains in the folder meanwhile. Raises `Taken` if somebody does."""
    with open(path / _LOCK, "ab") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Taken(f"another process trains in {path}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # a file system that has none
                raise
        yield
