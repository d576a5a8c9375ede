"""The likelihood of a trained run, by annealing."""

from __future__ import annotations

from typing import Any

from ..data import Images, Vectors, densities
from ..evaluation import likelihood
from ..evaluation.bases import Gaussian
from ..evaluation.plane import spaced
from . import build
from .run import Run, box_of, data_of, updates_past, with_sampler

_DRAWS = 10_000  #: of a density, to fit a base to and to take the likelihood of
_DEQUANTISED = 2 << 32  #: a step of the stream of annealing beyond those that its chains draw at
_EACH = 4  #: chains for each dimension, of which a covariance can be taken
_PURPOSES = "train", "held-out"


def likelihood_of(
    run: Run, *, data_dir: str | None = None, sampler: str | None = None, chains: int = 256, temperatures: int = 1000,
    settle: int = 1000, seed: int = 0, fused: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """`likelihood.evaluate` of the density that the run's model has: exp(-U / noise_scale^2) / Z, on the data's box
    where its chains are clamped to that. The chains of a sampler that is not exact have another law than this one.

    Without a box the base is the Gaussian of the run's chains, where there are at least four for each dimension, or
    else of the training data and their noise. ``sampler``: an exact one by name, in place of the run's, or of mala
    where that is none. Images are dequantised. Raises ValueError for a completion, for a run with classes, and for a
    sampler without noise, which has no law.
    """
    if run.settings.task == "completion" or run.classes is not None:
        raise ValueError("likelihood needs a run that learns the density of its data, without classes or completion")
    data, box = data_of(run, data_dir), box_of(run) if run.settings.clamp else None
    if sampler is not None or not run.sampler.is_exact:
        run = with_sampler(run, sampler or "mala")
    if isinstance(data, densities.Density):
        sets = [data.draw(_DRAWS, seed=seed, step=0, purpose=p, device=run.chains.device) for p in _PURPOSES]
    else:
        assert isinstance(data, (Images, Vectors))
        sets = [data.train, data.held_out]
    if pixels := isinstance(data, Images):
        sets = [likelihood.dequantised(x, seed=seed, step=_DEQUANTISED + i) for i, x in enumerate(sets)]
    settings = run.settings
    assert settings.steps is not None and settings.precision is not None and settings.data_noise is not None
    base = None
    if box is None and len(run.chains) >= _EACH * run.chains[0].numel():
        base = Gaussian.fitted(run.chains)
    elif box is None:
        base = Gaussian.fitted(spaced(sets[0], _DRAWS), floor=settings.data_noise**2)
    with build.arithmetic(settings.precision, fused=fused):
        return likelihood.evaluate(
            run.energy, run.sampler, *sets, base=base, box=box, pixels=pixels, chains=chains, temperatures=temperatures,
            settle=settle, seed=seed, step=updates_past(run) * settings.steps, compile=fused,
        )  # fmt: skip
