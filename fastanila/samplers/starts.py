"""Where the chains of an update start.

Every start has ``draw(update, given=None) -> (B, ...)``, the states, float32 on ``device``, that update's chains start
from, where ``given`` (B, ...) is the data of the update, which only a conditional start looks at;
``keep(update, z, unless)``, which takes them back after their transitions unless the 0-dim bool tensor says no; and
``tensors()``, what a checkpoint must hold. Draws are functions of (seed, update), ints or 0-dim int64 tensors on the
device, on streams of their own; they trace, and read nothing back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import noise
from ..data import classes
from ..models.vae import VAE
from ..noise import Stream


def from_noise(
    shape, box: tuple[float, float], *, seed, step, stream=Stream.START, device=None, labels: Tensor | None = None
) -> Tensor:
    """Uniform states over the box, float32 of the given shape.

    ``labels``: of states that carry their class, those to draw it from, int64 (N,), such as the training images'.
    """
    low, high = box
    z = low + (high - low) * noise.uniform(shape, seed=seed, step=step, stream=stream, device=device)
    if labels is None:
        return z
    rows = noise.integers(len(labels), shape[:1], seed=seed, step=step, stream=Stream.LABELS, device=device)
    return classes.state(classes.images(z), labels[rows])


class _Fresh:
    """A start that keeps nothing of an update for the next."""

    def keep(self, update: int | Tensor, z: Tensor, unless: Tensor) -> None:
        pass

    def tensors(self) -> dict[str, Tensor]:
        return {}


class NoiseStart(_Fresh):
    """Short-run chains: every update starts afresh from uniform noise (Nijkamp et al. 2019).

    labels: of states that carry their class, see `from_noise`.
    """

    def __init__(
        self, count: int, shape, box: tuple[float, float], *, seed: int | Tensor, device=None,
        labels: Tensor | None = None,
    ):  # fmt: skip
        self.shape, self.box, self.seed, self.device, self.labels = (count, *shape), box, seed, device, labels

    def draw(self, update: int | Tensor, given: Tensor | None = None) -> Tensor:
        return from_noise(self.shape, self.box, seed=self.seed, step=update, device=self.device, labels=self.labels)


class DataStart(_Fresh):
    """Contrastive divergence: every update starts from data (Hinton 2002)."""

    def __init__(self, count: int, data, *, seed: int | Tensor, device=None):
        self.count, self.data, self.seed, self.device = count, data, seed, device

    def draw(self, update: int | Tensor, given: Tensor | None = None) -> Tensor:
        return self.data.draw(self.count, seed=self.seed, step=update, purpose="start", device=self.device)


class PersistentStart:
    """Persistent chains (Tieleman 2008), on the device: update u moves the next ``count`` of ``population`` in turn.

    Each drawn chain starts again from uniform noise with probability ``reinit``. The population is a multiple of the
    count, so every chain is visited equally often and never twice in an update; ValueError if it is not. A chain keeps
    its class, if it has one, until it restarts; labels: see `from_noise`.

    replicas: R temperatures of each chain, the cold ones first in the population (R chains) and in what is drawn.
    """

    def __init__(
        self, count: int, population: int, shape, box: tuple[float, float], *, reinit: float | Tensor,
        seed: int | Tensor,
        device=None,
        labels: Tensor | None = None,
        replicas: int = 1,
    ):  # fmt: skip
        if population % count:
            raise ValueError(f"chains must be a multiple of batch_size ({count}), got {population}")
        self.count, self.box, self.reinit, self.seed, self.device = count, box, reinit, seed, device
        self.labels, self.replicas = labels, replicas
        # update -1, so that the first restarts differ from the starts
        self.chains = self._fresh((replicas * population, *shape), (1 << 56) - 1)

    def draw(self, update: int | Tensor, given: Tensor | None = None) -> Tensor:
        z = self.chains[self._rows(update)]
        u = noise.uniform(
            (len(z), *[1] * (z.dim() - 1)), seed=self.seed, step=update, stream=Stream.RESTART, device=self.device
        )
        return torch.where(u <= self.reinit, self._fresh(z.shape, update), z)

    def _fresh(self, shape, update: int | Tensor) -> Tensor:
        return from_noise(shape, self.box, seed=self.seed, step=update, device=self.device, labels=self.labels)

    def keep(self, update: int | Tensor, z: Tensor, unless: Tensor) -> None:
        rows = self._rows(update)
        self.chains.index_copy_(0, rows, torch.where(unless, self.chains[rows], z))

    def tensors(self) -> dict[str, Tensor]:
        return {"population": self.chains}

    def _rows(self, update: int | Tensor) -> Tensor:
        device, population = self.chains.device, len(self.chains) // self.replicas
        cold = update * self.count % population + torch.arange(self.count, device=device)
        if self.replicas == 1:
            return cold
        return (population * torch.arange(self.replicas, device=device)[:, None] + cold).flatten()


class AmortizedStart(_Fresh):
    """Every update starts from what a VAE's decoder proposes, g(N(0, I)) (Xie, Zheng and Li).

    A conditional one completes the update's data. ``vae`` may learn meanwhile.
    """

    def __init__(self, count: int, vae: VAE, *, seed: int | Tensor):
        self.count, self.vae, self.seed = count, vae, seed

    def draw(self, update: int | Tensor, given: Tensor | None = None) -> Tensor:
        return proposals(self.vae, self.count, seed=self.seed, update=update, given=given)


_BATCH = 4096  #: latents that are decoded at a time


@torch.no_grad()
def proposals(vae: VAE, count: int, *, seed: int | Tensor, update: int | Tensor, given: Tensor | None = None) -> Tensor:
    """(count, ...) proposals g(N(0, I)) of update ``update``, on the VAE's device. given: as for `VAE.decode`."""
    device = next(vae.parameters()).device
    latents = noise.normal((count, vae.latent), seed=seed, step=update, stream=Stream.LATENT, device=device)
    if given is None:
        return torch.cat([vae.decode(part) for part in latents.split(_BATCH)])
    return torch.cat([vae.decode(*parts) for parts in zip(latents.split(_BATCH), given.split(_BATCH), strict=True)])
