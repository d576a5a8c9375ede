"""The Frechet inception distance (FID), whose network comes from the internet: the number that papers report."""

from __future__ import annotations

from types import ModuleType
from typing import Any
from urllib.error import URLError

from torch import Tensor
from torch.utils.data import Dataset


class _Pixels(Dataset):
    """What torch-fidelity reads: uint8 (3, H, W) by index."""

    def __init__(self, images: Tensor):
        self.images = images.cpu().expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def torch_fidelity() -> ModuleType:
    """The package. Raises ModuleNotFoundError, naming the extra, where it is missing."""
    try:
        import torch_fidelity
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"FID is computed by torch-fidelity, and {error.name} is not installed: pip install fastanila[fid]",
            name=error.name,
        ) from error
    return torch_fidelity


def fid(samples: Tensor, truth: Tensor) -> float:
    """The FID of images (N, C, H, W) and (M, C, H, W), uint8, C 1 or 3, by torch-fidelity.

    Heusel et al., "GANs trained by a two time-scale update rule", NeurIPS 2017. It is biased upwards in N and M: papers
    have 50,000 samples. torch-fidelity fetches Inception's weights (95 MB) once, into torch hub's folder. Raises
    ModuleNotFoundError without the extra "fid", OSError in one line where the weights cannot be had.
    """
    package = torch_fidelity()
    options: dict[str, Any] = dict(cuda=samples.is_cuda, save_cpu_ram=True, cache=False, verbose=False)
    try:
        found = package.calculate_metrics(input1=_Pixels(samples), input2=_Pixels(truth), fid=True, **options)
    except (URLError, ConnectionError, TimeoutError) as error:
        raise OSError(
            f"FID needs the weights of Inception, and they cannot be fetched ({error}): run it once with a network, or "
            "put them into torch hub's folder, as torch-fidelity's manual has it"
        ) from error
    return float(found["frechet_inception_distance"])
