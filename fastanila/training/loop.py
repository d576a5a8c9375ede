"""The loop over a run's updates.

`train(Settings(...))` is what `python -m fastanila.train` calls.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .. import graphs
from ..data import densities
from ..ops import dispatch
from . import build
from .job import Job, begin, check_finite, notes, path, prepare, run_directory_of, save, with_what_is_kept
from .metrics import Metrics, Progress, Watch, exact_numbers, picture, summary
from .run import Run, load
from .settings import Settings
from .update import build_update, compiles_once

#: Updates after which the run looks, at the latest, whether they are finite.
_LOOK_EVERY = 100
#: Those that end a run between two updates, as far as the system has them: Ctrl-C, kill, and a terminal that closes.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(RuntimeError):
    """A signal ended the run between two updates; a checkpoint has been saved."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def train(
    settings: Settings,
    resume: str | Path | None = None,
    say: Callable[[str], None] = print,
    *,
    changed_data: bool = False,
) -> Run:
    """Train as the settings say; or go on with the run in ``resume``, of which they may only differ where harmless.

    ``changed_data``: go on also if the images are not those that the run's last checkpoint was trained on.
    Writes the run directory (config.json, metrics.jsonl, checkpoints/, samples/, figure.png) and returns the run.
    Raises ValueError or FileNotFoundError for settings that cannot be, `Diverged`, `Interrupted`, and OSError, with the
    run's state saved if that can be, where a file cannot be written.
    """
    return run(prepare(settings, resume, changed_data=changed_data), say)


@torch.inference_mode(False)
@torch.enable_grad()
def run(job: Job, say: Callable[[str], None] = print) -> Run:
    """Make the updates that are left, and leave the run directory complete."""
    with run_directory_of(job), caught_signals() as caught:
        say = heard(say, caught)
        for line in notes(job):
            say(line)
        begin(job)
        try:
            make_updates(job, say, caught)
            picture(job, job.directory / "figure.png")
        except OSError as error:
            raise with_what_is_kept(job, error) from error
        say(f"done: {job.iteration} updates in {job.seconds:.0f} s; everything is in {job.directory}")
        return load(job.directory, str(job.device))


def make_updates(job: Job, say: Callable[[str], None], caught: list[int]) -> None:
    """The loop over the updates that are left, in a folder in which the run has begun; ``caught`` ends it."""
    s = job.settings
    say(path(job))
    if s.fused and graphs.compiles():
        say(compiling(job.device))
    update = build_update(job)
    with (
        threads(job),
        contextlib.nullcontext() if s.fused else dispatch.plain(),
        build.matmul_precision(s.precision),
        Metrics(job.directory, job.iteration, s.tensorboard) as metrics,
        Progress(job.iteration, s.iterations, say) as progress,
    ):
        watch = Watch(s)
        while job.iteration < s.iterations:
            began = time.perf_counter()
            made = update()
            job.iteration += 1
            if caught or any(job.iteration % every == 0 for every in looks(s)) or job.iteration == s.iterations:
                check_finite(job)  # waits for the device
            job.seconds += time.perf_counter() - began
            last = job.iteration == s.iterations
            pictured = bool(s.sample_every) and (job.iteration % s.sample_every == 0 or last)
            if job.iteration % s.log_every == 0 or pictured or last:
                row = summary(job, made) | (exact_numbers(job) if pictured else {})
                metrics.write(row)
                progress.show(row)
                for line in watch.see(row):
                    progress.note(line)
            if job.iteration % s.save_every == 0 or last:
                save(job)
            if pictured:
                picture(job, job.directory / "samples" / f"{job.iteration:08d}.png")
            if caught and not last:
                check_finite(job)
                save(job)
                where = f"stopped after update {job.iteration}, saved; go on with --resume {job.directory}"
                raise Interrupted(f"{signal.Signals(caught[0]).name}: {where}", caught[0])


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
    if job.device.type == "cpu" and isinstance(job.data, densities.Density) and not chosen:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- what it shows


# ------------------------------------------------------------------------------------------------- saving, resuming


# ----------------------------------------------------------------------------------------- its folder, and its signals


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
    before = {}

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
