"""fastanila: energy-based models with the anisotropic Langevin sampler, fused.

The step for your own loop is `fastanila.ops.anisotropic_step`; the samplers are `AniLA`, `Langevin` and others, some
exact; `load` reads a trained run back; `python -m fastanila.train --fused` trains one.
"""

from typing import TYPE_CHECKING

from . import samplers

if TYPE_CHECKING:
    from .samplers import *  # noqa: F403
    from .training.run import load

__all__ = ["load"]
__all__ += samplers.__all__
__version__ = "0.1.0"


def __getattr__(name: str):
    # on first use, because torch takes seconds to import, for which `--help` need not wait
    if name == "load":
        from .training.run import load

        return load
    if name in __all__:
        return getattr(samplers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
