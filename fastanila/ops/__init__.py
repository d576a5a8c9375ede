"""The fused operators. `anisotropic_step` is the step for your own loop."""

from .dispatch import INTERPRETED, fused, plain
from .metropolis import metropolis_step
from .reference import Metropolis, Statistics
from .step import anisotropic_step, anisotropic_step_

__all__ = [
    "INTERPRETED",
    "Metropolis",
    "Statistics",
    "anisotropic_step",
    "anisotropic_step_",
    "fused",
    "metropolis_step",
    "plain",
]
