"""A training run: its directory, its checkpoints, and the loop over its updates.

`train(Settings(...))` is what `python -m fastanila.train` calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from . import (
    capture,
    checkpoint,
    compiler,
    completion,
    config,
    data,
    draws,
    exact,
    learners,
    ops,
    plots,
    run_directory,
    runs,
    transitions,
)
from .config import Settings
from .report import Metrics, Progress, Watch, tensorboard_writer
from .updates import Job, Update, build_update, compiles_once, revision

_PROPOSALS = 20_000  #: whose histogram is compared with the model's law
#: Updates after which the run looks, at the latest, whether they are finite.
_LOOK_EVERY = 100
#: Those that end a run between two updates, as far as the system has them: Ctrl-C, kill, and a terminal that closes.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Diverged(RuntimeError):
    """The loss, its gradient or the chains are no longer finite; the run's last finite state has been saved."""


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
) -> runs.Run:
    """Train as the settings say; or go on with the run in ``resume``, of which they may only differ where harmless.

    ``changed_data``: go on also if the images are not those that the run's last checkpoint was trained on.
    Writes the run directory (config.json, metrics.jsonl, checkpoints/, samples/, figure.png) and returns the run.
    Raises ValueError or FileNotFoundError for settings that cannot be, `Diverged`, `Interrupted`, and OSError, with the
    run's state saved if that can be, where a file cannot be written.
    """
    return run(prepare(settings, resume, changed_data=changed_data), say)


@torch.inference_mode(False)
def prepare(settings: Settings, resume: str | Path | None = None, *, changed_data: bool = False) -> Job:
    """Check the settings and build a run's parts; leaves no file behind. Raises ValueError or OSError."""
    if resume is not None and settings.vae_warm_up is None:  # its default follows the iterations, which may change
        settings = dataclasses.replace(settings, vae_warm_up=runs.read_settings(resume).vae_warm_up)
    settings = config.resolve(settings)
    if resume is not None:
        settings = resumed_settings(settings, resume)
    device = runs.device_of(settings.device)
    directory = config.path_of("resume", resume) if resume is not None else new_directory(settings)
    run_directory.check_writable(directory)
    compiler.prepare(compiling=settings.fused)
    if settings.tensorboard:
        tensorboard_writer()
    dataset = runs.load_data(settings, device)
    vae, first = None, 0
    if settings.init == "vae":
        network, first = runs.build_vae(settings, dataset.shape), settings.vae_warm_up
        vae = learners.build(network, settings, settings.vae_lr, settings.vae_lr_decay, device)
    network = runs.build_energy(settings, dataset.shape)
    ebm = learners.build(network, settings, settings.lr, settings.lr_decay, device, first)
    start = runs.build_start(settings, dataset, device, vae and vae.model)
    with torch.no_grad():
        chains = start.draw(0, dataset.draw(settings.batch_size, seed=settings.seed, step=0, device=device)).clone()
    job = Job(
        settings=dataclasses.replace(settings, out=str(directory)),
        directory=directory,
        device=device,
        data=dataset,
        ebm=ebm,
        vae=vae,
        sampler=runs.build_sampler(settings, dataset.box),
        start=start,
        chains=chains,
        proposals=None if vae is None else chains.clone(),
        made=torch.zeros((), dtype=torch.int64, device=device),
        broken=torch.zeros((), dtype=torch.bool, device=device),
        begins=None if resume is not None else "numbered" if settings.out is None else "named",
    )
    if resume is not None:
        restore(job, changed_data)
        if job.iteration > settings.iterations:
            raise ValueError(f"iterations must be at least the {job.iteration} made already, got {settings.iterations}")
    return job


@torch.inference_mode(False)
@torch.enable_grad()
def run(job: Job, say: Callable[[str], None] = print) -> runs.Run:
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
        return runs.load(job.directory, str(job.device))


def make_updates(job: Job, say: Callable[[str], None], caught: list[int]) -> None:
    """The loop over the updates that are left, in a folder in which the run has begun; ``caught`` ends it."""
    s = job.settings
    say(path(job))
    if s.fused and capture.compiles():
        say(compiling(job.device))
    update = build_update(job)
    with (
        threads(job),
        contextlib.nullcontext() if s.fused else ops.plain(),
        runs.matmul_precision(s.precision),
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


def check_finite(job: Job) -> None:
    """Raise `Diverged`, with the last finite state saved, if an update was not finite."""
    if job.broken.item():
        job.iteration = int(job.made)
        save(job)
        also, rates = ("", "--lr") if job.vae is None else (", the VAE's gradient", "--lr, --vae-lr")
        raise Diverged(
            f"diverged at update {job.iteration + 1}: the energies, their gradient{also} or the chains are no longer "
            f"finite. {job.directory} holds the last finite state; a smaller {rates} or --step-size, or a larger "
            "--threshold (fewer clipped elements, less bias), may help"
        )


def path(job: Job) -> str:
    """One line on the device and the implementation in use."""
    energy = runs.at_precision(job.ebm.module, job.settings.precision)
    return transitions.path(job.sampler, energy, job.chains, fused=job.settings.fused, update=True)


def compiling(device: torch.device) -> str:
    """One line on what the first update waits for."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # imports the compiler: see `compiler.prepare`

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
    if job.device.type == "cpu" and isinstance(job.data, data.Density) and not chosen:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- what it shows


def summary(job: Job, made: Update) -> dict[str, float | int]:
    """A line of metrics.jsonl."""
    on_data, on_chains = made.energy_data.item(), made.energy_chains.item()
    free = gains = 1.0  # shares of the elements that the statistics are to be of; those of the others are 0 and 1
    if job.settings.task == "completion":
        free, gains = (completion.share(job.chains, norm).item() for norm in ("element", job.sampler.norm))
    row = {
        "iteration": job.iteration,
        "energy_data": on_data,
        "energy_chains": on_chains,
        "energy_gap": on_chains - on_data,
        "score_rms": (made.info.score_rms.square().mean() / free).sqrt().item(),
        "clip_fraction": made.info.clip_fraction.mean().item() / gains,
        "gamma_mean": 1 - (1 - made.info.gamma_mean.mean().item()) / gains,
        "acceptance": made.info.acceptance.mean().item(),
        "grad_norm": made.grad_norms[0].item(),
        "lr": job.ebm.rate.at(job.iteration - 1),
        "seconds": job.seconds,
    }
    if made.teaching is not None:
        row |= {name: value.item() for name, value in made.teaching._asdict().items()} | revision(job)
        row |= {"vae_grad_norm": made.grad_norms[1].item(), "vae_lr": job.vae.rate.at(job.iteration - 1)}
    return row


def exact_numbers(job: Job) -> dict[str, float]:
    """In two dimensions the negative log likelihood, and how far the model's law is from the data's (tv) and, of
    init="vae", the proposals' from the model's (tv_proposals), by quadrature; nothing otherwise."""
    if not isinstance(job.data, data.Density):
        return {}
    energy = evaluated(job)
    numbers = exact.evaluate(energy, job.data, resolution=200, device=job.device)
    row = {"nll": numbers["nll"], "tv": numbers["tv"]}
    if job.vae is not None:
        proposals = draws.proposals(job.vae.model, _PROPOSALS, seed=job.settings.seed, update=job.settings.iterations)
        row["tv_proposals"] = exact.law_tv(energy, job.data, proposals)
    return row


def evaluated(job: Job) -> nn.Module:
    return runs.at_precision(job.ebm.model, job.settings.precision)


def picture(job: Job, path: Path) -> None:
    """What the chains are at; of init="vae" the last update's proposals above what became of them."""
    if isinstance(job.data, data.Density):
        title = f"{job.data.name}, {job.iteration} updates"
        plots.save_plane(path, evaluated(job), job.data, job.chains, title, proposals=job.proposals)
        return
    shown = [x for x in (job.proposals, job.chains) if x is not None]
    if job.settings.task == "completion":
        shown = [completion.images(x) for x in (completion.hidden(job.chains), *shown)]
    if len(shown) == 1:
        plots.save_images(path, job.chains[:64], job.data.box)
    else:
        plots.save_under(path, [x[:64] for x in shown], job.data.box)


# ------------------------------------------------------------------------------------------------- saving, resuming


def save(job: Job) -> None:
    tensors = learners.tensors(job.ebm, "energy")
    if job.vae is not None:
        tensors |= checkpoint.prefixed(runs.AMORTIZED, learners.tensors(job.vae, "vae"))
        tensors["proposals"] = job.proposals
    tensors |= checkpoint.prefixed("start", job.start.tensors())
    if "start.population" not in tensors:
        tensors["chains"] = job.chains
    state = {"iteration": job.iteration, "seconds": job.seconds, "data": job.data.fingerprint}
    checkpoint.save_numbered(job.directory / "checkpoints", job.iteration, tensors, state)


def restore(job: Job, changed_data: bool = False) -> None:
    tensors, state = checkpoint.load_latest(job.directory / "checkpoints", job.device)
    changed = data.changes(state.get("data"), job.data.fingerprint)  # a checkpoint of before has none
    if changed and not changed_data:
        raise ValueError(
            f"data are not what {job.directory} was trained on: {'; '.join(changed)}. Put them back, or go on with "
            "these, and other numbers, by --changed-data"
        )
    learners.restore(job.ebm, "energy", tensors, job.directory)
    if job.vae is not None:
        learners.restore(job.vae, "vae", checkpoint.subset(tensors, runs.AMORTIZED), job.directory)
        job.proposals.copy_(tensors["proposals"])
    for name, tensor in job.start.tensors().items():
        tensor.copy_(tensors[f"start.{name}"])
    job.chains.copy_(runs.last_chains(tensors)[: job.settings.batch_size])
    job.iteration, job.seconds = state["iteration"], state["seconds"]
    job.made.fill_(job.iteration)


def resumed_settings(settings: Settings, directory: str | Path) -> Settings:
    """The settings to go on with. Raises ValueError for one that would change the numbers of the run."""
    before = runs.read_settings(directory)
    for field in dataclasses.fields(Settings):
        was, now = getattr(before, field.name), getattr(settings, field.name)
        if was != now and field.name not in config.RESUMABLE and field.name != "out":
            raise ValueError(f"{field.name} cannot change when a run is resumed: {directory} has {was!r}, got {now!r}")
    return settings


def notes(job: Job) -> list[str]:
    """What somebody who goes on with a run may not expect, a line each."""
    if job.begins is not None:
        return []
    before, now, found = runs.read_settings(job.directory).iterations, job.settings.iterations, []
    for flag, learner in (("--lr-decay", job.ebm), ("--vae-lr-decay", job.vae)):
        if learner is not None and learner.rate.decay == "linear" and before != now:
            was, rate = (learner.rate._replace(iterations=n).at(job.iteration) for n in (before, now))
            ends = f"now ends at update {now}, not {before}"
            found.append(f"note: the decay of {flag} linear {ends}: it goes on at {rate:.3g} where it was {was:.3g}")
    return found


def with_what_is_kept(job: Job, error: OSError) -> OSError:
    """The error that ended the run, which says where the run can go on; its state is saved first, if that can be."""
    with contextlib.suppress(OSError, Diverged):
        check_finite(job)
        save(job)
    newest = checkpoint.latest(job.directory / "checkpoints")
    where = "" if newest is None else f" from update {int(newest.stem)}"
    return OSError(error.errno, f"{error.strerror or error}; --resume {job.directory} goes on{where}", error.filename)


# ----------------------------------------------------------------------------------------- its folder, and its signals


def new_directory(settings: Settings) -> Path:
    """Where a new run would go now: --out, in which one must be able to begin, or the first free name under runs/."""
    if settings.out is None:
        return next(path for path in run_directory.names(settings.data) if not path.exists())
    path = Path(settings.out)
    run_directory.check_new(path)
    return path


@contextlib.contextmanager
def run_directory_of(job: Job) -> Iterator[None]:
    """The run's folder is there, and no other process trains in it; of a new run it is this one's from here on.

    Raises `run_directory.Taken` if the folder is another's."""
    if job.begins == "numbered":
        job.directory = run_directory.make(run_directory.names(job.settings.data))
        job.settings = dataclasses.replace(job.settings, out=str(job.directory))
    elif job.begins == "named":
        job.directory.mkdir(parents=True, exist_ok=True)
    with run_directory.locked(job.directory):
        if job.begins is not None:
            run_directory.check_new(job.directory)  # again, now that nobody else can begin there
        yield


def begin(job: Job) -> None:
    """Write what makes the folder a run: from here on it can be resumed, whatever ends it."""
    (job.directory / "samples").mkdir(exist_ok=True)
    checkpoint.write_text(job.directory / "config.json", config.dump(job.settings))
    if job.begins is not None:
        save(job)
        job.begins = None


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
