"""How well chains mix: R-hat, effective sample sizes, autocorrelation. None of it can tell that a law is wrong.

The functions take ``states`` (draws, chains, S): every transition's state, as `Sampler.run` keeps with keep_every=1,
or S numbers that summarise it. Sizes and times are by summary, (S,) float64; NaN for a summary that is not finite or
never varies. R-hat and ESS are arviz's, which is the extra "diagnostics"; the rest needs nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, noise
from ..models.score import sampling

_COORDINATES = 8  # states of at most as many elements are summarised by all of them
_PROJECTIONS = 4


def arviz():
    """The module. Raises ModuleNotFoundError, naming the extra, where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its next major version, which the extra excludes
            import arviz
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"R-hat and ESS need arviz, and {error.name} is not installed: pip install fastanila[diagnostics]",
            name=error.name,
        ) from error
    return arviz


def rhat(states: Tensor) -> Tensor:
    """Rank-normalised split R-hat: the larger of the ranks' and the folded ranks' (Vehtari et al. 2021).

    1 for chains that agree in location and spread, up to a few thousandths; above 1.01 they do not yet. Without bound
    where each chain stays where it is. Raises ValueError for fewer than 4 draws or 2 chains.
    """
    az = arviz()
    return _by_summary(states, lambda x: az.rhat(x, method="rank"))


def ess_bulk(states: Tensor) -> Tensor:
    """The effective sample size of the rank-normalised states, of all chains together (Vehtari et al. 2021)."""
    az = arviz()
    return _by_summary(states, lambda x: az.ess(x, method="bulk"))


def ess_tail(states: Tensor) -> Tensor:
    """The smaller of the effective sample sizes for the 5 % and the 95 % quantile (Vehtari et al. 2021)."""
    az = arviz()
    return _by_summary(states, lambda x: az.ess(x, method="tail"))


def autocorrelation(states: Tensor) -> Tensor:
    """rho_0 = 1, rho_1, ..., rho_{draws - 1}, (draws, S) float64, by FFT.

    Centred on the mean of all chains, and averaged over them: chains that stay apart have a rho that stays up. The
    divisor is ``draws`` at every lag, so that rho fades to 0 where few pairs are left.
    """
    _check(states)
    x = states.double()
    n = len(x)
    x = x - x.mean((0, 1))
    spectrum = torch.fft.rfft(x, n=2 * n, dim=0).abs().square()  # padded, lest the end meet the beginning
    covariance = torch.fft.irfft(spectrum, n=2 * n, dim=0)[:n].mean(1)
    return torch.where(states.amax((0, 1)) > states.amin((0, 1)), covariance / covariance[0], math.nan)


def autocorrelation_time(states: Tensor) -> Tensor:
    """tau = 1 + 2 (rho_1 + rho_2 + ...), in transitions; 1 for independent draws, below 1 for antithetic ones.

    The sum ends by Geyer's initial monotone sequence (Statistical Science 1992), which holds for reversible chains:
    the sums of neighbours rho_2t + rho_2t+1, up to the first that is not positive, each at most the one before.
    """
    rho = autocorrelation(states)
    pairs = rho[: len(rho) // 2 * 2].view(-1, 2, rho.shape[1]).sum(1)
    positive = (pairs > 0).cumprod(0).bool()
    pairs = torch.where(positive, pairs.cummin(0).values, 0.0)
    return torch.where(rho.isfinite().all(0), 2 * pairs.sum(0) - 1, math.nan)


class Diagnostics(NamedTuple):
    """The worst of all summaries. NaN where it cannot be said."""

    draws: int  #: transitions kept of each chain
    chains: int
    rhat: float  #: the largest
    ess_bulk: float  #: the least, of all chains together
    ess_tail: float
    ess_per_gradient: float  #: ess_bulk over draws * chains * the gradients of a transition
    autocorrelation_time: float  #: the largest, transitions
    acceptance: float  #: mean probability; 1 for samplers without correction


def diagnose(states: Tensor, *, gradients: int = 1, acceptance: float = 1.0) -> Diagnostics:
    """`Diagnostics` of states (draws, chains, S) from transitions of ``gradients`` energy gradients each."""
    _check(states)
    checks.count("gradients", gradients)
    draws, chains, _ = states.shape
    bulk = ess_bulk(states).min().item()
    return Diagnostics(
        draws=draws,
        chains=chains,
        rhat=rhat(states).max().item(),
        ess_bulk=bulk,
        ess_tail=ess_tail(states).min().item(),
        ess_per_gradient=bulk / (draws * chains * gradients),
        autocorrelation_time=autocorrelation_time(states).max().item(),
        acceptance=acceptance,
    )


class Summaries(NamedTuple):
    values: Tensor  #: (draws, chains, S) float64 on the CPU
    names: tuple[str, ...]  #: S of them, the first "energy"


def summarise(energy: Callable[[Tensor], Tensor], states: Tensor) -> Summaries:
    """The energy of states (draws, chains, ...), and their elements; of more than 8 elements, 4 projections.

    The projections are on fixed directions, drawn once and for all and of length 1: x.w, in the state's unit.
    """
    with torch.no_grad(), sampling(energy):
        u = torch.stack([energy(z) for z in states]).double()
    rows = states.flatten(2).double()
    size = rows.shape[2]
    if size > _COORDINATES:
        # step 1: at step 0 the stream gives the directions of `distances.sliced_wasserstein`
        stream = noise.Stream.BASELINE
        directions = noise.normal((_PROJECTIONS, size), seed=0, step=1, stream=stream, device=states.device).double()
        rows = rows @ (directions / directions.norm(dim=1, keepdim=True)).T
    name = "projection" if size > _COORDINATES else "element"
    names = ("energy", *(f"{name} {i}" for i in range(rows.shape[2])))
    return Summaries(torch.cat([u[..., None], rows], 2).cpu(), names)


class Trace(NamedTuple):
    values: Tensor  #: (draws, chains, S) float64 on the CPU, as in `Summaries`
    names: tuple[str, ...]
    acceptance: float  #: mean over draws and chains


def trace(
    sampler,
    energy: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    draws: int,
    seed: int,
    step: int = 0,
    block: int = 50,
    compile: bool = True,
) -> Trace:
    """``draws`` transitions of a sampler from the chains z (B, ...), summarised, as transitions step, step + 1, ...

    Made ``block`` at a time, each a `Sampler.run`, so that no more states are held; refresh="update" takes its gain
    anew at each.
    """
    checks.count("draws", draws)
    checks.count("block", block)
    values, accepted = [], []
    for start in range(0, draws, block):
        states = sampler.run(
            energy,
            z,
            steps=min(block, draws - start),
            seed=seed,
            step=step + start,
            callback=lambda info: accepted.append(info.acceptance.mean()),
            keep_every=1,
            compile=compile,
        )
        found, z = summarise(energy, states), states[-1]
        values.append(found.values)
    return Trace(torch.cat(values), found.names, torch.stack(accepted).mean().item())


def _by_summary(states: Tensor, statistic: Callable) -> Tensor:
    """The statistic of each summary as an array (chains, draws); NaN for one that is not finite or never varies."""
    _check(states)
    columns = states.double().cpu().permute(2, 1, 0)

    def value(x: Tensor) -> float:
        return float(statistic(x.numpy())) if x.isfinite().all() and x.min() < x.max() else math.nan

    return torch.tensor([value(x) for x in columns], dtype=torch.float64, device="cpu")


def _check(states: Tensor) -> None:
    if not isinstance(states, Tensor):
        raise TypeError(f"states must be a tensor, got {type(states).__name__}")
    if states.dim() != 3 or states.shape[0] < 4 or states.shape[1] < 2 or not states.shape[2]:
        raise ValueError(
            "states must be (draws, chains, summaries) with at least 4 draws of 2 chains, "
            f"got shape {tuple(states.shape)}"
        )
