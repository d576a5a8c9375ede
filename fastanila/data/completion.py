"""Images of which a region is missing: the regions, and states that carry what they are conditioned on.

A state (B, C + 1, H, W) holds an image and, in its last channel, its region: 1 where a pixel is to be filled in, 0
where it is known. The known pixels and the region are the condition c of U(x | c), and chains move where `free` says,
by the step's ``mask``: they carry their condition with them, and what takes a batch of states takes these.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import noise
from ..noise import Stream
from .images import Images

REGIONS = ("centre", "half", "blocks")
_BLOCKS = 4  #: a side's blocks


def region(kind: str, count: int, size: int, *, seed, step, offset: int = 0, device=None) -> Tensor:
    """What is missing, (count, 1, size, size) bool. centre: the middle square of half the side; half: the right half;
    blocks: eight of the sixteen squares of a 4 x 4 grid, drawn anew for each image from the stream MASKS.

    Raises ValueError for an unknown kind.
    """
    at = torch.arange(size, device=device)
    if kind == "centre":
        inside = (at >= size // 4) & (at < size // 4 + size // 2)
        missing = inside[:, None] & inside
    elif kind == "half":
        missing = (at >= size // 2).expand(size, size)
    elif kind == "blocks":
        cells = _BLOCKS**2
        u = noise.uniform((count, cells), seed=seed, step=step, stream=Stream.MASKS, offset=offset, device=device)
        chosen = u.argsort(1).argsort(1) < cells // 2
        block = at * _BLOCKS // size
        return chosen[:, block[:, None] * _BLOCKS + block][:, None]
    else:
        raise ValueError(f"mask must be one of {', '.join(REGIONS)}, got {kind!r}")
    return missing.expand(count, 1, size, size)


def state(images: Tensor, missing: Tensor) -> Tensor:
    """(B, C + 1, H, W) of images (B, C, H, W) and regions (B, 1, H, W)."""
    return torch.cat((images, missing.to(images.dtype)), 1)


def images(z: Tensor) -> Tensor:
    """The images (B, C, H, W) of states."""
    return z[:, :-1]


def missing(z: Tensor) -> Tensor:
    """The regions (B, 1, H, W) of states, bool."""
    return z[:, -1:] > 0


def free(z: Tensor) -> Tensor:
    """Which elements of states chains may move: those of the region's pixels. Bool, of z's shape."""
    return torch.cat((missing(z).expand_as(images(z)), torch.zeros_like(z[:, -1:], dtype=torch.bool)), 1)


def share(z: Tensor, norm: str) -> Tensor:
    """The share, 0-dim, of a state's elements whose gain can be below 1: those that may move; for norm="channel" all of
    the region's pixels; for "chain", where all elements have one gain, all."""
    if norm == "chain":
        return torch.ones((), dtype=torch.float32, device=z.device)
    return (missing(z) if norm == "channel" else free(z)).float().mean()


def fill(z: Tensor, decoded: Tensor) -> Tensor:
    """States with the region of z filled in from images (B, C, H, W), and all else kept."""
    return torch.cat((torch.where(missing(z), decoded.to(z.dtype), images(z)), z[:, -1:]), 1)


def hidden(z: Tensor, shade: float = 0.0) -> Tensor:
    """States whose region is blank: what is known and nothing else."""
    return fill(z, torch.full_like(images(z), shade))


@dataclasses.dataclass(frozen=True, eq=False)
class Completions:
    """Images as states whose region is missing: what `fastanila.data` calls a data set."""

    images: Images
    region: str  #: one of REGIONS

    def __post_init__(self):
        region(self.region, 1, self.images.shape[-1], seed=0, step=0)

    @property
    def name(self) -> str:
        return self.images.name

    @property
    def box(self) -> tuple[float, float]:
        return self.images.box

    @property
    def fingerprint(self) -> dict:
        return self.images.fingerprint

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape
        return channels + 1, height, width

    def draw(self, count: int, *, seed, step, purpose="train", offset: int = 0, device=None) -> Tensor:
        """States (count, C + 1, H, W), float32: images as `data.Images` draws them, with their regions."""
        drawn = self.images.draw(count, seed=seed, step=step, purpose=purpose, offset=offset, device=device)
        size = self.images.shape[-1]
        return state(drawn, region(self.region, count, size, seed=seed, step=step, offset=offset, device=drawn.device))
