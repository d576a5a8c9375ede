"""The samplers: frozen dataclasses of one shape (`sampler.Sampler`), each with its law in its docstring.

Their names need no torch, for which `--help` does not wait: a class is imported at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ablations import CodedAniLA, ShrunkNoise
    from .calibration import calibrate
    from .hmc import HMC
    from .langevin import AniLA, GradientDescent, Langevin, TamedLangevin
    from .metric import Preconditioned
    from .metropolis import MALA, AdjustedAniLA
    from .sampler import Sampler
    from .tempering import ReplicaExchange

    SAMPLERS: dict[str, type[Sampler]]  #: by the name that the commands know them by

__all__ = [
    "HMC",
    "MALA",
    "AdjustedAniLA",
    "AniLA",
    "CodedAniLA",
    "GradientDescent",
    "Langevin",
    "Preconditioned",
    "ReplicaExchange",
    "Sampler",
    "ShrunkNoise",
    "TamedLangevin",
    "calibrate",
]

#: By the name that the commands know them by: where they are here. First those without a Metropolis correction.
_UNADJUSTED = {
    "langevin": "langevin.Langevin",
    "anila": "langevin.AniLA",
    "tamed": "langevin.TamedLangevin",
    "gd": "langevin.GradientDescent",
    "anila-coded": "ablations.CodedAniLA",
    "shrunk-noise": "ablations.ShrunkNoise",
}
_EXACT = {
    "mala": "metropolis.MALA",
    "anila-mh": "metropolis.AdjustedAniLA",
    "hmc": "hmc.HMC",
}
_ALL = _UNADJUSTED | _EXACT

#: The names of the samplers whose law is the model's own (`Sampler.is_exact`).
EXACT = tuple(_EXACT)

_OTHERS = ("sampler.Sampler", "calibration.calibrate", "metric.Preconditioned", "tempering.ReplicaExchange")
_HOMES = {place.partition(".")[2]: place for place in (*_ALL.values(), *_OTHERS)}


def __getattr__(name: str):
    if name == "SAMPLERS":
        value = {known: _imported(place) for known, place in _ALL.items()}
    elif name in _HOMES:
        value = _imported(_HOMES[name])
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "SAMPLERS"})


def _imported(place: str):
    module, _, name = place.partition(".")
    return getattr(import_module(f".{module}", __name__), name)
