"""Energies U = -f: modules that map a batch of states (B, ...) to energies (B,), float32; lower is likelier."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import noise

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "leaky-relu": lambda: nn.LeakyReLU(0.2),
}


#: Layers in float32, as chains and energies are, whatever torch's default dtype is.
Linear = functools.partial(nn.Linear, dtype=torch.float32)
Conv2d = functools.partial(nn.Conv2d, dtype=torch.float32)
ConvTranspose2d = functools.partial(nn.ConvTranspose2d, dtype=torch.float32)


class MLP(nn.Module):
    """Energy of vectors (B, dim): ``depth`` hidden layers of ``width`` units, on the vector or its Fourier features.

    With ``features`` = m > 0 the network sees sin and cos of m random projections w.x, w ~ N(0, feature_scale^2)
    (Tancik et al. 2020): a plain MLP learns the thin shells of 2-D densities too slowly. ``confinement`` adds
    c/2 |x|^2, without which the energy of features, which are periodic, cannot be normalised.
    """

    def __init__(
        self,
        dim: int,
        width: int = 64,
        depth: int = 2,
        *,
        features: int = 0,
        feature_scale: float = 1.0,
        confinement: float = 0.0,
        activation: str = "silu",
        seed: int = 0,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.confinement = confinement
        projections = noise.normal((features, dim), seed=seed, step=0, stream=noise.Stream.INITIAL)
        self.register_buffer("projections", feature_scale * projections)
        sizes = [2 * features if features else dim, *[width] * depth]
        layers = []
        for a, b in itertools.pairwise(sizes):
            layers += [Linear(a, b), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers)
        self.head = Linear(sizes[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        if len(self.projections):
            with torch.autocast(x.device.type, enabled=False):  # a phase needs more than bfloat16's three digits
                h = fourier(x.float(), self.projections)
        return _reduced(self.head, self.layers(h)) + _confined(self.confinement, x)


class ConvNet(nn.Module):
    """Energy of images (B, channels, size, size): the papers' five convolutions.

    3x3, then three of 4x4 and stride 2, widths ``width`` times 1, 2, 4, 8, then one that covers what is left (size
    // 8) and leaves one number (Nijkamp et al. 2020, VanillaNet; Karimi, Xie and Li). ``size`` is at least 8.
    ``confinement`` adds c/2 |x|^2. With several ``outputs`` it has as many energies, (B, outputs), for the classes of a
    `wrappers.ClassEnergy`. Raises ValueError for a smaller size or an unknown activation.
    """

    def __init__(
        self, channels: int, size: int, width: int = 32, *, confinement: float = 0.0, activation: str = "leaky-relu",
        outputs: int = 1,
    ):  # fmt: skip
        super().__init__()
        if size < 8:
            raise ValueError(f"size must be at least 8 pixels, got {size}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.confinement = confinement
        widths = [width, 2 * width, 4 * width, 8 * width]
        layers = [Conv2d(channels, width, 3, 1, 1), ACTIVATIONS[activation]()]
        for a, b in itertools.pairwise(widths):
            layers += [Conv2d(a, b, 4, 2, 1), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers)
        self.head = Conv2d(widths[-1], outputs, size // 8)
        self.to(memory_format=torch.channels_last)  # what convolutions are fastest in, on CPU and GPU

    def forward(self, x: Tensor) -> Tensor:
        h, confined = self.layers(channels_last(x)), _confined(self.confinement, x)
        if len(self.head.weight) == 1:
            return _reduced(self.head, h) + confined
        with torch.autocast(x.device.type, enabled=False):  # float32, as the one energy is
            each = self.head(h.to(self.head.weight.dtype)).flatten(1)
        return each + (confined[:, None] if self.confinement else 0.0)


def channels_last(x: Tensor) -> Tensor:
    """Images (B, C, H, W) in the layout of the convolutions' weights.

    The backward of a convolution whose input has another layout than its weight copies its largest tensor to the one
    layout and back.
    """
    return x.contiguous(memory_format=torch.channels_last)


def fourier(x: Tensor, projections: Tensor) -> Tensor:
    """sin and cos of the projections (m, dim) of x (B, dim): (B, 2 m)."""
    phase = x @ projections.T
    return torch.cat((phase.sin(), phase.cos()), dim=-1)


def _reduced(head: nn.Linear | nn.Conv2d, h: Tensor) -> Tensor:
    """The last layer, whose one output covers all of h (B, ...): (B,) float32.

    Float32 under autocast too: energies are compared with one another, and bfloat16 has three digits. Written as a
    sum, which compiles into the activation ahead of it, where a product of one column is a call of its own.
    """
    return (h.float() * head.weight[0]).sum(tuple(range(1, h.dim()))) + head.bias


def _confined(confinement: float, x: Tensor) -> Tensor | float:
    return 0.5 * confinement * x.float().square().flatten(1).sum(-1) if confinement else 0.0


class GaussianMixture(nn.Module):
    """Energy of an isotropic Gaussian mixture in closed form, normalised: exp(-U) integrates to 1.

    Args:
        means: (M, D).
        sd: a number or (M,).
        weights: (M,), positive, default equal; they are normalised.
    """

    def __init__(self, means: Tensor, sd: float | Tensor = 1.0, weights: Tensor | None = None):
        super().__init__()
        if means.dim() != 2:
            raise ValueError(f"means must have shape (M, D), got {tuple(means.shape)}")
        count, dim = means.shape
        sd = torch.as_tensor(sd, dtype=means.dtype, device=means.device).expand(count).clone()
        weights = means.new_ones(count) if weights is None else weights.to(means)
        if not bool((sd > 0).all()):
            raise ValueError(f"sd must be positive, got {sd.tolist()}")
        if weights.shape != (count,) or not bool((weights > 0).all()):
            raise ValueError(f"weights must be {count} positive numbers, got {weights.tolist()}")
        self.register_buffer("means", means.clone())
        self.register_buffer("sd", sd)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("log_scale", self.log_weights - dim * (sd.log() + 0.5 * math.log(2 * math.pi)))

    def forward(self, x: Tensor) -> Tensor:
        squares = (x.unsqueeze(-2) - self.means).square().sum(-1)  # (B, M)
        return -torch.logsumexp(self.log_scale - 0.5 * squares / self.sd.square(), dim=-1)

    def sample(self, count: int, *, seed: int, step: int = 0) -> Tensor:
        """(count, D) exact draws, a function of (seed, step)."""
        cumulative = self.log_weights.exp().cumsum(0)
        device, dim = self.means.device, self.means.shape[1]
        u = noise.uniform((count,), seed=seed, step=step, stream=noise.Stream.EVALUATION, device=device)
        which = torch.searchsorted(cumulative, u.to(cumulative.dtype)).clamp(max=len(cumulative) - 1)
        xi = noise.normal((count, dim), seed=seed, step=step, stream=noise.Stream.EVALUATION_NORMALS, device=device)
        return self.means[which] + self.sd[which, None] * xi.to(self.means.dtype)


# ------------------------------------------------------------------------------------------ scores, and sampling mode
