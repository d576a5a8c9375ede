"""The samplers: frozen dataclasses of one shape (`sampler.Sampler`), each with its law in its docstring."""

from __future__ import annotations

from .calibration import calibrate
from .hmc import HMC
from .langevin import AniLA, GradientDescent, Langevin, TamedLangevin
from .metropolis import MALA, AdjustedAniLA
from .sampler import Sampler

#: By the name that the commands know them by.
SAMPLERS: dict[str, type[Sampler]] = {
    "langevin": Langevin,
    "anila": AniLA,
    "tamed": TamedLangevin,
    "gd": GradientDescent,
    "mala": MALA,
    "anila-mh": AdjustedAniLA,
    "hmc": HMC,
}

__all__ = [
    "HMC", "MALA", "SAMPLERS", "AdjustedAniLA", "AniLA", "GradientDescent", "Langevin", "Sampler", "TamedLangevin",
    "calibrate",
]  # fmt: skip
