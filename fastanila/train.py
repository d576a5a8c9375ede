"""Train an energy-based model: `python -m fastanila.train --fused`, or `train(Settings(...))`.

Algorithm 1 of Karimi, Xie and Li: an update draws data, starts chains, moves them K transitions of the sampler, and
takes an Adam step along mean grad U(data) - mean grad U(chains).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint, config, data, exact, noise, ops, plots, runs, samplers
from .capture import compiled, transition_of
from .config import Settings
from .energies import evaluator, sampling
from .noise import Stream
from .objectives import likelihood
from .report import Metrics, Progress, tensorboard_writer

DONE, BAD_ARGUMENTS, DIVERGED = 0, 2, 3
#: An energy beyond this has left everything that training could bring back.
_LARGEST_ENERGY = 1e8
_ADAM_BETAS = (0.9, 0.999)


class Diverged(RuntimeError):
    """The loss, its gradient or the chains are no longer finite; the run's last finite state has been saved."""


class Interrupted(RuntimeError):
    """A signal ended the run between two updates; a checkpoint has been saved."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


@dataclasses.dataclass
class Job:
    """A run in progress: its settings, its parts and where it stands."""

    settings: Settings
    directory: Path
    device: torch.device
    data: data.Density | data.Images
    energy: nn.Module
    average: nn.Module | None  #: the moving average of the parameters
    optimizer: torch.optim.Optimizer
    sampler: samplers.Sampler
    start: Any  #: one of fastanila.chains
    iteration: int = 0  #: updates made
    seconds: float = 0.0  #: spent in updates
    chains: Tensor | None = None  #: the last update's

    @property
    def model(self) -> nn.Module:
        """What sampling and evaluation use."""
        return self.energy if self.average is None else self.average


class Update(NamedTuple):
    """What one update did; tensors are 0-dim."""

    energy_data: Tensor
    energy_chains: Tensor
    grad_norm: Tensor
    info: samplers.Info  #: the chains' last transition
    chains: Tensor  #: (B, ...) where it left them
    finite: bool


def train(settings: Settings, resume: str | Path | None = None, say: Callable[[str], None] = print) -> runs.Run:
    """Train as the settings say; or go on with the run in ``resume``, of which they may only differ where harmless.

    Writes the run directory (config.json, metrics.jsonl, checkpoints/, samples/, figure.png) and returns the run.
    Raises ValueError or FileNotFoundError for settings that cannot be, `Diverged`, `Interrupted`.
    """
    return run(prepare(settings, resume), say)


def prepare(settings: Settings, resume: str | Path | None = None) -> Job:
    """Check the settings and build a run's parts; writes nothing. Raises ValueError or FileNotFoundError."""
    settings = config.resolve(settings)
    if resume is not None:
        settings = resumed_settings(settings, resume)
    device = runs.device_of(settings.device)
    directory = Path(resume) if resume is not None else new_directory(settings)
    if settings.tensorboard:
        tensorboard_writer()
    dataset = runs.load_data(settings, device)
    energy = runs.build_energy(settings, dataset.shape).to(device)
    job = Job(
        settings=dataclasses.replace(settings, out=str(directory)),
        directory=directory,
        device=device,
        data=dataset,
        energy=energy,
        average=runs.averaged(energy) if settings.ema else None,
        optimizer=torch.optim.Adam(energy.parameters(), lr=settings.lr, betas=_ADAM_BETAS),
        sampler=runs.build_sampler(settings, dataset.box),
        start=runs.build_start(settings, dataset, device),
    )
    if resume is not None:
        restore(job)
        if job.iteration > settings.iterations:
            raise ValueError(f"iterations must be at least the {job.iteration} made already, got {settings.iterations}")
    return job


def run(job: Job, say: Callable[[str], None] = print) -> runs.Run:
    """Make the updates that are left, and leave the run directory complete."""
    s = job.settings
    (job.directory / "samples").mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(job.directory / "config.json", config.dump(s))
    say(runs.path_in_use(s, job.device))
    update = build_update(job)
    with (
        contextlib.nullcontext() if s.fused else ops.plain(),
        runs.matmul_precision(s.precision),
        Metrics(job.directory, job.iteration, s.tensorboard) as metrics,
        Progress(job.iteration, s.iterations, say) as progress,
        caught_signals() as caught,
    ):
        while job.iteration < s.iterations:
            began = time.perf_counter()
            made = update(job.iteration)
            if not made.finite:
                save(job)
                raise Diverged(
                    f"diverged at update {job.iteration + 1}: the energies, their gradient or the chains are no longer "
                    f"finite. {job.directory} holds the last finite state; a smaller --lr or --step-size, or a larger "
                    "--threshold (fewer clipped elements, less bias), may help"
                )
            job.chains = made.chains
            job.iteration += 1
            job.seconds += time.perf_counter() - began
            last = job.iteration == s.iterations
            pictured = bool(s.sample_every) and (job.iteration % s.sample_every == 0 or last)
            if job.iteration % s.log_every == 0 or pictured or last:
                row = summary(job, made) | (exact_numbers(job) if pictured else {})
                metrics.write(row)
                progress.show(row)
            if job.iteration % s.save_every == 0 or last:
                save(job)
            if pictured:
                picture(job, job.directory / "samples" / f"{job.iteration:08d}.png")
            if caught and not last:
                save(job)
                where = f"stopped after update {job.iteration}, saved; go on with --resume {job.directory}"
                raise Interrupted(f"{signal.Signals(caught[0]).name}: {where}", caught[0])
    picture(job, job.directory / "figure.png")
    say(f"done: {job.iteration} updates in {job.seconds:.0f} s; everything is in {job.directory}")
    return runs.load(job.directory, str(job.device))


# --------------------------------------------------------------------------------------------------------- an update


def build_update(job: Job) -> Callable[[int], Update]:
    """update(iteration), which draws, samples, and moves the parameters unless something is not finite."""
    s, device = job.settings, job.device
    energy = runs.at_precision(job.energy, s.precision)
    parameters = list(job.energy.parameters())
    advance = transition_of(job.sampler, energy, compile=s.fused, strict=True)
    numbers = job.sampler.numbers_on(device)
    seed = noise.as_word64(s.seed, device)

    def objective(batch: Tensor, chains: Tensor):
        return likelihood(energy, batch, chains, s.energy_l2)

    loss_of = compiled(objective) if s.fused else objective

    def update(iteration: int) -> Update:
        job.energy.train()
        batch = draw_data(job, iteration)
        chains, info = move(iteration, job.start.draw(iteration))

        result = loss_of(batch, chains)
        job.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, s.clip_grad or math.inf)
        energies = torch.stack((result.energy_data, result.energy_chains))
        finite = bool(
            torch.isfinite(grad_norm) & torch.isfinite(chains).all() & (energies.abs() < _LARGEST_ENERGY).all()
        )
        if finite:
            for group in job.optimizer.param_groups:
                group["lr"] = learning_rate(s, iteration)
            job.optimizer.step()
            if job.average is not None:
                follow(job.average, job.energy, min(s.ema, (1 + iteration) / (10 + iteration)))
            job.start.keep(iteration, chains)
        return Update(result.energy_data, result.energy_chains, grad_norm, info, chains, finite)

    def move(iteration: int, z: Tensor) -> tuple[Tensor, samplers.Info]:
        with torch.no_grad(), sampling(energy):
            state = job.sampler.init(evaluator(energy), z)
            # A chain's index is its place in this update's batch: transitions never share a step, so none repeats.
            step = noise.as_word64(iteration * s.steps, device)
            for _ in range(s.steps):
                state, info = advance(numbers, state, seed, step)
                step = step + 1
        return state.z, info

    return update


def draw_data(job: Job, iteration: int) -> Tensor:
    s = job.settings
    batch = job.data.draw(s.batch_size, seed=s.seed, step=iteration, device=job.device)
    if s.data_noise:
        batch = batch + s.data_noise * noise.normal(
            batch.shape, seed=s.seed, step=iteration, stream=Stream.DATA_NOISE, device=job.device
        )
    return batch


def learning_rate(settings: Settings, iteration: int) -> float:
    left = 1 - iteration / settings.iterations if settings.lr_decay == "linear" else 1.0
    return settings.lr * left


@torch.no_grad()
def follow(average: nn.Module, energy: nn.Module, decay: float) -> None:
    """Move the average's parameters by 1 - decay of the way towards the energy's."""
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in energy.parameters()], 1 - decay)


# ---------------------------------------------------------------------------------------------------- what it shows


def summary(job: Job, made: Update) -> dict[str, float | int]:
    """A line of metrics.jsonl."""
    on_data, on_chains = made.energy_data.item(), made.energy_chains.item()
    return {
        "iteration": job.iteration,
        "energy_data": on_data,
        "energy_chains": on_chains,
        "energy_gap": on_chains - on_data,
        "score_rms": made.info.score_rms.square().mean().sqrt().item(),
        "clip_fraction": made.info.clip_fraction.mean().item(),
        "grad_norm": made.grad_norm.item(),
        "lr": learning_rate(job.settings, job.iteration - 1),
        "seconds": job.seconds,
    }


def exact_numbers(job: Job) -> dict[str, float]:
    """The negative log likelihood by quadrature, in two dimensions; nothing otherwise."""
    if not isinstance(job.data, data.Density):
        return {}
    numbers = exact.evaluate(evaluated(job), job.data, resolution=200, device=job.device)
    return {"nll": numbers["nll"], "tv": numbers["tv"]}


def evaluated(job: Job) -> nn.Module:
    return runs.at_precision(job.model, job.settings.precision)


def picture(job: Job, path: Path) -> None:
    if isinstance(job.data, data.Density):
        plots.save_plane(path, evaluated(job), job.data, job.chains, f"{job.data.name}, {job.iteration} updates")
    else:
        plots.save_images(path, job.chains[:64], job.data.box)


# ------------------------------------------------------------------------------------------------- saving, resuming


def save(job: Job) -> None:
    tensors = checkpoint.prefixed("energy", job.energy.state_dict())
    if job.average is not None:
        tensors |= checkpoint.prefixed("ema", job.average.state_dict())
    tensors |= checkpoint.optimizer_tensors(job.optimizer, [name for name, _ in job.energy.named_parameters()])
    tensors |= checkpoint.prefixed("start", job.start.tensors())
    if "start.population" not in tensors:
        tensors["chains"] = job.start.draw(0) if job.chains is None else job.chains
    state = {"iteration": job.iteration, "seconds": job.seconds}
    checkpoint.save_numbered(job.directory / "checkpoints", job.iteration, tensors, state)


def restore(job: Job) -> None:
    tensors, state = checkpoint.load_latest(job.directory / "checkpoints", job.device)
    runs.load_parameters(job.energy, checkpoint.subset(tensors, "energy"), job.directory)
    if job.average is not None:
        runs.load_parameters(job.average, checkpoint.subset(tensors, "ema"), job.directory)
    checkpoint.restore_optimizer(job.optimizer, [name for name, _ in job.energy.named_parameters()], tensors)
    for name, tensor in job.start.tensors().items():
        tensor.copy_(tensors[f"start.{name}"])
    job.chains = runs.last_chains(tensors)[: job.settings.batch_size]
    job.iteration, job.seconds = state["iteration"], state["seconds"]


def resumed_settings(settings: Settings, directory: str | Path) -> Settings:
    """The settings to go on with. Raises ValueError for one that would change the numbers of the run."""
    before = runs.read_settings(directory)
    for field in dataclasses.fields(Settings):
        was, now = getattr(before, field.name), getattr(settings, field.name)
        if was != now and field.name not in config.RESUMABLE and field.name != "out":
            raise ValueError(f"{field.name} cannot change when a run is resumed: {directory} has {was!r}, got {now!r}")
    return settings


def new_directory(settings: Settings) -> Path:
    """Where a new run goes: --out, which must not hold another, or the first free name under runs/."""
    if settings.out is not None:
        path = Path(settings.out)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"out must be a new or empty folder, but {path} holds another run; --resume goes on")
        return path
    path, number = Path("runs") / settings.data, 2
    while path.exists():
        path, number = Path("runs") / f"{settings.data}-{number}", number + 1
    return path


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted, to be acted on between updates; a second one acts at once."""
    caught: list[int] = []
    before = {}

    def note(number, frame):
        caught.append(number)
        for n, handler in before.items():
            signal.signal(n, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: whoever runs this thread handles signals
        pass
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------ command line


EXTRA = {
    "config": (str, "TOML file of settings, or a run's config.json; flags win over it."),
    "resume": (str, "Run directory to go on with: its settings hold, and only flags that change no number may differ."),
    "dry_run": (bool, "Check everything, print the resolved settings, and stop."),
}


def parse(argv: list[str] | None) -> tuple[Settings, str | None, bool]:
    """(settings, not yet resolved; --resume; --dry-run): flags over the config file or the resumed run."""
    import argparse

    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "resume", "data"):
        ahead.add_argument(f"--{name}")
    files, _ = ahead.parse_known_args(argv)
    if files.config is not None and files.resume is not None:
        raise ValueError("config cannot be given with resume: a run goes on with its own settings")
    under: dict[str, Any] = {}
    if files.config is not None:
        under = config.read(files.config)
        if files.config.endswith("config.json"):  # to start the same run again, somewhere else
            under.pop("out", None)
    elif files.resume is not None:
        under = dataclasses.asdict(runs.read_settings(files.resume))
    dataset = files.data if files.data is not None else under.get("data", Settings.data)
    values = vars(cli(argv, config.defaults(dataset) | under))
    resume, dry_run, _ = values.pop("resume"), values.pop("dry_run"), values.pop("config")
    return Settings(**values), resume, dry_run


def cli(argv: list[str] | None, defaults: dict[str, Any]):
    """The flags, one a setting, whose --help shows the defaults of the data set that is asked for."""
    from typing import Annotated, get_type_hints

    import tyro

    hints = get_type_hints(Settings)
    fields: list[Any] = []
    for f in dataclasses.fields(Settings):
        default = defaults.get(f.name, f.default)
        hint = hints[f.name] if default is None else config.without_none(hints[f.name])
        fields.append((f.name, Annotated[hint, tyro.conf.arg(help=f.metadata["help"])], default))
    for name, (kind, text) in EXTRA.items():
        hint, default = (bool, False) if kind is bool else (kind | None, None)
        fields.append((name, Annotated[hint, tyro.conf.arg(help=text)], default))
    flags = dataclasses.make_dataclass("Flags", fields)
    return tyro.cli(
        flags,
        args=argv,
        prog="python -m fastanila.train",
        description="Train an energy-based model with Langevin chains.",
    )


def main(argv: list[str] | None = None) -> int:
    try:
        settings, resume, dry_run = parse(argv)
        job = prepare(settings, resume)
    except (ValueError, TypeError, OSError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    if dry_run:
        print(runs.path_in_use(job.settings, job.device))
        print(config.dump(job.settings), end="")
        return DONE
    try:
        run(job, lambda line: print(line, flush=True))
    except Diverged as stop:
        print(f"error: {stop}", file=sys.stderr)
        return DIVERGED
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).strip().splitlines()[0]
        print(f"error: compiling failed; --no-fused runs without a compiler ({reason})", file=sys.stderr)
        return BAD_ARGUMENTS
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.number
    return DONE


if __name__ == "__main__":
    sys.exit(main())
