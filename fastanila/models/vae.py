"""The amortized sampler: a variational autoencoder whose decoder proposes where Langevin chains start.

Xie, Zheng and Li, "Learning Energy-Based Model with Variational Auto-Encoder as Amortized Sampler", AAAI 2021. The
decoder turns a latent of N(0, I) into a proposal, a few transitions of a sampler revise it, the energy learns from data
against revised states, and the autoencoder learns its ELBO on the revised states (`losses.elbo`): MCMC teaching.

Both kinds of network, of vectors and of images, are a `VAE`. A conditional one completes images: its states carry what
is known of them (`fastanila.data.completion`), and ``decode`` is then given such states and fills in the rest.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import checks, noise
from ..data import completion
from .energies import Conv2d, ConvTranspose2d, Linear, channels_last, fourier

_LATENT_SCALE = 5.0  #: standard deviation of the frequencies of a latent's Fourier features
_INITIAL = noise.Stream.INITIAL
_SMALLEST = 8  #: images are halved until a side is below this


class Posterior(NamedTuple):
    """q(latent | x), a Gaussian with independent elements."""

    mean: Tensor  #: (B, latent)
    log_variance: Tensor  #: (B, latent)

    def latents(self, noise: Tensor) -> Tensor:
        """Latents (B, latent) of this law, made from standard normals (B, latent): mean + sd * noise."""
        return self.mean + (0.5 * self.log_variance).exp() * noise


class VAE(nn.Module):
    """An encoder q(latent | x), a Gaussian, and a decoder g, of which g(N(0, I)) are the proposals.

    Args:
        encoder: (B, ...) -> (B, 2 latent), means ahead of log variances.
        decoder: (B, latent) -> (B, ...), float32.
        latent: the number of latents.
        conditional: the encoder takes whole states, and the decoder takes, beside the latents, states of which it sees
            what is known, and returns images.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent: int, *, conditional: bool = False):
        super().__init__()
        self.encoder, self.decoder, self.latent, self.conditional = encoder, decoder, latent, conditional

    def encode(self, x: Tensor) -> Posterior:
        """x: (B, ...)."""
        return Posterior(*self.encoder(x).chunk(2, dim=1))

    def decode(self, latents: Tensor, given: Tensor | None = None) -> Tensor:
        """g(latents), (B, ...), contiguous. latents: (B, latent). given: (B, ...), states that a conditional pair
        completes: their known part is kept, the rest has no influence. Raises ValueError if one is given none."""
        if not self.conditional:
            return self.decoder(latents).contiguous()
        if given is None:
            raise ValueError("given must be the states to complete, for this decoder is conditional; got None")
        return completion.fill(given, self.decoder(latents, completion.hidden(given))).contiguous()


def of_vectors(
    dim: int, latent: int, width: int, depth: int = 2, *, features: int = 0, feature_scale: float = 1.0,
    box: tuple[float, float] | None = None, seed: int = 0,
) -> VAE:  # fmt: skip
    """A VAE of vectors (B, dim), both networks with ``depth`` hidden layers; of depth 0 both are affine.

    With ``features`` both see, beside their input, that many random Fourier features of it, as `energies.MLP` does: the
    encoder's of frequencies feature_scale, 1 / unit of data, the decoder's of five by a latent's standard deviation. A
    decoder without them is so smooth that it lays a few modes or rings under one broad hump. With ``box`` no element of
    a proposal lies outside it: chains that start far off end there, and the energy would learn little else.
    """
    checks.count("latent", latent)
    checks.count("width", width)
    encoder = _mlp(Features(dim, features, feature_scale, seed=seed, step=1), 2 * latent, width, depth)
    decoder = _mlp(Features(latent, features, _LATENT_SCALE, seed=seed, step=2), dim, width, depth)
    return VAE(encoder, decoder if box is None else nn.Sequential(*decoder, Inside(box)), latent)


def of_images(channels: int, size: int, latent: int, width: int) -> VAE:
    """A convolutional VAE of images (B, channels, size, size) in [-1, 1]; size is at least 8."""
    return VAE(Encoder(channels, size, latent, width), Decoder(channels, size, latent, width), latent)


def of_completions(channels: int, size: int, latent: int, width: int) -> VAE:
    """A conditional VAE of images with missing regions: of states (B, channels + 1, size, size)."""
    encoder = Encoder(channels + 1, size, latent, width)
    return VAE(encoder, Decoder(channels, size, latent, width, condition=channels + 1), latent, conditional=True)


class Inside(nn.Module):
    """The real line onto the inside of a box, by tanh; near the middle the identity."""

    def __init__(self, box: tuple[float, float]):
        super().__init__()
        self.middle, self.half = (box[0] + box[1]) / 2, (box[1] - box[0]) / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.middle + self.half * torch.tanh((x - self.middle) / self.half)


class Features(nn.Module):
    """x (B, dim) and its ``count`` random Fourier features: (B, dim + 2 count)."""

    def __init__(self, dim: int, count: int, scale: float, *, seed: int, step: int):
        super().__init__()
        self.outputs = dim + 2 * count
        self.register_buffer("projections", scale * noise.normal((count, dim), seed=seed, step=step, stream=_INITIAL))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, fourier(x, self.projections)), dim=-1) if len(self.projections) else x


def _mlp(inputs: Features, outputs: int, width: int, depth: int) -> nn.Sequential:
    sizes = [inputs.outputs, *[width] * depth]
    layers: list[nn.Module] = [inputs]
    for a, b in itertools.pairwise(sizes):
        layers += [Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers, Linear(sizes[-1], outputs))


class Pyramid(nn.Module):
    """Features of images at full size, and at every half of it down to less than 8 pixels: ``sizes``, ``widths``."""

    def __init__(self, channels: int, size: int, width: int):
        super().__init__()
        self.sizes, self.widths = _levels(size, width)
        self.stem = Conv2d(channels, width, 3, 1, 1)
        self.down = nn.ModuleList(Conv2d(a, b, 4, 2, 1) for a, b in itertools.pairwise(self.widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [functional.silu(self.stem(channels_last(x)))]
        for layer in self.down:
            features.append(functional.silu(layer(features[-1])))
        return features


class Encoder(nn.Module):
    """Images (B, channels, size, size) -> (B, 2 latent)."""

    def __init__(self, channels: int, size: int, latent: int, width: int):
        super().__init__()
        checks.count("latent", latent)
        self.pyramid = Pyramid(channels, size, width)
        self.head = Linear(self.pyramid.widths[-1] * self.pyramid.sizes[-1] ** 2, 2 * latent)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pyramid(x)[-1].flatten(1))


class Decoder(nn.Module):
    """Latents (B, latent) -> images (B, channels, size, size) in [-1, 1], by transposed convolutions.

    With ``condition`` channels it sees an image of as many at every size on the way up (Ronneberger et al. 2015).
    """

    def __init__(self, channels: int, size: int, latent: int, width: int, condition: int = 0):
        super().__init__()
        self.sizes, widths = _levels(size, width)
        self.condition = Pyramid(condition, size, width) if condition else None
        self.foot = Linear(latent, widths[-1] * self.sizes[-1] ** 2)
        inputs = [2 * w if condition else w for w in widths]
        self.up = nn.ModuleList(
            ConvTranspose2d(inputs[i], widths[i - 1], 4, 2, 1, output_padding=self.sizes[i - 1] % 2)
            for i in reversed(range(1, len(widths)))
        )
        self.head = Conv2d(inputs[0], channels, 3, 1, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, latents: Tensor, condition: Tensor | None = None) -> Tensor:
        side = self.sizes[-1]
        h = functional.silu(self.foot(latents)).unflatten(1, (-1, side, side))
        known = [None] * len(self.sizes) if self.condition is None else self.condition(condition)
        for layer, beside in zip(self.up, known[:0:-1], strict=True):
            h = functional.silu(layer(_beside(h, beside)))
        return self.head(_beside(h, known[0])).tanh()


def _beside(h: Tensor, features: Tensor | None) -> Tensor:
    return h if features is None else torch.cat((h, features), 1)


def _levels(size: int, width: int) -> tuple[list[int], list[int]]:
    """The sides, halved and rounded down, and how many channels a level has: width times 1, 2, 4, 4, ..."""
    checks.count("size", size, least=_SMALLEST)
    checks.count("width", width)
    sizes = [size]
    while sizes[-1] >= _SMALLEST:
        sizes.append(sizes[-1] // 2)
    return sizes, [width * 2 ** min(level, 2) for level in range(len(sizes))]
