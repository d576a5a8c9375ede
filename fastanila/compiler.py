"""What torch's compiler needs of the machine, said ahead of it, and what it says that means nothing."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def check_cache() -> None:
    """Raise OSError, naming the folder and what to set, if torch's compiler cannot write to its cache."""
    folder = os.environ.get(_VARIABLE)
    try:
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        where = "no folder for temporary files" if folder is None else f"{_VARIABLE}={folder}"
        reason = f"torch's compiler cannot write its cache ({where}: {error.strerror or error})"
        raise OSError(
            f"{reason}; set {_VARIABLE} to a folder that can be written, or use --no-fused (compile=False)"
        ) from None


def prepare(*, compiling: bool) -> None:
    """Import the compiler, which torch's optimizers do whether or not anything is compiled, and which then makes its
    cache's folder. Raises OSError as `check_cache` does if something is to be compiled; otherwise it needs no cache."""
    if not compiling and "torch._dynamo" in sys.modules:
        return
    try:
        check_cache()
    except OSError:
        if compiling:
            raise
        with tempfile.TemporaryDirectory() as folder, _variable(folder):
            importlib.import_module("torch._dynamo")


@contextlib.contextmanager
def _variable(value: str) -> Iterator[None]:
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = value
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        if before is not None:
            os.environ[_VARIABLE] = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's line that there is no CUDA runtime beside the CUDA toolkit: it says so on importing a module that
    the compiler needs on every machine, also for a CPU, and nothing follows from it."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.addFilter(_says_something)
    try:
        yield
    finally:
        logger.removeFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("No CUDA runtime is found")
