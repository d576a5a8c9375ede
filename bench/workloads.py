"""What is timed: the definition of each work, of ours and of what the rivals are given."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastanila import AdjustedAniLA, AniLA, Langevin, noise, ops
from fastanila.models import MLP, ConvNet, GaussianMixture
from fastanila.models.score import sampling
from fastanila.models.wrappers import Tempered
from fastanila.samplers.chain import chain_of
from fastanila.samplers.sampler import Sampler
from fastanila.samplers.state import State
from fastanila.training import job as job_training
from fastanila.training import update as update_training
from fastanila.training.build import at_precision, matmul_precision
from fastanila.training.settings import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Way = Callable[[], object]

# ------------------------------------------------------------------------------------------------- the step alone

STEP_THRESHOLD, STEP_SIZE = 1.0, 0.01


def step_arguments(elements: int, dtype: str, device: torch.device) -> dict[str, Tensor]:
    """z, score and the numbers of one step by name, as 0-dim tensors: what a sampler passes."""
    columns = min(64, elements)
    shape = (elements // columns, columns)
    generator = torch.Generator(device).manual_seed(0)
    z, score = (torch.randn(shape, device=device, dtype=DTYPES[dtype], generator=generator) for _ in range(2))
    threshold, step_size = (torch.tensor(x, device=device) for x in (STEP_THRESHOLD, STEP_SIZE))
    seed, step = (torch.tensor(x, device=device) for x in (1, 2))
    return dict(z=z, score=score, threshold=threshold, step_size=step_size, seed=seed, step=step)


def anisotropic_step(z, score, threshold, step_size, seed, step):
    return ops.anisotropic_step(z, score, threshold, step_size=step_size, seed=seed, step=step)


def normals(z, seed, step):
    return noise.normal(z.shape, seed=seed, step=step, device=z.device)


def device_copy(elements: int, dtype: str, device: torch.device) -> Way:
    """A copy that moves as many bytes as a step does, which reads two tensors of that size and writes one."""
    source = torch.zeros(3 * elements // 2, device=device, dtype=DTYPES[dtype])
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def step_bytes(elements: int, dtype: str) -> int:
    return 3 * elements * DTYPES[dtype].itemsize


# --------------------------------------------------------------------------------------------------------- chains


class Numbers(NamedTuple):
    step_size: float
    threshold: float
    noise_scale: float


_PLANE, _IMAGES = Numbers(0.005, 10.0, 1.0), Numbers(4.0, 0.02, 0.005)


@dataclasses.dataclass(frozen=True)
class Chains:
    """A run of chains: z' = z + eps/2 gamma s + sigma sqrt(eps gamma) xi, ``steps`` times over."""

    network: str  #: mixture, mlp-64, mlp-128, convnet-32
    shape: tuple[int, ...]  #: (B, ...)
    steps: int
    precision: str = "float32"  #: float32, tf32, bf16

    @property
    def title(self) -> str:
        chain = "x".join(map(str, self.shape[1:]))
        return f"{self.network}, {self.shape[0]:,} x {chain} x {self.steps}, {self.precision}"

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 4

    @property
    def numbers(self) -> Numbers:
        return _IMAGES if self.is_image else _PLANE

    @property
    def width(self) -> int:
        """Of the network's layers."""
        return int(self.network.partition("-")[2])

    def energy(self, device: torch.device) -> nn.Module:
        """fastanila's module of the energy, always with the same parameters, which are trainable."""
        return at_precision(self._network(), self.precision).to(device)

    def ordinary_energy(self, device: torch.device) -> nn.Module:
        """The same function as anybody writes it: what the rivals are given."""
        network = self._network()
        return (network if self.network == "mixture" else Ordinary(network, self.precision)).to(device)

    def _network(self) -> nn.Module:
        if self.network == "mixture":
            angles = torch.arange(8) * (2 * math.pi / 8)
            return GaussianMixture(2 * torch.stack((angles.cos(), angles.sin()), dim=-1), sd=0.2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return ConvNet(*self.shape[1:3], self.width) if self.is_image else MLP(self.shape[1], self.width, depth=2)

    def start(self, device: torch.device) -> Tensor:
        return torch.rand(self.shape, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1

    def sampler(self, kind: str, norm: str = "element") -> Sampler:
        """``kind``: AniLA; Langevin; or AdjustedAniLA, which is for the same law at the same steps as AniLA: eps and b
        as `defaults.defaults` turns them."""
        step_size, threshold, noise_scale = self.numbers
        if kind == "Langevin":
            return Langevin(step_size, noise_scale)
        if kind == "AniLA":
            return AniLA(threshold, step_size, noise_scale, norm=norm)
        heat = noise_scale**2
        return AdjustedAniLA(threshold / heat, step_size * heat, norm=norm)

    def energy_of(self, sampler: Sampler, device: torch.device) -> nn.Module:
        """What the sampler is given. An exact one has no noise scale, and gets the energy over the temperature."""
        energy, heat = self.energy(device), self.numbers.noise_scale**2
        return Tempered(energy, heat) if sampler.is_exact and heat != 1 else energy

    def ours(self, kind: str, device: torch.device, compile: bool = True) -> Way:
        """The public face, as a user calls it. ``kind``: see `sampler`."""
        sampler, z = self.sampler(kind), self.start(device)
        energy = self.energy_of(sampler, device)
        return self.at_precision(lambda: sampler.run(energy, z, steps=self.steps, seed=0, compile=compile))

    def captured(self, kind: str, device: torch.device) -> Way:
        """The same less the whole-chain kernel, which `run` takes by itself where it can: CUDA graphs, on CUDA."""
        sampler, z = self.sampler(kind), self.start(device)
        energy = self.energy_of(sampler, device)

        def run():
            with torch.no_grad(), sampling(energy):
                chain = chain_of(sampler, energy, z=z, compile=True, whole=False)
                numbers, (seed, step) = sampler.numbers_on(device), (noise.as_word64(0, device) for _ in range(2))
                return chain(self.steps, numbers, State(z), seed, step)[0].z

        return self.at_precision(run)

    def transitions(self, kind: str, norm: str, device: torch.device, compile: bool = True) -> Way:
        """``steps`` transitions a call, each call from where the last one ended, so that none pays for a start: an
        adjusted chain takes a gradient more there."""
        sampler, state = self.sampler(kind, norm), State(self.start(device))
        energy = self.energy_of(sampler, device)
        numbers, (seed, step) = sampler.numbers_on(device), (noise.as_word64(0, device) for _ in range(2))
        chain = chain_of(sampler, energy, z=state.z, compile=compile)

        def run():
            nonlocal state, step
            with torch.no_grad(), sampling(energy):
                state, _ = chain(self.steps, numbers, state, seed, step)
            step = step + self.steps
            return state.z

        return self.at_precision(run)

    def at_precision(self, way: Way) -> Way:
        return in_precision(way, self.precision)


class Ordinary(nn.Module):
    """An MLP or ConvNet of fastanila as torch's layers in a row and in torch's layout, with the same parameters."""

    def __init__(self, network: MLP | ConvNet, precision: str):
        super().__init__()
        self.net = copy.deepcopy(nn.Sequential(*network.layers, network.head)).to(memory_format=torch.contiguous_format)
        projections = getattr(network, "projections", torch.empty(0, 0))
        self.register_buffer("projections", projections.clone() if len(projections) else None)
        self.confinement, self.bf16 = network.confinement, precision == "bf16"

    def forward(self, x: Tensor) -> Tensor:
        h = x
        if self.projections is not None:
            phase = x @ self.projections.T
            h = torch.cat((phase.sin(), phase.cos()), dim=-1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            u = self.net(h).flatten().float()
        return u + self.confinement / 2 * x.square().flatten(1).sum(-1) if self.confinement else u


def plainly(way: Way) -> Way:
    """The way, by the plain definitions in place of the kernels."""

    def run():
        with ops.plain():
            return way()

    return run


def in_precision(way: Way, precision: str) -> Way:
    """The way, with float32 products as ``precision`` has them: float32, tf32 or bf16."""

    def run():
        with matmul_precision(precision):
            return way()

    return run


# -------------------------------------------------------------------------------------------------------- updates


@contextlib.contextmanager
def rings_settings(device: torch.device, **changes) -> Iterator[Settings]:
    """The default job, but for the changes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Settings(**changes, device=str(device), out=f"{folder}/run")


@contextlib.contextmanager
def image_settings(device: torch.device, steps: int = 60, precision: str = "float32") -> Iterator[Settings]:
    """Updates on images of CIFAR-10's shape, whose pixels are random: what they show does not change the time."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        generator = torch.Generator().manual_seed(0)
        for part, count in (("train", 256), ("test", 8)):
            where = Path(folder) / "images" / part / "any"
            where.mkdir(parents=True)
            pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
            for i, image in enumerate(pixels):
                Image.fromarray(image.numpy()).save(where / f"{i}.png")
        yield Settings(
            data="image-folder", data_dir=f"{folder}/images", image_size=32, steps=steps, precision=precision,
            device=str(device), out=f"{folder}/run",
        )  # fmt: skip


def our_update(settings: Settings) -> tuple[job_training.Job, Way]:
    """A prepared job, and a way that makes one update after the other, on CUDA captured as a graph already."""
    job = job_training.prepare(settings)
    update = in_precision(update_training.build_update(job), settings.precision)
    if job.device.type == "cuda":
        for _ in range(update_training.WARM_UP + 2):
            update()
    return job, update
