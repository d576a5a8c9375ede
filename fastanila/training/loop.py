"""The loop over a run's updates.

`train(Settings(...))` is what `python -m fastanila.train` calls.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import checks, graphs
from . import build, own
from .job import (
    Diverged,
    Job,
    begin,
    check_finite,
    describe,
    notes,
    prepare,
    run_directory_of,
    save,
    with_what_is_kept,
)
from .metrics import Metrics, Progress, exact_numbers, picture, summary
from .rollback import roll_back
from .run import Run, load
from .settings import Settings
from .signals import caught_signals, heard
from .update import build_update, compiles_once
from .watch import Watch

#: Updates after which the run looks, at the latest, whether they are finite.
_LOOK_EVERY = 100


class Interrupted(RuntimeError):
    """A signal ended the run between two updates; a checkpoint has been saved."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class Callbacks(NamedTuple):
    """What is called as the run goes on; what one of them raises ends the run, with its state saved."""

    on_log: Callable[[dict[str, float]], Any] | None = None  #: of each row of metrics.jsonl, also of dropped ones
    on_picture: Callable[[Path], Any] | None = None  #: of each picture that has been written
    on_checkpoint: Callable[[Path], Any] | None = None  #: of each checkpoint that has been written


NO_CALLBACKS = Callbacks()


class _Raised(Exception):
    """What a callback raised, on its way out of the loop: an OSError of it is no fault of the run's own files."""

    def __init__(self, error: BaseException):
        self.error = error


def train(
    settings: Settings,
    resume: str | Path | None = None,
    say: Callable[[str], None] = print,
    *,
    changed_data: bool = False,
    minutes: float = math.inf,
    energy: nn.Module | None = None,
    data: Any = None,
    on_log: Callable[[dict[str, float]], Any] | None = None,
    on_picture: Callable[[Path], Any] | None = None,
    on_checkpoint: Callable[[Path], Any] | None = None,
) -> Run:
    """Train as the settings say; or go on with the run in ``resume``, of which they may only differ where harmless.

    ``minutes``: of wall time, from where the loop over the updates begins, after which the run stops between two
    updates, with a checkpoint from which ``resume`` goes on. Where it stops changes no number.
    ``energy``: an nn.Module of your own, (B, ...) to (B,) float32, in place of the settings' network. Training begins
    with its parameters and moves them in place; those that require no gradient stay.
    ``data``: of your own, in place of the settings': a tensor (N, D) or (N, C, H, W), an indexable data set, or a 2-D
    `Density`, see `data.samples.of`. A run that is resumed, and `run.load`, must be given both again.
    ``changed_data``: go on also if the data are not those that the run's last checkpoint was trained on.
    ``on_log(row)``, ``on_picture(path)``, ``on_checkpoint(path)``: called with each row of metrics.jsonl as it is
    written, each picture and each checkpoint. What one raises ends the run and reaches the caller; a checkpoint of
    the last update has then been saved.

    Writes the run directory (config.json, metrics.jsonl, checkpoints/, samples/, figure.png) and returns the run.
    Raises ValueError, TypeError or FileNotFoundError for what cannot be, `Diverged`, `Interrupted`, and OSError, with
    the run's state saved if that can be, where a file cannot be written.
    """
    checks.positive("minutes", minutes)
    job = prepare(settings, resume, changed_data=changed_data, energy=energy, data=data)
    return run(job, say, Callbacks(on_log, on_picture, on_checkpoint), minutes)


@torch.inference_mode(False)
@torch.enable_grad()
def run(
    job: Job, say: Callable[[str], None] = print, callbacks: Callbacks = NO_CALLBACKS, minutes: float = math.inf
) -> Run:
    """Make the updates that are left, or those that ``minutes`` have room for, and leave the run directory complete."""
    with run_directory_of(job), caught_signals() as caught:
        say = heard(say, caught)
        for line in notes(job):
            say(line)
        begin(job)
        try:
            make_updates(job, say, caught, callbacks, minutes)
            figure = job.directory / "figure.png"
            picture(job, figure)
            call(job, callbacks.on_picture, figure)
        except OSError as error:
            raise with_what_is_kept(job, error) from error
        except _Raised as raised:
            raise raised.error from None
        if job.iteration < job.settings.iterations:
            at = f"update {job.iteration} of {job.settings.iterations}"
            say(f"stopped after {minutes:g} minutes at {at}; go on with --resume {job.directory}")
        else:
            say(f"done: {job.iteration} updates in {job.seconds:.0f} s; everything is in {job.directory}")
        own_data = job.data if own.is_own(job.settings.data) else None
        return load(job.directory, str(job.device), energy=job.given, data=own_data)


def call(job: Job, callback: Callable[[Any], Any] | None, thing: Any) -> None:
    """Call it, if there is one. Where it raises, the run's state is saved first."""
    if callback is None:
        return
    try:
        callback(thing)
    except BaseException as error:
        with contextlib.suppress(OSError, Diverged):
            check_finite(job)
            save(job)
        raise _Raised(error) from error


def make_updates(
    job: Job,
    say: Callable[[str], None],
    caught: list[int],
    callbacks: Callbacks = NO_CALLBACKS,
    minutes: float = math.inf,
) -> None:
    """The loop over the updates that are left, in a folder in which the run has begun; ``caught`` ends it, and so does
    the wall time of ``minutes`` from here."""
    s, ends = job.settings, time.perf_counter() + 60 * minutes
    say(describe(job))
    if s.fused and graphs.compiles():
        say(compiling(job.device))
    learn = build_update(job)
    match = build_update(job, matches=True) if s.matching else learn  # to which a rollback may go back
    with (
        threads(job),
        build.arithmetic(s.precision, fused=s.fused),
        Metrics(job.directory, job.iteration, s.tensorboard) as metrics,
        Progress(job.iteration, s.iterations, say) as progress,
    ):
        watch = Watch(s)
        for line in watch.recall(metrics.rows):
            progress.note(line)
        while job.iteration < s.iterations:
            began = time.perf_counter()
            made = (match if job.iteration < s.matching else learn)()
            job.iteration += 1
            last = job.iteration == s.iterations
            over = time.perf_counter() >= ends and not last
            looked = caught or over or last or any(job.iteration % every == 0 for every in looks(s))
            broken = looked and job.broken.item()  # waits for the device
            job.seconds += time.perf_counter() - began
            if broken:
                if not rolled_back(job, int(job.made) + 1, metrics, progress, watch):
                    check_finite(job)
                continue
            pictured = bool(s.sample_every) and (job.iteration % s.sample_every == 0 or last)
            if job.iteration % s.log_every == 0 or pictured or last:
                row = summary(job, made) | (exact_numbers(job) if pictured else {})
                metrics.write(row)
                progress.show(row)
                for line in watch.see(row):
                    progress.note(line)
                call(job, callbacks.on_log, dict(row))
                if watch.diverged and rolled_back(job, job.iteration, metrics, progress, watch):
                    continue
            if job.iteration % s.save_every == 0 or last:
                healthy = job.iteration % s.save_every == 0 and not watch.running_away
                call(job, callbacks.on_checkpoint, save(job, good=healthy))
            if pictured:
                path = job.directory / "samples" / f"{job.iteration:08d}.png"
                picture(job, path)
                call(job, callbacks.on_picture, path)
            if caught and not last:
                check_finite(job)
                save(job)
                where = f"stopped after update {job.iteration}, saved; go on with --resume {job.directory}"
                raise Interrupted(f"{signal.Signals(caught[0]).name}: {where}", caught[0])
            if over:
                call(job, callbacks.on_checkpoint, save(job))
                return


def rolled_back(job: Job, diverged: int, metrics: Metrics, progress: Progress, watch: Watch) -> bool:
    """Whether the run has gone back to where it had not yet diverged, and its rows and what follows them too."""
    line = roll_back(job, diverged)
    if line is None:
        return False
    metrics.back_to(job.iteration)
    progress.back_to(job.iteration)
    watch.recall(metrics.rows)
    progress.note(line)
    return True


def looks(settings: Settings) -> list[int]:
    """After every how many updates the run reads something back."""
    return [n for n in (settings.log_every, settings.sample_every, settings.save_every, _LOOK_EVERY) if n]


def compiling(device: torch.device) -> str:
    """One line on what the first update waits for."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # imports the compiler: see `graphs.prepare`

    what = "the update" if compiles_once(device) else "the chains' transition"
    return f"the first update waits until {what} is compiled, and kept in {cache_dir()} for later runs"


_THREADS = torch.get_num_threads()  #: as torch chose them


@contextlib.contextmanager
def threads(job: Job) -> Iterator[None]:
    """One thread for chains in the plane, unless OMP_NUM_THREADS or torch.set_num_threads asks for others.

    Their operations take microseconds. More threads gain a third at best, and wait for one another in each of them:
    beside another busy process that takes ten times as long.
    """
    before = torch.get_num_threads()
    chosen = before != _THREADS or "OMP_NUM_THREADS" in os.environ
    if job.device.type == "cpu" and job.data.shape == (2,) and not chosen:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
