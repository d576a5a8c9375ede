"""What the commands share: a run's parts built from its settings, and a trained run read back."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import chains as starts
from . import checkpoint, completion, config, data, noise, vae
from .config import Settings
from .energies import MLP, Autocast, ConvNet, Tempered
from .learners import as_number, load_parameters
from .samplers import SAMPLERS, Sampler

Dataset = data.Density | data.Images | completion.Completions

#: What the names of a VAE's tensors in a checkpoint begin with.
AMORTIZED = "amortized"


class Run(NamedTuple):
    energy: nn.Module  #: the moving average where the run keeps one, in eval mode
    sampler: Sampler
    chains: Tensor  #: (B, ...) the chains as the run left them
    settings: Settings
    iteration: int  #: updates made
    vae: vae.VAE | None = None  #: of init="vae": what proposes where chains start; its moving average, as the energy's
    fingerprint: dict | None = None  #: of the images it was trained on (`data.Images.fingerprint`); None if not known


def load(directory: str | Path, device: str = "auto") -> Run:
    """A trained run from its directory: the newest whole checkpoint.

    Raises FileNotFoundError if it is no run or has no checkpoint yet, `checkpoint.CheckpointError` if all are damaged.
    """
    directory = config.path_of("run", directory)
    with torch.inference_mode(False), torch.device("cpu"):  # whatever torch's mode and default device are
        return _load(directory, device_of(device))


def _load(directory: Path, device: torch.device) -> Run:
    settings = read_settings(directory)
    tensors, state = checkpoint.load_latest(directory / "checkpoints", device)
    chains = last_chains(tensors)

    def trained(network: nn.Module, tensors: dict[str, Tensor], name: str) -> nn.Module:
        which = "ema" if settings.ema else name
        load_parameters(network.to(device), checkpoint.subset(tensors, which), directory)
        return network.eval()

    energy = at_precision(trained(build_energy(settings, chains.shape[1:]), tensors, "energy"), settings.precision)
    proposer = None
    if settings.init == "vae":
        proposer = trained(build_vae(settings, chains.shape[1:]), checkpoint.subset(tensors, AMORTIZED), "vae")
    sampler = build_sampler(settings, data.box_of(settings.data))
    return Run(energy, sampler, chains, settings, state["iteration"], proposer, state.get("data"))


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
    path = config.path_of("run", directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a run: it has no config.json")
    return config.resolve(Settings(**config.read(path)))


def load_data(settings: Settings, device, data_dir: str | None = None) -> Dataset:
    """The run's data set, from ``data_dir`` where they are images that have moved."""
    found = data.load(
        settings.data,
        data_dir=settings.data_dir if data_dir is None else config.path_of("data_dir", data_dir),
        size=settings.image_size,
        channels=settings.channels,
        download=settings.download,
        device=device,
    )
    return completion.Completions(found, settings.mask) if settings.task == "completion" else found


def data_of(run: Run, data_dir: str | None = None) -> Dataset:
    """`load_data` of a trained run, on its chains' device, with a warning if they are not what it was trained on."""
    dataset = load_data(run.settings, run.chains.device, data_dir)
    if changed := data.changes(run.fingerprint, dataset.fingerprint):
        told = "the images are not those the run was trained on, of which some may be held out now"
        warnings.warn(f"{told}: {'; '.join(changed)}", stacklevel=2)
    return dataset


def build_energy(settings: Settings, shape: tuple[int, ...]) -> nn.Module:
    """The energy network on the CPU, initialised from the run's seed whatever torch's generator is at."""
    confinement = settings.confinement + settings.reference_sd**-2
    with _seeded(settings.seed):
        if settings.energy == "mlp":
            return MLP(
                math.prod(shape),
                settings.width,
                settings.depth,
                features=settings.features,
                feature_scale=settings.feature_scale,
                confinement=confinement,
                seed=settings.seed,
            )
        network = ConvNet(shape[0], shape[1], settings.width, confinement=confinement)
        return completion.ConditionalEnergy(network) if settings.task == "completion" else network


#: Added to the seed, of which torch takes 32 bits: networks of like layers would else begin as copies of one another.
_OF_VAE = 1 << 31


def build_vae(settings: Settings, shape: tuple[int, ...]) -> vae.VAE:
    """The VAE on the CPU, initialised as the energy is, but from numbers of its own."""
    with _seeded(settings.seed + _OF_VAE):
        if settings.energy == "mlp":
            return vae.of_vectors(
                math.prod(shape),
                settings.latent,
                settings.vae_width,
                features=settings.features,
                feature_scale=settings.feature_scale,
                box=data.box_of(settings.data),
                seed=settings.seed,
            )
        channels, size, _ = shape
        if settings.task == "completion":
            return vae.of_completions(channels - 1, size, settings.latent, settings.vae_width)
        return vae.of_images(channels, size, settings.latent, settings.vae_width)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        yield


def build_sampler(settings: Settings, box: tuple[float, float]) -> Sampler:
    """The sampler called ``settings.sampler``, with those of the settings that it has; clamped to the box if wanted."""
    kind = SAMPLERS[settings.sampler]
    bounds = box if settings.clamp else None
    own = {f.name: bounds if f.name == "bounds" else getattr(settings, f.name) for f in dataclasses.fields(kind)}
    return kind(**own)


def build_start(settings: Settings, dataset: Dataset, device, proposer: vae.VAE | None = None):
    """The chain start of the settings' ``init``; ``proposer`` is that of "vae"."""
    count, seed = settings.batch_size, noise.as_word64(settings.seed, device)
    if settings.init == "vae":
        return starts.AmortizedStart(count, proposer, seed=seed, device=device)
    if settings.init == "data":
        return starts.DataStart(count, dataset, seed=seed, device=device)
    if settings.init == "noise":
        return starts.NoiseStart(count, dataset.shape, dataset.box, seed=seed, device=device)
    return starts.PersistentStart(
        count, settings.chains, dataset.shape, dataset.box, seed=seed, device=device,
        reinit=as_number(settings.reinit, device),
    )  # fmt: skip


def at_precision(energy: nn.Module, precision: str) -> nn.Module:
    return Autocast(energy) if precision == "bf16" else energy


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
