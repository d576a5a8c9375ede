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
from ..models.vae import VAE
from ..noise import Stream


def from_noise(shape, box: tuple[float, float], *, seed, step, stream=Stream.START, device=None) -> Tensor:
    """Uniform states over the box, float32 of the given shape."""
    low, high = box
    return low + (high - low) * noise.uniform(shape, seed=seed, step=step, stream=stream, device=device)


class _Fresh:
    """A start that keeps nothing of an update for the next."""

    def keep(self, update: int | Tensor, z: Tensor, unless: Tensor) -> None:
        pass

    def tensors(self) -> dict[str, Tensor]:
        return {}


class NoiseStart(_Fresh):
    """Short-run chains: every update starts afresh from uniform noise (Nijkamp et al. 2019)."""

    def __init__(self, count: int, shape, box: tuple[float, float], *, seed: int | Tensor, device=None):
        self.shape, self.box, self.seed, self.device = (count, *shape), box, seed, device

    def draw(self, update: int | Tensor, given: Tensor | None = None) -> Tensor:
        return from_noise(self.shape, self.box, seed=self.seed, step=update, device=self.device)


class DataStart(_Fresh):
    """Contrastive divergence: every update starts from data (Hinton 2002)."""

    def __init__(self, count: int, data, *, seed: int | Tensor, device=None):
        self.count, self.data, self.seed, self.device = count, data, seed, device

    def draw(self, update: int | Tensor, given: Tensor | None = None) -> Tensor:
        return self.data.draw(self.count, seed=self.seed, step=update, purpose="start", device=self.device)


class PersistentStart:
    """Persistent chains (Tieleman 2008), on the device: update u moves the next ``count`` of ``population`` in turn.

    Each drawn chain starts again from uniform noise with probability ``reinit``. The population is a multiple of the
    count, so every chain is visited equally often and never twice in an update; ValueError if it is not.
    """

    def __init__(
        self, count: int, population: int, shape, box: tuple[float, float], *, reinit: float | Tensor,
        seed: int | Tensor,
        device=None,
    ):  # fmt: skip
        if population % count:
            raise ValueError(f"chains must be a multiple of batch_size ({count}), got {population}")
        self.count, self.box, self.reinit, self.seed, self.device = count, box, reinit, seed, device
        # update -1, so that the first restarts differ from the starts
        self.chains = from_noise((population, *shape), box, seed=seed, step=(1 << 56) - 1, device=device)

    def draw(self, update: int | Tensor, given: Tensor | None = None) -> Tensor:
        z = self.chains[self._rows(update)]
        u = noise.uniform(
            (self.count, *[1] * (z.dim() - 1)), seed=self.seed, step=update, stream=Stream.RESTART, device=self.device
        )
        fresh = from_noise(z.shape, self.box, seed=self.seed, step=update, device=self.device)
        return torch.where(u <= self.reinit, fresh, z)

    def keep(self, update: int | Tensor, z: Tensor, unless: Tensor) -> None:
        rows = self._rows(update)
        self.chains.index_copy_(0, rows, torch.where(unless, self.chains[rows], z))

    def tensors(self) -> dict[str, Tensor]:
        return {"population": self.chains}

    def _rows(self, update: int | Tensor) -> Tensor:
        return update * self.count % len(self.chains) + torch.arange(self.count, device=self.chains.device)


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
