"""What the commands share: a run's parts built from its settings, and a trained run read back."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import chains as starts
from . import checkpoint, config, data, noise
from .config import Settings
from .energies import MLP, Autocast, ConvNet, Tempered
from .samplers import SAMPLERS, Sampler


class Run(NamedTuple):
    energy: nn.Module  #: the moving average where the run keeps one, in eval mode
    sampler: Sampler
    chains: Tensor  #: (B, ...) the chains as the run left them
    settings: Settings
    iteration: int  #: updates made


def load(directory: str | Path, device: str = "auto") -> Run:
    """A trained run from its directory: the newest whole checkpoint.

    Raises FileNotFoundError if it is no run or has no checkpoint yet, `checkpoint.CheckpointError` if all are damaged.
    """
    settings = read_settings(directory)
    device = device_of(device)
    tensors, state = checkpoint.load_latest(Path(directory) / "checkpoints", device)
    chains = last_chains(tensors)
    energy = build_energy(settings, tuple(chains.shape[1:])).to(device)
    which = "ema" if settings.ema else "energy"
    load_parameters(energy, checkpoint.subset(tensors, which), directory)
    energy = at_precision(energy, settings.precision).eval()
    box = data.box_of(settings.data)
    return Run(energy, build_sampler(settings, box), chains, settings, state["iteration"])


def with_sampler(run: Run, sampler: str, **changes: Any) -> Run:
    """The run with another sampler for its model, by the name that the commands know it by.

    Threshold and step size are translated (`config.translated`) unless ``changes`` (threshold, step_size, norm,
    leapfrog_steps) gives them; a frozen gain stays with AniLA only. A model that was trained at a temperature sigma**2
    is given to an exact sampler, which has no noise scale, as U / sigma**2. Raises ValueError for an unknown name, a
    setting that the sampler has not, or one that cannot be.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    known = {f.name for f in dataclasses.fields(SAMPLERS[sampler])}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"{name} is no setting of {sampler}, which has {', '.join(sorted(known))}; got {value}")
    before = run.settings
    own = config.translated(vars(before), before.sampler, sampler, changes.get("step_size")) | changes
    refresh = before.refresh if "refresh" in known else "transition"
    settings = dataclasses.replace(before, sampler=sampler, refresh=refresh, **own)
    config.check(settings)
    heated = sampler in config.EXACT and before.noise_scale != 1.0
    energy = Tempered(run.energy, before.noise_scale**2).eval() if heated else run.energy
    return run._replace(energy=energy, sampler=build_sampler(settings, data.box_of(before.data)), settings=settings)


def updates_past(run: Run) -> int:
    """An update that lies past all of training, so that the same seed does not repeat its noise."""
    return max(run.iteration, run.settings.iterations)


def last_chains(tensors: dict[str, Tensor]) -> Tensor:
    """The chains as a checkpoint's run left them: all of a persistent population, otherwise the last update's."""
    return tensors["start.population"] if "start.population" in tensors else tensors["chains"]


def read_settings(directory: str | Path) -> Settings:
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a run: it has no config.json")
    return config.resolve(Settings(**config.read(path)))


def load_parameters(energy: nn.Module, tensors: dict[str, Tensor], where) -> None:
    try:
        energy.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        message = f"{where}: the checkpoint does not fit the settings' network ({reason})"
        raise checkpoint.CheckpointError(message) from None


def load_data(settings: Settings, device) -> data.Density | data.Images:
    return data.load(
        settings.data,
        data_dir=settings.data_dir,
        size=settings.image_size,
        channels=settings.channels,
        download=settings.download,
        device=device,
    )


def build_energy(settings: Settings, shape: tuple[int, ...]) -> nn.Module:
    """The energy network on the CPU, initialised from the run's seed whatever torch's generator is at."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.energy == "mlp":
            return MLP(
                math.prod(shape),
                settings.width,
                settings.depth,
                features=settings.features,
                feature_scale=settings.feature_scale,
                confinement=settings.confinement,
                seed=settings.seed,
            )
        return ConvNet(shape[0], shape[1], settings.width, confinement=settings.confinement)


def build_sampler(settings: Settings, box: tuple[float, float]) -> Sampler:
    """The sampler called ``settings.sampler``, with those of the settings that it has; clamped to the box if wanted."""
    kind = SAMPLERS[settings.sampler]
    bounds = box if settings.clamp else None
    own = {f.name: bounds if f.name == "bounds" else getattr(settings, f.name) for f in dataclasses.fields(kind)}
    return kind(**own)


def build_start(settings: Settings, dataset: data.Density | data.Images, device):
    """The chain start of the settings' ``init``."""
    count, seed = settings.batch_size, noise.as_word64(settings.seed, device)
    if settings.init == "data":
        return starts.DataStart(count, dataset, seed=seed, device=device)
    if settings.init == "noise":
        return starts.NoiseStart(count, dataset.shape, dataset.box, seed=seed, device=device)
    return starts.PersistentStart(
        count, settings.chains, dataset.shape, dataset.box, reinit=settings.reinit, seed=seed, device=device
    )


def at_precision(energy: nn.Module, precision: str) -> nn.Module:
    return Autocast(energy) if precision == "bf16" else energy


def averaged(energy: nn.Module) -> nn.Module:
    return copy.deepcopy(energy).requires_grad_(False).eval()


def device_of(name: str) -> torch.device:
    """The torch device of --device. Raises ValueError where it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch {torch.__version__} sees no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but there are {torch.cuda.device_count()} CUDA devices")
    return device


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """float32 means float32, also in cuDNN, which takes TF32 unless told; put back on leaving."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
