"""Pairs of chains that meet: how soon they do bounds the distance between a chain's law and its stationary one.

Two chains X and Y make the same transition, each by itself exactly the sampler's, with randomness in common. Once they
are in one state they stay together. If X is ``lag`` transitions ahead and both start from the law pi_0, the time of
meeting tau, the first t >= lag with X_t = Y_(t - lag), bounds the total variation to the stationary law pi:

    TV(pi_t, pi) <= E max(0, ceil((tau - lag - t) / lag))                (Biswas, Jacob and Vanetti 2019)

The samplers are those that judge a draw from independent normals: `MALA` and `AdjustedAniLA`. Their proposals are
coupled by `couple` and judged by one uniform for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import checks, noise
from ..models.score import Evaluate, evaluator, sampling
from ..noise import Stream
from ..ops import reference
from ..ops.reference import Proposal
from ..samplers.metropolis import MALA, AdjustedAniLA
from ..samplers.sampler import Sampler

Exact: TypeAlias = MALA | AdjustedAniLA  #: the samplers whose chains can be coupled here

#: How far apart two proposals of different scales may be, in squared standard deviations, for `couple` to try to make
#: them one: from there on the chance, 2 Phi(-1), is not worth what the trial adds to their distance.
NEAR = 4.0


class Draws(NamedTuple):
    """What the two chains of each of B pairs share in one transition."""

    normal: Tensor  #: (B, ...) standard normals
    extra: Tensor  #: (B, ...) more of them, for the wider one of two scales
    coin: Tensor  #: (B,) uniform on (0, 1], whether proposals become one
    accept: Tensor  #: (B,) likewise, the Metropolis uniform of both chains


def draws(z: Tensor, *, seed: int, step: int) -> Draws:
    """Those of transition ``step`` for B pairs of chains like z (B, ...), from `Stream.COUPLING`."""
    place: dict[str, Any] = dict(seed=seed, stream=Stream.COUPLING, device=z.device, dtype=z.dtype)
    normal, extra = noise.normal((len(z), 2, *z.shape[1:]), step=4 * step, **place).unbind(1)
    coin, accept = noise.uniform((len(z), 2), step=4 * step + 1, **place).unbind(1)
    return Draws(normal, extra, coin, accept)


class Coupled(NamedTuple):
    x: Tensor  #: (B, ...) drawn from the first chain's proposal
    y: Tensor  #: (B, ...) drawn from the second's
    same: Tensor  #: (B,) bool: they are equal, bit for bit


def couple(first: Proposal, second: Proposal, shared: Draws) -> Coupled:
    """A draw from each of two proposals N(mean, sd^2), made equal with a positive chance.

    Equal scales: the reflection-maximal coupling (Jacob, O'Leary and Atchade 2020; Bou-Rabee, Eberle and Zimmer
    2020). With d = (mean_x - mean_y) / sd and e = d / |d|,

        x = mean_x + sd xi;   y = x with probability min(1, phi(xi + d) / phi(xi)),  else mean_y + sd (xi - 2 e e.xi)

    so that they are equal as often as two draws of these laws can be, 2 Phi(-|d| / 2).

    Different scales: with s the lesser of the two, element by element, N(mean, sd^2) is N(a, s^2) about a ~ N(mean,
    sd^2 - s^2). The two a are drawn first, and then x and y as above about them, with scale s. This is less than
    maximal, but needs no rejection, whose number of trials has no bound. It spreads the chains where their scales
    differ much. So it is done where their distance (squared, in units of s, and with what the a add to it) is below
    `NEAR`. Elsewhere they are reflected, each at its own scale:

        x = mean_x + sd_x xi;   y = mean_y + sd_y (xi - 2 e e.xi)

    Which of the two is decided by the states alone, and so each draw has its law.

    Args:
        first: of B states, (B, ...).
        second: likewise.
        shared: independent of both.
    """
    (mean_x, sd_x), (mean_y, sd_y) = first, second
    least = torch.minimum(sd_x, sd_y)
    widths = [(sd.square() - least.square()).clamp(min=0).sqrt() for sd in (sd_x, sd_y)]
    spread = reference.chain_sum((widths[0].square() + widths[1].square()) / least.square())
    apart = (mean_x - mean_y) / least
    near = (spread == 0) | (reference.chain_sum(apart.square()) + spread < NEAR)

    about_x, about_y = (m + w * shared.extra for m, w in zip((mean_x, mean_y), widths, strict=True))
    at_x, at_y = _rows(near, about_x, mean_x), _rows(near, about_y, mean_y)
    apart = (at_x - at_y) / least
    square = reference.chain_sum(apart.square())
    along = reference.chain_sum(apart * shared.normal)
    same = near & (shared.coin.log() <= -(along + 0.5 * square))
    reflected = shared.normal - _wide(2 * along / torch.where(square > 0, square, 1.0), apart) * apart
    x = at_x + _rows(near, least, sd_x) * shared.normal
    y = at_y + _rows(near, least, sd_y) * reflected
    return Coupled(x, _rows(same, x, y), same)


class Chains(NamedTuple):
    z: Tensor  #: (B, ...)
    energy: Tensor  #: (B,) at z
    score: Tensor  #: (B, ...) at z


class Pairs(NamedTuple):
    x: Chains  #: those ahead
    y: Chains  #: those behind
    met: Tensor  #: (B,) bool: x and y are one state, and stay so


def transition(sampler: Exact, evaluate: Evaluate, pairs: Pairs, shared: Draws) -> Pairs:
    """One transition of every pair: by `couple`, judged by a common uniform. Each chain's is the sampler's own.

    A pair that has met is computed once, and y is x: bit for bit, on every device.
    """
    x, y, met = pairs
    proposed = couple(sampler.proposal(x.z, x.score), sampler.proposal(y.z, y.score), shared)
    same = proposed.same | met
    to = chains_at(evaluate, torch.cat((proposed.x, proposed.y[~same])).to(x.z.dtype))
    of_y = torch.arange(len(met), device=met.device)
    of_y[~same] = torch.arange(len(met), len(to.z), device=met.device)  # where they differ; else x's own
    x, x_moved = _judged(sampler, x, rows_of(to, slice(len(met))), shared.accept)
    y, y_moved = _judged(sampler, y, rows_of(to, of_y), shared.accept)
    met = met | (same & x_moved & y_moved)
    return Pairs(x, _picked(met, x, y), met)


def alone(sampler: Exact, evaluate: Evaluate, x: Chains, shared: Draws) -> Chains:
    """The transition of the chains ahead, while the others wait."""
    mean, sd = sampler.proposal(x.z, x.score)
    return _judged(sampler, x, chains_at(evaluate, (mean + sd * shared.normal).to(x.z.dtype)), shared.accept)[0]


def chains_at(evaluate: Evaluate, z: Tensor) -> Chains:
    energy, score = evaluate(z)
    assert energy is not None  # of an evaluator of an energy
    return Chains(z, energy, score)


def rows_of(chains: Chains, rows: Tensor | slice) -> Chains:
    return Chains(*(part[rows] for part in chains))


def _judged(sampler: Exact, old: Chains, new: Chains, uniform: Tensor) -> tuple[Chains, Tensor]:
    log_alpha = reference.log_accept(
        old.z, old.score, old.energy, new.z, new.score, new.energy, sampler.threshold, step_size=sampler.step_size,
        norm=sampler.norm,
    )  # fmt: skip
    accepted = reference.judge(log_alpha, uniform).accepted
    return _picked(accepted, new, old), accepted


def _picked(which: Tensor, new: Chains, old: Chains) -> Chains:
    return Chains(*(_rows(which, n, o) for n, o in zip(new, old, strict=True)))


def _rows(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(_wide(which, new), new, old)


def _wide(row: Tensor, like: Tensor) -> Tensor:
    return row.reshape(-1, *[1] * (like.dim() - 1))


# ----------------------------------------------------------------------------------------------------- lagged pairs


class Moment(NamedTuple):
    """Time t of those pairs that still go on."""

    t: int  #: of the chains ahead
    rows: Tensor  #: (n,) int64: which pairs
    x: Tensor  #: (n, ...) X_t
    y: Tensor | None  #: (n, ...) Y_(t - lag); None while t < lag
    met: Tensor  #: (n,) bool


def lagged(
    sampler: Exact,
    energy: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    lag: int,
    budget: int,
    seed: int,
    step: int = 0,
    least: int = 0,
) -> Iterator[Moment]:
    """The pairs at t = 0, 1, 2, ..., to t = ``budget`` at most; a pair that has met ends there, if t >= ``least``.

    Args:
        sampler: `MALA` or `AdjustedAniLA`.
        energy: U, a callable (B, ...) -> (B,), deterministic and of each state by itself.
        x: where X starts, (B, ...) floating point: draws of a law pi_0.
        y: where Y starts, draws of the same law, independent of x or not.
        lag: how many transitions X is ahead, at least 1.
        budget: transitions of X at most, at least ``lag``.
        seed: names the randomness, with step + t and a pair's place in the batch, on `Stream.COUPLING`.
        step: where in that stream transition 0 is; below 2^54 - ``budget``.

    Raises ValueError, TypeError naming the argument that cannot be.
    """
    check_sampler(sampler)
    checks.callables(energy=energy)
    checks.count("lag", lag)
    checks.count("budget", budget, least=lag)
    if x.shape != y.shape or x.dtype != y.dtype or not x.is_floating_point() or not len(x):
        raise ValueError(f"x and y must be alike, floating point and not empty, got {x.dtype} {tuple(x.shape)} and "
                         f"{y.dtype} {tuple(y.shape)}")  # fmt: skip
    with torch.no_grad(), sampling(energy):
        evaluate = evaluator(energy)
        rows = torch.arange(len(x), device=x.device)
        ahead, behind = chains_at(evaluate, x.detach()), chains_at(evaluate, y.detach())
        pairs = Pairs(ahead, behind, torch.zeros(len(x), dtype=torch.bool, device=x.device))
        for t in range(budget + 1):
            if t:
                whole = draws(x, seed=seed, step=step + t)
                shared = Draws(*(part[rows] for part in whole))
                if t <= lag:
                    pairs = pairs._replace(x=alone(sampler, evaluate, pairs.x, shared))
                else:
                    pairs = transition(sampler, evaluate, pairs, shared)
            yield Moment(t, rows, pairs.x.z, None if t < lag else pairs.y.z, pairs.met)
            go_on = ~pairs.met | (t < least)
            if not go_on.any():
                return
            if not go_on.all():
                rows = rows[go_on]
                pairs = Pairs(rows_of(pairs.x, go_on), rows_of(pairs.y, go_on), pairs.met[go_on])


def check_sampler(sampler: Sampler) -> Exact:
    if not isinstance(sampler, (MALA, AdjustedAniLA)):
        raise ValueError(f"sampler must be MALA or AdjustedAniLA to be coupled, got {type(sampler).__name__}")
    return sampler


class Meetings(NamedTuple):
    times: Tensor  #: (B,) int64: tau; -1 where the pair had not met
    lag: int
    budget: int  #: transitions of X after which the others were given up
    gradients: int  #: of the energy, all pairs together
    acceptance: float  #: share of the transitions of the chains ahead that moved them

    @property
    def all_met(self) -> bool:
        return bool((self.times >= 0).all())


def meetings(
    sampler: Exact, energy, x: Tensor, y: Tensor, *, lag: int, budget: int, seed: int, step: int = 0
) -> Meetings:
    """When each of B pairs meets. For the arguments and errors see `lagged`."""
    times = torch.full((len(x),), -1, dtype=torch.int64)
    gradients, moved, made, before = 0, 0, 0, x.detach().clone()

    def counted(z: Tensor) -> Tensor:
        nonlocal gradients
        gradients += len(z)
        return energy(z)

    for moment in lagged(sampler, counted, x, y, lag=lag, budget=budget, seed=seed, step=step):
        times[moment.rows[moment.met].cpu()] = moment.t
        if moment.t:
            moved += int((before[moment.rows] != moment.x).flatten(1).any(1).sum())
            made += len(moment.rows)
            before[moment.rows] = moment.x
    return Meetings(times, lag, budget, gradients, moved / max(made, 1))


class Bound(NamedTuple):
    value: Tensor  #: (T + 1,) float64, of TV(pi_t, pi) for t = 0, ..., T; above 1 it says nothing
    error: Tensor  #: (T + 1,) its standard error


def tv_bound(found: Meetings, last: int | None = None) -> Bound:
    """The mean over pairs of max(0, ceil((tau - lag - t) / lag)), for t = 0, ..., ``last``, by default till it is 0.

    Raises ValueError where a pair has not met: what is left out would be the largest terms.
    """
    if not found.all_met:
        late = int((found.times < 0).sum())
        raise ValueError(f"times must be of pairs that have met, and {late} of {len(found.times)} had not within "
                         f"{found.budget} transitions: no bound can be given")  # fmt: skip
    beyond = found.times - found.lag
    t = torch.arange((int(beyond.max()) if last is None else last) + 1)
    terms = -((t[:, None] - beyond) // found.lag)  # the ceiling of (beyond - t) / lag
    terms = terms.clamp(min=0).double()
    return Bound(terms.mean(1), terms.std(1) / len(beyond) ** 0.5)
