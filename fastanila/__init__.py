"""fastanila: energy-based models with the anisotropic Langevin sampler, fused."""

__version__ = "0.1.0"
