"""Several trainings for one comparison: each in a folder of its own, measured when it ends; a second call goes on."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import files, graphs
from . import config, loop
from .job import Diverged
from .run import load, read_settings
from .settings import Settings

DIVERGED = 3  #: exit code of `python -m fastanila.train` for a run that has diverged


class Failed(RuntimeError):
    """A training has ended neither well nor by divergence; the message says where and how."""


def train(settings: Settings, directory: Path, threads: int | None = None) -> bool:
    """Make the run, or what is left of it; whether it ended well rather than diverged.

    ``threads``: makes it in a process of its own with so many; None: in this one. What it says is dropped.

    Raises ValueError if the folder holds a run with other settings, `Failed` where the training ends in another way,
    and whatever `loop.train` raises in this process, `loop.Interrupted` among it.
    """
    if (directory / "config.json").exists():
        before = dataclasses.replace(read_settings(directory), out=None)
        others = [k for k, v in vars(before).items() if v != getattr(settings, k)]
        if others:
            raise ValueError(f"out holds a run with another {', '.join(others)}: {directory}")
    made = progress(directory)
    if made == settings.iterations:
        return True
    if threads is None:
        finished = _trained_here(settings, directory, resumed=made is not None)
    else:
        finished = _trained_beside(settings, directory, threads, resumed=made is not None)
    if finished and (made := progress(directory)) != settings.iterations:
        raise Failed(f"{directory}: training ended after update {made} of {settings.iterations}")
    return finished


def _trained_here(settings: Settings, directory: Path, *, resumed: bool) -> bool:
    settings = dataclasses.replace(settings, out=str(directory))
    try:
        loop.train(settings, resume=directory if resumed else None, say=lambda line: None)
    except Diverged:
        return False
    except torch._dynamo.exc.TorchDynamoException as error:
        why = f"compiling failed; --no-fused runs without a compiler ({graphs.first_line(error)})"
        raise Failed(f"{directory}: {why}") from error
    return True


def _trained_beside(settings: Settings, directory: Path, threads: int, *, resumed: bool) -> bool:
    file = directory.with_name(f"{directory.name}.json")
    files.write_text(file, config.dump(settings))
    arguments = ["--resume", str(directory)] if resumed else ["--config", str(file), "--out", str(directory)]
    result = subprocess.run(
        [sys.executable, "-m", "fastanila.train", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if result.returncode not in (0, DIVERGED):
        raise Failed(f"{directory}: training failed: {(result.stderr or result.stdout).strip()[-2000:]}")
    return result.returncode == 0


def progress(directory: Path) -> int | None:
    """Updates that the run's last checkpoint has made; None if it has none, so that a run can begin there."""
    try:
        return load(directory, "cpu").iteration
    except FileNotFoundError:
        return None


def train_all(
    resolved: Mapping[str, Settings],
    file: Path,
    jobs: int,
    measure: Callable[[str, Path, bool], dict[str, Any]],
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Make the runs, in folders by their names beside ``file``, and measure each; their lines, in order.

    One at a time they are made in this process: a short training takes less time than a process to begin in, and what
    one has compiled serves the next. Of several ``jobs`` each has a process, and they share torch's threads.
    ``measure`` takes a run's name, its folder and whether it ended well rather than diverged, and is called for one run
    at a time. The file always holds the lines so far, as JSON. The same call again makes what is missing. Raises what
    `train` raises, and then no other run begins.
    """
    lines: dict[str, dict[str, Any]] = {}
    turn = threading.Lock()  # a measurement uses torch's own threads, and the table is written by one at a time

    def make(name: str, threads: int | None) -> None:
        directory = file.parent / name
        finished = train(resolved[name], directory, threads)
        with turn:
            lines[name] = measure(name, directory, finished)
            found = [lines[name] for name in resolved if name in lines]
            files.write_text(file, json.dumps(found, indent=2) + "\n")
            say(f"{file.parent.name}, {len(lines)} of {len(resolved)}: {name} {'done' if finished else 'diverged'}")

    if jobs == 1:
        for name in resolved:
            make(name, None)
        return [lines[name] for name in resolved]
    before = torch.get_num_threads()
    threads = max(1, before // jobs)
    torch.set_num_threads(threads)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            for done in [pool.submit(functools.partial(make, threads=threads), name) for name in resolved]:
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # one that fails, or Ctrl-C, ends all
            torch.set_num_threads(before)
    return [lines[name] for name in resolved]
