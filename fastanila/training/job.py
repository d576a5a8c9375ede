"""A run in progress: prepared, saved, restored."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import files, graphs, noise
from ..data import images
from ..samplers import chain, sampler
from . import build, checkpoint, config, learner, own, run_directory
from .config import tensorboard_writer
from .contents import MISSING, Contents, Rollback, packed, unpacked
from .learner import Learner
from .run import read_settings, refuse_given, resumed_settings
from .settings import Settings


class Diverged(RuntimeError):
    """The loss, its gradient or the chains are no longer finite; the run's last finite state has been saved."""


@torch.inference_mode(False)
def prepare(
    settings: Settings,
    resume: str | Path | None = None,
    *,
    changed_data: bool = False,
    energy: nn.Module | None = None,
    data: Any = None,
) -> Job:
    """Check the settings and build a run's parts; leaves no file behind. Raises ValueError, TypeError or OSError.

    ``energy``, ``data``: the user's own, see `loop.train`.
    """
    settings = with_own(settings, resume, energy, data)
    found = build.own_data(settings, data)
    shape = None if found is None else found.shape
    if resume is not None and settings.vae_warm_up is None:  # its default follows the iterations, which may change
        settings = dataclasses.replace(settings, vae_warm_up=read_settings(resume).vae_warm_up)
    settings = config.resolve(settings, shape)
    if resume is not None:
        settings = resumed_settings(settings, resume)
    device = build.device_of(settings.device)
    directory = config.path_of("resume", resume) if resume is not None else new_directory(settings)
    run_directory.check_writable(directory)
    graphs.prepare(compiling=settings.fused)
    if settings.tensorboard:
        tensorboard_writer()
    dataset = build.load_data(settings, device) if found is None else build.load_data(settings, device, given=found)
    settings, vae, first = build.fitted(settings, dataset), None, 0
    if settings.init == "vae":
        network, first = build.build_vae(settings, dataset.shape, dataset.box), settings.vae_warm_up
        vae = learner.build(network, settings, settings.vae_lr, settings.vae_lr_decay, device)
    network = build.build_energy(settings, dataset.shape, energy, dataset.count if settings.classes else None)
    if own.is_own(settings.energy):
        build.check_energy(network, dataset.draw(_TRIED, seed=settings.seed, step=0).to(_device(network)))
    ebm = learner.build(network, settings, settings.lr, settings.lr_decay, device, first, matching=True)
    seed = noise.as_word64(settings.seed, device)
    start = build.build_start(settings, dataset, device, vae and vae.model, seed)
    with torch.no_grad():
        chains = start.draw(0, dataset.draw(settings.batch_size, seed=settings.seed, step=0, device=device))
        chains = chains[: settings.batch_size].clone()
    if settings.init == "weighted":
        start.begin(ebm.module.eval())
    job = Job(
        settings=dataclasses.replace(settings, out=str(directory)),
        directory=directory,
        device=device,
        data=dataset,
        ebm=ebm,
        vae=vae,
        sampler=build.build_sampler(settings, dataset.box),
        start=start,
        chains=chains,
        proposals=None if vae is None else chains.clone(),
        made=torch.zeros((), dtype=torch.int64, device=device),
        broken=torch.zeros((), dtype=torch.bool, device=device),
        seed=seed,
        lr_factor=torch.ones((), dtype=torch.float32, device=device),
        given=energy,
        begins=None if resume is not None else "numbered" if settings.out is None else "named",
    )
    if resume is not None:
        restore(job, changed_data)
        if job.iteration > settings.iterations:
            raise ValueError(f"iterations must be at least the {job.iteration} made already, got {settings.iterations}")
    return job


def check_finite(job: Job) -> None:
    """Raise `Diverged`, with the last finite state saved, if an update was not finite."""
    if job.broken.item():
        job.iteration = int(job.made)
        save(job)
        count = len(job.rolled_back)
        after = f" after {count} rollback{'s' if count > 1 else ''}" if count else ""
        also, rates = ("", "--lr") if job.vae is None else (", the VAE's gradient", "--lr, --vae-lr")
        raise Diverged(
            f"diverged at update {job.iteration + 1}{after}: the energies, their gradient{also} or the chains are no "
            f"longer finite. {job.directory} holds the last finite state; a smaller {rates} or --step-size, or a "
            "larger --threshold (fewer clipped elements, less bias), may help"
        )


def describe(job: Job) -> str:
    """One line on the device and the implementation in use."""
    energy = build.at_precision(job.ebm.module, job.settings.precision)
    sampler = build.with_replicas(job.sampler, job.settings)
    return chain.describe(sampler, energy, job.chains, fused=job.settings.fused, update=True)


#: Checkpoints kept that a run may go back to.
_GOOD = 3


def save(job: Job, *, good: bool = False) -> Path:
    """Write a checkpoint; its path. ``good``: one that a run which rolls back may go back to."""
    if good and job.settings.on_divergence == "rollback":
        job.good = [*(made for made in job.good if made < job.iteration), job.iteration][-_GOOD:]
    contents = Contents(
        energy=learner.contents(job.ebm),
        vae=None if job.vae is None else learner.contents(job.vae),
        start=job.start.tensors(),
        chains=job.chains,
        proposals=job.proposals,
        iteration=job.iteration,
        seconds=job.seconds,
        fingerprint=job.data.fingerprint,
        box=job.data.box,
        rollbacks=job.rolled_back,
        good=job.good,
        classes=job.data.count if job.settings.classes else None,
    )
    folder = job.directory / "checkpoints"
    return checkpoint.save_numbered(folder, job.iteration, *packed(contents), also=job.good)


def restore(job: Job, changed_data: bool = False) -> None:
    """The newest checkpoint, into a job of the run's settings."""
    found = unpacked(*checkpoint.load_latest(job.directory / "checkpoints", job.device))
    changed = images.changes(found.fingerprint, job.data.fingerprint)  # a checkpoint of before has none
    if changed and not changed_data:
        raise ValueError(
            f"data are not what {job.directory} was trained on: {'; '.join(changed)}. Put them back, or go on with "
            "these, and other numbers, by --changed-data"
        )
    put_back(job, found)
    job.seconds, job.rolled_back = found.seconds, list(found.rollbacks)
    if job.settings.on_divergence == "rollback":  # of a run that did not mean to, all that are there
        there = checkpoint.numbers(job.directory / "checkpoints")
        job.good = list(found.good) or [made for made in there if made <= job.iteration]
    set_noise_and_rates(job)


def put_back(job: Job, found: Contents) -> None:
    """What a checkpoint holds of an update's tensors, into those of the job, which stay where they are."""
    learner.restore(job.ebm, found.energy, job.directory)
    if job.vae is not None:
        learner.restore(job.vae, found.vae or MISSING, job.directory)
        job.proposals.copy_(found.proposals)
    for name, tensor in job.start.tensors().items():
        tensor.copy_(found.start[name])
    job.chains.copy_(found.chains[: job.settings.batch_size])
    job.iteration = found.iteration
    job.made.fill_(job.iteration)
    job.broken.fill_(False)


def set_noise_and_rates(job: Job) -> None:
    """Seed and learning rates as the job's rollbacks have left them, as values of the tensors that updates read."""
    seed = job.rolled_back[-1].seed if job.rolled_back else job.settings.seed
    job.seed.copy_(noise.as_word64(seed))
    job.lr_factor.fill_(job.rate)


def with_own(settings: Settings, resume: str | Path | None, energy: Any, data: Any) -> Settings:
    """The settings with what config.json says of an energy or data given from Python; of a resumed run as it has them.

    Raises ValueError where it would be given twice, or the resumed run has none of the user's own."""
    given = {name: thing for name, thing in (("energy", energy), ("data", data)) if thing is not None}
    if resume is not None:
        before = read_settings(resume)
        refuse_given(before, resume, energy, data)
        return dataclasses.replace(settings, **{name: getattr(before, name) for name in given})
    for name, thing in given.items():
        got = getattr(settings, name)
        if got != getattr(Settings, name) and getattr(thing, "name", None) != got:
            raise ValueError(f"{name} is given twice: as {type(thing).__name__}, and in the settings as {got!r}")
        if got == getattr(Settings, name):
            settings = dataclasses.replace(settings, **{name: own.name_of(thing)})
    return settings


#: Data on which an energy of the user's own is tried ahead of the run.
_TRIED = 3


def _device(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def notes(job: Job) -> list[str]:
    """What somebody who goes on with a run may not expect, a line each."""
    if job.begins is not None:
        return []
    before, now, found = read_settings(job.directory).iterations, job.settings.iterations, []
    for flag, taught in (("--lr-decay", job.ebm), ("--vae-lr-decay", job.vae)):
        if taught is not None and taught.rate.decay == "linear" and before != now:
            was, rate = (job.rate * taught.rate._replace(iterations=n).at(job.iteration) for n in (before, now))
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


def new_directory(settings: Settings) -> Path:
    """Where a new run would go now: --out, in which one must be able to begin, or the first free name under runs/."""
    if settings.out is None:
        return next(path for path in run_directory.names(own.folder(settings.data)) if not path.exists())
    path = Path(settings.out)
    run_directory.check_new(path)
    return path


@contextlib.contextmanager
def run_directory_of(job: Job) -> Iterator[None]:
    """The run's folder is there, and no other process trains in it; of a new run it is this one's from here on.

    Raises `run_directory.Taken` if the folder is another's."""
    if job.begins == "numbered":
        job.directory = run_directory.make(run_directory.names(own.folder(job.settings.data)))
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
    files.write_text(job.directory / "config.json", config.dump(job.settings))
    if job.begins is not None:
        save(job, good=True)
        job.begins = None


@dataclasses.dataclass
class Job:
    """A run in progress: its settings, its parts and where it stands."""

    settings: Settings
    directory: Path
    device: torch.device
    data: build.Dataset
    ebm: Learner
    vae: Learner | None  #: what proposes where chains start, of init="vae"
    sampler: sampler.Sampler
    start: Any  #: one of fastanila.samplers.starts
    chains: Tensor  #: (B, ...) where the last update left them
    proposals: Tensor | None  #: (B, ...) where it started them, of init="vae"
    made: Tensor  #: updates made, 0-dim int64 on the device
    broken: Tensor  #: 0-dim bool on the device: an update was not finite, and none was made since
    seed: Tensor  #: 0-dim int64 on the device: of all noise of the updates
    lr_factor: Tensor  #: 0-dim float32 on the device: by which the learning rates are multiplied
    given: nn.Module | None = None  #: the energy, where it was given from Python
    iteration: int = 0  #: updates asked for
    seconds: float = 0.0  #: spent in updates
    begins: Literal["named", "numbered"] | None = None  #: in ``directory``, or under the next free name; None: goes on
    rolled_back: list[Rollback] = dataclasses.field(default_factory=list)
    good: list[int] = dataclasses.field(default_factory=list)  #: updates of the checkpoints that one may go back to

    @property
    def rate(self) -> float:
        """What the settings' learning rates are multiplied by."""
        return self.rolled_back[-1].rate if self.rolled_back else 1.0

    @property
    def learners(self) -> list[Learner]:
        return [self.ebm] if self.vae is None else [self.ebm, self.vae]
