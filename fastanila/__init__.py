"""fastanila: energy-based models with the anisotropic Langevin sampler, fused.

The step for your own loop is `fastanila.ops.anisotropic_step`; the samplers are `AniLA` and `Langevin`; `load` reads
a trained run back; `python -m fastanila.train --fused` trains one.
"""

from .runs import load
from .samplers import AniLA, Langevin, calibrate

__all__ = ["AniLA", "Langevin", "calibrate", "load"]
__version__ = "0.1.0"
