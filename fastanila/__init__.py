"""fastanila: energy-based models with the anisotropic Langevin sampler, fused.

The step for your own loop is `fastanila.ops.anisotropic_step`; the samplers are `AniLA`, `Langevin` and others, some
exact; `load` reads a trained run back; `python -m fastanila.train --fused` trains one.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .samplers import HMC, MALA, AdjustedAniLA, AniLA, GradientDescent, Langevin, TamedLangevin, calibrate
    from .training.run import load

__all__ = [
    "HMC", "MALA", "AdjustedAniLA", "AniLA", "GradientDescent", "Langevin", "TamedLangevin", "calibrate", "load",
]  # fmt: skip
__version__ = "0.1.0"

_HOME = {name: "samplers" for name in __all__} | {"load": "training.run"}


def __getattr__(name: str):
    # on first use, because torch takes seconds to import, for which `--help` need not wait
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
