"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, UTF-8, as atomically as a checkpoint."""
    write_bytes(path, text.encode())


def write_by(path: str | Path, save: Callable[[BinaryIO], object]) -> None:
    """Write a file as `write_bytes` does, of what ``save`` writes to the binary file in memory that it gets."""
    content = io.BytesIO()
    save(content)
    write_bytes(path, content.getvalue())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, in a directory that exists, so that ``path`` always holds the old content or all of the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk names no file, and others the temporary one
            error.filename, error.filename2 = str(path), None
        raise
    if hasattr(os, "O_DIRECTORY"):  # where a directory can be opened, the rename itself is forced to disk
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
