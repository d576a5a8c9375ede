"""What the parameters are trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.vae import VAE


class Likelihood(NamedTuple):
    loss: Tensor  #: to be minimised, 0-dim
    energy_data: Tensor  #: mean U(data), 0-dim, detached
    energy_chains: Tensor  #: mean U(chains), 0-dim, detached


def likelihood(
    energy: Callable[[Tensor], Tensor],
    data: Tensor,
    chains: Tensor,
    energy_l2: float | Tensor = 0.0,
) -> Likelihood:
    """The likelihood gradient as a loss: mean U(data) - mean U(chains), chains detached.

    Its gradient in the parameters is minus that of the mean log likelihood of the data if the chains have the model's
    law (Karimi, Xie and Li, Algorithm 1, eq. 7; eq. 3 of an early draft has the sign reversed). ``energy_l2`` adds
    its multiple of mean U(data)^2 + mean U(chains)^2, which keeps the energies near zero (Du and Mordatch 2019).

    data: (N, ...), chains: (M, ...), of one dtype and device; energy maps either to one float32 energy a state.
    """
    on_data, on_chains = energy(torch.cat((data, chains.detach()))).split((len(data), len(chains)))
    loss = on_data.mean() - on_chains.mean()
    if isinstance(energy_l2, Tensor) or energy_l2:
        loss = loss + energy_l2 * (on_data.square().mean() + on_chains.square().mean())
    return Likelihood(loss, on_data.mean().detach(), on_chains.mean().detach())


class ELBO(NamedTuple):
    loss: Tensor  #: reconstruction + kl_weight * kl, to be minimised; 0-dim, as are the next two
    reconstruction: Tensor  #: detached
    kl: Tensor  #: nats, detached


def elbo(vae: VAE, x: Tensor, kl_weight: float | Tensor, noise: Tensor) -> ELBO:
    """The loss that teaches a VAE from revised states x (B, ...), detached: kl_weight times its negative ELBO.

        reconstruction = mean over x of 1/2 sum_i (x_i - g(latent)_i)^2,     latent = mean(x) + sd(x) * noise
        kl             = mean over x of KL(q(latent | x) || N(0, I))

    It is, but for a constant, kl_weight times the negative ELBO of a decoder N(g(latent), kl_weight I): the weight is
    the variance of the decoder's own noise, which proposals leave out (Kingma and Welling 2014; Xie, Zheng and Li,
    whose published code has the squares without the 1/2, hence twice the weight). The output of the autoencoder is
    compared with x, not a proposal. Where x is known to a conditional VAE, the difference is 0.

    noise: standard normals (B, latent).
    """
    x = x.detach()
    posterior = vae.encode(x)
    back = vae.decode(posterior.latents(noise), x)
    reconstruction = 0.5 * (back - x).square().flatten(1).sum(1).mean()
    mean, log_variance = posterior
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return ELBO(reconstruction + kl_weight * kl, reconstruction.detach(), kl.detach())
