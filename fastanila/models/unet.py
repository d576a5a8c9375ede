"""A U-Net as an energy: the product of an image with what the U-Net makes of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .energies import Conv2d, _confined, channels_last

#: Widths of the levels, of which each has half the pixels a side of the one above, in units of the first.
WIDTHS = (1, 2, 3)


class UNet(nn.Module):
    """Energy of images (B, channels, size, size): U(x) = scale <x, f(x)> + confinement / 2 |x|^2, f a U-Net.

    Its gradient is scale (f(x) + J(x)^T x): a field of a U-Net's detail, where a network that ends in one number has
    only what comes back through it. The product is that of Wang and Du 2025 (equilibrium matching with an explicit
    energy). f has three levels, of ``width`` times 1, 2 and 3 channels, and a residual block (two convolutions, SiLU,
    no norm) on each way, and two at the bottom.

    ``size`` must be a multiple of 4, and at least 8. With several ``outputs`` it has as many energies, (B, outputs),
    for the classes of a `wrappers.ClassEnergy`. Energies are float32 under autocast too. Raises ValueError for another
    size.

    ``scale``: 1 / 40 makes scores of order one in f into those that chains of images take with a step size of 4.
    """

    def __init__(
        self, channels: int, size: int, width: int = 24, *, confinement: float = 0.0, scale: float = 0.025,
        outputs: int = 1,
    ):  # fmt: skip
        super().__init__()
        if size < 8 or size % 4:
            raise ValueError(f"size must be a multiple of 4 and at least 8 pixels for a U-Net, got {size}")
        self.confinement, self.scale, self.outputs = confinement, scale, outputs
        self.layers = _Field(channels, outputs, [width * m for m in WIDTHS])
        self.to(memory_format=torch.channels_last)  # what convolutions are fastest in, on CPU and GPU

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        f, confined = self.layers(x).float(), _confined(self.confinement, x)
        if self.outputs == 1:
            return self.scale * (x.float() * f).sum((1, 2, 3)) + confined
        each = self.scale * (x.float()[:, None] * f.unflatten(1, (self.outputs, -1))).sum((2, 3, 4))
        return each + (confined[:, None] if isinstance(confined, Tensor) else confined)


class _Field(nn.Module):
    """f: (B, C, S, S) -> (B, outputs C, S, S)."""

    def __init__(self, channels: int, outputs: int, widths: list[int]):
        super().__init__()
        first, second, third = widths
        self.first = Conv2d(channels, first, 3, 1, 1)
        self.down = nn.ModuleList([_Block(first, first), _Block(first, second)])
        self.bottom = nn.Sequential(_Block(second, third), _Block(third, third))
        self.up = nn.ModuleList([_Block(third + second, second), _Block(second + first, first)])
        self.last = Conv2d(first, outputs * channels, 3, 1, 1)
        with torch.no_grad():  # a small field at the start, as every one of the blocks adds to it
            self.last.weight.mul_(0.1)
            self.last.get_parameter("bias").zero_()

    def forward(self, x: Tensor) -> Tensor:
        whole = self.down[0](self.first(x))
        half = self.down[1](functional.avg_pool2d(whole, 2))
        h = self.bottom(functional.avg_pool2d(half, 2))
        h = self.up[0](torch.cat((functional.interpolate(h, scale_factor=2), half), 1))
        h = self.up[1](torch.cat((functional.interpolate(h, scale_factor=2), whole), 1))
        return self.last(functional.silu(h))


class _Block(nn.Module):
    """x + two convolutions, each of SiLU; x by a 1x1 convolution where the channels change."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.convolutions = nn.ModuleList([Conv2d(channels, width, 3, 1, 1), Conv2d(width, width, 3, 1, 1)])
        self.skip = Conv2d(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for convolution in self.convolutions:
            h = convolution(functional.silu(h))
        return self.skip(x) + h
