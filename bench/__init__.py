"""Benchmarks: the operator, the chains and the updates beside other ways to do the same work.

Importing the package makes a checkout that is not installed find its kernels, so that `python -m bench.gpu` runs from
it as it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def link_kernels(root: Path = ROOT) -> bool:
    """Make the link fastanila/kernels -> ../kernels if `fastanila.kernels` cannot be found; whether it was made.

    setup.py installs the folder kernels/ as `fastanila.kernels`; where nothing is installed, this link (which git
    ignores) does the same. Raises ModuleNotFoundError where there is no fastanila at all.
    """
    if importlib.util.find_spec("fastanila.kernels") is not None:
        return False
    with contextlib.suppress(FileExistsError):  # another process was first
        (root / "fastanila" / "kernels").symlink_to("../kernels")
    importlib.invalidate_caches()
    return True


link_kernels()
