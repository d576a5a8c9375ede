"""How well chains mix: R-hat, effective sample sizes, autocorrelation. None of it can tell that a law is wrong.

The functions take ``states`` (draws, chains, S): every transition's state, as `Sampler.run` keeps with keep_every=1,
or S numbers that summarise it. Sizes and times are by summary, (S,) float64; NaN for a summary that is not finite or
never varies. R-hat and ESS are ArviZ's, which is the extra "diagnostics" (Python 3.11 or later); `datatree` gives the
chains to everything else that ArviZ can do. The rest needs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import checks, noise
from ..models.score import sampling

if TYPE_CHECKING:
    from xarray import DataTree

_COORDINATES = 8  # states of at most as many elements are summarised by all of them
_PROJECTIONS = 4


class ArviZ(NamedTuple):
    base: ModuleType  #: arviz_base: chains as a DataTree
    stats: ModuleType  #: arviz_stats: R-hat, ESS


def arviz() -> ArviZ:
    """The two of ArviZ's packages that are used. Raises ModuleNotFoundError, naming the extra, where one is missing."""
    try:
        import arviz_base
        import arviz_stats
        import xarray_einstats  # noqa: F401  without it arviz_stats can be imported, but has neither R-hat nor ESS
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"R-hat and ESS need ArviZ, and {error.name} is not installed: pip install fastanila[diagnostics], which "
            "needs Python 3.11 or later",
            name=error.name,
        ) from error
    return ArviZ(arviz_base, arviz_stats)


def datatree(states: Tensor, names: Sequence[str] | None = None) -> DataTree:
    """The states as ArviZ has chains: an `xarray.DataTree` whose group "posterior" has a variable for each summary.

    A variable is float64 with the dimensions "chain" and "draw". ``names``: of the S summaries, as `Summaries` and
    `Trace` have them; "summary 0", "summary 1", ... if None. ArviZ reads it: `arviz.summary(tree)`,
    `arviz.plot_trace(tree)`. Raises ModuleNotFoundError without the extra "diagnostics", ValueError for names that are
    not S different ones or are those of a dimension.
    """
    _check(states)
    count = states.shape[2]
    names = [f"summary {i}" for i in range(count)] if names is None else list(names)
    if len(names) != count or len({*names, "chain", "draw"}) != count + 2:
        raise ValueError(f"names must be {count} different ones, none of them 'chain' or 'draw', got {names}")
    columns = states.detach().double().cpu().permute(2, 1, 0).numpy()
    # unchecked: to have more chains than draws, of which the check warns, is common here
    return arviz().base.from_dict({"posterior": dict(zip(names, columns, strict=True))}, check_conventions=False)


def rhat(states: Tensor) -> Tensor:
    """Rank-normalised split R-hat: the larger of the ranks' and the folded ranks' (Vehtari et al. 2021).

    1 for chains that agree in location and spread, up to a few thousandths; above 1.01 they do not yet. Without bound
    where each chain stays where it is. Raises ValueError for fewer than 4 draws or 2 chains.
    """
    stats = arviz().stats
    return _by_summary(states, lambda tree: stats.rhat(tree, method="rank"))


def ess_bulk(states: Tensor) -> Tensor:
    """The effective sample size of the rank-normalised states, of all chains together (Vehtari et al. 2021)."""
    stats = arviz().stats
    return _by_summary(states, lambda tree: stats.ess(tree, method="bulk"))


def ess_tail(states: Tensor) -> Tensor:
    """The smaller of the effective sample sizes for the 5 % and the 95 % quantile (Vehtari et al. 2021)."""
    stats = arviz().stats
    return _by_summary(states, lambda tree: stats.ess(tree, method="tail", prob=(0.05, 0.95)))


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


def _by_summary(states: Tensor, statistic: Callable[[DataTree], DataTree]) -> Tensor:
    """The statistic of each summary, from a `datatree` of them; NaN for one that is not finite or never varies."""
    _check(states)
    columns = states.detach().double().cpu()
    sound = columns.isfinite().all(0).all(0) & (columns.amin((0, 1)) < columns.amax((0, 1)))
    found = torch.full_like(sound, math.nan, dtype=torch.float64)
    if sound.any():
        values = statistic(datatree(columns[..., sound]))
        found[sound] = torch.tensor([float(x) for x in values.data_vars.values()], dtype=torch.float64, device="cpu")
    return found


def _check(states: Tensor) -> None:
    if not isinstance(states, Tensor):
        raise TypeError(f"states must be a tensor, got {type(states).__name__}")
    if states.dim() != 3 or states.shape[0] < 4 or states.shape[1] < 2 or not states.shape[2]:
        raise ValueError(
            "states must be (draws, chains, summaries) with at least 4 draws of 2 chains, "
            f"got shape {tuple(states.shape)}"
        )
