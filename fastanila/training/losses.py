"""What the parameters are trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..data import classes
from ..models.vae import VAE


class Classification(NamedTuple):
    """How the energies classify a batch: 0-dim each, detached."""

    cross_entropy: Tensor  #: mean of -log p(y | x), nats
    accuracy: Tensor  #: share of the data whose own class has the least energy


class Likelihood(NamedTuple):
    loss: Tensor  #: to be minimised, 0-dim
    energy_data: Tensor  #: mean U(data), 0-dim, detached
    energy_chains: Tensor  #: mean U(chains), weighted as in the loss, 0-dim, detached
    classification: Classification | None = None  #: of energies with classes


def likelihood(
    energy: Callable[..., Tensor],
    data: Tensor,
    chains: Tensor,
    energy_l2: float | Tensor = 0.0,
    class_weight: float | Tensor | None = None,
    log_weights: Tensor | None = None,
) -> Likelihood:
    """The likelihood gradient as a loss: mean U(data) - mean U(chains), chains detached.

    Its gradient in the parameters is minus that of the mean log likelihood of the data if the chains have the model's
    law (Karimi, Xie and Li, Algorithm 1, eq. 7; eq. 3 of an early draft has the sign reversed). ``energy_l2`` adds
    its multiple of mean U(data)^2 + mean U(chains)^2, which keeps the energies near zero (Du and Mordatch 2019).

    data: (N, ...), chains: (M, ...), of one dtype and device; energy maps either to one float32 energy a state.

    ``log_weights``: (M,), of chains whose law is the model's with the weights softmax(log_weights): means over chains
    are weighted by them (Carbone, Hua, Coste and Vanden-Eijnden 2023).

    ``class_weight``: of states that carry their class, and a `wrappers.ClassEnergy`. The energies are then U(x, y), so
    that with chains of the data's classes it is the likelihood of x given y; and the loss has the weight times the
    cross-entropy of the classifier p(y | x) = exp(-U(x, y)) / sum_y' exp(-U(x, y')) on the data, which alone learns how
    the energies of different classes compare (Grathwohl et al. 2020 learn p(x) and p(y | x) instead).
    """
    states = torch.cat((data, chains.detach()))
    if class_weight is None:
        u, classification = energy(states), None
    else:
        each, y = energy(states, every_class=True), classes.labels(states)
        u = each.gather(1, y[:, None])[:, 0]
        each, y = each[: len(data)], y[: len(data)]
        cross_entropy = functional.cross_entropy(-each, y)
        accuracy = (each.detach().argmin(1) == y).float().mean()
        classification = Classification(cross_entropy.detach(), accuracy)
    on_data, on_chains = u.split((len(data), len(chains)))
    share = None if log_weights is None else log_weights.detach().softmax(0).to(u.dtype)

    def over_chains(x: Tensor) -> Tensor:
        return x.mean() if share is None else (share * x).sum()

    loss = on_data.mean() - over_chains(on_chains)
    if isinstance(energy_l2, Tensor) or energy_l2:
        loss = loss + energy_l2 * (on_data.square().mean() + over_chains(on_chains.square()))
    if class_weight is not None:
        loss = loss + class_weight * cross_entropy
    return Likelihood(loss, on_data.mean().detach(), over_chains(on_chains).detach(), classification)


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
