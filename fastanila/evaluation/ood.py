"""Which images an energy takes for likelier: held-out ones, or outliers of several kinds.

An outlier is what has a higher energy than the data: Du and Mordatch, "Implicit generation and modeling with energy
based models", NeurIPS 2019; Grathwohl et al. 2020. A likelihood is no measure of what is typical. Under models of
images of many kinds smooth images, such as those of one colour, can be likelier than all data (Nalisnick et al., "Do
deep generative models know what they don't know?", ICLR 2019), so they are among the outliers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import rankdata
from torch import Tensor

from .. import noise
from ..data import registry
from ..data.images import LOADERS, Images, from_pixels
from ..noise import Stream
from .baselines import gaussian_pixels, spaced

_MOST = 2000  # images of a kind
_BATCH = 1024  # images whose energy is taken at a time


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The area under the ROC curve of a detector of outliers by their energy, from energies (N,) and (M,): the
    probability that an outlier has a higher energy than a datum, where equal ones count half.

    1 tells all apart, 0.5 none, and 0 takes all for the other. By the ranks of the Mann-Whitney statistic; NaN where an
    energy is. Raises ValueError for an empty set.
    """
    if not (len(inside) and len(outside)):
        raise ValueError(f"inside and outside must not be empty, got {len(inside)} and {len(outside)} energies")
    pooled = torch.cat((inside, outside)).double().cpu().numpy()
    n, m = len(inside), len(outside)
    ranks = rankdata(pooled)[n:].sum()
    return float((ranks - m * (m + 1) / 2) / (n * m))


def outliers(train: Tensor, count: int, *, seed: int) -> dict[str, Tensor]:
    """``count`` images of each kind, of the shape and on the device of the training images (N, C, H, W) in [-1, 1].

    uniform: every element uniform on [-1, 1]; constant: images of one grey or colour, each channel uniform; gaussian:
    `gaussian_pixels`, which has each element's own mean and variance.
    """
    _, channels, height, width = train.shape
    shapes = {"uniform": (count, channels, height, width), "constant": (count, channels, 1, 1)}
    made = {}
    for step, (name, shape) in enumerate(shapes.items()):
        u = noise.uniform(shape, seed=seed, step=step, stream=Stream.OUTLIERS, device=train.device)
        made[name] = (2 * u - 1).expand(count, channels, height, width)
    return made | {"gaussian": gaussian_pixels(train, count, seed=seed)}


def load(source: str, shape: tuple[int, int, int], data_dir: str | None = None, device=None) -> Tensor:
    """The held-out images, (N, C, H, W) in [-1, 1], of another data set, as images of ``shape``: (C, H, W).

    ``source``: the name of a data set of images, or an image folder. Those of another size are resized, and colour is
    made grey or grey three equal channels. Raises ValueError or FileNotFoundError for what cannot be read.
    """
    channels, size, _ = shape
    named = [name for name in LOADERS if name != "image-folder"]
    if source not in named and not Path(source).is_dir():
        raise ValueError(f"ood must be {', '.join(named)} or a folder of class folders, got {source!r}")
    if source == "cifar10":
        channels, size = 3, 32
    name, folder = (source, data_dir) if source in named else ("image-folder", source)
    found = registry.load(name, data_dir=folder, size=size, channels=channels, device=device)
    assert isinstance(found, Images)
    return fitted(from_pixels(spaced(found.held_out, _MOST)), shape)


def fitted(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images (N, C', H', W') in [-1, 1] as images of ``shape``, (C, H, W), C and C' 1 or 3: grey by ITU-R 601's
    weights, as Pillow has it, and resized with antialiasing."""
    channels = shape[0]
    if images.shape[1] == 3 and channels == 1:
        images = (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    images = images.expand(-1, channels, -1, -1)
    if images.shape[2:] == shape[1:]:
        return images
    resized = torch.nn.functional.interpolate(images, list(shape[1:]), mode="bilinear", antialias=True)
    return resized.clamp(-1, 1)


@torch.no_grad()
def energies(energy: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """(N,) of images (N, C, H, W)."""
    return torch.cat([energy(part) for part in images.split(_BATCH)])


def evaluate(
    energy: Callable[[Tensor], Tensor], data: Images, other: Tensor | None = None, *, seed: int = 0
) -> dict[str, float]:
    """`auroc` of at most 2,000 held-out images, evenly spaced, against as many `outliers` of each kind (auroc_uniform,
    auroc_constant, auroc_gaussian) and against ``other`` images (auroc_ood) where there are some."""
    inside = from_pixels(spaced(data.held_out, _MOST))
    kinds = outliers(from_pixels(data.train), len(inside), seed=seed)
    if other is not None:
        kinds["ood"] = other
    own = energies(energy, inside)
    return {f"auroc_{name}": auroc(own, energies(energy, images)) for name, images in kinds.items()}
