"""The parts of a run, built from its settings."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import noise
from ..data import classes, completion, densities, images, registry, samples
from ..models import score, vae, wrappers
from ..models.energies import MLP, ConvNet
from ..models.unet import UNet
from ..models.wrappers import Autocast
from ..ops import dispatch
from ..samplers import SAMPLERS, ReplicaExchange, starts, weighted
from ..samplers.sampler import Sampler
from . import config, own
from .learner import as_number
from .settings import Settings

Dataset = densities.Density | images.Images | samples.Vectors | completion.Completions | classes.ByClass


def condition(settings: Settings):
    """The module of `fastanila.data` whose states the run's are, where they hold what they are conditioned on: its
    ``images(z)`` are what is drawn, and its ``free(z)`` where chains may move. None where states are data."""
    return completion if settings.task == "completion" else classes if settings.classes else None


def own_data(settings: Settings, given: Any = None) -> densities.Density | images.Images | samples.Vectors | None:
    """The user's own data, on the CPU: ``given``, or what the reference in the settings returns; None for named data.

    Raises ValueError or TypeError for what can be no data (`samples.of`), or was given from Python and is not now.
    """
    if given is None and own.is_given(settings.data):
        raise ValueError(own.not_found("data", settings.data, "the run"))
    if given is None and not own.is_reference(settings.data):
        return None
    return samples.of(own.made("data", settings.data) if given is None else given, settings.data)


def load_data(settings: Settings, device, data_dir: str | None = None, given: Any = None) -> Dataset:
    """The run's data set, from ``data_dir`` where they are images that have moved; ``given``: the user's own."""
    found = own_data(settings, given)
    if found is not None:
        return _as_states(settings, found if isinstance(found, densities.Density) else found.to(device))
    found = registry.load(
        settings.data,
        data_dir=settings.data_dir if data_dir is None else config.path_of("data_dir", data_dir),
        size=settings.image_size,
        channels=settings.channels,
        download=settings.download,
        device=device,
    )
    return _as_states(settings, found)


def _as_states(settings: Settings, found: Any) -> Dataset:
    if settings.classes:
        return classes.ByClass(found)
    return completion.Completions(found, settings.mask) if settings.task == "completion" else found


def build_energy(
    settings: Settings, shape: tuple[int, ...], given: nn.Module | None = None, count: int | None = None
) -> nn.Module:
    """The energy network, initialised on the CPU from the run's seed whatever torch's generator is at; or ``given``.

    ``shape``: of a state; ``count``: of classes, where the settings want them. At a temperature T it is the network's
    output over T. Raises ValueError or TypeError where a reference in the settings leads to no nn.Module, or where the
    energy was given from Python and is not now.
    """
    network = _network(settings, shape, given, count)
    return network if settings.temperature == 1 else wrappers.Tempered(network, settings.temperature)


def _network(settings: Settings, shape: tuple[int, ...], given: nn.Module | None, count: int | None) -> nn.Module:
    if settings.classes:
        shape = (shape[0] - 1, *shape[1:])
    if given is not None or own.is_own(settings.energy):
        network = _own_energy(settings, shape, given)
        return wrappers.ClassEnergy(network, count) if settings.classes else network
    confinement = settings.confinement + settings.reference_sd**-2
    with _seeded(settings.seed):
        if settings.energy == "mlp":
            network = MLP(
                math.prod(shape),
                settings.width,
                settings.depth,
                features=settings.features,
                feature_scale=settings.feature_scale,
                confinement=confinement,
                seed=settings.seed,
            )
        else:
            image = dict(confinement=confinement, outputs=count or 1)
            if settings.energy == "unet":
                network = UNet(*shape[:2], settings.width, **image)
            else:
                network = ConvNet(*shape[:2], settings.width, activation=settings.activation, **image)
        if settings.init == "weighted":  # begins as the Gaussian that it is relative to
            last = network.layers.last if settings.energy == "unet" else network.head
            for p in last.parameters():
                nn.init.zeros_(p)
        if settings.classes:
            return wrappers.ClassEnergy(network, count)
        return wrappers.ConditionalEnergy(network) if settings.task == "completion" else network


def _own_energy(settings: Settings, shape: tuple[int, ...], given: nn.Module | None) -> nn.Module:
    if given is None and own.is_given(settings.energy):
        raise ValueError(own.not_found("energy", settings.energy, "the run"))
    if given is None:
        with _seeded(settings.seed):
            given = own.made("energy", settings.energy, tuple(shape))
    if not isinstance(given, nn.Module):
        raise TypeError(f"energy must be an nn.Module, or a function that returns one, got {type(given).__name__}")
    return wrappers.ConditionalEnergy(given) if settings.task == "completion" else given


def check_energy(energy: nn.Module, batch: Tensor) -> None:
    """Raise ValueError or TypeError, in one line, where an energy of the user's own cannot be trained on such data."""
    energy.eval()
    trained = {name: p for name, p in energy.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("energy must have parameters to learn, got a module without any that require a gradient")
    for name, p in trained.items():
        if p.dtype != torch.float32:
            raise ValueError(
                f"energy's parameters must be float32 (--precision sets the arithmetic), got {name} {p.dtype}"
            )
    try:
        with torch.enable_grad():
            value, _ = score.evaluator(energy)(batch)
            gradients = torch.autograd.grad(energy(batch).sum(), list(trained.values()), allow_unused=True)
    except Exception as error:  # whatever the user's module raises
        if str(error).startswith("energy must"):
            raise
        what = f"a batch of the data, {tuple(batch.shape)} {batch.dtype}"
        raise ValueError(f"energy: {type(energy).__name__} cannot take {what}: {own.described(error)}") from error
    if not (value.is_floating_point() and torch.isfinite(value).all()):
        raise ValueError(f"energy must be finite floats, got {value.tolist()} on data")
    for name, gradient in zip(trained, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"energy does not use its parameter {name}: requires_grad_(False) leaves it out")


#: Added to the seed, of which torch takes 32 bits: networks of like layers would else begin as copies of one another.
_OF_VAE = 1 << 31


def build_vae(settings: Settings, shape: tuple[int, ...], box: tuple[float, float]) -> vae.VAE:
    """The VAE on the CPU, initialised as the energy is, but from numbers of its own; ``box``: the data's."""
    with _seeded(settings.seed + _OF_VAE):
        if len(shape) == 1:
            return vae.of_vectors(
                math.prod(shape),
                settings.latent,
                settings.vae_width,
                features=settings.features,
                feature_scale=settings.feature_scale,
                box=box,
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


def with_replicas(sampler: Sampler, settings: Settings) -> Sampler:
    """The sampler, or as many replicas of it as the settings want."""
    if settings.replicas == 1:
        return sampler
    return ReplicaExchange.of(sampler, replicas=settings.replicas, highest=settings.highest)


def fitted(settings: Settings, dataset: Dataset) -> Settings:
    """The settings, whose energy with init="weighted" begins as a Gaussian that covers the data: with neither a
    reference nor a confinement given, the reference is N(0, s^2 I) with the data's own mean square s^2."""
    needed = settings.init == "weighted" and not own.is_own(settings.energy)
    if not needed or settings.confinement + settings.reference_sd**-2 > 0:
        return settings
    return dataclasses.replace(settings, reference_sd=_root_mean_square(settings, dataset) / settings.temperature**0.5)


def _first_sd(settings: Settings, dataset: Dataset) -> float:
    """Of the Gaussian that walkers begin as: the first energy's law; of an energy of the user's own the data's."""
    if own.is_own(settings.energy):
        return _root_mean_square(settings, dataset)
    settings = fitted(settings, dataset)
    return (settings.temperature / (settings.confinement + settings.reference_sd**-2)) ** 0.5


def _root_mean_square(settings: Settings, dataset: Dataset) -> float:
    """Over the elements of some data, with the noise that is added to them."""
    drawn = dataset.draw(_FITTED, seed=settings.seed, step=0)
    return (drawn.double().square().mean().item() + settings.data_noise**2) ** 0.5


#: Data to which the first Gaussian is fitted.
_FITTED = 4096


def build_start(
    settings: Settings, dataset: Dataset, device, proposer: vae.VAE | None = None, seed: Tensor | None = None
):
    """The chain start of the settings' ``init``; ``proposer`` is that of "vae", and ``seed`` a 0-dim int64 tensor in
    place of the settings' number."""
    count = settings.batch_size
    seed = noise.as_word64(settings.seed, device) if seed is None else seed
    labels = dataset.labels if settings.classes else None
    if settings.init == "vae":
        return starts.AmortizedStart(count, proposer, seed=seed)
    if settings.init == "weighted":
        sd = _first_sd(settings, dataset)
        return weighted.WeightedStart(count, settings.witnesses, dataset.shape, sd, seed=seed, device=device)
    if settings.init == "data":
        return starts.DataStart(count, dataset, seed=seed, device=device)
    if settings.init == "noise":
        return starts.NoiseStart(count, dataset.shape, dataset.box, seed=seed, device=device, labels=labels)
    return starts.PersistentStart(
        count, settings.chains, dataset.shape, dataset.box, seed=seed, device=device,
        reinit=as_number(settings.reinit, device), labels=labels, replicas=settings.replicas,
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
def arithmetic(precision: str, *, fused: bool = True) -> Iterator[None]:
    """How a run computes: at its precision (`matmul_precision`), by the fused operators or their plain definition."""
    with matmul_precision(precision), contextlib.nullcontext() if fused else dispatch.plain():
        yield


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
