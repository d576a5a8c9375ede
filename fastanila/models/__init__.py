"""The networks: energies, and the VAE that proposes."""

from .energies import MLP, ConvNet, GaussianMixture
from .unet import UNet
from .vae import VAE

__all__ = ["MLP", "VAE", "ConvNet", "GaussianMixture", "UNet"]
