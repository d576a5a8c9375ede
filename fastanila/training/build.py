"""The parts of a run, built from its settings."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import nn

from .. import noise
from ..data import completion, densities, images, registry
from ..models import vae, wrappers
from ..models.energies import MLP, ConvNet
from ..models.wrappers import Autocast
from ..samplers import SAMPLERS, starts
from ..samplers.sampler import Sampler
from . import config
from .learner import as_number
from .settings import Settings

Dataset = densities.Density | images.Images | completion.Completions


def load_data(settings: Settings, device, data_dir: str | None = None) -> Dataset:
    """The run's data set, from ``data_dir`` where they are images that have moved."""
    found = registry.load(
        settings.data,
        data_dir=settings.data_dir if data_dir is None else config.path_of("data_dir", data_dir),
        size=settings.image_size,
        channels=settings.channels,
        download=settings.download,
        device=device,
    )
    return completion.Completions(found, settings.mask) if settings.task == "completion" else found


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
        return wrappers.ConditionalEnergy(network) if settings.task == "completion" else network


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
                box=registry.box_of(settings.data),
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
        return starts.AmortizedStart(count, proposer, seed=seed)
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
